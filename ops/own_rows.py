"""An operation on the rows that are this rank's, where the ranks have divided the rows of a value among them."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import cast

import torch

from nanoflow.ops.device_batch import BatchPart, RowsOnly
from nanoflow.ops.operation import Access, Cost, Kernel, NanoContext, Operation, Weight, Work
from nanoflow.ops.row_shares import row_share, share_rows

__all__ = ["OwnRows"]


class OwnRows(Operation):
    """`op` on the rank's share of each nano-batch's rows; the other rows of what it writes are left as they are.

    It has the name, the weights and the kernels of `op`, which must work on each row alone and look at nothing of a
    nano-batch but its rows. Accesses are those of `op`, on whole nano-batches: more than it touches.
    """

    resource = "memory"

    def __init__(self, op: Operation, rank: int, ranks: int) -> None:
        super().__init__(op.name)
        if op.resource != self.resource:
            raise ValueError(f"{op.name} is bound by {op.resource}, not by {self.resource}")
        self.op = op
        self.rank = rank
        self.ranks = ranks

    @property
    def accesses(self) -> tuple[Access, ...]:
        return self.op.accesses

    @property
    def weights(self) -> tuple[Weight, ...]:
        return self.op.weights

    def share(self, work: Work) -> Work:
        """What is left of `work`, of one nano-batch, for the rank that has most rows."""
        return Work(prefill_rows=share_rows(work.rows, self.ranks))

    def cost(self, work: Work, itemsize: int) -> Cost:
        """That of the rank that has most rows."""
        return self.op.cost(self.share(work), itemsize)

    def reference(self, context: NanoContext) -> None:
        self._on_own(self.op.reference, context)

    @property
    def kernels(self) -> Mapping[str, Kernel]:
        return {name: partial(self._on_own, kernel) for name, kernel in self.op.kernels.items()}

    @property
    def cpu_kernels(self) -> tuple[str, ...]:
        return self.op.cpu_kernels

    def preferred_kernel(self, device: torch.device, dtype: torch.dtype, sms: int | None = None) -> str:
        return self.op.preferred_kernel(device, dtype, sms)

    def _on_own(self, kernel: Kernel, context: NanoContext) -> None:
        for rows in context.part.nano_batch_rows:
            own = row_share(rows, self.rank, self.ranks)
            if own.stop > own.start:
                kernel(replace(context, part=cast(BatchPart, RowsOnly(own))))
