"""`nanoflow bench`: what it measures, saves and refuses, and where the steady state of a run is."""

import json
import os
import signal
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from nanoflow import bench as module
from nanoflow.bench import Bench, bench, parse_warm_up
from nanoflow.bench_report import Spread
from nanoflow.cli import app
from nanoflow.config import RunConfig, load_config
from nanoflow.engine import EngineStats
from nanoflow.errors import ConfigError, OutputError
from nanoflow.ops.operation import Cost
from nanoflow.pipeline.reference_executor import ReferenceExecutor
from nanoflow.power import EnergyMeter
from nanoflow.recording import IterationRecord
from nanoflow.search.cost_model import Ceilings
from nanoflow.serving import Serving
from nanoflow.steady_state import LEAST_ITERATIONS, EngineLog, Stretch, steady_state
from tests.unit.tiny_model import save_tiny_llama

cli = CliRunner()
REQUESTS, IN, OUT = 24, 20, 24


@pytest.fixture(scope="module", autouse=True)
def quick_ceilings() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "measure_ceilings", lambda *arguments: Ceilings(1e9, 2e9))
        yield


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two dozen requests with memory for a third of them at a time."""
    folder = tmp_path_factory.mktemp("bench")
    config = {
        "model": {"path": str(save_tiny_llama(folder / "model"))},
        "workload": {"synthetic": {"input_len": IN, "output_len": OUT, "requests": REQUESTS}},
        "engine": {"device": "cpu", "kv_memory": "160KiB", "page_size": 4, "max_batch_tokens": 64},
        "output": {"path": str(folder / "out" / "x.jsonl")},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(config))
    return folder / "job.yaml"


@pytest.fixture
def config(job: Path, tmp_path: Path) -> RunConfig:
    return load_config(job, [f"output.path={tmp_path / 'x.jsonl'}"])


def test_a_bench_repeats_the_whole_workload_and_saves_what_it_measured(config: RunConfig, tmp_path: Path) -> None:
    outcome = bench(config, repetitions=3, warm_up=2, quiet=True)
    report = outcome.report
    assert report is not None and outcome.signal is None
    assert outcome.path == tmp_path / "x.bench.json" and os.listdir(tmp_path) == ["x.bench.json"], "and nothing else"
    assert (report.requests, report.errors) == (REQUESTS, 0) and report.warm_up.requests == 2
    assert (report.input_tokens, report.output_tokens) == (REQUESTS * IN, REQUESTS * OUT)
    saved = json.loads(outcome.path.read_text())
    assert saved["repetitions_asked"] == len(saved["repetitions"]) == 3
    assert saved["hardware"]["cores"] and saved["versions"]["torch"] and saved["config"]["engine"]["page_size"] == 4
    each = [one["report"]["total_tokens_per_second"] for one in saved["repetitions"]]
    total = saved["figures"]["total_tokens_per_second"]
    assert total["each"] == each and total["median"] == statistics.median(each)
    assert all(
        one["report"]["seconds"] * rate == pytest.approx(REQUESTS * (IN + OUT))
        for one, rate in zip(saved["repetitions"], each, strict=True)
    )
    # Each repetition begins anew: the same iterations, one after the other.
    iterations = [one["whole"]["iterations"] for one in saved["repetitions"]]
    assert len(set(iterations)) == 1 and iterations[0] == saved["repetitions"][0]["report"]["iterations"]
    for one in saved["repetitions"]:
        whole, steady = one["whole"], one["steady"]
        # Of an output's tokens, the last is no row; a preempted request's rows come again.
        assert whole["rows"] >= REQUESTS * (IN + OUT - 1) and whole["output_tokens"] == REQUESTS * OUT
        assert steady["first_iteration"] > 0 and LEAST_ITERATIONS <= steady["iterations"] < whole["iterations"]
        assert steady["rows"] < whole["rows"] and steady["flops"] < whole["flops"]
        assert sum(part["rows"] for part in one["course"]) == whole["rows"] and len(one["course"]) > 1
        assert one["report"]["bound_seconds"]["compute"] == pytest.approx(whole["flops"] / 1e9)
    assert saved["figures"]["reached_compute"]["median"] > 0 and saved["steady_figures"]["iteration_ms"]["median"] > 0


def test_figures_are_over_the_time_that_they_are_said_to_be() -> None:
    stretch = Stretch(
        first_iteration=4,
        iterations=10,
        seconds=4.0,
        busy_seconds=2.0,
        host_seconds=0.02,
        idle_seconds=0.5,
        rows=800,
        padding_rows=200,
        output_tokens=400,
        flops=6e12,
        bytes=8e9,
        wire_bytes=0.0,
        joules=1000.0,
    )
    assert stretch.figures == {
        "host_ms": 2.0,
        "iterations": 10,
        "seconds": 4.0,
        "total_tokens_per_second": 200.0,
        "output_tokens_per_second": 100.0,
        "iteration_ms": 400.0,
        "mean_rows": 80.0,
        "padding_share": 0.2,
        "executor_busy_share": 0.5,
        "device_idle_share": 0.2,
        "tflops": 3.0,
        "gbytes_per_second": 4.0,
        "watts": 250.0,
        "joules_per_token": 1.25,
    }
    ceilings = Ceilings(flops=3e12, bytes_per_second=8e9, power_limit_watts=500.0)
    assert stretch.reached(ceilings) == {"compute": 0.5, "memory": 0.25, "power": 0.5}
    unmeasured = replace(stretch, joules=None, idle_seconds=0.0).figures
    assert [unmeasured[name] for name in ("watts", "joules_per_token", "device_idle_share")] == [None] * 3


def found(kv: list[int], waiting: list[int], full: list[int] | None = None) -> tuple[int, int] | None:
    return steady_state(np.array(kv), np.array(waiting), np.array(full or [0] * len(kv)))


def test_the_steady_state_is_from_full_use_to_the_last_admission() -> None:
    n = LEAST_ITERATIONS
    ramp, plateau, tail = [100, 500, 900, 969], [971, 1000] * n, [990, 600, 100]
    waiting = [5] * (len(ramp) + len(plateau)) + [0] * len(tail)
    assert found(ramp + plateau + tail, waiting) == (4, 4 + 2 * n)
    # What is used after the last admission does not count as full use.
    assert found([100, *[980] * n, 2000], [1] * (n + 1) + [0]) == (1, n + 1)
    # All slots taken, long before the pages are.
    assert found(list(range(1, n + 5)), [1] * (n + 4), [0, 0, *[1] * (n + 2)]) == (2, n + 4)


def test_a_run_whose_requests_all_run_at_once_has_no_steady_state() -> None:
    assert found([10, 20, 30], [0, 0, 0]) is None
    assert found([100] * LEAST_ITERATIONS, [1] * (LEAST_ITERATIONS - 1) + [0]) is None
    assert found([], []) is None


def test_the_log_cuts_totals_and_energy_at_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = SimpleNamespace(stats=EngineStats(), scheduler=SimpleNamespace(max_running=100))
    clock = 50.0
    meter: Any = SimpleNamespace(joules=lambda: 1e6 + 300 * clock)  # 300 W
    log = EngineLog(engine, meter, started=clock)
    for iteration in range(40):
        clock += 0.25
        engine.stats.busy_seconds += 0.2
        engine.stats.idle_seconds += 0.05
        engine.stats.rows += 10 + iteration
        engine.stats.cost += Cost(flops=1e9, bytes=2e9)
        log.observe(
            IterationRecord(
                clock, 0.2, 8, 2, 0, 8, int(iteration < 30), 50 + 10 * min(iteration, 5), 100, 0, output_tokens=8
            )
        )
    monkeypatch.setattr("nanoflow.steady_state.time.perf_counter", lambda: clock)
    whole, steady = log.whole(), log.steady()
    assert steady is not None
    assert (steady.first_iteration, steady.iterations) == (5, 25)
    assert steady.rows == sum(10 + i for i in range(5, 30)) and steady.output_tokens == 200
    assert steady.seconds == pytest.approx(6.25) and steady.busy_seconds == pytest.approx(5.0)
    assert steady.figures["device_idle_share"] == pytest.approx(0.2)
    assert (steady.flops, steady.bytes) == (pytest.approx(25e9), pytest.approx(50e9))
    assert steady.figures["watts"] == whole.figures["watts"] == pytest.approx(300.0)
    assert whole.iterations == 40 and whole.joules == pytest.approx(3000.0)


def test_a_spread_is_of_all_repetitions() -> None:
    assert Spread.of([4.0, 10.0, 5.0]) == Spread(5.0, 1.2, [4.0, 10.0, 5.0])
    assert Spread.of([0.0, 0.0]).spread == 0.0


def test_a_device_that_tells_is_reported_with_idle_time_and_energy(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect = ReferenceExecutor.collect
    monkeypatch.setattr(ReferenceExecutor, "collect", lambda self: replace(collect(self), idle_seconds=0.001))
    counter = iter(range(10**6))
    monkeypatch.setattr(EnergyMeter, "joules", lambda self: float(next(counter)))
    monkeypatch.setattr(EnergyMeter, "power_limit_watts", lambda self: 700.0)
    report = bench(config, repetitions=1, warm_up=0, quiet=True).report
    assert report is not None
    for figures in (report.figures, report.steady_figures):
        assert 0 < figures["device_idle_share"].median < 1
        assert figures["watts"].median > 0 and figures["joules_per_token"].median > 0
        assert figures["reached_power"].median == pytest.approx(figures["watts"].median / 700, rel=0.5)


def test_fewer_requests_and_a_share_as_warm_up(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int | None] = []
    repeat = Bench.repeat

    def listen(self: Bench, config: RunConfig, requests: int | None = None) -> Any:
        asked.append(requests)
        return repeat(self, config, requests)

    monkeypatch.setattr(Bench, "repeat", listen)
    report = bench(config, repetitions=1, warm_up=0.15, requests=10, quiet=True).report
    assert report is not None and report.requests == 10 and report.warm_up.requests == 2
    assert asked == [2, 10]


@pytest.mark.parametrize(
    ("text", "value"), [("0", 0), ("64", 64), ("10%", 0.1), ("0.25", 0.25), ("100%", 1.0), ("1.0", 1.0)]
)
def test_a_warm_up_is_a_number_or_a_share(text: str, value: float) -> None:
    parsed = parse_warm_up(text)
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize("text", ["", "%", "-1", "1.5", "120%", "nan", "ten", "inf%"])
def test_any_other_warm_up_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--warm-up: .* is neither a number of requests"):
        parse_warm_up(text)


@pytest.fixture
def ctrl_c() -> Any:
    """SIGINT as a terminal's program has it: what runs in the background of a shell may have inherited to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_a_signal_ends_the_bench_and_keeps_what_was_repeated(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    answered, last = 0, REQUESTS // 2
    answer = Serving._answer

    def counted(self: Serving, output: Any) -> None:
        nonlocal answered
        answered += 1
        if answered == last:
            os.kill(os.getpid(), signal.SIGINT)
        answer(self, output)

    monkeypatch.setattr(Serving, "_answer", counted)
    arguments = ["bench", str(job), "--repetitions", "4", "--warm-up", "0", "--out", str(tmp_path / "b.json")]
    done = cli.invoke(app, arguments)
    assert done.exit_code == 130 and "nothing was saved" in done.output and not (tmp_path / "b.json").exists()
    answered, last = 0, 2 * REQUESTS + REQUESTS // 2
    done = cli.invoke(app, arguments)
    assert done.exit_code == 130
    assert "this repetition does not count" in capfd.readouterr().err
    assert "stopped after 2 of 4 repetitions, which are saved" in done.output
    saved = json.loads((tmp_path / "b.json").read_text())
    assert len(saved["repetitions"]) == 2 and saved["repetitions_asked"] == 4


