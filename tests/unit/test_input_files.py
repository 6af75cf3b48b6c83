"""Reading input: the same lines from a file, many files, compressed ones and standard input, in bounded memory."""

import gzip
import os
import subprocess
import sys
from pathlib import Path
from threading import Event

import pytest
import zstandard

from nanoflow import input_files
from nanoflow.batch_file import ErrorRecord, read_requests
from nanoflow.errors import ConfigError, InputError
from nanoflow.input_files import InputFiles, file_identity, reads
from nanoflow.sampling_params import SamplingParams
from tests.unit.test_config import MINIMAL, load_config

LINES = [f'{{"custom_id": "{number}", "prompt": "{"x" * (number % 50)}"}}\n'.encode() for number in range(3000)]
DATA = b"".join(LINES)


def raw(*items: object) -> list[bytes | None]:
    return [line.raw for line in InputFiles([str(item) for item in items])]


def test_compressed_files_are_known_by_their_content(tmp_path: Path) -> None:
    """Several members or frames in one file are read through, and a name says nothing."""
    half = len(DATA) // 2
    parts = (DATA[:half], DATA[half:])
    (tmp_path / "plain").write_bytes(DATA)
    (tmp_path / "gzip.jsonl").write_bytes(b"".join(map(gzip.compress, parts)))
    (tmp_path / "zstd").write_bytes(b"".join(map(zstandard.compress, parts)))
    for name in ("plain", "gzip.jsonl", "zstd"):
        assert raw(tmp_path / name) == LINES


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress], ids=["gzip", "zstd"])
def test_a_compressed_file_that_was_cut_off_or_damaged_is_no_end_of_input(tmp_path: Path, compress: object) -> None:
    assert callable(compress)
    packed = bytearray(compress(DATA))
    path = tmp_path / "in.jsonl"
    path.write_bytes(packed[: len(packed) - 6])
    with pytest.raises(InputError, match=r"in\.jsonl is damaged after line \d+ \(.+\); compress it anew"):
        raw(path)
    packed[len(packed) // 2] ^= 0xFF
    path.write_bytes(packed)
    try:
        read = raw(path)
    except InputError as error:
        assert "is damaged after line" in str(error)
    else:  # zstd without a checksum cannot tell
        assert compress is zstandard.compress and read != LINES


def test_folders_globs_and_lists_keep_an_order_and_name_the_file_of_a_line(tmp_path: Path) -> None:
    for name, number in (("b.jsonl", 1), ("a.jsonl", 0), ("c.jsonl.gz", 2), ("notes.txt", 3), ("sub/d.ndjson", 4)):
        file = tmp_path / "in" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"\xef\xbb\xbf" + b"\n" * number + f"oops {name}".encode())
    packed = tmp_path / "in" / "c.jsonl.gz"
    packed.write_bytes(gzip.compress(packed.read_bytes()))
    found = list(read_requests(InputFiles([str(tmp_path / "in")]), SamplingParams()))
    assert all(isinstance(record, ErrorRecord) for record in found)
    assert [(record.line, record.where) for record in found] == [
        (1, "a.jsonl: line 1"),
        (3, "b.jsonl: line 2"),
        (6, "c.jsonl.gz: line 3"),
    ]
    assert isinstance(found[1], ErrorRecord) and found[1].message.startswith("b.jsonl: line 2: not JSON")
    several = InputFiles([str(tmp_path / "in" / "**" / "*.ndjson"), str(tmp_path / "in" / "a.jsonl")])
    places = [line.source.place(line.number) for line in several if line.source is not None]
    assert places[-1] == "a.jsonl: line 1" and places[0] == "sub/d.ndjson: line 1"
    alone = list(read_requests(InputFiles([str(tmp_path / "in" / "b.jsonl")]), SamplingParams()))
    assert alone[0].where == "line 2"


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["none.jsonl"], "none.jsonl: no such file or folder"),
        (["*.jsonl"], "no file matches"),
        (["."], "holds no file that ends in .jsonl"),
        (["-", "other"], "cannot stand beside other inputs"),
    ],
)
def test_an_input_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, items: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"workload\.input") as caught:
        raw(*items)
    assert message in str(caught.value)


def test_a_line_without_an_end_is_an_error_record_and_not_a_lack_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_files, "LONGEST_LINE", 100)
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"a" * 99 + b"\n" + b"b" * 1000 + b"\n" + b"c" * 100 + b"\nshort\n" + b"d" * 300)
    assert raw(path) == [b"a" * 99 + b"\n", None, None, b"short\n", None]
    records = list(read_requests(InputFiles([str(path)]), SamplingParams()))
    assert isinstance(records[1], ErrorRecord) and "line 2: longer than" in records[1].message


def test_standard_input(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(zstandard.compress(DATA))
    code = "from nanoflow.input_files import InputFiles; print(sum(len(line.raw) for line in InputFiles(['-'])))"
    with (tmp_path / "in").open("rb") as file:
        done = subprocess.run(
            [sys.executable, "-c", code], stdin=file, capture_output=True, text=True, cwd=Path(__file__).parents[2]
        )
    assert done.stdout == f"{len(DATA)}\n", done.stderr


def test_lines_are_counted_where_that_is_quick(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(DATA.removesuffix(b"\n"))
    (tmp_path / "b.jsonl").write_bytes(b"")
    assert InputFiles([str(tmp_path)]).count_lines(Event()) == 3000
    stop = Event()
    stop.set()
    assert InputFiles([str(tmp_path)]).count_lines(stop) is None
    (tmp_path / "b.jsonl").write_bytes(gzip.compress(DATA))
    assert InputFiles([str(tmp_path)]).count_lines(Event()) is None


def test_the_identity_of_a_large_file_changes_with_its_size_start_and_end(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(2**23)
    seen = {file_identity(path)}
    for place, text in ((0, b"x"), (2**23 - 1, b"x"), (2**23, b"x")):
        with path.open("r+b") as file:
            file.seek(place)
            file.write(text)
        assert file_identity(path) not in seen
        seen.add(file_identity(path))
    os.utime(path, (1, 1))
    assert file_identity(path) in seen


def test_the_configuration_resolves_inputs_and_keeps_the_output_out_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jobs" / "data").mkdir(parents=True)
    (tmp_path / "jobs" / "data" / "a.jsonl").touch()
    yaml = tmp_path / "jobs" / "run.yaml"
    yaml.write_text(MINIMAL)
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "jobs"

    def load(inputs: str, output: str = "o.jsonl") -> tuple[str, ...] | None:
        return load_config(yaml, [f"workload={{input: {inputs}}}", f"output.path={output}"]).workload.input

    assert load("data") == (str(base / "data"),)
    assert load("[data/a.jsonl, data/*.jsonl]") == (str(base / "data/a.jsonl"), str(base / "data/*.jsonl"))
    assert load("'-'") == ("-",)
    for inputs, output in (("data", "jobs/data/o.jsonl"), ("data/*.jsonl", "jobs/data/o.jsonl")):
        with pytest.raises(ConfigError, match="is an input of the run"):
            load(inputs, output)
    with pytest.raises(ConfigError, match=r"workload\.input: data/\*\.gz not found"):
        load("data/*.gz")
    assert not reads("-", Path("o.jsonl"))
