"""How long the scheduler takes to form a dense batch, and what the batches of whole runs look like and would take.

    python -m benchmarks.scheduler                       # prints a table and saves benchmarks/results/scheduler.json
    python -m benchmarks.scheduler --trace sharegpt.csv  # adds runs of the first 2,000 requests of a length trace
    python -m benchmarks.scheduler --run 512-512         # this one alone

No model runs: every token is 0, every request reaches its length, and one iteration is in flight. The KV cache has the
464,080 tokens that an H100 has beside Llama-3-8B. A run is cut into ramp (until the KV cache is in full use), steady
state, and tail (from when all that still waits fits, so that the last prompts come in at once). The ideal number of
iterations is what a KV cache in full use from the first iteration to the last would need.

What a run would take on an H100 with Llama-3-8B is predicted by `benchmarks.iteration_time`, rows padded as for CUDA
graphs. The time beyond the ideal of the same work is told by cause and by part of the run.
"""

import argparse
import csv
import json
import os
import platform
from collections.abc import Sequence as Many
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.iteration_time import Iterations, IterationTime
from nanoflow.pipeline.cuda_executor import buckets
from nanoflow.rehearsal import Rehearsal, least_iterations, rehearsal_scheduler
from nanoflow.sampling_params import SamplingParams
from nanoflow.search.cost_model import work_of
from nanoflow.sequence import Sequence

KV_TOKENS = 464_080
PAGE_SIZE = 128
BUCKETS = buckets(2048)
"""Row counts that a CUDA graph is captured for."""
RUNS = {
    "512-512": [(512, 512)] * 1600,
    "1024-512": [(1024, 512)] * 1000,
    "512-1024": [(512, 1024)] * 800,
    "prefill": [(512, 1)] * 1024,
}


@dataclass(frozen=True, eq=False)
class Series:
    """What was formed, one entry an iteration."""

    rows: np.ndarray
    padded: np.ndarray
    decode: np.ndarray
    context: np.ndarray
    pairs: np.ndarray
    sampled: np.ndarray
    kv_share: np.ndarray
    paced: np.ndarray
    form_seconds: np.ndarray
    update_seconds: np.ndarray
    ideal: float
    preemptions: int

    @property
    def work(self) -> Iterations:
        return Iterations(self.rows, self.padded, self.context, self.pairs, self.sampled)

    @property
    def steady(self) -> slice:
        """From the first iteration with the KV cache as full as it gets, until prompts are no longer held back."""
        if not self.paced.any():
            return slice(0, int(np.flatnonzero(self.rows > self.decode)[-1]) + 1)
        start = int(np.argmax(self.kv_share >= 0.97 * self.kv_share[self.paced].max()))
        free = np.flatnonzero(~self.paced[start:])
        return slice(start, start + int(free[0]) if len(free) else len(self.rows))

    def successive_change(self) -> np.ndarray:
        """Relative change of rows from one steady-state batch to the next."""
        rows = self.rows[self.steady].astype(float)
        return np.abs(np.diff(rows)) / rows[:-1]


def simulate(
    lengths: Many[tuple[int, int]],
    kv_tokens: int = KV_TOKENS,
    max_batch_tokens: int = 2048,
    max_running: int = 1024,
    iterations: int | None = None,
    row_buckets: Many[int] = (),
) -> Series:
    """Runs requests of (input, output) tokens through a scheduler, to the end or for some iterations."""
    longest = max(a + b for a, b in lengths)
    scheduler = rehearsal_scheduler(
        kv_tokens=kv_tokens,
        page_size=PAGE_SIZE,
        max_batch_tokens=max_batch_tokens,
        max_running=max_running,
        max_model_len=longest,
        row_buckets=row_buckets,
    )
    kv = scheduler.kv
    params = {b: SamplingParams(max_tokens=b, ignore_eos=True) for _, b in lengths}
    tokens = np.zeros(longest, np.int32)
    for index, (prompt, output) in enumerate(lengths):
        scheduler.add(Sequence(index, tokens[:prompt], params[output], seed=index))
    series: list[tuple[float, ...]] = []
    rehearsal = Rehearsal(scheduler)
    while scheduler.unfinished and (iterations is None or len(series) < iterations):
        waiting = scheduler.waiting > 0
        formed = rehearsal.step()
        if formed is not None:
            work = work_of(formed.batch)
            series.append(
                (
                    work.rows,
                    formed.batch.rows,
                    work.decode_rows,
                    work.decode_context,
                    work.prefill_pairs,
                    work.sampled_rows,
                    formed.kv_pages / kv.usable_pages,
                    waiting and scheduler.paced,
                    formed.form_seconds,
                    formed.update_seconds,
                )
            )
    ideal = least_iterations(lengths, kv, max_batch_tokens, max_running)
    columns = [np.array(column) for column in zip(*series, strict=True)]
    return Series(*columns, ideal=ideal, preemptions=scheduler.preemptions)


