"""The executor of a GPU: whole iterations as CUDA graphs, lanes side by side, launched ahead and collected behind.

Contract: `launch` returns as soon as all of an iteration is queued on the executor's stream; nothing in it waits for
the device, but for a pinned copy that is three iterations old. A replayed graph computes, bit by bit, what the same
kernels compute when they are launched one by one on a batch padded to the same rows.

Pseudo-code::

    capture:  for every program and bucket of rows, largest first: embedding and all layers, on arrays at fixed places
              (`nanoflow.pipeline.lanes` launches the steps on their lanes' streams)
              for every bucket of sampled rows: gather, final norm, head
              all graphs share one memory pool: they never run at the same time
    launch:   sample the iteration before, if it waited for its masks
              make the metadata in pinned memory; copy it; replay the graph of the batch's program and rows
              (there is none, or the metadata has no room: copy it array by array, launch step by step)
              unless it waits for masks: replay the head, sample, start the tokens' way to the host
    collect:  the same for an iteration that waited; wait for its last event; its tokens
"""

import gc
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Protocol

import torch

from nanoflow.ops.batch import DenseBatch, StepOutput
from nanoflow.ops.communicator import Communicator
from nanoflow.ops.device_arrays import DeviceArrays
from nanoflow.ops.device_batch import DeviceBatch
from nanoflow.ops.sampling import NOTHING_SAMPLED, Sampler, StepTensors
from nanoflow.pipeline.bound_programs import BoundPrograms
from nanoflow.pipeline.capture_batch import capture_batch
from nanoflow.pipeline.clock import Mark, StepMarks
from nanoflow.pipeline.executor import CaptureError, KVLayout, Weights
from nanoflow.pipeline.lanes import Lanes
from nanoflow.pipeline.program import Program
from nanoflow.pipeline.rank_sampling import sample_on_rank
from nanoflow.pipeline.split import BatchCutter
from nanoflow.pipeline.static_arrays import StaticArrays

__all__ = ["CudaExecutor", "buckets"]

SAMPLED_ROWS = 1024
"""The most rows whose logits are held at a time."""
STEP = 128
"""Between buckets of rows. On an H100 cuBLAS takes longer for 448 rows than for 512, and so for most numbers of rows
between two multiples of 128."""
SMALL = (8, 16, 32, 64, 96, 128, 192)


def buckets(most: int) -> tuple[int, ...]:
    """Numbers of rows that graphs are captured for, up to `most` itself, ascending."""
    return (*(rows for rows in SMALL if rows < most), *range(2 * STEP, most, STEP), most)


class _Replayable(Protocol):
    def replay(self) -> None: ...


@dataclass(frozen=True)
class _Function:
    """What stands for a graph where there is no GPU: the same launches on the same arrays."""

    function: Callable[[], None]

    def replay(self) -> None:
        self.function()


@dataclass(frozen=True)
class _Captured:
    graph: _Replayable
    batch: DenseBatch
    """What it was captured on."""
    room: Mapping[Hashable, tuple[int, ...]]
    """Shapes that its arrays have room for."""
    marks: StepMarks | None

    def serves(self, batch: DenseBatch) -> bool:
        """Whether it launches all that a batch with as many rows needs."""
        return all(
            bool(captured.decode) >= bool(n.decode) and bool(captured.prefill) >= bool(n.prefill)
            for n, captured in zip(batch.nano_batches, self.batch.nano_batches, strict=True)
        )


@dataclass(eq=False)
class _Iteration:
    host: DenseBatch
    batch: DeviceBatch
    begun: Mark
    tokens: StepTensors | None = None
    """On their way to the host; None before the iteration is sampled."""
    ended: Mark | None = None


