"""Pacing and admission: batches alike, KV memory in use, nothing over-committed. No model, tokens are zeros."""

import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from benchmarks.scheduler import BUCKETS, simulate
from nanoflow.forecast import Forecast, Lengths, StopRate
from nanoflow.kv_cache import KVCache
from nanoflow.ops.batch import StepOutput
from nanoflow.pacing import Pacer, sustainable_rate
from nanoflow.pipeline.split import Cut
from nanoflow.sampling_params import SamplingParams
from nanoflow.scheduler import Scheduler
from nanoflow.sequence import Sequence
from nanoflow.slots import SlotTable
from nanoflow.waiting import WaitingQueue


def same(count: int, held: float, left: float, certain: bool = True) -> Lengths:
    return Lengths(np.full(count, held), np.full(count, left), np.full(count, certain))


@pytest.mark.parametrize(
    ("lengths", "rows"),
    # R* = 464,080 / (input + output / 2 + half a page), rows R* (1 + input / output)
    [([(512, 512)] * 1600, 1115), ([(1024, 512)] * 600, 1036)],
)
def test_steady_batches_are_alike_and_fill_the_kv_cache(lengths, rows):
    series = simulate(lengths)
    change = series.successive_change()
    assert len(change) > 200
    assert change.max() < 0.10
    assert series.rows[series.steady].mean() == pytest.approx(rows, rel=0.04)
    assert series.kv_share[series.steady].mean() > 0.96
    assert series.preemptions == 0
    ramp_and_tail = lengths[0][1]  # half of the iterations of each are lost while the KV cache fills and drains
    assert len(series.rows) < 1.04 * (series.ideal + ramp_and_tail)
    ramp = series.rows[: series.steady.start].astype(float)
    assert (np.abs(np.diff(ramp)) / ramp[:-1]).max() < 0.10


def test_without_pacing_batches_jump(monkeypatch):
    monkeypatch.setattr(Pacer, "prompt_tokens", lambda self, *_: 2048)
    rows = simulate([(512, 512)] * 1600).rows[600:1400].astype(float)
    assert (np.abs(np.diff(rows)) / rows[:-1]).max() > 0.4


def test_mixed_lengths_are_paced_too():
    random = np.random.default_rng(0)
    lengths = [
        (int(a), int(b)) for a, b in zip(random.integers(1, 900, 2500), random.integers(1, 500, 2500), strict=True)
    ]
    series = simulate(lengths, kv_tokens=200_000)
    # Now and then memory is full for a moment, and a prompt has to wait.
    assert (series.successive_change() < 0.10).mean() > 0.98
    assert series.kv_share[series.steady].mean() > 0.93
    assert series.preemptions == 0


def test_what_fits_is_not_held_back():
    series = simulate([(512, 512)] * 100)
    assert (series.rows[:25] == 2048).all() and not series.paced.any()


def test_the_limit_of_running_sequences_paces_like_memory():
    series = simulate([(512, 256)] * 600, max_running=128)
    assert series.decode.max() <= 128
    assert series.successive_change().max() < 0.10
    assert series.decode[series.steady].mean() > 115


def test_the_limit_of_rows_fills_every_batch():
    series = simulate([(512, 64)] * 600)
    full = series.rows[10:-80]
    assert (full == 2048).mean() > 0.98


@pytest.mark.parametrize("left", [512.0, 64.0])
def test_rate_of_the_steady_state(left):
    nobody = Forecast(same(0, 0, 0), 0.0)
    queue = Forecast(same(50, 544, left), 0.0)
    rate = sustainable_rate(nobody, queue, queued=10_000, capacity=464_000, max_running=10_000, highest=100)
    assert rate == pytest.approx(464_000 / (left * (544 + left / 2)), rel=0.01)
    by_slots = sustainable_rate(nobody, queue, queued=10_000, capacity=1e9, max_running=100, highest=100)
    assert by_slots == pytest.approx(100 / left, rel=0.01)


