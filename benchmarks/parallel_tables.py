"""Tables of several GPUs for docs/parallel.md: all-reduces alone and beside products, and plans with a network lane."""

from collections.abc import Iterator
from statistics import median
from typing import Any

from benchmarks.lane_tables import comparison, described

__all__ = ["alone", "beside", "network"]

Record = dict[str, Any] | None


def alone(record: Record) -> Iterator[str]:
    """Microseconds and GB/s of each form of the all-reduce, by bytes."""
    if record is None:
        yield "Nothing is recorded yet: run `python -m benchmarks.collectives` on several GPUs."
        return
    sizes = list(record["alone"])
    forms = sorted(record["alone"][sizes[-1]], key=lambda form: record["alone"][sizes[-1]][form]["milliseconds"])
    yield f"| form | {' | '.join(sizes)} |"
    yield "|---" * (1 + len(sizes)) + "|"
    for form in forms:
        rows = [record["alone"][size][form] for size in sizes]
        cells = (f"{1e3 * row['milliseconds']:.1f} us, {row['GB/s']:.0f} GB/s" for row in rows)
        yield f"| `{form}` | {' | '.join(cells)} |"


def beside(record: Record) -> Iterator[str]:
    """Milliseconds of a layer's products and all-reduces: in sequence, and the best way beside each other."""
    if record is None:
        yield "Nothing is recorded yet: run `python -m benchmarks.collectives` on several GPUs."
        return
    yield "| rows | products alone, ms | in sequence, fastest | beside each other, fastest three (ratio to sequence) |"
    yield "|---|---|---|---|"
    for rows, ways in record["beside"].items():
        first = min((name for name in ways if name.endswith(", in sequence")), key=lambda n: ways[n]["milliseconds"])
        others = sorted(
            (name for name in ways if name != "products" and not name.endswith(", in sequence")),
            key=lambda name: ways[name]["milliseconds"],
        )[:3]
        said = "; ".join(f"{name} {ways[name]['milliseconds']:.3f} ({ways[name]['ratio']:.3f})" for name in others)
        yield (
            f"| {rows.removesuffix(' rows')} | {ways['products']['milliseconds']:.3f} | "
            f"{first.removesuffix(', in sequence')} {ways[first]['milliseconds']:.3f} | {said} |"
        )


def network(record: Record) -> Iterator[str]:
    """Whole iterations: the fastest in sequence, cut without overlap, and the fastest with lanes."""
    if record is None:
        yield "Nothing is recorded yet: run `python -m benchmarks.network_lanes` on two GPUs."
        return
    yield "| model, dense batch | plan | ms | ratio (least to most of the pairs) | W of all GPUs | mJ a row |"
    yield "|---|---|---|---|---|---|"
    for run in record.values():
        for label, milliseconds, ratio, watts, millijoules in _rows(run):
            yield (
                f"| {run['model']}, {described(run)} | {label} | {milliseconds:.2f} | {ratio} | {watts:,.0f} | "
                f"{millijoules:.1f} |"
            )


def _rows(run: dict[str, Any]) -> Iterator[tuple[str, float, str, float, float]]:
    """Plan, milliseconds, ratio, watts and millijoules a row: of the last comparison, of a run without one of its
    scan. Of what was printed alone, the fastest with lanes, all in sequence, and the slowest."""
    if "printed" in run:
        printed = run["printed"]
        order = sorted(printed, key=lambda label: -printed[label]["milliseconds"])
        shown = {order[0], *order[-5:], *(label for label in order if label.startswith(("sequential", "cut")))}
        for label in (label for label in order if label in shown):
            row = printed[label]
            ratio = f"{row['ratio']:.3f} ({row['least']:.3f} to {row['most']:.3f}, 2 short blocks)"
            yield label, row["milliseconds"], ratio, row["watts"], row["millijoules_a_row"]
        return
    final = run["final"] if run["final"] and len(run["final"]) > 1 else run["scan"]
    found, base = comparison(final), run["fastest_in_sequence"]
    rows = run["mix"]["decode"] + sum(run["mix"]["prompts"])
    for label in sorted(found.blocks, key=found.seconds, reverse=True):
        ratios = found.ratios(base, label)
        pairs = f"{len(ratios)} {'pairs' if len(ratios) > 1 else 'pair'}"
        ratio = f"{median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}, {pairs})"
        joules, watts = found.joules(label) or 0.0, found.watts(label) or 0.0
        yield label, 1e3 * found.seconds(label), ratio, watts, 1e3 * joules / rows
