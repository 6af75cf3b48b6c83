"""Which device a run uses, why a GPU cannot be used, and what would fit where a model does not."""

import ctypes
import os
import platform
from math import ceil
from pathlib import Path
from typing import Any

import torch

from nanoflow.errors import ConfigError, OutOfMemoryError
from nanoflow.memory import format_bytes

__all__ = [
    "check_head_size",
    "choose_device",
    "device_sms",
    "driver_cuda_version",
    "driver_version",
    "gpu_problem",
    "hardware",
    "memory_shortage",
    "processor_cores",
    "processor_name",
    "ranks_reach",
]

MIN_CAPABILITY = (8, 0)
"""Compute capability that the kernels need: bfloat16 matrix units."""
HEAD_SIZES = range(16, 257, 16)
"""Head sizes that the attention kernels take: whole matrix-unit tiles, and no more than fits into registers."""


def choose_device(name: str, *, use: bool = True) -> torch.device:
    """The device that ``engine.device`` means; ``auto`` is the first GPU if it can be used, else the CPU.

    Without `use`, other processes will compute on it: this one only looks, which takes no memory there, and does not
    fail where a GPU is for one process at a time.

    Raises ConfigError, with the reason and the mend, for a GPU that cannot be used.
    """
    if name == "auto":
        return torch.device("cuda" if gpu_problem(0, use=use) is None else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        problem = gpu_problem(device.index or 0, use=use)
        if problem is not None:
            raise ConfigError(f"engine.device: {name} was asked for, but {problem}; or use cpu")
    return device


def ranks_reach(device: torch.device, ranks: int) -> bool:
    """Whether so many GPUs from `device` on can reach each other's memory, by what the driver says; CPUs do not."""
    first = device.index or 0
    if device.type != "cuda" or first + ranks > torch.cuda.device_count():
        return False
    all_of_them = range(first, first + ranks)
    return all(torch.cuda.can_device_access_peer(a, b) for a in all_of_them for b in all_of_them if a != b)


def gpu_problem(index: int, *, use: bool = True) -> str | None:
    """Why torch cannot run NanoFlow on GPU `index`, with the mend; None if it can. `use`: see `choose_device`."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: install a CUDA build of torch 2.11 or later"
    driver = driver_cuda_version()
    if driver is None:
        return (
            "no NVIDIA driver was found (libcuda.so.1): install it on a machine with an NVIDIA GPU, or start the "
            "container with its GPUs"
        )
    built = tuple(int(part) for part in torch.version.cuda.split(".")[:2])
    if driver[0] < built[0]:
        return (
            f"the NVIDIA driver is too old: it supports CUDA up to {driver[0]}.{driver[1]} and torch "
            f"{torch.__version__} needs CUDA {torch.version.cuda}: update the driver, or install a build of torch for "
            f"CUDA {driver[0]}"
        )
    count = torch.cuda.device_count()
    if count == 0:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        shown = "" if hidden is None else f" (CUDA_VISIBLE_DEVICES is {hidden!r})"
        return f"the NVIDIA driver shows no GPU{shown}: see what nvidia-smi says"
    if index >= count:
        there = "only cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        return f"this machine has {count} GPU{'s' if count > 1 else ''}: use {there}"
    try:
        capability = torch.cuda.get_device_capability(index)
        if use:
            torch.cuda.mem_get_info(index)  # makes the context: what cannot start fails here
    except RuntimeError as error:
        return f"CUDA cannot start on it ({str(error).splitlines()[0]}): see what nvidia-smi says"
    if capability < MIN_CAPABILITY:
        return (
            f"{torch.cuda.get_device_name(index)} has compute capability {capability[0]}.{capability[1]} and the "
            f"kernels need {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} or more: use a GPU of the A100's generation or later"
        )
    return None


def device_sms(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 for a CPU, which is not cut into parts."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def driver_cuda_version() -> tuple[int, int] | None:
    """Latest CUDA version that the NVIDIA driver supports, (major, minor); None without a driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(version)) != 0 or version.value == 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def driver_version() -> str | None:
    """The driver's own version, such as 580.65.06; None where it does not say."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    text = ctypes.create_string_buffer(96)
    if library.nvmlInit_v2() != 0 or library.nvmlSystemGetDriverVersion(text, len(text)) != 0:
        return None
    return text.value.decode()


def hardware(device: torch.device) -> dict[str, Any]:
    """What results were measured on: the device, and the processor that feeds it."""
    found: dict[str, Any] = {"device": "cpu", "processor": processor_name(), "cores": processor_cores()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "sms": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "driver_cuda": ".".join(map(str, driver_cuda_version() or ())),
        }
    return found


def processor_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor_name() -> str:
    """What the machine's processor is called."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def check_head_size(head_dim: int, device: torch.device) -> None:
    """Raises ConfigError for a head size that the attention kernels of `device` do not take."""
    if device.type == "cuda" and head_dim not in HEAD_SIZES:
        raise ConfigError(
            f"config.json: the model's head size is {head_dim}; on a GPU it must be a multiple of {HEAD_SIZES.step} "
            f"from {HEAD_SIZES.start} to {HEAD_SIZES.stop - 1}. Use engine.device: cpu for this model."
        )


def memory_shortage(
    need: int, free: int, dtype: torch.dtype, device: torch.device | str, ranks: int = 1
) -> OutOfMemoryError:
    """The error for a model whose weights take `need` bytes in `dtype`, more than is free; it says what would fit.

    Of `ranks` that share the model, `need` and `free` are one's.
    """
    device = torch.device(device)
    name = str(dtype).removeprefix("torch.")
    ways = []
    if dtype.itemsize > 2:
        half = need * 2 // dtype.itemsize
        ways.append(f"model.dtype: bfloat16 ({format_bytes(half)}{'' if half <= free else ', still too much'})")
    total = free
    if device.type == "cuda":
        total = int(torch.cuda.mem_get_info(device)[1])
        if free < 0.9 * total:
            ways.append(f"ending what else uses the GPU ({format_bytes(total - free)} of {format_bytes(total)} in use)")
        gpus = max(2 * ranks, 1 << (ceil(ranks * need / (0.8 * total)) - 1).bit_length())
        ways.append(f"parallel.tensor: {gpus} with so many GPUs, which leaves room for the KV cache")
    ways.append("a smaller model")
    whose = " on one rank" if ranks > 1 else ""
    return OutOfMemoryError(
        f"the model's weights{whose} need {format_bytes(need)} as {name} and {format_bytes(free)} are free on "
        f"{device}: {format_bytes(need - free)} are missing, before any KV cache. What would fit: {'; '.join(ways)}."
    )
