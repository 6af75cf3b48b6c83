"""Element-wise operations: the residual sum and the gated activation.

Shape legend: T rows, E hidden columns, F columns of the feed-forward layer.
"""

from collections.abc import Mapping

import torch
from torch.nn import functional

from nanoflow.ops.operation import Access, Cost, Kernel, NanoContext, Operation, Work, triton_on_cuda

__all__ = ["Add", "SiluMul"]


class Add(Operation):
    """``residual += branch``."""

    resource = "memory"

    def __init__(self, name: str, residual: str, branch: str, columns: int) -> None:
        super().__init__(name)
        self.residual = residual
        self.branch = branch
        self.columns = columns

    @property
    def accesses(self) -> tuple[Access, ...]:
        return (Access(self.residual), Access(self.branch), Access(self.residual, write=True))

    def cost(self, work: Work, itemsize: int) -> Cost:
        elements = work.rows * self.columns
        return Cost(flops=1.0 * elements, bytes=3.0 * elements * itemsize)

    def reference(self, context: NanoContext) -> None:
        context.rows(self.residual).add_(context.rows(self.branch))

    def triton(self, context: NanoContext) -> None:
        """See `elementwise_triton`."""
        from nanoflow.ops import elementwise_triton

        elementwise_triton.add(context.rows(self.residual), context.rows(self.branch))

    @property
    def kernels(self) -> Mapping[str, Kernel]:
        return {"reference": self.reference, "triton": self.triton}

    def preferred_kernel(self, device: torch.device, dtype: torch.dtype, sms: int | None = None) -> str:
        return triton_on_cuda(device, dtype)


class SiluMul(Operation):
    """``target = silu(gate) * up`` where ``source = [gate | up]`` (SwiGLU, Shazeer 2020, arXiv 2002.05202)."""

    resource = "memory"

    def __init__(self, name: str, source: str, target: str, columns: int) -> None:
        """`columns` of the target; the source has twice as many."""
        super().__init__(name)
        self.source = source
        self.target = target
        self.columns = columns

    @property
    def accesses(self) -> tuple[Access, ...]:
        return (Access(self.source), Access(self.target, write=True))

    def cost(self, work: Work, itemsize: int) -> Cost:
        elements = work.rows * self.columns
        return Cost(flops=5.0 * elements, bytes=3.0 * elements * itemsize)

    def reference(self, context: NanoContext) -> None:
        source_T2F = context.rows(self.source)
        gate_TF, up_TF = source_T2F[:, : self.columns], source_T2F[:, self.columns :]
        torch.mul(functional.silu(gate_TF), up_TF, out=context.rows(self.target))

    def triton(self, context: NanoContext) -> None:
        """See `elementwise_triton`; the activation is not rounded before the product."""
        from nanoflow.ops import elementwise_triton

        elementwise_triton.silu_mul(context.rows(self.source), context.rows(self.target))

    @property
    def kernels(self) -> Mapping[str, Kernel]:
        return {"reference": self.reference, "triton": self.triton}

    def preferred_kernel(self, device: torch.device, dtype: torch.dtype, sms: int | None = None) -> str:
        return triton_on_cuda(device, dtype)
