"""RMS norms: ``x * weight / sqrt(mean(x^2) + eps)`` (Zhang and Sennrich, 2019, arXiv 1910.07467).

The mean is taken in float32 and the normalised value rounded to the activations' type before it is scaled, as
transformers does.

Shape legend: T rows, E columns, H query heads, K key/value heads, D head size.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from nanoflow.ops.operation import Access, Cost, Kernel, NanoContext, Operation, Weight, Work, triton_on_cuda

__all__ = ["AddNorm", "Norm", "QKNorm", "RowNorm", "rms_norm"]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """Writes the RMS norm of `x` over its last dimension to `out`, which may be `x` itself."""
    if x.dtype in (torch.float32, torch.float64):
        # The norm of the vector is one pass over x without a temporary of its size.
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        torch.mul(x, mean_square.add_(eps).rsqrt_(), out=out)
        out.mul_(weight)
        return
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    torch.mul(wide.to(x.dtype), weight, out=out)


@dataclass(frozen=True)
class RowNorm:
    """An RMS norm of rows: its weight, and where the normed rows go."""

    weight_E: torch.Tensor
    eps: float
    out_TE: torch.Tensor


class Norm(Operation):
    """``target = rms_norm(source)``."""

    resource = "memory"

    def __init__(self, name: str, source: str, target: str, columns: int, eps: float, part: str) -> None:
        super().__init__(name)
        self.source = source
        self.target = target
        self.columns = columns
        self.eps = eps
        self.part = part

    @property
    def accesses(self) -> tuple[Access, ...]:
        return (Access(self.source), Access(self.target, write=True))

    @property
    def weights(self) -> tuple[Weight, ...]:
        return (Weight("weight", (f"{self.part}.weight",), (self.columns,)),)

    def cost(self, work: Work, itemsize: int) -> Cost:
        elements = work.rows * self.columns
        return Cost(flops=4.0 * elements, bytes=2.0 * elements * itemsize)

    def reference(self, context: NanoContext) -> None:
        rms_norm(context.rows(self.source), context.weights["weight"], self.eps, context.rows(self.target))

    def triton(self, context: NanoContext) -> None:
        """See `norm_triton`."""
        from nanoflow.ops import norm_triton

        norm_triton.norm(context.rows(self.source), context.weights["weight"], self.eps, context.rows(self.target))

    @property
    def kernels(self) -> Mapping[str, Kernel]:
        return {"reference": self.reference, "triton": self.triton}

    def preferred_kernel(self, device: torch.device, dtype: torch.dtype, sms: int | None = None) -> str:
        return triton_on_cuda(device, dtype)


class AddNorm(Operation):
    """``residual += branch; target = rms_norm(residual)``: one pass over the residual in place of two."""

    resource = "memory"

    def __init__(self, name: str, residual: str, branch: str, norm: Norm) -> None:
        super().__init__(name)
        self.residual = residual
        self.branch = branch
        self.norm = norm

    @property
    def accesses(self) -> tuple[Access, ...]:
        return (
            Access(self.residual),
            Access(self.branch),
            Access(self.residual, write=True),
            Access(self.norm.target, write=True),
        )

    @property
    def weights(self) -> tuple[Weight, ...]:
        return self.norm.weights

    def cost(self, work: Work, itemsize: int) -> Cost:
        elements = work.rows * self.norm.columns
        return Cost(flops=5.0 * elements, bytes=4.0 * elements * itemsize)

    def reference(self, context: NanoContext) -> None:
        residual_TE = context.rows(self.residual)
        residual_TE.add_(context.rows(self.branch))
        rms_norm(residual_TE, context.weights["weight"], self.norm.eps, context.rows(self.norm.target))

    def triton(self, context: NanoContext) -> None:
        """See `norm_triton`."""
        from nanoflow.ops import norm_triton

        norm_triton.add_norm(
            context.rows(self.residual),
            context.rows(self.branch),
            context.weights["weight"],
            self.norm.eps,
            context.rows(self.norm.target),
        )

    @property
    def kernels(self) -> Mapping[str, Kernel]:
        return {"reference": self.reference, "triton": self.triton}

    def preferred_kernel(self, device: torch.device, dtype: torch.dtype, sms: int | None = None) -> str:
        return triton_on_cuda(device, dtype)


class QKNorm(Operation):
    """RMS norm of every query head and every key head of ``qkv``, in place (Qwen3)."""

    resource = "memory"

    def __init__(
        self, name: str, qkv: str, heads: int, kv_heads: int, head_dim: int, eps: float, q_part: str, k_part: str
    ) -> None:
        super().__init__(name)
        self.qkv = qkv
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.eps = eps
        self.q_part = q_part
        self.k_part = k_part

    @property
    def accesses(self) -> tuple[Access, ...]:
        return (Access(self.qkv), Access(self.qkv, write=True))

    @property
    def weights(self) -> tuple[Weight, ...]:
        shape = (self.head_dim,)
        return (Weight("q", (f"{self.q_part}.weight",), shape), Weight("k", (f"{self.k_part}.weight",), shape))

    def cost(self, work: Work, itemsize: int) -> Cost:
        elements = work.rows * (self.heads + self.kv_heads) * self.head_dim
        return Cost(flops=4.0 * elements, bytes=2.0 * elements * itemsize)

    def reference(self, context: NanoContext) -> None:
        heads_THD = torch.unflatten(context.rows(self.qkv), -1, (self.heads + 2 * self.kv_heads, self.head_dim))
        q_THD = heads_THD[:, : self.heads]
        k_TKD = heads_THD[:, self.heads : self.heads + self.kv_heads]
        rms_norm(q_THD, context.weights["q"], self.eps, q_THD)
        rms_norm(k_TKD, context.weights["k"], self.eps, k_TKD)

    def triton(self, context: NanoContext) -> None:
        """See `rope_triton`."""
        from nanoflow.ops import rope_triton

        weights = context.weights
        sizes = (self.heads, self.kv_heads, self.head_dim)
        rope_triton.qk_norm(context.rows(self.qkv), weights["q"], weights["k"], self.eps, *sizes)

    @property
    def kernels(self) -> Mapping[str, Kernel]:
        return {"reference": self.reference, "triton": self.triton}

    def preferred_kernel(self, device: torch.device, dtype: torch.dtype, sms: int | None = None) -> str:
        return triton_on_cuda(device, dtype)
