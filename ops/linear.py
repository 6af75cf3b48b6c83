"""Linear layers: ``target = source @ weight.T + bias``.

On a CPU in float32 the weight is reordered once into oneDNN's blocked layout; products with it are faster than with the
plain layout from one row to thousands.

Shape legend: T rows, I input columns, O output columns.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch.nn import functional

from nanoflow.ops.gemm import GEMM_KERNELS, GemmKernel, matmul
from nanoflow.ops.gemm_choice import stored_choices
from nanoflow.ops.operation import Access, Cost, Kernel, NanoContext, Operation, Weight, Work

__all__ = ["Linear", "Shard"]

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
        weight = context.weights["weight"]
        bias = context.weights.get("bias")
        source_TI = context.rows(self.source)
        target_TO = context.rows(self.target)
        if not source_TI.shape[0]:
            return
        if weight.is_mkldnn:
            target_TO.copy_(torch.ops.mkldnn._linear_pointwise(source_TI, weight, bias, "none", [], ""))
        elif bias is None:
            torch.mm(source_TI, weight.t(), out=target_TO)
        else:
            torch.addmm(bias, source_TI, weight.t(), out=target_TO)

    def gemm(self, context: NanoContext, kernel: GemmKernel) -> None:
        """On a GPU; see `nanoflow.ops.gemm.matmul`."""
        matmul(
            context.rows(self.source),
            context.weights["weight"],
            context.rows(self.target),
            bias=context.weights.get("bias"),
            kernel=kernel,
        )

    @property
    def kernels(self) -> Mapping[str, Kernel]:
        kernels: dict[str, Kernel] = {"reference": self.reference, "onednn": self.onednn}
        measured: GemmKernel = "measured"
        return kernels | {name: partial(self.gemm, kernel=name) for name in (measured, *GEMM_KERNELS)}

    def preferred_kernel(self, device: torch.device, dtype: torch.dtype) -> str:
        """On a GPU "measured" (the fastest for the rows at hand) if this shape was measured there, else "cublas"."""
        if device.type != "cuda":
            return "onednn" if device.type == "cpu" else "reference"
        return "measured" if stored_choices(device).knows(sum(self.outputs), self.inputs, dtype) else "cublas"

    def pack(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        if name != "weight" or weight.device.type != "cpu" or weight.dtype != torch.float32:
            return weight
        if not (torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")):
            return weight
        return torch.ops.mkldnn._reorder_linear_weight(weight, PACKING_ROWS)  # type: ignore[no-any-return]
