"""Workloads: input files, traces of lengths, synthetic requests."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanoflow.batch_file import ErrorRecord, ParsedRequest
from nanoflow.config import RunConfig
from nanoflow.errors import InputError
from nanoflow.workload import read_workload

VOCAB = 50


def config(workload: dict[str, Any], **sampling: Any) -> RunConfig:
    return RunConfig.model_validate({"model": {"path": "m"}, "workload": workload, "sampling": sampling})


def requests(run: RunConfig) -> list[ParsedRequest]:
    made = [r for r in read_workload(run, VOCAB) if isinstance(r, ParsedRequest)]
    assert all(isinstance(r.prompt, np.ndarray) and r.prompt.dtype == np.int32 for r in made)
    return made


def lengths(run: RunConfig) -> list[tuple[int, int]]:
    return [(len(r.prompt), r.params.max_tokens) for r in requests(run) if r.prompt is not None]


def trace(tmp_path: Path, text: str | bytes, **keys: Any) -> RunConfig:
    path = tmp_path / "trace.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return config({"trace": {"path": str(path), **keys}})


def test_an_input_file_with_the_run_s_defaults(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"custom_id": "a", "prompt": "x", "top_k": 3}\nbroken\n')
    first, second = read_workload(config({"input": str(path)}, max_tokens=9), VOCAB)
    assert isinstance(first, ParsedRequest) and isinstance(second, ErrorRecord)
    assert (first.params.max_tokens, first.params.top_k) == (9, 3)


def test_a_missing_input_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.jsonl cannot be read: No such file"):
        list(read_workload(config({"input": str(tmp_path / "none.jsonl")}), VOCAB))


def test_synthetic_requests_have_the_lengths_asked_for_and_exactly_those() -> None:
    run = config(
        {"synthetic": {"input_len": 12, "output_len": {"uniform": [3, 5]}, "requests": 300, "seed": 4}},
        stop="x",
        temperature=0.7,
        n=2,
    )
    made = requests(run)
    assert len(made) == 300 and len({r.custom_id for r in made}) == 300
    assert {len(r.prompt) for r in made if r.prompt is not None} == {12}
    assert {r.params.max_tokens for r in made} == {3, 4, 5}
    assert all(r.params.ignore_eos and not r.params.stop and r.params.n == 2 for r in made)
    assert made[0].params.temperature == 0.7
    tokens = np.concatenate([r.prompt for r in made if isinstance(r.prompt, np.ndarray)])
    assert (tokens.min(), tokens.max()) == (0, VOCAB - 1)


def test_the_seed_gives_the_same_requests_again_and_another_seed_others() -> None:
    def tokens(seed: int, count: int) -> list[list[int]]:
        spec = {
            "input_len": 9,
            "output_len": {"lognormal": {"mean": 40, "sigma": 1.0}},
            "requests": count,
            "seed": seed,
        }
        return [[*r.prompt.tolist(), r.params.max_tokens] for r in requests(config({"synthetic": spec}))]  # type: ignore[union-attr]

    assert tokens(1, 20) == tokens(1, 20)
    assert tokens(1, 20) != tokens(2, 20)


def test_a_trace_is_cut_to_its_first_rows_and_its_caps(tmp_path: Path) -> None:
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n0,10,4\n1,5000,3\n2,7,2000\n3,0,0\n4,1,1\n"
    assert lengths(trace(tmp_path, text, max_input=300, max_output=100)) == [
        (10, 4),
        (300, 3),
        (7, 100),
        (1, 1),
        (1, 1),
    ]
    assert lengths(trace(tmp_path, text, first=2)) == [(10, 4), (5000, 3)]
    assert all(r.params.ignore_eos for r in requests(trace(tmp_path, text, first=2)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "lacks the column ContextTokens (it has: none)"),
        ("ContextTokens,Other\n1,2\n", "lacks the column GeneratedTokens (it has: ContextTokens, Other)"),
        ("ContextTokens,GeneratedTokens\n", "has no rows"),
        ("ContextTokens,GeneratedTokens\n1,2\n3,x\n", "line 3: GeneratedTokens: 'x' is not a number of tokens"),
        ("ContextTokens,GeneratedTokens\n-1,2\n", "line 2: ContextTokens: '-1'"),
        ("ContextTokens,GeneratedTokens\n1.5,2\n", "line 2: ContextTokens: '1.5'"),
        ("ContextTokens,GeneratedTokens\n1e400,2\n", "line 2: ContextTokens: '1e400'"),
        ("ContextTokens,GeneratedTokens\n7\n", "line 2: GeneratedTokens: ''"),
        (b"ContextTokens,GeneratedTokens\n\xff,1\n", "is not a CSV file"),
    ],
)
def test_a_wrong_trace_is_named_with_its_line(tmp_path: Path, text: str | bytes, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        requests(trace(tmp_path, text))
    assert expected in str(caught.value)
