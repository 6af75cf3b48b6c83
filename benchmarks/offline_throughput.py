"""Whole offline runs, ramp and tail included: total tokens a second of the runs that other engines were measured on.

    python benchmarks/offline_throughput.py                                  # all runs, on a GPU of 80 GB
    python benchmarks/offline_throughput.py 512-512 prefill --repetitions 1
    python benchmarks/offline_throughput.py --sharegpt sharegpt.csv          # with the two runs of that trace
    python benchmarks/offline_throughput.py 512-512 --requests 400           # a short one; no target applies

Llama-3-8B's shape with random weights in bfloat16, greedy, end-of-sequence ignored; 0.92 of the GPU's memory, at most
1,024 running requests and 2,048 rows an iteration. One process: weights, KV cache and CUDA graphs are made once, and
each repetition of each run gets a new scheduler on them. Before the first, 256 requests of 512 / 64 warm up. All runs
are in sequence; --set pipeline.plan=auto takes the plans that are stored.

Results are merged by run into benchmarks/results/offline_throughput.json after every repetition, so that a process that
is cut off loses none that was over. To try the script out on a CPU: --model configs/models/tiny-llama --requests 8; the
KV cache then has 256 MiB unless --set engine.kv_memory=... says otherwise.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nanoflow.bench import Bench, interrupts_of_a_bench
from nanoflow.bench_report import BenchReport, Repetition, make_bench_report
from nanoflow.config import RunConfig, load_config
from nanoflow.devices import choose_device
from nanoflow.errors import UserError
from nanoflow.loading import build_engine, open_model
from nanoflow.report import SCHEMA_VERSION
from nanoflow.search.files import replace_file

RESULTS = Path(__file__).parent / "results" / "offline_throughput.json"
MODEL = Path(__file__).parents[1] / "configs" / "models" / "llama-3-8b"
GPU = "NVIDIA H100 80GB HBM3"
"""What the targets, and the figures of the other engine, are for."""
WARM_UP = {"input_len": 512, "output_len": 64, "requests": 256}


@dataclass(frozen=True)
class Run:
    """One workload, and what is known of it. Throughputs in total tokens a second on `GPU`."""

    synthetic: dict[str, int] | None
    """None: the first 2,000 requests of the ShareGPT trace, inputs cut at 3,000 tokens and outputs at 1,024."""
    target: int
    vllm: int
    order: str = "input"
    note: str = ""
    """On the other engine's figure."""


RUNS = {
    "512-512": Run({"input_len": 512, "output_len": 512, "requests": 1600}, 23_500, 20_729),
    "1024-512": Run({"input_len": 1024, "output_len": 512, "requests": 1000}, 22_500, 20_667),
    "512-1024": Run({"input_len": 512, "output_len": 1024, "requests": 800}, 17_000, 14_717),
    "sharegpt": Run(None, 24_000, 22_401),
    "sharegpt-longest": Run(None, 25_500, 22_401, "longest-first", "in the order of the trace"),
    "prefill": Run({"input_len": 512, "output_len": 1, "requests": 1024}, 41_000, 39_000, note="about"),
}
VLLM_VERSION = "0.23.0"
VLLM_SOURCE = (
    "measured on the same GPU model, with max_num_seqs 1024, max_num_batched_tokens 2048, gpu_memory_utilization 0.92"
)


def config_of(workload: dict[str, Any], order: str, arguments: argparse.Namespace) -> RunConfig:
    """The configuration of one run; raises ConfigError."""
    on_cpu = choose_device("auto").type == "cpu"
    overrides = {
        "model": {"path": str(arguments.model.absolute()), "weights": "random", "dtype": "auto"},
        "workload": workload,
        "sampling": {"temperature": 0.0},
        "engine": {
            "device": "auto",
            "max_batch_tokens": 2048,
            "max_running": 1024,
            "kv_memory": "256MiB" if on_cpu else 0.92,
            "order": order,
        },
        "pipeline": {"plan": "sequential"},
    }
    given = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
    return load_config("synthetic-8b", [*given, *arguments.overrides])


def workload_of(run: Run, sharegpt: Path | None) -> dict[str, Any]:
    if run.synthetic is not None:
        return {"synthetic": run.synthetic}
    assert sharegpt is not None
    return {"trace": {"path": str(sharegpt.absolute()), "first": 2000, "max_input": 3000, "max_output": 1024}}


def comparable(report: BenchReport, requests: int | None) -> bool:
    """Whether the target, and the other engine's figure, are of the same run."""
    return report.device == GPU and report.model == MODEL.name and report.dtype == "bfloat16" and requests is None


def entry_of(name: str, report: BenchReport, requests: int | None) -> dict[str, Any]:
    """What is recorded of a run."""
    run, entry = RUNS[name], asdict(report)
    config = entry["config"]
    for section in ("output", "report", "metrics"):  # the script writes none of these
        del config[section]
    for place in (config["model"], config["workload"].get("trace", {})):
        if "path" in place:
            place["path"] = Path(place["path"]).name  # where it lies on this machine tells others nothing
    median = report.figures["total_tokens_per_second"].median
    for repetition in entry["repetitions"]:
        one = repetition["report"]
        for key in ("timeline", "goodput", "schema_version"):
            del one[key]
        for value in one.values():
            if isinstance(value, dict):
                value.pop("curve", None)
    vllm = {"version": VLLM_VERSION, "total_tokens_per_second": run.vllm, "source": VLLM_SOURCE, "note": run.note}
    same = comparable(report, requests)
    return {
        "total_tokens_per_second": round(median, 1),
        "target": run.target,
        "target_met": median >= run.target if same else None,
        "vllm": vllm,
        "ratio_to_vllm": round(median / run.vllm, 4) if same else None,
        "first_requests_only": requests,
        **entry,
    }


