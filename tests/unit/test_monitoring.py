"""What watches a run: the time series, the Prometheus endpoint, the energy meter; none of it can end a run."""

import json
import math
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from nanoflow.config_schema import EngineSection, ModelSection, RunConfig
from nanoflow.engine import Engine
from nanoflow.errors import ConfigError
from nanoflow.loading import Model, build_engine, open_model
from nanoflow.monitoring import Monitoring
from nanoflow.power import EnergyMeter
from nanoflow.recording import IterationRecord, Recorder
from nanoflow.runner import run
from nanoflow.sampling_params import SamplingParams
from nanoflow.series import SeriesWriter
from tests.unit.tiny_model import save_tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def parts(folder: Path) -> Iterator[tuple[Model, Engine]]:
    sizes = EngineSection(device="cpu", page_size=8, kv_memory="64KiB", max_batch_tokens=24, max_model_len=96)
    model = open_model(ModelSection(path=str(folder), dtype="float32"), sizes)
    engine = build_engine(model, sizes)
    yield model, engine
    engine.close()


def make_config(tmp_path: Path, **sections: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": "x"},
            "workload": {"synthetic": {"input_len": 4, "output_len": 4}},
            "output": {"path": str(tmp_path / "o.jsonl")},
            **sections,
        }
    )


def finish(engine: Engine, recorder: Recorder) -> None:
    for number in range(7):
        engine.submit([3 + number] * (5 + 3 * number), SamplingParams(max_tokens=40, temperature=1.0, seed=1))
    recorder.error()
    for output in engine.run():
        recorder.add(output)


def iteration(at: float, seconds: float, **changes: float) -> IterationRecord:
    values = dict.fromkeys(("prefill_rows", "padding_rows", "waiting", "preemptions"), 0)
    values |= {"kv_capacity": 100, "output_tokens": 5, "decode_rows": 10, "running": 4, "kv_pages": 50} | changes
    return IterationRecord(at, seconds, **values)  # type: ignore[arg-type]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_series_has_a_line_an_interval_and_loses_nothing(tmp_path: Path) -> None:
    recorder = Recorder(started=50.0)
    writer = SeriesWriter(tmp_path / "s.jsonl", recorder, width=1.0, kv_capacity=100)
    at = 50.0
    for step in np.random.default_rng(2).exponential(0.4, 200):
        at += step
        recorder.observe(iteration(at, step))
    writer.close()
    series = lines(tmp_path / "s.jsonl")
    end = at - 50
    assert len(series) == math.ceil(end)
    assert [line["elapsed"] for line in series[:-1]] == list(range(1, len(series)))
    assert series[-1]["elapsed"] == pytest.approx(end, abs=1e-5)
    assert all(line["seconds"] == pytest.approx(1) for line in series[:-1])
    assert sum(line["iterations"] for line in series) == pytest.approx(200, rel=1e-3)
    assert sum(line["output_tokens_per_second"] * line["seconds"] for line in series) == pytest.approx(1000, rel=1e-3)
    assert all(line["decode_rows"] == 10 and line["running"] == 4 and line["kv_used"] == 0.5 for line in series)
    assert len({tuple(line) for line in series}) == 1, "all lines have the same keys"


