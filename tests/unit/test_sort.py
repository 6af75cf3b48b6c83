"""`output.sort`: a complete output comes into the order of the input; whatever happens meanwhile, all is there."""

import json
import os
import random
import resource
import signal
import stat
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

import nanoflow.sorting
from nanoflow.batch_file import ErrorRecord, ParsedRequest
from nanoflow.batch_output import error_line
from nanoflow.cli import app
from nanoflow.errors import OutputError
from nanoflow.ledger import Ledger
from nanoflow.sampling_params import SamplingParams
from nanoflow.search.cost_model import Ceilings
from nanoflow.writer import OutputWriter
from tests.unit.forks import ForkServer, wait_for_lines
from tests.unit.test_interrupts import SLOW
from tests.unit.tiny_model import VOCAB, save_tiny_llama

LINES: list[Any] = [
    {"custom_id": "short", "prompt": "abc", "max_tokens": 1},
    {"custom_id": 'quotes "\\" and ünïcode \u2028', "prompt": [5, 6, 7], "temperature": 1.2, "n": 2},
    "not JSON",
    {"custom_id": "seeded", "prompt": "bad", "temperature": 1.0, "seed": 3, "max_tokens": 9},
    {"custom_id": "short", "prompt": "again"},
    {"prompt": "no id"},
    {"custom_id": "long", "prompt": "x" * 400},
    {"custom_id": "\ud800 half a pair", "prompt": [4], "max_tokens": 12},
    {"custom_id": "unknown", "prompt": [VOCAB]},
    {"custom_id": '","response":{', "prompt": "dcba", "max_tokens": 5},
    *({"custom_id": f"r{number}", "prompt": [number], "max_tokens": 1 + number % 7} for number in range(2, 22)),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("sort") / "model")


@pytest.fixture(scope="module", autouse=True)
def no_measuring() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanoflow.runner.measure_ceilings", lambda *arguments: Ceilings(1e9, 1e9))
        yield


class Job:
    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.output = folder / "o.jsonl"
        self.config: dict[str, Any] = {
            "model": {"path": str(model)},
            "workload": {"input": "in.jsonl"},
            "sampling": {"max_tokens": 6, "ignore_eos": True},
            "engine": {"device": "cpu", "kv_memory": "1MiB", "order": "longest-first", "max_running": 3},
            "output": {"path": str(self.output), "sort": True},
        }
        self.lines(LINES)

    def lines(self, lines: list[Any]) -> None:
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (self.folder / "in.jsonl").write_text("\n".join(texts) + "\n")

    def save(self) -> Path:
        path = self.folder / "job.yaml"
        path.write_text(yaml.safe_dump(self.config))
        return path

    def run(self, *arguments: str) -> Result:
        return CliRunner().invoke(app, ["run", str(self.save()), *arguments])

    def records(self) -> list[dict[str, Any]]:
        """In the order of the file, without times."""
        found = [json.loads(line) for line in self.output.read_bytes().splitlines()]
        for record in found:
            if record["response"]:
                del record["response"]["body"]["created"]
        return found

    def ids(self) -> list[int]:
        """The lines that the records are of, in the order of the file."""
        return [int(record["id"].removeprefix("batch_req_")) for record in self.records()]


@pytest.fixture
def job(tmp_path: Path, model: Path) -> Job:
    return Job(tmp_path, model)