def save(path: Path, name: str, entry: dict[str, Any]) -> None:
    """Put a run into the file, in the place of an older one of that name; the others stay."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        content = {}
    content["what"] = "whole runs, ramp and tail included; total tokens are prompt and output tokens"
    content["report_schema_version"] = SCHEMA_VERSION
    runs = content.get("runs", {}) | {name: entry}
    content["runs"] = {known: runs[known] for known in RUNS if known in runs}
    replace_file(path, json.dumps(content, indent=1) + "\n")


def table_of(entries: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="total tokens/s of whole runs")
    for column in ("run", "median", "each", "steady state", "idle, steady", "padding", "J/token"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for column in ("target", f"vLLM {VLLM_VERSION}", "ratio"):
        table.add_column(column, justify="right")
    for name, entry in entries.items():
        figures, steady = entry["figures"], entry["steady_figures"]

        def of(values: dict[str, Any], key: str, form: str) -> str:
            return format(values[key]["median"], form) if key in values else "-"

        verdict = {True: "met", False: "missed", None: "-"}[entry["target_met"]]
        ratio = entry["ratio_to_vllm"]
        table.add_row(
            name,
            f"{entry['total_tokens_per_second']:,.0f}",
            ", ".join(f"{value:,.0f}" for value in figures["total_tokens_per_second"]["each"]),
            of(steady, "total_tokens_per_second", ",.0f"),
            of(steady, "device_idle_share", ".2%"),
            of(figures, "padding_share", ".1%"),
            of(figures, "joules_per_token", ".4f"),
            f"{entry['target']:,} {verdict}",
            f"{entry['vllm']['total_tokens_per_second']:,}",
            "-" if ratio is None else f"{ratio:.3f}",
        )
    return table


def chosen(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> list[str]:
    """Names of the runs to make, in the order of `RUNS`."""
    if unknown := [name for name in arguments.names if name not in RUNS]:
        parser.error(f"no run {unknown[0]!r}; there are {', '.join(RUNS)}")
    names = [name for name in RUNS if name in arguments.names or not arguments.names]
    if arguments.sharegpt is None and (left := [name for name in names if RUNS[name].synthetic is None]):
        print(f"left out: {', '.join(left)}; name the trace with --sharegpt CSV", file=sys.stderr)
        names = [name for name in names if name not in left]
    return names


def measure(names: Sequence[str], arguments: argparse.Namespace) -> tuple[dict[str, dict[str, Any]], int | None]:
    """Run them; what is recorded of each, and the signal that ended it early."""
    configs = {n: config_of(workload_of(RUNS[n], arguments.sharegpt), RUNS[n].order, arguments) for n in names}
    warm = config_of({"synthetic": WARM_UP}, "input", arguments)
    entries: dict[str, dict[str, Any]] = {}
    with interrupts_of_a_bench() as interrupts:
        started = time.perf_counter()
        model = open_model(warm.model, warm.engine)
        engine = build_engine(model, warm.engine, warm.pipeline, weights=warm.model.weights)
        load_seconds = time.perf_counter() - started
        print(f"loaded in {load_seconds:.1f} s: {engine.scheduler.sizes}", file=sys.stderr, flush=True)
        with Bench(model, engine, load_seconds=load_seconds, interrupts=interrupts, quiet=True) as running:
            interrupts.drain()
            warm_up = running.warm_up(warm, min(WARM_UP["requests"], arguments.requests or WARM_UP["requests"]))
            for name, config in configs.items():
                done: list[Repetition] = []
                while len(done) < arguments.repetitions and interrupts.signal is None:
                    repetition = running.repeat(config, arguments.requests)
                    if repetition is None:
                        break
                    done.append(repetition)
                    report = make_bench_report(done, asked=arguments.repetitions, warm_up=warm_up, device=model.device)
                    entries[name] = entry_of(name, report, arguments.requests)
                    save(arguments.out, name, entries[name])
                    rate = f"{repetition.report.total_tokens_per_second:,.0f} total tokens/s"
                    which = f"{name}, {len(done)} of {arguments.repetitions}"
                    print(f"{which}: {rate} in {repetition.report.seconds:.1f} s", file=sys.stderr, flush=True)
            interrupts.drained()
    return entries, interrupts.signal


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="RUN", help=f"of {', '.join(RUNS)}; all if none is named")
    parser.add_argument("--sharegpt", type=Path, metavar="CSV", help="the trace of the sharegpt runs")
    parser.add_argument("--requests", type=positive, help="only the first so many of each run")
    parser.add_argument("--repetitions", type=positive, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="JSON")
    parser.add_argument("--model", type=Path, default=MODEL, help="folder with a config.json")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    args = parser.parse_args(arguments)
    names = chosen(parser, args)
    try:
        entries, signal = measure(names, args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console()
    console.width = max(console.width, 130)  # the table is of no use folded
    if entries:
        console.print(table_of(entries))
        print(f"saved {args.out}")
    return 0 if signal is None else 128 + signal


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
