"""What watching a run costs: microseconds an iteration, for the recorder, the time series and the Prometheus metrics.

Iterations are made up: 20 ms long, with the given number of decoding sequences, all of which received a token. Adding a
finished request to the recorder is measured too, and the memory that a million of them take. Of the repetitions the
least counts: what else runs on the machine only ever adds.

    python benchmarks/monitoring.py [--iterations 20000] [--repetitions 5] [--out FILE]
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nanoflow.devices import processor_name
from nanoflow.metrics import RunMetrics
from nanoflow.outputs import Completion, RequestOutput, RequestTiming
from nanoflow.recording import IterationRecord, Recorder
from nanoflow.sampling_params import SamplingParams
from nanoflow.series import SeriesWriter

SECONDS = 0.02


def records(count: int, sequences: int) -> list[IterationRecord]:
    """`count` iterations one after the other; every tenth has a few sequences that sat out the one before."""
    each = []
    for number in range(count):
        gaps = {SECONDS: sequences - 3, 2 * SECONDS: 3} if number % 10 == 0 else {SECONDS: sequences}
        at = SECONDS * (number + 1)
        each.append(
            IterationRecord(at, SECONDS * 0.99, sequences, 700, 0, sequences, 100, 500, 1000, 0, sequences, gaps)
        )
    return each


def finished_request() -> RequestOutput:
    """A request of 100 prompt tokens and 100 output tokens."""
    completion = Completion(0, "", [1] * 100, "length")
    return RequestOutput(None, [1] * 100, [completion], SamplingParams(), RequestTiming(0.0, 1.0, 2.0))


def per_call(calls: list[Any], run: Callable[[Any], object]) -> float:
    """Microseconds a call."""
    started = time.perf_counter()
    for call in calls:
        run(call)
    return (time.perf_counter() - started) / len(calls) * 1e6


def measure(iterations: int, sequences: int, folder: Path) -> dict[str, float]:
    """Microseconds an iteration of each part."""
    made = records(iterations, sequences)
    plain = Recorder(started=0.0)
    with_series = Recorder(started=0.0)
    series = SeriesWriter(folder / "s.jsonl", with_series, width=1.0, kv_capacity=1000, fresh=True)
    metrics = RunMetrics()
    recorder = per_call(made, plain.observe)
    both = per_call(made, with_series.observe)
    series.close()
    return {
        "recorder_us": recorder,
        "recorder_and_series_us": both,
        "metrics_us": per_call(made, metrics.observe),
        "finished_request_us": per_call([finished_request()] * 5000, plain.add),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=20000)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for sequences in (16, 256, 1024):
            each = [measure(arguments.iterations, sequences, Path(folder)) for _ in range(arguments.repetitions)]
            results.append({"sequences": sequences, **{name: round(min(x[name] for x in each), 2) for name in each[0]}})
            print(results[-1])
    million = Recorder(started=0.0)
    request = finished_request()
    for _ in range(1_000_000):
        million.add(request)
    held = sum(column._values.nbytes for column in million._columns.values()) / 2**20
    print(f"a million requests: {held:.0f} MiB")
    record = {
        "benchmark": "monitoring",
        "machine": {"cpu": processor_name(), "cpus": os.cpu_count()},
        "python": platform.python_version(),
        "numpy": np.__version__,
        "iterations": arguments.iterations,
        "repetitions": arguments.repetitions,
        "least_of_repetitions": results,
        "million_requests_mib": round(held, 1),
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
