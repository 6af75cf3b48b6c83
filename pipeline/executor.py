"""What an executor is: something that launches a compiled plan on dense batches and decides nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from nanoflow.ops.batch import DenseBatch, StepOutput
from nanoflow.pipeline.program import Program
from nanoflow.pipeline.split import BatchCutter

__all__ = ["CaptureError", "Executor", "KVLayout", "Weights"]

OpWeights = Mapping[str, Mapping[str, torch.Tensor]]
"""Weights of several operations: operation name -> weight name -> tensor, as `Operation.pack` left it."""


class CaptureError(RuntimeError):
    """Memory ran out while CUDA graphs were captured."""


class Weights(Protocol):
    """A model's weights on the device."""

    @property
    def layers(self) -> Sequence[OpWeights]: ...

    @property
    def outer(self) -> OpWeights:
        """Weights of the prologue and the epilogue."""
        ...


@dataclass(frozen=True)
class KVLayout:
    """Size of the paged KV cache: `pages` of `page_size` tokens a layer, the reserved page included."""

    pages: int
    page_size: int
    pages_per_sequence: int | None = None
    """Most pages that a request can have; None: all of them."""


class Executor(Protocol):
    """Runs one iteration at a time, in the order launched, with at most two launched and not collected."""

    @property
    def programs(self) -> tuple[Program, ...]:
        """The compiled plans that it runs, in the order of preference."""
        ...

    @property
    def cut(self) -> BatchCutter:
        """What cuts the dense batches: which program each takes, and how many rows its nano-batches are padded to."""
        ...

    def step_times(self) -> list[tuple[float, float]]:
        """Of an executor made with `marks`: start and end of every step of the iteration last collected.

        In seconds from its begin, in the order of its program's steps. Nothing may have been launched since.
        """
        ...

    def launch(self, batch: DenseBatch) -> None:
        """Start an iteration and return at once. Rows whose token is `TOKEN_ON_DEVICE` read it from the one before.

        The masks of its sampling (`TokenMasks`) may come only after `collect` has returned the one before: do not wait
        for them here.
        """
        ...

    def collect(self) -> StepOutput:
        """Wait for the oldest iteration launched; no tokens if it sampled nothing. Raises what went wrong in it."""
        ...

    def close(self) -> None:
        """Wait for what runs and release threads."""
        ...