@pytest.fixture(scope="module")
def unsorted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The lines of an output as requests finish."""
    job = Job(tmp_path_factory.mktemp("unsorted"), model)
    job.config["output"]["sort"] = False
    assert job.run("--quiet").exit_code == 1
    assert sorted(job.ids()) == list(range(1, len(LINES) + 1)) != job.ids()
    return job.output.read_bytes().splitlines(keepends=True)


def in_order(lines: list[bytes]) -> list[bytes]:
    return sorted(lines, key=lambda line: int(json.loads(line)["id"].removeprefix("batch_req_")))


ORDERED = list(range(1, len(LINES) + 1))


def test_an_output_is_sorted_once_it_is_complete(job: Job, unsorted: list[bytes]) -> None:
    result = job.run()
    assert result.exit_code == 1, result.output
    assert f"sorting {len(LINES)} records into the order of the input" in result.stderr
    assert job.ids() == ORDERED
    sorted_records = job.records()
    job.output.write_bytes(b"".join(unsorted))
    assert sorted(map(str, job.records())) == sorted(map(str, sorted_records))
    assert not list(job.folder.glob("*.new"))


@pytest.mark.parametrize("kept", [0, 4, 17, len(LINES)])
def test_records_of_earlier_runs_are_sorted_with_the_new_ones(job: Job, unsorted: list[bytes], kept: int) -> None:
    """With all of them there, nothing but the sorting is left to do."""
    job.config["output"]["sort"] = False
    assert job.run("--quiet").exit_code == 1
    job.config["output"]["sort"] = True
    torn = unsorted[kept][:30] if kept < len(LINES) else b""
    job.output.write_bytes(b"".join(unsorted[:kept]) + torn)
    result = job.run()
    assert result.exit_code == 1, result.output
    assert job.ids() == ORDERED
    assert ("nothing left to do" in result.stdout) == (kept == len(LINES))
    assert set(unsorted[:kept]) <= set(job.output.read_bytes().splitlines(keepends=True))


def test_a_sorted_output_is_left_alone(job: Job) -> None:
    assert job.run("--quiet").exit_code == 1
    before = job.output.stat()
    result = job.run()
    assert "nothing left to do" in result.stdout and "sorting" not in result.stderr
    after = job.output.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_link_stays_a_link_and_the_mode_is_kept(job: Job) -> None:
    target = job.folder / "elsewhere.jsonl"
    target.touch()
    target.chmod(0o640)
    job.output.symlink_to(target)
    assert job.run("--quiet").exit_code == 1
    assert job.output.is_symlink() and stat.S_IMODE(target.stat().st_mode) == 0o640
    assert job.ids() == ORDERED


def test_errors_that_are_run_again_come_to_their_places(job: Job) -> None:
    assert job.run("--quiet").exit_code == 1
    lines = list(LINES)
    lines[2] = {"custom_id": "mended", "prompt": "now JSON"}
    job.lines(lines)
    assert job.run("--quiet", "--retry-errors", "--continue-anyway").exit_code == 1
    assert job.ids() == ORDERED
    assert job.records()[2]["custom_id"] == "mended"


def test_a_request_that_moved_in_the_input_counts_where_it_is_now(job: Job) -> None:
    assert job.run("--quiet").exit_code == 1
    moved = {"custom_id": "new", "prompt": "first", "max_tokens": 2}
    job.lines([LINES[20], moved, LINES[0], LINES[9]])
    assert job.run("--quiet", "--continue-anyway").exit_code == 1
    # Lines without a custom_id of their own stay at their number (3, 5 and 6). What is not in the input any more
    # follows, in the order that it had.
    first = [21, 2, 1, 3, 10, 5, 6]
    assert job.ids() == first + [line for line in ORDERED if line not in first or line == 2]
    assert job.records()[1]["custom_id"] == "new"


def test_an_output_that_is_no_file_is_refused_before_anything_runs(job: Job) -> None:
    job.config["output"]["path"] = "/dev/null"
    result = job.run()
    assert result.exit_code == 2
    assert "output.sort: /dev/null is a device or a pipe" in result.stderr and "set it to false" in result.stderr


def test_a_full_disk_leaves_the_records_as_they_are(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit on the size of files stands for a disk that is full before the sorted copy is complete."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    copy_in_order = nanoflow.sorting.copy_in_order

    def on_a_full_disk(*arguments: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
        try:
            copy_in_order(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(nanoflow.sorting, "PIECE", 1000)
    monkeypatch.setattr("nanoflow.writer.copy_in_order", on_a_full_disk)
    monkeypatch.setattr("nanoflow.writer._PIECE", 512)  # else all of it waits in the buffer until the limit is gone
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        result = job.run()
    finally:
        signal.signal(signal.SIGXFSZ, ignored)
    assert result.exit_code == 2
    assert f"output.sort: cannot sort {job.output}: File too large; all its records are there" in result.stderr
    assert sorted(job.ids()) == ORDERED != job.ids()
    assert not list(job.folder.glob("*.new"))
    monkeypatch.undo()
    monkeypatch.setattr("nanoflow.runner.measure_ceilings", lambda *arguments: Ceilings(1e9, 1e9))
    assert "nothing left to do" in job.run().stdout
    assert job.ids() == ORDERED


KILLS = {
    "while lines are found": "import nanoflow.ledger as l; place = l.Ledger.place; seen = []; l.Ledger.place = "
    "lambda *a: (seen.append(1), die() if len(seen) == 9 else None, place(*a))[2]",
    "while lines are copied": "import nanoflow.sorting as s; s.PIECE = 900; read = s._read; seen = []; s._read = "
    "lambda *a: (seen.append(1), die() if len(seen) == 9 else None, read(*a))[2]",
    "before the new file takes its place": "r = os.rename; os.rename = lambda a, b: die() if str(a).endswith"
    "('o.jsonl.new') else r(a, b)",
    "after it has": "r = os.rename; os.rename = lambda a, b: (r(a, b), die() if str(a).endswith('o.jsonl.new') "
    "else None)",
}


@pytest.mark.parametrize("when", KILLS)
def test_a_kill_during_the_sort_loses_nothing(job: Job, server: ForkServer, when: str) -> None:
    die = "import os, signal; die = lambda: os.kill(os.getpid(), signal.SIGKILL); "
    run = server.start(job.folder, "run", job.save(), before=die + KILLS[when])
    assert run.wait() == -signal.SIGKILL, run.stderr
    assert sorted(job.ids()) == ORDERED
    assert (job.ids() == ORDERED) == (when == "after it has")
    again = server.start(job.folder, "run", job.save())
    assert again.wait() == 1, again.stderr
    assert "nothing left to do" in again.stdout
    assert job.ids() == ORDERED and not list(job.folder.glob("*.new"))


def test_a_stopped_run_is_not_sorted_and_goes_on(job: Job, server: ForkServer) -> None:
    run = server.start(job.folder, "run", job.save(), before=SLOW.format(0.03))
    wait_for_lines(job.output, 9)
    run.kill(signal.SIGTERM)
    assert run.wait() == 143, run.stderr
    ids = job.ids()
    assert 9 <= len(ids) < len(LINES) and ids != sorted(ids)
    kept = job.records()
    again = server.start(job.folder, "run", job.save())
    assert again.wait() == 1, again.stderr
    assert job.ids() == ORDERED
    assert all(record in job.records() for record in kept)


@pytest.mark.parametrize("seed", range(5))
def test_any_lines_in_pieces_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    rng = random.Random(seed)
    lines = [(rng.randrange(50), "x" * rng.choice([0, 3, 50, 900])) for _ in range(rng.randrange(2, 200))]
    lines[-1] = (-1, "so that they are not in order")
    (tmp_path / "o").write_text("".join(f"{place} {text}{number}\n" for number, (place, text) in enumerate(lines)))
    expected = sorted((tmp_path / "o").read_text().splitlines(), key=lambda line: int(line.split()[0]))
    monkeypatch.setattr(nanoflow.sorting, "PIECE", rng.choice([1, 100, 1000, 10**6]))
    with OutputWriter(tmp_path / "o") as writer:
        order = writer.line_order(lambda line: int(line.split()[0]))
        assert order is not None
        writer.reorder(order)
        assert (tmp_path / "o").read_text().splitlines() == expected
        with pytest.raises(OutputError, match="another run is writing"):  # the new file is locked like the old one
            OutputWriter(tmp_path / "o")
        writer.write({"later": 1})
    assert (tmp_path / "o").read_text().splitlines() == [*expected, '{"later":1}']


@pytest.mark.parametrize(("count", "length"), [(100_000, 300), (15_000, 3000)])
def test_many_records_in_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, length: int
) -> None:
    """40 MB of records, every tenth of them an error; the smaller number is traced, which slows it down."""
    monkeypatch.setattr(nanoflow.sorting, "PIECE", 2**20)
    places = list(range(1, count + 1))
    random.Random(0).shuffle(places)
    ledger, params = Ledger(), SamplingParams()
    for line in range(1, count + 1):
        ledger.take(ParsedRequest(line, f"r{line}", "completion", params))
    text = "y" * length
    with (tmp_path / "o.jsonl").open("wb") as file:
        for line in places:
            if line % 10 == 0:
                record: dict[str, Any] = error_line(ErrorRecord(line, f"r{line}", "invalid_request", "m"))
            else:
                record = {"id": f"batch_req_{line}", "custom_id": f"r{line}", "response": {"text": text}, "error": None}
            file.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
    with OutputWriter(tmp_path / "o.jsonl") as writer:
        if count < 20_000:
            tracemalloc.start()
        order = writer.line_order(ledger.place)
        assert order is not None
        writer.reorder(order)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 48 * count + 5 * 2**20, f"{peak:,} bytes"
    with (tmp_path / "o.jsonl").open("rb") as file:
        found = [int(line[: line.index(b'"', 17)].rpartition(b"_")[2]) for line in file]
    assert found == list(range(1, count + 1))
    assert os.listdir(tmp_path) == ["o.jsonl"]
