"""Measure which GEMM kernel is fastest for each linear of a model at each number of rows, and store it for the engine.

    python -m benchmarks.gemm_choices                                # Llama-3-8B's shapes on this GPU
    python -m benchmarks.gemm_choices --model configs/models/qwen2-7b
    python -m benchmarks.gemm_choices --model configs/models/llama-3-70b --tensor 2    # a rank's shapes, of two
    python -m benchmarks.gemm_choices --rows 1280 2048 --out configs/gemm/nvidia-h100-80gb-hbm3.json
    python -m benchmarks.gemm_choices --sms 92 100 --rows 512 640 1280    # for lanes that have so many SMs

For each number of rows, largest first: every linear of a layer and the head, with SiLU where the model has it behind a
linear (cuBLAS and DeepGEMM with a kernel after them, Triton in its epilogue). Candidates take short turns on rotating
weights, hot; all briefly, then the best against cuBLAS. Then the layer's products run one after the other, as chosen
and with cuBLAS alone: choices that do not make it faster are not stored, but cuBLAS for all of its linears.

With --sms, all is timed on parts of so many SMs, the others idle, and cuBLAS, which launches for all SMs, is compared
but not stored; the head is left out, since it never runs in a lane. `python -m benchmarks.gemm_waves` says which
numbers of SMs and rows are worth it.

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

from nanoflow.models.config import ModelConfig
from nanoflow.models.registry import build_graph
from nanoflow.ops.gemm_choice import Choice, choice_file, choice_folders
from nanoflow.ops.operation import device_sms
from nanoflow.ops.sharding import ShardError, shard_graph
from nanoflow.search.gemm_measure import (
    CANDIDATES,
    GemmBench as Bench,
    GemmCase as Case,
    compile_all,
    linears_of,
    machine,
    measure_choice as measure,
    stored_here,
)
from nanoflow.search.timing import on_sms

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "configs" / "models" / "llama-3-8b"
ROWS = (64, 128, 256, 384, 512, 640, 768, 896, 1024, 1152, 1280, 1408, 1536, 1792, 2048)
HEAD = "lm_head"
HEAD_ROWS = 1024
"""The head runs on sampled rows only: seldom more than these."""


@dataclass(frozen=True)
class Layer:
    """What one number of rows takes, in milliseconds."""

    rows: int
    sms: int
    chosen: Mapping[str, Choice]
    """By linear."""
    chosen_ms: float
    """The layer's products in a row, as chosen."""
    cublas_ms: float
    """The same with cuBLAS, and SiLU in a kernel of its own."""

    whole: bool
    """On all SMs."""

    @property
    def cublas_instead(self) -> bool:
        """Whether the choices, each the fastest alone, are slower in a row; near the power limit they can be."""
        return self.whole and self.chosen_ms >= self.cublas_ms

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
            "sms": self.sms,
            "linears": linears,
            "layer_milliseconds": self.chosen_ms,
            "cublas_layer_milliseconds": self.cublas_ms,
            "stored": "cublas" if self.cublas_instead else "as chosen",
        }


def linears(model: Path, ranks: int = 1) -> list[tuple[str, int, int, bool]]:
    """See `linears_of`; of the model whose config is in the folder `model`, or of a rank's share of it."""
    graph = build_graph(ModelConfig.from_dict(json.loads((model / "config.json").read_text())))
    return linears_of(shard_graph(graph, 0, ranks))


def layer_times(cases: Sequence[Case], chosen: Mapping[str, Choice], bench: Bench) -> tuple[float, float]:
    """Milliseconds of the cases one after the other: as chosen, and with cuBLAS."""
    cublas = Choice("cublas", None, 0.0, 0.0)
    ways = {"chosen": chosen, "cublas": {case.name: cublas for case in cases}}
    if all(choice.kernel == "cublas" for choice in chosen.values()):
        del ways["chosen"]
    inputs = [case.inputs_and_weights(str(bench.device)) for case in cases]
    calls: dict[str, list[Callable[[], object]]] = {}
    for name, choices in ways.items():
        made = [
            case.calls(choices[case.name].kernel, choices[case.name].config, x, weights[:1])[0]
            for case, (x, weights) in zip(cases, inputs, strict=True)
        ]
        calls[name] = [lambda made=made: [call() for call in made]]  # type: ignore[misc]
    found = bench.timed(calls, bench.seconds)
    return found.get("chosen", found["cublas"]), found["cublas"]


