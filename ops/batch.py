"""The dense batch: everything an iteration's operations need to know about its rows.

The scheduler makes one `DenseBatch` an iteration, in numpy on the host. Rows are laid out nano-batch after nano-batch,
and inside each as ``[decode rows, one a request | prefill rows | padding]``.

Shape legend: T rows of the dense batch, N nano-batches, D decode segments (one row each), C prefill segments (a
contiguous piece of one request's prompt inside one nano-batch), S rows to sample, P columns of a page table.
"""

from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "RESERVED_PAGE",
    "TOKEN_ON_DEVICE",
    "DenseBatch",
    "NanoBatchRows",
    "PenaltyReset",
    "RowClass",
    "SamplingBatch",
    "StepOutput",
    "TokenMasks",
]

RESERVED_PAGE = 0
"""The KV page that padding rows write to; the allocator never hands it out and nothing reads it."""

TOKEN_ON_DEVICE = -1
"""A token id that says: take the last token sampled for this row's slot, which only the device knows yet."""


class RowClass(Enum):
    """Which rows of a nano-batch an access touches."""

    ALL = "all"
    DECODE = "decode"
    PREFILL = "prefill"

    def meets(self, other: "RowClass") -> bool:
        """Whether two accesses of these classes can touch the same row."""
        return self is other or RowClass.ALL in (self, other)


@dataclass(frozen=True)
class NanoBatchRows:
    """The rows of one nano-batch: ``start .. start + decode + prefill + padding`` of the dense batch."""

    start: int
    decode: int
    prefill: int
    padding: int = 0

    @property
    def end(self) -> int:
        """One past the last row, padding included."""
        return self.start + self.decode + self.prefill + self.padding


@dataclass(frozen=True, eq=False)
class PenaltyReset:
    """Asks the device to rebuild one slot's penalty counts before this batch is sampled (admission, readmission)."""

    slot: int
    prompt: NDArray[np.int32]
    output: NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class TokenMasks:
    """The tokens that some entries may get at all; the others may get any.

    The masks depend on the tokens of the iteration before, so they may come after the launch: whoever samples waits.
    """

    entries: NDArray[np.int32]
    """[M] index into the S entries, ascending."""
    ready: Future[NDArray[np.int32]] = field(default_factory=Future)
    """Gives [M, ceil(V / 32)]: bit t % 32 of word t // 32 is set if token t is allowed; each row has such a token."""


@dataclass(frozen=True, eq=False)
class SamplingBatch:
    """What to sample, one entry a sampled row (S entries)."""

    rows: NDArray[np.int32]
    """Row of the dense batch whose logits are sampled."""
    slots: NDArray[np.int32]
    """Slot that receives the token (and whose penalty counts apply)."""
    positions: NDArray[np.int32]
    """Output position of the token: 0 for a request's first. With `seeds` it is the random counter."""
    seeds: NDArray[np.uint64]
    temperature: NDArray[np.float32]
    """0 means greedy."""
    top_k: NDArray[np.int32]
    """0 means off."""
    top_p: NDArray[np.float32]
    """1 means off."""
    min_p: NDArray[np.float32]
    """0 means off."""
    repetition_penalty: NDArray[np.float32]
    """1 means off."""
    presence_penalty: NDArray[np.float32]
    frequency_penalty: NDArray[np.float32]
    logprobs: NDArray[np.int32]
    """-1: none; k >= 0: the sampled token's log-probability and the k most likely tokens'."""
    bias_entries: NDArray[np.int32]
    """[B] index into these S entries, for each logit-bias pair."""
    bias_tokens: NDArray[np.int32]
    """[B] token id of each logit-bias pair."""
    bias_values: NDArray[np.float32]
    """[B] value added to that token's logit."""
    penalty_resets: tuple[PenaltyReset, ...] = ()
    masks: TokenMasks | None = None
    """None if every entry may get any token."""

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, eq=False)
class DenseBatch:
    """One iteration's rows and work lists. Immutable; arrays are not shared with the scheduler's own state."""

    nano_batches: tuple[NanoBatchRows, ...]
    token_ids: NDArray[np.int32]
    """[T] input tokens, or `TOKEN_ON_DEVICE`. Padding rows hold 0."""
    positions: NDArray[np.int32]
    """[T] position of the row's token in its request. Padding rows hold 0."""
    slots: NDArray[np.int32]
    """[T] slot of the row's request. Padding rows hold 0 and must not be used to write."""
    kv_index: NDArray[np.int64]
    """[T] where the row's key and value go: page * page_size + offset. Padding rows point into `RESERVED_PAGE`."""
    decode_rows: NDArray[np.int32]
    """[D] row of each decode segment, ascending."""
    decode_context: NDArray[np.int32]
    """[D] KV tokens that the row attends to, its own included."""
    decode_pages: NDArray[np.int32]
    """[D, P] page table; entries past the context are `RESERVED_PAGE`."""
    decode_splits: NDArray[np.int32]
    """[N + 1] decode segments of nano-batch n are ``decode_splits[n] : decode_splits[n + 1]``."""
    prefill_rows: NDArray[np.int32]
    """[C] first row of each prefill segment, ascending."""
    prefill_lengths: NDArray[np.int32]
    """[C] rows of each prefill segment."""
    prefill_context: NDArray[np.int32]
    """[C] KV tokens that the segment's last row attends to, its own included."""
    prefill_pages: NDArray[np.int32]
    """[C, P] page table, as `decode_pages`."""
    prefill_splits: NDArray[np.int32]
    """[N + 1] as `decode_splits`."""
    sampling: SamplingBatch | None = None
    """None if no row of this batch is sampled (all of it is the middle of prompts)."""
    program: int = 0
    """Which of the executor's programs the rows are laid out for."""

    @property
    def rows(self) -> int:
        """Rows of the dense batch, padding included."""
        return self.nano_batches[-1].end if self.nano_batches else 0

    @property
    def tokens(self) -> int:
        """Rows without padding."""
        return sum(n.decode + n.prefill for n in self.nano_batches)


@dataclass(frozen=True, eq=False)
class StepOutput:
    """What an iteration sampled, on the host; entry i belongs to entry i of the batch's `SamplingBatch`."""

    tokens: NDArray[np.int32]
    logprobs: NDArray[np.float32] | None = None
    """[S] log-probability of the sampled token under the model (before temperature, penalties and filters)."""
    top_tokens: NDArray[np.int32] | None = None
    """[S, K] most likely tokens, K the largest number asked for in the batch."""
    top_logprobs: NDArray[np.float32] | None = None
    """[S, K]"""
    seconds: float = field(default=0.0)
    """Time that the executor spent on the iteration, in seconds."""
    idle_seconds: float = field(default=0.0)
    """Time that the device did nothing between the iteration before and this one, in seconds; 0 if it is not known."""
