"""`engine.order`: what runs first is another thing than what comes out."""

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from nanoflow import LLM, SamplingParams
from nanoflow.config import load_config
from nanoflow.errors import ConfigError
from nanoflow.runner import run
from nanoflow.scheduler import Iteration, Scheduler
from nanoflow.search.cost_model import Ceilings
from tests.unit.tiny_model import VOCAB, save_tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("order") / "model")


def mixed_requests(count: int) -> list[tuple[list[int], SamplingParams]]:
    rng = random.Random(8)
    requests = []
    for _ in range(count):
        prompt = [rng.randrange(2, VOCAB) for _ in range(rng.randrange(1, 40))]
        params: dict[str, Any] = {"max_tokens": rng.randrange(1, 40), "n": rng.choice([1, 1, 2])}
        params |= rng.choice([{}, {"temperature": 1.0}, {"temperature": 1.2, "seed": 5, "presence_penalty": 0.4}])
        params |= rng.choice([{"ignore_eos": True}, {"stop": ["a"]}, {"logprobs": 1}])
        requests.append((prompt, SamplingParams(**params)))
    return requests


def test_tokens_do_not_depend_on_the_order(model: Path) -> None:
    """With a KV cache that is too small, so that requests are preempted in either order."""
    requests = mixed_requests(40)
    found = []
    for order in ("input", "longest-first"):
        with LLM(model, dtype="float32", device="cpu", kv_memory="120KiB", page_size=8, order=order) as llm:
            outputs = llm.generate([prompt for prompt, _ in requests], [params for _, params in requests])
            assert llm.engine.scheduler.preemptions > 0
            found.append([[(o.token_ids, o.text, o.finish_reason) for o in output.outputs] for output in outputs])
            ended = sorted(range(len(requests)), key=lambda number: outputs[number].timing.finished)
            limits = [requests[number][1].max_tokens for number in ended]
        # Half of those that end in the first half are long, or it was not the order.
        early, late = sum(limits[:20]), sum(limits[20:])
        assert (early < late) == (order == "input")
    assert found[0] == found[1]


class Job:
    """Requests of five lengths through `run`, one at a time, so that the output shows the order."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.output = folder / "o.jsonl"
        self.path = folder / "job.yaml"
        rng = random.Random(2)
        self.limits = [rng.randrange(1, 6) for _ in range(40)]
        lines = [
            {"custom_id": f"r{number}", "prompt": [5 + number, 6], "max_tokens": limit, "temperature": 1.0}
            for number, limit in enumerate(self.limits)
        ]
        lines.insert(7, {"custom_id": "bad", "prompt": [VOCAB]})
        (folder / "in.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        self.config: dict[str, Any] = {
            "model": {"path": str(model)},
            "workload": {"input": "in.jsonl"},
            "sampling": {"ignore_eos": True},
            "engine": {"device": "cpu", "kv_memory": "1MiB", "max_running": 1},
            "output": {"path": str(self.output)},
        }

    def run(self, **options: Any) -> list[dict[str, Any]]:
        """The records in the order of the output."""
        self.path.write_text(yaml.safe_dump(self.config))
        run(load_config(self.path), quiet=True, **options)
        records = [json.loads(line) for line in self.output.read_bytes().splitlines()]
        for record in records:
            if record["response"]:
                del record["response"]["body"]["created"]
        return records


@pytest.fixture
def job(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setattr("nanoflow.runner.measure_ceilings", lambda *arguments: Ceilings(1e9, 1e9))
    return Job(tmp_path, model)


def output_lengths(records: list[dict[str, Any]]) -> list[int]:
    return [record["response"]["body"]["usage"]["completion_tokens"] for record in records if record["response"]]


def test_a_run_answers_the_longest_first_with_the_same_records(job: Job) -> None:
    plain = job.run()
    assert output_lengths(plain) == job.limits
    job.config["engine"]["order"] = "longest-first"
    records = job.run(restart=True)
    assert output_lengths(records) == sorted(job.limits, reverse=True)
    equal = [record["id"] for record in records if output_lengths([record]) == [3]]
    assert equal == sorted(equal, key=lambda name: int(name.removeprefix("batch_req_")))
    assert sorted(map(json.dumps, records)) == sorted(map(json.dumps, plain))


def test_the_queue_is_filled_up_to_a_block_and_no_further(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanoflow.engine.BLOCK", 12)
    monkeypatch.setattr("nanoflow.waiting.BLOCK", 12)
    waited = []

    class Watched(Scheduler):
        def form(self) -> Iteration | None:
            waited.append(self.waiting)
            return super().form()

    monkeypatch.setattr("nanoflow.loading.Scheduler", Watched)
    job.config["engine"]["order"] = "longest-first"
    lengths = output_lengths(job.run())
    assert max(waited) == 12
    assert lengths[:12] == sorted(job.limits[:12], reverse=True)
    assert lengths != sorted(job.limits, reverse=True) and sorted(lengths) == sorted(job.limits)


def test_prompt_tokens_bound_the_queue_too(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanoflow.serving.MOST_WAITING_TOKENS", 10)
    most = 0

    class Watched(Scheduler):
        def form(self) -> Iteration | None:
            nonlocal most
            most = max(most, self.waiting_tokens)
            return super().form()

    monkeypatch.setattr("nanoflow.loading.Scheduler", Watched)
    assert len(job.run()) == 41
    assert most == 10


class StandingClock:
    """Stands still while anything runs; only waiting takes time, and no longer than it says."""

    def __init__(self) -> None:
        self.now = time.perf_counter()
        self.time = time.time

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)
        self.now += seconds


def test_a_request_does_not_run_before_it_arrives_however_long(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanoflow.serving.time", StandingClock())
    job.config["workload"] = {
        "synthetic": {"input_len": 3, "output_len": {"uniform": [2, 30]}, "requests": 8},
        "arrival": {"constant": 10},
    }
    job.config["engine"]["order"] = "longest-first"
    records = job.run()
    assert len(set(output_lengths(records))) > 3
    # By that clock each is finished before the next one arrives.
    assert [record["id"] for record in records] == [f"batch_req_{number}" for number in range(1, 9)]


def test_an_unknown_order_is_refused(job: Job) -> None:
    job.config["engine"]["order"] = "longest"
    with pytest.raises(ConfigError, match=r"engine\.order.*'input' or 'longest-first'"):
        job.run()
