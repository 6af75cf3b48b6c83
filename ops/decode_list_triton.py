"""The work list of decode attention, made on the device from a few numbers a segment.

The list has an entry for every block of KV memory that is read, some ten thousand an iteration; the host sends a row of
four numbers a segment and the pages of all segments, one behind the other, and this kernel writes the list of
`nanoflow.ops.decode_work` from them.

Shape legend: S segments, N pages of all segments.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from nanoflow.ops.decode_work import FIELDS, HEADER, decode_blocks_each

__all__ = ["COLUMNS", "decode_segments", "list_blocks", "pages_in_a_row"]

COLUMNS = 4
LANES = 64

_HEADER = tl.constexpr(HEADER)
_COLUMNS = tl.constexpr(COLUMNS)


def decode_segments(
    rows: NDArray[np.int32],
    context: NDArray[np.int32],
    *,
    page_size: int,
    block_tokens: int,
    window: int | None = None,
) -> NDArray[np.int32]:
    """[1 + S, 4] for S segments: first ``S, blocks of all segments, 0, 0``, then a row for each segment: its row of the
    dense batch, its context, the blocks and the pages of the segments before it."""
    segments = np.zeros((1 + len(rows), COLUMNS), np.int32)
    blocks = decode_blocks_each(context, block_tokens=block_tokens, window=window)
    pages = -(-context // page_size)
    segments[0, :2] = len(rows), blocks.sum()
    segments[1:, 0] = rows
    segments[1:, 1] = context
    segments[1:, 2] = np.cumsum(blocks) - blocks
    segments[1:, 3] = np.cumsum(pages) - pages
    return segments


def pages_in_a_row(context: NDArray[np.int32], pages: NDArray[np.int32], page_size: int) -> NDArray[np.int32]:
    """[N] the pages of every segment's context, of `pages` [S, P], segment after segment."""
    counts = -(-context // page_size)
    flat: NDArray[np.int32] = pages[np.arange(pages.shape[1]) < counts[:, None]]
    return flat


@triton.jit
def _list_kernel(
    segments, pages, work, capacity, PER_PAGE: tl.constexpr, B: tl.constexpr, WINDOW: tl.constexpr, LANES: tl.constexpr
):
    """One program a segment; WINDOW 0 is none."""
    segment = tl.program_id(0)
    count = tl.load(segments)
    if segment == 0:
        tl.store(work, tl.load(segments + 1))
    if segment < count:
        about = segments + (segment + 1) * _COLUMNS
        row = tl.load(about)
        context = tl.load(about + 1)
        entry = work + _HEADER + tl.load(about + 2)
        own_pages = pages + tl.load(about + 3)
        start = 0
        if WINDOW > 0:
            start = tl.maximum(context - WINDOW, 0)
        first = start // B
        blocks = (context - 1) // B - first + 1
        lane = tl.arange(0, LANES)
        for done_before in range(0, blocks, LANES):
            done = done_before + lane
            inside = done < blocks
            block = first + done
            token = block * B
            page = tl.load(own_pages + block // PER_PAGE, mask=inside, other=0)
            span = tl.maximum(start - token, 0) | (tl.minimum(context - token, B) << 16)
            tl.store(entry + done, page * PER_PAGE + block % PER_PAGE, mask=inside)
            tl.store(entry + capacity + done, row + tl.zeros_like(done), mask=inside)
            tl.store(entry + 2 * capacity + done, span, mask=inside)
            tl.store(entry + 3 * capacity + done, done, mask=inside)
            tl.store(entry + 4 * capacity + done, blocks - 1 - done, mask=inside)


def list_blocks(
    segments: torch.Tensor,
    pages: torch.Tensor,
    work: torch.Tensor,
    *,
    page_size: int,
    block_tokens: int,
    window: int | None = None,
) -> None:
    """Write the work list of `decode_work` into `work`, int32 with room for any list; entries beyond it stay.

    Args:
        segments: int32 [1 + S or more, 4], as `decode_segments` makes them for the same blocks and window.
        pages: int32, as `pages_in_a_row` makes them.
    """
    capacity = (len(work) - HEADER) // FIELDS
    grid = (max(1, len(segments) - 1),)
    _list_kernel[grid](
        segments, pages, work, capacity, PER_PAGE=page_size // block_tokens, B=block_tokens, WINDOW=window or 0,
        LANES=LANES, num_warps=2,
    )  # fmt: skip
