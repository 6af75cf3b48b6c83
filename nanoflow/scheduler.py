"""Which tokens form the next dense batch.

Contract: one iteration may be in flight, so `form` makes iteration i + 1 before `update` has seen the tokens of
iteration i.

- A running sequence has at most one decode row a batch; its input token is on the device. Decode rows come first,
  prompts follow in the order of the queue (`waiting`); at most one prompt is partly done at any time, and it is the
  latest admitted.
- A sequence whose token in flight is the last that it may have (`max_tokens`, context) gets no further row. A stop that
  only the token itself shows is noticed late, and the token sampled after it is dropped.
- A sequence that follows a grammar decodes in every iteration like the others, although the mask of its next token
  depends on the token in flight: only sampling needs the mask. Masks of iteration i + 1 are made once `update` has seen
  iteration i, while the device computes the logits; so iteration i must be collected after i + 1 is launched, and an
  executor must not wait for the masks of i + 1 in its launch.
- A row that needs a page when none is free sits out if a token of its sequence is in flight (it may have stopped), and
  otherwise preempts the latest-admitted sequence, or sits out if that is itself: the earliest-admitted always goes on.
- A preempted sequence gives up pages and slot. It waits until its token in flight is seen, then its prompt and output
  are prefilled and the next position is sampled: no position is sampled twice.
- Pages may be handed out as soon as they are free, although the iteration in flight may still use them: the device runs
  iterations in order.

    form:    decode rows <- running sequences that may go on, pages permitting
             prompt tokens <- pacing(running, waiting); fill from the partly done prompt, then admit from the queue
             lay the rows out over the nano-batches
    update:  record the tokens of sequences that are not finished; finish those that stop; free their pages
"""

import time
from collections.abc import Iterable, Sequence as Many
from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import NDArray

from nanoflow.dense_batch import CutBatch, form_dense_batch, lay_out
from nanoflow.forecast import Forecast
from nanoflow.kv_cache import KVCache
from nanoflow.ops.batch import DenseBatch, StepOutput
from nanoflow.pacing import Pacer
from nanoflow.request_check import Lengths
from nanoflow.sequence import FinishReason, Sequence
from nanoflow.slots import FREE, SlotTable
from nanoflow.waiting import WaitingQueue

__all__ = ["Iteration", "Scheduler"]

Int32 = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Iteration:
    """One formed iteration: what to launch, and whose tokens come back."""

    batch: DenseBatch
    sampled: list[Sequence]
    """[S] sequence of each entry of ``batch.sampling``; empty if nothing is sampled."""
    slots: Int32
    """[S] their slots."""
    epochs: NDArray[np.int64]
    """[S] their admissions, which tell whether a slot still belongs to the sequence when the tokens arrive."""


@dataclass(frozen=True)
class _Chunk:
    slot: int
    start: int
    length: int
    pages: int
    """Pages that it needs beyond those that the slot holds."""
    completes: bool


