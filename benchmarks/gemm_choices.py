"""Measure which GEMM kernel is fastest for each linear of a model at each number of rows, and store it for the engine.

    python -m benchmarks.gemm_choices                                # Llama-3-8B's shapes on this GPU
    python -m benchmarks.gemm_choices --model configs/models/qwen2-7b
    python -m benchmarks.gemm_choices --rows 1280 2048 --out configs/gemm/nvidia-h100-80gb-hbm3.json

For each number of rows, largest first: every linear of a layer and the head, with SiLU where the model has it behind a
linear (cuBLAS and DeepGEMM with a kernel after them, Triton in its epilogue). Candidates take short turns on rotating
weights, hot; all briefly, then the best against cuBLAS. Then the layer's products run one after the other, as chosen
and with cuBLAS alone: choices that do not make it faster are not stored, but cuBLAS for all of its linears.

The choices go to ``$XDG_CACHE_HOME/nanoflow/gemm``, or to --out, after every case, beside what a file for this machine
holds of other shapes. The table of layers is printed and, with --record, saved. --time-limit ends a run early; what was
measured until then is kept.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.common import time_interleaved
from benchmarks.kernels.gemm import Case, compile_all
from nanoflow.models.config import ModelConfig
from nanoflow.models.registry import build_graph
from nanoflow.ops.gemm_choice import Choice, Choices, choice_file, choice_folders, choose, machine_of
from nanoflow.ops.linear import Linear, LinearSilu
from nanoflow.ops.operation import device_sms

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "configs" / "models" / "llama-3-8b"
ROWS = (64, 128, 256, 384, 512, 640, 768, 896, 1024, 1152, 1280, 1408, 1536, 1792, 2048)
HEAD = "lm_head"
HEAD_ROWS = 1024
"""The head runs on sampled rows only: seldom more than these."""
SLICE_SECONDS = 0.05
CANDIDATES = 5
"""Of our own configs, the likeliest: the best of those recorded were always among them."""
FINALISTS = 2

Calls = Sequence[Callable[[], object]]


@dataclass(frozen=True)
class Layer:
    """What one number of rows takes, in milliseconds."""

    rows: int
    chosen: Mapping[str, Choice]
    """By linear."""
    chosen_ms: float
    """The layer's products in a row, as chosen."""
    cublas_ms: float
    """The same with cuBLAS, and SiLU in a kernel of its own."""

    @property
    def wins(self) -> bool:
        """Whether the choices, each the fastest alone, are so in a row too; near the power limit they need not be."""
        return self.chosen_ms < self.cublas_ms

    def to_dict(self) -> dict[str, Any]:
        linears = {
            name: {
                "kernel": str(choice.config or choice.kernel),
                "milliseconds": choice.milliseconds,
                "cublas_milliseconds": choice.cublas_milliseconds,
            }
            for name, choice in self.chosen.items()
        }
        return {
            "rows": self.rows,
            "linears": linears,
            "layer_milliseconds": self.chosen_ms,
            "cublas_layer_milliseconds": self.cublas_ms,
            "stored": "as chosen" if self.wins else "cublas",
        }


def linears(model: Path) -> list[tuple[str, int, int, bool]]:
    """Name, output columns, input columns and SiLU of each linear that a run of `model` has."""
    graph = build_graph(ModelConfig.from_dict(json.loads((model / "config.json").read_text())))
    found = []
    for op in (*graph.layer, *graph.epilogue):
        linear = op.linear if isinstance(op, LinearSilu) else op
        if isinstance(linear, Linear):
            found.append((linear.name, sum(linear.outputs), linear.inputs, isinstance(op, LinearSilu)))
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """As the store names it; a CPU stands in for trying the benchmark out."""
    return machine_of(device) if device.type == "cuda" else {"gpu": "CPU", "sms": device_sms(device)}


def kept(here: Mapping[str, Any], files: Sequence[Path]) -> Choices:
    """The first of `files` that was measured on this machine, to be added to; else nothing."""
    for path in files:
        try:
            return Choices.load(path, here)
        except (OSError, ValueError):
            continue
    return Choices(here)


def timed(calls: Mapping[str, Calls], seconds: float, device: torch.device) -> dict[str, float]:
    """Milliseconds by name, candidates in short turns."""
    timings = time_interleaved(calls, seconds, warmup_seconds=SLICE_SECONDS, slice_seconds=SLICE_SECONDS, device=device)
    return {name: timing.median_ms for name, timing in timings.items()}


def measure(case: Case, device: torch.device, seconds: float, deep_gemm: bool) -> tuple[Choice, str]:
    """The choice for one case, and a line that says what was compared."""
    last: dict[str, float] = {}

    def timer(calls: Mapping[str, Calls], seconds: float) -> dict[str, float]:
        last.clear()
        last.update(timed(calls, seconds, device))
        return last.copy()

    x, weights = case.inputs_and_weights(str(device))
    runs = case.runs(x, weights, deep_gemm=deep_gemm, most=CANDIDATES)
    choice = choose(runs, timer, seconds=seconds, finalists=FINALISTS, part=not case.whole)
    order = sorted(last, key=lambda name: last[name])
    return choice, f"{case}: {', '.join(f'{name} {last[name]:.4g} ms' for name in order)}"


