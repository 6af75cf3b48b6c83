"""GEMM: every kernel and config against float32, and who is fastest for Llama-3-8B's linears.

Each shape's candidates are timed briefly, the best against cuBLAS (and DeepGEMM, where it is installed) at length.
Weights rotate so that they come from memory, as in a model. The summary's rows are ``gemm``, what was tried is ``gemm
try``. What the engine takes is measured at more numbers of rows, by ``python -m benchmarks.gemm_choices``.
"""

import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from benchmarks.kernels.common import check_row, on_sms, poisoned, randn, relative_error, time_interleaved, time_row
from nanoflow.ops.device_arrays import DeviceArrays
from nanoflow.ops.gemm import GemmKernel, matmul, unavailable
from nanoflow.ops.gemm_choice import Choice, choose
from nanoflow.ops.gemm_config import SILU_TILES, TILES, GemmConfig, candidates
from nanoflow.ops.operation import device_sms

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
"""Output and input columns."""
ROWS = (640, 1280, 2048)
PARTITION = 100
"""SMs of the small budget."""
ROTATED_BYTES = 160e6
LIMIT = 6e-3
FINALISTS = 3


def compile_all(device: str) -> None:
    """Every config once, several at a time: compilation runs in threads of C++."""
    inputs = 4096 if torch.device(device).type == "cuda" else 256  # steps enough for split configs to split

    def launch(config: GemmConfig, silu: bool) -> None:
        x, w = randn(256, inputs, device=device), randn(512, inputs, device=device)
        matmul(x, w, poisoned(256, 256 if silu else 512, device=device), silu=silu, kernel="triton", config=config)

    wanted = [(config, False) for config in TILES] + [(config, True) for config in SILU_TILES]
    launch(*wanted[0])
    with ThreadPoolExecutor(12 if torch.device(device).type == "cuda" else 1) as pool:  # the interpreter knows one
        for done in [pool.submit(launch, *one) for one in wanted[1:]]:
            done.result()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def check(device: str) -> list[dict[str, Any]]:
    """All kernels and configs on sizes that fill tiles and sizes that do not."""
    compile_all(device)
    on_gpu = torch.device(device).type == "cuda"
    sizes = [(640, 4096, 1024), (333, 1000, 520)] if on_gpu else [(33, 200, 72)]
    budgets = (None, PARTITION) if on_gpu else (3,)
    rows = []
    for m, n, k in sizes:
        x, w, bias = (randn(*shape, device=device) for shape in ((m, k), (n, k), (n,)))
        w /= k**0.5
        plain = functional.linear(x.double(), w.double(), bias.double())
        gated = functional.silu(plain[:, : n // 2]) * plain[:, n // 2 :]
        runs: list[tuple[GemmKernel, GemmConfig | None, bool]] = [("cublas", None, False), ("deep_gemm", None, False)]
        runs += [("triton", config, False) for config in TILES] + [("triton", config, True) for config in SILU_TILES]
        for kernel, config, silu in runs:
            expected = gated if silu else plain
            if unavailable(kernel, x, w, expected):
                continue
            for sms in budgets:
                out = poisoned(*expected.shape, device=device)
                for _ in range(2):
                    out.fill_(math.nan)
                    matmul(x, w, out, bias=bias, silu=silu, sms=sms, kernel=kernel, config=config)
                label = f"{kernel} {config or ''}{' silu' if silu else ''}"
                shape = f"{m}x{n}x{k} on {sms or 'all'} SMs"
                rows.append(check_row("gemm", shape, relative_error(out, expected), LIMIT, label))
    return rows


@dataclass(frozen=True)
class Case:
    """One weight of `columns` x `inputs` at one number of rows and SMs."""

    name: str
    columns: int
    inputs: int
    rows: int
    sms: int
    whole: bool
    silu: bool

    def __str__(self) -> str:
        shape = f"{self.rows}x{self.columns}x{self.inputs}"
        return f"{self.name}{' + silu_mul' if self.silu else ''} {shape} on {self.sms} SMs"

    def inputs_and_weights(self, device: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Random rows, and as many weights as are needed to come from memory when they take turns."""
        count = (
            math.ceil(ROTATED_BYTES / (2 * self.columns * self.inputs)) if torch.device(device).type == "cuda" else 1
        )
        weights = [randn(self.columns, self.inputs, device=device) / self.inputs**0.5 for _ in range(count)]
        return randn(self.rows, self.inputs, device=device), weights

    def calls(
        self, kernel: GemmKernel, config: GemmConfig | None, x: torch.Tensor, weights: list[torch.Tensor]
    ) -> list[Callable[[], object]]:
        """One call for each of the weights; with SiLU, all that makes the activated product."""
        out = poisoned(self.rows, self.columns // 2 if self.silu else self.columns, device=x.device)
        options: dict[str, Any] = {"silu": self.silu, "sms": self.sms, "kernel": kernel, "config": config}
        if config:
            # Its own: one that is made while a graph is captured would be cleared by every call.
            options["scratch"] = DeviceArrays(x.device).kept
        if self.silu and kernel != "triton":
            options["intermediate"] = poisoned(self.rows, self.columns, device=x.device)
        run = partial(matmul, x, out=out, **options)
        return [partial(run, w) for w in weights]

    def runs(
        self, x: torch.Tensor, weights: list[torch.Tensor], *, deep_gemm: bool = True, most: int | None = None
    ) -> dict[str, tuple[Choice, list[Callable[[], object]]]]:
        """What can compute it here, by name: the choice that it stands for, and its calls.

        `most` limits our own kernels to the configs that are likeliest to be fast.
        """
        named: list[tuple[str, GemmKernel, GemmConfig | None]] = [("cublas", "cublas", None)]
        if deep_gemm:
            named.append(("deep_gemm", "deep_gemm", None))
        if x.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
            found = candidates(self.rows, self.columns, self.inputs, self.sms, silu=self.silu)
            named += [(str(config), "triton", config) for config in found[:most]]
        return {
            label: (Choice(kernel, config, 0.0, 0.0), self.calls(kernel, config, x, weights))  # type: ignore[arg-type]
            for label, kernel, config in named
            if unavailable(kernel, x, weights[0], x) is None
        }


def measure(case: Case, device: str, seconds: float) -> list[dict[str, Any]]:
    """Who is fastest for one case, on its SMs alone: the table of all that was tried."""
    with on_sms(None if case.whole else case.sms, torch.device(device)) as stream:
        return _measured(case, device, seconds, stream)


def _measured(case: Case, device: str, seconds: float, stream: torch.cuda.Stream | None) -> list[dict[str, Any]]:
    n, k = case.columns, case.inputs
    runs = case.runs(*case.inputs_and_weights(device))
    flops = 2.0 * case.rows * n * k
    moved = 2.0 * (case.rows * k + n * k + case.rows * (n // 2 if case.silu else n))
    rows: list[dict[str, Any]] = []

    def timer(calls: Mapping[str, Any], seconds: float) -> dict[str, float]:
        title = "gemm" if rows else "gemm try"
        warmup = 0.3 if rows else 0.1
        timings = time_interleaved(calls, seconds, warmup_seconds=warmup, device=device, stream=stream)
        milliseconds = {label: timing.median_ms for label, timing in timings.items()}
        order = sorted(milliseconds, key=lambda label: milliseconds[label])
        own = next((label for label in order if runs[label][0].kernel == "triton"), None)
        for label in order:
            target, met = "", None
            if title == "gemm" and label == own and not case.silu:
                share, rate = milliseconds["cublas"] / milliseconds[label], flops / milliseconds[label] / 1e9
                target = f"90% of cuBLAS: {share:.0%}" if case.whole else "560 TFLOP/s"
                met = share >= 0.9 if case.whole else rate >= 560
            sizes = {"flops": flops, "bytes": moved}
            row = time_row(title, str(case), timings[label], config=label, device=device, **sizes)
            rows.append({**row, "target": target, "met": met})
        return milliseconds

    # cuBLAS and DeepGEMM may be among the finalists: room for configs of our own beside them.
    choose(runs, timer, seconds=seconds, finalists=FINALISTS + 2, part=not case.whole)
    return rows


def time(device: str, quick: bool = False) -> list[dict[str, Any]]:
    """Whole GPU at every number of rows, the fewest rows also on a part of the SMs, and gate_up with SiLU.

    An interrupt ends it early; the cases that were finished are kept.
    """
    compile_all(device)
    whole = device_sms(torch.device(device))
    cases = [Case(name, *SHAPES[name], rows, whole, True, False) for rows in ROWS for name in SHAPES]
    cases += [Case(name, *SHAPES[name], ROWS[0], PARTITION, False, False) for name in SHAPES]
    cases += [Case("gate_up", *SHAPES["gate_up"], rows, whole, True, True) for rows in ROWS]
    table: list[dict[str, Any]] = []
    for case in cases:
        if quick and case.rows != ROWS[0]:
            continue
        try:
            table += measure(case, device, 0.2 if quick else 0.4)
        except KeyboardInterrupt:
            print(f"interrupted at {case}: the cases before it are kept", flush=True)
            break
    return table
