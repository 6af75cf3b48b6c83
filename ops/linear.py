"""Linear layers: ``target = source @ weight.T + bias``, and one with SiLU and a product behind it.

On a CPU in float32 the weight is reordered once into oneDNN's blocked layout; products with it are faster than with the
plain layout from one row to thousands.

Shape legend: T rows, I input columns, O output columns, F columns of the feed-forward layer.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch.nn import functional

from nanoflow.ops.elementwise import SiluMul
from nanoflow.ops.gemm import GEMM_KERNELS, GemmKernel, matmul
from nanoflow.ops.gemm_choice import stored_choices
from nanoflow.ops.operation import Access, Cost, Kernel, NanoContext, Operation, Weight, Work

__all__ = ["Linear", "LinearSilu", "Shard"]

Shard = Literal["columns", "rows"]
"""How tensor parallelism splits a linear: by output columns, or by input rows (the outputs are then summed)."""

PACKING_ROWS = 64
"""Rows that oneDNN's layout is chosen for; measured, the layout serves 1 to 2,048 rows alike."""


class Linear(Operation):
    """One GEMM whose weight is the checkpoint's `parts` stacked along the output dimension."""

    resource = "compute"

    def __init__(
        self,
        name: str,
        source: str,
        target: str,
        inputs: int,
        outputs: Sequence[int],
        parts: Sequence[str],
        *,
        bias: bool = False,
        shard: Shard | None = None,
    ) -> None:
        """`parts` names the checkpoint's modules (without ``.weight``) and `outputs` the output columns of each."""
        super().__init__(name)
        self.source = source
        self.target = target
        self.inputs = inputs
        self.outputs = tuple(outputs)
        self.shard = shard
        total = sum(self.outputs)
        weights = [Weight("weight", tuple(f"{part}.weight" for part in parts), (total, inputs))]
        if bias:
            weights.append(Weight("bias", tuple(f"{part}.bias" for part in parts), (total,)))
        self._weights = tuple(weights)

    @property
    def accesses(self) -> tuple[Access, ...]:
        return (Access(self.source), Access(self.target, write=True))

    @property
    def weights(self) -> tuple[Weight, ...]:
        return self._weights

    def cost(self, work: Work, itemsize: int) -> Cost:
        if not work.rows:
            return Cost()
        total = sum(self.outputs)
        elements = self.inputs * total + work.rows * (self.inputs + total)
        return Cost(flops=2.0 * work.rows * self.inputs * total, bytes=float(elements * itemsize))

    def reference(self, context: NanoContext) -> None:
        weight = context.weights["weight"]
        if weight.is_mkldnn:
            weight = weight.to_dense()
        source_TI = context.rows(self.source)
        context.rows(self.target).copy_(functional.linear(source_TI, weight, context.weights.get("bias")))

    def onednn(self, context: NanoContext) -> None:
        """With the weight that `pack` made; on an unpacked weight, torch's own linear."""
        target_TO = context.rows(self.target)
        product_TO = self.library_product(context)
        if product_TO is not target_TO:
            target_TO.copy_(product_TO)

    def library_product(self, context: NanoContext) -> torch.Tensor:
        """The product on a CPU, [T, O]: with a packed weight a new tensor, else the target's rows, written."""
        weight = context.weights["weight"]
        bias = context.weights.get("bias")
        source_TI = context.rows(self.source)
        target_TO = context.rows(self.target)
        if not source_TI.shape[0]:
            return target_TO
        if weight.is_mkldnn:
            return torch.ops.mkldnn._linear_pointwise(source_TI, weight, bias, "none", [], "")  # type: ignore[no-any-return]
        if bias is None:
            torch.mm(source_TI, weight.t(), out=target_TO)
        else:
            torch.addmm(bias, source_TI, weight.t(), out=target_TO)
        return target_TO

    def gemm(self, context: NanoContext, kernel: GemmKernel) -> None:
        """On a GPU; see `nanoflow.ops.gemm.matmul`."""
        matmul(
            context.rows(self.source),
            context.weights["weight"],
            context.rows(self.target),
            bias=context.weights.get("bias"),
            sms=context.sms,
            kernel=kernel,
            scratch=context.scratch,
        )

    @property
    def kernels(self) -> Mapping[str, Kernel]:
        kernels: dict[str, Kernel] = {"reference": self.reference, "onednn": self.onednn}
        return kernels | {name: partial(self.gemm, kernel=name) for name in ("measured", *GEMM_KERNELS)}

    @property
    def cpu_kernels(self) -> tuple[str, ...]:
        return ("reference", "onednn")

    def preferred_kernel(
        self, device: torch.device, dtype: torch.dtype, sms: int | None = None, *, silu: bool = False
    ) -> str:
        """On a GPU "measured" (the fastest for the rows at hand) if this shape was measured there, else "cublas".

        On a part of the SMs always "measured": cuBLAS launches for all of them. `silu` asks for the product with SiLU
        behind it, which is measured apart."""
        if device.type != "cuda":
            return "onednn" if device.type == "cpu" else "reference"
        if sms is not None:
            return "measured"
        known = stored_choices(device).knows(sum(self.outputs), self.inputs, dtype, silu=silu)
        return "measured" if known else "cublas"

    def pack(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        if name != "weight" or weight.device.type != "cpu" or weight.dtype != torch.float32:
            return weight
        if not (torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")):
            return weight
        return torch.ops.mkldnn._reorder_linear_weight(weight, PACKING_ROWS)  # type: ignore[no-any-return]


class LinearSilu(Operation):
    """``target = silu(gate) * up`` where ``[gate | up] = source @ weight.T + bias``: `Linear` and `SiluMul` in one.

    The linear's own value is the buffer between the two. Kernels that activate before they store leave it alone; it is
    declared as written, since the others write it, and nothing else may read it.
    """

    resource = "compute"

    def __init__(self, linear: Linear, silu_mul: SiluMul) -> None:
        """Takes the linear's name."""
        super().__init__(linear.name)
        self.linear = linear
        self.silu_mul = silu_mul

    @property
    def accesses(self) -> tuple[Access, ...]:
        return (
            Access(self.linear.source),
            Access(self.linear.target, write=True),
            Access(self.silu_mul.target, write=True),
        )

    @property
    def weights(self) -> tuple[Weight, ...]:
        return self.linear.weights

    def cost(self, work: Work, itemsize: int) -> Cost:
        """Of a kernel that activates before it stores: nothing of the value between is moved."""
        if not work.rows:
            return Cost()
        linear, columns = self.linear, self.silu_mul.columns
        elements = linear.inputs * 2 * columns + work.rows * (linear.inputs + columns)
        flops = linear.cost(work, itemsize).flops + self.silu_mul.cost(work, itemsize).flops
        return Cost(flops, bytes=float(elements * itemsize))

    def reference(self, context: NanoContext) -> None:
        self.linear.reference(context)
        self.silu_mul.reference(context)

    def onednn(self, context: NanoContext) -> None:
        """See `Linear.onednn`; the product is activated where it lies."""
        if not context.rows(self.linear.source).shape[0]:
            return
        gate_TF, up_TF = self.linear.library_product(context).chunk(2, dim=-1)
        torch.mul(functional.silu(gate_TF, inplace=True), up_TF, out=context.rows(self.silu_mul.target))

    def gemm(self, context: NanoContext, kernel: GemmKernel) -> None:
        """On a GPU; see `nanoflow.ops.gemm.matmul`."""
        matmul(
            context.rows(self.linear.source),
            context.weights["weight"],
            context.rows(self.silu_mul.target),
            bias=context.weights.get("bias"),
            silu=True,
            sms=context.sms,
            kernel=kernel,
            scratch=context.scratch,
            intermediate=context.rows(self.linear.target),
        )

    @property
    def kernels(self) -> Mapping[str, Kernel]:
        kernels: dict[str, Kernel] = {"reference": self.reference, "onednn": self.onednn}
        return kernels | {name: partial(self.gemm, kernel=name) for name in ("measured", *GEMM_KERNELS)}

    @property
    def cpu_kernels(self) -> tuple[str, ...]:
        return self.linear.cpu_kernels

    def preferred_kernel(self, device: torch.device, dtype: torch.dtype, sms: int | None = None) -> str:
        """As the linear's, measured with SiLU."""
        return self.linear.preferred_kernel(device, dtype, sms, silu=True)

    def pack(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        return self.linear.pack(name, weight)
