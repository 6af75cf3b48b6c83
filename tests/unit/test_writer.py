"""The output file: whole lines, nothing finished lost, nothing overwritten by accident."""

import json
import os
import resource
import signal
from pathlib import Path

import pytest

from nanoflow.errors import OutputError
from nanoflow.writer import OutputWriter


def lines(path: Path) -> list[object]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_line_is_in_the_file_when_write_returns(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "out.jsonl"
    with OutputWriter(path) as writer:
        for number in range(3):
            writer.write({"n": number, "text": "ünï\ncode \u2028"})
            raw = path.read_bytes()
            assert raw.count(b"\n") == number + 1 and raw.endswith(b"\n")
    assert [json.loads(line)["n"] for line in path.read_bytes().split(b"\n")[:-1]] == [0, 1, 2]


def test_half_a_surrogate_pair_is_written_as_json_can(tmp_path: Path) -> None:
    with OutputWriter(tmp_path / "o.jsonl") as writer:
        writer.write({"custom_id": "\ud800"})
    assert lines(tmp_path / "o.jsonl") == [{"custom_id": "\ud800"}]


def test_new_lines_follow_those_of_an_older_run(tmp_path: Path) -> None:
    path = tmp_path / "o.jsonl"
    path.write_text('{"old":1}\n')
    with OutputWriter(path) as writer:
        assert writer.size == 10
        writer.write({"new": 1})
    assert lines(path) == [{"old": 1}, {"new": 1}]


def test_restart_replaces_the_older_run_but_not_before_there_is_a_new_line(tmp_path: Path) -> None:
    path = tmp_path / "o.jsonl"
    path.write_text('{"old":1}\n')
    with pytest.raises(RuntimeError), OutputWriter(path, restart=True):
        raise RuntimeError("the model does not load")
    assert lines(path) == [{"old": 1}]
    with OutputWriter(path, restart=True) as writer:
        assert lines(path) == [{"old": 1}]
        writer.write({"new": 1})
        writer.write({"new": 2})
    assert lines(path) == [{"new": 1}, {"new": 2}]
    with OutputWriter(path, restart=True):
        pass
    assert path.read_bytes() == b""


def test_a_run_that_cannot_start_leaves_no_file_behind(tmp_path: Path) -> None:
    path = tmp_path / "o.jsonl"
    with pytest.raises(RuntimeError), OutputWriter(path):
        raise RuntimeError
    assert not path.exists()
    with pytest.raises(RuntimeError), OutputWriter(path) as writer:
        writer.write({"done": 1})
        raise RuntimeError
    assert lines(path) == [{"done": 1}]


def test_two_runs_do_not_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "o.jsonl"
    with OutputWriter(path) as writer:
        writer.write({"mine": 1})
        with pytest.raises(OutputError, match="another run is writing"):
            OutputWriter(path, restart=True)
    assert lines(path) == [{"mine": 1}]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"output\.path: cannot write .*/o\.jsonl: .*/file is a file, not a folder"):
        OutputWriter(tmp_path / "file" / "o.jsonl")
    with pytest.raises(OutputError, match="Is a directory"):
        OutputWriter(tmp_path, restart=True)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_named() -> None:
    writer = OutputWriter("/dev/full", restart=True)
    with pytest.raises(OutputError, match="/dev/full: No space left on device"):
        writer.write({"x": 1})
    writer.close()


def test_a_line_that_fits_only_in_part_is_taken_back(tmp_path: Path) -> None:
    """A limit on the file's size stands for a disk that fills up in the middle of a line."""
    path = tmp_path / "o.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    writer = OutputWriter(path)
    writer.write({"kept": "x" * 50})
    kept = path.read_bytes()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept) + 20, before[1]))
        with pytest.raises(OutputError, match="what was written before is kept"):
            writer.write({"lost": "y" * 50})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_bytes() == kept
    writer.write({"later": 1})
    writer.close()
    assert lines(path) == [{"kept": "x" * 50}, {"later": 1}]


def test_a_value_that_json_lacks_is_a_bug_and_writes_nothing(tmp_path: Path) -> None:
    with OutputWriter(tmp_path / "o.jsonl") as writer:
        with pytest.raises(ValueError, match="JSON compliant"):
            writer.write({"x": float("nan")})
        writer.write({"x": 1})
    assert lines(tmp_path / "o.jsonl") == [{"x": 1}]
