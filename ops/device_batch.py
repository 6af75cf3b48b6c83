"""A dense batch on the device: the scheduler's numpy arrays as tensors, cut into the parts that nano-ops run on."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from nanoflow.ops.batch import DenseBatch, RowClass
from nanoflow.ops.device_arrays import DeviceArrays, MakeArray

__all__ = ["BatchPart", "DeviceBatch", "RowsOnly"]

Work = TypeVar("Work")


class DeviceBatch:
    """Tensors of one `DenseBatch` on `device`, each made when it is first asked for; its rows' arrays are int64 [T].

    Args:
        arrays: of the executor; by default every array is copied on its own, and nothing outlives the batch.
        pages_per_sequence: most pages that a request can have; by default as many as this batch's tables have.
    """

    def __init__(
        self,
        batch: DenseBatch,
        device: torch.device,
        page_size: int,
        arrays: DeviceArrays | None = None,
        pages_per_sequence: int | None = None,
    ) -> None:
        self.host = batch
        self.device = device
        self.page_size = page_size
        self.pages_per_sequence = pages_per_sequence or batch.prefill_pages.shape[1]
        self.arrays = arrays or DeviceArrays(device)
        count = len(batch.nano_batches)
        self.parts = tuple(BatchPart(self, n, n + 1) for n in range(count))
        self.whole = BatchPart(self, 0, count) if count != 1 else self.parts[0]

    @cached_property
    def token_ids_T(self) -> torch.Tensor:
        """Input tokens; an executor puts the tokens that only the device knows in their places."""
        return self._rows("token_ids")

    @cached_property
    def positions_T(self) -> torch.Tensor:
        return self._rows("positions")

    @cached_property
    def slots_T(self) -> torch.Tensor:
        return self._rows("slots")

    @cached_property
    def kv_index_T(self) -> torch.Tensor:
        return self._rows("kv_index")

    @cached_property
    def sampled_rows_S(self) -> torch.Tensor:
        """Rows to sample; a static tensor goes on beyond them."""
        return self._sampled("rows")

    @cached_property
    def sampled_slots_S(self) -> torch.Tensor:
        """Slots that receive the tokens; a static tensor goes on beyond them."""
        return self._sampled("slots")

    def part(self, nano_batch: int | None) -> "BatchPart":
        """The part of nano-batch `nano_batch`, or the whole batch for None."""
        return self.whole if nano_batch is None else self.parts[nano_batch]

    def _rows(self, name: str) -> torch.Tensor:
        """[T] int64, the batch's array `name`."""
        return self.whole.from_host(
            name, lambda part: getattr(part.batch.host, name).astype(np.int64, copy=False), (self.host.rows,)
        )

    def _sampled(self, name: str) -> torch.Tensor:
        """[S] int64, the array `name` of what is sampled."""

        def make(part: BatchPart) -> NDArray[np.int64]:
            sampling = part.batch.host.sampling
            return np.zeros(0, np.int64) if sampling is None else getattr(sampling, name).astype(np.int64)

        return self.whole.from_host(f"sampled_{name}", make, (self.host.rows,))


class BatchPart:
    """Nano-batches ``first .. last - 1`` of a dense batch: what one nano-op works on."""

    def __init__(self, batch: DeviceBatch, first: int, last: int) -> None:
        host = batch.host
        nano_batches = host.nano_batches[first:last]
        self.batch = batch
        self.number = first if last == first + 1 else None
        """Of the nano-batch, if it is one."""
        self.rows = slice(nano_batches[0].start, nano_batches[-1].end) if nano_batches else slice(0, 0)
        """Rows of the dense batch, padding included."""
        self.nano_batch_rows = tuple(slice(each.start, each.end) for each in nano_batches if each.end > each.start)
        """The same of each nano-batch that has any."""
        self.decode = slice(int(host.decode_splits[first]), int(host.decode_splits[last]))
        """Decode segments: a slice of the batch's decode arrays."""
        self.prefill = slice(int(host.prefill_splits[first]), int(host.prefill_splits[last]))
        """Prefill segments: a slice of the batch's prefill arrays."""
        self._cache: dict[Any, Any] = {}

    def has_rows(self, rows: RowClass) -> bool:
        """Whether an operation on this class of rows has anything to do here (padding counts as ALL)."""
        span = {RowClass.ALL: self.rows, RowClass.DECODE: self.decode, RowClass.PREFILL: self.prefill}[rows]
        return span.stop > span.start

    def cached(self, key: Hashable, make: Callable[[], Work]) -> Work:
        """What is the same in every layer (masks, cosines): made once an iteration, kept under `key`."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]  # type: ignore[no-any-return]

    def from_host(self, key: Hashable, make: MakeArray, most: tuple[int, ...]) -> torch.Tensor:
        """An array that the host makes, on the device: made once an iteration.

        The tensor may be larger than the array, and what lies beyond the array is then left from earlier iterations:
        the kernel has to know from the array itself how far it goes.

        Args:
            make: makes it from the host's side of a part (of this batch, or of a later one with as many rows); it uses
                nothing else of a batch.
            most: the largest shape that it can have in a batch with as many rows.
        """
        return self.cached(("from_host", key), lambda: self.batch.arrays.from_host(key, self, make, most))

    def kept(self, key: Hashable, make: Callable[[], Work]) -> Work:
        """What outlives the iteration (a workspace), one for each nano-batch."""
        return self.batch.arrays.kept((self.number, key), make)


@dataclass(frozen=True)
class RowsOnly:
    """What stands for a `BatchPart` where an operation only looks at rows."""

    rows: slice
