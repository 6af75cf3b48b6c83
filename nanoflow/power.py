"""Energy that the run's device uses, from NVML: a GPU alone; a CPU has no counter that every machine lets one read."""

import ctypes
import time
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Energy", "EnergyMeter"]


@dataclass(frozen=True)
class Energy:
    """Energy of the whole card over a run, whoever else used it."""

    joules: float
    seconds: float
    """Over which it was measured."""
    mean_watts: float
    power_limit_watts: float | None
    """What the card is held to."""
    joules_per_token: float | None = None
    """Over prompt and output tokens."""


class EnergyMeter:
    """Reads the energy counter of a run's device.

    The counter moves only every some tens of milliseconds: over a second it is right within a few per cent.
    """

    def __init__(self, device: torch.device) -> None:
        self._nvml = _open_nvml(device) if device.type == "cuda" else None
        self._began = time.perf_counter()
        self._first = self.joules()

    def joules(self) -> float | None:
        """Energy that the device has used since its driver was loaded; None if NVML does not tell."""
        if self._nvml is None:
            return None
        library, handle = self._nvml
        millijoules = ctypes.c_ulonglong()
        if library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)) != 0:
            return None
        return millijoules.value / 1e3

    def power_limit_watts(self) -> float | None:
        """The device's power limit in force; None if NVML does not tell."""
        if self._nvml is None:
            return None
        library, handle = self._nvml
        milliwatts = ctypes.c_uint()
        if library.nvmlDeviceGetEnforcedPowerLimit(handle, ctypes.byref(milliwatts)) != 0:
            return None
        return milliwatts.value / 1e3

    def since_start(self) -> Energy | None:
        """What was used since this meter was made; None if NVML does not tell."""
        last, seconds = self.joules(), time.perf_counter() - self._began
        if last is None or self._first is None or not seconds:
            return None
        joules = last - self._first
        return Energy(joules, seconds, joules / seconds, self.power_limit_watts())


def _open_nvml(device: torch.device) -> tuple[Any, Any] | None:
    """NVML's library and its handle of `device`; None without them."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    if library.nvmlInit_v2() != 0:
        return None
    handle = ctypes.c_void_p()
    index = torch.cuda.current_device() if device.index is None else device.index
    # NVML numbers all cards of the host, torch only those that it may see: the UUID is what both agree on.
    uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}".encode()
    if library.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle)) != 0:
        return None
    return library, handle