def table(layers: Sequence[Layer]) -> str:
    """Milliseconds of each linear and of the layer's products together, by rows."""
    lines = []
    for layer in sorted(layers, key=lambda layer: (layer.sms, layer.rows)):
        where = "" if layer.whole else f" on {layer.sms} SMs"
        parts = [f"{name} {c.milliseconds:.4f} ({c.config or c.kernel})" for name, c in layer.chosen.items()]
        lines.append(
            f"{layer.rows:5d} rows{where}: layer {layer.chosen_ms:.4f} ms, "
            f"{1e3 * layer.chosen_ms / layer.rows:.3f} us a row; "
            f"cuBLAS {layer.cublas_ms:.4f} ms ({layer.cublas_ms / layer.chosen_ms - 1:+.1%}); {', '.join(parts)}"
        )
    return "\n".join(lines)


class Run:
    """One run of the benchmark: what it measures goes to `out` after every case."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.device = device
        self.here = machine(device)
        files = [choice_file(folder, str(self.here["gpu"])) for folder in choice_folders()]
        self.out: Path = args.out or files[0]
        self.choices = stored_here(self.here, [self.out, *files])
        self.shapes = linears(args.model, args.tensor)
        self.ends = time.perf_counter() + args.time_limit
        self.layers: list[Layer] = []

    def rows(self, rows: int, sms: int, bench: Bench) -> None:
        """Measure and store every linear at one number of rows, and then the layer."""
        whole = sms == device_sms(self.device)
        cases = [
            Case(name, columns, inputs, rows, sms, whole, silu)
            for name, columns, inputs, silu in self.shapes
            if name != HEAD or (whole and rows <= HEAD_ROWS)
        ]
        chosen: dict[str, Choice] = {}
        for case in cases:
            if time.perf_counter() > self.ends:
                return
            chosen[case.name], line = measure(case, bench)
            self.store(case, chosen[case.name])
            print(line, flush=True)
        cases = [case for case in cases if case.name != HEAD]
        of_layer = {case.name: chosen[case.name] for case in cases}
        self.layers.append(Layer(rows, sms, of_layer, *layer_times(cases, of_layer, bench), whole))
        if self.layers[-1].cublas_instead:
            for case in cases:
                cublas = of_layer[case.name].cublas_milliseconds
                self.store(case, Choice("cublas", None, cublas, cublas))

    def store(self, case: Case, choice: Choice) -> None:
        self.choices.add(case.rows, case.columns, case.inputs, case.sms, torch.bfloat16, choice, silu=case.silu)
        self.choices.save(self.out)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gemm_choices", description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=MODEL, help="folder with a config.json")
    parser.add_argument("--tensor", type=int, default=1, help="ranks that share the model; one of them is measured")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument(
        "--sms", type=int, nargs="+", default=None, help="measure on parts of so many SMs; all by default"
    )
    parser.add_argument("--seconds", type=float, default=0.2, help="of each finalist")
    parser.add_argument("--candidates", type=int, default=CANDIDATES, help="of our own configs, the likeliest")
    parser.add_argument("--time-limit", type=float, default=float("inf"), help="seconds, after which no case is begun")
    parser.add_argument("--deep-gemm", action="store_true", help="DeepGEMM too: it compiles each shape with nvcc")
    parser.add_argument("--out", type=Path, default=None, help="store the choices here")
    parser.add_argument("--record", type=Path, default=None, help="save the table of layers here, as JSON")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    whole = device_sms(device)
    parts = args.sms or [whole]
    if not (args.model / "config.json").is_file():
        parser.error(f"--model {args.model}: no config.json there; give a folder such as {MODEL}")
    if min(args.rows) < 1:
        parser.error(f"--rows {min(args.rows)}: give 1 or more")
    if min(parts) < 1 or max(parts) > whole:
        parser.error(f"--sms {max(parts) if max(parts) > whole else min(parts)}: {device} has {whole}")
    try:
        linears(args.model, args.tensor)
    except ShardError as error:
        parser.error(str(error))
    if args.candidates < 1:
        parser.error(f"--candidates {args.candidates}: give 1 or more")
    begun = time.perf_counter()
    run = Run(args, device)
    if device.type == "cuda":
        compile_all(args.device)
    for sms in parts:
        with on_sms(sms, device) as stream:
            bench = Bench(device, args.seconds, args.deep_gemm, args.candidates, stream)
            for rows in sorted(set(args.rows), reverse=True):
                run.rows(rows, sms, bench)
                if args.record is not None and run.layers:
                    made = {
                        **run.here,
                        "model": args.model.name,
                        "linears_on_sms": parts[0] if len(parts) == 1 else parts,
                        "layers": [one.to_dict() for one in run.layers],
                    }
                    args.record.parent.mkdir(parents=True, exist_ok=True)
                    args.record.write_text(json.dumps(made, indent=1) + "\n")
    print(table(run.layers))
    print(f"{run.out}: {time.perf_counter() - begun:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
