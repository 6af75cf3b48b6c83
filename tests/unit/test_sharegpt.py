"""ShareGPT's JSON as a workload: which message is the prompt, what is left out, streaming, damaged files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanoflow import sharegpt
from nanoflow.errors import InputError
from nanoflow.sharegpt import read_sharegpt
from nanoflow.tokenizer import Tokenizer
from nanoflow.workload_schema import TraceSection
from tests.unit.tiny_model import save_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One token a character, for the characters used here."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return Tokenizer.from_file(folder / "tokenizer.json")


def conversation(*messages: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"id": "x", "conversations": [{"from": who, "value": text} for who, text in messages], **more}


def read(path: Path, content: Any, tokenizer: Tokenizer | None, **keys: Any) -> list[tuple[str, int]]:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    spec = TraceSection.model_validate({"path": str(path), "prune": "none", **keys})
    assert spec.sharegpt
    made = list(read_sharegpt(spec, tokenizer))
    assert all(prompt.dtype == np.int32 for prompt, _ in made)
    return [(tokenizer.decode(prompt), length) for prompt, length in made] if tokenizer else []


def test_the_first_human_message_and_the_answer_after_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    content = [
        conversation(("human", "zy"), ("gpt", "xyz"), ("human", "z"), ("gpt", "z")),
        conversation(("system", "qq"), ("user", "zz"), ("chatgpt", "x"), model="m"),
        conversation(("gpt", "x"), ("human", "yy")),
        conversation(("human", "y"), ("human", "z"), ("gpt", "z")),
        conversation(("human", "y"), ("gpt", None)),
        conversation(("human", ""), ("gpt", "z")),
        conversation(("human", "z"), ("gpt", "")),
        conversation(),
        {"id": "no conversations"},
        {"conversations": [3, "x"]},
    ]
    assert read(tmp_path / "s.json", content, tokenizer) == [("zy", 3), ("zz", 1)]


def test_what_vllm_s_benchmarks_leave_out_is_left_out_unless_told_otherwise(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    lengths = [(3, 9), (9, 3), (4, 4), (1024, 5), (1025, 5), (1000, 1048), (1000, 1049)]
    content = [conversation(("human", "z" * a), ("gpt", "z" * b)) for a, b in lengths]
    path = tmp_path / "s.json"
    assert [(len(p), n) for p, n in read(path, content, tokenizer)] == lengths
    kept = [(4, 4), (1024, 5), (1000, 1048)]
    assert [(len(p), n) for p, n in read(path, content, tokenizer, prune="auto")] == kept
    cut = read(path, content, tokenizer, prune="auto", first=2, max_input=7, max_output=4)
    assert [(len(p), n) for p, n in cut] == [(4, 4), (7, 4)]


def test_a_shuffled_file_is_the_same_conversations_in_another_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    content = [conversation(("human", "z" * n), ("gpt", "y")) for n in range(1, 30)]
    path = tmp_path / "s.json"
    plain, mixed = (read(path, content, tokenizer, shuffle=shuffle) for shuffle in (False, True))
    assert sorted(mixed) == plain != mixed
    assert read(path, content, tokenizer, shuffle=True, first=5) == mixed[:5]


def test_half_a_surrogate_pair_does_not_end_the_run(tmp_path: Path, tokenizer: Tokenizer) -> None:
    content = [conversation(("human", "z\ud83d"), ("gpt", "\udc00"))]
    assert read(tmp_path / "s.json", content, tokenizer) == [("z?", 1)]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_any_size_of_pieces_gives_the_same(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(sharegpt, "CHUNK", chunk)
    content = [conversation(("human", '}{][,"\\' * n), ("gpt", "é" * n)) for n in range(1, 6)]
    expected = [('}{][,"\\' * n, 2 * n) for n in range(1, 6)]
    assert read(tmp_path / "s.json", content, tokenizer) == expected
    assert read(tmp_path / "s.json", "\ufeff \n" + json.dumps(content, indent=3) + "\n\n", tokenizer) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "character 1: [ is expected, not the end of the file"),
        ("{}", "character 1: [ is expected, not '{}'"),
        ("[", "character 2: a conversation must be an object, not ''"),
        ("[3]", "must be an object, not '3]'"),
        ('[{"a": 1}', "character 10: , is expected, not the end of the file"),
        ('[{"a": 1} {"a": 2}]', "character 11: , is expected"),
        ('[{"a": }]', "character 9: Expecting value"),
        ('[{"a": ' + "[" * 100_000, "recursion"),
        ("[]", "has no conversation with a prompt and an answer"),
        ('[{"conversations": []}]', "has no conversation with a prompt and an answer"),
    ],
)
def test_a_damaged_file_is_one_message(tmp_path: Path, tokenizer: Tokenizer, content: str, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path / "s.json", content, tokenizer)
    assert str(caught.value).startswith(f"workload.trace.path: {tmp_path}/s.json ") and expected in str(caught.value)


def test_bytes_that_are_no_text_a_missing_file_and_a_model_without_a_tokenizer(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = tmp_path / "s.json"
    path.write_bytes(b'[{"a": "\xff"}]')
    with pytest.raises(InputError, match=r"s\.json is not UTF-8 text"):
        list(read_sharegpt(TraceSection(path=str(path)), tokenizer))
    with pytest.raises(InputError, match=r"none\.json cannot be read: No such file"):
        list(read_sharegpt(TraceSection(path=str(tmp_path / "none.json")), tokenizer))
    with pytest.raises(InputError, match="without a tokenizer"):
        list(read_sharegpt(TraceSection(path=str(path)), None))


def test_only_what_is_wanted_is_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A file of any size is streamed: what comes after the conversations wanted is not even parsed."""
    good = json.dumps([conversation(("human", "zz"), ("gpt", "y"))] * 600)
    content = good[:-1] + ", " + " " * (2 * sharegpt.CHUNK) + "broken"
    assert len(read(tmp_path / "s.json", content, tokenizer, first=300)) == 300
    with pytest.raises(InputError, match="must be an object"):
        read(tmp_path / "s.json", content, tokenizer)
