"""GEMM: every kernel and config against float32, and who is fastest for Llama-3-8B's linears.

Each shape's candidates are timed briefly, the best against cuBLAS (and DeepGEMM, where it is installed) at length.
Weights rotate so that they come from memory, as in a model. The choices are stored for the engine under
``$XDG_CACHE_HOME/nanoflow/gemm``; a file copied to ``configs/gemm`` is shipped. The summary's rows are ``gemm``, what
was tried is ``gemm try``.
"""

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from benchmarks.kernels.common import check_row, poisoned, randn, relative_error, time_interleaved, time_row
from nanoflow.ops.gemm import GemmKernel, device_sms, matmul, unavailable
from nanoflow.ops.gemm_choice import Choice, Choices, choice_file, choice_folders, choose, machine_of
from nanoflow.ops.gemm_config import SILU_TILES, TILES, GemmConfig, Workspace, candidates

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

    def launch(config: GemmConfig, silu: bool) -> None:
        x, w = randn(256, 256, device=device), randn(512, 256, device=device)
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
    """One shape at one number of rows and SMs."""

    name: str
    rows: int
    sms: int
    whole: bool
    silu: bool

    def __str__(self) -> str:
        n, k = SHAPES[self.name]
        return f"{self.name}{' + silu_mul' if self.silu else ''} {self.rows}x{n}x{k} on {self.sms} SMs"

    def calls(
        self, kernel: GemmKernel, config: GemmConfig | None, x: torch.Tensor, weights: list[torch.Tensor]
    ) -> list[Callable[[], object]]:
        """One call for each of the rotated weights."""
        n = weights[0].shape[0]
        out = poisoned(self.rows, n // 2 if self.silu else n, device=x.device)
        if kernel == "triton" or not self.silu:
            # Its own: one that is made while a graph is captured would be cleared by every call.
            workspace = Workspace(config, self.sms, x.device, silu=self.silu) if config else None
            options = {"silu": self.silu, "sms": self.sms, "kernel": kernel, "config": config, "workspace": workspace}
            run = partial(matmul, x, out=out, **options)  # type: ignore[arg-type]
            return [partial(run, w) for w in weights]
        both = poisoned(self.rows, n, device=x.device)

        def two_kernels(w: torch.Tensor) -> None:
            from nanoflow.ops.elementwise_triton import silu_mul

            matmul(x, w, both, sms=self.sms, kernel=kernel)
            silu_mul(both, out)

        return [partial(two_kernels, w) for w in weights]


def measure(case: Case, device: str, seconds: float) -> tuple[Choice, list[dict[str, Any]]]:
    """Who is fastest for one case, and the table of all that was tried."""
    n, k = SHAPES[case.name]
    weights = [randn(n, k, device=device) / k**0.5 for _ in range(math.ceil(ROTATED_BYTES / (2 * n * k)))]
    x = randn(case.rows, k, device=device)
    named: list[tuple[str, GemmKernel, GemmConfig | None]] = [
        ("cublas", "cublas", None),
        ("deep_gemm", "deep_gemm", None),
        *((str(config), "triton", config) for config in candidates(case.rows, n, k, case.sms, silu=case.silu)),
    ]
    runs: dict[str, tuple[Choice, Any]] = {
        label: (Choice(kernel, config, 0.0, 0.0), case.calls(kernel, config, x, weights))  # type: ignore[arg-type]
        for label, kernel, config in named
        if unavailable(kernel, x, weights[0], x) is None
    }
    flops = 2.0 * case.rows * n * k
    moved = 2.0 * (case.rows * k + n * k + case.rows * (n // 2 if case.silu else n))
    rows: list[dict[str, Any]] = []

    def timer(calls: Mapping[str, Any], seconds: float) -> dict[str, float]:
        title = "gemm" if rows else "gemm try"
        timings = time_interleaved(calls, seconds, warmup_seconds=0.3 if rows else 0.1, device=device)
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
    choice = choose(runs, timer, seconds=seconds, finalists=FINALISTS + 2, part=not case.whole)  # type: ignore[arg-type]
    return choice, rows


def time(device: str, quick: bool = False) -> list[dict[str, Any]]:
    """Whole GPU at every number of rows, the fewest rows also on a part of the SMs, and gate_up with SiLU.

    An interrupt ends it early; the cases that were finished are kept.
    """
    compile_all(device)
    whole = device_sms(torch.device(device))
    cases = [Case(name, rows, whole, True, False) for rows in ROWS for name in SHAPES]
    cases += [Case(name, ROWS[0], PARTITION, False, False) for name in SHAPES]
    cases += [Case("gate_up", rows, whole, True, True) for rows in ROWS]
    choices = Choices(machine_of(torch.device(device)))
    table: list[dict[str, Any]] = []
    for case in cases:
        if quick and case.rows != ROWS[0]:
            continue
        try:
            choice, rows = measure(case, device, 0.2 if quick else 0.4)
        except KeyboardInterrupt:
            print(f"interrupted at {case}: the cases before it are kept", flush=True)
            break
        choices.add(case.rows, *SHAPES[case.name], case.sms, torch.bfloat16, choice, silu=case.silu)
        choices.save(choice_file(choice_folders()[0], str(choices.machine["gpu"])))
        table += rows
        print(f"{case}: {choice}", flush=True)
    return table
