"""Runs that are stopped and started again end with the records of a run that never was."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from nanoflow.cli import app
from nanoflow.scheduler import Iteration, Scheduler
from nanoflow.search.cost_model import Ceilings
from tests.unit.tiny_model import VOCAB, save_tiny_llama

LINES: list[Any] = [
    {"custom_id": "greedy", "prompt": "abc", "max_tokens": 20},
    {"custom_id": "sampled", "prompt": [5, 6, 7], "temperature": 1.2, "n": 2},
    "not JSON",
    {"custom_id": "seeded", "prompt": "bad", "temperature": 1.0, "seed": 3},
    {"custom_id": "greedy", "prompt": "again"},
    {"prompt": "no id"},
    {"custom_id": "long", "prompt": "x" * 400},
    {"custom_id": "unknown", "prompt": [VOCAB]},
    {"custom_id": "late", "prompt": "dcba", "temperature": 1.5},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("resume") / "model")


class Job:
    """A job in a folder of its own."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.output = folder / "out" / "o.jsonl"
        self.config: dict[str, Any] = {
            "model": {"path": str(model)},
            "workload": {"input": "in.jsonl"},
            "sampling": {"max_tokens": 6, "ignore_eos": True},
            "engine": {"device": "cpu", "kv_memory": "1MiB"},
            "output": {"path": str(self.output)},
        }
        self.lines(LINES)

    def lines(self, lines: list[Any]) -> None:
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (self.folder / "in.jsonl").write_text("\n".join(texts) + "\n")

    def run(self, *arguments: str, stdin: bytes | None = None) -> Result:
        (self.folder / "job.yaml").write_text(yaml.safe_dump(self.config))
        return CliRunner().invoke(app, ["run", str(self.folder / "job.yaml"), *arguments], input=stdin)

    def records(self) -> list[dict[str, Any]]:
        """What is in the output, in order of line, without the times."""
        found = [json.loads(line) for line in self.output.read_bytes().splitlines()]
        for record in found:
            if record["response"] is not None:
                del record["response"]["body"]["created"]
        return sorted(found, key=lambda record: int(record["id"].removeprefix("batch_req_")))