class Scheduler:
    """Continuous batching with chunked prefill over a paged KV cache.

    Args:
        kv: the KV cache; its slots are this scheduler's.
        cut: deals (decode rows, prefill rows, tokens that decode rows attend to) to nano-batches, and pads them.
        max_batch_tokens: rows of a dense batch, padding not counted.
        max_running: sequences that hold a slot at a time; at most ``kv.max_running``.
        max_model_len: tokens of prompt and output that a sequence may have.
        row_buckets: row counts, ascending, to the next of which `cut` pads a batch; prompts are paced so that batches
            end on one.
        eos_token_ids: tokens that end a sequence, unless it ignores them.
    """

    def __init__(
        self,
        *,
        kv: KVCache,
        cut: CutBatch,
        max_batch_tokens: int,
        max_running: int,
        max_model_len: int,
        row_buckets: Many[int] = (),
        eos_token_ids: Iterable[int] = (),
    ) -> None:
        if not 1 <= max_running <= kv.max_running:
            raise ValueError(f"max_running must be from 1 to the KV cache's {kv.max_running} slots, not {max_running}")
        if max_batch_tokens < 1 or max_model_len < 2:
            raise ValueError(
                "max_batch_tokens must be at least 1 and max_model_len at least 2, "
                f"not {max_batch_tokens} and {max_model_len}"
            )
        self.row_buckets = np.array(row_buckets, np.int64)
        if len(row_buckets) and (self.row_buckets[0] < 1 or (np.diff(self.row_buckets) <= 0).any()):
            raise ValueError(f"row_buckets must be ascending numbers from 1, not {list(row_buckets)}")
        self.kv = kv
        self.cut = cut
        self.max_batch_tokens = max_batch_tokens
        # More running sequences than rows would only take turns.
        self.max_running = min(max_running, max_batch_tokens)
        self.max_model_len = max_model_len
        self.eos_token_ids = np.unique(np.array(list(eos_token_ids), np.int32))
        self.admitting = True
        """Whether waiting sequences are admitted; if not, those that run go on to their end."""
        self.preemptions = 0
        """Preemptions so far."""
        self.token_gaps: dict[float, int] = {}
        """Of the last update: seconds between a token and the one before it of its sequence -> how many tokens."""
        self.unfinished = 0
        """Sequences added and not finished."""
        self._lengths = Lengths(max_model_len, kv.page_size, min(kv.usable_pages, kv.max_pages_per_sequence))
        self._slots = SlotTable(kv.max_running)
        self._epoch = 0
        self._queue = WaitingQueue()
        self._pacer = Pacer(kv, self._slots, self._queue, self.max_running, max_batch_tokens)

    def renewed(self) -> "Scheduler":
        """A scheduler with the same limits that has seen nothing yet, over a KV cache of the same size."""
        kv = self.kv
        renewed = Scheduler(
            kv=KVCache(kv.pages, kv.page_size, kv.max_running, kv.max_pages_per_sequence),
            cut=self.cut,
            max_batch_tokens=self.max_batch_tokens,
            max_running=self.max_running,
            max_model_len=self.max_model_len,
            row_buckets=self.row_buckets.tolist(),
            eos_token_ids=self.eos_token_ids.tolist(),
        )
        renewed.longest_first = self.longest_first
        return renewed

    @property
    def sizes(self) -> dict[str, int]:
        """The limits in force, for reports."""
        return {
            "max_batch_tokens": self.max_batch_tokens,
            "max_running": self.max_running,
            "max_model_len": self.max_model_len,
            "page_size": self.kv.page_size,
            "kv_tokens": self.kv.usable_pages * self.kv.page_size,
        }

    @property
    def running(self) -> int:
        """Sequences that hold a slot."""
        return self._slots.running

    @property
    def waiting(self) -> int:
        """Sequences that wait for their first admission or, after a preemption, for the next."""
        return len(self._queue)

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens of the sequences that wait."""
        return self._queue.prompt_tokens

    @property
    def longest_first(self) -> bool:
        """Whether long sequences are admitted before short ones; it can change while none waits."""
        return self._queue.longest_first

    @longest_first.setter
    def longest_first(self, value: bool) -> None:
        self._queue.longest_first = value

    @property
    def paced(self) -> bool:
        """Whether the last batch's prompts were held back so that the KV cache can keep up."""
        return self._pacer.held_back

    @property
    def expects_more(self) -> bool:
        """Whether more sequences will be added while others run; pacing then takes the queue for endless."""
        return self._queue.expected > 0

    @expects_more.setter
    def expects_more(self, value: bool) -> None:
        self._queue.expected = inf if value else 0.0

    @property
    def expected(self) -> float:
        """Sequences that will be added while others run, where their number is known; infinite if they are many."""
        return self._queue.expected

    @expected.setter
    def expected(self, value: float) -> None:
        self._queue.expected = value

    def check(self, prompt: int, max_tokens: int) -> int:
        """See `Lengths.check`."""
        return self._lengths.check(prompt, max_tokens)

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence into the queue. Raises ValueError as `check` does."""
        limit = self.check(len(sequence.prompt), sequence.params.max_tokens)
        params = sequence.params
        sequence.limit = limit
        may_stop = params.stop or params.stop_token_ids or sequence.constraint is not None
        sequence.certain = params.ignore_eos and not may_stop
        if not sequence.certain:
            self._pacer.stop_rate.expect(limit)
        self._queue.add(sequence)
        self._pacer.queue_changed()
        self.unfinished += 1

    def form(self) -> Iteration | None:
        """The next iteration, or None if nothing can run before tokens in flight are seen (or all is finished)."""
        decode, short_of_pages = self._decode_slots()
        chunks = self._prompt_chunks(len(decode), admit=not short_of_pages)
        if not len(decode) and not chunks:
            return None
        slots = self._slots
        chunk_slots = np.array([c.slot for c in chunks], np.int32)
        chunk_starts = np.array([c.start for c in chunks], np.int32)
        chunk_lengths = np.array([c.length for c in chunks], np.int32)
        pieces = [slots.tokens[c.slot][c.start : c.start + c.length] for c in chunks]
        chunk_tokens = np.concatenate(pieces) if pieces else np.zeros(0, np.int32)
        attended = int(slots.computed[decode].sum(dtype=np.int64)) + len(decode)  # each attends to its own token too
        layout = lay_out(self.cut, len(decode), len(chunk_tokens), attended)
        completes = np.array([c.completes for c in chunks], np.bool_)
        last_rows = layout.prefill_rows[np.cumsum(chunk_lengths)[completes] - 1]
        sampled_rows = np.concatenate([layout.decode_rows, last_rows]).astype(np.int32)
        sampled_slots = np.concatenate([decode, chunk_slots[completes]])
        batch = form_dense_batch(
            layout,
            self.kv,
            decode,
            slots.computed[decode],
            chunk_slots,
            chunk_starts,
            chunk_lengths,
            chunk_tokens,
            slots.sampling_batch(sampled_rows, sampled_slots) if len(sampled_rows) else None,
        )
        slots.computed[decode] += 1
        slots.computed[chunk_slots] += chunk_lengths
        sequences = slots.sequences
        sampled = [s for slot in sampled_slots.tolist() if (s := sequences[slot]) is not None]
        return Iteration(batch, sampled, sampled_slots, slots.epoch[sampled_slots])

    def update(self, iteration: Iteration, output: StepOutput | None) -> list[Sequence]:
        """Records an iteration's tokens; iterations come back in the order in which they were formed.

        Returns the sequences that got a token; those that it ended have a `finish_reason` and hold nothing any more.
        """
        self.token_gaps = {}
        if not iteration.sampled:
            return []
        if output is None or len(output.tokens) != len(iteration.sampled):
            found = "no tokens" if output is None else f"{len(output.tokens)} tokens"
            raise ValueError(f"an iteration that samples {len(iteration.sampled)} sequences came back with {found}")
        slots = self._slots
        now = time.perf_counter()
        live = slots.epoch[iteration.slots] == iteration.epochs
        own = iteration.slots[live]
        before = slots.last_token[own]
        slots.last_token[own] = now
        slots.in_flight[own] -= 1
        seen = slots.sampled[own] - slots.in_flight[own]
        # Entries that need more than their token appended. One that is not live was preempted or has ended.
        special = ~live
        special[live] = (
            ((output.tokens[live, None] == self.eos_token_ids).any(axis=1) & ~slots.ignore_eos[own])
            | (seen >= slots.limit[own])
            | (seen == 1)
            | slots.has_stop_ids[own]
            | slots.constrained[own]
            | slots.wants_logprobs[own]
        )
        self._pacer.stop_rate.observe(tokens=int(np.count_nonzero(~slots.certain[own])), stops=0)
        received, tokens = iteration.sampled, output.tokens.tolist()
        if not live.all():  # those that ended since then get none; a live one has not
            entries = [entry for entry, s in enumerate(received) if s.finish_reason is None]
            received, tokens = [received[entry] for entry in entries], [tokens[entry] for entry in entries]
        for sequence, token in zip(received, tokens, strict=True):
            sequence.output.append(token)
        for entry in np.flatnonzero(special).tolist():
            sequence = iteration.sampled[entry]
            if not live[entry]:
                sequence.in_flight -= 1
                if sequence.finish_reason is None:
                    before = np.append(before, sequence.last_token_time)
                    sequence.last_token_time = now
            if sequence.finish_reason is None:
                self._inspect(sequence, output, entry, now)
        # Most had the token before together, in one iteration; a first token has none before it.
        times, counts = np.unique(before[before > 0], return_counts=True)
        self.token_gaps = dict(zip((now - times).tolist(), counts.tolist(), strict=True))
        return received

    def _inspect(self, sequence: Sequence, output: StepOutput, entry: int, now: float) -> None:
        """Looks at a token that was just appended: log-probabilities, the first token's time, the grammar, stops."""
        params = sequence.params
        token = sequence.output[-1]
        if params.logprobs is not None:
            _record_logprobs(sequence, output, entry)
        if sequence.first_token_time is None:
            sequence.first_token_time = now
        constraint = sequence.constraint
        if constraint is not None and constraint.advance(token):
            self.finish(sequence, "stop" if constraint.error is None else "error")
        elif (token in self.eos_token_ids and not params.ignore_eos) or token in params.stop_token_ids:
            self.finish(sequence, "stop")
        elif len(sequence.output) >= sequence.limit:
            self.finish(sequence, "length")

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Ends a sequence, wherever it is: pages and slot are free at once, its tokens in flight will be dropped."""
        if sequence.finish_reason is not None:
            raise ValueError(f"sequence {sequence.index} is finished already ({sequence.finish_reason})")
        sequence.finish_reason = reason
        sequence.finish_time = time.perf_counter()
        self.unfinished -= 1
        if reason == "stop":
            self._pacer.stop_rate.observe(tokens=0, stops=1)
        if sequence.slot >= 0:
            self._release(sequence.slot)
        else:
            self._queue.discard(sequence)

    def _release(self, slot: int) -> None:
        self.kv.free(slot)
        self._slots.release(slot)

    def _decode_slots(self) -> tuple[Int32, bool]:
        """Slots [D] that decode one token, their pages allocated; whether any was short of pages."""
        slots, kv = self._slots, self.kv
        ready = (slots.epoch != FREE) & (slots.computed >= slots.target) & (slots.sampled < slots.limit)
        decode = np.flatnonzero(ready).astype(np.int32)
        needy = decode[slots.computed[decode] == kv.page_count[decode] * kv.page_size]
        if len(needy) <= kv.free_pages:
            kv.allocate(needy, np.ones(len(needy), np.int32))
            return decode, False
        one = np.ones(1, np.int32)
        for slot in needy[np.argsort(slots.epoch[needy])]:
            if slots.epoch[slot] == FREE:  # preempted by an earlier one
                continue
            if not kv.free_pages and not slots.in_flight[slot]:
                latest = int(np.argmax(slots.epoch))
                if latest != slot:
                    self._preempt(latest)
            if kv.free_pages:
                kv.allocate(slot[None], one)
            else:
                ready[slot] = False
        return np.flatnonzero(ready & (slots.epoch != FREE)).astype(np.int32), True

    def _preempt(self, slot: int) -> None:
        sequence = self._slots.sequences[slot]
        assert sequence is not None
        self._release(slot)
        sequence.preemptions += 1
        self.preemptions += 1
        self._queue.put_back(sequence)

    def _prompt_chunks(self, decode: int, admit: bool) -> list[_Chunk]:
        """Chunks of prompts beside `decode` decode rows, their pages allocated: the partly done prompt first."""
        slots = self._slots
        budget = self.max_batch_tokens - decode
        chunks: list[_Chunk] = []
        partial = np.flatnonzero((slots.epoch != FREE) & (slots.computed < slots.target))
        slot = int(partial[0]) if len(partial) else None
        free = self.kv.free_pages
        forecast = None
        if budget and self.waiting:
            forecast = self._pacer.forecast()
            budget = min(budget, self._pacer.prompt_tokens(forecast, self._epoch, decode, slot, self.row_buckets))
        while budget > 0:
            if slot is None:
                candidate = self._queue.head() if admit and self.admitting and free else None
                if candidate is None or not self._admissible(candidate, forecast):
                    break
                slot = self._admit(candidate)
            chunk = self._chunk(slot, budget, free)
            if chunk is None:
                break
            chunks.append(chunk)
            free -= chunk.pages
            budget -= chunk.length
            if not chunk.completes:
                break
            slot = None
        if chunks:
            self.kv.allocate(np.array([c.slot for c in chunks]), np.array([c.pages for c in chunks]))
        return chunks

    def _chunk(self, slot: int, budget: int, free_pages: int) -> _Chunk | None:
        """The next chunk of a slot's prompt; None if no page is free for even one token."""
        kv = self.kv
        start = int(self._slots.computed[slot])
        held = int(kv.page_count[slot])
        target = int(self._slots.target[slot])
        end = min(target, start + budget, (held + free_pages) * kv.page_size)
        if end <= start:
            return None
        return _Chunk(slot, start, end - start, kv.pages_for(end) - held, end == target)

    def _admissible(self, sequence: Sequence, forecast: Forecast | None) -> bool:
        """Whether a sequence may be admitted now; adds it to the forecast if so."""
        if self.running == 0:
            return True
        return self.running < self.max_running and forecast is not None and self._pacer.admit(forecast, sequence)

    def _admit(self, sequence: Sequence) -> int:
        self._queue.take(sequence)
        self._epoch += 1
        return self._slots.admit(sequence, self._epoch)


def _record_logprobs(sequence: Sequence, output: StepOutput, entry: int) -> None:
    assert output.logprobs is not None
    sequence.logprobs.append(float(output.logprobs[entry]))
    count = sequence.params.logprobs or 0
    top: list[tuple[int, float]] = []
    if count:
        assert output.top_tokens is not None and output.top_logprobs is not None
        ids, values = output.top_tokens[entry, :count], output.top_logprobs[entry, :count]
        top = list(zip(ids.tolist(), values.tolist(), strict=True))
    sequence.top_logprobs.append(top)
