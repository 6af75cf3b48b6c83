"""The benchmark of latency against throughput: one run a rate, a record and a picture."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import latency

JOB = ["--set", "workload.synthetic={input_len: 5, output_len: 3, requests: 6}", "--set", "engine.device=cpu"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["latency.py", "synthetic", *JOB, *arguments])
    latency.main()


def test_a_curve_has_a_point_for_each_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "curve.json"
    slo = "report.slo={ttft_ms: 60000, tpot_ms: 60000}"
    run(monkeypatch, "--rates", "40", "inf", "--burstiness", "2", "--set", slo, "--out", str(out))
    record = json.loads(out.read_text())
    slow, fast = record["points"]
    assert (slow["rate"], fast["rate"]) == (40.0, "inf")
    for point in record["points"]:
        assert point["completed"] == 6 and point["errors"] == 0
        assert point["goodput"]["share"] == 1
        assert point["goodput"]["requests_per_second"] == pytest.approx(point["requests_per_second"], rel=1e-3)
        for name in latency.LATENCIES:
            assert 0 < point[name]["p50"] <= point[name]["p90"] <= point[name]["p99"]
        assert point["normalised_latency_ms"]["mean"] == pytest.approx(point["end_to_end_ms"]["mean"] / 3, rel=0.01)
    # Six gaps of 25 ms on average come before the last request.
    assert slow["seconds"] > 0.04
    assert record["burstiness"] == 2 and "arrival" not in record["config"]["workload"]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "goodput" in shown and "(100%)" in shown


@pytest.mark.parametrize("rate", ["0", "-1", "fast", "nan"])
def test_a_wrong_rate_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rate: str
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, f"--rates={rate}")
    assert "--rates" in capsys.readouterr().err
