"""Prefill attention over pages in Triton: a block of queries against its keys, softmax on the way (FlashAttention 2).

A program takes one item of the work list (`prefill_work`); the hardware deals the next one to the SM that is free first
(a program that loops over items spilled more registers). An item is a block of M rows, each a
(token, query head) pair of one key/value head: heads that share keys are packed side by side, so that a short chunk
fills the block and each key is loaded for all of them. Keys come in blocks of N: first those that every row sees,
without a mask, then those on the diagonal (and, with a sliding window, those at its start before both). Scores are
scaled into powers of two, sums and products are kept in float32.

Keys and values are loaded through a TMA descriptor that views the layer's cache as rows of D (sm_90, pages of a
multiple of N), else through pointers. In the pages that hold a request's keys everything must be finite; keys that no
row sees weigh nothing. Pages past the context are not read.

Triton 3.6 and 3.7 fail to compile this loop with `warp_specialize` for sm_90. With 4 warps and two programs a SM, one
program's softmax runs beside the other's products.

Shape legend: T rows of the dense batch, H query heads, K key/value heads, D head size, C segments, P columns of the
page table, I items, M rows of a block of queries, N keys of a block.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from triton.tools.tensor_descriptor import TensorDescriptor

from nanoflow.ops.device_batch import BatchPart
from nanoflow.ops.operation import NanoContext
from nanoflow.ops.prefill_work import FIELDS, PrefillTile, item_bound, most_segments, pack_heads, prefill_work

__all__ = ["default_tile", "prefill_attention", "prepare_prefill", "run_prefill_attention"]

HIDDEN = tl.constexpr(-1.0e30)
"""Score of a key that a row does not see. Finite: a row that sees nothing of a block forgets it at the next one."""


@triton.jit
def _load_block(
    kv, kv_rows, table, page, key, stop, which, kv_head,
    KV_HEADS: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """[N, BLOCK_D] keys (`which` 0) or values (1) from `key` on; `page` holds them if blocks lie whole in pages."""
    if TMA:
        return kv_rows.load([((page * 2 + which) * KV_HEADS + kv_head) * PAGE + key % PAGE, 0])
    keys = tl.arange(0, N)
    columns = tl.arange(0, BLOCK_D)
    if WHOLE:
        row = ((page.to(tl.int64) * 2 + which) * KV_HEADS + kv_head) * PAGE + key % PAGE
        pointers = kv + row * D + (keys[:, None] * D + columns[None, :])
        if BLOCK_D == D:
            return tl.load(pointers)
        return tl.load(pointers, mask=columns[None, :] < D, other=0.0)
    keys += key
    pages = tl.load(table + keys // PAGE, mask=keys < stop, other=0).to(tl.int64)
    rows = ((pages * 2 + which) * KV_HEADS + kv_head) * PAGE + keys % PAGE
    mask = (keys < stop)[:, None] & (columns < D)[None, :]
    return tl.load(kv + rows[:, None] * D + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _softmax_step(s, m, total, acc, key, position, scale, N: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr):
    """Weights of a block's scores, and the running maximum, sum and output brought to the new maximum."""
    if MASKED:
        keys = key + tl.arange(0, N)[None, :]
        seen = keys <= position[:, None]
        if WINDOW > 0:
            seen = seen & (keys > position[:, None] - WINDOW)
        # Scaled before it is masked: a fused multiply-add of HIDDEN, less its own rounded product, is far from zero.
        s = tl.where(seen, s * scale, HIDDEN)
        new_m = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - new_m[:, None])
    else:
        new_m = tl.maximum(m, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - new_m[:, None])
    old = tl.exp2(m - new_m)
    return p, new_m, total * old + tl.sum(p, 1), acc * old[:, None]


