"""Replicas behind one queue, in threads of this process: outputs of one engine, deaths at random moments, signals."""

import json
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nanoflow.batch_file import ErrorRecord, ParsedRequest, parse_line
from nanoflow.config_schema import RunConfig
from nanoflow.errors import ParallelError
from nanoflow.feed import Feed
from nanoflow.interrupt import Interrupts
from nanoflow.ledger import Ledger
from nanoflow.loading import Model, build_engine, open_model
from nanoflow.progress import RunProgress
from nanoflow.recording import IterationRecord, Recorder
from nanoflow.replicas import serve
from nanoflow.replicas.pool import Pool
from nanoflow.sampling_params import SamplingParams
from nanoflow.serving import Serving
from tests.unit.replica_threads import FakeWatch, ReplicaThread
from tests.unit.tiny_model import VOCAB, save_tiny_llama

Records = dict[str, Any]
LIMIT = 60.0
COUNT, ERRORS = 60, 3


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = save_tiny_llama(tmp_path_factory.mktemp("replicas") / "model")
    return RunConfig.model_validate(
        {
            "model": {"path": str(folder)},
            "workload": {"synthetic": {"input_len": 4, "output_len": 4}},
            "engine": {"device": "cpu", "kv_memory": "256KiB", "page_size": 8, "max_running": 6},
            "parallel": {"data": 2},
        }
    )


@pytest.fixture(scope="module")
def model(config: RunConfig) -> Model:
    return open_model(config.model, config.engine)


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
FORMS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 1.2, "seed": 7, "n": 3},
    {"logprobs": 2, "temperature": 0.7},
    {"stop": ["a", "e"], "temperature": 1.0},
    {"structured_outputs": {"json": SCHEMA}, "temperature": 1.0},
    {"n": 2, "temperature": 1.5, "repetition_penalty": 1.2},
]


def items_of(count: int) -> Iterator[ParsedRequest | ErrorRecord]:
    rng = random.Random(5)
    for number in range(count):
        prompt = [rng.randrange(2, VOCAB) for _ in range(rng.randrange(1, 30))]
        line: dict[str, Any] = {"custom_id": f"r{number}", "prompt": prompt, **FORMS[number % len(FORMS)]}
        if number % 17 == 11:
            line["prompt"] = [[], [2] * 200, [VOCAB + 5]][number % 3]
        yield parse_line(json.dumps(line), number + 1, SamplingParams(max_tokens=2 + number % 9, ignore_eos=True))


class Written:
    """Records as a run writes them, without times; no request may have two."""

    def __init__(self) -> None:
        self.records: Records = {}

    def write(self, record: Mapping[str, Any]) -> None:
        record = json.loads(json.dumps(record))
        if record["response"]:
            del record["response"]["body"]["created"]
        assert record["custom_id"] not in self.records
        self.records[record["custom_id"]] = record


def assert_same(found: Records, expected: Records) -> None:
    """The same records; log-probabilities within rounding, which depends on what else is in a batch."""

    def compare(one: Any, other: Any, where: str) -> None:
        if isinstance(other, dict):
            assert one.keys() == other.keys(), where
            for key in other:
                compare(one[key], other[key], f"{where}.{key}")
        elif isinstance(other, list):
            assert len(one) == len(other), where
            for place, pair in enumerate(zip(one, other, strict=True)):
                compare(*pair, f"{where}[{place}]")
        elif isinstance(other, float):
            assert one == pytest.approx(other, abs=1e-4), where
        else:
            assert one == other, where

    compare(found, expected, "records")


class Job:
    """A run's loop over an engine or a pool, without files."""

    def __init__(self, engine: Any, model: Model, items: Iterator[ParsedRequest | ErrorRecord]) -> None:
        self.written = Written()
        self.recorder = Recorder()
        self.seen: list[IterationRecord] = []
        self.interrupts = Interrupts(quiet=True)
        self._engine, self._model, self._items = engine, model, items

    def run(self, each: Callable[["Job"], None] = lambda job: None) -> Records:
        engine = self._engine
        with Feed(self._items, Ledger(), self._model.tokenizer) as feed:
            engine.record_to(self.recorder)
            engine.observers.append(self.seen.append)
            progress = RunProgress(feed.totals, quiet=True)
            self.serving = Serving(engine, feed, self.written, self.recorder, progress, "tiny")
            end = time.monotonic() + LIMIT
            while not self.serving.finished(self.interrupts):
                assert time.monotonic() < end, "the run hangs"
                self.serving.step()
                each(self)
        return self.written.records


