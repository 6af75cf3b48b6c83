"""What a finished request comes back as."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from nanoflow.sampling_params import SamplingParams

__all__ = ["Completion", "RequestOutput", "RequestTiming", "TokenLogprobs"]


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one output position, under the model itself: before temperature, penalties and filters."""

    token_id: int
    logprob: float
    """Of the token that was chosen."""
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability) of the most likely tokens, most likely first: as many as `logprobs` asked for."""


@dataclass(frozen=True)
class Completion:
    """One completion of a prompt; a request with ``n > 1`` has several."""

    index: int
    text: str
    token_ids: list[int]
    """All tokens generated, an end-of-sequence or stop token included."""
    finish_reason: str
    """``stop`` (end of sequence, stop token, stop string or the end of the grammar), ``length`` (max_tokens or the
    context is full) or ``error`` (the output's grammar could not be followed any further)."""
    logprobs: list[TokenLogprobs] | None = None
    """One entry a token, if asked for."""


@dataclass(frozen=True)
class RequestTiming:
    """Seconds on one clock (`time.perf_counter`); a request's first completion counts for the first token."""

    submitted: float
    first_token: float
    finished: float


@dataclass(frozen=True)
class RequestOutput:
    """A finished request: its prompt and its completions, in order of index."""

    prompt: str | None
    """None if the prompt came as token ids."""
    prompt_token_ids: list[int]
    outputs: list[Completion]
    params: SamplingParams
    timing: RequestTiming
    key: Any = field(default=None, compare=False)
    """Whatever the request was submitted with."""
    error: str | None = None
    """Why a completion ended with ``error``; names the parameter and the cause."""

    @property
    def text(self) -> str:
        """Text of the first completion."""
        return self.outputs[0].text
