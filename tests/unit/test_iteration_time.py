"""The formula of an iteration's time against hand-made sums, and its parts against the whole."""

import json
import sys

import numpy as np
import pytest

from benchmarks import scheduler
from benchmarks.iteration_time import Iterations, IterationTime
from benchmarks.scheduler import BUCKETS, RUNS, predict, simulate


def one(rows: float, padded: float, context: float = 0, pairs: float = 0, sampled: float = 0) -> Iterations:
    return Iterations(*(np.array([value], float) for value in (rows, padded, context, pairs, sampled)))


def test_a_steady_iteration_of_512_in_512_out():
    work = one(1280, 1280, context=600 * 768, pairs=680 * 340, sampled=600)
    gemm, attention = 32 * 1280 * 0.64, 32 * 600 * 768 * 4096 / 2.95e6
    prefill, elementwise, head = 32 * 4 * 4096 * 680 * 340 / 350e6, 2.03 * 1280, 270 + 1.4 * 600
    expected = (gemm + attention + prefill + elementwise + head) * 1e-6
    assert IterationTime().seconds(work)[0] == pytest.approx(expected)
    assert expected == pytest.approx(0.0507, rel=0.01)


@pytest.mark.parametrize(
    ("rows", "padded", "padding", "small"),
    [
        (1281, 1408, 32 * 0.64 * 127 + 2.03 * 127, 0),
        (2060, 2060, 32 * 0.64 * 116, 0),  # beyond all buckets a tile is part empty
        (8, 8, 0, 32 * (436 / 2.9 - 0.64 * 8)),
        (9, 16, 2.03 * 7, 32 * (436 / 2.9 - 0.64 * 9)),
        (200, 256, 32 * (0.64 * 256 - 436 / 2.9) + 2.03 * 56, 32 * (436 / 2.9 - 0.64 * 200)),
    ],
)
def test_padding_and_small_batches(rows, padded, padding, small):
    model, work = IterationTime(), one(rows, padded)
    assert model.padding(work)[0] == pytest.approx(padding * 1e-6, abs=1e-12)
    assert model.small_batches(work)[0] == pytest.approx(small * 1e-6, abs=1e-12)


def test_the_parts_of_a_prediction_add_up():
    lengths = [(300, 100)] * 500
    series = simulate(lengths, kv_tokens=40_000, row_buckets=BUCKETS)
    predicted = predict(series, 500 * 400, IterationTime())
    beyond = predicted["seconds_beyond_ideal"]
    parts = [beyond["iterations"], *beyond["padding"].values(), *beyond["small batches"].values()]
    assert predicted["seconds"] == pytest.approx(predicted["ideal_seconds"] + sum(parts), abs=0.05)
    assert predicted["tokens_per_second"] == pytest.approx(500 * 400 / predicted["seconds"], rel=0.01)
    assert beyond["small batches"]["tail"] > 0 and predicted["ideal_tokens_per_second"] > predicted["tokens_per_second"]


@pytest.mark.parametrize(("name", "least"), [("512-512", 24_000), ("1024-512", 22_800), ("512-1024", 17_600)])
def test_what_the_scheduler_loses_of_the_ideal(name, least):
    """Steady batches end on a bucket; what is lost is the tail, in which few rows are left."""
    lengths = RUNS[name]
    series = simulate(lengths, row_buckets=BUCKETS)
    predicted = predict(series, sum(map(sum, lengths)), IterationTime())
    assert predicted["tokens_per_second"] > max(least, 0.96 * predicted["ideal_tokens_per_second"])
    assert predicted["padding_share"] < 0.04
    assert series.preemptions == 0
    padding = predicted["seconds_beyond_ideal"]["padding"]
    assert padding["ramp"] + padding["steady"] < 0.002 * predicted["seconds"] < padding["tail"]


def test_the_benchmark_saves_the_runs_that_it_was_asked_for(tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "record.json"
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "x,40,20\nx,5000,30\nx,60,2000\n" * 20)
    arguments = ["--run", "trace", "--trace", str(trace), "--repetitions", "0", "--output", str(out)]
    monkeypatch.setattr(sys, "argv", ["scheduler.py", *arguments])
    scheduler.main()
    record = json.loads(out.read_text())
    assert list(record["runs"]) == ["trace"] and record["iteration_time"]["gemm_row"] == 0.64e-6
    predicted = record["runs"]["trace"]["predicted"]
    tokens = 20 * (40 + 20 + 3000 + 30 + 60 + 1024)
    assert predicted["tokens_per_second"] * predicted["seconds"] == pytest.approx(tokens, rel=0.01)
    assert f"{predicted['tokens_per_second']:,} tokens/s" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["scheduler.py", "--run", "trace"])
    with pytest.raises(SystemExit):
        scheduler.main()
    assert "no run is called trace; there are 512-512" in capsys.readouterr().err
