"""The sampler against a plain float64 sampler written row by row, and its promises: order, counters, penalty counts."""

from collections import Counter

import numpy as np
import pytest
import torch

from nanoflow.ops.batch import PenaltyReset, SamplingBatch, TokenMasks
from nanoflow.ops.sampling import Sampler, philox_uniform

CPU = torch.device("cpu")
V = 1000


def batch(
    rows: int,
    bias: tuple[tuple[int, int, float], ...] = (),
    resets: tuple = (),
    masks: TokenMasks | None = None,
    **columns,
) -> SamplingBatch:
    """A batch of `rows` greedy entries but for `columns`."""

    def column(name: str, default, dtype: type) -> np.ndarray:
        return np.broadcast_to(np.asarray(columns.get(name, default), dtype), (rows,)).copy()

    return SamplingBatch(
        rows=np.arange(rows, dtype=np.int32),
        slots=column("slots", np.arange(rows), np.int32),
        positions=column("positions", 0, np.int32),
        seeds=column("seeds", np.arange(rows), np.uint64),
        temperature=column("temperature", 0, np.float32),
        top_k=column("top_k", 0, np.int32),
        top_p=column("top_p", 1, np.float32),
        min_p=column("min_p", 0, np.float32),
        repetition_penalty=column("repetition_penalty", 1, np.float32),
        presence_penalty=column("presence_penalty", 0, np.float32),
        frequency_penalty=column("frequency_penalty", 0, np.float32),
        logprobs=column("logprobs", -1, np.int32),
        bias_entries=np.array([entry for entry, _, _ in bias], np.int32),
        bias_tokens=np.array([token for _, token, _ in bias], np.int32),
        bias_values=np.array([value for _, _, value in bias], np.float32),
        penalty_resets=resets,
        masks=masks,
    )


