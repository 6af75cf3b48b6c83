"""Runs as one self-contained web page: nothing is loaded from anywhere, and nothing in it runs."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from nanoflow.report import RunReport
from nanoflow.reports.charts import Line, Scale, bar, chart, time_scale
from nanoflow.reports.figures import (
    LATENCIES,
    REPLICA_COLUMNS,
    SUMMARY,
    Figure,
    Latency,
    difference,
    replica_rows,
    write_number,
)
from nanoflow.reports.load import Run

__all__ = ["as_html"]

COLOURS = 8
RESOURCE_COLOURS = {"compute": 1, "memory": 2, "network": 3, "power": 4}
HEADROOM = 1.08
ALIKE = 0.005
"""Differences below this share are not coloured."""


def as_html(runs: Sequence[Run]) -> str:
    """The page of one run, or of several side by side, each compared with the first."""
    environment = Environment(
        loader=PackageLoader("nanoflow.reports", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["moment"] = _moment
    reports = [run.report for run in runs]
    return environment.get_template("page.html.j2").render(
        title=runs[0].name if len(runs) == 1 else f"{runs[0].name} and {len(runs) - 1} more",
        runs=runs,
        colours=[_colour(place) for place in range(len(runs))],
        tiles=_tiles(reports[0]) if len(runs) == 1 else [],
        summary=_rows(SUMMARY, reports),
        differing=_differing(reports),
        throughput=[_throughput(runs)],
        composition=[_composition(run, runs) for run in runs if _length(run.report)],
        memory=[_kv_use(runs), *([_requests(runs)] if len(runs) == 1 else [])],
        latencies=[_latency(latency, runs) for latency in LATENCIES if any(latency.of(r) for r in reports)],
        latency_rows=[(latency, rows) for latency in LATENCIES if (rows := _rows(latency.figures, reports))],
        bounds=[(run, _bounds(run.report)) for run in runs],
        power=_power(runs),
        replica_columns=REPLICA_COLUMNS,
        replicas=[(run, replica_rows(run.report)) for run in runs if run.report.replicas],
        plans=[(run, _plan(run.report)) for run in runs],
        configs=[yaml.safe_dump(run.report.config, sort_keys=False, allow_unicode=True) for run in runs],
        number=write_number,
    )


def _moment(iso: str) -> str:
    """``2026-11-22 18:56 UTC``, or the text as it is if it is no moment."""
    try:
        return f"{datetime.fromisoformat(iso).astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    except ValueError:
        return iso


def _colour(place: int) -> int:
    return place % COLOURS + 1


def _tiles(report: RunReport) -> list[tuple[str, str, str]]:
    """(name, number, unit) of what a reader looks for first."""
    first = report.time_to_first_token_ms
    tiles = [
        ("Output throughput", write_number(report.output_tokens_per_second), "tokens/s"),
        ("Total throughput", write_number(report.total_tokens_per_second), "tokens/s"),
        ("Completed", f"{report.completed:,}", f"of {report.requests:,} requests"),
        ("Time", write_number(report.seconds), "s"),
        (f"Of the {report.bound_by} bound", f"{report.reached:.0%}", "reached"),
    ]
    if first is not None:
        tiles.insert(4, ("Time to first token", write_number(first.p50), "ms, median"))
    if report.goodput is not None:
        tiles.append(("Within the objective", f"{report.goodput.share:.1%}", "of the requests"))
    return tiles


def _rows(figures: Iterable[Figure], reports: Sequence[RunReport]) -> list[dict[str, Any]]:
    """Table rows: a figure's name and unit, and for each run its value, the difference and whether it is better."""
    rows = []
    for figure in figures:
        if not figure.worth_showing(reports):
            continue
        cells = []
        for place, report in enumerate(reports):
            change = difference(figure, report, reports[0]) if place else None
            kind = ""
            if change is not None and abs(change) >= ALIKE and figure.better != "neither":
                kind = "better" if (change > 0) == (figure.better == "more") else "worse"
            cells.append((figure.text(report), f"{change:+.1%}" if change else "", kind))
        rows.append({"name": figure.name, "unit": figure.unit, "cells": cells})
    return rows


def _differing(reports: Sequence[RunReport]) -> list[tuple[str, list[str]]]:
    """Keys of configuration, sizes and versions whose values are not the same in all runs."""

    def flat(value: Any, key: str) -> dict[str, str]:
        if not isinstance(value, dict):
            return {key: str(value)}
        return {
            name: text for k, inner in value.items() for name, text in flat(inner, f"{key}.{k}" if key else k).items()
        }

    each = []
    for report in reports:
        machine = {"model": report.model, "device": report.device, "dtype": report.dtype}
        each.append(flat(report.config | {"run": machine, "sizes": report.sizes, "versions": report.versions}, ""))
    keys = dict.fromkeys(key for one in each for key in one)
    found = [(key, [one.get(key, "") for one in each]) for key in keys if key != "output.path"]
    return [(key, values) for key, values in found if len(set(values)) > 1]


def _length(report: RunReport) -> float:
    """Seconds that the timeline covers."""
    return float(report.timeline["interval_seconds"]) * len(report.timeline.get("running", ()))


