"""The report of a run: how many tokens, how fast, how long requests waited, and what bounded it.

It is of bounded size whatever the run's length, and holds all that `nanoflow report` shows, so that the one file is
enough. Its form carries a version, which `nanoflow.reports` checks.
"""

import json
import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from rich.console import Console
from rich.table import Table

from nanoflow.errors import OutputError
from nanoflow.power import Energy
from nanoflow.recording import LogHistogram
from nanoflow.replicas.figures import ReplicaFigures
from nanoflow.search.cost_model import Ceilings

__all__ = ["SCHEMA_VERSION", "Goodput", "Percentiles", "RunReport", "TimelineEntry", "ceilings_of", "versions"]

SCHEMA_VERSION = 3
"""Of the JSON. It grows when a key that readers need is added, renamed or given another meaning."""

QUANTILES = 101
"""Points of a distribution's curve: from the smallest value to the largest."""


@dataclass(frozen=True)
class Percentiles:
    """Milliseconds below which 50, 90 and 99 per cent of the values lie, and their mean."""

    mean: float
    p50: float
    p90: float
    p99: float
    curve: list[float]
    """The values below which 0, 1, 2 ... 100 per cent lie."""

    @classmethod
    def of_seconds(cls, values: ArrayLike) -> "Percentiles | None":
        """None if there are no values."""
        array = np.asarray(values, np.float64)
        if not array.size:
            return None
        curve = np.percentile(array, np.linspace(0, 100, QUANTILES)) * 1e3
        return cls._of(float(array.mean()) * 1e3, curve.tolist())

    @classmethod
    def of_histogram(cls, histogram: LogHistogram) -> "Percentiles | None":
        """None if it is empty. Right within 1%."""
        if not histogram.count:
            return None
        return cls._of(histogram.mean * 1e3, (histogram.quantiles(np.linspace(0, 1, QUANTILES)) * 1e3).tolist())

    @classmethod
    def _of(cls, mean: float, curve: Sequence[float]) -> "Percentiles":
        return cls(mean, curve[50], curve[90], curve[99], [float(f"{value:.6g}") for value in curve])


@dataclass(frozen=True)
class Goodput:
    """Completed requests that met the objective of `report.slo`."""

    ttft_ms: float
    """The objective: most milliseconds from arrival to the first token."""
    tpot_ms: float
    """The objective: most milliseconds a token after the first."""
    share: float
    """Of the completed requests."""
    requests_per_second: float


@dataclass(frozen=True)
class TimelineEntry:
    """One nano-op of the layer shown, in microseconds from the layer's start."""

    name: str
    """As plans write it: ``qkv.a``; ``@1`` if it belongs to the next layer, ``@-1`` to the one before."""
    lane: str
    resource: str
    start: float
    end: float