def test_the_series_goes_on_after_a_torn_line_and_starts_fresh_when_told(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(b'{"elapsed":1.0}\n{"elap')
    for fresh, before in ((False, ['{"elapsed":1.0}', '{"elap']), (True, [])):
        recorder = Recorder(started=0.0)
        writer = SeriesWriter(path, recorder, width=1.0, kv_capacity=100, fresh=fresh)
        recorder.observe(iteration(1.5, 1.5))
        writer.close()
        written = path.read_text().splitlines()
        assert written[: len(before)] == before
        assert [json.loads(line)["elapsed"] for line in written[len(before) :]] == [1.0, 1.5]


def test_a_clock_that_jumps_back_does_not_turn_the_series(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    writer = SeriesWriter(tmp_path / "s.jsonl", recorder, width=1.0, kv_capacity=100)
    monkeypatch.setattr(time, "time", lambda: 1.0)
    for second in range(1, 5):
        recorder.observe(iteration(recorder.started + second, 1.0))
    writer.close()
    times = [line["time"] for line in lines(tmp_path / "s.jsonl")]
    assert times == sorted(times) and times[0] > "2020"


def test_a_full_disk_ends_the_series_and_not_the_run(tmp_path: Path) -> None:
    recorder = Recorder(started=0.0)
    writer = SeriesWriter(Path("/dev/full"), recorder, width=1.0, kv_capacity=100)
    for second in range(1, 5):
        recorder.observe(iteration(second, 1.0))
    writer.close()
    assert writer.problem is not None and "No space left" in writer.problem
    assert SeriesWriter(tmp_path / "none" / "s", recorder, width=1.0, kv_capacity=1).problem is not None


class FakeMeter(EnergyMeter):
    """A card that draws 300 W until the fifth second and 100 W from then on; each look is a second later."""

    def __init__(self) -> None:
        self.looks = -1
        super().__init__(torch.device("cpu"))

    def joules(self) -> float:
        self.looks += 1
        return 1000.0 + 300 * min(self.looks, 5) + 100 * max(0, self.looks - 5)


def test_power_is_in_the_series_and_on_the_timeline(tmp_path: Path) -> None:
    recorder = Recorder(started=0.0)
    meter = FakeMeter()
    meter.looks = -1
    writer = SeriesWriter(tmp_path / "s.jsonl", recorder, width=1.0, kv_capacity=100, meter=meter)
    for second in range(1, 9):
        recorder.observe(iteration(second, 1.0))
    writer.close()
    assert [line["watts"] for line in lines(tmp_path / "s.jsonl")] == [300] * 5 + [100] * 3
    timeline = recorder.timeline.as_dict()
    assert sum(timeline["watts"]) * timeline["interval_seconds"] == pytest.approx(1800, rel=1e-3)


def test_without_nvml_there_is_no_energy(tmp_path: Path) -> None:
    meter = EnergyMeter(torch.device("cpu"))
    assert (meter.joules(), meter.power_limit_watts(), meter.since_start()) == (None, None, None)


class FakeNvml:
    """NVML's functions for a card that used 7 kJ and is held to 650 W; `broken` names one that fails."""

    def __init__(self, broken: str = "") -> None:
        for name in ("nvmlInit_v2", "nvmlDeviceGetHandleByUUID"):
            setattr(self, name, lambda *arguments, name=name: int(name == broken))
        self.nvmlDeviceGetTotalEnergyConsumption = self._tell("nvmlDeviceGetTotalEnergyConsumption", 7_000_000, broken)
        self.nvmlDeviceGetEnforcedPowerLimit = self._tell("nvmlDeviceGetEnforcedPowerLimit", 650_000, broken)

    @staticmethod
    def _tell(name: str, value: int, broken: str) -> Callable[[Any, Any], int]:
        def call(handle: Any, out: Any) -> int:
            out._obj.value = value
            return int(name == broken)

        return call


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        ("", (7000.0, 650.0)),
        ("nvmlInit_v2", (None, None)),
        ("nvmlDeviceGetHandleByUUID", (None, None)),
        ("nvmlDeviceGetTotalEnergyConsumption", (None, 650.0)),
        ("nvmlDeviceGetEnforcedPowerLimit", (7000.0, None)),
    ],
)
def test_energy_comes_from_nvml(monkeypatch: pytest.MonkeyPatch, broken: str, expected: tuple[Any, Any]) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda name: FakeNvml(broken))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="0-1-2"))
    meter = EnergyMeter(torch.device("cuda", 0))
    assert (meter.joules(), meter.power_limit_watts()) == expected
    both = EnergyMeter(torch.device("cuda", 0), 2)
    assert (both.joules(), both.power_limit_watts()) == tuple(None if one is None else 2 * one for one in expected)
    energy = meter.since_start()
    if expected[0] is None:
        assert energy is None
    else:
        assert energy is not None and (energy.joules, energy.power_limit_watts) == (0.0, expected[1])


