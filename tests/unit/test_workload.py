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
    with pytest.raises(InputError, match=r"none\.jsonl: no such file"):
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
        ("", "no column known to hold tokens of the prompt (it has: none); name it: workload.trace.columns.input"),
        ("ContextTokens,Other\n1,2\n", "tokens of the output (it has: ContextTokens, Other); name it: workload.trace"),
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


@pytest.mark.parametrize(
    "header",
    ["ContextTokens,GeneratedTokens", "Request tokens,Response tokens", "num_prefill_tokens,num_decode_tokens"],
)
def test_known_columns_are_found_by_themselves(tmp_path: Path, header: str) -> None:
    assert lengths(trace(tmp_path, f"Model,{header}\nx,3,4\n")) == [(3, 4)]


def test_columns_can_be_named(tmp_path: Path) -> None:
    text = "ContextTokens,in,GeneratedTokens\n1,2,3\n"
    assert lengths(trace(tmp_path, text, columns={"input": "in"})) == [(2, 3)]
    with pytest.raises(InputError, match=r"workload\.trace\.columns\.output: .* lacks the column out \(it has: Con"):
        requests(trace(tmp_path, text, columns={"output": "out"}))


def test_prune_leaves_out_and_the_caps_cut(tmp_path: Path) -> None:
    text = "ContextTokens,GeneratedTokens\n3,9\n9,3\n5,5\n40,5\n20,30\n6,6\n"
    prune = {"min_input": 4, "min_output": 4, "max_input": 30, "max_total": 40}
    assert lengths(trace(tmp_path, text, prune=prune)) == [(5, 5), (6, 6)]
    assert lengths(trace(tmp_path, text, prune=prune, first=1, max_input=2)) == [(2, 5)]
    with pytest.raises(InputError, match=r"no rows.*workload\.trace\.prune"):
        requests(trace(tmp_path, text, prune={"min_input": 99}))


def test_shuffle_takes_the_first_of_a_random_order(tmp_path: Path) -> None:
    text = "ContextTokens,GeneratedTokens\n" + "".join(f"{n},1\n" for n in range(1, 41))
    whole = lengths(trace(tmp_path, text, shuffle=True, seed=3))
    assert sorted(whole) == [(n, 1) for n in range(1, 41)] != whole
    assert lengths(trace(tmp_path, text, shuffle=True, seed=3, first=7)) == whole[:7]
    assert lengths(trace(tmp_path, text, shuffle=True, seed=4)) != whole


def arrivals(run: RunConfig) -> list[float]:
    made = requests(run)
    assert all(r.arrival is not None for r in made)
    return [r.arrival for r in made if r.arrival is not None]


def synthetic(count: int, arrival: Any) -> RunConfig:
    return config({"synthetic": {"input_len": 1, "output_len": 1, "requests": count}, "arrival": arrival})


@pytest.mark.parametrize("arrival", ["none", None])
def test_without_arrivals_all_requests_are_there_from_the_start(arrival: str | None) -> None:
    assert [r.arrival for r in requests(synthetic(3, arrival))] == [None] * 3


def test_constant_arrivals_have_equal_gaps() -> None:
    assert arrivals(synthetic(4, {"constant": 8})) == [0, 0.125, 0.25, 0.375]


@pytest.mark.parametrize(
    ("arrival", "variation"),
    [
        ({"poisson": 5.0}, 1.0),
        ({"gamma": {"rate": 5.0}}, 1.0),
        ({"gamma": {"rate": 5.0, "burstiness": 0.25}}, 2.0),
        ({"gamma": {"rate": 5.0, "burstiness": 16}}, 0.25),
    ],
)
def test_random_arrivals_have_the_rate_and_the_variation(arrival: dict[str, Any], variation: float) -> None:
    gaps = np.diff(arrivals(synthetic(9000, arrival)), prepend=0.0)
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(0.2, rel=0.06)
    assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.1)


def test_arrivals_depend_on_their_seed_alone() -> None:
    first = arrivals(synthetic(50, {"poisson": 3}))
    assert arrivals(synthetic(80, {"poisson": 3}))[:50] == first
    assert arrivals(synthetic(50, {"poisson": 3, "seed": 1})) != first
    assert arrivals(synthetic(50, {"poisson": 6})) == pytest.approx([time / 2 for time in first])


def test_a_line_that_is_no_request_takes_no_arrival(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"custom_id": "a", "prompt": "x"}\nbroken\n{"custom_id": "b", "prompt": "x"}\n')
    first, second, third = read_workload(config({"input": str(path), "arrival": {"constant": 2}}), VOCAB)
    assert isinstance(second, ErrorRecord)
    assert isinstance(first, ParsedRequest) and isinstance(third, ParsedRequest)
    assert (first.arrival, third.arrival) == (0, 0.5)


def test_a_trace_s_times_count_from_the_earliest_row_taken(tmp_path: Path) -> None:
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,1,1\n2023-11-16 18:15:51.6805900,2,1\n2023-11-16 18:15:48.1805900,3,1\n"
    )
    path = tmp_path / "trace.csv"
    path.write_text(text)
    run = config({"trace": {"path": str(path)}, "arrival": "trace"})
    assert arrivals(run) == pytest.approx([0, 1.5, 5])
    assert [inputs for inputs, _ in lengths(run)] == [1, 3, 2]
    fast = config({"trace": {"path": str(path), "prune": {"min_input": 2}}, "arrival": {"trace": {"speed": 10}}})
    assert arrivals(fast) == pytest.approx([0, 0.35])
    path.write_text("timestamp,ContextTokens,GeneratedTokens\n7.5,1,1\n8,2,1\n")
    assert arrivals(run) == [0, 0.5]


@pytest.mark.parametrize("time", ["XXX", "", "nan", "inf", "1e300"])
def test_a_wrong_time_is_named_and_only_if_it_is_asked_for(tmp_path: Path, time: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{time},1,1\n")
    assert lengths(config({"trace": {"path": str(path)}})) == [(1, 1)]
    with pytest.raises(InputError, match=r"line 2: TIMESTAMP: .* is neither seconds nor a date with a time"):
        arrivals(config({"trace": {"path": str(path)}, "arrival": "trace"}))


def test_the_presets_have_the_means_and_deviations_of_the_paper() -> None:
    for name, expected in {
        "splitwise": (1155, 1109, 211, 163),
        "lmsys": (102, 169, 222, 210),
        "sharegpt": (246, 547, 322, 244),
    }.items():
        spec = config({"synthetic": {"preset": name}}).workload.synthetic
        assert spec is not None
        drawn = [length.sample(np.random.default_rng(1), 400_000) for length in spec.lengths]
        found = [number for column in drawn for number in (column.mean(), column.std())]
        assert found == pytest.approx(expected, rel=0.05)
        assert min(column.min() for column in drawn) >= 1


def test_synthetic_lengths_are_cut_to_the_caps() -> None:
    made = lengths(config({"synthetic": {"preset": "sharegpt", "requests": 200, "max_input": 90, "max_output": 80}}))
    assert max(a for a, _ in made) == 90 and max(b for _, b in made) == 80