def test_rate_when_the_queue_fits_or_nearly():
    nobody = Forecast(same(0, 0, 0), 0.0)
    queue = Forecast(same(50, 100, 100), 0.0)
    arguments = {"capacity": 10_000, "max_running": 1000, "highest": 50}
    endless = sustainable_rate(nobody, queue, queued=float("inf"), **arguments)
    rates = [sustainable_rate(nobody, queue, queued=count, **arguments) for count in (40, 55, 60, 1000)]
    assert rates[0] == 50  # 40 x 200 tokens
    assert rates[0] > rates[1] > rates[2] > rates[3] == endless
    # What the rate for 55 leads to, counted out: just within the capacity.
    joins = np.arange(55) / rates[1]
    use = [((t - joins + 100) * ((t >= joins) & (t - joins <= 100))).sum() for t in np.arange(0.0, 250.0, 0.5)]
    assert 0.9 * 10_000 < max(use) < 1.04 * 10_000


def brute_force_peak(sequences: list[tuple[int, int]]) -> int:
    """Largest sum of KV tokens over time, each sequence growing by one an iteration until its end."""
    horizon = max(left for _, left in sequences)
    return max(sum(held + t for held, left in sequences if t <= left) for t in range(horizon + 1))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 30)), max_size=12),
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 30)), min_size=1, max_size=6),
    st.integers(1, 800),
)
def test_admission_is_exact_when_lengths_are_known(running, candidates, capacity):
    held, left = (np.array(column, float) for column in zip(*running, strict=True)) if running else (np.zeros(0),) * 2
    forecast = Forecast(Lengths(held, left, np.ones(len(held), bool)), 0.0)
    inside = list(running)
    for candidate in candidates:
        fits = brute_force_peak([*inside, candidate]) <= capacity
        assert forecast.admit(float(candidate[0]), float(candidate[1]), True, capacity) == fits
        if fits:
            inside.append(candidate)


def test_forecast_of_sequences_that_may_stop():
    rate = 0.02
    forecast = Forecast(same(100, 10, 200, certain=False), rate)
    ends = np.random.default_rng(0).geometric(rate, (400, 100))
    for t in (0, 20, 100, 200):
        measured = ((10 + t) * (ends > t)).sum(axis=1).mean()
        assert forecast.tokens(np.array([float(t)]))[0] == pytest.approx(measured, rel=0.06)
    assert forecast.tokens(np.array([201.0]))[0] == 0


def test_stop_rate_counts_sequences_that_still_run():
    rate = StopRate()
    assert rate.value == 0
    rate.expect(100)
    rate.expect(300)
    assert rate.value == 1 / 200
    random = np.random.default_rng(1)
    for end in random.geometric(0.1, 300):  # observed for 12 tokens at most: long ones are still running
        rate.observe(tokens=min(int(end), 12), stops=int(end <= 12))
    assert rate.value == pytest.approx(0.1, rel=0.15)


def run_with_stops(count: int, mean: int, pages: int) -> tuple[Scheduler, list[float]]:
    """Sequences with `max_tokens` 400 that stop at random, after `mean` tokens on average; share of pages in use."""
    kv = KVCache(pages, 16, 512, 64)
    scheduler = Scheduler(
        kv=kv,
        cut=lambda d, p, _: Cut([d], [p], [d + p]),
        max_batch_tokens=512,
        max_running=512,
        max_model_len=512,
        eos_token_ids=[1],
    )
    for index in range(count):
        scheduler.add(Sequence(index, np.zeros(64, np.int32), SamplingParams(max_tokens=400), seed=index))
    random = np.random.default_rng(2)
    shares, flying = [], None
    while scheduler.unfinished:
        formed = scheduler.form()
        if flying is not None:
            tokens = (random.random(len(flying.sampled)) < 1 / mean).astype(np.int32)
            scheduler.update(flying, StepOutput(tokens) if flying.sampled else None)
        if scheduler.waiting:
            shares.append(kv.used_pages / kv.usable_pages)
        flying = formed
    return scheduler, shares


