"""Measuring which GEMM kernel is fastest for a weight, at some rows and on some SMs: what `gemm_choice` then looks up.

Candidates take short turns on rotating weights, hot: all of them briefly, then the best against cuBLAS. Each is timed
as a run launches it, and with SiLU all that makes the activated product counts: cuBLAS and DeepGEMM with a kernel after
them, Triton in its epilogue.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nanoflow.ops.device_arrays import DeviceArrays
from nanoflow.ops.gemm import GemmKernel, matmul, unavailable
from nanoflow.ops.gemm_choice import Choice, Choices, choose, machine_of
from nanoflow.ops.gemm_config import SILU_TILES, TILES, GemmConfig, candidates
from nanoflow.ops.graph import Graph
from nanoflow.ops.linear import Linear, LinearSilu
from nanoflow.ops.operation import device_sms, interpreting
from nanoflow.search.timing import time_interleaved

__all__ = ["GemmBench", "GemmCase", "compile_all", "linears_of", "machine", "measure_choice", "stored_here"]

ROTATED_BYTES = 160e6
"""Of the weights that take turns: more than a second-level cache holds."""
CANDIDATES = 5
"""Of our own configs, the likeliest: the best of those recorded were always among them."""
FINALISTS = 2
SLICE_SECONDS = 0.05

Calls = Sequence[Callable[[], object]]


@dataclass(frozen=True)
class GemmCase:
    """One weight of `columns` x `inputs` at one number of rows and SMs."""

    name: str
    columns: int
    inputs: int
    rows: int
    sms: int
    whole: bool
    """Whether these are all SMs of the device."""
    silu: bool
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        shape = f"{self.rows}x{self.columns}x{self.inputs}"
        return f"{self.name}{' + silu_mul' if self.silu else ''} {shape} on {self.sms} SMs"

    def inputs_and_weights(self, device: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Random rows, and as many weights as are needed to come from memory when they take turns."""
        each = self.dtype.itemsize * self.columns * self.inputs
        count = math.ceil(ROTATED_BYTES / each) if torch.device(device).type == "cuda" else 1
        weights = [self._normal(self.columns, self.inputs, device) / self.inputs**0.5 for _ in range(count)]
        return self._normal(self.rows, self.inputs, device), weights

    def calls(
        self, kernel: GemmKernel, config: GemmConfig | None, x: torch.Tensor, weights: Sequence[torch.Tensor]
    ) -> list[Callable[[], object]]:
        """One call for each of the weights; with SiLU, all that makes the activated product."""
        out = x.new_empty(self.rows, self.columns // 2 if self.silu else self.columns)
        options: dict[str, Any] = {"silu": self.silu, "sms": self.sms, "kernel": kernel, "config": config}
        if config:
            # Its own: one that is made while a graph is captured would be cleared by every call.
            options["scratch"] = DeviceArrays(x.device).kept
        if self.silu and kernel != "triton":
            options["intermediate"] = x.new_empty(self.rows, self.columns)
        run = partial(matmul, x, out=out, **options)
        return [partial(run, w) for w in weights]

    def runs(
        self, x: torch.Tensor, weights: Sequence[torch.Tensor], *, deep_gemm: bool = True, most: int | None = None
    ) -> dict[str, tuple[Choice, list[Callable[[], object]]]]:
        """What can compute it here, by name: the choice that it stands for, and its calls.

        `most` limits our own kernels to the configs that are likeliest to be fast.
        """
        named: list[tuple[str, GemmKernel, GemmConfig | None]] = [("cublas", "cublas", None)]
        if deep_gemm:
            named.append(("deep_gemm", "deep_gemm", None))
        if x.device.type == "cuda" or interpreting():
            found = candidates(self.rows, self.columns, self.inputs, self.sms, silu=self.silu)
            named += [(str(config), "triton", config) for config in found[:most]]
        return {
            label: (Choice(kernel, config, 0.0, 0.0), self.calls(kernel, config, x, weights))  # type: ignore[arg-type]
            for label, kernel, config in named
            if unavailable(kernel, x, weights[0], x) is None
        }

    def _normal(self, rows: int, columns: int, device: str) -> torch.Tensor:
        """Never zeros: they draw less power and run faster than real work does."""
        return torch.empty(rows, columns, device=device, dtype=self.dtype).normal_()


@dataclass(frozen=True)
class GemmBench:
    """Where and how long is measured."""

    device: torch.device
    seconds: float
    """Of each finalist."""
    deep_gemm: bool = False
    candidates: int = CANDIDATES
    stream: torch.cuda.Stream | None = None
    """Of a part of the SMs."""

    def timed(self, calls: Mapping[str, Calls], seconds: float) -> dict[str, float]:
        """Milliseconds by name, candidates in short turns."""
        timings = time_interleaved(
            calls, seconds, warmup_seconds=SLICE_SECONDS, slice_seconds=SLICE_SECONDS, device=self.device,
            stream=self.stream,
        )  # fmt: skip
        return {name: timing.median_ms for name, timing in timings.items()}


def measure_choice(case: GemmCase, bench: GemmBench) -> tuple[Choice, str]:
    """The choice for one case, and a line that says what was compared."""
    last: dict[str, float] = {}

    def timer(calls: Mapping[str, Calls], seconds: float) -> dict[str, float]:
        last.clear()
        last.update(bench.timed(calls, seconds))
        return last.copy()

    x, weights = case.inputs_and_weights(str(bench.device))
    runs = case.runs(x, weights, deep_gemm=bench.deep_gemm, most=bench.candidates)
    choice = choose(runs, timer, seconds=bench.seconds, finalists=FINALISTS, part=not case.whole)
    order = sorted(last, key=lambda name: last[name])
    return choice, f"{case}: {', '.join(f'{name} {last[name]:.4g} ms' for name in order)}"


def linears_of(graph: Graph) -> list[tuple[str, int, int, bool]]:
    """Name, output columns, input columns and SiLU of each linear of a layer, and of the head."""
    found = []
    for op in (*graph.layer, *graph.epilogue):
        linear = op.linear if isinstance(op, LinearSilu) else op
        if isinstance(linear, Linear):
            found.append((linear.name, sum(linear.outputs), linear.inputs, isinstance(op, LinearSilu)))
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """As the store names it; a CPU stands in for trying a measurement out."""
    return machine_of(device) if device.type == "cuda" else {"gpu": "CPU", "sms": device_sms(device)}


def stored_here(here: Mapping[str, Any], files: Sequence[Path]) -> Choices:
    """The first of `files` that was measured on this machine, to be added to; else nothing."""
    for path in files:
        try:
            return Choices.load(path, here)
        except (OSError, ValueError):
            continue
    return Choices(here)


def compile_all(device: str) -> None:
    """Every config once, several at a time: compilation runs in threads of C++."""
    on_gpu = torch.device(device).type == "cuda"
    inputs = 4096 if on_gpu else 256  # steps enough for split configs to split

    def launch(config: GemmConfig, silu: bool) -> None:
        x, w = (torch.empty(rows, inputs, device=device, dtype=torch.bfloat16).normal_() for rows in (256, 512))
        matmul(x, w, x.new_empty(256, 256 if silu else 512), silu=silu, kernel="triton", config=config)

    wanted = [(config, False) for config in TILES] + [(config, True) for config in SILU_TILES]
    launch(*wanted[0])
    with ThreadPoolExecutor(12 if on_gpu else 1) as pool:  # the interpreter knows one
        for done in [pool.submit(launch, *one) for one in wanted[1:]]:
            done.result()
    if on_gpu:
        torch.cuda.synchronize()