def layer_times(
    cases: Sequence[Case], chosen: Mapping[str, Choice], device: torch.device, seconds: float
) -> tuple[float, float]:
    """Milliseconds of the cases one after the other: as chosen, and with cuBLAS."""
    cublas = Choice("cublas", None, 0.0, 0.0)
    ways = {"chosen": chosen, "cublas": {case.name: cublas for case in cases}}
    if all(choice.kernel == "cublas" for choice in chosen.values()):
        del ways["chosen"]
    inputs = [case.inputs_and_weights(str(device)) for case in cases]
    calls: dict[str, list[Callable[[], object]]] = {}
    for name, choices in ways.items():
        made = [
            case.calls(choices[case.name].kernel, choices[case.name].config, x, weights[:1])[0]
            for case, (x, weights) in zip(cases, inputs, strict=True)
        ]
        calls[name] = [lambda made=made: [call() for call in made]]  # type: ignore[misc]
    found = timed(calls, seconds, device)
    return found.get("chosen", found["cublas"]), found["cublas"]


def table(layers: Sequence[Layer]) -> str:
    """Milliseconds of each linear and of the layer's products together, by rows."""
    lines = []
    for layer in sorted(layers, key=lambda layer: layer.rows):
        parts = [f"{name} {c.milliseconds:.4f} ({c.config or c.kernel})" for name, c in layer.chosen.items()]
        lines.append(
            f"{layer.rows:5d} rows: layer {layer.chosen_ms:.4f} ms, {1e3 * layer.chosen_ms / layer.rows:.3f} us a row; "
            f"cuBLAS {layer.cublas_ms:.4f} ms ({layer.cublas_ms / layer.chosen_ms - 1:+.1%}); {', '.join(parts)}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gemm_choices", description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=MODEL, help="folder with a config.json")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--sms", type=int, default=None, help="measure for a part of the SMs; all by default")
    parser.add_argument("--seconds", type=float, default=0.2, help="of each finalist")
    parser.add_argument("--time-limit", type=float, default=float("inf"), help="seconds, after which no case is begun")
    parser.add_argument("--deep-gemm", action="store_true", help="DeepGEMM too: it compiles each shape with nvcc")
    parser.add_argument("--out", type=Path, default=None, help="store the choices here")
    parser.add_argument("--record", type=Path, default=None, help="save the table of layers here, as JSON")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    if not (args.model / "config.json").is_file():
        parser.error(f"--model {args.model}: no config.json there; give a folder such as {MODEL}")
    if min(args.rows) < 1:
        parser.error(f"--rows {min(args.rows)}: give 1 or more")
    device = torch.device(args.device)
    begun = time.perf_counter()
    here, sms = machine(device), args.sms or device_sms(device)
    files = [choice_file(folder, str(here["gpu"])) for folder in choice_folders()]
    out = args.out or files[0]
    choices = kept(here, [out, *files])
    if device.type == "cuda":
        compile_all(args.device)
    shapes, layers = linears(args.model), []
    for rows in sorted(set(args.rows), reverse=True):
        cases = [
            Case(name, columns, inputs, rows, sms, sms == device_sms(device), silu)
            for name, columns, inputs, silu in shapes
            if name != HEAD or rows <= HEAD_ROWS
        ]
        chosen: dict[str, Choice] = {}
        for case in cases:
            if time.perf_counter() - begun > args.time_limit:
                break
            choice, line = measure(case, device, args.seconds, args.deep_gemm)
            choices.add(rows, case.columns, case.inputs, sms, torch.bfloat16, choice, silu=case.silu)
            choices.save(out)
            chosen[case.name] = choice
            print(line, flush=True)
        layer = [case for case in cases if case.name != HEAD]
        if all(case.name in chosen for case in layer):
            of_layer = {case.name: chosen[case.name] for case in layer}
            layers.append(Layer(rows, of_layer, *layer_times(layer, of_layer, device, args.seconds)))
            if not layers[-1].wins:
                for case in layer:
                    cublas = of_layer[case.name].cublas_milliseconds
                    choice = Choice("cublas", None, cublas, cublas)
                    choices.add(rows, case.columns, case.inputs, sms, torch.bfloat16, choice, silu=case.silu)
                choices.save(out)
        if args.record is not None and layers:
            made = {
                **here,
                "model": args.model.name,
                "linears_on_sms": sms,
                "layers": [one.to_dict() for one in layers],
            }
            args.record.parent.mkdir(parents=True, exist_ok=True)
            args.record.write_text(json.dumps(made, indent=1) + "\n")
    print(table(layers))
    print(f"{out}: {time.perf_counter() - begun:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
