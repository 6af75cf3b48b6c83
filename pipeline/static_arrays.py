"""Host-made arrays at fixed places on the device, filled for each iteration by one copy.

A captured graph reads its arrays where they were at its capture. So every array that a kernel asks for gets a region of
one device buffer, large enough for any batch; pinned copies of that buffer on the host are filled in turn, each not
before its last copy to the device is over.

    find     run the largest batch: every array asked for is noted, with its size and the function that makes it
    lay out  allocate the device buffer and the pinned ring
    bind     capture a smaller batch: note which shapes it has room for
    fill     for each iteration: make all arrays from the batch, in pinned memory
    send     copy them, once
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nanoflow.ops.device_arrays import DeviceArrays, MakeArray, to_device
from nanoflow.ops.device_batch import BatchPart, DeviceBatch

__all__ = ["StaticArrays"]

ALIGNMENT = 256
RING = 3
"""Pinned copies: two iterations may be launched and not collected, and one is being formed."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Region:
    nano_batch: int | None
    make: MakeArray
    shape: Shape
    dtype: np.dtype[Any]
    offset: int


class StaticArrays(DeviceArrays):
    """The arrays of an executor's graphs. Ask for all of them once (a run of the largest batch), then `lay_out`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._regions: dict[Hashable, _Region] = {}
        self._buffer: torch.Tensor | None = None
        self._ring: list[torch.Tensor] = []
        self._staged: list[dict[Hashable, NDArray[Any]]] = []
        self._copied: list[torch.cuda.Event | None] = []
        self._turn = 0
        self._room: dict[Hashable, Shape] = {}

    def from_host(self, key: Hashable, part: BatchPart, make: MakeArray, most: Shape) -> torch.Tensor:
        """A view of the array's region, of shape `most`; before `lay_out`, a copy of its own."""
        name = (part.number, key)
        self._room[name] = most
        if self._buffer is None:
            array = make(part)
            known = self._regions.get(name)
            # Programs that cut their batches differently ask for the same array in different sizes.
            shape = most if known is None else tuple(map(max, known.shape, most))
            self._regions[name] = _Region(part.number, make, shape, array.dtype, 0)
            room = np.zeros(most, array.dtype)
            room[tuple(slice(size) for size in array.shape)] = array
            return to_device(room, self.device)
        region = self._regions[name]
        if any(wanted > there for wanted, there in zip(most, region.shape, strict=True)):
            raise ValueError(f"{key}: shape {most} was asked for, and the largest batch had {region.shape}")
        whole = self._view(self._buffer, region)
        return whole[tuple(slice(size) for size in most)]

    def lay_out(self) -> None:
        """Allocate the regions of all arrays that were asked for. Raises torch.OutOfMemoryError."""
        on_gpu = self.device.type == "cuda"
        total = 0
        for name, region in self._regions.items():
            self._regions[name] = replace(region, offset=total)
            total += -(-prod(region.shape) * region.dtype.itemsize // ALIGNMENT) * ALIGNMENT
        self._buffer = torch.zeros(total, dtype=torch.uint8, device=self.device)
        self._ring = [torch.zeros(total, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(RING)]
        self._staged = [
            {name: self._view(staged, region).numpy() for name, region in self._regions.items()}
            for staged in self._ring
        ]
        self._copied = [None] * RING

    def take_room(self) -> Mapping[Hashable, Shape]:
        """The shapes that were asked for since the last call: what the arrays of one capture have room for."""
        room, self._room = self._room, {}
        return room

    def fill(self, batch: DeviceBatch, room: Mapping[Hashable, Shape]) -> bool:
        """Make all arrays of a batch, in the pinned copy whose turn it is; `send` has them copied.

        Args:
            batch: its host side is all that is used; it has the rows of the capture.
            room: of the capture that reads them.

        Returns:
            False if an array does not fit its room; there is nothing to send then.
        """
        arrays: dict[Hashable, NDArray[Any]] = {}
        for name, shape in room.items():
            region = self._regions[name]
            array = arrays[name] = region.make(batch.part(region.nano_batch))
            if any(size > most for size, most in zip(array.shape, shape, strict=True)):
                return False
        if (copied := self._copied[self._turn]) is not None:
            copied.synchronize()
        staged = self._staged[self._turn]
        for name, array in arrays.items():
            staged[name][tuple(slice(size) for size in array.shape)] = array
        return True

    def send(self) -> None:
        """Start the copy of what was filled in last, on the current stream."""
        turn = self._turn
        self._turn = (turn + 1) % RING
        assert self._buffer is not None
        self._buffer.copy_(self._ring[turn], non_blocking=True)
        if self.device.type == "cuda":
            event = self._copied[turn] or torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._copied[turn] = event

    def _view(self, buffer: torch.Tensor, region: _Region) -> torch.Tensor:
        dtype = torch.from_numpy(np.empty(0, region.dtype)).dtype
        size = prod(region.shape) * region.dtype.itemsize
        return buffer[region.offset : region.offset + size].view(dtype).view(region.shape)
