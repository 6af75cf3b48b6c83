"""How much memory there is, how sizes are written, and how much of it the KV cache gets."""

import gc
import os
import re
from pathlib import Path

import torch

from nanoflow.errors import ConfigError, OutOfMemoryError

__all__ = ["format_bytes", "free_bytes", "kv_bytes", "parse_memory", "parse_size", "release"]

GPU_SHARE = 0.92
"""Share of a GPU's memory that a run may take in all, unless the config says otherwise."""
CPU_SHARE = 0.25
"""Largest share of the free memory that the KV cache takes on a CPU, unless the config says otherwise."""

_UNITS = {
    "": 1,
    "b": 1,
    **{letter + "b": 1000 ** (power + 1) for power, letter in enumerate("kmgt")},
    **{letter + "ib": 1024 ** (power + 1) for power, letter in enumerate("kmgt")},
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_size(text: str | int) -> int:
    """Bytes of a size such as ``4GiB`` (1024s), ``512MB`` (1000s) or a plain number. Raises ValueError."""
    if isinstance(text, int) and not isinstance(text, bool):
        size: float = text
    else:
        match = _SIZE.fullmatch(text) if isinstance(text, str) else None
        if match is None or match[2].lower() not in _UNITS:
            raise ValueError(f"{text!r} is not a size: write a number and a unit, such as 4GiB or 512MB")
        size = float(match[1]) * _UNITS[match[2].lower()]
    if size < 1:
        raise ValueError(f"{text!r} is not a size: it must be at least one byte")
    return int(size)


def parse_memory(value: str | int | float) -> float | int | None:
    """A setting of memory: a fraction over 0 and up to 1 (as float), a size (bytes, as int), or None for ``auto``.

    A number up to 1 is a fraction, with or without quotes; a percentage is not accepted. Raises ValueError.
    """
    wrong = f"{value!r} is not an amount of memory: write auto, a fraction such as 0.5, or a size such as 4GiB"
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(wrong)
    if isinstance(value, str) and value.strip().lower() == "auto":
        return None
    try:
        number = float(value)
    except ValueError:
        return parse_size(str(value))
    if 0 < number <= 1:
        return number
    if not 1 < number < 2**63 or number != int(number):
        raise ValueError(wrong)
    return int(number)


def format_bytes(count: float) -> str:
    """A number of bytes for people: ``3.4 GiB``."""
    units = ("bytes", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while abs(count) >= 1024 and power < len(units) - 1:
        count, power = count / 1024, power + 1
    return f"{count:.1f} {units[power]}" if power else f"{count:.0f} bytes"


def free_bytes(device: torch.device | str = "cpu") -> int:
    """Memory that can still be allocated on a device, in bytes.

    On a CPU this is what the machine has available, or what the limits of the process's control groups (v1 or v2, as
    containers have them) leave, whichever is less. File cache that can be dropped counts as free.
    """
    device = torch.device(device)
    if device.type == "cuda":
        # Blocks that PyTorch holds without using them can be allocated again.
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + idle
    limits = [_available()]
    limits += _cgroup_free(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    return max(0, min(limits))


def _available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    # Another system than Linux does not say what is free; half of all is a guess on the safe side.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _cgroup_free(membership: Path, root: Path) -> list[int]:
    """What each memory limit above this process leaves, in bytes.

    A limit may stand at any level from the process's own group to the root. Inside a container the path in
    `membership` may be that of the host and absent under `root`, where the container's own group then is the root.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    free = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit_file, used_file, cache = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit_file = root / "memory", "memory.limit_in_bytes"
            used_file, cache = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            left = _limit_left(folder, limit_file, used_file, cache)
            if left is not None:
                free.append(left)
            if folder == base:
                break
    return free


def _limit_left(folder: Path, limit_file: str, used_file: str, cache: str) -> int | None:
    try:
        limit = (folder / limit_file).read_text().strip()
        if limit == "max" or int(limit) >= 2**60:  # v1 writes a huge number for no limit
            return None
        left = int(limit) - int((folder / used_file).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return left + int(statistics.get(cache, 0))
    except (OSError, ValueError):
        return None


def kv_bytes(
    setting: str | int | float,
    *,
    device: torch.device | str,
    job_bytes: int,
    free: int | None = None,
    total: int | None = None,
) -> int:
    """Bytes for the KV cache, from the setting ``engine.kv_memory``, asked for when the weights are loaded.

    ``auto``: on a GPU what is left of 92% of its memory; on a CPU what the job can use (`job_bytes`), at most a quarter
    of what is free. A fraction: on a GPU what is left of that share of its memory; on a CPU that share of what is free.
    A size: just that. `free` and `total` memory of the device are measured unless given. Raises ConfigError for another
    setting, OutOfMemoryError if there is not so much.
    """
    device = torch.device(device)
    try:
        value = parse_memory(setting)
    except ValueError as error:
        raise ConfigError(f"engine.kv_memory: {error}.") from None
    free = free_bytes(device) if free is None else free
    if isinstance(value, int):
        if value > free:
            raise OutOfMemoryError(
                f"engine.kv_memory: {format_bytes(value)} asked for, {format_bytes(free)} free. Set it to auto or less."
            )
        return value
    if device.type == "cuda":
        if total is None:
            total = int(torch.cuda.mem_get_info(device)[1])
        share = GPU_SHARE if value is None else value
        size = int(total * share) - (total - free)
        if size <= 0:
            raise OutOfMemoryError(
                f"engine.kv_memory: {format_bytes(total - free)} of the GPU's {format_bytes(total)} are taken by the "
                f"model and by others, which leaves nothing of the {share:.0%} that a run may take: "
                f"{format_bytes(-size)} too much. End what else uses the GPU, set kv_memory to a fraction nearer to 1, "
                "or use a smaller model."
            )
        return size
    return min(job_bytes, int(free * CPU_SHARE)) if value is None else int(free * value)


def release(device: torch.device) -> None:
    """Give back what nothing refers to any more: a closed executor's buffers, and what its graphs had, which is their
    own pool's until PyTorch's cache is emptied."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