def _points(report: RunReport, name: str, factor: float = 1.0) -> list[tuple[float, float]]:
    """A quantity of the timeline: (middle of the interval, value)."""
    width = report.timeline["interval_seconds"]
    return [((place + 0.5) * width, value * factor) for place, value in enumerate(report.timeline.get(name, ()))]


def _over_time(runs: Sequence[Run]) -> Scale:
    return time_scale("Time since the start", max([_length(run.report) for run in runs] + [1e-3]))


def _top(lines: Sequence[Line], name: str, unit: str) -> Scale:
    return Scale(name, unit, max([up for line in lines for _, up in line.points] + [1e-9]) * HEADROOM)


def _throughput(runs: Sequence[Run]) -> Markup:
    if len(runs) == 1:
        report = runs[0].report
        lines = [
            Line("all tokens", 1, _points(report, "tokens_per_second")),
            Line("output tokens", 2, _points(report, "output_tokens_per_second")),
        ]
        about = "Rows of the dense batches, prompts and outputs together, and the output tokens among them."
    else:
        lines = [
            Line(run.name, _colour(place), _points(run.report, "tokens_per_second")) for place, run in enumerate(runs)
        ]
        about = "Rows of the dense batches, prompts and outputs together."
    return chart("Throughput over time", about, lines, _over_time(runs), _top(lines, "Throughput", "tokens/s"))


def _composition(run: Run, runs: Sequence[Run]) -> Markup:
    def layers(report: RunReport) -> list[Line]:
        kinds = (("decode", 1), ("prefill", 2), ("padding", 0))
        return [Line(kind, colour, _points(report, f"{kind}_rows")) for kind, colour in kinds]

    lines = layers(run.report)
    if not any(up for _, up in lines[2].points):
        lines.pop()
    # The same height for every run, so that they can be compared.
    sums = [
        sum(ups)
        for one in runs
        for ups in zip(*([up for _, up in line.points] for line in layers(one.report)), strict=True)
    ]
    title = "Batch composition" if len(runs) == 1 else f"Batch composition: {run.name}"
    y = Scale("Rows of an iteration", "", max([*sums, 1e-9]) * HEADROOM)
    return chart(title, "Mean rows of the iterations at that time, by kind.", lines, _over_time(runs), y, stacked=True)


def _kv_use(runs: Sequence[Run]) -> Markup:
    lines = []
    for place, run in enumerate(runs):
        pages = run.report.sizes["kv_tokens"] / run.report.sizes["page_size"]
        lines.append(Line(run.name, _colour(place), _points(run.report, "kv_pages", 1 / pages)))
    about = "Share of the KV cache's pages that requests hold."
    return chart("KV cache occupancy", about, lines, _over_time(runs), Scale("Pages in use", "%", 1.0))


def _requests(runs: Sequence[Run]) -> Markup:
    lines = [
        Line("running", 1, _points(runs[0].report, "running")),
        Line("waiting", 2, _points(runs[0].report, "waiting")),
    ]
    about = "Sequences that hold KV pages, and those next in line."
    return chart("Running and waiting", about, lines, _over_time(runs), _top(lines, "Sequences", ""))


def _latency(latency: Latency, runs: Sequence[Run]) -> Markup:
    found = [(place, run, latency.of(run.report)) for place, run in enumerate(runs)]
    curves = [(place, run, values.curve) for place, run, values in found if values is not None]
    end = max(curve[99] for _, _, curve in curves) * 1.02 / 1e3 or 1e-6  # the slowest 1% would squeeze all others
    lines = [
        Line(run.name, _colour(place), [(value / 1e3, share / 100) for share, value in enumerate(curve[:100])])
        for place, run, curve in curves
    ]
    x = time_scale(latency.name, end)
    return chart(latency.name, latency.explanation, lines, x, Scale("Share that took no longer", "%", 1.0))


def _bounds(report: RunReport) -> list[Markup]:
    bars = []
    for resource, seconds in report.bound_seconds.items():
        text = f"{write_number(seconds)} s, {report.bound_reached[resource]:.1%} of the run's time"
        bars.append(bar(resource, report.bound_reached[resource], text, RESOURCE_COLOURS.get(resource, 5)))
    return bars


def _power(runs: Sequence[Run]) -> Markup | None:
    measured = [(place, run) for place, run in enumerate(runs) if "watts" in run.report.timeline]
    if not measured:
        return None
    lines = [Line(run.name, _colour(place), _points(run.report, "watts")) for place, run in measured]
    about = "Mean power of the whole card."
    return chart("Power", about, lines, _over_time([run for _, run in measured]), _top(lines, "Power", "W"))


def _plan(report: RunReport) -> dict[str, Any] | None:
    """The layer's timeline: for each lane, its nano-ops with their place and width in per cent."""
    entries = report.plan_timeline
    if not entries:
        return None
    end = max(entry.end for entry in entries)
    lanes: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        length = entry.end - entry.start
        lanes.setdefault(entry.lane, []).append(
            {
                "name": entry.name,
                "left": round(100 * entry.start / end, 3),
                "width": round(100 * length / end, 3),
                "colour": RESOURCE_COLOURS.get(entry.resource, 5),
                "title": f"{entry.name}: {write_number(length)} us, bound by {entry.resource}",
            }
        )
    return {"lanes": lanes, "end": write_number(end), "entries": entries}
