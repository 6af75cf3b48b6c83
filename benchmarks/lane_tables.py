"""Tables of plans with lanes against the sequential one, for README.md and docs/plans.md."""

from collections.abc import Iterator
from statistics import median
from typing import Any

__all__ = ["against_sequence", "scans"]

Record = dict[str, Any] | None
NONE = "Nothing is recorded yet: run `python -m benchmarks.lanes` on a GPU."
SEQUENTIAL, CUT = "sequential", "cut"


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
        plans = run["final"] or run["scan"]
        winner = run["winner"]
        if not run["final"] and any(one is not run and one["mix"] == run["mix"] for one in record.values()):
            continue  # a scan of a mix that has a last comparison of its own
        cut = next((label for label in plans if label.startswith(CUT)), None)
        ratios = ratios_of(plans, winner)
        verdict = "" if run["final"] else ", the best of a scan: no plan ships"
        first, last = (1e3 * joules(plans[label]["blocks"]) / sum_rows(run["mix"]) for label in (SEQUENTIAL, winner))
        yield (
            f"| {described(run)} | {milliseconds(plans[SEQUENTIAL]):.2f} | "
            f"{f'{milliseconds(plans[cut]):.2f}' if cut else '-'} | {milliseconds(plans[winner]):.2f} | "
            f"**{median(ratios):.3f}** ({min(ratios):.3f} to {max(ratios):.3f}, {len(ratios)} pairs{verdict}) | "
            f"{watts(plans[winner]['blocks']):,.0f} | {first:.1f}, {last:.1f} |"
        )


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
    return f"{mix['decode']} decode rows of {mix['context']:,} tokens, {sum(mix['prompts'])} prompt rows"


def sum_rows(mix: dict[str, Any]) -> int:
    return int(mix["decode"]) + sum(mix["prompts"])


def milliseconds(plan: dict[str, Any]) -> float:
    return 1e3 * median(block["seconds"] for block in plan["blocks"])


def ratios_of(plans: dict[str, Any], label: str) -> list[float]:
    """Of each pair of neighbouring blocks."""
    pairs = zip(plans[SEQUENTIAL]["blocks"], plans[label]["blocks"], strict=True)
    return [first["seconds"] / second["seconds"] for first, second in pairs]


def joules(blocks: list[dict[str, Any]]) -> float:
    """Of an iteration: power in a block times the time that an iteration takes."""
    return median(block["joules"] / block["wall_seconds"] * block["seconds"] for block in blocks)


def watts(blocks: list[dict[str, Any]]) -> float:
    return median(block["joules"] / block["wall_seconds"] for block in blocks)


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
