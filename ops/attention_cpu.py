"""CPU kernels of the attention operations, made of torch's fused attention for the CPU.

Decode: a request's pages are taken in blocks of some pages; every block is an attention problem of its own, and a
request's blocks are joined by their log-sum-exp (split-KV, as in Flash-Decoding). Blocks are gathered some at a time
into a buffer that stays in the cache, so that gathering costs next to nothing and memory is read once; measured, that
equals reading an unfragmented pool in place. Few long blocks are fastest where contexts are long, short ones where they
are short: the block's length minimises the work of this very batch.

Keys past a request's length are masked, not skipped: whatever lies in a request's pages must be finite, so the KV pool
starts zeroed. The reserved page, which padding rows write to, is never read.

Prefill: a segment's keys and values are gathered (little beside its scores) and attended to in one call.

Shape legend: T rows, H query heads, K key/value heads, G query heads a key/value head, D head size, L context tokens, S
decode segments, N blocks, M pages a block, B tokens a block.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from nanoflow.ops.operation import NanoContext

__all__ = ["decode_blocks", "paged_decode", "segment_mask", "segment_prefill"]

BLOCK_TOKENS = 512
"""Longest block."""

BLOCK_OVERHEAD = 20
"""What a block costs besides its tokens, in tokens (measured: 1.2 us a block and head, 0.07 us a token and head)."""

GATHER_BYTES = 2 << 20
"""Bytes of keys and values gathered at a time: what stays in a core's share of the last-level cache."""


@dataclass(frozen=True, eq=False)
class _DecodeBlocks:
    """Blocks of one nano-batch's decode segments; the same in every layer with the same window."""

    rows_S: torch.Tensor
    """Row of the dense batch of each segment."""
    units: torch.Tensor
    """[N * 2 * K * M] what to gather: rows of the layer's cache seen as [pages * 2 * K, page size * D]."""
    block_tokens: int
    owner_N: torch.Tensor
    """Segment of each block."""
    mask_N11B: torch.Tensor
    """0 where a key is seen, -inf where not."""
    joined: bool
    """Whether any segment has more than one block."""
    entries: torch.Tensor
    """[N * H] flat (block, padded head) entries in (segment, head, block) order: what `embedding_bag` sums."""
    bags: torch.Tensor
    """[N * H] the (segment, head) of each entry."""
    offsets_SH: torch.Tensor
    """Start of each (segment, head) in `entries`."""
    buffer: torch.Tensor
    """Holds the units of `GATHER_BYTES` worth of blocks."""