def packed(entries: np.ndarray, allowed: np.ndarray) -> TokenMasks:
    """Masks of `entries` [M] from booleans [M, V], one bit a token."""
    words = -(-allowed.shape[1] // 32)
    bits = np.zeros((len(entries), words * 32), bool)
    bits[:, : allowed.shape[1]] = allowed
    masks = TokenMasks(entries.astype(np.int32))
    masks.ready.set_result(np.packbits(bits, axis=1, bitorder="little").view(np.int32))
    return masks


def plain_kept(logits: np.ndarray, entries: SamplingBatch, row: int, prompt=(), output=()) -> np.ndarray:
    """Probabilities (float64, renormalised) that a row's token is drawn from; one-hot for a greedy row."""
    logits = logits.astype(np.float64).copy()
    for entry, token, value in zip(entries.bias_entries, entries.bias_tokens, entries.bias_values, strict=True):
        if entry == row:
            logits[token] += value
    for token in set(prompt) | set(output):
        strength = float(entries.repetition_penalty[row])
        logits[token] = logits[token] / strength if logits[token] > 0 else logits[token] * strength
    for token, count in Counter(output).items():
        logits[token] -= count * float(entries.frequency_penalty[row]) + float(entries.presence_penalty[row])
    if entries.temperature[row] == 0:
        return np.eye(len(logits))[logits.argmax()]
    probs = np.exp((logits - logits.max()) / float(entries.temperature[row]))
    probs[probs < float(entries.min_p[row]) * probs.max()] = 0
    if entries.top_k[row] > 0:
        probs[probs < np.sort(probs)[-min(int(entries.top_k[row]), len(probs))]] = 0
    probs /= probs.sum()
    if entries.top_p[row] < 1:
        kept, mass = [], 0.0
        for token in np.argsort(-probs, kind="stable"):
            if kept and mass >= float(entries.top_p[row]):
                break
            kept.append(token)
            mass += probs[token]
        probs[np.setdiff1d(np.arange(len(probs)), kept)] = 0
    return probs / probs.sum()


def plain_token(probs: np.ndarray, seed: int, position: int) -> int:
    uniform = philox_uniform(np.array([seed], np.uint64), np.array([position], np.int32))[0]
    return int(np.searchsorted(np.cumsum(probs), uniform * probs.sum(), side="right"))


def test_philox_matches_published_vectors() -> None:
    # A known answer of Random123, for counter 0 and key 0.
    first = philox_uniform(np.array([0], np.uint64), np.array([0], np.int32))[0]
    assert int(first * 2**53) == (0x6627E8D5 << 21) ^ (0xE169C58D >> 11)


def test_philox_is_uniform_and_counters_differ() -> None:
    seeds, positions = np.meshgrid(np.arange(200, dtype=np.uint64) << np.uint64(32), np.arange(200, dtype=np.int32))
    numbers = philox_uniform(seeds.ravel(), positions.ravel())
    assert len(np.unique(numbers)) == numbers.size
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = np.histogram(numbers, 50, (0, 1))[0]
    expected = numbers.size / 50
    assert ((counts - expected) ** 2 / expected).sum() < 100  # chi-square, 49 degrees of freedom


@pytest.mark.parametrize("seed", range(6))
def test_random_rows_match_the_plain_sampler(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = 64
    logits = rng.normal(0, rng.choice([0.5, 2, 6], (rows, 1)), (rows, V)).astype(np.float32)
    bias = tuple((int(rng.integers(rows)), int(rng.integers(V)), float(rng.normal(0, 5))) for _ in range(40))
    prompts = rng.integers(0, V, (rows, 30))
    outputs = rng.integers(0, V, (rows, 20))
    logits[np.arange(rows)[:, None], outputs] += 3  # likely tokens are the penalised ones
    penalised = rng.random(rows) < 0.5
    entries = batch(
        rows,
        bias,
        tuple(
            PenaltyReset(slot, prompts[slot].astype(np.int32), outputs[slot].astype(np.int32))
            for slot in np.flatnonzero(penalised).tolist()
        ),
        seeds=rng.integers(0, 2**63, rows),
        positions=rng.integers(0, 3000, rows),
        temperature=rng.choice([0, 0.3, 1, 1.7], rows),
        top_k=rng.choice([0, 1, 5, 50, V, 2 * V], rows),
        top_p=rng.choice([1, 0.05, 0.5, 0.9, 0.999], rows),
        min_p=rng.choice([0, 0.02, 0.3], rows),
        repetition_penalty=np.where(penalised, rng.choice([0.8, 1, 1.3], rows), 1),
        presence_penalty=np.where(penalised, rng.choice([-1, 0, 1.5], rows), 0),
        frequency_penalty=np.where(penalised, rng.choice([-0.5, 0.1, 1], rows), 0),
    )
    before = torch.from_numpy(logits)
    given = before.clone()
    sampler = Sampler(V, rows, CPU)
    found = sampler.sample(given, entries)
    assert torch.equal(given, before), "the caller's logits were changed"
    assert torch.equal(sampler.last_tokens, found.tokens)
    wanted = []
    for row in range(rows):
        history = (prompts[row].tolist(), outputs[row].tolist()) if penalised[row] else ((), ())
        probs = plain_kept(logits[row], entries, row, *history)
        wanted.append(plain_token(probs, int(entries.seeds[row]), int(entries.positions[row])))
    assert found.tokens.tolist() == wanted
    assert len(set(wanted)) > rows // 3  # the test's rows really differ


def test_tokens_do_not_depend_on_the_rest_of_the_batch() -> None:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(0, 2, (40, V)).astype(np.float32))
    options = {
        "temperature": rng.choice([0, 0.8, 1.3], 40),
        "top_k": rng.choice([0, 7, 300], 40),
        "top_p": rng.choice([1, 0.7, 0.99], 40),
        "min_p": rng.choice([0, 0.05], 40),
    }
    whole = Sampler(V, 40, CPU).sample(logits, batch(40, **options)).tokens.tolist()
    chunks = Sampler(V, 40, CPU).sample_chunks(batch(40, **options), lambda rows: logits[rows], 7).tokens.tolist()
    alone = [
        int(
            Sampler(V, 1, CPU)
            .sample(logits[row : row + 1], batch(1, seeds=row, **{key: value[row] for key, value in options.items()}))
            .tokens
        )
        for row in range(40)
    ]
    assert whole == chunks == alone


def test_draws_follow_the_distribution() -> None:
    rows = 20000
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5]])
    entries = batch(rows, temperature=1.0, seeds=7, positions=np.arange(rows), slots=0)
    sampler = Sampler(5, 1, CPU)
    counts = np.bincount(sampler.sample(logits.expand(rows, 5), entries).tokens.numpy(), minlength=5)
    expected = logits[0].double().softmax(-1).numpy() * rows
    assert ((counts - expected) ** 2 / expected).sum() < 20  # chi-square, 4 degrees of freedom


def test_greedy_batch_is_one_argmax_and_reads_no_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(9, V)
    monkeypatch.setattr(Sampler, "_sample_changed", lambda *args: pytest.fail("more than an argmax"))
    entries = batch(9, top_k=3, top_p=0.5, min_p=0.1)
    assert torch.equal(Sampler(V, 9, CPU).sample(logits, entries).tokens, logits.argmax(-1))