@pytest.fixture(scope="module", autouse=True)
def no_measuring() -> Iterator[None]:
    """Measuring the machine takes seconds, and has nothing to do with what is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanoflow.runner.measure_ceilings", lambda *arguments: Ceilings(1e9, 1e9))
        yield


@pytest.fixture
def job(tmp_path: Path, model: Path) -> Job:
    return Job(tmp_path, model)


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    job = Job(tmp_path_factory.mktemp("undisturbed"), model)
    result = job.run()
    assert result.exit_code == 1, result.output
    return job.records()


def test_every_line_has_one_record(undisturbed: list[dict[str, Any]]) -> None:
    assert [record["id"] for record in undisturbed] == [f"batch_req_{n}" for n in range(1, len(LINES) + 1)]
    codes = [record["error"]["code"] if record["error"] else None for record in undisturbed]
    invalid = "invalid_request"
    assert codes == [None, None, "invalid_json", None, "duplicate_custom_id", invalid, invalid, invalid, None]
    # Seeds of requests that name none come from the line.
    texts = [choice["text"] for choice in undisturbed[1]["response"]["body"]["choices"]]
    assert texts[0] != texts[1]


@pytest.mark.parametrize("kept", range(len(LINES)))
def test_a_run_goes_on_after_any_number_of_records(job: Job, undisturbed: list[dict[str, Any]], kept: int) -> None:
    assert job.run("--quiet").exit_code == 1
    lines = job.output.read_bytes().splitlines(keepends=True)
    job.output.write_bytes(b"".join(lines[:kept]) + lines[kept][:17])
    # The engine's sizes may differ; so may where the files are.
    job.config["engine"] |= {"max_batch_tokens": 7, "max_running": 2, "page_size": 8}
    (job.folder / "in.jsonl").rename(job.folder / "in2.jsonl")
    (job.folder / "in2.jsonl").rename(job.folder / "in.jsonl")
    result = job.run()
    assert result.exit_code == 1, result.output
    assert job.output.read_bytes().startswith(b"".join(lines[:kept]))
    assert job.records() == undisturbed
    if kept:
        assert f"{kept} more requests had their record before" in result.stdout


def test_nothing_left_to_do_changes_nothing(job: Job) -> None:
    assert job.run("--quiet").exit_code == 1
    before = {path.name: path.read_bytes() for path in job.output.parent.iterdir()}
    job.config["engine"]["max_running"] = 3
    result = job.run()
    assert result.exit_code == 1
    assert "nothing left to do: all 9 requests have their record" in result.stdout
    assert "5 of 9 requests ended in an error record; --retry-errors" in result.stderr
    assert {path.name: path.read_bytes() for path in job.output.parent.iterdir()} == before


def test_an_empty_input(job: Job) -> None:
    job.lines([""])
    result = job.run()
    assert result.exit_code == 0
    assert "all 0 requests" in result.stdout


def test_only_error_records(job: Job) -> None:
    job.lines(["x", "y"])
    assert job.run().exit_code == 1
    assert len(job.records()) == 2


def test_errors_are_run_again_when_asked(job: Job, undisturbed: list[dict[str, Any]]) -> None:
    assert job.run("--quiet").exit_code == 1
    answers = [line for line in job.output.read_bytes().splitlines() if b'"error":null' in line]
    job.lines([*LINES[:2], {"custom_id": "mended", "prompt": "now JSON"}, *LINES[3:5], *LINES[8:]])
    result = job.run("--retry-errors")
    assert result.exit_code == 2 and "workload.input.in.jsonl: was" in result.stderr
    assert job.run("--retry-errors", "--continue-anyway").exit_code == 1
    assert job.output.read_bytes().splitlines()[:4] == answers
    assert [record["custom_id"] for record in job.records()] == [
        "greedy",
        "sampled",
        "mended",
        "seeded",
        "greedy",
        "late",
    ]


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "sampling": ({"sampling": {"temperature": 0.5}}, "sampling.temperature: was not there, is 0.5"),
    "dtype": ({"model": {"dtype": "bfloat16"}}, "model.dtype: was float32, is bfloat16"),
    "weights": ({"model": {"weights": "random"}}, "model.weights: was load, is random"),
    "workload": (
        {"workload": {"input": None, "synthetic": {"input_len": 3, "output_len": 2, "requests": 4}}},
        "workload.synthetic.input_len.constant: was not there, is 3",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_run_is_refused_with_what_differs(job: Job, name: str) -> None:
    changes, message = CHANGES[name]
    assert job.run("--quiet").exit_code == 1
    before = job.output.read_bytes()
    for section, keys in changes.items():
        job.config[section] = {k: v for k, v in (job.config[section] | keys).items() if v is not None}
    result = job.run()
    assert result.exit_code == 2, result.output
    assert f"  {message}\n" in result.stderr
    assert "--restart" in result.stderr and "--continue-anyway" in result.stderr
    assert job.output.read_bytes() == before
    assert job.run("--restart", "--quiet").exit_code == (0 if name == "workload" else 1)


def test_other_weights_of_the_same_shape_are_noticed(job: Job, tmp_path: Path, model: Path) -> None:
    copy = tmp_path / "model"
    copy.mkdir()
    for file in model.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    job.config["model"]["path"] = str(copy)
    assert job.run("--quiet").exit_code == 1
    weights = copy / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    result = job.run()
    assert result.exit_code == 2 and "model.files.model.safetensors: was" in result.stderr


def test_going_on_anyway_keeps_what_is_there(job: Job, undisturbed: list[dict[str, Any]]) -> None:
    assert job.run("--quiet").exit_code == 1
    kept = [line for line in job.output.read_bytes().splitlines(keepends=True) if b'"late"' not in line]
    job.output.write_bytes(b"".join(kept))
    job.config["sampling"]["max_tokens"] = 3
    assert job.run("--continue-anyway", "--quiet").exit_code == 1
    assert job.output.read_bytes().startswith(b"".join(kept))
    late = job.records()[-1]
    assert late["custom_id"] == "late" and late["response"]["body"]["usage"]["completion_tokens"] == 3
    assert len(job.records()) == len(LINES)
    assert job.run().exit_code == 1  # this is now the run whose records they are


@pytest.mark.parametrize(("state", "message"), [(None, "there is no o.state.json"), ("{", "o.state.json is damaged")])
def test_records_of_an_unknown_run_are_refused(job: Job, state: str | None, message: str) -> None:
    assert job.run("--quiet").exit_code == 1
    file = job.output.with_name("o.state.json")
    if state is None:
        file.unlink()
    else:
        file.write_text(state)
    result = job.run()
    assert result.exit_code == 2 and message in result.stderr
    assert job.run("--continue-anyway").exit_code == 1


def test_a_file_that_is_no_output_is_not_touched(job: Job) -> None:
    job.output.parent.mkdir()
    job.output.write_text("my notes")
    assert job.run().exit_code == 2
    assert job.output.read_text() == "my notes"


def test_a_restart_that_fails_keeps_the_older_run_and_its_state(job: Job) -> None:
    assert job.run("--quiet").exit_code == 1
    before = {name: job.output.with_name(name).read_bytes() for name in ("o.jsonl", "o.state.json")}
    job.config["engine"]["kv_memory"] = 5000
    job.config["sampling"]["max_tokens"] = 7
    assert job.run("--restart").exit_code == 2
    assert {name: job.output.with_name(name).read_bytes() for name in before} == before


def test_a_damaged_input_ends_the_run_after_what_was_read(job: Job, undisturbed: list[dict[str, Any]]) -> None:
    packed = gzip.compress((job.folder / "in.jsonl").read_bytes())
    job.config["workload"]["input"] = "in.gz"
    (job.folder / "in.gz").write_bytes(packed[:-4])
    result = job.run()
    assert result.exit_code == 2 and "in.gz is damaged after line" in result.stderr
    (job.folder / "in.gz").write_bytes(packed)
    assert job.run("--continue-anyway").exit_code == 1
    assert job.records() == undisturbed


def test_a_narrow_feed_gives_the_same_records(
    job: Job, undisturbed: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Little is read ahead, so the KV cache is sized before a request of the longest kind is known."""
    lines = [{"custom_id": f"short {number}", "prompt": "a"} for number in range(30)]
    lines.append({"custom_id": "longest", "prompt": "x" * 100, "max_tokens": 60})
    job.lines([*LINES, *lines])
    job.config["engine"] = {"device": "cpu", "max_running": 2, "page_size": 8}
    monkeypatch.setattr("nanoflow.feed.MOST_ITEMS", 4)
    monkeypatch.setattr("nanoflow.engine.LEAST_WAITING", 4)
    most = 0

    class Watched(Scheduler):
        def form(self) -> Iteration | None:
            nonlocal most
            most = max(most, self.waiting)
            return super().form()

    monkeypatch.setattr("nanoflow.loading.Scheduler", Watched)
    result = job.run()
    assert result.exit_code == 1, result.output
    assert job.records()[: len(LINES)] == undisturbed
    assert all(record["error"] is None for record in job.records()[len(LINES) :])
    assert 2 <= most <= 5  # a request of two completions is not cut in two