def test_lengths_that_are_not_known_are_learnt():
    scheduler, shares = run_with_stops(count=1500, mean=60, pages=1001)
    middle = shares[len(shares) // 3 : -len(shares) // 5]
    assert np.mean(middle) > 0.85  # reckoning with max_tokens, it would be under a third
    assert scheduler.preemptions < 0.02 * 1500


def test_paced_batches_end_on_a_bucket_at_the_same_mean_rate():
    lengths = [(400, 200)] * 1200
    free, bucketed = (simulate(lengths, kv_tokens=230_000, row_buckets=buckets) for buckets in ((), BUCKETS))
    rows, padded = bucketed.rows[bucketed.steady], bucketed.padded[bucketed.steady]
    assert len(rows) > 200 and (rows == padded).mean() > 0.99
    assert set(padded) <= {1152, 1280, 1408, 1536}  # the mean lies between two of them
    assert rows.mean() == pytest.approx(free.rows[free.steady].mean(), rel=0.005)
    assert bucketed.kv_share[bucketed.steady].mean() == pytest.approx(free.kv_share[free.steady].mean(), abs=0.005)
    assert abs(len(bucketed.rows) - len(free.rows)) < 0.01 * len(free.rows)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 1900), st.floats(0, 120), st.sampled_from([(), BUCKETS, (256, 512, 1024, 2048)]))
def test_rounding_keeps_the_rate(decode, rate, buckets):
    kv = KVCache(10, 64, 4, 8)
    pacer = Pacer(kv, SlotTable(4), WaitingQueue(), max_running=4, max_tokens=2048)
    pacer._sustainable_rate = lambda *_: rate  # prompts of one token
    forecast = Forecast(same(0, 0, 0), 0.0)
    budgets = [pacer.prompt_tokens(forecast, 0, decode, None, np.array(buckets, np.int64)) for _ in range(400)]
    owed = np.cumsum(budgets) - rate * np.arange(1, 401)
    assert owed.min() > -129 and owed.max() < 129
    ends = {decode + budget for budget in budgets if budget}
    if buckets == BUCKETS and rate > 64:  # the next bucket is always near enough
        assert ends <= set(BUCKETS)


def test_buckets_further_apart_than_the_rate_do_not_starve_or_flood():
    """Decode rows lie just above a bucket, and the next one is far."""
    lengths = [(64, 256)] * 900
    free, bucketed = (simulate(lengths, kv_tokens=60_000, row_buckets=buckets) for buckets in ((), (250, 500, 2048)))
    assert bucketed.preemptions == 0
    assert len(bucketed.rows) < 1.05 * len(free.rows)
    assert bucketed.padded[bucketed.steady].mean() < 520


@pytest.mark.parametrize("buckets", [(), BUCKETS])
def test_a_prompt_that_was_begun_is_not_starved(buckets):
    """Memory for little more than one: the second prompt must not crawl in, token by token, when nothing decodes."""
    series = simulate([(600, 5)] * 6, kv_tokens=704, row_buckets=buckets)
    assert len(series.rows) < 6 * (5 + 3)


def test_a_queue_that_grows_is_taken_for_endless():
    kv = KVCache(1001, 16, 64, 64)
    scheduler = Scheduler(
        kv=kv, cut=lambda d, p, _: Cut([d], [p], [d + p]), max_batch_tokens=512, max_running=64, max_model_len=512
    )
    scheduler.expects_more = True
    for index in range(24):
        scheduler.add(Sequence(index, np.zeros(256, np.int32), SamplingParams(max_tokens=256, ignore_eos=True), seed=0))
    formed = scheduler.form()
    assert formed is not None and scheduler.paced and formed.batch.tokens < 100
    assert scheduler.expects_more and scheduler.expected == math.inf
    scheduler.expects_more = False
    scheduler.expected = 5000.0  # which is as good as endless
    scheduler.add(Sequence(25, np.zeros(256, np.int32), SamplingParams(max_tokens=256, ignore_eos=True), seed=0))
    formed = scheduler.form()
    assert formed is not None and scheduler.paced and formed.batch.tokens < 300 and scheduler.expects_more
    scheduler.expects_more = False
    scheduler.add(Sequence(24, np.zeros(256, np.int32), SamplingParams(max_tokens=256, ignore_eos=True), seed=0))
    formed = scheduler.form()
    assert formed is not None and not scheduler.paced and formed.batch.tokens == 512