@triton.jit
def _attend(
    q, m, total, acc, kv, kv_rows, table, start, stop, last, position, kv_head, scale,
    KV_HEADS: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr, TMA: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the keys ``start .. stop`` (in whole blocks) to a block of queries; `last` is the last key that exists."""
    # The page of the next block is loaded a block early: a TMA load would otherwise wait for it.
    page = tl.load(table + tl.minimum(start, last) // PAGE)
    for key in tl.range(start, stop, N):
        k = _load_block(kv, kv_rows, table, page, key, last + 1, 0, kv_head,
                        KV_HEADS, PAGE, D, N, BLOCK_D, WHOLE, TMA)  # fmt: skip
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        p, m, total, acc = _softmax_step(s, m, total, acc, key, position, scale, N, WINDOW, MASKED)
        v = _load_block(kv, kv_rows, table, page, key, last + 1, 1, kv_head,
                        KV_HEADS, PAGE, D, N, BLOCK_D, WHOLE, TMA)  # fmt: skip
        page = tl.load(table + tl.minimum(key + N, last) // PAGE)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return m, total, acc


@triton.jit
def prefill_attention_kernel(
    q, kv, kv_rows, pages, work, out, q_stride, out_stride, pages_stride, scale,
    GROUP: tl.constexpr, PACK: tl.constexpr, KV_HEADS: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr,
    WINDOW: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`work` [1 + I, 8] as `prefill_work` makes it; `scale` holds log2(e). WINDOW 0 is none."""
    TOKENS: tl.constexpr = M // PACK
    item = tl.program_id(0)
    count = tl.load(work)
    if item >= count:
        return
    fields = work + (item + 1) * 8
    row = tl.load(fields).to(tl.int64)
    tokens = tl.load(fields + 1)
    first = tl.load(fields + 2)
    segment = tl.load(fields + 3)
    head = tl.load(fields + 4)
    kv_head = head // GROUP
    table = pages + segment.to(tl.int64) * pages_stride

    token = tl.arange(0, M) // PACK
    columns = tl.arange(0, BLOCK_D)
    here = head * D + tl.arange(0, M) % PACK * D
    valid = ((token < tokens) & (token < TOKENS))[:, None] & (columns < D)[None, :]
    q_block = tl.load(q + row * q_stride + (token * q_stride + here)[:, None] + columns[None, :], mask=valid, other=0.0)
    position = first + token

    last = first + tokens - 1
    diagonal = (first + 1) // N * N
    stop = (last // N + 1) * N
    m = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, BLOCK_D], tl.float32)
    start = 0
    if WINDOW > 0:
        start = tl.maximum(first - WINDOW + 1, 0) // N * N
        inside = (tl.maximum(last - WINDOW + 1, 0) + N - 1) // N * N
        inside = tl.minimum(inside, stop)
        m, total, acc = _attend(
            q_block, m, total, acc, kv, kv_rows, table, start, inside, last, position, kv_head, scale,
            KV_HEADS, PAGE, D, N, BLOCK_D, WHOLE, TMA, WINDOW, True, PRECISION,
        )  # fmt: skip
        start = inside
        diagonal = tl.maximum(diagonal, start)
    m, total, acc = _attend(
        q_block, m, total, acc, kv, kv_rows, table, start, diagonal, last, position, kv_head, scale,
        KV_HEADS, PAGE, D, N, BLOCK_D, WHOLE, TMA, WINDOW, False, PRECISION,
    )  # fmt: skip
    m, total, acc = _attend(
        q_block, m, total, acc, kv, kv_rows, table, diagonal, stop, last, position, kv_head, scale,
        KV_HEADS, PAGE, D, N, BLOCK_D, WHOLE, TMA, WINDOW, True, PRECISION,
    )  # fmt: skip
    tl.store(
        out + row * out_stride + (token * out_stride + here)[:, None] + columns[None, :],
        (acc * (1.0 / total)[:, None]).to(out.dtype.element_ty),
        mask=valid,
    )


def default_tile(head_dim: int, itemsize: int, page_size: int, capability: tuple[int, int]) -> PrefillTile:
    """The tile for a head size, bytes an element, page size and compute capability."""
    if itemsize > 2:
        return PrefillTile(16 if head_dim > 128 else 32, 32, warps=4, stages=1)
    if capability == (9, 0) and page_size % 64 == 0 and head_dim >= 64 and head_dim % 8 == 0:
        if head_dim > 128:
            return PrefillTile(128, 64, warps=8, stages=2, tma=True)
        return PrefillTile(128, 64, warps=4, stages=2, tma=True)
    if head_dim > 128:
        return PrefillTile(64, 32, warps=4, stages=2)
    return PrefillTile(128, 64, warps=8, stages=2)


def _capability(tensor: torch.Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else (0, 0)


def kernel_constants(
    tile: PrefillTile, *, heads: int, kv_heads: int, head_dim: int, page_size: int, window: int | None, itemsize: int
) -> dict[str, object]:
    """Compile-time arguments of the kernel."""
    return {
        "GROUP": heads // kv_heads, "PACK": pack_heads(tile, heads, kv_heads), "KV_HEADS": kv_heads,
        "PAGE": page_size, "D": head_dim, "WINDOW": window or 0, "M": tile.block_m, "N": tile.block_n,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)), "WHOLE": page_size % tile.block_n == 0,
        "TMA": tile.tma, "PRECISION": "ieee" if itemsize > 2 else "tf32",
    }  # fmt: skip


