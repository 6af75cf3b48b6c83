"""Write the tables of README.md and of the pages from what is recorded; nobody types them.

    python -m benchmarks.performance            # rewrites the parts between the pages' markers
    python -m benchmarks.performance --check    # status 1 if a page is not what the records say

Records are in benchmarks/results: kernels.json (``python -m benchmarks.kernels``), gemm_choices.json (``python -m
benchmarks.gemm_choices --record ...``), iteration.json (``python -m benchmarks.iteration --profile``),
offline_throughput.json, and of lanes: lanes.json (``python -m benchmarks.lanes``), gemm_partitions.json (``python -m
benchmarks.gemm_choices --sms ... --record ...``) and decode_partitions.json (``python -m benchmarks.decode_blocks --sms
...``), of tuning: tuning.json, plan_grid.json (``python -m benchmarks.plan_grid``) and prediction.json (``python -m
benchmarks.prediction --record ...``), and of several GPUs: collectives.json (``python -m benchmarks.collectives``) and
network_lanes.json (``python -m benchmarks.network_lanes``). The pictures are drawn by ``python -m benchmarks.plots``.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import lane_tables, parallel_tables, tuning_tables, whole_tables

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "performance.md"
README = ROOT / "README.md"
PAGES = (PAGE, ROOT / "docs" / "plans.md", ROOT / "docs" / "tuning.md", ROOT / "docs" / "parallel.md", README)
RESULTS = ROOT / "benchmarks" / "results"
CHOICES = RESULTS / "gemm_choices.json"
NONE = "Nothing is recorded yet: run `python -m benchmarks.kernels` on a GPU, then `python -m benchmarks.performance`."

Record = dict[str, Any] | None


@dataclass(frozen=True)
class Records:
    """What is recorded; None where nothing is."""

    kernels: Record = None
    choices: Record = None
    iteration: Record = None
    runs: Record = None
    """Whole runs by name."""
    lanes: Record = None
    """By mix."""
    gemm_parts: Record = None
    decode_parts: Record = None
    tuning: Record = None
    grid: Record = None
    predictions: Record = None
    collectives: Record = None
    network: Record = None
    """By mix."""

    @classmethod
    def load(cls) -> "Records":
        runs = _load("offline_throughput")
        return cls(
            _load("kernels"),
            _load("gemm_choices"),
            _load("iteration"),
            runs and runs["runs"],
            _load("lanes"),
            _load("gemm_partitions"),
            _load("decode_partitions"),
            _load("tuning"),
            _load("plan_grid"),
            _load("prediction"),
            _load("collectives"),
            _load("network_lanes"),
        )


def _load(name: str) -> Record:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def machine(record: Record) -> Iterator[str]:
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


def times(record: Record) -> Iterator[str]:
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


def products(record: Record) -> Iterator[str]:
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


PARTS: dict[str, Callable[[Records], Iterator[str]]] = {
    "machine": lambda records: machine(records.kernels),
    "times": lambda records: times(records.kernels),
    "products": lambda records: products(records.choices),
    "iteration": lambda records: whole_tables.iteration(records.iteration),
    "timeline": lambda records: whole_tables.timeline(records.iteration),
    "runs": lambda records: whole_tables.runs(records.runs),
    "lanes": lambda records: lane_tables.against_sequence(records.lanes),
    "scans": lambda records: lane_tables.scans(records.lanes),
    "gemm_parts": lambda records: lane_tables.products(records.gemm_parts),
    "decode_parts": lambda records: lane_tables.attention(records.decode_parts),
    "tuned": lambda records: tuning_tables.tuned(records.tuning),
    "grid": lambda records: tuning_tables.grid(records.grid),
    "predictions": lambda records: tuning_tables.predictions(records.predictions),
    "alone": lambda records: parallel_tables.alone(records.collectives),
    "beside": lambda records: parallel_tables.beside(records.collectives),
    "network": lambda records: parallel_tables.network(records.network),
    "claims": lambda records: whole_tables.claims(records.runs),
}
MARKED = re.compile(r"(<!-- (\w+) -->\n)(?:(?!<!-- ).)*(<!-- end -->)", re.DOTALL)


def render(text: str, records: Records) -> str:
    """The page with every marked part made anew; KeyError if a marker names none."""
    return MARKED.sub(lambda match: match[1] + "\n".join(PARTS[match[2]](records)).strip() + "\n" + match[3], text)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.performance", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    records, differs = Records.load(), False
    for page in PAGES:
        text = page.read_text()
        made = render(text, records)
        differs |= made != text
        if not args.check:
            page.write_text(made)
    return int(args.check and differs)


if __name__ == "__main__":
    sys.exit(main())
