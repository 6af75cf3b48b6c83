"""A profile as tables: operations on the whole device and on its parts, and what they keep beside each other."""

from collections.abc import Mapping
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from nanoflow.search.profile import AXES, At, Profile

__all__ = ["LaneSize", "lane_sizes", "print_profile", "size_text", "split_name", "splits_of"]

Split = tuple[int | None, int | None]
"""SMs of the two lanes; None: they share all."""


@dataclass(frozen=True)
class LaneSize:
    """One operation at the size that was measured on the most numbers of SMs, the largest of these."""

    kind: str
    at: At
    whole: float
    """Seconds on the whole device."""
    seconds: Mapping[int | None, float]
    """By SMs."""


def lane_sizes(profile: Profile) -> dict[str, LaneSize]:
    """Of each operation, longest first: those that were measured on the whole device."""
    found = {}
    solos = [solo for solo in profile.solos if not solo.kernel]  # forms of collectives have a table of their own
    for op in dict.fromkeys(solo.op for solo in solos):
        tables = {solo.sms: {point.at: point.seconds for point in solo.points} for solo in solos if solo.op == op}
        if None not in tables:
            continue
        at = max(tables[None], key=lambda at: (sum(at in table for table in tables.values()), at))
        seconds = {sms: table[at] for sms, table in tables.items() if at in table}
        kind = next(solo.kind for solo in profile.solos if solo.op == op)
        found[op] = LaneSize(kind, at, tables[None][at], seconds)
    return dict(sorted(found.items(), key=lambda item: -item[1].whole))


def size_text(size: LaneSize) -> str:
    """Its coordinates, in words."""
    return ", ".join(f"{value:,} {name}" for value, name in zip(size.at, AXES[size.kind], strict=True))


def splits_of(profile: Profile) -> list[Split]:
    """Of the pairs, the largest second lane last, and what shares all SMs behind them."""
    found = {(pair.sms, pair.other_sms) for pair in profile.pairs}
    return sorted(found, key=lambda split: (split[0] is None, split[1] or 0))


def split_name(split: Split) -> str:
    return "shared" if split[0] is None else f"{split[0]} + {split[1]}"


def print_profile(profile: Profile, console: Console) -> None:
    """Microseconds of each operation by SMs, and the share of its speed that each keeps beside another."""
    sizes = lane_sizes(profile)
    budgets = sorted({sms for own in sizes.values() for sms in own.seconds if sms is not None}, reverse=True)
    where = ", on all SMs and on parts" if budgets else ""
    title = f"{profile.fingerprint.model} on {profile.fingerprint.gpu}: microseconds{where}"
    table = _table(title, ["operation", "size"], ["all", *map(str, budgets)])
    for op, own in sizes.items():
        cells = [f"{own.seconds[sms] * 1e6:,.1f}" if sms in own.seconds else "-" for sms in budgets]
        table.add_row(op, size_text(own), f"{own.whole * 1e6:,.1f}", *cells)
    console.print(table)
    print_collectives(profile, console)
    if not profile.pairs:
        return
    splits = splits_of(profile)
    title = "side by side: % of its speed alone that it keeps / that the other keeps"
    table = _table(title, ["operation", "beside"], [split_name(split) for split in splits])
    by_place = {(pair.op, pair.other_name, pair.sms, pair.other_sms): pair for pair in profile.pairs}
    for op, other in dict.fromkeys((pair.op, pair.other_name) for pair in profile.pairs):
        cells = []
        for split in splits:
            pair = by_place.get((op, other, *split))
            cells.append("-" if pair is None else f"{pair.kept:.0%} / {pair.other_kept:.0%}")
        table.add_row(op, other, *cells)
    console.print(table)


def print_collectives(profile: Profile, console: Console) -> None:
    """Of each collective, and of those that do the same: milliseconds by rows in each form, and what a rank sends."""
    alike: dict[tuple[object, ...], list[str]] = {}
    for op in dict.fromkeys(solo.op for solo in profile.solos if solo.wire_bytes):
        same = tuple((solo.kernel, solo.sms, solo.points) for solo in profile.solos if solo.op == op)
        alike.setdefault(same, []).append(op)
    for ops in alike.values():
        solos = [solo for solo in profile.solos if solo.op == ops[0]]
        rows = sorted({point.at[0] for solo in solos for point in solo.points})
        title = f"{', '.join(ops)}: milliseconds / GB/s that a rank sends, by rows"
        table = _table(title, ["form", "SMs"], [f"{count:,}" for count in rows])
        for solo in solos:
            cells = {point.at[0]: _wire_text(point.seconds, solo.wire_bytes * point.at[0]) for point in solo.points}
            where = "all" if solo.sms is None else str(solo.sms)
            table.add_row(solo.kernel or "preferred", where, *(cells.get(count, "-") for count in rows))
        console.print(table)


def _wire_text(seconds: float, sent: float) -> str:
    rate = sent / seconds / 1e9
    return f"{seconds * 1e3:,.3f} / {f'{rate:,.0f}' if rate >= 10 else f'{rate:.2g}'}"


def _table(title: str, left: list[str], right: list[str]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    for name in left:
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, justify="right", overflow="fold")  # on a narrow terminal, no figure is lost
    return table
