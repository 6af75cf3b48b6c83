"""Work list of decode attention: which blocks of the KV pool a nano-batch's decode rows read.

Made once an iteration, read by the kernel from device memory, so that one captured launch serves any number of
requests and lengths. `decode_work` makes it in numpy and is the standard; the operation makes it on the device
(`nanoflow.ops.decode_list_triton`). A *block* is some consecutive tokens of one page. A segment's blocks stand
together, oldest first; blocks that a sliding window hides are not in the list.

Layout, all int32: a header of `HEADER` entries, the first of which is the number of blocks N, then `FIELDS` arrays of
`capacity` entries each::

    pool block     page * (page size / block tokens) + block inside the page
    row            row of the dense batch
    span           first seen token of the block | one past the last, shifted left by 16
    done           blocks of the same segment before this one
    remaining      blocks of the same segment after this one
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["FIELDS", "HEADER", "decode_blocks", "decode_blocks_each", "decode_work"]

HEADER = 8
FIELDS = 5


def decode_blocks(context: NDArray[np.int32], *, block_tokens: int, window: int | None = None) -> int:
    """Blocks that `decode_work` lists for segments of these context lengths."""
    return int(decode_blocks_each(context, block_tokens=block_tokens, window=window).sum())


def decode_blocks_each(
    context: NDArray[np.int32], *, block_tokens: int, window: int | None = None
) -> NDArray[np.int32]:
    """[S] blocks of each segment."""
    start = np.zeros_like(context) if window is None else np.maximum(context - window, 0)
    blocks: NDArray[np.int32] = (context - 1) // block_tokens - start // block_tokens + 1
    return blocks


def decode_work(
    rows: NDArray[np.int32],
    context: NDArray[np.int32],
    pages: NDArray[np.int32],
    *,
    page_size: int,
    block_tokens: int,
    window: int | None = None,
    capacity: int | None = None,
) -> NDArray[np.int32]:
    """The work list of S segments.

    Args:
        rows, context, pages: [S], [S], [S, P] as in `DenseBatch`.
        block_tokens: tokens a block; divides `page_size`.
        window: sliding window, None for full attention.
        capacity: blocks that the list has room for; by default just as many as there are. Unused entries are zero.

    Raises:
        ValueError: `block_tokens` does not divide `page_size`, or the blocks do not fit into `capacity`.
    """
    if page_size % block_tokens:
        raise ValueError(f"blocks of {block_tokens} tokens do not divide pages of {page_size}")
    length = context.astype(np.int32)
    start = np.zeros_like(length) if window is None else np.maximum(length - window, 0)
    first = start // block_tokens
    count = (length - 1) // block_tokens - first + 1
    total = int(count.sum())
    capacity = max(total, 1) if capacity is None else capacity
    if total > capacity:
        raise ValueError(f"{total} blocks of KV memory do not fit into a work list of {capacity}")
    owner = np.repeat(np.arange(len(length)), count)
    done = np.arange(total, dtype=np.int32) - (np.cumsum(count) - count)[owner]
    block = first[owner] + done
    per_page = page_size // block_tokens
    token = block * block_tokens
    work = np.zeros(HEADER + FIELDS * capacity, np.int32)
    work[0] = total
    fields = work[HEADER:].reshape(FIELDS, capacity)[:, :total]
    fields[0] = pages[owner, block // per_page] * per_page + block % per_page
    fields[1] = rows[owner]
    fields[2] = np.maximum(start[owner] - token, 0) | np.minimum(length[owner] - token, block_tokens) << 16
    fields[3] = done
    fields[4] = count[owner] - 1 - done
    return work
