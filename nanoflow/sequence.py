"""One completion of one request, from its arrival to its last token."""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nanoflow.grammars import Constraint
from nanoflow.sampling_params import SamplingParams

__all__ = ["FinishReason", "Sequence"]

FinishReason = Literal["stop", "length", "error"]


@dataclass(eq=False, slots=True)
class Sequence:
    """The state of one completion; `n` completions of a prompt are n sequences with seeds of their own."""

    index: int
    """Order of arrival; no two sequences of a scheduler have the same."""
    prompt: NDArray[np.int32]
    params: SamplingParams
    seed: int
    """64-bit seed of the sequence's random numbers; the counter is the output position."""
    parent: Any = None
    """Whatever the engine ties to the sequence; the scheduler does not look at it."""

    constraint: Constraint | None = None
    """Where it stands in the grammar that its output must follow; None if it may be any text."""
    output: list[int] = field(default_factory=list)
    """Tokens seen on the host, a final stop token included."""
    logprobs: list[float] = field(default_factory=list)
    """Log-probability of each output token, if `params.logprobs` asks for it."""
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    """The `params.logprobs` most likely tokens at each output position, most likely first."""
    limit: int = 0
    """Output tokens after which it ends whatever they are; set by the scheduler."""
    certain: bool = False
    """Whether nothing but the limit can end it; set by the scheduler."""
    finish_reason: FinishReason | None = None
    slot: int = -1
    """Place among the running sequences, or -1."""
    in_flight: int = 0
    """Tokens that were sampled but not seen yet, of a sequence that was preempted meanwhile."""
    preemptions: int = 0
    first_token_time: float | None = None
    """`time.perf_counter()` when the first token was seen."""
    last_token_time: float = 0.0
    """When its newest token was seen, of a sequence that holds no slot; 0: it has none."""
    finish_time: float | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def __len__(self) -> int:
        """Tokens known on the host: prompt and output."""
        return len(self.prompt) + len(self.output)
