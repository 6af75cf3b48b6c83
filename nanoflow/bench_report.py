"""What a bench found: its repetitions, and the median and spread of every figure over them."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from nanoflow.devices import hardware
from nanoflow.errors import OutputError
from nanoflow.report import Percentiles, RunReport, versions
from nanoflow.search.cost_model import Ceilings
from nanoflow.search.files import replace_file
from nanoflow.steady_state import Stretch

__all__ = ["BenchReport", "Repetition", "Spread", "WarmUp", "make_bench_report"]

SCHEMA_VERSION = 1
"""Of the JSON. It grows when a key that readers need is added, renamed or given another meaning."""

SHARED = ("model", "device", "dtype", "plan", "plan_text", "plan_timeline", "sizes", "config", "versions", "ceilings")
"""What the reports of all repetitions say alike; it stands in the bench's report once, or not at all."""


@dataclass(frozen=True)
class Repetition:
    """One run of the whole workload."""

    report: RunReport
    whole: Stretch
    steady: Stretch | None
    """None if the run had no steady state (see `nanoflow.steady_state`)."""
    course: Sequence[Stretch] = ()
    """The run in some stretches, one after the other."""

    @property
    def figures(self) -> dict[str, float]:
        """What is told of the whole run, as far as it was measured."""
        report = self.report
        values: dict[str, float | None] = {
            **self.whole.figures,
            **_reached(self.whole, report.all_ceilings),
            "seconds": report.seconds,
            "total_tokens_per_second": report.total_tokens_per_second,
            "output_tokens_per_second": report.output_tokens_per_second,
            "requests_per_second": report.requests_per_second,
            "preemptions": report.preemptions,
            "joules_per_token": None if report.energy is None else report.energy.joules_per_token,
            **_percentiles("time_to_first_token", report.time_to_first_token_ms),
            **_percentiles("inter_token", report.inter_token_ms),
        }
        return {name: value for name, value in values.items() if value is not None}

    @property
    def steady_figures(self) -> dict[str, float]:
        """The same of its steady state, as far as it has meaning there; empty if there was none."""
        if self.steady is None:
            return {}
        values = {**self.steady.figures, **_reached(self.steady, self.report.all_ceilings)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Spread:
    """A figure over the repetitions."""

    median: float
    spread: float
    """From the least to the most, over the median."""
    each: list[float]
    """In the order of the repetitions."""

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        median = statistics.median(values)
        return cls(median, (max(values) - min(values)) / abs(median) if median else 0.0, list(values))


@dataclass(frozen=True)
class WarmUp:
    """What ran before anything was measured."""

    requests: int
    seconds: float


@dataclass(frozen=True)
class BenchReport:
    """Everything that a bench's table and its JSON say."""

    schema_version: int
    finished_at: str
    """UTC, ISO 8601."""
    repetitions_asked: int
    """As many as `repetitions`, unless a signal ended the bench."""
    requests: int
    """Of one repetition, error records included."""
    errors: int
    input_tokens: int
    output_tokens: int
    warm_up: WarmUp
    load_seconds: float
    figures: dict[str, Spread]
    """Of the whole run, ramp and tail included."""
    steady_figures: dict[str, Spread]
    """Of the steady state; empty unless every repetition had one."""
    repetitions: list[dict[str, Any]]
    """Each one's ``report`` (without what is the same in all), ``whole``, ``steady`` and ``course``."""
    ceilings: Ceilings
    """Of one device, but for the power limit, which is that of all."""
    model: str
    device: str
    """Where the job ran, and how it was spread over several of these."""
    dtype: str
    plan: str
    sizes: dict[str, int]
    hardware: dict[str, Any]
    versions: dict[str, str]
    config: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write it as JSON, in the place of what is there; raises OutputError."""
        data = asdict(self)
        repetitions = ",\n    ".join(json.dumps(repetition) for repetition in data.pop("repetitions"))
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in data.items()]
        lines.append(f'  "repetitions": [\n    {repetitions}\n  ]')
        try:
            replace_file(path, "{\n" + ",\n".join(lines) + "\n}\n")
        except OSError as error:
            raise OutputError(f"{path}: the result cannot be written: {error.strerror}; choose another --out") from None

    def print(self, console: Console) -> None:
        """Print the figures as a table, and what stands behind them."""
        title = f"{self.model} on {self.device}, {self.dtype}, plan {self.plan}"
        count = len(self.repetitions)
        table = Table(title=f"{title}: {self.requests:,} requests, {count} of {self.repetitions_asked} repetitions")
        table.add_column("", no_wrap=True)
        table.add_column("whole run", justify="right")
        table.add_column("each repetition (spread)" if count > 1 else "", justify="right")
        table.add_column("steady state", justify="right")
        for key, label, text in ROWS:
            whole, steady = self.figures.get(key), self.steady_figures.get(key)
            if whole is None and steady is None:
                continue
            each = "" if whole is None else f"{', '.join(map(text, whole.each))} ({whole.spread:.1%})"
            table.add_row(label, _median(whole, text), each if count > 1 else "", _median(steady, text))
        console.print(table)
        for line in self.notes():
            console.print(line, highlight=False)

    def notes(self) -> list[str]:
        """What the table's reader has to know."""
        ceilings = self.ceilings
        rates = f"{ceilings.flops / 1e12:,.3g} TFLOP/s, {ceilings.bytes_per_second / 1e9:,.4g} GB/s"
        if ceilings.link_bytes_per_second:
            rates += f", {ceilings.link_bytes_per_second / 1e9:,.4g} GB/s on the wire"
        limit = f", {ceilings.power_limit_watts:,.0f} W" if ceilings.power_limit_watts else ""
        notes = [
            f"{self.input_tokens:,} tokens in and {self.output_tokens:,} out a repetition, after "
            f"{self.load_seconds:.1f} s of loading and {self.warm_up.requests:,} requests of warm-up",
            f"ceilings measured here: {rates}{limit}",
        ]
        if not self.steady_figures:
            notes.append("no steady state: the KV cache was not in full use for long while requests waited")
        if self.errors:
            notes.append(f"{self.errors:,} of the requests are error records; `nanoflow run` says why")
        return notes


def make_bench_report(
    repetitions: Sequence[Repetition], *, asked: int, warm_up: WarmUp, device: torch.device
) -> BenchReport:
    """Sum up at least one repetition of one job."""
    last = repetitions[-1].report
    kept = []
    for repetition in repetitions:
        one = asdict(repetition)
        for key in SHARED:
            del one["report"][key]
        kept.append(one)
    return BenchReport(
        schema_version=SCHEMA_VERSION,
        finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
        repetitions_asked=asked,
        requests=last.requests,
        errors=last.errors,
        input_tokens=last.input_tokens,
        output_tokens=last.output_tokens,
        warm_up=warm_up,
        load_seconds=last.load_seconds,
        figures=_spreads([repetition.figures for repetition in repetitions]),
        steady_figures=_spreads([repetition.steady_figures for repetition in repetitions]),
        repetitions=kept,
        ceilings=last.ceilings,
        model=last.model,
        device=last.on,
        dtype=last.dtype,
        plan=last.plan,
        sizes=last.sizes,
        hardware=hardware(device),
        versions=versions(),
        config=last.config,
    )


def _spreads(each: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    """Of the figures that all of them have."""
    return {name: Spread.of([one[name] for one in each]) for name in each[0] if all(name in one for one in each)}


def _reached(stretch: Stretch, ceilings: Ceilings) -> dict[str, float]:
    return {f"reached_{resource}": share for resource, share in stretch.reached(ceilings).items()}


def _percentiles(name: str, values: Percentiles | None) -> dict[str, float]:
    return {} if values is None else {f"{name}_{p}_ms": getattr(values, p) for p in ("p50", "p90", "p99")}


def _median(spread: Spread | None, text: Callable[[float], str]) -> str:
    return "" if spread is None else text(spread.median)


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _percent(value: float) -> str:
    return f"{value:.1%}"


ROWS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("total_tokens_per_second", "total tokens/s", _whole),
    ("output_tokens_per_second", "output tokens/s", _whole),
    ("seconds", "seconds", _digits),
    *(
        (f"{name}_{p}_ms", f"{label}, {p}, ms", _digits)
        for name, label in (("time_to_first_token", "first token"), ("inter_token", "between tokens"))
        for p in ("p50", "p90", "p99")
    ),
    ("iterations", "iterations", _whole),
    ("iteration_ms", "an iteration, ms", _digits),
    ("host_ms", "host: form and launch one, ms", _digits),
    ("mean_rows", "rows of an iteration", _whole),
    ("padding_share", "padding rows", _percent),
    ("preemptions", "preemptions", _whole),
    ("executor_busy_share", "executor busy", _percent),
    ("device_idle_share", "device idle between iterations", lambda share: f"{share:.2%}"),
    ("tflops", "TFLOP/s while busy", _digits),
    ("gbytes_per_second", "GB/s while busy", _digits),
    ("watts", "watts", _whole),
    ("joules_per_token", "joules a token", _digits),
    *((f"reached_{name}", f"of the {name} bound", _percent) for name in ("compute", "memory", "network", "power")),
)
"""Key, what the table calls it, and how it is written."""
