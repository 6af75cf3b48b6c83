"""Numbers of a run: what the recorder keeps, against the same taken from all values at once."""

import math
import time
from pathlib import Path

import numpy as np
import pytest

from nanoflow import LLM, Completion, RequestOutput, SamplingParams
from nanoflow.ops.batch import StepOutput
from nanoflow.outputs import RequestTiming
from nanoflow.recording import IterationRecord, LogHistogram, Recorder
from nanoflow.scheduler import Iteration
from nanoflow.sequence import Sequence
from nanoflow.timeline import COLUMNS, Timeline, amounts
from tests.unit.fake_executor import run
from tests.unit.test_scheduler import make, sequence
from tests.unit.tiny_model import save_tiny_llama


def output(prompt: int, lengths: list[int], arrived: float, first: float, finished: float) -> RequestOutput:
    completions = [Completion(i, "", [7] * length, "length") for i, length in enumerate(lengths)]
    timing = RequestTiming(arrived, first, finished)
    return RequestOutput(None, [1] * prompt, completions, SamplingParams(), timing)


def iteration(at: float, seconds: float, **changes: float) -> IterationRecord:
    values = dict.fromkeys(
        ("decode_rows", "prefill_rows", "padding_rows", "running", "waiting", "kv_pages", "preemptions"), 0
    ) | {"kv_capacity": 100, "output_tokens": 0}
    return IterationRecord(at, seconds, **(values | changes))  # type: ignore[arg-type]


def column(timeline: Timeline, name: str) -> np.ndarray:
    return timeline.rows[:, COLUMNS.index(name)]


def test_requests_are_kept_as_numbers() -> None:
    recorder = Recorder(started=100.0)
    recorder.add(output(5, [4], arrived=101.0, first=103.0, finished=109.0))
    recorder.add(output(6, [1, 3], arrived=102.0, first=102.5, finished=104.5))
    recorder.add(output(1, [1], arrived=100.0, first=101.0, finished=101.0))
    recorder.error()
    assert (recorder.completed, recorder.errors) == (3, 1)
    assert recorder.column("prompt_tokens").tolist() == [5, 6, 1]
    assert recorder.column("output_tokens").tolist() == [4, 4, 1]
    assert recorder.column("first_token").tolist() == [2.0, 0.5, 1.0]
    assert recorder.column("duration").tolist() == [8.0, 2.5, 1.0]
    assert recorder.per_token().tolist() == [2.0, 1.0]  # the last request has no second token
    assert recorder.normalised().tolist() == [2.0, pytest.approx(2.5 / 3), 1.0]


def test_requests_within_an_objective() -> None:
    recorder = Recorder(started=0.0)
    recorder.add(output(1, [5], arrived=0.0, first=1.0, finished=5.0))  # 1 s, then 1 s a token
    recorder.add(output(1, [5], arrived=0.0, first=2.0, finished=4.0))  # 2 s, then 0.5 s a token
    recorder.add(output(1, [1], arrived=0.0, first=1.0, finished=1.0))
    assert recorder.within(1.0, 1.0) == 2
    assert recorder.within(2.0, 0.5) == 2
    assert recorder.within(2.0, 1.0) == 3
    assert recorder.within(0.5, 9.0) == 0


def test_many_requests_take_bounded_memory() -> None:
    recorder = Recorder(started=0.0)
    one = output(5, [4], arrived=1.0, first=3.0, finished=9.0)
    for _ in range(5000):
        recorder.add(one)
    assert recorder.completed == 5000
    assert recorder.column("duration").tolist() == [8.0] * 5000
    assert sum(column._values.nbytes for column in recorder._columns.values()) <= 2 * 5000 * 48


def test_quantiles_of_a_histogram_are_right_within_one_per_cent() -> None:
    values = np.random.default_rng(0).lognormal(-4, 1.5, 20_000)
    values.reshape(20, -1)[:, 1:3] = values.reshape(20, -1)[:, :1]
    histogram = LogHistogram()
    for part in np.split(values, 20):
        histogram.add(float(part[0]), 3)
        for value in part[3:].tolist():
            histogram.add(value)
    shares = np.array([0.0, 0.01, 0.5, 0.9, 0.99, 1.0])
    exact = np.quantile(values, shares, method="inverted_cdf")
    np.testing.assert_allclose(histogram.quantiles(shares), exact, rtol=0.0101)
    assert histogram.count == len(values)
    assert histogram.mean == pytest.approx(values.mean())


def test_values_out_of_range_count_at_the_ends() -> None:
    histogram = LogHistogram()
    for value in (0.0, 1e-9, 1e12):
        histogram.add(value)
    assert histogram.count == 3 and histogram.counts[0] == 2 and histogram.counts[-1] == 1


