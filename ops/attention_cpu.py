"""CPU kernels of the attention operations, made of torch's fused attention for the CPU.

Decode: every page of the KV cache is an attention problem of its own (its owner's query against `page size` keys), so
that the cache is read where it lies; the pages' results are then joined by their log-sum-exp (split-KV, as in
Flash-Decoding). If the batch's pages fill most of a range of the pool, the kernel runs over that whole range without
any gathering and the results of other requests' pages are dropped; else it gathers the pages first.

Keys past a request's length are masked, not skipped: whatever lies in a page must be finite, so the KV pool starts
zeroed. The reserved page, which padding rows write to, is never read.

Prefill: a segment's keys and values are gathered (little beside its scores) and attended to in one call.

Shape legend: T rows, H query heads, K key/value heads, G query heads a key/value head, D head size, L context tokens, S
decode segments, N pages worked on, P tokens a page.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from nanoflow.ops.operation import NanoContext

__all__ = ["paged_decode", "segment_prefill"]

DENSE_SHARE = 0.5
"""Share of a range of pages that must belong to the batch for the range to be read as it lies; below it, gathering
wins."""


@dataclass(frozen=True, eq=False)
class _DecodePages:
    """Pages of one nano-batch's decode segments; the same in every layer with the same window."""

    rows_S: torch.Tensor
    """Row of the dense batch of each segment."""
    first: int
    last: int
    """Range of the pool to read as it lies; empty if pages are gathered."""
    pages_N: torch.Tensor
    """Pages to gather; unused when the range is dense."""
    owner_N: torch.Tensor
    """Segment of each page worked on."""
    mask_N11P: torch.Tensor
    """0 where a key is seen, -inf where not."""
    entries: torch.Tensor
    """[S * H * pages] flat (page, head) entries of each (segment, head), segment-major: what `embedding_bag` sums."""
    bags: torch.Tensor
    """[S * H * pages] the (segment, head) of each entry."""
    offsets_SH: torch.Tensor
    """Start of each (segment, head) in `entries`."""


