"""Triton kernels of the RMS norms: one program a row, the row in registers, each byte moved once.

The mean is taken in float32 and the normalised value rounded to the activations' type before it is scaled, as in
`nanoflow.ops.norm`. The norm of query and key heads is part of the kernel in `nanoflow.ops.rope_triton`.

Shape legend: T rows, E columns.
"""

import torch
import triton
import triton.language as tl

from nanoflow.ops.dependent_launch import dependent_launch, start_after_others

__all__ = ["add_norm", "norm", "warps_for"]


@triton.jit
def norm_kernel(
    source,
    branch,
    weight,
    out,
    source_stride,
    branch_stride,
    out_stride,
    eps,
    ADD: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < COLUMNS
    if PDL:
        start_after_others()
    scale = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(source + row * source_stride + column, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(branch + row * branch_stride + column, mask=mask, other=0.0).to(tl.float32)
        total = x.to(source.dtype.element_ty)
        tl.store(source + row * source_stride + column, total, mask=mask)
        x = total.to(tl.float32)
    mean = tl.sum(x * x, axis=0) / COLUMNS
    normal = (x * tl.rsqrt(mean + eps)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * out_stride + column, (normal * scale).to(out.dtype.element_ty), mask=mask)


def warps_for(columns: int) -> int:
    """Warps of a row: 32 elements a thread, so that each has four 16-byte loads of 16-bit values in flight."""
    return min(16, max(1, int(triton.next_power_of_2(columns)) // 1024))


def norm(
    source_TE: torch.Tensor, weight_E: torch.Tensor, eps: float, out_TE: torch.Tensor, *, warps: int | None = None
) -> None:
    """``out = rms_norm(source) * weight``; `out_TE` may be `source_TE`."""
    _launch(source_TE, None, weight_E, eps, out_TE, warps)


def add_norm(
    residual_TE: torch.Tensor,
    branch_TE: torch.Tensor,
    weight_E: torch.Tensor,
    eps: float,
    out_TE: torch.Tensor,
    *,
    warps: int | None = None,
) -> None:
    """``residual += branch; out = rms_norm(residual) * weight``; `out_TE` may be `branch_TE`."""
    _launch(residual_TE, branch_TE, weight_E, eps, out_TE, warps)


def _launch(
    source: torch.Tensor,
    branch: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    warps: int | None,
) -> None:
    rows, columns = source.shape
    if not rows:
        return
    other = source if branch is None else branch
    norm_kernel[(rows,)](
        source,
        other,
        weight,
        out,
        source.stride(0),
        other.stride(0),
        out.stride(0),
        eps,
        ADD=branch is not None,
        COLUMNS=columns,
        BLOCK=triton.next_power_of_2(columns),
        num_warps=warps or warps_for(columns),
        **dependent_launch(source.device),
    )
