"""The reference executor: runs any valid plan, on a CPU or a GPU, in a random order among all allowed.

Contract: whatever the plan and whatever the order drawn, the tokens are those of the sequential plan. A plan whose
derived waits are too weak gives wrong tokens here sooner or later, on any machine.

Pseudo-code of one iteration::

    copy the batch's metadata to the device; take the tokens that only the device knows
    embed all rows
    while steps are left:
        pick one lane at random among those whose next step has all its predecessors done
            (and which, if it is a collective, is the first in the program that has not run)
        run that step's kernel on its nano-batch's rows, in the plan's buffers
    gather the rows to sample; final norm, head, sample

The loop of the engine is `launch` / `collect`: iterations run on one worker thread, in the order launched, while the
caller forms the next batch and handles the last one's tokens.
"""

import random
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace

import torch

from nanoflow.ops.batch import DenseBatch, SamplingBatch, StepOutput
from nanoflow.ops.communicator import Communicator
from nanoflow.ops.device_arrays import DeviceArrays
from nanoflow.ops.device_batch import DeviceBatch
from nanoflow.ops.sampling import NOTHING_SAMPLED, Sampler, StepTensors
from nanoflow.pipeline.bound_programs import BoundPrograms
from nanoflow.pipeline.clock import StepMarks
from nanoflow.pipeline.executor import KVLayout, Weights
from nanoflow.pipeline.program import Program
from nanoflow.pipeline.rank_sampling import sample_on_rank
from nanoflow.pipeline.split import BatchCutter

__all__ = ["ReferenceExecutor"]

SAMPLED_ROWS = 256
"""Rows whose logits are held at a time."""


class ReferenceExecutor:
    """Runs programs with each op's reference maths or the kernel that the plan names.

    Args:
        programs: compiled plans of one model, in the order of preference; their buffers are allocated once, here.
        weights: of all layers and of what stands before and after them, on `device`.
        kv: size of the paged KV cache, allocated here, zeroed (on a CPU the pages cost memory only once written).
        slots: requests that may run at once; the device keeps one last token for each.
        dtype: of activations and KV cache.
        seed: of the order drawn at each iteration. A plan with a single lane has only one order.
        marks: note when every step starts and ends, for `step_times`.
        caches: the KV cache of each layer, where several executors take one after the other; None: allocated here.
        communicator: to the other ranks, where the programs are those of one of several. Every rank is given the same
            batches, in the same order; all but rank 0 need no masks, and collect tokens alone. It stays the caller's.
    """

    def __init__(
        self,
        programs: Sequence[Program],
        weights: Weights,
        kv: KVLayout,
        *,
        slots: int,
        dtype: torch.dtype,
        device: torch.device,
        seed: int = 0,
        marks: bool = False,
        caches: Sequence[torch.Tensor] | None = None,
        communicator: Communicator | None = None,
    ) -> None:
        self.bound = BoundPrograms(
            programs,
            weights,
            kv,
            dtype=dtype,
            device=device,
            sampled_rows=SAMPLED_ROWS,
            caches=caches,
            communicator=communicator,
        )
        self.cut = BatchCutter([program.plan for program in programs])
        self.sampler = Sampler(self.bound.graph.vocab_size, slots, device)
        self._marks: StepMarks | None = StepMarks(device) if marks else None
        self._arrays = DeviceArrays(device)
        self._random = random.Random(seed)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reference-executor")
        self._in_flight: deque[Future[StepOutput]] = deque()

    @property
    def programs(self) -> tuple[Program, ...]:
        return self.bound.programs

    def step_times(self) -> list[tuple[float, float]]:
        """Start and end of every step; see `Executor.step_times`."""
        if self._marks is None:
            raise ValueError("the executor was made without marks; make it with marks=True")
        return self._marks.times()

    def launch(self, batch: DenseBatch) -> None:
        """Queue an iteration; see `Executor.launch`."""
        self._in_flight.append(self._worker.submit(self._run, batch))

    def collect(self) -> StepOutput:
        """Wait for the oldest iteration launched; see `Executor.collect`."""
        return self._in_flight.popleft().result()

    def close(self) -> None:
        """Wait for what runs, drop what was not collected, and end the worker thread."""
        self._worker.shutdown(wait=True, cancel_futures=True)
        self._in_flight.clear()
        self.bound.close()

    @torch.inference_mode()
    def _run(self, host: DenseBatch) -> StepOutput:
        started = time.perf_counter()
        bound, marks = self.bound, self._marks
        program = bound.programs[host.program]
        if marks is not None:
            marks.begin()
        batch = DeviceBatch(host, bound.device, bound.kv_layout.page_size, self._arrays)
        bound.begin(batch, self.sampler.last_tokens)
        for index in self._draw_order(program) if len(program.lanes) > 1 else range(len(program.steps)):
            with nullcontext() if marks is None else marks.step(index):
                bound.step(batch, index)
        tokens = NOTHING_SAMPLED if host.sampling is None else self._sample(batch, host.sampling)
        output = tokens.to_host()
        return replace(output, seconds=time.perf_counter() - started)

    def _sample(self, batch: DeviceBatch, sampling: SamplingBatch) -> StepTensors:
        """Final norm, head and sampling of the rows that need a token, some at a time so that logits stay small."""
        rows_S = self.bound.sampled(batch)
        return sample_on_rank(
            self.sampler,
            self.bound.communicator,
            sampling,
            lambda entries: self.bound.head(batch, rows_S[entries]),
            SAMPLED_ROWS,
            batch.sampled_slots_S,
        )

    def _draw_order(self, program: Program) -> Iterator[int]:
        """Indices of all steps: a random order among those that lanes and predecessors allow.

        Collectives keep the program's order, in which each comes after all that it waits for: so the ranks meet in the
        same ones, though each draws an order of its own for everything else.
        """
        meeting, collectives = set(program.collectives), deque(program.collectives)
        queues = {lane: deque(steps) for lane, steps in program.lanes.items() if steps}
        done = bytearray(len(program.steps))
        while queues:
            ready = [
                lane
                for lane, queue in queues.items()
                if all(done[before] for before in program.predecessors[queue[0]])
                and (queue[0] not in meeting or queue[0] == collectives[0])
            ]
            if not ready:  # compile_program refuses plans that can get here
                raise RuntimeError(f"deadlock: no lane can go on, next are {[queue[0] for queue in queues.values()]}")
            lane = self._random.choice(ready)
            step = queues[lane].popleft()
            if step in meeting:
                collectives.popleft()
            if not queues[lane]:
                del queues[lane]
            yield step
            done[step] = 1
