"""Token embedding: the operation that fills the residual before the first layer."""

from collections.abc import Mapping

import torch

from nanoflow.ops.operation import Access, Cost, Kernel, NanoContext, Operation, Weight, Work, triton_on_cuda

__all__ = ["Embedding"]


class Embedding(Operation):
    """``target = weight[token]``. The executor replaces `TOKEN_ON_DEVICE` in the batch's token ids first."""

    resource = "memory"

    def __init__(self, name: str, target: str, vocab_size: int, columns: int, part: str) -> None:
        """`part` is the table's module in the checkpoint, without ``.weight``."""
        super().__init__(name)
        self.target = target
        self.vocab_size = vocab_size
        self.columns = columns
        self.part = part

    @property
    def accesses(self) -> tuple[Access, ...]:
        return (Access(self.target, write=True),)

    @property
    def weights(self) -> tuple[Weight, ...]:
        return (Weight("weight", (f"{self.part}.weight",), (self.vocab_size, self.columns)),)

    def cost(self, work: Work, itemsize: int) -> Cost:
        return Cost(bytes=2.0 * work.rows * self.columns * itemsize)

    def reference(self, context: NanoContext) -> None:
        token_ids_T = context.batch.token_ids_T[context.part.rows]
        torch.index_select(context.weights["weight"], 0, token_ids_T, out=context.rows(self.target))

    def triton(self, context: NanoContext) -> None:
        """See `elementwise_triton`."""
        from nanoflow.ops import elementwise_triton

        token_ids_T = context.batch.token_ids_T[context.part.rows]
        elementwise_triton.gather_rows(context.weights["weight"], token_ids_T, context.rows(self.target))

    @property
    def kernels(self) -> Mapping[str, Kernel]:
        return {"reference": self.reference, "triton": self.triton}

    def preferred_kernel(self, device: torch.device, dtype: torch.dtype, sms: int | None = None) -> str:
        return triton_on_cuda(device, dtype)
