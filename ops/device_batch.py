"""A dense batch on the device: the scheduler's numpy arrays as tensors, cut into the parts that nano-ops run on."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from nanoflow.ops.batch import DenseBatch, RowClass

__all__ = ["BatchPart", "DeviceBatch"]

Work = TypeVar("Work")


class DeviceBatch:
    """Tensors of one `DenseBatch` on `device`. Legend as in `nanoflow.ops.batch`."""

    def __init__(self, batch: DenseBatch, device: torch.device, page_size: int) -> None:
        def tensor(array: Any, dtype: torch.dtype) -> torch.Tensor:
            return torch.from_numpy(array).to(device=device, dtype=dtype)

        self.host = batch
        self.device = device
        self.page_size = page_size
        self.token_ids_T = tensor(batch.token_ids, torch.int64)
        self.positions_T = tensor(batch.positions, torch.int64)
        self.slots_T = tensor(batch.slots, torch.int64)
        self.kv_index_T = tensor(batch.kv_index, torch.int64)
        count = len(batch.nano_batches)
        self.parts = tuple(BatchPart(self, n, n + 1) for n in range(count))
        self.whole = BatchPart(self, 0, count) if count != 1 else self.parts[0]

    def part(self, nano_batch: int | None) -> "BatchPart":
        """The part of nano-batch `nano_batch`, or the whole batch for None."""
        return self.whole if nano_batch is None else self.parts[nano_batch]


class BatchPart:
    """Nano-batches ``first .. last - 1`` of a dense batch: what one nano-op works on."""

    def __init__(self, batch: DeviceBatch, first: int, last: int) -> None:
        host = batch.host
        nano_batches = host.nano_batches[first:last]
        self.batch = batch
        self.rows = slice(nano_batches[0].start, nano_batches[-1].end) if nano_batches else slice(0, 0)
        """Rows of the dense batch, padding included."""
        self.decode = slice(int(host.decode_splits[first]), int(host.decode_splits[last]))
        """Decode segments: a slice of the batch's decode arrays."""
        self.prefill = slice(int(host.prefill_splits[first]), int(host.prefill_splits[last]))
        """Prefill segments: a slice of the batch's prefill arrays."""
        self._cache: dict[Any, Any] = {}

    def has_rows(self, rows: RowClass) -> bool:
        """Whether an operation on this class of rows has anything to do here (padding counts as ALL)."""
        span = {RowClass.ALL: self.rows, RowClass.DECODE: self.decode, RowClass.PREFILL: self.prefill}[rows]
        return span.stop > span.start

    def cached(self, key: Any, make: Callable[[], Work]) -> Work:
        """Work that is the same in every layer (masks, gathered page lists): made once an iteration, kept under
        `key`."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]  # type: ignore[no-any-return]
