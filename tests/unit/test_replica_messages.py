"""What replicas tell: packed outputs come back as they were; iterations of several become one course of time."""

import json
import pickle
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from nanoflow.engine import EngineStats
from nanoflow.models.config import ModelConfig
from nanoflow.models.registry import build_graph
from nanoflow.outputs import Completion, RequestOutput, RequestTiming, TokenLogprobs
from nanoflow.pipeline.plan import Plan
from nanoflow.pipeline.program import Program, compile_program
from nanoflow.recording import IterationRecord, Recorder
from nanoflow.replicas.dispatch import Pending
from nanoflow.replicas.merging import Merger
from nanoflow.replicas.messages import Done, Give, Given
from nanoflow.replicas.totals import add_stats, all_programs
from nanoflow.sampling_params import SamplingParams
from nanoflow.timeline import COLUMNS, Amounts

CONFIG = Path(__file__).parents[2] / "configs/models/tiny-llama/config.json"


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
    give = pickle.loads(pickle.dumps(Give((Given.of(pending),), expected=2.5)))
    (there,) = give.requests
    assert (there.id, there.place, there.arrived, there.params) == (1, 9, 2.0, pending.params)
    assert there.token_ids.tolist() == [0, 1, 2] and give.expected == 2.5 and give.admitting


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


def test_totals_of_replicas_that_run_different_plans() -> None:
    graph = build_graph(ModelConfig.from_dict(json.loads(CONFIG.read_text())))

    def program(capacity: int) -> Program:
        return compile_program(Plan.sequential(graph, capacity), graph)

    small, middle, whole = program(16), program(32), program(64)
    here: list[list[Program]] = [[small, whole], [program(64)], [middle, small, whole]]
    together = all_programs(here)
    assert [one.plan.capacity for one in together] == [16, 32, 64]
    stats = [
        EngineStats(iterations=7, program_iterations=Counter({0: 5, 1: 2}), planned_iterations=5, largest_batch=9),
        EngineStats(iterations=4, program_iterations=Counter({0: 4}), planned_iterations=4, rows=3, largest_batch=60),
        EngineStats(iterations=6, program_iterations=Counter({0: 3, 1: 2, 2: 1}), busy_seconds=0.5, padding_rows=2),
    ]
    total = add_stats(stats, here, together)
    assert total.program_iterations == {0: 7, 1: 3, 2: 7}
    assert (total.iterations, total.planned_iterations, total.largest_batch) == (17, 9, 60)
    assert (total.rows, total.padding_rows, total.busy_seconds) == (3, 2, 0.5)
    assert stats[0].program_iterations == {0: 5, 1: 2}  # as they were
