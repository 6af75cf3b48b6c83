"""One Triton kernel for what happens to ``qkv`` rows before attention: q/k norm, rotation, write to the KV cache.

A program handles one row and `HEADS_BLOCK` of its heads. A head is taken in two halves of the rotated elements, and a
rest that is not rotated (partial rotary embedding). Roundings between the steps are those of the separate operations.

    head < H               query:  norm, rotate, back into qkv
    H <= head < H + K      key:    norm, rotate, into the cache (without `append`: back into qkv)
    H + K <= head          value:  into the cache as it is

Shape legend: T rows, H query heads, K key/value heads, D head size, R half of the rotated elements.
"""

import torch
import triton
import triton.language as tl

from nanoflow.ops.dependent_launch import dependent_launch, start_after_others

__all__ = ["append", "qk_norm", "rope", "rope_append"]

HEADS_BLOCK = 16
WARPS = 8


@triton.jit
def qkv_kernel(
    qkv,
    qkv_stride,
    cosines,
    sines,
    q_weight,
    k_weight,
    eps,
    kv,
    kv_index,
    page_stride,
    kind_stride,
    head_stride,
    NORM: tl.constexpr,
    ROTATE: tl.constexpr,
    APPEND: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        start_after_others()
    BLOCKS: tl.constexpr = (LAST - FIRST + HEADS_BLOCK - 1) // HEADS_BLOCK
    REST: tl.constexpr = HEAD_DIM - 2 * HALF
    program = tl.program_id(0)
    row = (program // BLOCKS).to(tl.int64)
    head = FIRST + (program % BLOCKS) * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)
    inside = head < LAST
    is_query = (head < HEADS)[:, None]
    is_value = (head >= HEADS + KV_HEADS)[:, None]
    pair = tl.arange(0, HALF_BLOCK)
    mask = inside[:, None] & (pair < HALF)[None, :]
    column = head[:, None] * HEAD_DIM + pair[None, :]
    start = qkv + row * qkv_stride
    if APPEND:
        index = tl.load(kv_index + row).to(tl.int64)
    first = tl.load(start + column, mask=mask, other=0.0)
    second = tl.load(start + column + HALF, mask=mask, other=0.0)
    if REST > 0:
        tail = tl.arange(0, REST_BLOCK)
        rest_mask = inside[:, None] & (tail < REST)[None, :]
        rest_column = head[:, None] * HEAD_DIM + 2 * HALF + tail[None, :]
        rest = tl.load(start + rest_column, mask=rest_mask, other=0.0)
    if ROTATE:
        cos = tl.load(cosines + row * HALF + pair, mask=pair < HALF, other=1.0)[None, :]
        sin = tl.load(sines + row * HALF + pair, mask=pair < HALF, other=0.0)[None, :]

    if NORM:
        wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
        square = tl.sum(wide_first * wide_first, axis=1) + tl.sum(wide_second * wide_second, axis=1)
        if REST > 0:
            wide_rest = rest.to(tl.float32)
            square += tl.sum(wide_rest * wide_rest, axis=1)
        factor = tl.rsqrt(square / HEAD_DIM + eps)[:, None]
        pairs = (pair < HALF)[None, :]
        scale = _weight(q_weight, k_weight, pair[None, :], pairs, is_query)
        first = _scaled(wide_first, factor, scale, first, is_value)
        scale = _weight(q_weight, k_weight, HALF + pair[None, :], pairs, is_query)
        second = _scaled(wide_second, factor, scale, second, is_value)
        if REST > 0:
            scale = _weight(q_weight, k_weight, 2 * HALF + tail[None, :], (tail < REST)[None, :], is_query)
            rest = _scaled(wide_rest, factor, scale, rest, is_value)
    if ROTATE:
        wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
        rotated = (wide_first * cos - wide_second * sin).to(first.dtype)
        out_second = (wide_second * cos + wide_first * sin).to(second.dtype)
        first = tl.where(is_value, first, rotated)
        second = tl.where(is_value, second, out_second)

    if APPEND:
        if ROTATE:  # otherwise the queries stay as they are
            tl.store(start + column, first, mask=mask & is_query)
            tl.store(start + column + HALF, second, mask=mask & is_query)
            if NORM and REST > 0:
                tl.store(start + rest_column, rest, mask=rest_mask & is_query)
        kind = (head >= HEADS + KV_HEADS).to(tl.int64)
        kv_head = (head - HEADS - kind * KV_HEADS).to(tl.int64)
        place = (index // PAGE_SIZE) * page_stride + kind * kind_stride + kv_head * head_stride
        target = kv + (place + (index % PAGE_SIZE) * HEAD_DIM)[:, None]
        tl.store(target + pair[None, :], first, mask=mask & ~is_query)
        tl.store(target + HALF + pair[None, :], second, mask=mask & ~is_query)
        if REST > 0:
            tl.store(target + 2 * HALF + tail[None, :], rest, mask=rest_mask & ~is_query)
    else:
        tl.store(start + column, first, mask=mask)
        tl.store(start + column + HALF, second, mask=mask)
        if NORM and REST > 0:
            tl.store(start + rest_column, rest, mask=rest_mask)


@triton.jit
def _weight(q_weight, k_weight, column, mask, is_query):
    query = tl.load(q_weight + column, mask=mask, other=0.0).to(tl.float32)
    key = tl.load(k_weight + column, mask=mask, other=0.0).to(tl.float32)
    return tl.where(is_query, query, key)


@triton.jit
def _scaled(wide, factor, scale, plain, is_value):
    normal = (wide * factor).to(plain.dtype).to(tl.float32)
    return tl.where(is_value, plain, (normal * scale).to(plain.dtype))


def rope(
    qkv: torch.Tensor,
    cosines_TR: torch.Tensor,
    sines_TR: torch.Tensor,
    heads: int,
    kv_heads: int,
    head_dim: int,
    heads_block: int = HEADS_BLOCK,
    warps: int = WARPS,
) -> None:
    """Rotates the queries and keys of `qkv`, [T, (H + 2K) * D], in place. Cosines and sines are float32."""
    tables = (cosines_TR, sines_TR)
    ends = (0, heads + kv_heads)
    _launch(qkv, ends, (heads, kv_heads, head_dim), tables=tables, heads_block=heads_block, warps=warps)


def append(
    qkv: torch.Tensor,
    kv: torch.Tensor,
    kv_index_T: torch.Tensor,
    heads: int,
    kv_heads: int,
    head_dim: int,
    heads_block: int = HEADS_BLOCK,
    warps: int = WARPS,
) -> None:
    """Writes keys and values of `qkv` to `kv`, [pages, 2, K, page size, D], at the tokens `kv_index_T`."""
    ends = (heads, heads + 2 * kv_heads)
    sizes = (heads, kv_heads, head_dim)
    _launch(qkv, ends, sizes, kv=kv, kv_index=kv_index_T, heads_block=heads_block, warps=warps)


def rope_append(
    qkv: torch.Tensor,
    cosines_TR: torch.Tensor,
    sines_TR: torch.Tensor,
    kv: torch.Tensor,
    kv_index_T: torch.Tensor,
    heads: int,
    kv_heads: int,
    head_dim: int,
    norm: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    heads_block: int = HEADS_BLOCK,
    warps: int = WARPS,
) -> None:
    """`rope` and `append` in one pass; keys and values of `qkv` stay as they were.

    `norm` (weights of queries and of keys, [D] each, and epsilon) runs `qk_norm` before.
    """
    _launch(
        qkv,
        (0, heads + 2 * kv_heads),
        (heads, kv_heads, head_dim),
        tables=(cosines_TR, sines_TR),
        norm=norm,
        kv=kv,
        kv_index=kv_index_T,
        heads_block=heads_block,
        warps=warps,
    )


def qk_norm(
    qkv: torch.Tensor,
    q_weight_D: torch.Tensor,
    k_weight_D: torch.Tensor,
    eps: float,
    heads: int,
    kv_heads: int,
    head_dim: int,
    heads_block: int = HEADS_BLOCK,
    warps: int = WARPS,
) -> None:
    """RMS norm of every query and key head of `qkv`, in place."""
    norm = (q_weight_D, k_weight_D, eps)
    ends = (0, heads + kv_heads)
    _launch(qkv, ends, (heads, kv_heads, head_dim), norm=norm, heads_block=heads_block, warps=warps)


def _launch(
    qkv: torch.Tensor,
    ends: tuple[int, int],
    sizes: tuple[int, int, int],
    *,
    tables: tuple[torch.Tensor, torch.Tensor] | None = None,
    norm: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    kv: torch.Tensor | None = None,
    kv_index: torch.Tensor | None = None,
    heads_block: int = HEADS_BLOCK,
    warps: int = WARPS,
) -> None:
    rows = qkv.shape[0]
    if not rows:
        return
    heads, kv_heads, head_dim = sizes
    half = head_dim // 2 if tables is None else tables[0].shape[-1]
    heads_block = min(heads_block, int(triton.next_power_of_2(ends[1] - ends[0])))
    cosines, sines = (qkv, qkv) if tables is None else tables
    q_weight, k_weight, eps = (qkv, qkv, 0.0) if norm is None else norm
    strides = (0, 0, 0) if kv is None else kv.stride()[:3]
    qkv_kernel[(rows * triton.cdiv(ends[1] - ends[0], heads_block),)](
        qkv,
        qkv.stride(0),
        cosines,
        sines,
        q_weight,
        k_weight,
        eps,
        qkv if kv is None else kv,
        qkv if kv_index is None else kv_index,
        *strides,
        NORM=norm is not None,
        ROTATE=tables is not None,
        APPEND=kv is not None,
        FIRST=ends[0],
        LAST=ends[1],
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        HALF=half,
        PAGE_SIZE=1 if kv is None else kv.shape[3],
        HEADS_BLOCK=heads_block,
        HALF_BLOCK=triton.next_power_of_2(half),
        REST_BLOCK=max(1, triton.next_power_of_2(head_dim - 2 * half)),
        num_warps=warps,
        **dependent_launch(qkv.device),
    )