def scrape(url: str) -> dict[str, float]:
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    values = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation and family.name.startswith("nanoflow_")
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()) if k in ("outcome", "kind", "le"))
            values[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return values


def test_the_endpoint_counts_what_the_run_does(tmp_path: Path, parts: tuple[Model, Engine]) -> None:
    model, engine = parts
    config = make_config(tmp_path, metrics={"port": 0}, report={"series_seconds": 0.05})
    recorder = Recorder()
    with Monitoring(config, quiet=True) as monitoring:
        assert monitoring.url is not None and monitoring.url.startswith("http://127.0.0.1:")
        assert scrape(monitoring.url)["nanoflow_requests_total{outcome=completed}"] == 0
        monitoring.watch(model, engine, recorder)
        finish(engine, recorder)
        values = scrape(monitoring.url)
        assert monitoring.energy() is None
        url = monitoring.url
    stats = engine.stats
    assert values["nanoflow_requests_total{outcome=completed}"] == 7
    assert values["nanoflow_requests_total{outcome=error}"] == 1
    assert values["nanoflow_prompt_tokens_total"] == sum(5 + 3 * n for n in range(7))
    assert values["nanoflow_output_tokens_total"] == recorder.column("output_tokens").sum() > 100
    rows = [values[f"nanoflow_batch_rows_total{{kind={kind}}}"] for kind in ("decode", "prefill", "padding")]
    assert sum(rows[:2]) == stats.rows and rows[2] == stats.padding_rows
    assert values["nanoflow_preemptions_total"] == engine.scheduler.preemptions > 0
    assert values["nanoflow_running_sequences"] == values["nanoflow_waiting_sequences"] == 0
    assert values["nanoflow_kv_cache_used_ratio"] == 0
    for name in ("time_to_first_token", "time_per_output_token", "request_duration"):
        assert values[f"nanoflow_{name}_seconds_count"] == 7
    assert values["nanoflow_iteration_seconds_count"] == stats.iterations
    assert values["nanoflow_request_duration_seconds_sum"] == pytest.approx(recorder.column("duration").sum())
    assert values["nanoflow_run_info"] == 1
    assert sum(line["completed"] for line in lines(tmp_path / "o.series.jsonl")) == 7
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url, timeout=10)


def test_a_port_in_use_is_one_message(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"metrics.port: cannot listen on 127.0.0.1 port {port}: .*in use; choose"
        ):
            Monitoring(make_config(tmp_path, metrics={"port": port}))


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.7"])
def test_a_wrong_address_is_one_message(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match=f"{host}"):
        Monitoring(make_config(tmp_path, metrics={"port": 0, "host": host}))


def test_without_a_port_nothing_listens(tmp_path: Path) -> None:
    with Monitoring(make_config(tmp_path)) as monitoring:
        assert monitoring.url is None


def test_a_run_that_goes_on_adds_to_the_series_and_counts_what_was_there(folder: Path, tmp_path: Path) -> None:
    sizes = {"device": "cpu", "page_size": 8, "kv_memory": "64KiB", "max_batch_tokens": 24}
    config = make_config(
        tmp_path,
        model={"path": str(folder), "dtype": "float32"},
        engine=sizes,
        workload={"synthetic": {"input_len": 6, "output_len": 8, "requests": 9}},
        report={"series_seconds": 0.01},
    )
    run(config, quiet=True)
    first = lines(tmp_path / "o.series.jsonl")
    records = (tmp_path / "o.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "o.jsonl").write_text("".join(records[:5]))
    run(config, quiet=True)
    series = lines(tmp_path / "o.series.jsonl")
    assert series[: len(first)] == first
    assert [line["elapsed"] for line in series[len(first) :]] == sorted(
        line["elapsed"] for line in series[len(first) :]
    )
    report = json.loads((tmp_path / "o.report.json").read_text())
    assert (report["requests"], report["completed"], report["earlier"]) == (4, 4, 5)
    assert sum(line["completed"] for line in series) == 13
    run(config, restart=True, quiet=True)
    assert sum(line["completed"] for line in lines(tmp_path / "o.series.jsonl")) == 9