def test_the_command_prints_a_table_and_where_the_rest_is(job: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "b.json"
    done = cli.invoke(app, ["bench", str(job), "--repetitions", "2", "--out", str(out)], env={"COLUMNS": "140"})
    assert done.exit_code == 0, done.output
    for text in ("2 of 2 repetitions", "total tokens/s", "steady state", "of the memory bound", f"saved {out}"):
        assert text in done.output
    assert "repetition 2 of 2:" in done.output and len(json.loads(out.read_text())["repetitions"]) == 2
    quiet = cli.invoke(app, ["bench", str(job), "--repetitions", "1", "--out", str(out), "--quiet"])
    assert quiet.exit_code == 0 and quiet.output == ""


def test_what_cannot_be_repeated_or_saved_is_refused_before_the_model_is_opened(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "open_model", lambda *arguments: pytest.fail("too late"))
    synthetic = config.workload

    def read(path: str) -> RunConfig:
        return config.model_copy(
            update={"workload": synthetic.model_copy(update={"synthetic": None, "input": (path,)})}
        )

    os.mkfifo(tmp_path / "pipe")
    for path in ("-", str(tmp_path / "pipe")):
        with pytest.raises(ConfigError, match=f"workload.input: {path} can be read only once"):
            bench(read(path), quiet=True)
    with pytest.raises(ConfigError, match=r"--out: .*job.yaml is not for results"):
        bench(config, out=tmp_path / "job.yaml")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(OutputError, match=r"--out: cannot write .*folder.json: it is a folder"):
        bench(config, out=tmp_path / "folder.json")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"--out: cannot write .*/file/b.json: .*; choose another file"):
        bench(config, out=tmp_path / "file" / "b.json")


def test_error_records_are_counted_and_an_empty_workload_is_refused(config: RunConfig, tmp_path: Path) -> None:
    lines = [{"custom_id": "a", "prompt": [5, 6, 7], "max_tokens": 4}, {"custom_id": "b", "prompt": []}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    workload = config.workload.model_copy(update={"synthetic": None, "input": (str(tmp_path / "in.jsonl"),)})
    report = bench(config.model_copy(update={"workload": workload}), repetitions=1, quiet=True).report
    assert report is not None and (report.requests, report.errors) == (2, 1)
    assert report.notes()[-1].startswith("1 of the requests are error records")
    assert not report.steady_figures and "no steady state" in report.notes()[-2]
    (tmp_path / "in.jsonl").write_text("\n")
    empty = cli.invoke(app, ["bench", "synthetic", "--set", f"workload={{input: {tmp_path / 'in.jsonl'}}}"])
    assert empty.exit_code == 2 and "error: workload: it has no request" in empty.output
