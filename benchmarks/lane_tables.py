"""Tables of plans with lanes against the sequential one, for README.md and docs/plans.md."""

from collections.abc import Iterator
from statistics import median
from typing import Any

from nanoflow.plans.ablation import SEQUENTIAL
from nanoflow.search.measure import Block, Comparison

__all__ = ["against_sequence", "attention", "comparison", "products", "scans"]

Record = dict[str, Any] | None
NONE = "Nothing is recorded yet: run `python -m benchmarks.lanes` on a GPU."
CUT = "cut"


def against_sequence(record: Record) -> Iterator[str]:
    """The last comparison of each run; of one without, the best plan of its scan."""
    if record is None:
        yield NONE
        return
    yield (
        "| dense batch | in sequence, ms | cut, without overlap, ms | with lanes, ms | "
        "ratio (least to most of the pairs) | W | mJ a row, in sequence and with lanes |"
    )
    yield "|---" * 7 + "|"
    for run in record.values():
        winner = run["winner"]
        if not run["final"] and any(one is not run and one["mix"] == run["mix"] for one in record.values()):
            continue  # a scan of a mix that has a last comparison of its own
        found = comparison(run["final"] or run["scan"])
        cut = next((label for label in found.blocks if label.startswith(CUT)), None)
        ratios = found.ratios(SEQUENTIAL, winner)
        verdict = "" if run["final"] else ", the best of a scan: no plan ships"
        rows = run["mix"]["decode"] + sum(run["mix"]["prompts"])
        first, last = (1e3 * (found.joules(label) or 0.0) / rows for label in (SEQUENTIAL, winner))
        yield (
            f"| {described(run)} | {1e3 * found.seconds(SEQUENTIAL):.2f} | "
            f"{f'{1e3 * found.seconds(cut):.2f}' if cut else '-'} | {1e3 * found.seconds(winner):.2f} | "
            f"**{median(ratios):.3f}** ({min(ratios):.3f} to {max(ratios):.3f}, {len(ratios)} pairs{verdict}) | "
            f"{found.watts(winner) or 0.0:,.0f} | {first:.1f}, {last:.1f} |"
        )


def comparison(plans: dict[str, Any]) -> Comparison:
    """What was recorded of some plans, as it was measured."""
    return Comparison({label: tuple(Block(**block) for block in each["blocks"]) for label, each in plans.items()})


def scans(record: Record) -> Iterator[str]:
    """Every plan that was tried, best first, by mix; short blocks."""
    if record is None:
        yield NONE
        return
    yield "| dense batch | plans, and how many times as fast as in sequence (medians of short blocks) |"
    yield "|---|---|"
    for name, run in record.items():
        tried = {label: entry["ratio"] for label, entry in run["scan"].items() if label != SEQUENTIAL}
        order = sorted(tried, key=lambda label: -tried[label])
        said = ", ".join(f"{label.removesuffix(' measured')} {tried[label]:.3f}" for label in order)
        which = name.partition(", ")[2] or "last scan"
        yield f"| {described(run)}; {which} | {said} |"


def described(run: dict[str, Any]) -> str:
    mix = run["mix"]
    prompts = f"{sum(mix['prompts'])} prompt rows"
    return f"{mix['decode']} decode rows of {mix['context']:,} tokens, {prompts}" if mix["decode"] else prompts


def products(record: Record) -> Iterator[str]:
    """What a layer's products take on parts of the SMs, microseconds together and TFLOP/s."""
    if record is None:
        yield NONE
        return
    found = {(layer["rows"], layer["sms"]): layer for layer in record["layers"]}
    parts = sorted({sms for _, sms in found})
    yield f"| rows | {' | '.join(f'{sms} SMs' for sms in parts)} |"
    yield "|---" * (1 + len(parts)) + "|"
    for rows in sorted({rows for rows, _ in found}):
        cells = []
        for sms in parts:
            layer = found.get((rows, sms))
            if layer is None:
                cells.append("-")
                continue
            took = 1e3 * layer["layer_milliseconds"]
            cells.append(f"{took:.0f}, {2 * rows * LAYER_WEIGHTS / took / 1e6:.0f}")
        yield f"| {rows} | {' | '.join(cells)} |"


LAYER_WEIGHTS = 4096 * (6144 + 4096 + 28672) + 14336 * 4096
"""Of Llama-3-8B's layer, which is what is recorded."""


def attention(record: Record) -> Iterator[str]:
    """GB/s of decode attention on parts of the SMs, by configuration."""
    if record is None:
        yield NONE
        return
    found = {(row["config"], row["sms"]): row["gbytes_per_second"] for row in record["parts"]}
    parts = sorted({sms for _, sms in found})
    configs = sorted({config for config, _ in found}, key=lambda config: -found[config, parts[0]])
    yield f"| configuration | {' | '.join(f'{sms} SMs' for sms in parts)} |"
    yield "|---" * (1 + len(parts)) + "|"
    for config in configs:
        chosen = " (chosen)" if config in record["chosen"].values() else ""
        yield f"| {config}{chosen} | {' | '.join(f'{found[config, sms]:,.0f}' for sms in parts)} |"
