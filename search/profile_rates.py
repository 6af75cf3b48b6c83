"""Rates from a profile: what was measured, in between by interpolation, beyond by the ceilings' shape.

Pseudo-code of `seconds`, for an operation that was measured::

    coordinates of the work (`nanoflow.search.profile`)
    for the measured numbers of SMs on either side of the lane's:
        along each coordinate in turn:
            between two measured values   linear in time: monotone there, and exact at both
            beyond all of them            that of the nearest, times how much longer the ceilings say that it takes
    between the two numbers of SMs        linear in speed
    beyond them                           the nearest one's, times what the ceilings say

So nothing is ever carried on along a straight line beyond what was measured. What the coordinates leave out of the work
(several prompts in place of one) counts as the ceilings say, and so does an operation that was not measured at all.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nanoflow.ops.operation import Cost, Operation, Work
from nanoflow.ops.own_rows import OwnRows
from nanoflow.search.profile import At, Profile, Solo, axes_of, work_at
from nanoflow.search.rates import CeilingRates, Energy, Running
from nanoflow.search.simulate import CLOCK_ENERGY

__all__ = ["ProfileRates", "profile_rates"]

LIBRARY = ("nccl", "reference")
"""Kernels of collectives, of which a device prefers one."""

_Form = tuple[str, str]
"""An operation, and of a collective the form; empty: the preferred one."""

Shape = Callable[[tuple[float, ...]], float]
"""What ceilings say of a point at some coordinates."""


@dataclass(frozen=True)
class ProfileRates:
    """The rates of the device and the model of a profile; see `profile_rates`."""

    profile: Profile
    base: CeilingRates
    """For what was not measured, and for the shape of what lies beyond."""
    _solos: Mapping["_Form", tuple["_Table", ...]]
    """By operation, and form of a collective, ascending by SMs."""
    _pairs: Mapping[tuple["_Form", "_Form"], tuple["_Turned", ...]]
    _seconds: dict[tuple["_Form", Work, int | None], float] = field(default_factory=dict, repr=False, compare=False)
    """Kept: a simulation asks for the same again and again."""

    @property
    def device_sms(self) -> int:
        return self.base.device_sms

    @property
    def itemsize(self) -> int:
        return self.base.itemsize

    @property
    def idle_watts(self) -> float | None:
        return self.base.idle_watts

    @property
    def limit_watts(self) -> float | None:
        return self.base.limit_watts

    def seconds(self, op: Operation, work: Work, sms: int | None, kernel: str = "") -> float:
        if isinstance(op, OwnRows):
            return self.seconds(op.op, op.share(work), sms)
        form = self._form(op.name, kernel)
        tables = self._solos.get(form)
        if not tables or not _has_rows(op, work):
            return self.base.seconds(op, work, sms, kernel)
        key = form, work, sms
        if key not in self._seconds:
            on = self.device_sms if sms is None else sms
            self._seconds[key] = self._measured(op, work, on, tables, kernel)
        return self._seconds[key]

    def kept(self, running: Running, beside: Sequence[Running]) -> float:
        """As measured for the pair; of several beside it, each takes its share of what the others left."""
        share, unknown = 1.0, []
        form = self._form(running.op.name, running.kernel)
        for other in beside:
            pairs = self._pairs.get((form, self._form(other.op.name, other.kernel)), ())
            alike = [pair for pair in pairs if (pair.sms is None) == (running.sms is None)]
            if alike:
                known = sorted((pair.sms or 0, self._kept_by(pair, running, other)) for pair in alike)
                share *= _between(known, running.sms or 0)
            else:
                unknown.append(other)
        if unknown:
            share *= self.base.kept(running, unknown)
        return min(1.0, share)

    def _form(self, op: str, kernel: str) -> "_Form":
        """What a kernel was measured as: the one that a device prefers has no name there."""
        return (op, "") if kernel in LIBRARY and (op, kernel) not in self._solos else (op, kernel)

    def _kept_by(self, pair: "_Turned", running: Running, other: Running) -> float:
        """What `running` keeps beside `other`, as `pair` has it. In a confined lane it is no more than the ceilings
        allow: few rows, say, read more of memory in their time than those that were measured."""
        kept = self._at_full_clock(pair, running, other)
        return kept if running.sms is None else min(kept, self.base.kept(running, [other]))

    def _at_full_clock(self, pair: "_Turned", running: Running, other: Running) -> float:
        """What `running` keeps beside `other`, had power limited nothing.

        A pair runs so long that the power limit answers, and what was measured has a lower clock in it. With D the
        watts of the work at the speeds that were kept, but with the joules of the full clock, P the limit and W what is
        drawn whatever runs, all was stretched by ``(D / (P - W)) ** (1 / CLOCK_ENERGY)``: the formula of
        `nanoflow.search.simulate`, solved for work that is stretched already.
        """
        watts, limit = self.idle_watts, self.limit_watts
        if watts is None or limit is None or limit <= watts:
            return pair.kept
        both = (running, pair.at, pair.sms, pair.kept), (other, pair.other_at, pair.other_sms, pair.other_kept)
        drawn = 0.0
        for each, at, sms, kept in both:
            work = work_at(axes_of(each.op), at)
            drawn += kept * self.joules(each.op, work, sms) / self.seconds(each.op, work, sms, each.kernel)
        return min(1.0, pair.kept * float(max(1.0, drawn / (limit - watts)) ** (1 / CLOCK_ENERGY)))

    def joules(self, op: Operation, work: Work, sms: int | None) -> float:
        """As measured on the whole device, whatever the SMs, less what the device draws whatever runs."""
        if isinstance(op, OwnRows):
            return self.joules(op.op, op.share(work), sms)
        table = next((table for table in self._solos.get((op.name, ""), ()) if table.joules), None)
        if table is None or self.idle_watts is None or not _has_rows(op, work):
            return self.base.joules(op, work, sms)
        at, least = _coordinates(op, work), self.base.joules(op, work, sms)

        def shape(at: tuple[float, ...]) -> float:
            cost = op.cost(work_at(table.kind, at), self.itemsize)
            return cost.flops + 200.0 * cost.bytes  # an H100 spends about as much on a byte as on 200 FLOPs

        found = _value(table.joules, at, shape) * _left_over(op, work, at, shape, table.kind, self.itemsize)
        # Of noise there is no negative energy.
        return max(found, 0.1 * least, 0.0)

    def _measured(self, op: Operation, work: Work, sms: int, tables: Sequence["_Table"], kernel: str) -> float:
        at = _coordinates(op, work)

        def ceiling(work: Work, sms: int) -> float:
            return self.base.seconds(op, work, sms, kernel)

        def on(table: "_Table") -> float:
            def shape(at: tuple[float, ...]) -> float:
                return ceiling(work_at(table.kind, at), table.sms)

            return _value(table.seconds, at, shape) * ceiling(work, table.sms) / shape(at)

        place = bisect_left([table.sms for table in tables], sms)
        if place < len(tables) and tables[place].sms == sms:
            return on(tables[place])
        if 0 < place < len(tables):
            low, high = tables[place - 1], tables[place]
            part = (sms - low.sms) / (high.sms - low.sms)
            return 1 / ((1 - part) / on(low) + part / on(high))
        nearest = tables[0 if place == 0 else -1]
        return on(nearest) * ceiling(work, sms) / ceiling(work, nearest.sms)


def profile_rates(profile: Profile, itemsize: int, energy: Energy | None = None) -> ProfileRates:
    """The rates of a profile.

    Args:
        itemsize: bytes of an element in it.
        energy: of the device, if it is known: fitted to whole runs, it counts then, for all operations. Else the
            profile's own joules do, beyond its idle watts, and what was not measured takes none.
    """
    known = energy is not None
    if energy is None and profile.idle_watts is not None:
        energy = Energy(0.0, 0.0, profile.idle_watts)
    device_sms = profile.fingerprint.sms or 1
    ceilings = replace(
        profile.ceilings, link_bytes_per_second=_fastest_link(profile) or profile.ceilings.link_bytes_per_second
    )
    base = CeilingRates(ceilings, device_sms, itemsize, energy=energy)
    solos: dict[_Form, list[_Table]] = {}
    for solo in profile.solos:
        own = _table(solo, device_sms, None if known else base.idle_watts)
        solos.setdefault((solo.op, solo.kernel), []).append(own)
    pairs: dict[tuple[_Form, _Form], tuple[_Turned, ...]] = {}
    for pair in profile.pairs:
        one, other = (pair.op, ""), (pair.other, pair.other_kernel)
        straight = _Turned(pair.at, pair.sms, pair.kept, pair.other_at, pair.other_sms, pair.other_kept)
        turned = _Turned(pair.other_at, pair.other_sms, pair.other_kept, pair.at, pair.sms, pair.kept)
        for key, each in (((one, other), straight), ((other, one), turned)):
            pairs[key] = (*pairs.get(key, ()), each)
    tables = {form: tuple(sorted(each, key=lambda table: table.sms)) for form, each in solos.items()}
    return ProfileRates(profile, base, tables, pairs)


def _fastest_link(profile: Profile) -> float | None:
    """Bytes/s that a rank sends in the fastest of the collectives that were measured; None if none were."""
    sent = [solo for solo in profile.solos if solo.wire_bytes]
    return max((solo.wire_bytes * p.at[0] / p.seconds for solo in sent for p in solo.points), default=None)


@dataclass(frozen=True)
class _Turned:
    """What one of a pair keeps beside the other."""

    at: At
    sms: int | None
    kept: float
    other_at: At
    other_sms: int | None
    other_kept: float


@dataclass(frozen=True)
class _Table:
    kind: str
    sms: int
    seconds: Any
    """Nested by coordinate: (values, ascending; what belongs to each)."""
    joules: Any
    """The same, beyond what is drawn whatever runs; None where none were measured, or none count."""


def _table(solo: Solo, device_sms: int, idle_watts: float | None) -> _Table:
    seconds = {point.at: point.seconds for point in solo.points}
    joules = {
        point.at: max(0.0, point.joules - idle_watts * point.seconds)
        for point in solo.points
        if point.joules is not None and idle_watts is not None
    }
    whole = device_sms if solo.sms is None else solo.sms
    return _Table(solo.kind, whole, _nested(seconds), _nested(joules) if joules else None)


def _nested(points: Mapping[At, float]) -> Any:
    if () in points:
        return points[()]
    first: dict[int, dict[At, float]] = {}
    for at, value in points.items():
        first.setdefault(at[0], {})[at[1:]] = value
    values = sorted(first)
    return values, [_nested(first[value]) for value in values]


def _value(nested: Any, at: tuple[float, ...], shape: Shape, before: tuple[float, ...] = ()) -> float:
    """What belongs to the coordinates `at`, behind those in `before`."""
    if not at:
        return float(nested)
    values: list[int] = nested[0]
    parts: list[Any] = nested[1]
    first, *rest = at
    place = bisect_left(values, first)

    def of(index: int) -> float:
        return _value(parts[index], tuple(rest), shape, (*before, float(values[index])))

    if place < len(values) and values[place] == first:
        return of(place)
    if 0 < place < len(values):
        low, high = values[place - 1], values[place]
        part = (first - low) / (high - low)
        return (1 - part) * of(place - 1) + part * of(place)
    nearest = 0 if place == 0 else -1
    grown = shape((*before, *at)) / shape((*before, float(values[nearest]), *rest))
    return of(nearest) * grown


def _coordinates(op: Operation, work: Work) -> tuple[float, ...]:
    kind = axes_of(op)
    if kind == "decode":
        return float(work.decode_rows), work.decode_context / work.decode_rows
    if kind == "prefill":
        rows = float(work.prefill_rows)
        return rows, max(0.0, work.prefill_pairs / rows - (rows + 1) / 2)
    return (float(work.rows),)


def _has_rows(op: Operation, work: Work) -> bool:
    rows = {"decode": work.decode_rows, "prefill": work.prefill_rows, "rows": work.rows}
    return rows[axes_of(op)] > 0


def _left_over(op: Operation, work: Work, at: tuple[float, ...], shape: Shape, kind: str, itemsize: int) -> float:
    """How much more the work is than what its coordinates stand for."""
    own: Cost = op.cost(work, itemsize)
    return (own.flops + 200.0 * own.bytes) / shape(at)


def _between(known: Sequence[tuple[int, float]], sms: int) -> float:
    """Linear between numbers of SMs, and that of the nearest beyond them."""
    values = [each for each, _ in known]
    place = bisect_left(values, sms)
    if place == len(known) or place == 0:
        return known[min(place, len(known) - 1)][1]
    (low, below), (high, above) = known[place - 1], known[place]
    part = (sms - low) / (high - low)
    return below + part * (above - below)
