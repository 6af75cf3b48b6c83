"""The benchmark of whole runs, on a tiny model: what it runs, records, keeps, and says of targets."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import offline_throughput
from benchmarks.offline_throughput import GPU, RUNS, comparable, config_of, entry_of, main, workload_of
from nanoflow.bench import Bench
from nanoflow.bench_report import BenchReport, WarmUp, make_bench_report
from nanoflow.config import RunConfig
from nanoflow.search.cost_model import Ceilings

TINY = str(Path(__file__).parents[2] / "configs" / "models" / "tiny-llama")


@pytest.fixture(scope="module", autouse=True)
def quick() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanoflow.bench.measure_ceilings", lambda *arguments: Ceilings(1e9, 2e9))
        patch.setitem(offline_throughput.WARM_UP, "output_len", 2)
        yield


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "lengths.csv"
    path.write_text("ContextTokens,GeneratedTokens\n4000,2\n30,4\n20,9\n")
    return path


def run(out: Path, *arguments: str) -> int:
    return main(["--model", TINY, "--requests", "3", "--out", str(out), "--set", "engine.device=cpu", *arguments])


def test_runs_are_made_by_name_and_merged_into_the_record(
    tmp_path: Path, trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "record.json"
    assert run(out, "prefill", "--repetitions", "2") == 0
    first = json.loads(out.read_text())["runs"]
    assert list(first) == ["prefill"]
    prefill = first["prefill"]
    assert (prefill["input_tokens"], prefill["output_tokens"], prefill["requests"]) == (3 * 512, 3, 3)
    assert len(prefill["repetitions"]) == 2 and prefill["vllm"]["total_tokens_per_second"] == 39_000
    assert (prefill["target_met"], prefill["ratio_to_vllm"], prefill["first_requests_only"]) == (None, None, 3)
    assert prefill["config"]["model"] == {"path": "tiny-llama", "dtype": "auto", "weights": "random"}
    assert prefill["hardware"]["processor"] and prefill["versions"]["nanoflow"]
    assert run(out, "sharegpt-longest", "--sharegpt", str(trace)) == 0
    runs = json.loads(out.read_text())["runs"]
    assert list(runs) == ["sharegpt-longest", "prefill"] and runs["prefill"] == prefill
    longest = runs["sharegpt-longest"]
    assert longest["config"]["engine"]["order"] == "longest-first"
    assert (longest["input_tokens"], longest["output_tokens"]) == (3000 + 30 + 20, 2 + 4 + 9), "inputs are cut"
    assert str(tmp_path) not in out.read_text(), "a record names no folder of this machine"
    shown = capsys.readouterr().out
    assert "41,000 -" in shown and shown.rstrip().endswith(f"saved {out}")


def test_without_the_trace_its_runs_are_left_out_with_a_word(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[list[str]] = []

    def measure(names: list[str], arguments: Any) -> tuple[dict[str, Any], None]:
        made.append(names)
        return {}, None

    monkeypatch.setattr(offline_throughput, "measure", measure)
    assert run(tmp_path / "x.json") == 0
    assert made == [["512-512", "1024-512", "512-1024", "prefill"]]
    assert "left out: sharegpt, sharegpt-longest; name the trace with --sharegpt CSV" in capsys.readouterr().err
    for wrong in (["512"], ["prefill", "--requests", "0"]):
        with pytest.raises(SystemExit) as end:
            run(tmp_path / "x.json", *wrong)
        assert end.value.code == 2


def test_a_mistake_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "x.json", "prefill", "--set", "engine.max_runing=1") == 2
    assert "error:" in (shown := capsys.readouterr().err) and "max_running" in shown
    assert not (tmp_path / "x.json").exists()


def test_a_signal_keeps_the_repetitions_that_were_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    repeat = Bench.repeat

    def counted(self: Bench, config: RunConfig, requests: int | None = None) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:  # after the warm-up and one repetition
            os.kill(os.getpid(), signal.SIGTERM)
        return repeat(self, config, requests)

    monkeypatch.setattr(Bench, "repeat", counted)
    out = tmp_path / "x.json"
    assert run(out, "prefill", "--repetitions", "3") == 143
    entry = json.loads(out.read_text())["runs"]["prefill"]
    assert len(entry["repetitions"]) == 1 and entry["repetitions_asked"] == 3


def test_targets_hold_for_the_whole_run_of_the_model_on_the_gpu_that_they_are_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[BenchReport] = []

    def keep(*arguments: Any, **options: Any) -> BenchReport:
        kept.append(make_bench_report(*arguments, **options))
        return kept[-1]

    monkeypatch.setattr(offline_throughput, "make_bench_report", keep)
    assert run(tmp_path / "x.json", "prefill") == 0
    report = replace(kept[0], device=GPU, model="llama-3-8b", dtype="bfloat16", warm_up=WarmUp(1, 1.0))
    assert comparable(report, None)
    assert not comparable(report, 100) and not comparable(replace(report, device="NVIDIA H200"), None)
    assert not comparable(replace(report, model="tiny-llama"), None)
    rate = report.figures["total_tokens_per_second"]
    for median, met in ((RUNS["prefill"].target, True), (RUNS["prefill"].target - 1, False)):
        figures = report.figures | {"total_tokens_per_second": replace(rate, median=float(median))}
        config = json.loads(json.dumps(kept[0].config)) | {"output": {}, "report": {}, "metrics": {}}
        entry = entry_of("prefill", replace(report, figures=figures, config=config), None)
        assert entry["target_met"] is met and entry["ratio_to_vllm"] == pytest.approx(median / 39_000, abs=1e-4)


def test_every_run_has_the_configuration_that_it_is_known_by(trace: Path) -> None:
    arguments: Any = type("Arguments", (), {"model": Path(TINY), "overrides": ["engine.device=cpu"]})
    for name, run in RUNS.items():
        config = config_of(workload_of(run, trace), run.order, arguments)
        assert (config.engine.max_running, config.engine.max_batch_tokens) == (1024, 2048)
        assert config.sampling.temperature == 0 and config.model.weights == "random"
        workload = config.workload
        if name.startswith("sharegpt"):
            assert workload.trace is not None
            assert (workload.trace.first, workload.trace.max_input, workload.trace.max_output) == (2000, 3000, 1024)
        else:
            assert workload.synthetic is not None and run.synthetic is not None
            assert workload.synthetic.requests == run.synthetic["requests"]
