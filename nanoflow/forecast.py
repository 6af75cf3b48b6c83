"""Predicted use of KV memory and slots.

How long a sequence runs is known if nothing but its limit can end it. Otherwise it is taken to stop with a constant
chance a token, estimated from all tokens and stops seen so far, so that sequences that still run count too.

Legend: R sequences, T times.
"""

from dataclasses import dataclass
from math import exp

import numpy as np
from numpy.typing import NDArray

__all__ = ["Forecast", "Lengths", "StopRate"]

Float = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Lengths:
    """What sequences hold and how long they run, [R] each."""

    held: Float
    """KV tokens held now, or at admission, with what rounding up to pages adds on average."""
    left: Float
    """Iterations until the limit ends it."""
    certain: NDArray[np.bool_]
    """Whether nothing can end it before."""

    def __len__(self) -> int:
        return len(self.held)

    def horizon(self, stop_rate: float) -> float:
        """Iterations after which next to nothing is left of the sequences."""
        left = self.left
        if stop_rate > 0:
            left = np.where(self.certain, left, np.minimum(left, 4 / stop_rate))
        return float(left.max(initial=1.0))


class StopRate:
    """The chance that a token ends a sequence that may stop: stops seen over tokens seen."""

    def __init__(self) -> None:
        self._stops = 0
        self._tokens = 0
        self._limits = 0
        self._sequences = 0

    def expect(self, limit: int) -> None:
        """A sequence came that may stop before its `limit`: before any stop is seen, the mean limit is the guess."""
        self._limits += limit
        self._sequences += 1

    def observe(self, tokens: int, stops: int) -> None:
        """Sequences that may stop produced `tokens` tokens, and `stops` of them stopped."""
        self._tokens += tokens
        self._stops += stops

    @property
    def value(self) -> float:
        if not self._sequences:
            return 0.0
        return (self._stops + 1) / (self._tokens + self._limits / self._sequences)


class Forecast:
    """KV tokens and slots that the given sequences use over the coming iterations if nobody joins them."""

    def __init__(self, lengths: Lengths, stop_rate: float) -> None:
        order = np.argsort(-lengths.left)
        self.size = len(lengths)
        self.stop_rate = stop_rate
        self.horizon = lengths.horizon(stop_rate)
        self._left = lengths.left[order]
        held, certain = lengths.held[order], lengths.certain[order]
        # Running sums over the sequences that last longest: tokens held and number, of the certain and of the others.
        self._may_stop = stop_rate > 0 and not certain.all()
        parts = [np.where(certain, held, 0.0), certain, np.where(certain, 0.0, held), ~certain]
        self._sums = np.zeros((4 if self._may_stop else 2, len(order) + 1))
        for row, part in zip(self._sums, parts if self._may_stop else (held, np.ones(len(order))), strict=True):
            np.cumsum(part, out=row[1:])
        # Use of KV tokens peaks where a sequence joins (now) or is about to end.
        self._times = np.concatenate([np.zeros(1), self._left])
        longer = np.arange(len(order) + 1)  # sequences that last at least as long as each of them
        longer[0] = len(order)
        self._use = self._total(longer, self._times)
        self._bound = float((lengths.held + lengths.left).sum())
        self._joined: list[tuple[float, float, bool]] = []
        self._unchecked: list[tuple[float, float, bool]] = []  # joined, but not in `_use` yet

    def _alive(self, times: Float) -> NDArray[np.int64]:
        """[T] sequences whose limit is not before each time; they are the first ones of the order."""
        return np.searchsorted(-self._left, -times, side="right")

    def _total(self, alive: NDArray[np.int64], times: Float) -> Float:
        """[T] KV tokens that the first `alive` sequences hold, so far as they have not stopped."""
        use: Float = self._sums[0, alive] + self._sums[1, alive] * times
        if self._may_stop:
            use += (self._sums[2, alive] + self._sums[3, alive] * times) * np.exp(-self.stop_rate * times)
        return use

    def tokens(self, times: Float) -> Float:
        """[T] KV tokens in use `times` iterations from now."""
        return self._total(self._alive(times), times)

    def running(self, times: Float) -> Float:
        """[T] sequences that run `times` iterations from now."""
        alive = self._alive(times)
        number: Float = self._sums[1, alive]
        if self._may_stop:
            number = number + self._sums[3, alive] * np.exp(-self.stop_rate * times)
        return number

    def admit(self, held: float, left: float, certain: bool, capacity: float) -> bool:
        """Adds a sequence to the prediction, unless KV tokens in use would then exceed `capacity` at some time."""
        sequence = (held, left, certain)
        if self._bound + held + left <= capacity:  # even if all were at their full length at once
            self._unchecked.append(sequence)
        else:
            for earlier in self._unchecked:
                self._use = self._use_with(*earlier)
                self._join(*earlier)
            self._unchecked.clear()
            use = self._use_with(*sequence)
            if float(use.max()) > capacity:
                return False
            self._use = use
            self._join(*sequence)
        self._bound += held + left
        return True

    def _use_with(self, held: float, left: float, certain: bool) -> Float:
        """KV tokens in use at all `_times` and `left` iterations from now, with one more sequence."""
        decay = 0.0 if certain else self.stop_rate
        use = self._use + (held + self._times) * (self._times <= left) * np.exp(-decay * self._times)
        at_end = float(self.tokens(np.array([left]))[0]) + (held + left) * exp(-decay * left)
        for other_held, other_left, other_certain in self._joined:
            if other_left >= left:
                at_end += (other_held + left) * (1.0 if other_certain else exp(-self.stop_rate * left))
        return np.append(use, at_end)

    def _join(self, held: float, left: float, certain: bool) -> None:
        self._times = np.append(self._times, left)
        self._joined.append((held, left, certain))
