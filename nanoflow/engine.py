"""The engine: the loop that forms, launches and collects iterations, and turns tokens into finished requests.

Contract: iteration i+1 is formed and launched before iteration i's tokens are seen, on a CPU as on a GPU. What a stop
makes superfluous is dropped; a request's tokens do not depend on what else runs.

Pseudo-code::

    while requests are unfinished or an iteration is in flight:
        form the next dense batch; launch it; begin its masks if it is the only one in flight
        if two are in flight, or nothing could be formed:
            collect the older one; record its tokens; look for stop strings
            begin the masks of the one that is in flight now
            hand out the requests that are finished
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanoflow.grammars import Grammars, MaskMaker
from nanoflow.ops.batch import StepOutput
from nanoflow.ops.graph import Graph
from nanoflow.ops.operation import Cost, Work
from nanoflow.outputs import Completion, RequestOutput, RequestTiming, TokenLogprobs
from nanoflow.pipeline.executor import Executor
from nanoflow.pipeline.program import Program
from nanoflow.recording import IterationRecord, Recorder
from nanoflow.request_check import RequestCheck, Tokens
from nanoflow.sampling_params import SamplingParams
from nanoflow.scheduler import Iteration, Scheduler
from nanoflow.search.cost_model import work_of
from nanoflow.sequence import Sequence
from nanoflow.tokenizer import TextStream, Tokenizer
from nanoflow.waiting import BLOCK

__all__ = ["LEAST_WAITING", "Engine", "EngineStats"]

LEAST_WAITING = 1024
"""Sequences that an engine's queue is filled up to, at least: pacing predicts from the first 512."""


@dataclass
class EngineStats:
    """Totals over all iterations so far."""

    iterations: int = 0
    program_iterations: Counter[int] = field(default_factory=Counter)
    """Iterations by the executor's program that they ran."""
    planned_iterations: int = 0
    """Iterations that ran a plan asked for; the others had rows or a mix that none of them is for."""
    rows: int = 0
    """Rows of all dense batches, padding left out."""
    padding_rows: int = 0
    busy_seconds: float = 0.0
    """Time that the executor spent in iterations."""
    host_seconds: float = 0.0
    """Time that the host took to form iterations, describe them to the executor and launch them."""
    idle_seconds: float = 0.0
    """Time between iterations in which the device did nothing; 0 if the executor does not tell."""
    work: Work = field(default_factory=Work)
    """What was asked of the operations."""
    cost: Cost = field(default_factory=Cost)
    """FLOPs and bytes that the iterations took, by the operations' own accounts."""
    largest_batch: int = 0


@dataclass(eq=False)
class _Request:
    """A submitted request until all of its completions are done."""

    key: Any
    prompt: str | None
    prompt_token_ids: NDArray[np.int32]
    params: SamplingParams
    submitted: float
    completions: list[Completion | None]
    first_token: float = 0.0
    error: str | None = None


def planned_programs(programs: tuple[Program, ...]) -> tuple[Program, ...]:
    """Those of plans that were asked for: without the last ones, in sequence, which take what is left over; all, if
    there are no others."""
    for left_over, program in enumerate(reversed(programs)):
        if program.plan.mix is not None or not program.plan.is_sequential(program.graph):
            return programs[: len(programs) - left_over]
    return programs


@dataclass(eq=False)
class _Progress:
    """What the engine keeps beside a sequence: the request that it belongs to and its text, if stop strings need it."""

    request: _Request
    completion: int
    stream: TextStream | None
    text: str = ""


