"""The numbers that runs are compared by: what they are called, how they are written, and which way is better."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nanoflow.report import Percentiles, RunReport

__all__ = [
    "LATENCIES",
    "NONE",
    "REPLICA_COLUMNS",
    "SUMMARY",
    "Figure",
    "Latency",
    "all_figures",
    "difference",
    "replica_rows",
    "write_number",
]

NONE = "\N{EN DASH}"
"""Stands where a run has no such number."""


@dataclass(frozen=True)
class Figure:
    """One number of a run."""

    key: str
    """Where the report has it: a field, or a field of a field, such as ``goodput.share``."""
    name: str
    unit: str = ""
    better: Literal["more", "less", "neither"] = "neither"
    often_zero: bool = False
    """Whether zero is so usual that it is not worth a line."""

    def of(self, report: RunReport) -> float | None:
        """The number, in the report's own unit; None if the run has none."""
        value: Any = report
        for name in self.key.split("."):
            value = getattr(value, name, None)
        return None if value is None else float(value)

    def worth_showing(self, reports: Sequence[RunReport]) -> bool:
        """Whether any of the runs has something to tell here."""
        values = [self.of(report) for report in reports]
        return any(values) if self.often_zero else any(value is not None for value in values)

    def text(self, report: RunReport) -> str:
        """The number as a reader wants it, without its unit."""
        value = self.of(report)
        if value is None:
            return NONE
        return f"{value * 100:.1f}" if self.unit == "%" else write_number(value)


SUMMARY = (
    Figure("output_tokens_per_second", "Output throughput", "tokens/s", "more"),
    Figure("total_tokens_per_second", "Total throughput", "tokens/s", "more"),
    Figure("requests_per_second", "Requests", "1/s", "more"),
    Figure("goodput.requests_per_second", "Goodput: requests within the objective", "1/s", "more"),
    Figure("goodput.share", "Share within the objective", "%", "more"),
    Figure("seconds", "Time", "s", "less"),
    Figure("load_seconds", "Loading", "s", "less"),
    Figure("completed", "Completed requests"),
    Figure("errors", "Error records", "", "less"),
    Figure("earlier", "Records of earlier executions", often_zero=True),
    Figure("input_tokens", "Prompt tokens"),
    Figure("output_tokens", "Output tokens"),
    Figure("iterations", "Iterations"),
    Figure("mean_batch_tokens", "Rows of an iteration, mean"),
    Figure("largest_batch_tokens", "Rows of an iteration, most"),
    Figure("padding_share", "Padding rows", "%", "less"),
    Figure("executor_busy_share", "Executor busy", "%", "more"),
    Figure("device_idle_share", "Device idle between iterations", "%", "less"),
    Figure("preemptions", "Preemptions", "", "less"),
    Figure("reached", "Reached of the bound", "%", "more"),
    Figure("energy.joules", "Energy", "J", "less"),
    Figure("energy.mean_watts", "Power, mean", "W"),
    Figure("energy.joules_per_token", "Energy of a token", "J", "less"),
)


@dataclass(frozen=True)
class Latency:
    """One distribution of times."""

    key: str
    name: str
    explanation: str

    def of(self, report: RunReport) -> Percentiles | None:
        """None if nothing of the run has such a time."""
        found: Percentiles | None = getattr(report, self.key)
        return found

    @property
    def figures(self) -> tuple[Figure, ...]:
        """Mean and percentiles."""
        labels = {"mean": "mean", "p50": "median", "p90": "90% within", "p99": "99% within"}
        return tuple(Figure(f"{self.key}.{name}", label, "ms", "less") for name, label in labels.items())


LATENCIES = (
    Latency("time_to_first_token_ms", "Time to first token", "From a request's arrival; queueing counts."),
    Latency(
        "time_per_output_token_ms",
        "Time per output token",
        "Of a request: from its first token to its last, over the tokens after the first.",
    ),
    Latency("inter_token_ms", "Between tokens", "Each pair of successive tokens of a sequence."),
    Latency("end_to_end_ms", "End to end", "From a request's arrival to its last token."),
    Latency("normalised_latency_ms", "Normalised latency", "End to end, over the request's output tokens."),
    Latency("iteration_ms", "Iteration", "Time that the executor spent on one dense batch."),
)


REPLICA_COLUMNS = (
    "Replica",
    "Completed",
    "Errors",
    "Output tokens",
    "Iterations",
    "Rows, mean",
    "Busy (%)",
    "Loading (s)",
    "Steady tokens/s",
    "Lost",
)


def replica_rows(report: RunReport) -> list[list[str]]:
    """For each replica of a run with several, a cell for each of `REPLICA_COLUMNS`."""

    def number(value: float | None) -> str:
        return NONE if value is None else write_number(value)

    return [
        [
            str(one.replica),
            f"{one.completed:,}",
            f"{one.errors:,}",
            f"{one.output_tokens:,}",
            f"{one.iterations:,}",
            number(one.rows / one.iterations if one.iterations else None),
            f"{one.busy_share * 100:.1f}",
            number(one.load_seconds),
            number((one.steady or {}).get("total_tokens_per_second")),
            one.lost or NONE,
        ]
        for one in report.replicas
    ]


def difference(figure: Figure, report: RunReport, base: RunReport) -> float | None:
    """How much more than in `base`, as a share of it; None if either has no such number, or the base's is 0."""
    value, of_base = figure.of(report), figure.of(base)
    if value is None or not of_base:
        return None
    return value / of_base - 1


def write_number(value: float) -> str:
    """Three digits or more: 12,345; 123; 12.3; 1.23; 0.0123."""
    size = abs(value)
    if size >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 10 else f"{value:.3g}"


def all_figures(reports: Sequence[RunReport]) -> list[Figure]:
    """Every figure that one of the runs has."""
    figures = [*SUMMARY, *(figure for latency in LATENCIES for figure in latency.figures)]
    return [figure for figure in figures if any(figure.of(report) is not None for report in reports)]
