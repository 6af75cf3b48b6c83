"""How many decode and prefill rows each nano-batch of a plan gets."""

from collections.abc import Sequence
from fractions import Fraction
from math import lcm

from nanoflow.pipeline.plan import Plan

__all__ = ["split_rows"]


def split_rows(plan: Plan, decode_rows: int, prefill_rows: int) -> tuple[list[int], list[int]]:
    """Decode rows and prefill rows of every nano-batch, in the plan's order.

    Rows are shared out by the plan's shares (largest remainder; the earlier nano-batch wins a tie). What a nano-batch
    has no room for spills to those that have, again by their shares. Decode rows are placed first.
    Raises ValueError if the rows are negative or more than `plan.capacity`.
    """
    if decode_rows < 0 or prefill_rows < 0 or decode_rows + prefill_rows > plan.capacity:
        raise ValueError(
            f"{decode_rows} decode and {prefill_rows} prefill rows do not fit the plan's capacity, {plan.capacity} rows"
        )
    room = [nano_batch.rows for nano_batch in plan.nano_batches]
    decode = _share_out(decode_rows, [nano_batch.decode for nano_batch in plan.nano_batches], room)
    room = [rows - taken for rows, taken in zip(room, decode, strict=True)]
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
