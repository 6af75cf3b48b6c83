"""The report of a run: how many tokens, how fast, how long requests waited, and what bounded it."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from nanoflow.engine import EngineStats
from nanoflow.errors import OutputError
from nanoflow.outputs import RequestOutput
from nanoflow.search.cost_model import Bounds, Ceilings, bounds

__all__ = ["Percentiles", "RunReport", "make_report"]

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Percentiles:
    """Milliseconds below which 50, 90 and 99 per cent of the values lie, and their mean."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of_seconds(cls, values: Sequence[float]) -> "Percentiles | None":
        """None if there are no values."""
        if not values:
            return None
        p50, p90, p99 = np.percentile(values, PERCENTILES) * 1e3
        return cls(float(np.mean(values)) * 1e3, float(p50), float(p90), float(p99))


@dataclass(frozen=True)
class RunReport:
    """Everything that a run's summary and its JSON say. Rates are per second of `seconds`."""

    requests: int
    completed: int
    errors: int
    input_tokens: int
    output_tokens: int
    seconds: float
    """From the first request's submission to the last one's end; loading left out."""
    load_seconds: float
    total_tokens_per_second: float
    output_tokens_per_second: float
    time_to_first_token_ms: Percentiles | None
    """From the start of the run, since an offline job's requests are all there at once: queueing counts."""
    time_per_output_token_ms: Percentiles | None
    """Of each request: time from its first to its last token, over the tokens after the first."""
    iterations: int
    mean_batch_tokens: float
    largest_batch_tokens: int
    padding_share: float
    executor_busy_share: float
    """Share of `seconds` in which the executor ran an iteration."""
    preemptions: int
    bound_by: str
    bound_seconds: dict[str, float]
    """Seconds that the run's work takes at each measured ceiling alone."""
    bound_reached: dict[str, float]
    """Those seconds over the run's: 1 means that nothing on this machine could have been faster."""
    ceilings: Ceilings
    model: str
    device: str
    dtype: str
    plan: str
    sizes: dict[str, int]
    """What the configuration's sizes came to, in tokens (`max_running` in sequences)."""
    versions: dict[str, str]

    def save(self, path: Path) -> None:
        """Write the report as JSON; raises OutputError."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{path}: the report cannot be written: {error.strerror}; the results are safe") from None

    def print(self, console: Console) -> None:
        """Print the summary as a table."""
        table = Table(title=f"{self.model} on {self.device}, {self.dtype}, plan {self.plan}", show_header=False)
        table.add_column(style="bold")
        table.add_column()
        for name, value in self.rows():
            table.add_row(name, value)
        console.print(table)

    def rows(self) -> list[tuple[str, str]]:
        """The summary, line by line."""
        errors = f", {self.errors} with errors" if self.errors else ""
        return [
            ("requests", f"{self.completed:,} of {self.requests:,} completed{errors}"),
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
                f"{self.largest_batch_tokens:,} at most; {self.executor_busy_share:.0%} of the time busy, "
                f"{self.preemptions:,} preemptions",
            ),
            (
                "KV cache",
                f"{self.sizes['kv_tokens']:,} tokens in pages of {self.sizes['page_size']}, "
                f"context of {self.sizes['max_model_len']:,}",
            ),
            ("bound by", self._bound_line()),
        ]

    def _bound_line(self) -> str:
        shares = ", ".join(f"{share:.0%} of the {resource} bound" for resource, share in self.bound_reached.items())
        rate = f"{self.ceilings.flops / 1e9:,.0f} GFLOP/s, {self.ceilings.bytes_per_second / 1e9:,.0f} GB/s"
        return f"{self.bound_by}: reached {shares} (measured here: {rate})"


def make_report(
    *,
    outputs: Sequence[RequestOutput],
    errors: int,
    seconds: float,
    load_seconds: float,
    stats: EngineStats,
    preemptions: int,
    ceilings: Ceilings,
    model: str,
    device: str,
    dtype: torch.dtype,
    plan: str,
    sizes: dict[str, int],
) -> RunReport:
    """Sum up a run. Error records count as requests and add no tokens."""
    tokens_in = sum(len(output.prompt_token_ids) for output in outputs)
    tokens_out = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
    reach: Bounds = bounds(stats.cost, ceilings)
    return RunReport(
        requests=len(outputs) + errors,
        completed=len(outputs),
        errors=errors,
        input_tokens=tokens_in,
        output_tokens=tokens_out,
        seconds=seconds,
        load_seconds=load_seconds,
        total_tokens_per_second=_rate(tokens_in + tokens_out, seconds),
        output_tokens_per_second=_rate(tokens_out, seconds),
        time_to_first_token_ms=Percentiles.of_seconds([o.timing.first_token - o.timing.submitted for o in outputs]),
        time_per_output_token_ms=Percentiles.of_seconds([t for o in outputs if (t := _per_token(o)) is not None]),
        iterations=stats.iterations,
        mean_batch_tokens=_rate(stats.rows, stats.iterations),
        largest_batch_tokens=stats.largest_batch,
        padding_share=_rate(stats.padding_rows, stats.rows + stats.padding_rows),
        executor_busy_share=_rate(stats.busy_seconds, seconds),
        preemptions=preemptions,
        bound_by=reach.bound,
        bound_seconds=dict(reach.seconds),
        bound_reached=reach.reached(seconds),
        ceilings=ceilings,
        model=model,
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        plan=plan,
        sizes=sizes,
        versions=versions(),
    )


def versions() -> dict[str, str]:
    """Versions of what decides speed and results."""
    from nanoflow import __version__

    return {"nanoflow": __version__, "torch": torch.__version__, "python": platform.python_version()}


def _per_token(output: RequestOutput) -> float | None:
    """Seconds a token after the first, for the request's longest completion; None if it has but one token."""
    longest = max(len(completion.token_ids) for completion in output.outputs)
    return (output.timing.finished - output.timing.first_token) / (longest - 1) if longest > 1 else None


def _rate(amount: float, per: float) -> float:
    return amount / per if per else 0.0


def _line(percentiles: Percentiles | None) -> str:
    if percentiles is None:
        return "-"
    return f"{percentiles.p50:,.0f} ms median, {percentiles.p90:,.0f} ms p90, {percentiles.p99:,.0f} ms p99"
