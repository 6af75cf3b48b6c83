"""Triton kernels of the element-wise operations: gated activation, residual sum, and gathers of rows.

All of them are bound by memory: one pass, 16-byte accesses, several loads in flight in each thread. Offsets are int64
from the row on. None waits for the device, and all can be captured in a CUDA graph.

Shape legend: T rows, E columns, F columns of the feed-forward layer, V rows of a table.
"""

import torch
import triton
import triton.language as tl

from nanoflow.ops.dependent_launch import dependent_launch, start_after_others

__all__ = ["BLOCK", "WARPS", "add", "embed", "gather_rows", "silu_mul"]

BLOCK = 2048
"""Columns of one program."""
WARPS = 8


@triton.jit
def silu_mul_kernel(
    source, out, source_stride, out_stride, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    if PDL:
        start_after_others()
    BLOCKS: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    row = (program // BLOCKS).to(tl.int64)
    column = (program % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    mask = column < COLUMNS
    start = source + row * source_stride
    gate = tl.load(start + column, mask=mask).to(tl.float32)
    up = tl.load(start + COLUMNS + column, mask=mask).to(tl.float32)
    product = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * out_stride + column, product.to(out.dtype.element_ty), mask=mask)


@triton.jit
def add_kernel(
    residual, branch, residual_stride, branch_stride, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    if PDL:
        start_after_others()
    BLOCKS: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    row = (program // BLOCKS).to(tl.int64)
    column = (program % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    mask = column < COLUMNS
    x = tl.load(residual + row * residual_stride + column, mask=mask).to(tl.float32)
    y = tl.load(branch + row * branch_stride + column, mask=mask).to(tl.float32)
    tl.store(residual + row * residual_stride + column, (x + y).to(residual.dtype.element_ty), mask=mask)


@triton.jit
def gather_kernel(
    table,
    index,
    last_tokens,
    slots,
    out,
    table_stride,
    out_stride,
    ON_DEVICE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        start_after_others()
    BLOCKS: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    row = (program // BLOCKS).to(tl.int64)
    column = (program % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    mask = column < COLUMNS
    entry = tl.load(index + row).to(tl.int64)
    if ON_DEVICE:
        late = entry < 0
        entry = tl.where(late, tl.load(last_tokens + tl.load(slots + row), mask=late, other=0), entry)
    values = tl.load(table + entry * table_stride + column, mask=mask)
    tl.store(out + row * out_stride + column, values, mask=mask)


def _block(columns: int, block: int) -> int:
    return min(block, int(triton.next_power_of_2(columns)))


def silu_mul(source_T2F: torch.Tensor, out_TF: torch.Tensor, *, block: int = BLOCK, warps: int = WARPS) -> None:
    """``out = silu(gate) * up`` where ``source = [gate | up]``, in float32 inside. Last dimensions are contiguous."""
    rows, columns = out_TF.shape
    if not rows:
        return
    block = _block(columns, block)
    grid = (rows * triton.cdiv(columns, block),)
    strides = (source_T2F.stride(0), out_TF.stride(0))
    constants = {"COLUMNS": columns, "BLOCK": block, "num_warps": warps, **dependent_launch(out_TF.device)}
    silu_mul_kernel[grid](source_T2F, out_TF, *strides, **constants)


def add(residual_TE: torch.Tensor, branch_TE: torch.Tensor, *, block: int = BLOCK, warps: int = WARPS) -> None:
    """``residual += branch``, in place."""
    rows, columns = residual_TE.shape
    if not rows:
        return
    block = _block(columns, block)
    grid = (rows * triton.cdiv(columns, block),)
    strides = (residual_TE.stride(0), branch_TE.stride(0))
    constants = {"COLUMNS": columns, "BLOCK": block, "num_warps": warps, **dependent_launch(branch_TE.device)}
    add_kernel[grid](residual_TE, branch_TE, *strides, **constants)


def gather_rows(
    table_VE: torch.Tensor, index_T: torch.Tensor, out_TE: torch.Tensor, *, block: int = BLOCK, warps: int = WARPS
) -> None:
    """``out[t] = table[index[t]]`` for an index of int32 or int64."""
    _gather(table_VE, index_T, None, None, out_TE, block, warps)


def embed(
    table_VE: torch.Tensor,
    token_ids_T: torch.Tensor,
    last_tokens: torch.Tensor,
    slots_T: torch.Tensor,
    out_TE: torch.Tensor,
    *,
    block: int = BLOCK,
    warps: int = WARPS,
) -> None:
    """``out[t] = table[token]``, where a negative token id stands for ``last_tokens[slots[t]]``."""
    _gather(table_VE, token_ids_T, last_tokens, slots_T, out_TE, block, warps)


def _gather(
    table_VE: torch.Tensor,
    index_T: torch.Tensor,
    last_tokens: torch.Tensor | None,
    slots_T: torch.Tensor | None,
    out_TE: torch.Tensor,
    block: int,
    warps: int,
) -> None:
    rows, columns = out_TE.shape
    if not rows:
        return
    block = _block(columns, block)
    grid = (rows * triton.cdiv(columns, block),)
    gather_kernel[grid](
        table_VE,
        index_T,
        index_T if last_tokens is None else last_tokens,
        index_T if slots_T is None else slots_T,
        out_TE,
        table_VE.stride(0),
        out_TE.stride(0),
        ON_DEVICE=last_tokens is not None,
        COLUMNS=columns,
        BLOCK=block,
        num_warps=warps,
        **dependent_launch(out_TE.device),
    )
