"""The measurement of GEMM choices with Triton's kernels among the candidates, in the interpreter."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gemm_choices
from benchmarks.kernels.gemm import Case
from nanoflow.ops import gemm_config
from nanoflow.ops.gemm_choice import Choices
from nanoflow.ops.gemm_config import GemmConfig


@pytest.mark.parametrize("silu", [False, True])
def test_our_own_kernels_are_compared(silu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = (GemmConfig(16, 32, 0, 16, 4, 2), GemmConfig(16, 16, 0, 16, 4, 2))
    monkeypatch.setattr(gemm_config, "SILU_TILES" if silu else "TILES", tiles)
    case = Case("gate_up", 64, 32, 16, 4, True, silu)
    choice, line = gemm_choices.measure(case, gemm_choices.Bench(torch.device("cpu"), 0.01))
    assert choice.kernel == "cublas" and any(str(tile) in line for tile in tiles)


def test_a_part_of_the_sms_stores_our_own_kernels_and_no_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tile = GemmConfig(16, 64, 0, 64, 4, 2)
    monkeypatch.setattr(gemm_config, "TILES", (tile, GemmConfig(16, 32, 0, 64, 4, 2)))
    monkeypatch.setattr(gemm_config, "SILU_TILES", (tile,))
    shapes = [("qkv", 96, 64, False), ("gate_up", 64, 64, True), ("lm_head", 100, 64, False)]
    monkeypatch.setattr(gemm_choices, "linears", lambda model, ranks: shapes)
    out, record = tmp_path / "cpu.json", tmp_path / "record.json"
    options = ["--device", "cpu", "--rows", "16", "--seconds", "0.01", "--candidates", "1"]
    assert gemm_choices.main([*options, "--sms", "2", "3", "--out", str(out), "--record", str(record)]) == 0
    choices = Choices.load(out, gemm_choices.machine(torch.device("cpu")))
    found = {key: by_rows[16] for key, by_rows in choices.by_key.items()}
    assert set(found) == {(columns, 64, sms, "bfloat16", silu) for _, columns, _, silu in shapes[:2] for sms in (2, 3)}
    assert {(choice.kernel, choice.config is None) for choice in found.values()} == {("triton", False)}
    made = json.loads(record.read_text())
    assert made["linears_on_sms"] == [2, 3] and [layer["sms"] for layer in made["layers"]] == [2, 3]
    assert {layer["stored"] for layer in made["layers"]} == {"as chosen"}
    assert "16 rows on 3 SMs: layer " in capsys.readouterr().out
