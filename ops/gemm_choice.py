"""Which GEMM kernel is fastest, as measured: for a weight's shape, a number of rows, an SM budget, a dtype and a GPU.

Choices are kept as JSON, one file a GPU: the user's own under ``$XDG_CACHE_HOME/nanoflow/gemm``, then those shipped in
``configs/gemm``. A file holds the versions it was measured with and is refused on a machine with others.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from nanoflow.ops.gemm_config import GemmConfig

__all__ = ["Choice", "Choices", "choice_folders", "choose", "forget_choices", "machine_of", "stored_choices"]

log = logging.getLogger(__name__)

FORMAT = 1

Calls = TypeVar("Calls")
"""What a timer takes."""

Key = tuple[int, int, int, str, bool]
"""Output columns and input columns of the weight, SMs, dtype, SiLU."""


@dataclass(frozen=True)
class Choice:
    """The fastest kernel of one shape."""

    kernel: Literal["cublas", "triton", "deep_gemm"]
    config: GemmConfig | None
    milliseconds: float
    cublas_milliseconds: float

    def holds(self, rows: int, columns: int, measured_sms: int, sms: int, *, silu: bool = False) -> bool:
        """Whether it is still right on `sms` SMs, a part of the device, having been measured on others."""
        if self.config is None:
            return self.kernel == "deep_gemm"  # it cuts its tiles for the SMs that it is given
        tiles = prod(self.config.tiles(rows, columns, silu))
        rounds = [-(-tiles // (budget * self.config.ctas_per_sm)) for budget in (measured_sms, sms)]
        return rounds[0] == rounds[1]


@dataclass
class Choices:
    """Choices measured on one machine."""

    machine: Mapping[str, Any]
    by_key: dict[Key, dict[int, Choice]] = field(default_factory=dict)
    """By shape, then by rows."""

    def add(
        self, rows: int, columns: int, inputs: int, sms: int, dtype: torch.dtype, choice: Choice, *, silu: bool = False
    ) -> None:
        self.by_key.setdefault((columns, inputs, sms, _name(dtype), silu), {})[rows] = choice

    def find(
        self, rows: int, columns: int, inputs: int, sms: int, dtype: torch.dtype, *, silu: bool = False
    ) -> Choice | None:
        """The choice of the next larger number of rows that was measured, if that is less than twice `rows`; of the
        largest one for more rows than that; None if the shape was not measured.

        On a part of the SMs of which nothing was measured, the choice of the nearest budget that is still right there:
        not cuBLAS, which launches for all SMs, and of our own kernel only where a CTA gets as many tiles at most.
        """
        whole = self.machine.get("sms")
        budgets = (
            [sms]
            if sms == whole
            else sorted({key[2] for key in self.by_key}, key=lambda budget: (abs(budget - sms), budget))
        )
        for budget in budgets:
            measured = self.by_key.get((columns, inputs, budget, _name(dtype), silu), {})
            at_least = min((count for count in measured if count >= rows), default=max(measured, default=0))
            if at_least not in measured or at_least >= 2 * rows:
                continue
            choice = measured[at_least]
            if budget == sms or choice.holds(rows, columns, budget, sms, silu=silu):
                return choice
        return None

    def knows(self, columns: int, inputs: int, dtype: torch.dtype, *, silu: bool = False) -> bool:
        """Whether anything was measured for a weight."""
        return any(key[:2] == (columns, inputs) and key[3:] == (_name(dtype), silu) for key in self.by_key)

    def save(self, path: Path) -> None:
        entries = [
            {
                "columns": columns,
                "inputs": inputs,
                "sms": sms,
                "dtype": dtype,
                "silu": silu,
                "rows": rows,
                "kernel": choice.kernel,
                "config": choice.config and choice.config.to_dict(),
                "milliseconds": round(choice.milliseconds, 6),
                "cublas_milliseconds": round(choice.cublas_milliseconds, 6),
            }
            for (columns, inputs, sms, dtype, silu), by_rows in sorted(self.by_key.items())
            for rows, choice in sorted(by_rows.items())
        ]
        lines = ",\n".join(f"  {json.dumps(entry)}" for entry in entries)
        path.parent.mkdir(parents=True, exist_ok=True)
        head = json.dumps({"format": FORMAT, "machine": dict(self.machine)})[:-1]
        written = path.with_suffix(".partial")
        written.write_text(f'{head}, "choices": [\n{lines}\n]}}\n', encoding="utf-8")
        written.replace(path)

    @classmethod
    def load(cls, path: Path, machine: Mapping[str, Any]) -> "Choices":
        """Read a file that was measured on a machine like `machine`.

        Raises:
            ValueError: it cannot be read, or was measured with another GPU or other versions.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found = {"format": content["format"], **content["machine"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a file of GEMM choices ({error}); delete it and measure again") from None
        for name, here in {"format": FORMAT, **machine}.items():
            if found.get(name) != here:
                raise ValueError(
                    f"{path}: measured with {name} {found.get(name)!r}, here it is {here!r}; measure again with "
                    "python -m benchmarks.gemm_choices"
                )
        choices = cls(machine)
        try:
            for entry in content["choices"]:
                config = entry["config"]
                choice = Choice(
                    entry["kernel"],
                    None if config is None else GemmConfig(**config),
                    entry["milliseconds"],
                    entry["cublas_milliseconds"],
                )
                key = (entry["columns"], entry["inputs"], entry["sms"], entry["dtype"], entry["silu"])
                choices.by_key.setdefault(key, {})[entry["rows"]] = choice
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: a choice is damaged ({error}); delete the file and measure again") from None
        return choices


MARGINS = {"cublas": 1.0, "triton": 1.005, "deep_gemm": 1.02}
"""What times are multiplied by before they are compared: noise shall not choose, and DeepGEMM, an extra that other
machines may lack, must be worth it."""


def choose(
    kernels: Mapping[str, tuple[Choice, Calls]],
    timer: Callable[[Mapping[str, Calls], float], Mapping[str, float]],
    *,
    seconds: float = 0.2,
    finalists: int = 3,
    part: bool = False,
) -> Choice:
    """Measure candidates of one shape and return the fastest; see `MARGINS`.

    Args:
        kernels: by name, the choice it stands for (its times are filled in here) and its calls; ``cublas`` is one.
        timer: times calls against each other, hot, so many seconds each: milliseconds by name.
        seconds: for each finalist; all candidates get a quarter of that first.
        part: the shape is for a part of the SMs. cuBLAS, which takes them all, is then measured but not chosen.
    """
    calls = {name: call for name, (_, call) in kernels.items()}
    first = timer(calls, seconds / 4)
    best = sorted(first, key=lambda name: first[name])[:finalists]
    last = timer({name: calls[name] for name in {*best, "cublas"}}, seconds)
    eligible = (name for name in last if not (part and name == "cublas"))
    winner = min(eligible, key=lambda name: last[name] * MARGINS[kernels[name][0].kernel])
    choice = kernels[winner][0]
    return Choice(choice.kernel, choice.config, last[winner], last["cublas"])


def machine_of(device: torch.device) -> dict[str, Any]:
    """What a choice depends on: the GPU and the versions."""
    properties = torch.cuda.get_device_properties(device)
    versions = {"torch": torch.__version__.split("+")[0], "cuda": str(torch.version.cuda)}
    try:
        versions["triton"] = version("triton")
    except PackageNotFoundError:
        versions["triton"] = "none"
    return {"gpu": properties.name, "sms": properties.multi_processor_count, **versions}


def choice_folders() -> tuple[Path, ...]:
    """The user's store, then the shipped one."""
    return _folders(os.environ.get("XDG_CACHE_HOME"), os.environ.get("HOME"))


@cache
def _folders(cache_home: str | None, home: str | None) -> tuple[Path, ...]:
    """Once for each pair of what the environment says: every product of an eager run asks."""
    cached = Path(cache_home) if cache_home else Path(home or Path.home()) / ".cache"
    return cached / "nanoflow" / "gemm", Path(__file__).parent.parent / "configs" / "gemm"


def choice_file(folder: Path, gpu: str) -> Path:
    """Where choices for `gpu` are kept: ``NVIDIA H100 80GB HBM3`` -> ``nvidia-h100-80gb-hbm3.json``."""
    return folder / (re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json")


def stored_choices(device: torch.device) -> Choices:
    """What was measured for `device`, read once a process; empty if nothing was. A file that does not fit is refused
    with a warning."""
    if device.type != "cuda":
        return Choices({})
    index = torch.cuda.current_device() if device.index is None else device.index
    return _stored(index, choice_folders())


@cache
def _stored(index: int, folders: Sequence[Path]) -> Choices:
    machine = machine_of(torch.device("cuda", index))
    for folder in folders:
        path = choice_file(folder, machine["gpu"])
        if path.exists():
            try:
                return Choices.load(path, machine)
            except ValueError as error:
                log.warning("%s", error)
    return Choices(machine)


def forget_choices() -> None:
    """Have the files read again: choices were stored since."""
    _stored.cache_clear()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
