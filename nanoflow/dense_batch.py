"""Forming a dense batch: rows, positions, KV places and attention segments of one iteration, without per-token loops.

Legend as in `nanoflow.ops.batch`; W is the prompt tokens of the iteration, K its prompt chunks before nano-batches cut
them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nanoflow.kv_cache import KVCache
from nanoflow.ops.batch import RESERVED_PAGE, TOKEN_ON_DEVICE, DenseBatch, NanoBatchRows, SamplingBatch
from nanoflow.pipeline.split import Cut

__all__ = ["BatchLayout", "CutBatch", "form_dense_batch", "lay_out"]

CutBatch = Callable[[int, int, int], Cut]
"""Deals (decode rows, prefill rows) to nano-batches, as `nanoflow.pipeline.split.BatchCutter` does; the third number is
that of the tokens that all decode rows attend to."""

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class BatchLayout:
    """Where an iteration's tokens stand in the dense batch."""

    nano_batches: tuple[NanoBatchRows, ...]
    decode_rows: Int64
    """[D] row of each decode token."""
    prefill_rows: Int64
    """[W] row of each prompt token."""
    decode_splits: Int64
    """[N + 1] decode tokens before each nano-batch."""
    prefill_splits: Int64
    """[N + 1] prompt tokens before each nano-batch."""
    program: int = 0
    """Of the executor's programs, the one that it is for."""


def lay_out(cut: CutBatch, decode: int, prefill: int, decode_tokens: int) -> BatchLayout:
    """Gives rows to `decode` decode tokens, which attend to `decode_tokens` in all, and to `prefill` prompt tokens.

    Raises ValueError if `cut` does not deal out exactly the rows that it was given, or more than it makes room for.
    """
    dealt = cut(decode, prefill, decode_tokens)
    decode_counts, prefill_counts, rows = (np.asarray(c, np.int64) for c in (dealt.decode, dealt.prefill, dealt.rows))
    if decode_counts.sum() != decode or prefill_counts.sum() != prefill or len(decode_counts) != len(prefill_counts):
        raise ValueError(
            f"{decode} decode rows and {prefill} prefill rows were split into {decode_counts.tolist()} and "
            f"{prefill_counts.tolist()}: each must sum to its rows, over the same nano-batches"
        )
    counts = decode_counts + prefill_counts
    if len(rows) != len(counts) or (rows < counts).any():
        raise ValueError(f"nano-batches of {rows.tolist()} rows do not hold the {counts.tolist()} dealt to them")
    padding = rows - counts
    starts = _before(rows)
    decode_splits, prefill_splits = _before(decode_counts), _before(prefill_counts)
    return BatchLayout(
        tuple(
            NanoBatchRows(*rows)
            for rows in zip(
                starts[:-1].tolist(), decode_counts.tolist(), prefill_counts.tolist(), padding.tolist(), strict=True
            )
        ),
        np.arange(decode) + np.repeat(starts[:-1] - decode_splits[:-1], decode_counts),
        np.arange(prefill) + np.repeat(starts[:-1] + decode_counts - prefill_splits[:-1], prefill_counts),
        decode_splits,
        prefill_splits,
        dealt.program,
    )


def form_dense_batch(
    layout: BatchLayout,
    kv: KVCache,
    decode_slots: Int32,
    decode_positions: Int32,
    chunk_slots: Int32,
    chunk_starts: Int32,
    chunk_lengths: Int32,
    chunk_tokens: Int32,
    sampling: SamplingBatch | None,
) -> DenseBatch:
    """The dense batch of some decode tokens and some prompt chunks, whose pages are in the page table already.

    Args:
        decode_slots, decode_positions: [D] slot and position of each decode token; its id is still on the device.
        chunk_slots, chunk_starts, chunk_lengths: [K] slot, position of the first token and tokens of each chunk.
        chunk_tokens: [W] token ids of all chunks, in order.
    """
    page_size = kv.page_size
    rows = layout.nano_batches[-1].end if layout.nano_batches else 0
    token_ids, positions, slots = (np.zeros(rows, np.int32) for _ in range(3))
    kv_index = np.full(rows, RESERVED_PAGE * page_size, np.int64)

    token_ids[layout.decode_rows] = TOKEN_ON_DEVICE
    positions[layout.decode_rows] = decode_positions
    slots[layout.decode_rows] = decode_slots

    prompt_tokens = len(chunk_tokens)
    chunk_ends = np.cumsum(chunk_lengths)
    chunk_of = np.repeat(np.arange(len(chunk_lengths)), chunk_lengths)
    prompt_positions = np.arange(prompt_tokens) + np.repeat(chunk_starts - (chunk_ends - chunk_lengths), chunk_lengths)
    token_ids[layout.prefill_rows] = chunk_tokens
    positions[layout.prefill_rows] = prompt_positions
    slots[layout.prefill_rows] = chunk_slots[chunk_of]

    taken = np.concatenate([layout.decode_rows, layout.prefill_rows])
    pages = kv.page_table[slots[taken], positions[taken] // page_size].astype(np.int64)
    kv_index[taken] = pages * page_size + positions[taken] % page_size

    # A prefill segment is a chunk's piece inside one nano-batch: cut at the ends of both.
    ends = np.unique(np.concatenate([chunk_ends, layout.prefill_splits[1:]]))
    ends = ends[ends > 0]
    firsts = np.concatenate([np.zeros(min(1, len(ends)), np.int64), ends[:-1]])
    prefill_context = (prompt_positions[ends - 1] + 1).astype(np.int32)
    decode_context = (decode_positions + 1).astype(np.int32)
    longest = max(int(decode_context.max(initial=0)), int(prefill_context.max(initial=0)))
    table = kv.page_table[:, : kv.pages_for(longest)]
    prefill_pages = table[chunk_slots[chunk_of[firsts]]]
    # A chunk's later pieces already hold pages that its earlier pieces must not see.
    beyond = np.arange(table.shape[1]) >= -(-prefill_context[:, None] // page_size)
    prefill_pages[beyond] = RESERVED_PAGE

    return DenseBatch(
        nano_batches=layout.nano_batches,
        token_ids=token_ids,
        positions=positions,
        slots=slots,
        kv_index=kv_index,
        decode_rows=layout.decode_rows.astype(np.int32),
        decode_context=decode_context,
        decode_pages=table[decode_slots],
        decode_splits=layout.decode_splits.astype(np.int32),
        prefill_rows=layout.prefill_rows[firsts].astype(np.int32),
        prefill_lengths=(ends - firsts).astype(np.int32),
        prefill_context=prefill_context,
        prefill_pages=prefill_pages,
        prefill_splits=np.searchsorted(firsts, layout.prefill_splits).astype(np.int32),
        sampling=sampling,
        program=layout.program,
    )


def _before(counts: Int64) -> Int64:
    """[N + 1] running sums, from zero."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
