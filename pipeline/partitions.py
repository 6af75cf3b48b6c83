"""Disjoint groups of a GPU's SMs, each with a stream of its own: green contexts of the CUDA driver.

A kernel that is launched on the stream of a part runs on that part's SMs and no others, alone or in a captured graph,
whatever its grid. All parts come from one split of the device: contexts that were made apart can share SMs.

The driver hands out SMs in groups (of 8 on Hopper); what is in no group can go to one part. How many groups there are
depends on the SMs that each cluster of a card has: of an H100's 132 SMs, 15 groups were made, with 12 SMs over.
Memory bandwidth, the second-level cache and the copy engines stay shared.
"""

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

__all__ = ["Partition", "PartitionError", "allot", "unavailable"]

GRANULE = {8: 4, 9: 8, 10: 8, 12: 8}
"""SMs that are handed out together, by the major compute capability (CUDA driver API, green contexts)."""


class PartitionError(RuntimeError):
    """The device cannot be split as asked. The message names the sizes that it can be split into."""


def unavailable(device: torch.device) -> str | None:
    """Why SMs of `device` cannot be set apart, or None."""
    if device.type != "cuda":
        return "it takes an NVIDIA GPU"
    if torch.version.hip is not None:
        return "it takes an NVIDIA GPU"
    driver = _driver()
    if driver is None:
        return "cuda-bindings is not installed: pip install cuda-bindings"
    version = _check(driver, driver.cuDriverGetVersion())
    if version < 12040:
        return f"the driver supports CUDA {version // 1000}.{version % 1000 // 10}, and green contexts need 12.4"
    if torch.cuda.get_device_capability(device)[0] not in GRANULE:
        return f"{torch.cuda.get_device_name(device)} is too old for green contexts"
    return None


def allot(parts: Sequence[int], groups: int, over: int, granule: int) -> list[tuple[int, bool]]:
    """For each part of `parts` SMs, how many whole groups it gets, and whether it gets what is left over besides.

    Args:
        parts: SMs of each.
        groups: groups of `granule` SMs that the device has.
        over: SMs that are in no group. They may be more than a group has: those of an SM cluster stay together.
        granule: SMs of a group.

    Raises PartitionError if they cannot be dealt out so.
    """
    total = groups * granule + over
    sizes = f"{groups} groups of {granule}" + (f", and one part can have {over} more" if over else "")
    if not parts or min(parts) < granule or sum(parts) > total:
        raise PartitionError(f"{total} SMs cannot be split into {_sum(parts)}; this device gives {sizes}")
    takers = [index for index, sms in enumerate(parts) if sms % granule]
    if not takers and over and over % granule == 0 and sum(parts) > groups * granule:
        takers = [parts.index(max(parts))]
    whole = [sms - over * (index in takers) for index, sms in enumerate(parts)]
    if len(takers) > 1 or any(sms < 0 or sms % granule for sms in whole) or sum(whole) > groups * granule:
        raise PartitionError(f"{total} SMs cannot be split into {_sum(parts)}: this device gives {sizes}")
    return [(sms // granule, index in takers) for index, sms in enumerate(whole)]


class Partition:
    """The SMs of `device` in disjoint parts of `sms`, with one stream each; they may be fewer than the device has.

    Attributes:
        sms: SMs of each part, as the driver reports them.
        streams: one for each part.
        contexts: the driver's context of each part (`CUcontext`).

    Raises:
        PartitionError: the device cannot be split so, or not at all (see `unavailable`).
    """

    def __init__(self, sms: Sequence[int], device: torch.device) -> None:
        reason = unavailable(device)
        if reason:
            raise PartitionError(f"the SMs of {device} cannot be split: {reason}")
        driver = _driver()
        assert driver is not None
        self._driver = driver
        self._green: list[Any] = []
        self._raw_streams: list[Any] = []
        self.streams: tuple[torch.cuda.Stream, ...] = ()
        self.contexts: tuple[Any, ...] = ()
        torch.cuda.synchronize(device)  # green contexts are made beside the primary one, which must be there
        index = torch.cuda.current_device() if device.index is None else device.index
        try:
            self._split(tuple(sms), index)
        except BaseException:
            self.close()
            raise
        self.streams = tuple(
            torch.cuda.ExternalStream(int(stream), device=torch.device("cuda", index))  # type: ignore[no-untyped-call]
            for stream in self._raw_streams
        )

    def _split(self, sms: tuple[int, ...], index: int) -> None:
        driver = self._driver
        kind = driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
        handle = _check(driver, driver.cuDeviceGet(index))
        whole = _check(driver, driver.cuDeviceGetDevResource(handle, kind))
        total = int(whole.sm.smCount)
        granule = GRANULE[torch.cuda.get_device_capability(index)[0]]
        groups, count, rest = _check(driver, driver.cuDevSmResourceSplitByCount(total // granule, whole, 0, granule))
        groups = list(groups)[: int(count)]
        dealt = allot(sms, len(groups), total - len(groups) * granule, granule)
        flags = driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
        counts, taken = [], 0
        for number, with_rest in dealt:
            resources = groups[taken : taken + number] + ([rest] if with_rest else [])
            taken += number
            description = _check(driver, driver.cuDevResourceGenerateDesc(resources, len(resources)))
            green = _check(driver, driver.cuGreenCtxCreate(description, handle, flags))
            self._green.append(green)
            counts.append(int(_check(driver, driver.cuGreenCtxGetDevResource(green, kind)).sm.smCount))
            non_blocking = int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
            self._raw_streams.append(_check(driver, driver.cuGreenCtxStreamCreate(green, non_blocking, 0)))
        self.sms = tuple(counts)
        self.contexts = tuple(_check(driver, driver.cuCtxFromGreenCtx(green)) for green in self._green)
        if self.sms != sms:
            raise PartitionError(f"{_sum(sms)} SMs were asked for, and the driver gave {_sum(self.sms)}")

    def close(self) -> None:
        """Give streams and contexts back; nothing may be running on them, and no graph that names them may follow."""
        self.streams = self.contexts = ()
        for stream in self._raw_streams:
            _check(self._driver, self._driver.cuStreamDestroy(stream))
        self._raw_streams = []
        for green in self._green:
            _check(self._driver, self._driver.cuGreenCtxDestroy(green))
        self._green = []


def _driver() -> ModuleType | None:
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError:
        return None


def _check(driver: ModuleType, answer: tuple[Any, ...]) -> Any:
    """What a call of the driver returned beside its status. Raises PartitionError if that is not success."""
    status, *values = answer
    if status != driver.CUresult.CUDA_SUCCESS:
        raise PartitionError(f"the CUDA driver refused to set SMs apart: {status.name}")
    return values[0] if len(values) == 1 else tuple(values)


def _sum(parts: Sequence[int]) -> str:
    return " + ".join(map(str, parts)) or "nothing"