class CudaExecutor:
    """Runs programs on the lanes that their plans say.

    Where a plan confines lanes to parts of the SMs and they cannot be set apart, that is said once, and lanes run on
    plain streams.

    Args:
        programs: compiled plans of one model, in the order of preference; their buffers are allocated once, here.
        weights: of all layers and of what stands before and after them, on `device`.
        kv: size of the paged KV cache, allocated here.
        slots: requests that may run at once.
        dtype: of activations and KV cache.
        graphs: capture CUDA graphs; without, every kernel is launched on its own. On a CPU, for tests of everything
            else, the same launches are repeated in their place.
        row_buckets: numbers of rows to capture graphs for; by default `buckets` of the largest plan's capacity.
        marks: note when every step starts and ends, for `step_times`. It costs a microsecond or two a step.
        around_step: called around the launch of every step, with its index, on its stream: for tests.
        caches: the KV cache of each layer, where several executors take one after the other; None: allocated here.
        communicator: to the other ranks, where the programs are those of one of several. Every rank is given the same
            batches, in the same order; all but rank 0 need no masks, and collect tokens alone. It stays the caller's,
            and is closed after the executor, whose graphs hold its collectives.

    Raises:
        CaptureError: memory ran out while graphs were captured.
        PartitionError: the device cannot be split as a plan says.
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
        graphs: bool = True,
        row_buckets: Sequence[int] | None = None,
        marks: bool = False,
        around_step: Callable[[int], AbstractContextManager[None]] | None = None,
        caches: Sequence[torch.Tensor] | None = None,
        communicator: Communicator | None = None,
    ) -> None:
        plans = [program.plan for program in programs]
        capacity = max(plan.capacity for plan in plans)
        sampled_rows = min(SAMPLED_ROWS, slots, capacity)
        self.lanes = Lanes(programs, device)
        try:
            self.bound = BoundPrograms(
                programs,
                weights,
                kv,
                dtype=dtype,
                device=device,
                sampled_rows=sampled_rows,
                confined=self.lanes.confined,
                caches=caches,
                communicator=communicator,
            )
        except BaseException:
            self.lanes.close()  # a caller that goes on, with fewer plans, may ask for the same partitions
            raise
        self.sampler = Sampler(self.bound.graph.vocab_size, slots, device)
        self.cut = BatchCutter(plans, buckets(capacity) if row_buckets is None else row_buckets)
        self.sampled_buckets = buckets(sampled_rows)
        self._samples = communicator is None or communicator.rank == 0
        self._marked = marks
        self._around_step = around_step
        self._last_marks: StepMarks | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._static = StaticArrays(device)
        self._eager = DeviceArrays(device)
        self._layers: dict[tuple[int, tuple[int, ...]], _Captured] = {}
        """By program and rows of its nano-batches."""
        self._heads: dict[tuple[int, int], _Replayable] = {}
        """By program (the first one that has the same) and sampled rows."""
        self._head_rows = torch.zeros(sampled_rows, dtype=torch.int64, device=device)
        self._in_flight: deque[_Iteration] = deque()
        self._last_end: Mark | None = None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))
        begun = time.perf_counter()
        if graphs and capacity > 1:
            try:
                with self._on_device():
                    self._capture_all()
            except BaseException:
                self.close()
                raise
        self.capture_seconds = time.perf_counter() - begun
        """What compiling kernels and capturing graphs took."""
        # Python's garbage collector would walk all that the libraries have loaded, again and again, and for a third of
        # a second each time nothing would be launched. `close` gives it back to the collector.
        gc.collect()
        gc.freeze()

    @property
    def programs(self) -> tuple[Program, ...]:
        return self.bound.programs

    def step_times(self) -> list[tuple[float, float]]:
        """Start and end of every step; see `Executor.step_times`."""
        if self._last_marks is None:
            raise ValueError("there are no marks: make the executor with marks=True, and run an iteration")
        return self._last_marks.times()

    def launch(self, batch: DenseBatch) -> None:
        """Queue an iteration; see `Executor.launch`."""
        with self._on_device():
            if self._in_flight and self._in_flight[-1].tokens is None:
                self._sample(self._in_flight[-1])
            iteration = self._run_layers(batch)
            self._in_flight.append(iteration)
            if batch.sampling is None or batch.sampling.masks is None or not self._samples:
                self._sample(iteration)

    def collect(self) -> StepOutput:
        """Wait for the oldest iteration launched; see `Executor.collect`."""
        iteration = self._in_flight.popleft()
        if iteration.tokens is None:
            with self._on_device():
                self._sample(iteration)
        assert iteration.tokens is not None and iteration.ended is not None
        iteration.ended.wait()
        idle = 0.0 if self._last_end is None else max(0.0, self._last_end.until(iteration.begun))
        self._last_end = iteration.ended
        seconds = iteration.begun.until(iteration.ended)
        return replace(iteration.tokens.to_host(), seconds=seconds, idle_seconds=idle)

    def close(self) -> None:
        """Wait for what runs, and drop what was not collected."""
        if self._stream is not None:
            self._stream.synchronize()
        self._in_flight.clear()
        self._layers.clear()
        self._heads.clear()
        self.bound.close()
        self.lanes.close()
        gc.unfreeze()

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        with torch.inference_mode(), nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            yield

    def _run_layers(self, host: DenseBatch) -> _Iteration:
        """Queue embedding and layers: a graph's replay if there is one for these rows, else kernel by kernel.

        The iteration begins when its metadata are ready: a device that waits for the host until then is idle.
        """
        captured = self._layers.get((host.program, tuple(n.end - n.start for n in host.nano_batches)))
        if captured is not None and captured.serves(host):
            batch = self._device_batch(host, self._static)
            if self._static.fill(batch, captured.room):
                iteration = _Iteration(host, batch, Mark(self.bound.device))
                self._static.send()
                captured.graph.replay()
                self._last_marks = captured.marks
                return iteration
        iteration = _Iteration(host, self._device_batch(host, self._eager), Mark(self.bound.device))
        self._last_marks = self._queue_layers(iteration.batch)
        return iteration

    def _queue_layers(self, batch: DeviceBatch, marks: StepMarks | None = None) -> StepMarks | None:
        """Queue embedding and every step on its lane; `marks` if given, new ones if there are to be any."""
        if self._marked:
            marks = marks or StepMarks(self.bound.device)
            marks.begin()
        self.bound.begin(batch, self.sampler.last_tokens)

        def step(index: int) -> None:
            around = nullcontext() if self._around_step is None else self._around_step(index)
            with around, nullcontext() if marks is None else marks.step(index):
                self.bound.step(batch, index)

        self.lanes.launch(batch.host.program, step)
        return marks

    def _sample(self, iteration: _Iteration) -> None:
        """Queue head and sampling, wait for masks on the way if there are any, and start the tokens' way to the
        host."""
        sampling, batch = iteration.host.sampling, iteration.batch
        tokens = NOTHING_SAMPLED
        if sampling is not None:
            count = len(sampling)
            rows_S, slots_S = self.bound.sampled(batch)[:count], batch.sampled_slots_S[:count]
            tokens = sample_on_rank(
                self.sampler,
                self.bound.communicator,
                sampling,
                lambda entries: self._head(batch, rows_S[entries]),
                self.bound.sampled_rows,
                slots_S,
            )
        iteration.tokens = tokens.start_copy()
        iteration.ended = Mark(self.bound.device)

    def _head(self, batch: DeviceBatch, rows_S: torch.Tensor) -> torch.Tensor:
        count = len(rows_S)
        padded = next(bucket for bucket in self.sampled_buckets if bucket >= count)
        # Padding takes rows of an earlier head: any row will do.
        self._head_rows[:count].copy_(rows_S)
        head = self._heads.get((self.bound.heads[batch.host.program], padded))
        if head is None:
            return self.bound.head(batch, self._head_rows[:padded])[:count]
        head.replay()
        return self.bound.buffers["logits"][:count]

    def _device_batch(self, host: DenseBatch, arrays: DeviceArrays) -> DeviceBatch:
        kv = self.bound.kv_layout
        return DeviceBatch(host, self.bound.device, kv.page_size, arrays, kv.pages_per_sequence or kv.pages)

    def _capture_all(self) -> None:
        """Capture the graphs of all buckets."""
        pool = torch.cuda.graph_pool_handle() if self._stream is not None else None
        what = "the largest batches"
        plans = self.cut.plans
        batches = []
        try:
            for number, plan in enumerate(plans):
                batch = self._device_batch(capture_batch(plan, number, plan.capacity), self._static)
                self._queue_layers(batch)
                self._note_sampled(batch)
                batches.append(batch)
            self._static.lay_out()
            sizes = [(rows, number) for number in range(len(plans)) for rows in self.cut.buckets(number)]
            for rows, number in sorted(sizes, reverse=True):
                what = f"{rows} rows"
                host = capture_batch(plans[number], number, rows)
                marks = StepMarks(self.bound.device) if self._marked else None
                self._static.take_room()

                def layers(host: DenseBatch = host, marks: StepMarks | None = marks) -> None:
                    batch = self._device_batch(host, self._static)
                    self._queue_layers(batch, marks)
                    self._note_sampled(batch)

                graph = self._capture(layers, pool)
                key = number, tuple(n.end - n.start for n in host.nano_batches)
                self._layers[key] = _Captured(graph, host, self._static.take_room(), marks)
            for rows, number in product(reversed(self.sampled_buckets), sorted(set(self.bound.heads))):
                what = f"the head of {rows} rows"

                def head(batch: DeviceBatch = batches[number], rows: int = rows) -> None:
                    self.bound.head(batch, self._head_rows[:rows])

                self._heads[number, rows] = self._capture(head, pool)
        except RuntimeError as error:
            if "out of memory" not in str(error):
                raise
            raise CaptureError(f"memory ran out in the capture of {what}") from error

    def _note_sampled(self, batch: DeviceBatch) -> None:
        """What the head reads is copied with the layers' arrays."""
        self.bound.sampled(batch), batch.sampled_slots_S

    def _capture(self, function: Callable[[], None], pool: Any) -> _Replayable:
        """Run `function` once, which compiles and loads its kernels, then capture it."""
        function()
        if self._stream is None:
            return _Function(function)
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process may go on using the GPU.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            function()
        finally:
            graph.capture_end()
        return graph