class Machine:
    """A pool of replica threads; use as a context manager."""

    def __init__(self, config: RunConfig, model: Model, count: int, delays: Mapping[int, float] | None = None) -> None:
        self.threads: list[ReplicaThread] = []
        self.watches: list[FakeWatch] = []
        delays = delays or {}

        def start(number: int) -> Any:
            self.threads.append(ReplicaThread(number, config, lambda n: time.sleep(delays.get(n, 0.0))))
            return self.threads[-1].child

        def watch(lost: Any) -> FakeWatch:
            self.watches.append(FakeWatch(lost))
            return self.watches[-1]

        self.pool = Pool(
            start,
            count,
            watch,
            max_model_len=model.max_model_len,
            tokenizer=model.tokenizer,
            longest_first=config.engine.order == "longest-first",
            then="go on",
        )

    def kill(self, number: int) -> None:
        self.watches[0].kill(self.threads[number])

    def __enter__(self) -> "Machine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.pool.kill()


@pytest.fixture(scope="module")
def expected(config: RunConfig, model: Model) -> Records:
    """Of one engine."""
    engine = build_engine(model, config.engine)
    records = Job(engine, model, items_of(COUNT)).run()
    engine.close()
    assert len(records) == COUNT and sum(record["error"] is not None for record in records.values()) == ERRORS
    return records


@pytest.mark.parametrize(("count", "order"), [(1, "input"), (2, "input"), (3, "longest-first")])
def test_several_replicas_give_one_engines_outputs(
    config: RunConfig, model: Model, expected: Records, count: int, order: str
) -> None:
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"order": order})})
    with Machine(config, model, count) as machine:
        job = Job(machine.pool, model, items_of(COUNT))
        assert_same(job.run(), expected)
        machine.pool.close()
        figures = machine.pool.figures(1.0)
        assert sum(one.completed for one in figures) == job.recorder.completed == COUNT - ERRORS
        assert all(one.completed and one.iterations and one.lost is None for one in figures)
        stats = machine.pool.stats
        assert stats.iterations == len(job.seen) == sum(one.iterations for one in figures)
        assert stats.rows == sum(seen.decode_rows + seen.prefill_rows for seen in job.seen)
        assert sum(stats.program_iterations.values()) == stats.iterations == stats.planned_iterations
        rows = job.recorder.timeline.as_dict()
        assert sum(rows["iterations"]) == pytest.approx(stats.iterations, rel=1e-4)
        assert sum(rows["completed"]) == COUNT - ERRORS and sum(rows["errors"]) == ERRORS
        assert max(seen.running for seen in job.seen) <= 6 * count == machine.pool.sizes["max_running"]
        assert machine.pool.kv_capacity * 8 == machine.pool.sizes["kv_tokens"]
        output_tokens = sum(
            record["response"]["body"]["usage"]["completion_tokens"]
            for record in expected.values()
            if record["response"]
        )
        assert sum(one.output_tokens for one in figures) == output_tokens
    assert all(not thread._thread.is_alive() for thread in machine.threads)


def test_requests_go_where_they_are_answered_fastest(config: RunConfig, model: Model, expected: Records) -> None:
    with Machine(config, model, 2, delays={0: 0.03}) as machine:
        assert_same(Job(machine.pool, model, items_of(COUNT)).run(), expected)
        slow, fast = machine.pool.figures(1.0)
        assert 0 < slow.completed < fast.completed


