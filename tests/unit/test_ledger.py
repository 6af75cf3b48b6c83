"""The ledger: one record a line, whatever is there already; and the output mended, however it was damaged."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from nanoflow.batch_file import ErrorRecord, parse_line
from nanoflow.batch_output import error_line
from nanoflow.errors import OutputError
from nanoflow.input_files import Source
from nanoflow.ledger import DUPLICATE, KeyTable, Ledger
from nanoflow.resume import read_output
from nanoflow.sampling_params import SamplingParams
from nanoflow.writer import OutputWriter

INPUT = ['{"custom_id": "a", "prompt": "1"}', "oops", '{"custom_id": "é", "prompt": "2"}', '{"custom_id": "a"}', "{}"]


def items(source: Source | None = None) -> list[Any]:
    return [parse_line(line, number, SamplingParams(), source) for number, line in enumerate(INPUT, start=1)]


def left(ledger: Ledger) -> list[Any]:
    return [item for made in items() if (item := ledger.take(made)) is not None]


def answer(line: int, custom_id: str) -> dict[str, Any]:
    body = {"choices": [{"text": "\u2028 \n é"}]}
    return {"id": f"batch_req_{line}", "custom_id": custom_id, "response": {"body": body}, "error": None}


def records() -> list[dict[str, Any]]:
    """What a run writes for `INPUT`, in the order in which it might."""
    made = {
        item.line: error_line(item) if isinstance(item, ErrorRecord) else answer(item.line, item.custom_id)
        for item in left(Ledger())
    }
    return [made[line] for line in (2, 4, 3, 5, 1)]


def write(path: Path, *lines: dict[str, Any]) -> bytes:
    path.write_bytes(b"")
    with OutputWriter(path) as writer:
        for line in lines:
            writer.write(line)
    return path.read_bytes()


def go_on(path: Path, **options: bool) -> tuple[Ledger, list[int]]:
    """The ledger of an output, and the lines of `INPUT` that are left to do."""
    with OutputWriter(path) as writer:
        ledger = read_output(writer, **options)
        return ledger, [item.line for item in left(ledger)]


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 2500), st.integers(1, 2**62)), max_size=4000))
def test_the_table_is_a_map(entries: list[tuple[int, int]]) -> None:
    """Keys that begin alike share slots."""
    table, plain = KeyTable(), {}
    for key, number in entries:
        raw = (key % 7).to_bytes(8, "little") + key.to_bytes(8, "little")
        assert table.get(raw) == plain.get(raw, 0)
        table.set(raw, number)
        plain[raw] = number
    assert len(table) == len(plain)
    assert all(table.get(key) == number for key, number in plain.items())


def test_a_second_custom_id_is_an_error_of_its_line() -> None:
    found = left(Ledger())
    assert [(type(item).__name__, item.line, item.custom_id) for item in found] == [
        ("ParsedRequest", 1, "a"),
        ("ErrorRecord", 2, None),
        ("ParsedRequest", 3, "é"),
        ("ErrorRecord", 4, "a"),
        ("ErrorRecord", 5, None),
    ]
    assert found[3].code == DUPLICATE and "custom_id 'a' is that of line 1;" in found[3].message


def test_a_second_custom_id_in_another_file_names_both_places() -> None:
    ledger = Ledger()
    for item in items(Source("one.jsonl", 0)):
        ledger.take(item)
    for item in items(Source("two.jsonl", 5)):
        assert item.source is not None
    again = parse_line(INPUT[2], 8, SamplingParams(), Source("two.jsonl", 5))
    duplicate = ledger.take(again)
    assert isinstance(duplicate, ErrorRecord)
    assert duplicate.message.startswith("two.jsonl: line 3: custom_id 'é' is that of one.jsonl: line 3;")


@pytest.mark.parametrize("done", range(6))
def test_what_has_a_record_is_left_out_bad_lines_and_duplicates_too(tmp_path: Path, done: int) -> None:
    write(tmp_path / "o", *records()[:done])
    ledger, todo = go_on(tmp_path / "o")
    assert ledger.records == done and ledger.skipped == done
    assert sorted(todo) == sorted([2, 4, 3, 5, 1][done:])


def test_a_torn_last_record_is_cut_at_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "o"
    whole = write(path, *records()[:3])
    all_but_one = write(path, *records()[:2])
    for length in range(len(all_but_one), len(whole)):
        path.write_bytes(whole[:length])
        _, todo = go_on(path)
        assert path.read_bytes() == all_but_one
        assert todo == [1, 3, 5]
    path.write_bytes(whole)
    assert go_on(path)[1] == [1, 5]
    assert path.read_bytes() == whole


DAMAGE: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "zeros at the end": lambda lines: [*lines[:3], b"\0" * 5000],
    "a line of zeros at the end": lambda lines: [*lines[:3], b"\0" * 5000 + b"\n"],
    "zeros in the middle": lambda lines: [lines[0], b"\0" * len(lines[1]) + b"\n", *lines[1:3]],
    "two lines run together": lambda lines: [lines[0], lines[3][:-9] + lines[4], *lines[1:3]],
    "a line twice": lambda lines: [*lines[:3], lines[0]],
    "JSON that is no record": lambda lines: [b"{}\n", b"[1]\n", b'"x"\n', b"1e999\n", *lines[:3]],
    "a record of nothing": lambda lines: [
        *lines[:3],
        b'{"id":"batch_req_1","custom_id":"a","response":null,"error":null}\n',
    ],
    "an id of another kind": lambda lines: [lines[0].replace(b"batch_req_", b"x"), *lines[:3]],
    "deep brackets": lambda lines: [b"[" * 200_000 + b"\n", *lines[:3]],
    "empty lines": lambda lines: [b"\n", lines[0], b"\n", *lines[1:3], b"\n"],
    "no UTF-8": lambda lines: [b"\xff\xfe\n", *lines[:3]],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_output_is_mended_and_what_was_lost_is_left_to_do(tmp_path: Path, name: str) -> None:
    path = tmp_path / "o"
    lines = write(path, *records()).splitlines(keepends=True)
    # U+2028 is within a record and ends no line.
    assert len(lines) == 5
    path.write_bytes(b"".join(DAMAGE[name](lines)))
    path.chmod(0o640)
    ledger, todo = go_on(path)
    assert path.read_bytes() == b"".join(lines[:3])
    assert (ledger.records, todo) == (3, [1, 5])
    assert "going on: 3 requests have their record (2 of them errors)" in ledger.summary()
    assert path.stat().st_mode & 0o777 == 0o640
    assert [file.name for file in tmp_path.iterdir()] == ["o"]


@settings(max_examples=60)
@given(data=st.data())
def test_any_damage_leaves_whole_records_and_the_rest_to_do(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("any") / "o"
    raw = bytearray(write(path, *records()))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(raw)))
        end = data.draw(st.integers(start, min(len(raw), start + 300)))
        raw[start:end] = data.draw(st.binary(max_size=20) | st.just(bytes(raw[start:end])) | st.just(b"\n"))
    path.write_bytes(raw)
    ledger, todo = go_on(path)
    kept = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert len(kept) == ledger.records
    assert ledger.skipped + len(todo) == len(INPUT)
    assert go_on(path)[1] == todo


def test_error_records_are_dropped_to_be_run_again(tmp_path: Path) -> None:
    path = tmp_path / "o"
    write(path, *records())
    ledger, todo = go_on(path, retry_errors=True)
    assert (ledger.completed, ledger.errors, todo) == (2, 0, [2, 4, 5])
    assert ledger.summary() == "going on: 2 requests have their record; 3 lines were taken out, to be run again"
    assert [json.loads(line)["custom_id"] for line in path.read_bytes().splitlines()] == ["é", "a"]


def test_a_file_being_mended_is_locked_under_its_new_name_too(tmp_path: Path) -> None:
    path = tmp_path / "o"
    write(path, *records())
    (tmp_path / "link").symlink_to("o")
    with OutputWriter(tmp_path / "link") as writer:
        read_output(writer, retry_errors=True)
        assert (tmp_path / "link").is_symlink()
        with pytest.raises(OutputError, match="another run is writing"):
            OutputWriter(path)
        writer.write(answer(2, "b"))
    assert len(path.read_bytes().splitlines()) == 3


def test_an_output_that_cannot_be_mended_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "o"
    before = write(path, *records())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with OutputWriter(path) as writer:
        monkeypatch.setattr("nanoflow.writer.os.rename", full)
        with pytest.raises(OutputError, match=r"cannot go on with .*No space left on device"):
            read_output(writer, retry_errors=True)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["o"]
