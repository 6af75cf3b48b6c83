"""What replicas tell: packed outputs come back as they were; iterations of several become one course of time."""

import pickle
import random

import numpy as np
import pytest

from nanoflow.outputs import Completion, RequestOutput, RequestTiming, TokenLogprobs
from nanoflow.recording import IterationRecord, Recorder
from nanoflow.replicas.dispatch import Pending
from nanoflow.replicas.merging import Merger
from nanoflow.replicas.messages import Done, Give, Given
from nanoflow.sampling_params import SamplingParams
from nanoflow.timeline import COLUMNS, Amounts


def logprobs_of(rng: random.Random, tokens: list[int], top: int) -> list[TokenLogprobs]:
    def value() -> float:
        return float(np.float32(-rng.expovariate(1)))

    def alternatives() -> tuple[tuple[int, float], ...]:
        return tuple((rng.randrange(2**31), value()) for _ in range(top))

    return [TokenLogprobs(token, value(), alternatives()) for token in tokens]


@pytest.mark.parametrize("top", [None, 0, 1, 20])
@pytest.mark.parametrize("length", [0, 1, 37])
def test_an_output_comes_back_as_it_was(top: int | None, length: int) -> None:
    rng = random.Random(length)
    outputs = []
    for index in range(3):
        tokens = [rng.randrange(2**31) for _ in range(length)]
        logprobs = None if top is None else logprobs_of(rng, tokens, top)
        outputs.append(Completion(index, f"te\u00dft \ud800 {index}", tokens, "length", logprobs))
    params = SamplingParams(n=3, logprobs=top)
    prompt = np.array([5, 2**31 - 1], np.int32)
    key = object()
    output = RequestOutput(None, prompt.tolist(), outputs, params, RequestTiming(1.0, 2.5, 3.25), key=7, error="why")
    there = pickle.loads(pickle.dumps(Done.of(output)))
    back = there.output(Pending(7, prompt, params, place=3, arrived=1.0, key=key))
    assert back == output and back.key is key
    assert type(back.outputs[0].token_ids) is list
    if length and top is not None:
        assert repr(back.outputs[0].logprobs) == repr(output.outputs[0].logprobs)


def test_a_request_travels_without_its_key() -> None:
    pending = Pending(1, np.arange(3, dtype=np.int32), SamplingParams(seed=4), place=9, arrived=2.0, key=lambda: 0)
    give = pickle.loads(pickle.dumps(Give((Given.of(pending),), expects_more=True)))
    (there,) = give.requests
    assert (there.id, there.place, there.arrived, there.params) == (1, 9, 2.0, pending.params)
    assert there.token_ids.tolist() == [0, 1, 2] and give.expects_more and give.admitting


def iteration(end: float, seconds: float, *, rows: int = 10, running: int = 5) -> IterationRecord:
    return IterationRecord(end, seconds, rows, 0, 0, running, 2, 30, 100, 0, rows, {seconds: rows})


class Course:
    """What a recorder's sinks are told, checked to go on without gap or overlap."""

    def __init__(self, recorder: Recorder) -> None:
        self.end = 0.0
        self.total = np.zeros(len(COLUMNS))
        recorder.time_sinks.append(self.add)

    def add(self, start: float, end: float, values: Amounts) -> None:
        assert start == pytest.approx(self.end) and end >= start
        self.end = end
        self.total = self.total + values

    def __getitem__(self, name: str) -> float:
        return float(self.total[COLUMNS.index(name)])


def test_two_replicas_become_one_course() -> None:
    recorder = Recorder(100.0)
    course, merger = Course(recorder), Merger(recorder, 2)
    merger.works(0, 100.0)
    merger.works(1, 100.0)
    # One makes an iteration of 10 rows every 0.1 s, the other one of 30 every 0.3 s, told late.
    for step in range(30):
        merger.observe(0, iteration(100 + (step + 1) * 0.1, 0.1))
        merger.advance(100 + (step + 1) * 0.1)
        assert course.end <= (step // 3) * 0.3 + 1e-9  # the other has not told of more
        if step % 3 == 2:
            merger.observe(1, iteration(100 + (step + 1) * 0.1, 0.3, rows=30, running=7))
            merger.advance(100 + (step + 1) * 0.1)
            assert course.end == pytest.approx((step + 1) * 0.1)
    assert course["seconds"] == pytest.approx(3.0) and course["busy_seconds"] == pytest.approx(3.0)
    assert course["iterations"] == pytest.approx(40) and course["decode_rows"] == pytest.approx(600)
    assert course["running_seconds"] == pytest.approx(3 * 12)
    timeline = recorder.timeline.as_dict()
    assert timeline["tokens_per_second"] == pytest.approx([200.0] * len(timeline["tokens_per_second"]))
    assert timeline["running"] == pytest.approx([12.0] * len(timeline["running"]))
    assert recorder.iteration_seconds.count == 40 and recorder.token_gaps.count == 600


def test_a_replica_that_rests_is_not_waited_for_and_halves_the_busy_share() -> None:
    recorder = Recorder(0.0)
    course, merger = Course(recorder), Merger(recorder, 2)
    merger.works(0, 0.0)
    merger.works(1, 0.0)
    merger.observe(1, iteration(1.0, 1.0))
    merger.advance(1.0)
    assert course.end == 0.0
    merger.observe(0, iteration(1.0, 1.0))
    merger.rests(1)
    for end in (2.0, 3.0):
        merger.observe(0, iteration(end, 1.0))
        merger.advance(end)
        assert course.end == end
    merger.rests(0)
    merger.advance(4.0)
    assert course.end == 4.0  # nobody works, and time goes on
    merger.works(1, 4.0)
    merger.advance(4.5)
    assert course.end == 4.0
    merger.observe(1, iteration(5.0, 1.0))
    merger.finish()
    assert course["seconds"] == pytest.approx(5.0) and course["busy_seconds"] == pytest.approx(0.5 * (2 + 1 + 1 + 1))
    assert course["iterations"] == pytest.approx(5)


def test_nothing_is_lost_whatever_the_order() -> None:
    rng = random.Random(3)
    recorder = Recorder(0.0)
    course, merger = Course(recorder), Merger(recorder, 4)
    ends = [0.0] * 4
    rows = 0
    for _ in range(2000):
        replica = rng.randrange(4)
        if rng.random() < 0.02:
            merger.rests(replica)
            continue
        seconds = rng.choice([0.001, 0.03, 0.4])
        ends[replica] = max(ends[replica], course.end - 0.1) + seconds * rng.uniform(1, 1.5)
        merger.observe(replica, iteration(ends[replica], seconds))
        rows += 10
        merger.advance(max(ends))
    merger.finish()
    assert course["decode_rows"] == pytest.approx(rows) and course["iterations"] == pytest.approx(rows / 10)
    assert course["seconds"] == pytest.approx(course.end) == recorder.last
    assert course["busy_seconds"] <= course.end + 1e-6
