"""Runs as Markdown, and as JSON for other programs."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict

import yaml

from nanoflow.reports.figures import (
    LATENCIES,
    NONE,
    REPLICA_COLUMNS,
    SUMMARY,
    Figure,
    all_figures,
    difference,
    replica_rows,
    write_number,
)
from nanoflow.reports.load import Run

__all__ = ["as_json", "as_markdown"]

JSON_VERSION = 1


def as_json(runs: Sequence[Run]) -> str:
    """All reports, and by how much every figure of the later runs differs from the first one's, as a share of it."""
    base, *others = [run.report for run in runs]
    figures = all_figures([base, *others]) if others else []
    data = {
        "schema_version": JSON_VERSION,
        "runs": [{"name": run.name, "path": str(run.path), "report": asdict(run.report)} for run in runs],
        "differences": {figure.key: [difference(figure, report, base) for report in others] for figure in figures},
    }
    return json.dumps(data, indent=1) + "\n"


def as_markdown(runs: Sequence[Run]) -> str:
    """Tables, one column a run; a run after the first with its differences from it."""
    names = [run.name for run in runs]
    parts = [f"# {' and '.join(names)}" if len(runs) < 4 else f"# {len(runs)} runs"]
    about = [
        f"- **{run.name}**: {run.report.model} on {run.report.device}, {run.report.dtype}, plan {run.report.plan}, "
        f"{run.report.finished_at}"
        for run in runs
    ]
    parts += ["\n".join(about), "## Summary", _figures(SUMMARY, runs)]
    for latency in LATENCIES:
        if any(latency.of(run.report) is not None for run in runs):
            parts += [f"## {latency.name}", latency.explanation, _figures(latency.figures, runs)]
    resources = dict.fromkeys(resource for run in runs for resource in run.report.bound_seconds)
    parts += [
        "## Bounds",
        "Seconds that the run's work takes at each measured ceiling alone, and their share of the run's time.",
        _table(["", *names], [[resource, *(_bound(run, resource) for run in runs)] for resource in resources]),
    ]
    for run in runs:
        if run.report.replicas:
            title = f"## Replicas of {run.name}" if len(runs) > 1 else "## Replicas"
            parts += [title, _table(REPLICA_COLUMNS, replica_rows(run.report))]
    for run in runs:
        title = f" of {run.name}" if len(runs) > 1 else ""
        config = yaml.safe_dump(run.report.config, sort_keys=False, allow_unicode=True)
        versions = ", ".join(f"{name} {version}" for name, version in run.report.versions.items())
        parts += [f"## Plan{title}", f"```yaml\n{run.report.plan_text}```"]
        parts += [f"## Configuration{title}", f"```yaml\n{config}```", f"Versions: {versions}."]
    return "\n\n".join(parts) + "\n"


def _bound(run: Run, resource: str) -> str:
    if resource not in run.report.bound_seconds:
        return NONE
    return f"{write_number(run.report.bound_seconds[resource])} s, {run.report.bound_reached[resource]:.1%}"


def _figures(figures: Iterable[Figure], runs: Sequence[Run]) -> str:
    rows = []
    for figure in figures:
        if not figure.worth_showing([run.report for run in runs]):
            continue
        cells = []
        for place, run in enumerate(runs):
            change = difference(figure, run.report, runs[0].report) if place else None
            cells.append(figure.text(run.report) + (f" ({change:+.1%})" if change else ""))
        rows.append([f"{figure.name}{f' ({figure.unit})' if figure.unit else ''}", *cells])
    return _table(["", *(run.name for run in runs)], rows)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(header), "|" + "---|" + "---:|" * (len(header) - 1), *(line(row) for row in rows)])