def describe(series: Series) -> dict[str, Any]:
    steady = series.steady
    rows = series.rows[steady]
    change = series.successive_change()
    return {
        "iterations": len(series.rows),
        "ideal_iterations": round(series.ideal),
        "ramp_iterations": steady.start,
        "ramp_mean_rows": round(float(series.rows[: max(1, steady.start)].mean())),
        "steady_iterations": len(rows),
        "steady_rows": {"min": int(rows.min()), "mean": round(float(rows.mean())), "max": int(rows.max())},
        "steady_running": round(float(series.decode[steady].mean())),
        "steady_kv_share": round(float(series.kv_share[steady].mean()), 4),
        "successive_change": {
            "median": round(float(np.median(change)), 4) if len(change) else 0.0,
            "p99": round(float(np.quantile(change, 0.99)), 4) if len(change) else 0.0,
            "max": round(float(change.max()), 4) if len(change) else 0.0,
        },
        "tail_iterations": len(series.rows) - steady.stop,
        "tail_mean_rows": round(float(series.rows[steady.stop :].mean())) if steady.stop < len(series.rows) else 0,
        "preemptions": series.preemptions,
        "form_ms": milliseconds(series.form_seconds),
        "update_ms": milliseconds(series.update_seconds),
    }


def predict(series: Series, tokens: int, model: IterationTime) -> dict[str, Any]:
    """What a run of `tokens` input and output tokens would take, and why longer than the ideal."""
    work, steady = series.work, series.steady
    seconds, padding, small = model.seconds(work), model.padding(work), model.small_batches(work)
    ideal = model.ideal(work, series.ideal)
    total = float(seconds.sum())
    parts = {"ramp": slice(0, steady.start), "steady": steady, "tail": slice(steady.stop, None)}
    return {
        "seconds": round(total, 2),
        "tokens_per_second": round(tokens / total),
        "ideal_seconds": round(ideal, 2),
        "ideal_tokens_per_second": round(tokens / ideal),
        "padding_share": round(float(1 - series.rows.sum() / series.padded.sum()), 4),
        "seconds_beyond_ideal": {
            "iterations": round((len(seconds) - series.ideal) * model.head, 2),
            **{
                cause: {part: round(float(each[where].sum()), 2) for part, where in parts.items()}
                for cause, each in (("padding", padding), ("small batches", small))
            },
        },
    }


def milliseconds(seconds: np.ndarray) -> dict[str, float]:
    return {
        "median": round(float(np.median(seconds)) * 1e3, 3),
        "p99": round(float(np.quantile(seconds, 0.99)) * 1e3, 3),
    }


def time_forming(repetitions: int) -> list[dict[str, Any]]:
    """Batches of 2,048 rows with about 1,000 running, prompts waiting: admission and pacing are at work."""
    results = []
    for _ in range(repetitions):
        series = simulate([(537, 512)] * 3000, kv_tokens=900_000, max_running=1100, iterations=1500)
        chosen = (series.rows == 2048) & (np.abs(series.decode - 1000) < 50)
        results.append(
            {
                "batches": int(chosen.sum()),
                "rows": 2048,
                "mean_running": round(float(series.decode[chosen].mean())),
                "form_ms": milliseconds(series.form_seconds[chosen]),
                "update_ms": milliseconds(series.update_seconds[chosen]),
            }
        )
    return results


def read_trace(path: Path, first: int, max_input: int, max_output: int) -> list[tuple[int, int]]:
    with path.open(newline="") as file:
        rows = [(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in csv.DictReader(file)]
    return [(min(max(a, 1), max_input), min(max(b, 1), max_output)) for a, b in rows[:first]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="CSV with the columns ContextTokens and GeneratedTokens")
    parser.add_argument("--run", action="append", help="only this run, several times for several")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "scheduler.json")
    arguments = parser.parse_args()
    runs = dict(RUNS)
    if arguments.trace is not None:
        trace = read_trace(arguments.trace, 2000, 3000, 1024)
        runs["trace"] = trace
        runs["trace-longest"] = sorted(trace, key=lambda lengths: (-lengths[1], -lengths[0]))
    if unknown := set(arguments.run or ()) - set(runs):
        parser.error(f"--run: no run is called {sorted(unknown)[0]}; there are {', '.join(runs)}")
    runs = {name: lengths for name, lengths in runs.items() if not arguments.run or name in arguments.run}
    model = IterationTime()
    forming = time_forming(arguments.repetitions)
    for result in forming:
        form, update = result["form_ms"], result["update_ms"]
        print(f"2,048 rows, {result['mean_running']} running, milliseconds: form {form}, update {update}")
    described = {}
    for name, lengths in runs.items():
        series = simulate(lengths, row_buckets=BUCKETS)
        described[name] = run = describe(series)
        run["predicted"] = predicted = predict(series, sum(map(sum, lengths)), model)
        print(
            f"{name}: {run['iterations']} iterations (ideal {run['ideal_iterations']}; ramp {run['ramp_iterations']}, "
            f"tail {run['tail_iterations']}), steady rows {run['steady_rows']}, KV {run['steady_kv_share']:.1%}, "
            f"successive change {run['successive_change']}, {run['preemptions']} preemptions\n"
            f"    predicted: {predicted['seconds']} s, {predicted['tokens_per_second']:,} tokens/s "
            f"(ideal {predicted['ideal_tokens_per_second']:,}), padding {predicted['padding_share']:.1%}, "
            f"seconds beyond the ideal {predicted['seconds_beyond_ideal']}"
        )
    record = {
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "config": {
            "kv_tokens": KV_TOKENS,
            "page_size": PAGE_SIZE,
            "max_batch_tokens": 2048,
            "max_running": 1024,
            "buckets": BUCKETS,
        },
        "iteration_time": asdict(model),
        "trace": arguments.trace.name if arguments.trace is not None else None,
        "repetitions": arguments.repetitions,
        "forming": forming,
        "runs": described,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
