"""An executor without a model: every token is a hash of what its row can really see through the batch's own arrays.

Tokens reach it only as a model's would: input ids, the token kept for each slot, and the KV cache read through the page
tables. A wrong page, a stale page, a wrong position or a token sampled twice changes the hash, or fails a check here.
"""

from collections import Counter, deque

import numpy as np

from nanoflow.ops.batch import RESERVED_PAGE, TOKEN_ON_DEVICE, DenseBatch, StepOutput
from nanoflow.scheduler import Scheduler
from nanoflow.sequence import Sequence

VOCAB = 23
EOS = 0
STALE = -(10**6)


def next_token(seed: int, position: int, tokens: list[int], counts: Counter[int] | None, bias: float) -> int:
    """The "model": the token at output position `position` after `tokens`."""
    state = (seed * 7919 + position * 104729 + int(bias * 8)) % 2**61
    for token in tokens:
        state = (state * 1000003 + token + 1) % (2**61 - 1)
    if counts is not None:
        for token, count in sorted(counts.items()):
            state = (state * 31 + token * 17 + count) % (2**61 - 1)
    return (state >> 7) % VOCAB


def logprob(token: int, context: int) -> float:
    return -float(token) - context / 1024


def stops_by_text(output: list[int]) -> bool:
    """Stands for a stop string, which only the engine sees."""
    return len(output) >= 3 and sum(output[-3:]) % 19 == 0


def reference(sequence: Sequence, max_model_len: int) -> tuple[list[int], list[float], str]:
    """Output, log-probabilities and finish reason of a sequence run alone, one token after the other."""
    params = sequence.params
    prompt = sequence.prompt.tolist()
    output: list[int] = []
    logprobs: list[float] = []
    bias = sum(params.logit_bias.values())
    while True:
        counts = Counter(prompt + output) if params.uses_penalties else None
        token = next_token(sequence.seed, len(output), prompt + output, counts, bias)
        logprobs.append(logprob(token, len(prompt) + len(output)))
        output.append(token)
        if (token == EOS and not params.ignore_eos) or token in params.stop_token_ids:
            return output, logprobs, "stop"
        if len(output) == params.max_tokens or len(prompt) + len(output) == max_model_len:
            return output, logprobs, "length"
        if params.stop and stops_by_text(output):
            return output, logprobs, "stop"