def test_penalty_counts_follow_the_sampled_tokens() -> None:
    # Nothing but the frequency penalty stands between the four tokens: they must come in turn.
    logits = torch.full((1, V), -50.0)
    logits[0, :4] = torch.tensor([1.0, 0.9, 0.8, 0.7])
    sampler = Sampler(V, 8, CPU)
    reset = PenaltyReset(5, np.zeros(0, np.int32), np.zeros(0, np.int32))
    tokens = []
    for position in range(8):
        resets = (reset,) if position == 0 else ()
        entries = batch(1, resets=resets, slots=5, positions=position, frequency_penalty=0.5)
        tokens.append(int(sampler.sample(logits, entries).tokens))
    assert tokens == [0, 1, 2, 3, 0, 1, 2, 3]


def test_rebuilt_counts_equal_counts_kept_on_the_device() -> None:
    rng = np.random.default_rng(3)
    steps = torch.from_numpy(rng.normal(0, 1, (12, 1, 50)).astype(np.float32))
    prompt = rng.integers(0, 50, 9).astype(np.int32)
    options = {"repetition_penalty": 1.4, "presence_penalty": 0.7, "frequency_penalty": 0.4, "temperature": 0.9}

    def run(readmitted_at: int | None) -> list[int]:
        sampler = Sampler(50, 4, CPU)
        tokens: list[int] = []
        slot = 2
        for position in range(12):
            resets: tuple[PenaltyReset, ...] = ()
            if position in (0, readmitted_at):
                slot = 2 if position == 0 else 1
                resets = (PenaltyReset(slot, prompt, np.array(tokens, np.int32)),)
            entries = batch(1, resets=resets, slots=slot, positions=position, seeds=11, **options)
            tokens.append(int(sampler.sample(steps[position], entries).tokens))
        return tokens

    assert run(None) == run(5) == run(11)


def test_slots_share_counts_with_nobody_and_are_reused() -> None:
    logits = torch.zeros(1, 6)
    logits[0, 3] = 1.0
    sampler = Sampler(6, 16, CPU)

    def token(slot: int, reset: bool, **options) -> int:
        nothing = np.zeros(0, np.int32)
        resets = (PenaltyReset(slot, nothing, nothing),) if reset else ()
        return int(sampler.sample(logits, batch(1, resets=resets, slots=slot, **options)).tokens)

    assert token(0, True, presence_penalty=2.0) == 3
    assert token(0, False, presence_penalty=2.0) != 3
    assert token(1, True, presence_penalty=2.0) == 3
    for slot in range(2, 12):  # past the first allocation
        assert token(slot, True, presence_penalty=2.0) == 3
    assert token(1, False, presence_penalty=2.0) != 3
    assert token(0, False) == 3  # another request, without penalties: its slot's counts are released
    with pytest.raises(ValueError, match="slot 0 uses penalties but no PenaltyReset"):
        token(0, False, presence_penalty=2.0)


@pytest.mark.parametrize("chunk", [2, 50])
def test_logprobs_are_of_the_raw_logits(chunk: int) -> None:
    rng = np.random.default_rng(1)
    logits = torch.from_numpy(rng.normal(0, 3, (5, V)).astype(np.float32))
    wanted = np.array([-1, 0, 3, -1, 1])
    entries = batch(5, ((2, 17, 100.0),), logprobs=wanted, temperature=[0, 1, 0, 1, 0.5], top_k=[0, 4, 0, 4, 0])
    found = Sampler(V, 5, CPU).sample_chunks(entries, lambda rows: logits[rows], chunk).to_host()
    assert found.tokens[2] == 17  # the bias decides, and the log-probability knows nothing of it
    assert found.logprobs is not None and found.top_tokens is not None and found.top_logprobs is not None
    raw = logits.double().log_softmax(-1).numpy()
    asked = wanted >= 0
    np.testing.assert_allclose(found.logprobs[asked], raw[np.arange(5), found.tokens][asked], atol=1e-5)
    assert np.isnan(found.logprobs[~asked]).all()
    order = np.argsort(-raw, axis=-1)[:, :3]
    assert (found.top_tokens[asked] == order[asked]).all() and (found.top_tokens[~asked] == -1).all()
    np.testing.assert_allclose(found.top_logprobs[asked], np.take_along_axis(raw, order, -1)[asked], atol=1e-5)


def test_no_logprobs_unless_asked() -> None:
    found = Sampler(V, 3, CPU).sample(torch.randn(3, V), batch(3)).to_host()
    assert found.logprobs is None and found.top_tokens is None and found.tokens.dtype == np.int32


def test_more_top_logprobs_than_tokens() -> None:
    found = Sampler(3, 1, CPU).sample(torch.tensor([[0.0, 2.0, 1.0]]), batch(1, logprobs=5)).to_host()
    assert found.top_tokens is not None and found.top_tokens.tolist() == [[1, 2, 0, -1, -1]]