def _decode_pages(context: NanoContext, heads: int, window: int | None) -> _DecodePages:
    host, segments = context.batch.host, context.part.decode
    page_size = context.batch.page_size
    length_S = host.decode_context[segments].astype(np.int64)
    start_S = np.maximum(length_S - window, 0) if window is not None else np.zeros_like(length_S)
    first_S = start_S // page_size
    count_S = (length_S - 1) // page_size - first_S + 1
    owner_N = np.repeat(np.arange(len(length_S)), count_S)
    before_S = np.cumsum(count_S) - count_S
    column_N = np.arange(len(owner_N)) - before_S[owner_N] + first_S[owner_N]
    page_N = host.decode_pages[segments][owner_N, column_N].astype(np.int64)
    token_NP = column_N[:, None] * page_size + np.arange(page_size)
    seen_NP = (token_NP >= start_S[owner_N, None]) & (token_NP < length_S[owner_N, None])

    first, last = int(page_N.min()), int(page_N.max()) + 1
    dense = len(page_N) >= DENSE_SHARE * (last - first) and len(np.unique(page_N)) == len(page_N)
    entry_N = np.arange(len(page_N))
    if dense:
        # Pages of other requests get any query and no mask: a fully masked page would only make NaN to be dropped.
        entry_N = page_N - first
        seen_all_NP = np.ones((last - first, page_size), dtype=bool)
        owner_all_N = np.zeros(last - first, dtype=np.int64)
        seen_all_NP[entry_N], owner_all_N[entry_N] = seen_NP, owner_N
        seen_NP, owner_N = seen_all_NP, owner_all_N
    else:
        first = last = 0

    # Bags in order (segment, head); inside a bag the segment's pages.
    counts_SH = np.repeat(count_S, heads)
    offsets_SH = np.cumsum(counts_SH) - counts_SH
    bags = np.repeat(np.arange(len(counts_SH)), counts_SH)
    place = np.arange(len(bags)) - offsets_SH[bags]
    entries = entry_N[before_S[bags // heads] + place] * heads + bags % heads
    mask_NP = torch.zeros(seen_NP.shape, dtype=context.kv.dtype).masked_fill_(torch.from_numpy(~seen_NP), -torch.inf)
    return _DecodePages(
        rows_S=torch.from_numpy(host.decode_rows[segments].astype(np.int64)),
        first=first,
        last=last,
        pages_N=torch.from_numpy(page_N),
        owner_N=torch.from_numpy(owner_N),
        mask_N11P=mask_NP[:, None, None, :],
        entries=torch.from_numpy(entries),
        bags=torch.from_numpy(bags),
        offsets_SH=torch.from_numpy(offsets_SH),
    )


def paged_decode(
    context: NanoContext, queries: torch.Tensor, output: torch.Tensor, kv_heads: int, scale: float, window: int | None
) -> None:
    """Attention of the nano-batch's decode rows; `queries` and `output` are [rows of the dense batch, H, D]."""
    if context.part.decode.start == context.part.decode.stop:
        return
    heads, head_dim = queries.shape[1:]
    work = context.part.cached(("paged_decode", heads, window), lambda: _decode_pages(context, heads, window))
    kv = context.kv[work.first : work.last] if work.last else context.kv.index_select(0, work.pages_N)
    q_SKGD = torch.unflatten(queries.index_select(0, work.rows_S), 1, (kv_heads, -1))
    q_NKGD = q_SKGD.index_select(0, work.owner_N)
    out_NKGD, lse_NKG = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_NKGD, kv[:, 0], kv[:, 1], attn_mask=work.mask_N11P, scale=scale
    )
    segments = len(work.rows_S)
    lse = lse_NKG.reshape(-1).index_select(0, work.entries)
    largest_SH = lse.new_full((segments * heads,), -torch.inf).scatter_reduce_(0, work.bags, lse, "amax")
    weight = lse.sub_(largest_SH.index_select(0, work.bags)).exp_()
    total_SH = weight.new_zeros(segments * heads).index_add_(0, work.bags, weight)
    weight.div_(total_SH.index_select(0, work.bags))
    table = out_NKGD.reshape(-1, head_dim)
    joined = functional.embedding_bag(
        work.entries, table.to(weight.dtype), work.offsets_SH, mode="sum", per_sample_weights=weight
    )
    output.index_copy_(0, work.rows_S, joined.view(segments, heads, head_dim).to(output.dtype))


def segment_prefill(
    context: NanoContext, queries: torch.Tensor, output: torch.Tensor, kv_heads: int, scale: float, window: int | None
) -> None:
    """Attention of the nano-batch's prefill segments; `queries` and `output` are [rows of the dense batch, H, D]."""
    host, part = context.batch.host, context.part
    page_size = context.batch.page_size
    for segment in range(part.prefill.start, part.prefill.stop):
        start, rows = int(host.prefill_rows[segment]), int(host.prefill_lengths[segment])
        length = int(host.prefill_context[segment])
        # The first key that any of the rows sees, down to a page's start.
        oldest = 0 if window is None else max(0, length - rows + 1 - window) // page_size * page_size
        pages = torch.from_numpy(host.prefill_pages[segment][oldest // page_size : -(-length // page_size)])
        kv = context.kv.index_select(0, pages.to(torch.int64))
        k_KLD, v_KLD = kv.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : length - oldest]
        group = queries.shape[1] // kv_heads
        q_KGTD = torch.unflatten(queries[start : start + rows], 1, (kv_heads, group)).permute(1, 2, 0, 3)
        causal = rows == length and (window is None or window >= length)
        mask_TL = None if causal else _mask(context, segment, rows, length, oldest, window)
        out_KGTD = functional.scaled_dot_product_attention(
            q_KGTD,
            k_KLD.unsqueeze(1).expand(-1, group, -1, -1),
            v_KLD.unsqueeze(1).expand(-1, group, -1, -1),
            attn_mask=mask_TL,
            is_causal=causal,
            scale=scale,
        )
        output[start : start + rows] = out_KGTD.permute(2, 0, 1, 3).flatten(1, 2)


def _mask(context: NanoContext, segment: int, rows: int, length: int, oldest: int, window: int | None) -> torch.Tensor:
    """[T, L] for the keys ``oldest .. length - 1``: 0 where a row sees a key, -inf where not."""

    def make() -> torch.Tensor:
        query_T1 = torch.arange(length - rows, length).unsqueeze(-1)
        key_L = torch.arange(oldest, length)
        hidden_TL = key_L > query_T1
        if window is not None:
            hidden_TL |= key_L <= query_T1 - window
        return torch.zeros(hidden_TL.shape, dtype=context.kv.dtype).masked_fill_(hidden_TL, -torch.inf)

    return context.part.cached(("prefill_mask", segment, window), make)