@dataclass(frozen=True)
class RunReport:
    """Everything that a run's summary and its JSON say. Rates are per second of `seconds`."""

    schema_version: int
    finished_at: str
    """UTC, ISO 8601."""
    requests: int
    """Of this execution: completed ones and error records."""
    completed: int
    errors: int
    earlier: int
    """Records that earlier executions of the same run had written."""
    input_tokens: int
    output_tokens: int
    seconds: float
    """From the first request's submission to the last one's end; loading left out."""
    load_seconds: float
    total_tokens_per_second: float
    output_tokens_per_second: float
    requests_per_second: float
    time_to_first_token_ms: Percentiles | None
    """From a request's arrival: the start of the run, where all are there at once. Queueing counts."""
    time_per_output_token_ms: Percentiles | None
    """Of each request: time from its first to its last token, over the tokens after the first."""
    inter_token_ms: Percentiles | None
    """Between successive tokens of a sequence, each pair one value."""
    end_to_end_ms: Percentiles | None
    """From a request's arrival to its last token."""
    normalised_latency_ms: Percentiles | None
    """Of each request: time from arrival to the end, over its output tokens."""
    goodput: Goodput | None
    """None without an objective in the configuration."""
    iterations: int
    iteration_ms: Percentiles | None
    mean_batch_tokens: float
    largest_batch_tokens: int
    padding_share: float
    executor_busy_share: float
    """Share of `seconds` in which the executor ran an iteration."""
    device_idle_share: float | None
    """Of the device's time from the first iteration's start to the last one's end, the share between iterations; None
    if the executor does not tell."""
    preemptions: int
    bound_by: str
    bound_seconds: dict[str, float]
    """Seconds that the run's work takes at each measured ceiling alone."""
    bound_reached: dict[str, float]
    """Those seconds over the run's: 1 means that nothing on this machine could have been faster."""
    ceilings: Ceilings
    energy: Energy | None
    """None where it cannot be measured."""
    timeline: dict[str, Any]
    """The run in at most 240 intervals: ``interval_seconds``, and a list for each quantity."""
    model: str
    device: str
    dtype: str
    plan: str
    plan_text: str
    """The plan that ran, in the form of a plan file; of several, the one that most iterations ran."""
    plan_timeline: list[TimelineEntry]
    """One layer of the mean iteration, estimated from the operations' costs and the ceilings."""
    sizes: dict[str, int]
    """What the configuration's sizes came to, in tokens (`max_running` in sequences)."""
    config: dict[str, Any]
    """The resolved configuration."""
    versions: dict[str, str]
    plan_share: float = 1.0
    """Share of the iterations that ran the plan; the others were sequential, too small or too large for it."""
    parallel: dict[str, int] = field(default_factory=lambda: {"tensor": 1, "data": 1})
    """Devices that shared each layer, and replicas. Bounds, energy and power limit are of all devices together, the
    other ceilings of one."""
    replicas: list[ReplicaFigures] = field(default_factory=list)
    """Of a run with several, what each did; all other figures are sums over them, or means."""

    @property
    def all_ceilings(self) -> Ceilings:
        """What all devices of the run sustain together."""
        return ceilings_of(self.ceilings, prod(self.parallel.values()))

    @property
    def on(self) -> str:
        """The device, and how the run was spread over several."""
        return self.device + "".join(f", {name} {count}" for name, count in self.parallel.items() if count > 1)

    @property
    def reached(self) -> float:
        """Share reached of the bound that bounds the run."""
        return self.bound_reached[self.bound_by]

    def save(self, path: Path) -> None:
        """Write the report as JSON; raises OutputError."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # A line for each key: readable, without a line for each number of a list.
            lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in asdict(self).items())
            path.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{path}: the report cannot be written: {error.strerror}; the results are safe") from None

    def print(self, console: Console) -> None:
        """Print the summary as a table."""
        table = Table(title=f"{self.model} on {self.on}, {self.dtype}, plan {self.plan}", show_header=False)
        table.add_column(style="bold")
        table.add_column()
        for name, value in self.rows():
            table.add_row(name, value)
        console.print(table)

    def rows(self) -> list[tuple[str, str]]:
        """The summary, line by line."""
        errors = f", {self.errors} with errors" if self.errors else ""
        earlier = f"; {self.earlier:,} were there from before" if self.earlier else ""
        planned = "" if self.plan_share == 1 else f"{self.plan_share:.1%} of them by a plan, the others in sequence; "
        idle = "" if self.device_idle_share is None else f"device {self.device_idle_share:.1%} idle in between, "
        rows = [
            ("requests", f"{self.completed:,} of {self.requests:,} completed{errors}{earlier}"),
            ("tokens", f"{self.input_tokens:,} in, {self.output_tokens:,} out"),
            ("time", f"{self.seconds:.1f} s, after {self.load_seconds:.1f} s of loading"),
            (
                "throughput",
                f"{self.total_tokens_per_second:,.0f} total tokens/s, "
                f"{self.output_tokens_per_second:,.0f} output tokens/s",
            ),
            ("time to first token", _line(self.time_to_first_token_ms)),
            ("time per output token", _line(self.time_per_output_token_ms)),
            (
                "iterations",
                f"{self.iterations:,}, {self.mean_batch_tokens:,.0f} rows on average, "
                f"{self.largest_batch_tokens:,} at most; {planned}{self.executor_busy_share:.0%} of the time busy, "
                f"{idle}{self.preemptions:,} preemptions",
            ),
            (
                "KV cache",
                f"{self.sizes['kv_tokens']:,} tokens in pages of {self.sizes['page_size']}, "
                f"context of {self.sizes['max_model_len']:,}",
            ),
            ("bound by", self._bound_line()),
        ]
        if self.goodput is not None:
            goal = f"{self.goodput.ttft_ms:,.0f} ms to the first token and {self.goodput.tpot_ms:,.0f} ms a token"
            met = f"{self.goodput.share:.1%} of the requests, {self.goodput.requests_per_second:,.2f} a second"
            rows.append(("within the objective", f"{met} ({goal})"))
        if self.energy is not None:
            each = f", {self.energy.joules_per_token:,.3f} J a token" if self.energy.joules_per_token else ""
            rows.append(("energy", f"{self.energy.joules:,.0f} J, {self.energy.mean_watts:,.0f} W on average{each}"))
        return rows + [(f"replica {one.replica}", one.text()) for one in self.replicas]

    def _bound_line(self) -> str:
        shares = ", ".join(f"{share:.0%} of the {resource} bound" for resource, share in self.bound_reached.items())
        rate = f"{self.ceilings.flops / 1e9:,.0f} GFLOP/s, {self.ceilings.bytes_per_second / 1e9:,.0f} GB/s"
        devices, link = prod(self.parallel.values()), self.ceilings.link_bytes_per_second
        if self.parallel["tensor"] > 1:
            rate += ", the link not measured" if link is None else f", {link / 1e9:,.0f} GB/s on the wire"
        each = f", on each of {devices} devices" if devices > 1 else ""
        return f"{self.bound_by}: reached {shares} (measured here: {rate}{each})"


def ceilings_of(ceilings: Ceilings, devices: int) -> Ceilings:
    """What so many devices sustain. The power limit is that of all of them already: it comes with the energy."""
    link = ceilings.link_bytes_per_second
    return replace(
        ceilings,
        flops=ceilings.flops * devices,
        bytes_per_second=ceilings.bytes_per_second * devices,
        link_bytes_per_second=None if link is None else link * devices,
    )


def versions() -> dict[str, str]:
    """Versions of what decides speed and results."""
    from nanoflow import __version__

    found = {"nanoflow": __version__, "torch": torch.__version__, "python": platform.python_version()}
    with suppress(PackageNotFoundError):
        found["triton"] = version("triton")
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found


def _line(percentiles: Percentiles | None) -> str:
    if percentiles is None:
        return "-"
    return f"{percentiles.p50:,.0f} ms median, {percentiles.p90:,.0f} ms p90, {percentiles.p99:,.0f} ms p99"
