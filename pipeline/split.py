"""How a dense batch is cut: which of a run's plans it takes, and the rows of every nano-batch.

Of the plans that are meant for its rows, a batch takes the one that was tuned for the nearest mix, if that is near
enough (`NEAR_MIX`), else the first that is for any mix: the sequential plan, which stands last, is.

Where an executor has graphs for some numbers of rows, a batch is padded up to the next of them. The rows of its
nano-batches then follow from that number alone: a graph serves every mix of decode and prefill rows that fits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from typing import NamedTuple

from nanoflow.pipeline.plan import Plan
from nanoflow.pipeline.plan_mix import NEAR_MIX, PlanMix

__all__ = ["BatchCutter", "Cut", "nano_batch_rows", "split_rows"]

UNITS = (128, 64, 32, 16, 8)
"""Multiples that the rows of padded nano-batches are kept to, the largest that leaves each of them one, and none more
than the plan gives it."""


@dataclass(frozen=True)
class Cut:
    """How the rows of a dense batch are dealt to nano-batches, each list in their order."""

    decode: Sequence[int]
    prefill: Sequence[int]
    rows: Sequence[int]
    """Padding included."""
    program: int = 0
    """The plan, counted as the executor does."""


class _ForMix(NamedTuple):
    number: int
    least_rows: int
    capacity: int
    mix: PlanMix


class BatchCutter:
    """Cuts the dense batches of a run.

    Args:
        plans: in the order of preference, of which the first wins where nothing else tells.
        row_buckets: numbers of rows, ascending, to the next of which a batch is padded; without any, nothing is padded.
    """

    def __init__(self, plans: Sequence[Plan], row_buckets: Sequence[int] = ()) -> None:
        self.plans = tuple(plans)
        self.row_buckets = tuple(row_buckets)
        self.capacity = max(plan.capacity for plan in plans)
        """Most rows of a dense batch, padding not counted."""
        self._by_mix = [_ForMix(n, p.least_rows, p.capacity, p.mix) for n, p in enumerate(plans) if p.mix is not None]
        self._for_any = [(n, p.least_rows, p.capacity) for n, p in enumerate(plans) if p.mix is None]

    def __call__(self, decode_rows: int, prefill_rows: int, decode_tokens: int) -> Cut:
        """The cut of a batch whose decode rows attend to `decode_tokens` tokens in all.

        Raises ValueError if no plan takes it.
        """
        return self.of(self.choose(decode_rows, prefill_rows, decode_tokens), decode_rows, prefill_rows)

    def choose(self, decode_rows: int, prefill_rows: int, decode_tokens: int) -> int:
        """Which plan such a batch takes. Raises ValueError if there is none."""
        total = decode_rows + prefill_rows
        nearest, chosen = NEAR_MIX, None
        for plan in self._by_mix:
            if plan.least_rows <= total <= plan.capacity:
                distance = plan.mix.distance(decode_rows, prefill_rows, decode_tokens)
                if distance < nearest:
                    nearest, chosen = distance, plan.number
        if chosen is not None:
            return chosen
        for number, least_rows, capacity in self._for_any:
            if least_rows <= total <= capacity:
                return number
        raise ValueError(f"{decode_rows} decode and {prefill_rows} prefill rows fit none of the run's plans")

    def of(self, number: int, decode_rows: int, prefill_rows: int) -> Cut:
        """The cut by plan `number`. Raises ValueError if it has no room for so many rows."""
        total = decode_rows + prefill_rows
        plan = self.plans[number]
        bucket = next((rows for rows in self.buckets(number) if rows >= total), None) if total else None
        if bucket is None:
            decode, prefill = split_rows(plan, decode_rows, prefill_rows)
            return Cut(decode, prefill, [d + p for d, p in zip(decode, prefill, strict=True)], number)
        rows = nano_batch_rows(plan, bucket)
        decode, prefill = split_rows(plan, decode_rows, prefill_rows, rows)
        return Cut(decode, prefill, rows, number)

    def buckets(self, number: int) -> tuple[int, ...]:
        """Numbers of rows that batches of plan `number` are padded to: those of `row_buckets`, and its capacity."""
        plan = self.plans[number]
        if not self.row_buckets:
            return ()
        return (*(rows for rows in self.row_buckets if plan.least_rows <= rows < plan.capacity), plan.capacity)


def nano_batch_rows(plan: Plan, rows: int) -> list[int]:
    """Rows of each nano-batch in a batch that is padded to `rows`, at most the plan's capacity.

    At the capacity they are what the plan says. Below it they are in the same proportions, in multiples of 128 if each
    nano-batch gets one and none more rows than the plan gives it, else of 64 and so on; what is left over goes to the
    last.
    """
    capacities = [nano_batch.rows for nano_batch in plan.nano_batches]
    if rows == plan.capacity:
        return capacities
    if len(capacities) == 1:
        return [rows]
    for unit in UNITS:
        result = [units * unit for units in _largest_remainder(rows // unit, capacities)]
        if min(result) > 0:
            result[-1] += rows - sum(result)
            if all(count <= most for count, most in zip(result, capacities, strict=True)):
                return result
    return _largest_remainder(rows, capacities)


def split_rows(
    plan: Plan, decode_rows: int, prefill_rows: int, rows: Sequence[int] | None = None
) -> tuple[list[int], list[int]]:
    """Decode rows and prefill rows of every nano-batch, in the plan's order.

    Rows are shared out by the plan's shares (largest remainder; the earlier nano-batch wins a tie). What a nano-batch
    has no room for spills to those that have, again by their shares. Decode rows are placed first.

    Args:
        rows: room of each nano-batch; by default its capacity.

    Raises ValueError if the rows are negative or more than `plan.capacity`.
    """
    if decode_rows < 0 or prefill_rows < 0 or decode_rows + prefill_rows > plan.capacity:
        raise ValueError(
            f"{decode_rows} decode and {prefill_rows} prefill rows do not fit the plan's capacity, {plan.capacity} rows"
        )
    room = [nano_batch.rows for nano_batch in plan.nano_batches] if rows is None else list(rows)
    decode = _share_out(decode_rows, [nano_batch.decode for nano_batch in plan.nano_batches], room)
    room = [most - taken for most, taken in zip(room, decode, strict=True)]
    return decode, _share_out(prefill_rows, [nano_batch.prefill for nano_batch in plan.nano_batches], room)


def _share_out(rows: int, shares: Sequence[Fraction], room: Sequence[int]) -> list[int]:
    """`rows` in parts of at most `room`, by `shares`; the sum of `room` must be at least `rows`."""
    unit = lcm(*(share.denominator for share in shares))
    weights = [int(share * unit) for share in shares]
    parts = [0] * len(weights)
    left = rows
    while left:
        # Each round fills a nano-batch or places everything, so there are at most as many rounds as nano-batches, and
        # one more when only those without a share are left: they take the rest evenly.
        free = [n for n in range(len(parts)) if parts[n] < room[n]]
        if not free:
            raise ValueError(f"{rows} rows do not fit nano-batches with room for {sum(room)}: raise their `rows`")
        round_weights = [weights[n] for n in free]
        if not any(round_weights):
            round_weights = [1] * len(free)
        for n, quota in zip(free, _largest_remainder(left, round_weights), strict=True):
            taken = min(quota, room[n] - parts[n])
            parts[n] += taken
            left -= taken
    return parts


def _largest_remainder(rows: int, weights: Sequence[int]) -> list[int]:
    """`rows` in whole parts in proportion to `weights`."""
    total = sum(weights)
    quotas = [rows * weight // total for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda n: (-(rows * weights[n] % total), n))
    for n in by_remainder[: rows - sum(quotas)]:
        quotas[n] += 1
    return quotas