class FakeExecutor:
    """Runs launched batches in order; at most two are launched and not collected."""

    def __init__(self, pages: int, page_size: int, slots: int) -> None:
        self.page_size = page_size
        self.kv_tokens = np.full(pages * page_size, STALE, np.int64)
        self.kv_positions = np.full(pages * page_size, STALE, np.int64)
        self.last_tokens = np.full(slots, STALE, np.int64)
        self.counts: list[Counter[int] | None] = [None] * slots
        self.waiting: deque[StepOutput | None] = deque()
        self.batches: list[DenseBatch] = []

    def collect(self) -> StepOutput | None:
        return self.waiting.popleft()

    def launch(self, batch: DenseBatch) -> None:
        assert len(self.waiting) < 2
        self.batches.append(batch)
        check_batch(batch, self.page_size)
        tokens = np.where(batch.token_ids == TOKEN_ON_DEVICE, self.last_tokens[batch.slots], batch.token_ids)
        seen: dict[int, list[int]] = {}  # row -> tokens that it attends to
        for n, part in enumerate(batch.nano_batches):
            # A nano-batch appends its KV after all earlier ones and then attends: later pieces must not be needed.
            own = np.arange(part.start, part.end)
            self.kv_tokens[batch.kv_index[own]] = tokens[own]
            self.kv_positions[batch.kv_index[own]] = batch.positions[own]
            self.kv_tokens[RESERVED_PAGE * self.page_size : (RESERVED_PAGE + 1) * self.page_size] = STALE
            for d in range(batch.decode_splits[n], batch.decode_splits[n + 1]):
                row = int(batch.decode_rows[d])
                assert part.start <= row < part.start + part.decode
                seen[row] = self._read(batch.decode_pages[d], int(batch.decode_context[d]))
            for c in range(batch.prefill_splits[n], batch.prefill_splits[n + 1]):
                row, length = int(batch.prefill_rows[c]), int(batch.prefill_lengths[c])
                assert part.start + part.decode <= row and row + length <= part.start + part.decode + part.prefill
                seen[row + length - 1] = self._read(batch.prefill_pages[c], int(batch.prefill_context[c]))
        self.waiting.append(self._sample(batch, seen))

    def _read(self, pages: np.ndarray, context: int) -> list[int]:
        used = -(-context // self.page_size)
        assert (pages[:used] != RESERVED_PAGE).all() and (pages[used:] == RESERVED_PAGE).all()
        index = (pages[:used, None].astype(np.int64) * self.page_size + np.arange(self.page_size)).ravel()[:context]
        assert (self.kv_positions[index] == np.arange(context)).all(), "a page holds something else"
        tokens = self.kv_tokens[index]
        assert (tokens >= 0).all()
        return tokens.tolist()

    def _sample(self, batch: DenseBatch, seen: dict[int, list[int]]) -> StepOutput | None:
        sampling = batch.sampling
        if sampling is None:
            return None
        for reset in sampling.penalty_resets:
            self.counts[reset.slot] = Counter(reset.prompt.tolist() + reset.output.tolist())
        out, logprobs = [], []
        for i in range(len(sampling)):
            slot, row = int(sampling.slots[i]), int(sampling.rows[i])
            assert batch.slots[row] == slot
            penalised = sampling.repetition_penalty[i] != 1 or sampling.presence_penalty[i] != 0
            counts = self.counts[slot] if penalised else None
            assert not penalised or counts is not None
            bias = float(sampling.bias_values[sampling.bias_entries == i].sum())
            token = next_token(int(sampling.seeds[i]), int(sampling.positions[i]), seen[row], counts, bias)
            if counts is not None:
                counts[token] += 1
            self.last_tokens[slot] = token
            out.append(token)
            logprobs.append(logprob(token, len(seen[row])))
        most = int(sampling.logprobs.max())
        top = np.repeat(np.array(out, np.int32)[:, None], max(most, 0), 1) + np.arange(max(most, 0))
        return StepOutput(
            np.array(out, np.int32),
            np.array(logprobs, np.float32) if most >= 0 else None,
            top.astype(np.int32) if most > 0 else None,
            (-top).astype(np.float32) if most > 0 else None,
        )


def check_batch(batch: DenseBatch, page_size: int) -> None:
    """What holds for every dense batch, whoever formed it."""
    rows = batch.rows
    start = 0
    real = np.zeros(rows, bool)
    for part in batch.nano_batches:
        assert part.start == start and min(part.decode, part.prefill, part.padding) >= 0
        start = part.end
        real[part.start : part.start + part.decode + part.prefill] = True
    covered = np.zeros(rows, int)
    covered[batch.decode_rows] += 1
    for row, length, context in zip(batch.prefill_rows, batch.prefill_lengths, batch.prefill_context, strict=True):
        assert length > 0
        covered[row : row + length] += 1
        assert (batch.positions[row : row + length] == np.arange(context - length, context)).all()
        assert len(set(batch.slots[row : row + length])) == 1
    assert (covered == real).all(), "rows of attention work and real rows differ"
    assert (batch.positions[batch.decode_rows] + 1 == batch.decode_context).all()
    assert (np.diff(batch.decode_rows) > 0).all() and (np.diff(batch.prefill_rows) > 0).all()
    assert (batch.kv_index[~real] // page_size == RESERVED_PAGE).all()
    assert (batch.kv_index[real] // page_size != RESERVED_PAGE).all()
    assert len(np.unique(batch.kv_index[real])) == real.sum(), "two rows write the same KV"
    assert not (batch.token_ids[~real] == TOKEN_ON_DEVICE).any()


def run(
    scheduler: Scheduler, executor: FakeExecutor, arrivals: dict[int, list[Sequence]], limit: int = 100_000
) -> list[list[Sequence]]:
    """The engine's loop with one iteration in flight; `arrivals` are added before the iteration of that number.

    Returns the sequences that each update gave a token.
    """
    received = []
    flying = None
    arrivals = dict(arrivals)
    for step in range(limit):
        for sequence in arrivals.pop(step, []):
            scheduler.add(sequence)
        formed = scheduler.form()
        if formed is not None:
            assert formed.batch.tokens <= scheduler.max_batch_tokens
            executor.launch(formed.batch)
        if flying is not None:
            got = scheduler.update(flying, executor.collect())
            for sequence in got:
                if sequence.params.stop and not sequence.finished and stops_by_text(sequence.output):
                    scheduler.finish(sequence, "stop")
            received.append(got)
        elif formed is None:
            assert not scheduler.unfinished, "nothing runs, nothing is in flight, and sequences are unfinished"
            if not arrivals:
                break
        flying = formed
    else:
        raise AssertionError(f"not finished after {limit} iterations")
    return received