def prefill_attention(
    q_THD: torch.Tensor,
    kv: torch.Tensor,
    pages_CP: torch.Tensor,
    work: torch.Tensor,
    out_THD: torch.Tensor,
    *,
    tile: PrefillTile,
    scale: float,
    window: int | None = None,
) -> None:
    """Softmax(q k^T * scale) v of the items in `work`, written to their rows of `out_THD`; other rows stay.

    Nothing is allocated and nothing read back, so it can be captured in a CUDA graph; the number of items may change
    between replays, the cache, the tables and the list may not move.

    Args:
        q_THD: queries, a view with heads side by side (its row stride may be that of the qkv buffer).
        kv: the layer's cache, [pages, 2, K, page size, D], contiguous.
        pages_CP: int32 page table of all segments.
        work: int32 [1 + I, 8] from `prefill_work`, made for this tile, window and these heads. Room for
            more items costs programs that end at once.

    Raises:
        ValueError: a tile with TMA does not fit the pages or the dtype.
    """
    _, heads, head_dim = q_THD.shape
    kv_heads, page_size = kv.shape[2], kv.shape[3]
    if tile.tma and (page_size % tile.block_n or kv.element_size() != 2 or head_dim % 8):
        raise ValueError(
            f"a tile with TMA takes 16-bit values, head sizes of a multiple of 8 and pages of a multiple of "
            f"{tile.block_n} tokens, not {kv.dtype}, {head_dim} and {page_size}; use one with tma=False"
        )
    constants = kernel_constants(
        tile, heads=heads, kv_heads=kv_heads, head_dim=head_dim, page_size=page_size, window=window,
        itemsize=kv.element_size(),
    )  # fmt: skip
    block = [tile.block_n, int(str(constants["BLOCK_D"]))]
    kv_rows = TensorDescriptor.from_tensor(kv.view(-1, head_dim), block) if tile.tma else None
    capacity = work.shape[0] - 1
    if capacity:
        prefill_attention_kernel[(capacity,)](
            q_THD, kv, kv_rows, pages_CP, work, out_THD, q_THD.stride(0), out_THD.stride(0), pages_CP.stride(0),
            scale * math.log2(math.e), **constants, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def run_prefill_attention(
    context: NanoContext,
    q_THD: torch.Tensor,
    out_THD: torch.Tensor,
    scale: float,
    window: int | None,
    tile: PrefillTile | None = None,
) -> None:
    """Attention of a nano-batch's prefill segments; its work list and the page tables are made once an iteration."""
    tile = tile or _tile_for(context.kv)
    pages, work = _tables(context, q_THD.shape[1], window, tile)
    prefill_attention(q_THD, context.kv, pages, work, out_THD, tile=tile, scale=scale, window=window)


def prepare_prefill(context: NanoContext, heads: int, windows: Sequence[int | None]) -> None:
    """Make the tables that `run_prefill_attention` reads in layers of these windows."""
    for window in dict.fromkeys(windows):
        _tables(context, heads, window, _tile_for(context.kv))


def _tile_for(kv: torch.Tensor) -> PrefillTile:
    return default_tile(kv.shape[4], kv.element_size(), kv.shape[3], _capability(kv))


def _tables(
    context: NanoContext, heads: int, window: int | None, tile: PrefillTile
) -> tuple[torch.Tensor, torch.Tensor]:
    """The page tables of all segments, and the nano-batch's work list."""
    part, kv = context.part, context.kv
    kv_heads, head_dim = kv.shape[2], kv.shape[4]

    def items(part: BatchPart) -> NDArray[np.int32]:
        host, segments = part.batch.host, part.prefill
        return prefill_work(
            host.prefill_rows[segments], host.prefill_lengths[segments], host.prefill_context[segments], tile,
            heads=heads, kv_heads=kv_heads, kv_token_bytes=2 * head_dim * kv.element_size(), window=window,
            first_segment=segments.start,
        )  # fmt: skip

    whole, rows = context.batch.whole, part.rows.stop - part.rows.start
    most_pages = (most_segments(whole.rows.stop), context.batch.pages_per_sequence)
    pages = whole.from_host("prefill_pages", lambda part: part.batch.host.prefill_pages, most_pages)
    bound = item_bound(rows, most_segments(rows), tile, heads, kv_heads)
    return pages, part.from_host(("prefill_work", tile, heads, window), items, (1 + bound, FIELDS))
