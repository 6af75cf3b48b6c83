"""What the main process and a replica tell each other; pickled, so numbers travel as arrays and not one by one.

    main process                                   replica
    Begin (configuration, job)            ->
                                          <-       Ready
    Give (requests, what comes after)     ->
                                          <-       Told (what is finished, what it did), at once if something is
    End                                   ->
                                          <-       Ended

What a replica fails with is told by `nanoflow.parallel.processes`. Prompts and the input's own data do not come back:
the main process has them.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from nanoflow.config_schema import EngineSection, ModelSection, PipelineSection
from nanoflow.engine import EngineStats
from nanoflow.outputs import Completion, RequestOutput, RequestTiming, TokenLogprobs
from nanoflow.pipeline.program import Program
from nanoflow.recording import IterationRecord
from nanoflow.replicas.dispatch import Pending
from nanoflow.sampling_params import SamplingParams

__all__ = ["Begin", "Done", "End", "Ended", "Give", "Given", "PackedLogprobs", "Ready", "Told"]


@dataclass(frozen=True, eq=False)
class Begin:
    """What a replica is made of."""

    model: ModelSection
    engine: EngineSection
    """With this replica's share of the machine."""
    pipeline: PipelineSection
    tensor: int
    """Ranks that share this replica's model."""
    job: NDArray[np.int64] | None
    """As `build_engine` has it: for each completion known so far, the tokens of its prompt with its longest output;
    None if the job is not known."""
    more: bool
    """Whether the job has others."""
    quiet: bool
    """Whether to say nothing of plans."""


@dataclass(frozen=True, eq=False)
class Given:
    """A request on its way to a replica."""

    id: int
    token_ids: NDArray[np.int32]
    params: SamplingParams
    place: int
    arrived: float

    @classmethod
    def of(cls, pending: Pending) -> "Given":
        return cls(pending.id, pending.token_ids, pending.params, pending.place, pending.arrived)


@dataclass(frozen=True, eq=False)
class Give:
    """Requests, and what a replica should know of those to come."""

    requests: tuple[Given, ...] = ()
    expected: float = 0.0
    """Sequences that it will get after these, about; infinite: as many as it can take."""
    admitting: bool = True
    """Whether what waits may begin; if not, what runs goes on to its end."""


@dataclass(frozen=True)
class End:
    """Nothing more will come."""


@dataclass(frozen=True, eq=False)
class Ready:
    """The engine is there."""

    max_running: int
    sizes: dict[str, int]
    """The engine's limits, as reports show them."""
    kv_capacity: int
    """KV pages that can be in use."""
    programs: tuple[Program, ...]
    """What the executor runs, for the report."""
    load_seconds: float


@dataclass(frozen=True, eq=False)
class PackedLogprobs:
    """The log-probabilities of a completion of T tokens with K alternatives each."""

    chosen: NDArray[np.float64]
    """[T]"""
    top_ids: NDArray[np.int32]
    """[T, K]"""
    top: NDArray[np.float64]
    """[T, K]"""

    @classmethod
    def of(cls, logprobs: list[TokenLogprobs]) -> "PackedLogprobs":
        shape = (len(logprobs), len(logprobs[0].top) if logprobs else 0, 2)
        pairs = np.array([entry.top for entry in logprobs], np.float64).reshape(shape)
        chosen = np.array([entry.logprob for entry in logprobs], np.float64)
        return cls(chosen, pairs[..., 0].astype(np.int32), pairs[..., 1].copy())

    def unpacked(self, token_ids: list[int]) -> list[TokenLogprobs]:
        """As an engine gives them."""
        tops = zip(self.top_ids.tolist(), self.top.tolist(), strict=True)
        return [
            TokenLogprobs(token, logprob, tuple(zip(ids, values, strict=True)))
            for token, logprob, (ids, values) in zip(token_ids, self.chosen.tolist(), tops, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class _PackedCompletion:
    index: int
    text: str
    token_ids: NDArray[np.int32]
    finish_reason: str
    logprobs: PackedLogprobs | None


@dataclass(frozen=True, eq=False)
class Done:
    """A request that has ended: its completions, or why there are none."""

    id: int
    completions: tuple[_PackedCompletion, ...] = ()
    timing: RequestTiming | None = None
    """None of a request that was refused."""
    error: str | None = None

    @classmethod
    def of(cls, output: RequestOutput) -> "Done":
        """`output.key` is the request's id."""
        completions = tuple(
            _PackedCompletion(
                each.index,
                each.text,
                np.array(each.token_ids, np.int32),
                each.finish_reason,
                PackedLogprobs.of(each.logprobs) if each.logprobs is not None else None,
            )
            for each in output.outputs
        )
        return cls(output.key, completions, output.timing, output.error)

    def output(self, pending: Pending) -> RequestOutput:
        """As an engine would have given it, its key that of `pending`."""
        outputs = []
        for each in self.completions:
            token_ids = each.token_ids.tolist()
            logprobs = each.logprobs.unpacked(token_ids) if each.logprobs is not None else None
            outputs.append(Completion(each.index, each.text, token_ids, each.finish_reason, logprobs))
        timing = self.timing or RequestTiming(pending.arrived, pending.arrived, pending.arrived)
        return RequestOutput(None, pending.token_ids.tolist(), outputs, pending.params, timing, pending.key, self.error)


@dataclass(frozen=True, eq=False)
class Told:
    """What a replica has done since it told last, and how it stands."""

    taken: int
    """Requests that came to its engine since."""
    waiting: int
    """Sequences that wait in its engine."""
    waiting_tokens: int
    active: bool
    """Whether anything runs."""
    admitting: bool
    """As it was last given."""
    stats: EngineStats
    """Totals from the start."""
    preemptions: int
    """Likewise."""
    done: tuple[Done, ...] = ()
    iterations: tuple[IterationRecord, ...] = ()


@dataclass(frozen=True, eq=False)
class Ended:
    """The last word of a replica that was told to end."""

    steady: dict[str, float | None] | None = field(default=None)
    """Figures of its steady state, as `Stretch.figures` names them; None if it had none."""