class Engine:
    """Runs requests to their end. Not thread-safe: one caller submits and iterates.

    Args:
        graph: of what the executor runs; of several ranks, one's share. `stats.cost` is of all ranks.
    """

    def __init__(
        self, *, executor: Executor, scheduler: Scheduler, graph: Graph, itemsize: int, tokenizer: Tokenizer | None
    ) -> None:
        self.executor = executor
        self.scheduler = scheduler
        self.graph = graph
        self.tokenizer = tokenizer
        self.stats = EngineStats()
        self.observers: list[Callable[[IterationRecord], None]] = []
        """Called once for each collected iteration, after its tokens are recorded."""
        self._itemsize = itemsize
        self._planned = len(planned_programs(executor.programs))
        self._submitted = 0
        self._preemptions_told = 0
        self._in_flight: deque[Iteration] = deque()
        self._grammars = Grammars(tokenizer, graph.vocab_size, scheduler.eos_token_ids.tolist())
        self._check = RequestCheck(graph.vocab_size, tokenizer, scheduler.check, self._grammars)
        self._mask_maker: MaskMaker | None = None

    def check(self, prompt_token_ids: Tokens, params: SamplingParams) -> None:
        """See `RequestCheck`."""
        self._check(prompt_token_ids, params)

    def submit(
        self,
        prompt_token_ids: Tokens,
        params: SamplingParams,
        *,
        prompt: str | None = None,
        key: Any = None,
        place: int | None = None,
        arrived: float | None = None,
    ) -> None:
        """Queue a request. Raises InputError as `check` does.

        Args:
            place: its place in the job, of which its seed is made if it names none; None: the order of submission.
            arrived: when it arrived, by `time.perf_counter`; None: now.
        """
        self.check(prompt_token_ids, params)
        token_ids = np.asarray(prompt_token_ids, dtype=np.int32)
        arrived = time.perf_counter() if arrived is None else arrived
        request = _Request(key, prompt, token_ids, params, arrived, completions=[None] * params.n)
        base = params.seed if params.seed is not None else _default_seed(self._submitted if place is None else place)
        for completion in range(params.n):
            stream = self.tokenizer.stream(params.skip_special_tokens) if params.stop and self.tokenizer else None
            progress = _Progress(request, completion, stream)
            seed = _completion_seed(base, completion)
            constraint = None
            if params.structured_outputs is not None:
                constraint = self._grammars.constraint(params.structured_outputs, ignore_eos=params.ignore_eos)
            sequence = Sequence(self._submitted, token_ids, params, seed, parent=progress, constraint=constraint)
            self.scheduler.add(sequence)
            self._submitted += 1

    @property
    def programs(self) -> tuple[Program, ...]:
        """What the executor runs, in the order of preference."""
        return self.executor.programs

    @property
    def preemptions(self) -> int:
        """Preemptions so far."""
        return self.scheduler.preemptions

    @property
    def sizes(self) -> dict[str, int]:
        """The limits in force, for reports."""
        return self.scheduler.sizes

    @property
    def most_waiting(self) -> int:
        """Sequences that its queue should be filled up to."""
        scheduler = self.scheduler
        # Two generations of running sequences: pacing then sees as far as it predicts. An order by length means most
        # if all that it may reorder is there.
        return BLOCK if scheduler.longest_first else max(LEAST_WAITING, 2 * scheduler.max_running)

    @property
    def kv_capacity(self) -> int:
        """KV pages that can be in use."""
        return self.scheduler.kv.usable_pages

    def record_to(self, recorder: Recorder) -> None:
        """Tell `recorder` of every iteration."""
        self.observers.append(recorder.observe)

    @property
    def unfinished(self) -> int:
        """Completions submitted and not finished."""
        return self.scheduler.unfinished

    @property
    def active(self) -> bool:
        """Whether anything runs: waiting requests do not count."""
        return self.scheduler.running > 0 or bool(self._in_flight)

    def run(self, before_step: Callable[[], None] = lambda: None) -> Iterator[RequestOutput]:
        """Run until every submitted request is finished, handing out each as soon as it is."""
        while self.unfinished or self._in_flight:
            before_step()
            yield from self.step()

    def step(self) -> list[RequestOutput]:
        """Launch one iteration, collect the one before it, and return the requests that this finished."""
        begun = time.perf_counter()
        iteration = self.scheduler.form()
        if iteration is not None:
            self.executor.launch(iteration.batch)
            self.stats.host_seconds += time.perf_counter() - begun
            self._in_flight.append(iteration)
            if len(self._in_flight) == 1:
                self._begin_masks(iteration)
        elif not self._in_flight:
            raise RuntimeError(f"{self.unfinished} completions are unfinished and none can run")
        if iteration is not None and len(self._in_flight) < 2:
            return []
        return self._collect(self._in_flight.popleft())

    def _collect(self, iteration: Iteration) -> list[RequestOutput]:
        output = self.executor.collect()
        self._account(iteration, output)
        finished = []
        now = time.perf_counter()
        received = self.scheduler.update(iteration, output)
        if self._in_flight:
            self._begin_masks(self._in_flight[0])
        for sequence in received:
            progress: _Progress = sequence.parent
            if not progress.request.first_token:
                progress.request.first_token = now
            if progress.stream is not None and self._hit_stop_string(sequence, progress):
                if sequence.finish_reason is None:
                    self.scheduler.finish(sequence, "stop")
                sequence.finish_reason = "stop"
            if sequence.finish_reason is None:
                continue
            done = self._complete(sequence, progress, now)
            if done is not None:
                finished.append(done)
        if self.observers:
            record = self._record(iteration, output.seconds, now, len(received))
            for observer in self.observers:
                observer(record)
        return finished

    def _begin_masks(self, iteration: Iteration) -> None:
        """Begin the masks of a launched iteration; the tokens of all iterations before it have been seen."""
        masks = iteration.batch.sampling.masks if iteration.batch.sampling is not None else None
        if masks is None:
            return
        if self._mask_maker is None:
            self._mask_maker = self._grammars.mask_maker()
        sequences = [iteration.sampled[entry] for entry in masks.entries.tolist()]
        self._mask_maker.start(masks, [None if s.finished else s.constraint for s in sequences])

    def _record(self, iteration: Iteration, seconds: float, now: float, received: int) -> IterationRecord:
        nano_batches, scheduler = iteration.batch.nano_batches, self.scheduler
        preemptions = scheduler.preemptions - self._preemptions_told
        self._preemptions_told = scheduler.preemptions
        return IterationRecord(
            time=now,
            seconds=seconds,
            decode_rows=sum(n.decode for n in nano_batches),
            prefill_rows=sum(n.prefill for n in nano_batches),
            padding_rows=sum(n.padding for n in nano_batches),
            running=scheduler.running,
            waiting=scheduler.waiting,
            kv_pages=scheduler.kv.used_pages,
            kv_capacity=scheduler.kv.usable_pages,
            preemptions=preemptions,
            output_tokens=received,
            token_gaps=scheduler.token_gaps,
        )

    def _account(self, iteration: Iteration, output: StepOutput) -> None:
        batch, stats = iteration.batch, self.stats
        if stats.iterations:  # before the first, the device idled for whatever came before this engine
            stats.idle_seconds += output.idle_seconds
        stats.iterations += 1
        stats.program_iterations[batch.program] += 1
        stats.planned_iterations += batch.program < self._planned
        stats.rows += batch.tokens
        stats.padding_rows += batch.rows - batch.tokens
        stats.largest_batch = max(stats.largest_batch, batch.tokens)
        stats.busy_seconds += output.seconds
        work = work_of(batch)
        stats.work = stats.work + work
        graph = self.programs[batch.program].graph
        stats.cost = stats.cost + graph.cost(work, self._itemsize) * graph.ranks

    def _hit_stop_string(self, sequence: Sequence, progress: _Progress) -> bool:
        """Whether the text up to the newest token holds a stop string; if so, cut the text before the first one."""
        assert progress.stream is not None
        new = progress.stream.push(sequence.output[-1:])
        if sequence.finish_reason is not None:
            new += progress.stream.finish()
        stops = sequence.params.stop
        seen_before = max(0, len(progress.text) - max(map(len, stops)) + 1)
        progress.text += new
        places = [at for stop in stops if (at := progress.text.find(stop, seen_before)) >= 0]
        if places:
            progress.text = progress.text[: min(places)]
        return bool(places)

    def _complete(self, sequence: Sequence, progress: _Progress, now: float) -> RequestOutput | None:
        """Record a finished completion; the request's output once it was the last one."""
        request, params = progress.request, sequence.params
        if progress.stream is not None:
            text = progress.text
        else:
            text = self.tokenizer.decode(sequence.output, params.skip_special_tokens) if self.tokenizer else ""
        assert sequence.finish_reason is not None
        if sequence.finish_reason == "error" and sequence.constraint is not None:
            request.error = f"structured_outputs: the grammar cannot be followed further: {sequence.constraint.error}"
        request.completions[progress.completion] = Completion(
            progress.completion, text, list(sequence.output), sequence.finish_reason, _logprobs(sequence)
        )
        outputs = [completion for completion in request.completions if completion is not None]
        if len(outputs) < len(request.completions):
            return None
        timing = RequestTiming(request.submitted, request.first_token, now)
        return RequestOutput(
            request.prompt, request.prompt_token_ids.tolist(), outputs, params, timing, request.key, request.error
        )

    def renewed(self) -> "Engine":
        """An engine on which nothing has run yet, on this one's executor: weights, KV cache and graphs stay.

        This one is not to be used any more, nor closed. Raises RuntimeError if something runs or waits in it.
        """
        if self.unfinished or self._in_flight:
            raise RuntimeError(f"{self.unfinished} completions are unfinished; run them before the engine is renewed")
        if self._mask_maker is not None:
            self._mask_maker.close()
        return Engine(
            executor=self.executor,
            scheduler=self.scheduler.renewed(),
            graph=self.graph,
            itemsize=self._itemsize,
            tokenizer=self.tokenizer,
        )

    def close(self) -> None:
        """Wait for what runs and release the executor."""
        for iteration in self._in_flight:
            sampling = iteration.batch.sampling
            if sampling is not None and sampling.masks is not None:
                sampling.masks.ready.cancel()  # nobody makes them any more, and the executor would wait for them
        self.executor.close()
        if self._mask_maker is not None:
            self._mask_maker.close()


def _default_seed(index: int) -> int:
    """Seed of a request that names none: from its place in the run, so that a run repeated gives the same tokens."""
    return index * 0x9E3779B97F4A7C15 % 2**64


def _completion_seed(seed: int, completion: int) -> int:
    """Seed of completion `completion` of a request: the request's own for the first, others spread over 64 bits."""
    return (seed + completion * 0xD1B54A32D192ED03) % 2**64


def _logprobs(sequence: Sequence) -> list[TokenLogprobs] | None:
    if sequence.params.logprobs is None:
        return None
    each = zip(sequence.output, sequence.logprobs, sequence.top_logprobs, strict=True)
    return [TokenLogprobs(token, logprob, tuple(top)) for token, logprob, top in each]
