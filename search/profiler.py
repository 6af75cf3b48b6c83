"""Filling a profile: which cases are measured, in which order, and what is kept when it ends early.

Contract: a case that was measured is in the file before the next one begins, so a second start goes on where the first
one was stopped; nothing is measured twice. What cannot be measured is noted and left out, and the others are measured.
The measuring itself is the caller's (`Bench`): on a GPU, on a CPU, or made up.

Pseudo-code::

    for every case, in the order given:
        take the points of it that the profile lacks; without any, go on
        if the time is up, stop
        measure; add; save
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from nanoflow.search.profile import At, Pair, Point, Profile, Solo

__all__ = [
    "Bench",
    "Case",
    "PairCase",
    "Profiled",
    "SoloCase",
    "Unmeasurable",
    "close",
    "fill_profile",
    "network_splits",
    "splits",
]

LEAST_SHARE, MOST_SHARE = 1 / 8, 3 / 8
"""Of a device's SMs, what the memory lanes that are measured have."""
CLOSE_SHARE = 1 / 6, 0.3
"""Where the best plans were found: measured in steps of 4, else of 8."""

NETWORK_SMS = (8, 16)
"""Of the network lanes that are measured: whole groups, and a link is full with few."""


class Unmeasurable(Exception):
    """A case cannot be measured here; the message says why."""


@dataclass(frozen=True)
class SoloCase:
    """One operation with nothing beside it, at some coordinates (`nanoflow.search.profile`)."""

    op: str
    kind: str
    sms: int | None
    at: tuple[At, ...]
    kernel: str = ""
    """Of a collective, which form of it; empty: the preferred one."""
    wire_bytes: float = 0.0
    """Of a collective, the bytes that a rank sends for each row."""
    also: tuple[str, ...] = ()
    """Operations that are the same, and for which it counts too."""

    def __str__(self) -> str:
        form = f" with {self.kernel}" if self.kernel else ""
        return f"{self.op}{form} on {'all' if self.sms is None else self.sms} SMs, {len(self.at)} sizes"


@dataclass(frozen=True)
class PairCase:
    """Two operations at once, on so many SMs each, or for None on streams that share all."""

    op: str
    at: At
    sms: int | None
    other: str
    other_at: At
    other_sms: int | None
    other_kernel: str = ""
    """Of a collective, which form of it."""
    also: tuple[str, ...] = ()
    """Operations that are the same as the second one, and for which it counts too."""

    def __str__(self) -> str:
        where = "" if self.sms is None else f" on {self.sms} and {self.other_sms} SMs"
        form = f" with {self.other_kernel}" if self.other_kernel else ""
        return f"{self.op} beside {self.other}{form}{where}"


Case = SoloCase | PairCase


class Bench(Protocol):
    """What measures."""

    def solo(self, case: SoloCase) -> Sequence[Point]:
        """The points of a case. Raises Unmeasurable."""

    def pair(self, case: PairCase) -> tuple[float, float]:
        """Shares of their solo speeds that the two keep. Raises Unmeasurable."""


@dataclass(frozen=True)
class Profiled:
    """What came of it."""

    profile: Profile
    measured: int
    """Cases that were measured now."""
    left: int
    """Cases that the time was too short for."""
    notes: tuple[str, ...]
    """What could not be measured, and why."""
    stopped: bool = False
    """Whether Ctrl-C ended it."""


def fill_profile(
    profile: Profile,
    cases: Sequence[Case],
    bench: Bench,
    path: Path,
    *,
    until: float = float("inf"),
    clock: Callable[[], float] = time.monotonic,
    progress: Callable[[Case, int], None] = lambda case, left: None,
) -> Profiled:
    """Measure what `profile` lacks of `cases`, and keep it at `path`.

    Args:
        until: on `clock`; no case is begun later.
        progress: told of every case before it is measured, and how many are still to come, itself included.

    Raises ProfileError if the file cannot be written.
    """
    missing = [left for case in cases if (left := _missing(profile, case)) is not None]
    notes: list[str] = []
    for number, case in enumerate(missing):
        if clock() >= until:
            return Profiled(profile, number - len(notes), len(missing) - number, tuple(notes))
        progress(case, len(missing) - number)
        try:
            profile = _measured(profile, case, bench)
        except Unmeasurable as error:
            notes.append(f"{case}: {error}")
            continue
        except KeyboardInterrupt:
            return Profiled(profile, number - len(notes), len(missing) - number, tuple(notes), stopped=True)
        profile.save(path)
    return Profiled(profile, len(missing) - len(notes), 0, tuple(notes))


def network_splits(device_sms: int) -> list[tuple[int, int]]:
    """SMs of the compute lane and of the network lane, of the partitions that are measured: 124 + 8 and 116 + 16 of
    132."""
    return [(device_sms - sms, sms) for sms in NETWORK_SMS if 4 * sms <= device_sms]


def splits(device_sms: int) -> list[tuple[int, int]]:
    """SMs of the compute lane and of the memory lane, of the partitions that are measured.

    92 to 116 and 16 to 40 of 132, among others.
    """
    memory = {sms for sms in range(8, device_sms, 8) if LEAST_SHARE * device_sms - 1 < sms < MOST_SHARE * device_sms}
    memory |= {sms for sms in range(4, device_sms, 4) if close(sms, device_sms)}
    return [(device_sms - sms, sms) for sms in sorted(memory)]


def close(memory: int, device_sms: int) -> bool:
    """Whether a memory lane of so many SMs is of the size that the best plans give it."""
    return CLOSE_SHARE[0] * device_sms < memory < CLOSE_SHARE[1] * device_sms


def _missing(profile: Profile, case: Case) -> Case | None:
    """The case, with the points that are still to be measured; None if there is none."""
    if isinstance(case, PairCase):
        wanted = _pairs(case, 1.0, 1.0)[0].what
        return None if any(pair.what == wanted for pair in profile.pairs) else case
    known = profile.solo(case.op, case.sms, case.kernel)
    have = {point.at for point in known.points} if known is not None else set()
    left = tuple(at for at in dict.fromkeys(case.at) if at not in have)
    return replace(case, at=left) if left else None


def _measured(profile: Profile, case: Case, bench: Bench) -> Profile:
    if isinstance(case, SoloCase):
        points = tuple(bench.solo(case))
        for op in (case.op, *case.also) if points else ():
            profile = profile.with_solo(Solo(op, case.kind, case.sms, points, case.kernel, case.wire_bytes))
        return profile
    for pair in _pairs(case, *bench.pair(case)):
        profile = profile.with_pair(pair)
    return profile


def _pairs(case: PairCase, kept: float, other_kept: float) -> list[Pair]:
    return [
        Pair(
            case.op, case.at, case.sms, kept, other, case.other_at, case.other_sms, other_kept, case.other_kernel
        )
        for other in (case.other, *case.also)
    ]  # fmt: skip
