"""The running sequences as a struct of arrays, one entry a slot: a batch is formed without a loop over requests."""

import numpy as np
from numpy.typing import NDArray

from nanoflow.ops.batch import PenaltyReset, SamplingBatch, TokenMasks
from nanoflow.sequence import Sequence

__all__ = ["FREE", "SlotTable"]

FREE = -1
"""`SlotTable.epoch` of a slot that nobody holds."""

Int32 = NDArray[np.int32]


class SlotTable:
    """Arrays [max_running]; entries of free slots mean nothing, but for `epoch`."""

    def __init__(self, max_running: int) -> None:
        def zeros(dtype: type[np.generic]) -> NDArray:  # type: ignore[type-arg]
            return np.zeros(max_running, dtype)

        self.sequences: list[Sequence | None] = [None] * max_running
        self.tokens: list[Int32] = [np.zeros(0, np.int32)] * max_running
        """Prompt and output at admission: what must be prefilled."""
        self.epoch: NDArray[np.int64] = np.full(max_running, FREE, np.int64)
        """Number of the admission: later admissions have higher ones, and none is used twice."""
        self.target: Int32 = zeros(np.int32)
        """Tokens to prefill (the length of `tokens`); the last of them is sampled."""
        self.computed: Int32 = zeros(np.int32)
        """Tokens whose KV is in the cache or on its way there."""
        self.sampled: Int32 = zeros(np.int32)
        """Output tokens, those in flight included."""
        self.in_flight: Int32 = zeros(np.int32)
        """Sampled tokens that the host has not seen yet."""
        self.last_token: NDArray[np.float64] = zeros(np.float64)
        """When the newest token was seen; 0: none was."""
        self.limit: Int32 = zeros(np.int32)
        """Output tokens after which the sequence ends, whatever they are."""
        self.certain: NDArray[np.bool_] = zeros(np.bool_)
        """Whether the sequence is certain to reach its limit (no stop can end it earlier)."""
        self.ignore_eos: NDArray[np.bool_] = zeros(np.bool_)
        self.wants_logprobs: NDArray[np.bool_] = zeros(np.bool_)
        self.has_stop_ids: NDArray[np.bool_] = zeros(np.bool_)
        self.has_bias: NDArray[np.bool_] = zeros(np.bool_)
        self.constrained: NDArray[np.bool_] = zeros(np.bool_)
        """Whether its tokens are sampled under masks."""
        self.needs_reset: NDArray[np.bool_] = zeros(np.bool_)
        """Whether the penalty counts must be rebuilt before the next token is sampled."""
        self.seed: NDArray[np.uint64] = zeros(np.uint64)
        self.temperature: NDArray[np.float32] = zeros(np.float32)
        self.top_k: Int32 = zeros(np.int32)
        self.top_p: NDArray[np.float32] = zeros(np.float32)
        self.min_p: NDArray[np.float32] = zeros(np.float32)
        self.repetition_penalty: NDArray[np.float32] = zeros(np.float32)
        self.presence_penalty: NDArray[np.float32] = zeros(np.float32)
        self.frequency_penalty: NDArray[np.float32] = zeros(np.float32)
        self.logprobs: Int32 = zeros(np.int32)
        self._free = list(range(max_running - 1, -1, -1))

    @property
    def running(self) -> int:
        """Slots in use."""
        return len(self.sequences) - len(self._free)

    @property
    def has_free(self) -> bool:
        return bool(self._free)

    def admit(self, sequence: Sequence, epoch: int) -> int:
        """Gives a sequence a slot and returns it."""
        slot = self._free.pop()
        params = sequence.params
        sequence.slot = slot
        self.sequences[slot] = sequence
        self.tokens[slot] = np.concatenate([sequence.prompt, np.array(sequence.output, np.int32)]).astype(np.int32)
        self.epoch[slot] = epoch
        self.target[slot] = len(sequence)
        self.computed[slot] = 0
        self.sampled[slot] = len(sequence.output)
        self.in_flight[slot] = 0
        self.last_token[slot] = sequence.last_token_time
        self.limit[slot] = sequence.limit
        self.certain[slot] = sequence.certain
        self.ignore_eos[slot] = params.ignore_eos
        self.wants_logprobs[slot] = params.logprobs is not None
        self.has_stop_ids[slot] = bool(params.stop_token_ids)
        self.has_bias[slot] = bool(params.logit_bias)
        self.constrained[slot] = sequence.constraint is not None
        self.needs_reset[slot] = params.uses_penalties
        self.seed[slot] = sequence.seed % 2**64
        self.temperature[slot] = params.temperature
        self.top_k[slot] = params.top_k
        self.top_p[slot] = params.top_p
        self.min_p[slot] = params.min_p
        self.repetition_penalty[slot] = params.repetition_penalty
        self.presence_penalty[slot] = params.presence_penalty
        self.frequency_penalty[slot] = params.frequency_penalty
        self.logprobs[slot] = -1 if params.logprobs is None else params.logprobs
        return slot

    def release(self, slot: int) -> None:
        """Takes a slot back from its sequence, which keeps its count of tokens in flight and its last one's time."""
        sequence = self.sequences[slot]
        assert sequence is not None
        sequence.slot = -1
        sequence.in_flight = int(self.in_flight[slot])
        sequence.last_token_time = float(self.last_token[slot])
        self.sequences[slot] = None
        self.tokens[slot] = np.zeros(0, np.int32)
        self.epoch[slot] = FREE
        self._free.append(slot)

    def sampling_batch(self, rows: Int32, slots: Int32) -> SamplingBatch:
        """What to sample at `rows` [S] of the dense batch for `slots` [S]; counts the new tokens as in flight."""
        resets = []
        for slot in slots[self.needs_reset[slots]].tolist():
            sequence = self.sequences[slot]
            assert sequence is not None
            resets.append(PenaltyReset(slot, sequence.prompt, np.array(sequence.output, np.int32)))
            self.needs_reset[slot] = False
        biased = np.flatnonzero(self.has_bias[slots])
        entries: list[int] = []
        tokens: list[int] = []
        values: list[float] = []
        for entry in biased.tolist():
            sequence = self.sequences[slots[entry]]
            assert sequence is not None
            entries += [entry] * len(sequence.params.logit_bias)
            tokens += sequence.params.logit_bias.keys()
            values += sequence.params.logit_bias.values()
        constrained = np.flatnonzero(self.constrained[slots]).astype(np.int32)
        batch = SamplingBatch(
            rows=rows,
            slots=slots,
            positions=self.sampled[slots],
            seeds=self.seed[slots],
            temperature=self.temperature[slots],
            top_k=self.top_k[slots],
            top_p=self.top_p[slots],
            min_p=self.min_p[slots],
            repetition_penalty=self.repetition_penalty[slots],
            presence_penalty=self.presence_penalty[slots],
            frequency_penalty=self.frequency_penalty[slots],
            logprobs=self.logprobs[slots],
            bias_entries=np.array(entries, np.int32),
            bias_tokens=np.array(tokens, np.int32),
            bias_values=np.array(values, np.float32),
            penalty_resets=tuple(resets),
            masks=TokenMasks(constrained) if len(constrained) else None,
        )
        self.sampled[slots] += 1
        self.in_flight[slots] += 1
        return batch