def test_extreme_parameters_give_a_possible_token() -> None:
    logits = torch.full((4, V), -1e30)
    logits[:, 123] = 1e30
    logits[3] = 0.0
    entries = batch(4, temperature=[1e-30, 100, 1, 1e30], top_p=[1e-6, 1, 0.5, 1e-9], top_k=[0, 1, 0, 0])
    tokens = Sampler(V, 4, CPU).sample(logits, entries).tokens
    assert tokens[:3].tolist() == [123] * 3 and 0 <= tokens[3] < V


def test_flat_distribution_needs_more_than_the_first_sorted_values() -> None:
    # 0.9 of a nearly flat distribution over 20,000 tokens: far past the few values that are sorted first.
    rng = np.random.default_rng(5)
    vocab, rows = 20000, 8
    logits = rng.normal(0, 0.1, (rows, vocab)).astype(np.float32)
    entries = batch(rows, temperature=1.0, top_p=np.linspace(0.1, 0.99, rows))
    found = Sampler(vocab, rows, CPU).sample(torch.from_numpy(logits), entries).tokens.tolist()
    wanted = [plain_token(plain_kept(logits[row], entries, row), row, 0) for row in range(rows)]
    assert found == wanted


@pytest.mark.parametrize(("vocab", "chunk"), [(V, 5), (33, 64)])
def test_masked_rows_get_allowed_tokens_and_the_others_what_they_had(vocab: int, chunk: int) -> None:
    """Beside bias, penalties and every filter; a masked row is one whose other logits are -inf."""
    rng = np.random.default_rng(vocab)
    rows = 16
    logits = rng.normal(0, 2, (rows, vocab)).astype(np.float32)
    penalised = np.arange(rows) % 4 == 0
    history = rng.integers(0, vocab, (rows, 12)).astype(np.int32)
    options = {
        "seeds": rng.integers(0, 2**63, rows),
        "temperature": rng.choice([0, 0.7, 1.5], rows),
        "top_k": rng.choice([0, 3, 20], rows),
        "top_p": rng.choice([1, 0.6], rows),
        "min_p": rng.choice([0, 0.1], rows),
        "repetition_penalty": np.where(penalised, 1.3, 1),
        "presence_penalty": np.where(penalised, 0.5, 0),
        "logprobs": 2,
    }
    bias = tuple((row, int(rng.integers(vocab)), float(rng.normal(0, 5))) for row in range(0, rows, 3))
    resets = tuple(PenaltyReset(slot, history[slot, :6], history[slot, 6:]) for slot in np.flatnonzero(penalised))

    def sample(values: np.ndarray, masks: TokenMasks | None):
        given = torch.from_numpy(values)
        entries = batch(rows, bias, resets, masks, **options)
        return Sampler(vocab, rows, CPU).sample_chunks(entries, lambda part: given[part], chunk).to_host()

    masked = np.flatnonzero(rng.random(rows) < 0.5)
    allowed = rng.random((len(masked), vocab)) < rng.choice([0.02, 0.3, 0.9], (len(masked), 1))
    allowed[np.arange(len(masked)), rng.integers(0, vocab, len(masked))] = True
    allowed[0] = np.arange(vocab) == vocab - 1  # one token, in the last word
    found = sample(logits, packed(masked, allowed))
    blocked = logits.copy()
    blocked[masked] = np.where(allowed, logits[masked], -np.inf)
    free = sample(logits, None)
    assert found.tokens.tolist() == sample(blocked, None).tokens.tolist()
    others = np.setdiff1d(np.arange(rows), masked)
    assert (found.tokens[others] == free.tokens[others]).all()
    assert allowed[np.arange(len(masked)), found.tokens[masked]].all()
    assert (found.tokens[masked] != free.tokens[masked]).sum() > len(masked) // 3
    raw = torch.from_numpy(logits).double().log_softmax(-1).numpy()
    assert found.logprobs is not None and found.top_tokens is not None
    np.testing.assert_allclose(found.logprobs, raw[np.arange(rows), found.tokens], atol=1e-5)
    assert free.top_tokens is not None and (found.top_tokens == free.top_tokens).all()


def test_masks_may_come_after_the_logits() -> None:
    masks = TokenMasks(np.array([1], np.int32))
    logits = torch.zeros(2, 40)
    logits[:, 5] = 1.0

    def head(rows: slice) -> torch.Tensor:
        words = np.zeros((1, 2), np.int32)
        words[0, 1] = 1 << 3
        masks.ready.set_result(words)
        return logits[rows]

    assert Sampler(40, 2, CPU).sample_chunks(batch(2, masks=masks), head, 4).tokens.tolist() == [5, 35]
