"""The benchmark of collectives, tried on the CPU with gloo."""

import json
from pathlib import Path

import pytest

from benchmarks import collectives


def test_a_trial_without_gpus(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collectives, "ROUNDS", 2)
    out = tmp_path / "record.json"
    collectives.main(["--device", "cpu", "--mib", "1", "2", "--out", str(out)])
    record = json.loads(out.read_text())
    assert record["ranks"] == 2 and record["hardware"].startswith("CPU")
    assert set(record["alone"]) == {"1 MiB", "2 MiB"}
    assert set(record["alone"]["1 MiB"]) == {"nccl", "reference"}
    assert set(record["beside"]["8 rows"]) == {"products", "nccl, in sequence", "reference, in sequence"}
    kinds = {f"{kind} {form}" for kind in ("scatter", "gather", "columns") for form in ("nccl", "reference")}
    assert set(record["halves"]["2 MiB"]) == kinds
    assert {"copy_engine", "one_shot", "two_shot", "scatter push", "gather copy_engine", "columns push"} <= set(
        record["missing"]
    )
    assert all(row["milliseconds"] > 0 for ways in record["beside"].values() for row in ways.values())
    assert set(record["between"]["1 MiB"]) == {
        f"{kind} {form}" for kind in ("all_reduce", "apart", "fused") for form in ("nccl", "reference")
    }
    (told,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out: ")]
    assert ", two_shot, " in told and told.endswith(": ranks on a CPU have no memory in common")


def test_the_slowest_rank_counts() -> None:
    one = {"a": {"milliseconds": 1.0, "GB/s": 4.0}, "b": {"milliseconds": 3.0, "ratio": 1.0}}
    two = {"a": {"milliseconds": 2.0, "GB/s": 2.0}, "b": {"milliseconds": 1.0, "ratio": 3.0}}
    assert collectives.slowest([one, two]) == {"a": two["a"], "b": one["b"]}


@pytest.mark.parametrize("ranks", ["1", "99"])
def test_ranks_that_there_are_not(ranks: str) -> None:
    with pytest.raises(SystemExit, match=f"--ranks {ranks}: it takes two or more, and this machine has"):
        collectives.main(["--ranks", ranks])
