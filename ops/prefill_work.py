"""The work list of prefill attention: which block of queries reads which keys, made once an iteration in numpy.

Contract: every (row, head) of the chosen segments is in exactly one item; row 0 of the list holds the number of items,
so that a kernel launched with a grid of any size, also one captured in a CUDA graph, learns it from device memory.

Pseudo-code::

    for every segment: cut its rows into blocks of `tokens`
    an item = (block, `pack` query heads of one key/value head)
    put the (segment, key/value head) pairs, long contexts first, into groups whose keys and values fit the L2 cache
    order items by group, and inside a group by work, heavy ones first

Heavy items first leave light ones for the end, so that all SMs finish together; groups let the items that run at the
same time read the same keys (FlashAttention 3's scheduler for causal attention does the same).

Shape legend: C prefill segments, I items.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["FIELDS", "PrefillTile", "item_bound", "most_segments", "pack_heads", "prefill_work"]

FIELDS = 8
"""Columns of the list: row, rows, position of the first row, segment, first query head; the rest is unused."""

L2_GROUP_BYTES = 16 << 20
"""Keys and values of the items that run at the same time: a third of an H100's L2 cache."""


@dataclass(frozen=True)
class PrefillTile:
    """How the kernel cuts and runs its work; the names are those of a Triton launch."""

    block_m: int
    """Rows of a block of queries: (token, head) pairs."""
    block_n: int
    """Keys taken at a time."""
    warps: int
    stages: int
    pack: int = 0
    """Query heads of one key/value head side by side in a block; 0 takes as many as fit."""
    tma: bool = False
    """Keys and values through a TMA descriptor; needs sm_90, 16-bit values and pages of a multiple of `block_n`."""


def pack_heads(tile: PrefillTile, heads: int, kv_heads: int) -> int:
    """Query heads a block: the largest divisor of the group within `tile.pack` (if set) and `tile.block_m`."""
    group = heads // kv_heads
    limit = min(tile.block_m, tile.pack or group)
    return max(pack for pack in range(1, min(group, limit) + 1) if group % pack == 0)


def item_bound(rows: int, segments: int, tile: PrefillTile, heads: int, kv_heads: int) -> int:
    """Most items that `segments` segments with `rows` rows together can make: the capacity of a list of fixed size."""
    pack = pack_heads(tile, heads, kv_heads)
    tokens = tile.block_m // pack
    segments = min(rows, segments)
    return (segments + (rows - segments) // tokens) * (heads // pack)


def most_segments(rows: int) -> int:
    """Prefill segments that a captured launch makes room for in a batch of `rows` rows.

    Every item of the list's room costs a program, even if it ends at once; prompts are rarely as short as this allows.
    """
    return min(rows, max(16, rows // 16))


def prefill_work(
    rows_C: NDArray[np.int32],
    lengths_C: NDArray[np.int32],
    context_C: NDArray[np.int32],
    tile: PrefillTile,
    *,
    heads: int,
    kv_heads: int,
    kv_token_bytes: int,
    window: int | None = None,
    first_segment: int = 0,
    capacity: int | None = None,
) -> NDArray[np.int32]:
    """[1 + I, FIELDS]: the number of items in [0, 0], then the items.

    Args:
        rows_C: first row of each segment; `lengths_C` its rows, `context_C` the keys that its last row may see.
        kv_token_bytes: bytes of one token's key and value in one key/value head.
        first_segment: row of the page table of the first segment here.
        capacity: rows to make room for (the rest stays zero); as many as needed by default.

    Raises:
        ValueError: the items do not fit `capacity`.
    """
    pack = pack_heads(tile, heads, kv_heads)
    tokens, chunks = tile.block_m // pack, heads // pack
    blocks_C = -(-lengths_C.astype(np.int64) // tokens)
    count = int(blocks_C.sum()) * chunks
    if capacity is not None and count > capacity:
        raise ValueError(f"{count} items of prefill attention do not fit a list of {capacity}")
    work = np.zeros((1 + (count if capacity is None else capacity), FIELDS), np.int32)
    work[0, 0] = count
    if count == 0:
        return work
    segment_B = np.repeat(np.arange(len(blocks_C)), blocks_C)
    offset_B = (np.arange(len(segment_B)) - (np.cumsum(blocks_C) - blocks_C)[segment_B]) * tokens
    taken_B = np.minimum(tokens, lengths_C[segment_B] - offset_B)
    position_B = (context_C - lengths_C)[segment_B] + offset_B
    oldest_B = np.zeros_like(position_B) if window is None else np.maximum(0, position_B - window + 1)
    cost_B = (position_B + taken_B - 1) // tile.block_n - oldest_B // tile.block_n + 1

    # Groups of (segment, key/value head) pairs; a window bounds what a pair keeps in the cache at a time.
    order_C = np.argsort(-context_C, kind="stable")
    seen_C = context_C.astype(np.int64) if window is None else np.minimum(context_C, lengths_C + np.int64(window))
    before_C = np.empty(len(order_C), np.int64)
    before_C[order_C] = (np.cumsum(seen_C[order_C]) - seen_C[order_C]) * kv_heads
    chunk = np.tile(np.arange(chunks), len(segment_B))
    block = np.repeat(np.arange(len(segment_B)), chunks)
    segment = segment_B[block]
    kv_head = chunk * kv_heads // chunks
    group = (before_C[segment] + seen_C[segment] * kv_head) * kv_token_bytes // L2_GROUP_BYTES
    order = np.lexsort((chunk, segment, -cost_B[block], group))
    block = block[order]
    items = work[1 : 1 + count]
    items[:, 0] = rows_C[segment_B[block]] + offset_B[block]
    items[:, 1] = taken_B[block]
    items[:, 2] = position_B[block]
    items[:, 3] = segment_B[block] + first_segment
    items[:, 4] = chunk[order] * pack
    return work
