"""GEMM: every kernel and config against float32, and who is fastest for Llama-3-8B's linears.

Each shape's candidates are timed briefly, the best against cuBLAS (and DeepGEMM, where it is installed) at length.
Weights rotate so that they come from memory, as in a model. The summary's rows are ``gemm``, what was tried is ``gemm
try``. What the engine takes is measured at more numbers of rows, by ``python -m benchmarks.gemm_choices``.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from benchmarks.kernels.common import check_row, on_sms, poisoned, randn, relative_error, time_interleaved, time_row
from nanoflow.ops.gemm import GemmKernel, matmul, unavailable
from nanoflow.ops.gemm_choice import choose
from nanoflow.ops.gemm_config import SILU_TILES, TILES, GemmConfig
from nanoflow.ops.operation import device_sms
from nanoflow.search.gemm_measure import GemmCase as Case, compile_all

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
"""Output and input columns."""
ROWS = (640, 1280, 2048)
PARTITION = 100
"""SMs of the small budget."""
LIMIT = 6e-3
FINALISTS = 3


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