@pytest.mark.parametrize("seed", range(3))
def test_a_death_at_a_random_moment_loses_nothing_and_doubles_nothing(
    config: RunConfig, model: Model, expected: Records, seed: int, capfd: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(seed)
    moments = sorted(rng.sample(range(0, COUNT - 10), 2))
    victims = rng.sample(range(3), 2)

    def each(job: Job) -> None:
        while moments and len(job.written.records) >= moments[0]:
            moments.pop(0)
            machine.kill(victims.pop())

    with Machine(config, model, 3) as machine:
        assert_same(Job(machine.pool, model, items_of(COUNT)).run(each), expected)
        lost = [one for one in machine.pool.figures(1.0) if one.lost is not None]
        assert not victims and len(lost) <= 2  # one that dies after the last record may not be noticed
    told = capfd.readouterr().err.splitlines()
    assert len(told) == len(lost)
    for line in told:
        assert line.startswith("warning: replica ") and "was killed by SIGKILL; the other" in line


def test_when_all_are_dead_the_run_ends_with_the_last_ones_message(
    config: RunConfig, model: Model, expected: Records, capfd: pytest.CaptureFixture[str]
) -> None:
    def each(job: Job) -> None:
        if len(job.written.records) >= 20:
            machine.kill(1)
            machine.kill(0)

    with Machine(config, model, 2, delays={0: 0.002, 1: 0.002}) as machine:
        job = Job(machine.pool, model, items_of(COUNT))
        with pytest.raises(ParallelError, match="replica 0 was killed by SIGKILL; no replica is left; go on"):
            job.run(each)
        machine.pool.close()  # which is nothing to wait for
        # All that had come from them was written.
        answered = [record for record in job.written.records.values() if record["response"] is not None]
        assert sum(one.completed for one in machine.pool.figures(1.0)) == len(answered)
    assert "warning: replica 1 was killed by SIGKILL; the other one goes on" in capfd.readouterr().err
    assert 20 <= len(job.written.records) < COUNT
    assert_same(job.written.records, {key: expected[key] for key in job.written.records})


def test_deaths_after_the_last_request_harm_nothing(config: RunConfig, model: Model, expected: Records) -> None:
    def each(job: Job) -> None:
        if len(job.written.records) == COUNT:
            for number in range(2):
                machine.kill(number)

    with Machine(config, model, 2) as machine:
        assert_same(Job(machine.pool, model, items_of(COUNT)).run(each), expected)


def test_after_a_signal_what_runs_is_finished_and_nothing_begun(config: RunConfig, model: Model) -> None:
    def each(job: Job) -> None:
        if len(job.written.records) >= 10 and job.interrupts.signal is None:
            job.interrupts.signal = 2
            job.interrupts._deadline = time.monotonic() + LIMIT

    with Machine(config, model, 2, delays={0: 0.002, 1: 0.002}) as machine:
        job = Job(machine.pool, model, items_of(COUNT))
        records = job.run(each)
        assert 10 <= len(records) < COUNT - 6 and not job.serving.complete
        assert all(one.last is not None and not one.last.active for one in machine.pool._alive)


def test_a_replica_that_cannot_start_is_a_warning_unless_none_can(
    config: RunConfig,
    model: Model,
    expected: Records,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fail(machine_of: list[FakeWatch], thread: ReplicaThread) -> None:
        machine_of[0].kill(thread)

    watches: list[FakeWatch] = []
    threads: list[ReplicaThread] = []

    def watch(lost: Any) -> FakeWatch:
        watches.append(FakeWatch(lost))
        return watches[-1]

    def start_pool(dead: set[int]) -> Pool:
        def start(number: int) -> Any:
            threads.append(ReplicaThread(number, config, lambda n: None))
            if number in dead:
                threads[-1].kill()
            return threads[-1].child

        watches.clear()
        real_add = FakeWatch.add

        def add(self: FakeWatch, child: Any) -> None:
            real_add(self, child)
            if int(child.name.split()[-1]) in dead:
                fail(watches, child.process)

        monkeypatch.setattr(FakeWatch, "add", add)
        return Pool(start, 2, watch, max_model_len=model.max_model_len, tokenizer=model.tokenizer)

    with closing(start_pool({0})) as pool:
        assert_same(Job(pool, model, items_of(COUNT)).run(), expected)
        assert [one.load_seconds for one in pool.figures(1.0)] == [None, 0.1]
    assert "warning: replica 0 was killed by SIGKILL; the run goes on with 1 of 2 replicas\n" in capfd.readouterr().err
    with pytest.raises(ParallelError, match="replica 1 was killed by SIGKILL; no replica could start"):
        start_pool({0, 1})


def test_requests_that_arrive_later_go_out_when_they_do(config: RunConfig, model: Model) -> None:
    def items() -> Iterator[ParsedRequest]:
        for number in range(12):
            prompt = np.array([3, 4 + number], np.int32)
            params = SamplingParams(max_tokens=3)
            yield ParsedRequest(number + 1, f"r{number}", "completion", params, prompt, arrival=number * 0.03)

    with Machine(config, model, 2) as machine:
        job = Job(machine.pool, model, items())
        began = time.perf_counter()
        assert len(job.run()) == 12
        assert time.perf_counter() - began >= 11 * 0.03
        assert all(one.completed >= 3 for one in machine.pool.figures(1.0))
        assert (job.recorder.column("first_token") < 5).all() and (job.recorder.column("first_token") > 0).all()


def test_an_iteration_that_hangs_is_noticed_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = SimpleNamespace(steps=0, stepping=False)
    said: list[str] = []
    # What the watch finds after each second: idle for long, iterations of up to 5 s, a pause, one that hangs.
    states = [(0, False)] * 20 + [(1, True)] * 5 + [(2, True)] * 6 + [(2, False)] * 20 + [(3, True)] * 100
    course = iter(states)

    def sleep(seconds: float) -> None:
        assert seconds == 1.0 and not said
        loop.steps, loop.stepping = next(course)

    monkeypatch.setattr(serve.time, "sleep", sleep)
    serve.watch_steps(loop, said.append, seconds=5.0)  # type: ignore[arg-type]
    assert said == ["an iteration has not come to its end in 5 s: its GPU hangs"]
    assert len([*course]) == 100 - 7
