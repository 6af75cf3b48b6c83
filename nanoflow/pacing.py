"""How many prompt tokens an iteration takes, and whether a sequence may be admitted, from predicted use of KV memory.

Contract: prompts come in at the constant rate that the KV cache can sustain, not whenever memory happens to be free.
Else all sequences of a burst end together, and the dense batch jumps between decode rows alone and a full load of
prompts.

Let the running sequences use U(t) KV tokens t iterations from now if nobody joins them, and let one more sequence hold
a(s) tokens s iterations after its admission (zero once it has ended). Sequences admitted at a rate of r an iteration,
from now until the queue of Q is empty, hold r * (G(t) - G(t - Q / r)), where G is the integral of a.

    rate:   the largest r with U(t) + r * (G(t) - G(t - Q / r)) <= capacity for all t; likewise for the number running
    budget: r * (mean prompt), rounded so that the batch's rows end on a bucket to which they would be padded, and what
            that is too much or too little is made good in the next iteration; everything, if the whole queue fits
    admit:  if the peak of U with the candidate added fits, now and at every expected end

In a steady state this is the rate capacity / E[area], area being the KV tokens that a sequence holds summed over its
iterations; for equal lengths that makes R* = capacity / (input + output / 2) running sequences and R* * (1 + input /
output) rows a batch. Since the rate is found anew all the time, a wrong guess about lengths is corrected as it shows.
"""

from math import ceil

import numpy as np
from numpy.typing import NDArray

from nanoflow.forecast import Forecast, Lengths, StopRate
from nanoflow.kv_cache import KVCache
from nanoflow.sequence import Sequence
from nanoflow.slots import FREE, SlotTable
from nanoflow.waiting import WaitingQueue

__all__ = ["Pacer", "sustainable_rate"]

Int64 = NDArray[np.int64]

_STEADY_SHARE = 0.98
"""Part of the KV cache and of the slots that pacing fills; the rest takes the noise of lengths."""
_FULL_SHARE = 0.99
"""Part that running sequences may be predicted to use; the rest takes the noise of rounding to pages."""
_SLOWEST_PROMPT = 64
"""Iterations that a prompt may take, however slow the rate."""
_RENEWAL = 4
"""Iterations after which the rate is found anew."""
_FOLLOW = 0.2
"""Part of the way to the new rate that pacing goes."""
_LARGEST_CARRY = 128
"""Prompt tokens that the next budget may owe, or be owed, because this one was rounded."""
_QUEUE_RENEWAL = 32
"""Admissions after which the forecast of the queue is made anew."""
_QUEUE_SAMPLE = 512
"""Sequences of the queue, spread over all of it, that the forecast is made of."""
_GRID = 32
"""Times at which the prediction is compared with the capacity, and rates that are tried at once."""