def _pages_per_block(pages_S: NDArray[np.int64], page_size: int) -> int:
    """Pages a block that make the least work of segments with these numbers of pages."""
    longest = max(1, min(int(pages_S.max()), BLOCK_TOKENS // page_size))
    numbers, segments = np.unique(pages_S, return_counts=True)
    candidates = np.arange(1, longest + 1)
    blocks = (-(-numbers // candidates[:, None]) * segments).sum(-1)
    return int(candidates[(blocks * (candidates * page_size + BLOCK_OVERHEAD)).argmin()])


def _padded_group(group: int) -> int:
    """Query heads a key/value head, made even: the small GEMMs inside run 1.5 times as fast on 4 rows as on 3."""
    return group if group == 1 else group + group % 2


def decode_blocks(context: NanoContext, heads: int, window: int | None) -> _DecodeBlocks:
    """How `paged_decode` takes the nano-batch's decode rows in layers of this window; made once an iteration."""
    return context.part.cached(("paged_decode", heads, window), lambda: _cut(context, heads, window))


def _cut(context: NanoContext, heads: int, window: int | None) -> _DecodeBlocks:
    host, segments = context.batch.host, context.part.decode
    page_size = context.batch.page_size
    kv_heads, head_dim = context.kv.shape[2], context.kv.shape[4]
    length_S = host.decode_context[segments].astype(np.int64)
    start_S = np.zeros_like(length_S) if window is None else np.maximum(length_S - window, 0)
    first_S = start_S // page_size
    pages_S = (length_S - 1) // page_size - first_S + 1
    per_block = _pages_per_block(pages_S, page_size)
    count_S = -(-pages_S // per_block)
    owner_N = np.repeat(np.arange(len(length_S)), count_S)
    before_S = np.cumsum(count_S) - count_S
    block_N = np.arange(len(owner_N)) - before_S[owner_N]
    column_NM = first_S[owner_N, None] + block_N[:, None] * per_block + np.arange(per_block)
    # Past its last page a block repeats that page, masked: the reserved page's contents may be anything.
    last_N1 = ((length_S - 1) // page_size)[owner_N, None]
    page_NM = host.decode_pages[segments][owner_N[:, None], np.minimum(column_NM, last_N1)].astype(np.int64)
    units = (page_NM[:, None, None, :] * 2 + np.arange(2)[:, None, None]) * kv_heads + np.arange(kv_heads)[:, None]
    token_NB = (column_NM[:, :, None] * page_size + np.arange(page_size)).reshape(len(owner_N), -1)
    hidden_NB = (token_NB < start_S[owner_N, None]) | (token_NB >= length_S[owner_N, None])
    mask_NB = torch.zeros(hidden_NB.shape, dtype=context.kv.dtype).masked_fill_(torch.from_numpy(hidden_NB), -torch.inf)

    # Bags in order (segment, head); inside a bag the segment's blocks.
    counts_SH = np.repeat(count_S, heads)
    offsets_SH = np.cumsum(counts_SH) - counts_SH
    bags = np.repeat(np.arange(len(counts_SH)), counts_SH)
    group = heads // kv_heads
    padded = _padded_group(group)
    head_H = np.arange(heads) // group * padded + np.arange(heads) % group
    block = before_S[bags // heads] + np.arange(len(bags)) - offsets_SH[bags]
    entries = block * kv_heads * padded + head_H[bags % heads]
    block_bytes = 2 * kv_heads * per_block * page_size * head_dim * context.kv.element_size()
    gathered = min(len(owner_N), max(1, GATHER_BYTES // block_bytes)) * 2 * kv_heads * per_block
    return _DecodeBlocks(
        rows_S=torch.from_numpy(host.decode_rows[segments].astype(np.int64)),
        units=torch.from_numpy(units.reshape(-1)),
        block_tokens=per_block * page_size,
        owner_N=torch.from_numpy(owner_N),
        mask_N11B=mask_NB[:, None, None, :],
        joined=len(owner_N) > len(length_S),
        entries=torch.from_numpy(entries),
        bags=torch.from_numpy(bags),
        offsets_SH=torch.from_numpy(offsets_SH),
        buffer=torch.empty(gathered, page_size * head_dim, dtype=context.kv.dtype),
    )


def paged_decode(
    context: NanoContext, queries: torch.Tensor, output: torch.Tensor, kv_heads: int, scale: float, window: int | None
) -> None:
    """Attention of the nano-batch's decode rows; `queries` and `output` are [rows of the dense batch, H, D]."""
    if context.part.decode.start == context.part.decode.stop:
        return
    heads, head_dim = queries.shape[1:]
    work = decode_blocks(context, heads, window)
    group = heads // kv_heads
    padded = _padded_group(group)
    q_SKGD = torch.unflatten(queries.index_select(0, work.rows_S), 1, (kv_heads, group))
    if padded > group:
        q_SKGD = functional.pad(q_SKGD, (0, 0, 0, padded - group))
    q_NKGD = q_SKGD.index_select(0, work.owner_N) if work.joined else q_SKGD
    units = context.kv.view(-1, work.buffer.shape[1])
    block_units = len(work.units) // len(work.owner_N)
    step = len(work.buffer) // block_units
    outs, lses = [], []
    for first in range(0, len(work.owner_N), step):
        last = min(first + step, len(work.owner_N))
        chosen = work.units[first * block_units : last * block_units]
        gathered = torch.index_select(units, 0, chosen, out=work.buffer[: len(chosen)])
        kv = gathered.view(last - first, 2, kv_heads, work.block_tokens, head_dim)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_NKGD[first:last], kv[:, 0], kv[:, 1], attn_mask=work.mask_N11B[first:last], scale=scale
        )
        outs.append(out.reshape(-1, head_dim))
        lses.append(lse.reshape(-1))
    table = outs[0] if len(outs) == 1 else torch.cat(outs)
    if work.joined:
        out_SHD = _join(work, table, torch.cat(lses)).view(-1, heads, head_dim)
    else:
        out_SHD = table.view(-1, kv_heads, padded, head_dim)[:, :, :group].flatten(1, 2)
    output.index_copy_(0, work.rows_S, out_SHD.to(output.dtype))


def _join(work: _DecodeBlocks, table: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """Joins (block, head) results [N * H, D] into (segment, head) results, weighted by exp(log-sum-exp)."""
    bags = len(work.offsets_SH)
    lse = lse.index_select(0, work.entries)
    largest_SH = lse.new_full((bags,), -torch.inf).scatter_reduce_(0, work.bags, lse, "amax")
    weight = lse.sub_(largest_SH.index_select(0, work.bags)).exp_()
    total_SH = weight.new_zeros(bags).index_add_(0, work.bags, weight)
    weight.div_(total_SH.index_select(0, work.bags))
    return functional.embedding_bag(
        work.entries, table.to(weight.dtype), work.offsets_SH, mode="sum", per_sample_weights=weight
    )


def segment_prefill(
    context: NanoContext, queries: torch.Tensor, output: torch.Tensor, kv_heads: int, scale: float, window: int | None
) -> None:
    """Attention of the nano-batch's prefill segments; `queries` and `output` are [rows of the dense batch, H, D]."""
    host, part = context.batch.host, context.part
    page_size = context.batch.page_size
    for segment in range(part.prefill.start, part.prefill.stop):
        start, rows = int(host.prefill_rows[segment]), int(host.prefill_lengths[segment])
        length = int(host.prefill_context[segment])
        oldest = _oldest(length, rows, window, page_size)
        pages = torch.from_numpy(host.prefill_pages[segment][oldest // page_size : -(-length // page_size)])
        kv = context.kv.index_select(0, pages.to(torch.int64))
        k_KLD, v_KLD = kv.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : length - oldest]
        group = queries.shape[1] // kv_heads
        q_KGTD = torch.unflatten(queries[start : start + rows], 1, (kv_heads, group)).permute(1, 2, 0, 3)
        mask_TL = segment_mask(context, segment, window)
        out_KGTD = functional.scaled_dot_product_attention(
            q_KGTD,
            k_KLD.unsqueeze(1).expand(-1, group, -1, -1),
            v_KLD.unsqueeze(1).expand(-1, group, -1, -1),
            attn_mask=mask_TL,
            is_causal=mask_TL is None,
            scale=scale,
        )
        output[start : start + rows] = out_KGTD.permute(2, 0, 1, 3).flatten(1, 2)


def _oldest(length: int, rows: int, window: int | None, page_size: int) -> int:
    """The first key that any of the last `rows` of `length` tokens sees, down to a page's start."""
    return 0 if window is None else max(0, length - rows + 1 - window) // page_size * page_size


def segment_mask(context: NanoContext, segment: int, window: int | None) -> torch.Tensor | None:
    """[T, L] for the keys that a segment's rows see any of: 0 where a row sees a key, -inf where not. None if each row
    sees all that came before it. Made once an iteration."""
    host = context.batch.host
    rows, length = int(host.prefill_lengths[segment]), int(host.prefill_context[segment])
    oldest = _oldest(length, rows, window, context.batch.page_size)
    if rows == length and (window is None or window >= length):
        return None

    def make() -> torch.Tensor:
        query_T1 = torch.arange(length - rows, length).unsqueeze(-1)
        key_L = torch.arange(oldest, length)
        hidden_TL = key_L > query_T1
        if window is not None:
            hidden_TL |= key_L <= query_T1 - window
        return torch.zeros(hidden_TL.shape, dtype=context.kv.dtype).masked_fill_(hidden_TL, -torch.inf)

    return context.part.cached(("prefill_mask", segment, window), make)
