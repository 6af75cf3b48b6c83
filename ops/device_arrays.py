"""Arrays on the device beside the buffers of a plan: what the host makes for each iteration, and what kernels keep.

A kernel asks for a host-made array through `BatchPart.from_host` and says how to make it from any batch. So the same
kernel serves an executor that copies every array as it is asked for (`DeviceArrays`) and one whose graphs read them at
fixed places (`nanoflow.pipeline.static_arrays`).
"""

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from nanoflow.ops.device_batch import BatchPart

__all__ = ["DeviceArrays", "MakeArray", "to_device"]

MakeArray = Callable[["BatchPart"], NDArray[Any]]
"""Makes an array from the host's side of a part of a batch."""

Kept = TypeVar("Kept")


def to_device(array: NDArray[Any], device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`array` on `device`. A copy to a GPU goes through pinned memory and waits for nothing."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if dtype is not None:
        tensor = tensor.to(dtype)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class DeviceArrays:
    """Arrays of one executor on `device`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._kept: dict[Hashable, Any] = {}

    def from_host(self, key: Hashable, part: "BatchPart", make: MakeArray, most: tuple[int, ...]) -> torch.Tensor:
        """What `make` gives for `part`, on the device; at most of shape `most`."""
        return to_device(make(part), self.device)

    def kept(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        """What `make` gave when it was first asked for under `key`."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]  # type: ignore[no-any-return]
