"""The kernel benchmark's driver, tried on the CPU with a made-up section, and the page that its record makes."""

import itertools
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks import performance
from benchmarks.kernels import __main__ as driver
from benchmarks.kernels.common import (
    check_row,
    poisoned,
    randn,
    relative_error,
    time_interleaved,
    time_row,
)


@pytest.fixture
def section(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A section named `doubling` that is right and meets its target, and quick ceilings."""
    from benchmarks.kernels.common import MeasuredCeilings

    for module in ("benchmarks.kernels.common", "benchmarks.kernels.__main__"):
        monkeypatch.setattr(f"{module}.device_ceilings", lambda device="cuda": MeasuredCeilings(1.0, 10.0, 8.0))
    made: Any = ModuleType("benchmarks.kernels.doubling")

    def check(device: str) -> list[dict[str, Any]]:
        x, out = randn(64, device=device, dtype=torch.float32), poisoned(64, device=device, dtype=torch.float32)
        torch.mul(x, 2, out=out)
        return [check_row("double", "64", relative_error(out, x + x), 1e-6)]

    def time(device: str, quick: bool) -> list[dict[str, Any]]:
        x = randn(64, device=device)
        timing = time_interleaved({"a": lambda: x * 2}, 0.02, warmup_seconds=0.0, device=device)["a"]
        return [time_row("double", "64", timing, bytes=256, device=device, target="any", met=True)]

    made.check, made.time = check, time
    monkeypatch.setitem(sys.modules, "benchmarks.kernels.doubling", made)
    monkeypatch.setattr(driver, "sections", lambda: ["doubling"])
    return made


def run(*arguments: str) -> int:
    return driver.main(["--device", "cpu", *arguments])


def test_a_right_section_is_recorded(section: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "kernels.json"
    assert run("--out", str(path)) == 0
    record = json.loads(path.read_text())
    row = record["sections"]["doubling"]["times"][0]
    assert row["p10"] <= row["milliseconds"] <= row["p90"]
    assert row["floor_ms"] == pytest.approx(256 / 10e6) and row["calls"] > 0
    assert record["versions"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    assert "1 checks, all right" in printed and "double 64" in printed and "met" in printed


def test_a_wrong_result_a_missed_target_and_an_exception_are_told(
    section: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    section.check = lambda device: [check_row("double", "64", float("nan"), 1e-6)]
    assert run("--no-time") == 1
    assert "WRONG double 64" in capsys.readouterr().out

    section.check = lambda device: []
    right = section.time

    def missed(device: str, quick: bool) -> list[dict[str, Any]]:
        return [{**right(device, quick)[0], "met": False}]

    section.time = missed
    assert run() == 1
    assert "MISSED" in capsys.readouterr().out
    assert run("--quick") == 0

    def fails(device: str, quick: bool) -> list[dict[str, Any]]:
        raise RuntimeError("out of registers")

    section.time = fails
    assert run("--quick") == 1
    assert "out of registers" in capsys.readouterr().out


def test_records_of_another_machine_are_dropped_and_others_kept(section: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    assert run("--out", str(path)) == 0
    record = json.loads(path.read_text())
    record["sections"]["earlier"] = record["sections"]["doubling"]
    path.write_text(json.dumps(record))
    run("--out", str(path))
    assert set(json.loads(path.read_text())["sections"]) == {"doubling", "earlier"}
    path.write_text(json.dumps({**record, "hardware": "another"}))
    run("--out", str(path))
    assert set(json.loads(path.read_text())["sections"]) == {"doubling"}


def test_an_unwritten_element_is_an_error() -> None:
    out, x = poisoned(8, device="cpu", dtype=torch.float32), torch.ones(8)
    out[:7] = 1
    assert not check_row("x", "8", relative_error(out, x), 1.0)["ok"]


def test_candidates_take_turns() -> None:
    order: list[str] = []
    time_interleaved(
        {name: lambda name=name: order.append(name) for name in "ab"}, 0.02, warmup_seconds=0.0, device="cpu"
    )
    changes = sum(first != second for first, second in itertools.pairwise(order))
    assert changes >= 5
    assert order.count("a") > 10 and order.count("b") > 10


def test_a_record_makes_a_page(section: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    run("--out", str(path))
    record = {**json.loads(path.read_text()), "ceilings": {
        "tflops": 700.0, "gbytes_per_second": 3000.0, "read_gbytes_per_second": 2800.0,
    }}  # fmt: skip
    layer = {
        "rows": 128,
        "linears": {"qkv": {"kernel": "cublas", "milliseconds": 0.02, "cublas_milliseconds": 0.02}},
        "layer_milliseconds": 0.064,
        "cublas_layer_milliseconds": 0.0701,
    }
    choices = {"gpu": "a GPU", "linears_on_sms": 132, "model": "llama", "torch": "2.11.0", "layers": [layer]}
    records = performance.Records(kernels=record, choices=choices)
    page = performance.render(performance.PAGE.read_text(), records)
    assert "| 128 | 20.0, cublas | 64.0 | 0.500 | 70.1 |" in page
    assert "### doubling" in page and "1 checks, all right" in page and "any (met)" in page
    assert "700 TFLOP/s" in page and performance.NONE not in page
    assert performance.render(page, records) == page