def test_synthetic_requests_go_on(job: Job) -> None:
    job.config["workload"] = {"synthetic": {"input_len": 5, "output_len": {"uniform": [2, 9]}, "requests": 12}}
    job.config["sampling"] = {"temperature": 1.0}
    assert job.run("--quiet").exit_code == 0
    whole = job.records()
    job.output.write_bytes(b"".join(job.output.read_bytes().splitlines(keepends=True)[:5]))
    assert job.run("--quiet").exit_code == 0
    assert job.records() == whole


def test_arrivals_of_what_is_left_start_at_once(job: Job) -> None:
    """Twelve requests over three seconds; the first eleven are done."""
    job.config["workload"] = {
        "synthetic": {"input_len": 5, "output_len": 2, "requests": 12},
        "arrival": {"constant": 4},
    }
    assert job.run("--quiet").exit_code == 0
    report = json.loads(job.output.with_name("o.report.json").read_text())
    assert report["seconds"] > 2.5
    assert report["time_to_first_token_ms"]["p99"] < 2000
    job.output.write_bytes(b"".join(job.output.read_bytes().splitlines(keepends=True)[:11]))
    assert job.run("--quiet").exit_code == 0
    report = json.loads(job.output.with_name("o.report.json").read_text())
    assert report["completed"] == 1 and report["seconds"] < 2.5


def test_a_clock_that_runs_backwards(job: Job, undisturbed: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [2e9]

    def backwards() -> float:
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr("time.time", backwards)
    assert job.run().exit_code == 1
    assert job.records() == undisturbed
