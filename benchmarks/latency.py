"""Latency against throughput: one job at several rates of arrival.

    python benchmarks/latency.py configs/latency.yaml --rates 0.25 0.5 1 2 inf
    python benchmarks/latency.py JOB --rates 1 2 4 --burstiness 0.5 --set workload.synthetic.requests=500

Every rate is a run of its own, with requests that arrive as a Poisson process (or, with --burstiness, a gamma process)
of that rate; `inf` has all of them at the start. Prints a table and saves every report's numbers to
benchmarks/results/latency.json, and a picture beside it. The objective for the goodput is the job's `report.slo`.

The normalised latency of a request is the time from its arrival to its last token over its output tokens, as in the
Orca, vLLM and NanoFlow papers. A rate that the machine cannot hold shows itself: the queue grows for as long as the job
lasts, so its latencies are those of this number of requests, and more requests would make them worse.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nanoflow.config import load_config
from nanoflow.devices import processor_name
from nanoflow.report import Percentiles, RunReport
from nanoflow.runner import run

RESULTS = Path(__file__).parent / "results"
LATENCIES = {
    "normalised_latency_ms": "normalised latency (ms/token)",
    "time_to_first_token_ms": "time to first token (ms)",
    "time_per_output_token_ms": "time per output token (ms)",
    "end_to_end_ms": "arrival to end (ms)",
}


def rate(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is no rate: requests a second, or inf")
    return value


def run_at(job: str, overrides: Sequence[str], requests_per_second: float, burstiness: float, seed: int) -> RunReport:
    """The report of the job at one rate; its results go to a folder that is thrown away."""
    arrival = "none"
    if requests_per_second != float("inf"):
        gamma = {"rate": requests_per_second, "burstiness": burstiness}
        arrival = json.dumps({"gamma": gamma, "seed": seed})
    with tempfile.TemporaryDirectory() as folder:
        output = f"output.path={folder}/run.jsonl"
        outcome = run(load_config(job, [*overrides, f"workload.arrival={arrival}", output]), quiet=True)
    if outcome.signal is not None:
        raise SystemExit(128 + outcome.signal)
    assert outcome.report is not None, "a run into an empty folder has something to do"
    return outcome.report


def describe(report: RunReport, requests_per_second: float) -> dict[str, Any]:
    """The numbers of one rate, as they are recorded."""
    return {
        "rate": requests_per_second if requests_per_second != float("inf") else "inf",
        "requests_per_second": round(report.requests_per_second, 4),
        "output_tokens_per_second": round(report.output_tokens_per_second, 2),
        "completed": report.completed,
        "errors": report.errors,
        "seconds": round(report.seconds, 2),
        "mean_batch_tokens": round(report.mean_batch_tokens, 1),
        "goodput": None
        if report.goodput is None
        else {"share": report.goodput.share, "requests_per_second": round(report.goodput.requests_per_second, 4)},
        **{name: numbers(getattr(report, name)) for name in LATENCIES},
    }


def numbers(percentiles: Percentiles | None) -> dict[str, float] | None:
    if percentiles is None:
        return None
    return {name: round(getattr(percentiles, name), 2) for name in ("mean", "p50", "p90", "p99")}


def table(points: Sequence[dict[str, Any]]) -> Table:
    made = Table(title="p50 / p90 / p99 in ms; rates in requests a second")
    for column in (
        "rate",
        "reached",
        "tokens/s",
        "normalised, mean",
        "normalised",
        "first token",
        "per token",
        "goodput",
    ):
        made.add_column(column, justify="right")
    for point in points:
        goodput = point["goodput"]
        made.add_row(
            str(point["rate"]),
            f"{point['requests_per_second']:.2f}",
            f"{point['output_tokens_per_second']:,.0f}",
            f"{point['normalised_latency_ms']['mean']:,.0f}",
            *(three(point[name]) for name in list(LATENCIES)[:3]),
            "-" if goodput is None else f"{goodput['requests_per_second']:.2f} ({goodput['share']:.0%})",
        )
    return made


def three(percentiles: dict[str, float] | None) -> str:
    return "-" if percentiles is None else " / ".join(f"{percentiles[p]:,.0f}" for p in ("p50", "p90", "p99"))


def draw(points: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """The latencies against the rate reached, and the goodput against the rate asked for."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 6.5), layout="constrained")
    reached = [point["requests_per_second"] for point in points]
    for axis, name in zip(axes.flat, list(LATENCIES)[:3], strict=False):
        for percentile, marker in (("p50", "o"), ("p90", "s"), ("p99", "^")):
            values = [point[name][percentile] if point[name] else float("nan") for point in points]
            axis.plot(reached, values, marker=marker, label=percentile)
        axis.set(xlabel="requests/s completed", ylabel=LATENCIES[name], ylim=(0, None), xlim=(0, None))
        axis.legend()
    axis = axes.flat[3]
    finite = [point for point in points if point["rate"] != "inf"]
    asked = [point["rate"] for point in finite]
    axis.plot(asked, [point["requests_per_second"] for point in finite], marker="o", label="completed")
    if finite and finite[0]["goodput"] is not None:
        within = [point["goodput"]["requests_per_second"] for point in finite]
        axis.plot(asked, within, marker="s", label="within the objective")
    axis.axline((0, 0), slope=1, color="0.7", linewidth=1, zorder=0)
    axis.set(xlabel="requests/s arriving", ylabel="requests/s", ylim=(0, None), xlim=(0, None))
    axis.legend()
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", help="a run's YAML, or the name of a shipped one")
    parser.add_argument("--rates", type=rate, nargs="+", required=True, help="requests a second, or inf")
    parser.add_argument("--burstiness", type=float, default=1.0, help="1: Poisson; below 1: in bursts; above: regular")
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--out", type=Path, default=RESULTS / "latency.json")
    arguments = parser.parse_args()
    console = Console()
    console.width = max(console.width, 130)  # the table is of no use folded
    points = []
    load = os.getloadavg()
    for requests_per_second in arguments.rates:
        report = run_at(arguments.job, arguments.overrides, requests_per_second, arguments.burstiness, arguments.seed)
        points.append(describe(report, requests_per_second))
        console.print(
            f"{requests_per_second:g} requests/s: {report.completed} completed in {report.seconds:.0f} s, "
            f"{report.output_tokens_per_second:.0f} output tokens/s"
        )
    config = report.config
    for name in ("output", "metrics"):
        config.pop(name, None)
    config["workload"].pop("arrival", None)
    record = {
        "what": "one run of the job for each rate; latencies in milliseconds from a request's arrival",
        "hardware": {"device": report.device, "processor": processor_name(), "cores": os.cpu_count()},
        "load_average_before": [round(value, 2) for value in load],
        "versions": {**report.versions, "numpy": version("numpy")},
        "repetitions": 1,
        "burstiness": arguments.burstiness,
        "arrival_seed": arguments.seed,
        "model": report.model,
        "dtype": report.dtype,
        "config": config,
        "points": points,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    console.print(table(points))
    picture = arguments.out.with_suffix(".png")
    draw(points, f"{report.model} on {report.device}, {points[0]['completed']} requests a rate", picture)
    console.print(f"{arguments.out}, {picture}")


if __name__ == "__main__":
    main()
