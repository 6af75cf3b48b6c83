"""Write the tables of docs/performance.md from what is recorded: no number there is typed by hand.

    python -m benchmarks.performance            # rewrites the parts between the page's markers
    python -m benchmarks.performance --check    # status 1 if the page is not what the records say

FLOPs and bytes are those that the operations of the traced graph declare; floors are those over the ceilings recorded
in benchmarks/results/kernels.json; times are the record's own. The layer's products by rows are those of
benchmarks/results/gemm_choices.json (``python -m benchmarks.gemm_choices --record ...``).
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanoflow.models.config import ModelConfig
from nanoflow.models.registry import build_graph
from nanoflow.ops.operation import Work

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "performance.md"
RECORD = ROOT / "benchmarks" / "results" / "kernels.json"
CHOICES = ROOT / "benchmarks" / "results" / "gemm_choices.json"
MODEL = "llama-3-8b"
WORK = Work(
    decode_rows=600,
    prefill_rows=680,
    decode_context=600 * 768,
    prefill_context=2 * 340,
    prefill_pairs=2 * (340 * 341 // 2),
    sampled_rows=600,
)
"""Steady state of 512 tokens in, 512 out: 600 requests that decode at 768 tokens of context, two pieces of prompts."""
BYTES = 2
NONE = "Nothing is recorded yet: run `python -m benchmarks.kernels` on a GPU, then `python -m benchmarks.performance`."


def load(path: Path = RECORD) -> dict[str, Any] | None:
    """The record, None if there is none."""
    return json.loads(path.read_text()) if path.exists() else None


def floors(record: dict[str, Any] | None) -> Iterator[str]:
    """Table of the model's operations: FLOPs, bytes, and the floor if ceilings are recorded."""
    graph = build_graph(
        ModelConfig.from_dict(json.loads((ROOT / "configs/models" / MODEL / "config.json").read_text()))
    )
    ceilings = (record or {}).get("ceilings")
    head = Work(decode_rows=WORK.sampled_rows, sampled_rows=WORK.sampled_rows)
    yield "| operation | bound by | GFLOP | MB | floor, us |"
    yield "|---|---|---|---|---|"
    total = 0.0
    for op, work, times in (
        *((op, WORK, 1) for op in graph.prologue),
        *((op, WORK, graph.layers) for op in graph.layer),
        *((op, head, 1) for op in graph.epilogue),
    ):
        cost = op.cost(work, BYTES)
        floor = "-"
        if ceilings is not None:
            compute = cost.flops / ceilings["tflops"] / 1e6
            memory = cost.bytes / max(ceilings["gbytes_per_second"], ceilings["read_gbytes_per_second"]) / 1e3
            floor = f"{max(compute, memory):,.1f}"
            total += max(compute, memory) * times
        yield (
            f"| {op.name}{f' (x {times})' if times > 1 else ''} | {op.resource} | {cost.flops / 1e9:,.2f} | "
            f"{cost.bytes / 1e6:,.1f} | {floor} |"
        )
    if total:
        yield f"| all of an iteration | | | | {total:,.0f} |"


def machine(record: dict[str, Any] | None) -> Iterator[str]:
    """Where and with what the record was made, and its ceilings."""
    if record is None:
        yield NONE
        return
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    limit = record.get("power_limit_watts")
    yield f"Recorded on {record['hardware']}{f', power limit {limit:,.0f} W' if limit else ''}; {versions}."
    ceilings = record.get("ceilings")
    if ceilings is not None:
        yield ""
        yield (
            f"Ceilings measured there: {ceilings['tflops']:,.0f} TFLOP/s (bfloat16 product of 8192 x 8192 matrices), "
            f"{ceilings['gbytes_per_second']:,.0f} GB/s (copy), {ceilings['read_gbytes_per_second']:,.0f} GB/s (read)."
        )


def times(record: dict[str, Any] | None) -> Iterator[str]:
    """The recorded times, section by section."""
    if record is None:
        yield NONE
        return
    for name, section in record["sections"].items():
        if not section["times"]:
            continue
        failed = sum(not row.get("ok") for row in section["checks"])
        checks = f"{len(section['checks'])} checks, {f'{failed} failed' if failed else 'all right'}"
        yield f"### {name}"
        yield ""
        yield f"Recorded {section['recorded']}; {checks}."
        yield ""
        yield "| what | shape | config | ms (p10 to p90) | TFLOP/s | GB/s | of floor | W | target |"
        yield "|---|---|---|---|---|---|---|---|---|"
        for row in section["times"]:
            if row["name"].endswith(" try"):  # what was tried and not timed at length; the record has it
                continue
            took, floor = row["milliseconds"], row.get("floor_ms")
            verdict = {True: " (met)", False: " (missed)"}.get(row.get("met"), "")
            yield (
                f"| {row['name']} | {row['shape']} | {row.get('config') or ''} | {took:.4g} "
                f"({row.get('p10', took):.4g} to {row.get('p90', took):.4g}) | {_number(row.get('tflops'))} | "
                f"{_number(row.get('gbytes_per_second'))} | {f'{floor / took:.0%}' if floor else '-'} | "
                f"{_number(row.get('watts'))} | {row.get('target') or ''}{verdict} |"
            )
        yield ""


def products(record: dict[str, Any] | None) -> Iterator[str]:
    """What a layer's products take at each number of rows, with the kernels that were chosen."""
    if record is None:
        yield f"Nothing is recorded yet: `python -m benchmarks.gemm_choices --record {CHOICES.relative_to(ROOT)}`."
        return
    versions = ", ".join(f"{name} {record[name]}" for name in ("torch", "cuda", "triton") if name in record)
    yield f"Recorded on {record['gpu']}, {record['linears_on_sms']} SMs, {record['model']}; {versions}."
    yield ""
    names = list(record["layers"][0]["linears"])
    yield f"| rows | {' | '.join(names)} | together, us | us a row | cuBLAS alone, us |"
    yield "|---" * (len(names) + 4) + "|"
    for layer in sorted(record["layers"], key=lambda layer: int(layer["rows"])):
        linears = (layer["linears"][name] for name in names)
        kernels = (f"{1e3 * linear['milliseconds']:.1f}, {linear['kernel']}" for linear in linears)
        together = 1e3 * layer["layer_milliseconds"]
        yield (
            f"| {layer['rows']} | {' | '.join(kernels)} | {together:,.1f} | {together / layer['rows']:.3f} | "
            f"{1e3 * layer['cublas_layer_milliseconds']:,.1f} |"
        )


def _number(value: float | None) -> str:
    return f"{value:,.0f}" if value else "-"


def render(text: str, record: dict[str, Any] | None, choices: dict[str, Any] | None) -> str:
    """The page with every marked part made anew."""
    parts = {
        "machine": machine(record),
        "floors": floors(record),
        "times": times(record),
        "products": products(choices),
    }
    for name, lines in parts.items():
        made = "\n".join(lines).strip()
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        text, found = pattern.subn(lambda match, made=made: f"{match[1]}{made}{match[2]}", text)
        assert found == 1, f"{PAGE}: the marker <!-- {name} --> must stand there once"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.performance", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    text = PAGE.read_text()
    made = render(text, load(), load(CHOICES))
    if args.check:
        return int(made != text)
    PAGE.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
