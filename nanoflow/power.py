"""Energy that the run's devices use, from NVML: GPUs alone; a CPU has no counter that every machine lets one read."""

import ctypes
import time
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Energy", "EnergyMeter"]


@dataclass(frozen=True)
class Energy:
    """Energy of the whole cards over a run, whoever else used them."""

    joules: float
    seconds: float
    """Over which it was measured."""
    mean_watts: float
    power_limit_watts: float | None
    """What the cards are held to, all together."""
    joules_per_token: float | None = None
    """Over prompt and output tokens."""


class EnergyMeter:
    """Reads the energy counters of a run's devices.

    A counter moves only every some tens of milliseconds: over a second it is right within a few per cent.

    Args:
        device: the first.
        count: devices, those that follow it.
    """

    def __init__(self, device: torch.device, count: int = 1) -> None:
        self._cards: list[tuple[Any, Any]] = []
        if device.type == "cuda":
            first = torch.cuda.current_device() if device.index is None else device.index
            opened = [_open_nvml(index) for index in range(first, first + count)]
            found = [card for card in opened if card is not None]
            self._cards = found if len(found) == count else []  # part of the energy would be taken for all
        self._began = time.perf_counter()
        self._first = self.joules()

    def joules(self) -> float | None:
        """Energy that the devices have used since their driver was loaded; None if NVML does not tell."""
        return self._sum(ctypes.c_ulonglong, "nvmlDeviceGetTotalEnergyConsumption")

    def power_limit_watts(self) -> float | None:
        """The sum of the devices' power limits in force; None if NVML does not tell."""
        return self._sum(ctypes.c_uint, "nvmlDeviceGetEnforcedPowerLimit")

    def since_start(self) -> Energy | None:
        """What was used since this meter was made; None if NVML does not tell."""
        last, seconds = self.joules(), time.perf_counter() - self._began
        if last is None or self._first is None or not seconds:
            return None
        joules = last - self._first
        return Energy(joules, seconds, joules / seconds, self.power_limit_watts())

    def _sum(self, kind: Any, function: str) -> float | None:
        """What an NVML function tells of each device, in thousandths, summed; None unless it does of all."""
        total = 0
        for library, handle in self._cards:
            thousandths = kind()
            if getattr(library, function)(handle, ctypes.byref(thousandths)) != 0:
                return None
            total += thousandths.value
        return total / 1e3 if self._cards else None


def _open_nvml(index: int) -> tuple[Any, Any] | None:
    """NVML's library and its handle of GPU `index`; None without them."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    if library.nvmlInit_v2() != 0:
        return None
    handle = ctypes.c_void_p()
    # NVML numbers all cards of the host, torch only those that it may see: the UUID is what both agree on.
    uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}".encode()
    if library.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle)) != 0:
        return None
    return library, handle