class Pacer:
    """Decides on prompt tokens and admissions of one scheduler; its `stop_rate` wants to know of tokens and stops."""

    def __init__(self, kv: KVCache, slots: SlotTable, queue: WaitingQueue, max_running: int, max_tokens: int) -> None:
        self.stop_rate = StopRate()
        self.held_back = False
        """Whether the last iteration's prompts were held back; else all that waits was predicted to fit."""
        self._slots = slots
        self._queue = queue
        self._max_running = max_running
        self._max_tokens = max_tokens
        self._tokens = float(kv.usable_pages * kv.page_size)
        # A sequence's last page is half empty on average.
        self._rounding = (kv.page_size - 1) / 2
        self._queue_forecast: Forecast | None = None
        self._queue_made = 0  # admissions when it was made
        self._mean_prompt = 1.0
        self._rate = 0.0  # sequences an iteration
        self._renewal = 0  # iterations until it is found anew
        self._carry = 0.0  # prompt tokens that the last budget was short of

    def queue_changed(self) -> None:
        """The queue has grown: what was predicted is out of date."""
        self._renewal = 0
        self.held_back = False
        if self._queue_forecast is not None and self._queue_forecast.size < _QUEUE_SAMPLE:
            self._queue_forecast = None

    def forecast(self) -> Forecast:
        """What the running sequences will use; a prompt that is partly done counts as done."""
        slots = self._slots
        used = np.flatnonzero(slots.epoch != FREE)
        held = np.maximum(slots.computed[used], slots.target[used]) + self._rounding
        left = (slots.limit[used] - slots.sampled[used]).astype(np.float64)
        return Forecast(Lengths(held, left, slots.certain[used]), self.stop_rate.value)

    def admit(self, forecast: Forecast, sequence: Sequence) -> bool:
        """Adds a sequence to the forecast if its KV tokens will fit."""
        left = float(sequence.limit - len(sequence.output))
        return forecast.admit(len(sequence) + self._rounding, left, sequence.certain, _FULL_SHARE * self._tokens)

    def prompt_tokens(
        self, forecast: Forecast, admissions: int, decode: int, partial: int | None, row_buckets: Int64
    ) -> int:
        """Prompt tokens that the next iteration may take.

        Args:
            forecast: of the running sequences.
            admissions: admissions so far.
            decode: decode rows of the iteration.
            partial: slot whose prompt is partly done.
            row_buckets: row counts to the next of which a batch is padded, ascending.
        """
        if self._renewal == 0:
            self._renewal = _RENEWAL
            rate = self._sustainable_rate(forecast, admissions)
            held_back = rate * self._mean_prompt < self._max_tokens - 0.5
            # Lengths make the rate jitter from one time to the next.
            follow = _FOLLOW if held_back and self.held_back else 1.0
            self._rate += follow * (rate - self._rate)
            self.held_back = held_back
        self._renewal -= 1
        tokens = self._rate * self._mean_prompt + self._carry
        least = self._least_tokens(decode, partial)
        if self.held_back:
            ends = row_buckets[(row_buckets >= decode + max(least, 1)) & (row_buckets <= self._max_tokens)] - decode
            nearest = int(ends[np.argmin(np.abs(ends - tokens))]) if len(ends) else 0
            # Further away, the next batches would only make up for this one.
            if nearest and abs(nearest - tokens) <= _LARGEST_CARRY:
                self._carry = tokens - nearest
                return nearest
        whole = max(int(tokens), least)
        # What was rounded up is still owed; what the least took beyond the rate is not.
        self._carry = min(tokens, max(0.0, tokens - whole))
        return whole

    def _least_tokens(self, decode: int, partial: int | None) -> int:
        """Prompt tokens below which pacing only wastes time: a prompt that is begun holds pages, and rows are idle."""
        if partial is None:
            return 0 if decode else 1
        target = int(self._slots.target[partial])
        return ceil(target / _SLOWEST_PROMPT) if decode else target - int(self._slots.computed[partial])

    def _sustainable_rate(self, running: Forecast, admissions: int) -> float:
        """Sequences to admit an iteration, the queue's forecast renewed if enough of it was admitted."""
        queue = self._queue_forecast
        if queue is None or admissions >= self._queue_made + _QUEUE_RENEWAL:
            queue = self._queue_forecast = self._forecast_queue()
            self._queue_made = admissions
        queue.stop_rate = running.stop_rate
        return sustainable_rate(
            running,
            queue,
            queued=len(self._queue) + self._queue.expected,
            capacity=_STEADY_SHARE * self._tokens,
            max_running=_STEADY_SHARE * self._max_running,
            highest=self._max_tokens / self._mean_prompt,
        )

    def _forecast_queue(self) -> Forecast:
        sample = self._queue.sample(_QUEUE_SAMPLE)
        held = np.array([len(s) for s in sample], np.float64)
        left = np.array([s.limit - len(s.output) for s in sample], np.float64)
        self._mean_prompt = float(held.mean())
        certain = np.array([s.certain for s in sample], np.bool_)
        return Forecast(Lengths(held + self._rounding, left, certain), self.stop_rate.value)


def sustainable_rate(
    running: Forecast, queue: Forecast, queued: float, capacity: float, max_running: float, highest: float
) -> float:
    """Sequences to admit an iteration: the highest constant rate, up to `highest`, that never exceeds the capacities.

    Args:
        running: the sequences that run now.
        queue: a sample of those that wait; all times count from their admission.
        queued: number of those that wait; infinite if more will come.
        capacity: KV tokens.
        max_running: slots.
    """
    times = np.linspace(0.0, max(running.horizon, queue.horizon), _GRID + 1)
    step = times[1]
    room = np.stack([capacity - running.tokens(times), max_running - running.running(times)])
    one = np.stack([queue.tokens(times), queue.running(times)]) / queue.size
    # What sequences hold that joined at rate 1 from now on.
    area = np.zeros_like(one)
    np.cumsum((one[:, 1:] + one[:, :-1]) * (step / 2), axis=1, out=area[:, 1:])
    rate = max(0.0, float((room[:, 1:] / area[:, 1:]).min()))
    if rate * times[-1] <= queued:
        return min(rate, highest)
    # The queue is empty before the horizon: higher rates may do, since their load passes.
    low = max(rate, 1e-6 * highest)
    for _ in range(2):
        rates = np.geomspace(low, max(highest, low), _GRID)
        ended = np.maximum(times[None, 1:] - queued / rates[:, None], 0.0)
        fits = np.ones(_GRID, np.bool_)
        for free, held in zip(room, area, strict=True):
            load = rates[:, None] * (held[None, 1:] - np.interp(ended, times, held))
            fits &= (load <= free[None, 1:]).all(axis=1)
        best = int(np.flatnonzero(fits)[-1]) if fits.any() else 0
        if best == _GRID - 1:
            return highest
        low, highest = float(rates[best]), float(rates[best + 1])
    return low if fits.any() else rate