def test_an_iteration_is_spread_over_the_time_that_it_took() -> None:
    recorder = Recorder(started=0.0)
    recorder.timeline = Timeline(points=8, width=1.0)
    recorder.observe(iteration(2.5, 2.0, decode_rows=20, running=4, kv_pages=10))
    # It ran from 0.5 to 2.5; before that nothing did.
    np.testing.assert_allclose(column(recorder.timeline, "decode_rows"), [5, 10, 5])
    np.testing.assert_allclose(column(recorder.timeline, "busy_seconds"), [0.5, 1, 0.5])
    np.testing.assert_allclose(column(recorder.timeline, "seconds"), [1, 1, 0.5])
    np.testing.assert_allclose(column(recorder.timeline, "running_seconds"), [2, 4, 2])
    recorder.observe(iteration(5.0, 0.5, decode_rows=6, running=1, kv_pages=2))
    # From 2.5 to 4.5 nothing ran, and the four sequences stayed.
    np.testing.assert_allclose(column(recorder.timeline, "running_seconds"), [2, 4, 4, 4, 2.5])
    np.testing.assert_allclose(column(recorder.timeline, "kv_page_seconds"), [5, 10, 10, 10, 6])
    assert column(recorder.timeline, "decode_rows").sum() == 26
    assert recorder.timeline.as_dict()["kv_pages"][1] == 10


def test_a_late_report_of_an_iteration_never_goes_back() -> None:
    recorder = Recorder(started=0.0)
    calls: list[tuple[float, float]] = []
    recorder.time_sinks.append(lambda start, end, values: calls.append((start, end)))
    for at, seconds in ((1.0, 0.5), (1.1, 0.9), (1.05, 0.2), (3.0, 9.0)):
        recorder.observe(iteration(at, seconds))
        recorder.add(output(1, [1], 0.0, 0.5, 1.0))
    edges = [edge for call in calls for edge in call]
    assert edges == sorted(edges)


@pytest.mark.parametrize("points", [8, 240])
def test_a_timeline_stays_small_and_keeps_every_amount(points: int) -> None:
    timeline = Timeline(points=points, width=0.125)
    rng = np.random.default_rng(1)
    now = total = 0.0
    for step in rng.exponential(0.7, 3000):
        timeline.add(now, now + step, amounts(seconds=step, decode_rows=3))
        now, total = now + step, total + 3
    assert points / 2 <= len(timeline.rows) <= points
    assert column(timeline, "decode_rows").sum() == pytest.approx(total)
    assert column(timeline, "seconds")[:-1] == pytest.approx(timeline.width)
    assert len(timeline.rows) == math.ceil(now / timeline.width)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


def test_the_engine_tells_of_every_iteration_and_token(folder: Path) -> None:
    recorder = Recorder()
    # Pages for two sequences of 60 tokens while seven want to run: some are preempted.
    with LLM(
        model=folder,
        dtype="float32",
        device="cpu",
        page_size=8,
        kv_memory="64KiB",
        max_batch_tokens=24,
        max_model_len=96,
    ) as llm:
        records: list[IterationRecord] = []
        llm.engine.observers += [recorder.observe, records.append]
        before = time.perf_counter()
        prompts = [[3 + i] * (5 + 3 * i) for i in range(7)]
        outputs = llm.generate(prompts, SamplingParams(max_tokens=40, seed=1, temperature=1.0))
        for one in outputs:
            recorder.add(one)
        stats, scheduler = llm.engine.stats, llm.engine.scheduler
    tokens = sum(len(one.outputs[0].token_ids) for one in outputs)
    assert len(records) == stats.iterations == recorder.iteration_seconds.count
    assert sum(r.decode_rows + r.prefill_rows for r in records) == stats.rows
    assert sum(r.padding_rows for r in records) == stats.padding_rows
    assert sum(r.output_tokens for r in records) == tokens
    assert sum(r.preemptions for r in records) == scheduler.preemptions > 0
    assert sum(sum(r.token_gaps.values()) for r in records) == tokens - len(prompts) == recorder.token_gaps.count
    assert max(r.kv_pages for r in records) <= records[0].kv_capacity == scheduler.kv.usable_pages
    assert (records[-1].running, records[-1].waiting) == (0, 0)
    # Each sequence's gaps add up to the time from its first token to its last.
    spans = sum(one.timing.finished - one.timing.first_token for one in outputs)
    assert sum(gap * count for r in records for gap, count in r.token_gaps.items()) == pytest.approx(spans, abs=0.01)
    assert column(recorder.timeline, "output_tokens").sum() == pytest.approx(tokens)
    assert column(recorder.timeline, "completed").sum() == len(prompts)
    assert before <= records[0].time <= records[-1].time <= time.perf_counter()


def test_every_token_after_the_first_has_its_gap_whatever_is_preempted(monkeypatch: pytest.MonkeyPatch) -> None:
    # Little memory and stops that nobody foresees: sequences are preempted, some with a token in flight.
    scheduler, executor = make(pages=14, page_size=2, max_batch_tokens=24, max_running=8, max_model_len=24)
    sequences = [sequence(number, prompt=3, max_tokens=12 + number % 7) for number in range(40)]
    gaps: list[int] = []
    in_flight: list[int] = []
    update, release = scheduler.update, scheduler._slots.release

    def updated(iteration: Iteration, output: StepOutput | None) -> list[Sequence]:
        received = update(iteration, output)
        gaps.append(sum(scheduler.token_gaps.values()))
        assert all(gap > 0 for gap in scheduler.token_gaps)
        return received

    def released(slot: int) -> None:
        one = scheduler._slots.sequences[slot]
        assert one is not None
        release(slot)
        if not one.finished:
            in_flight.append(one.in_flight)

    monkeypatch.setattr(scheduler, "update", updated)
    monkeypatch.setattr(scheduler._slots, "release", released)
    run(scheduler, executor, {0: sequences})
    assert any(in_flight) and not all(in_flight), "no case of each kind"
    assert sum(gaps) == sum(len(one.output) - 1 for one in sequences)
