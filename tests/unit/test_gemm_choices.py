"""The measurement of GEMM choices, tried on the CPU: what is stored and kept, and that every batch finds a choice."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gemm_choices
from benchmarks.kernels import gemm
from benchmarks.kernels.common import MeasuredCeilings
from benchmarks.kernels.gemm import Case
from nanoflow.ops.gemm_choice import Choice, Choices, choose

TINY = str(gemm_choices.ROOT / "configs/models/tiny-llama")
BF16 = torch.bfloat16


def run(*arguments: str) -> int:
    return gemm_choices.main(["--device", "cpu", "--model", TINY, "--seconds", "0.01", *arguments])


def test_a_run_stores_a_choice_for_every_linear_and_keeps_those_of_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, record = tmp_path / "gemm" / "cpu.json", tmp_path / "record.json"
    assert run("--rows", "8", "16", "--out", str(out), "--record", str(record)) == 0
    printed = capsys.readouterr().out
    assert "16 rows: layer " in printed and "us a row; cuBLAS " in printed
    here = gemm_choices.machine(torch.device("cpu"))
    choices = Choices.load(out, here)
    shapes = {(key[0], key[1], key[4]) for key in choices.by_key}
    assert shapes == {
        (384, 256, False), (256, 256, False), (1536, 256, True), (256, 768, False), (8192, 256, False),
    }  # fmt: skip
    assert all(set(by_rows) == {8, 16} for by_rows in choices.by_key.values())
    made = json.loads(record.read_text())
    assert [layer["rows"] for layer in made["layers"]] == [16, 8]
    assert list(made["layers"][0]["linears"]) == ["qkv", "o", "gate_up", "down"]
    assert all(layer["layer_milliseconds"] > 0 for layer in made["layers"])

    assert run("--rows", "24", "--out", str(out)) == 0
    again = Choices.load(out, here)
    assert all(set(by_rows) == {8, 16, 24} for by_rows in again.by_key.values())
    assert again.by_key[1536, 256, 4, "bfloat16", True][8] == choices.by_key[1536, 256, 4, "bfloat16", True][8]


def test_time_that_is_up_keeps_what_was_measured(tmp_path: Path) -> None:
    out = tmp_path / "cpu.json"
    assert run("--rows", "8", "--out", str(out), "--time-limit", "0") == 0
    assert not out.exists()


def test_the_head_is_measured_for_as_many_rows_as_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm_choices, "HEAD_ROWS", 8)
    run("--rows", "8", "16", "--out", str(tmp_path / "cpu.json"))
    choices = Choices.load(tmp_path / "cpu.json", gemm_choices.machine(torch.device("cpu")))
    assert set(choices.by_key[8192, 256, 4, "bfloat16", False]) == {8}


@pytest.mark.parametrize(("wrong", "message"), [(("--model", "nowhere"), "no config.json"), (("--rows", "0"), "1 or")])
def test_what_cannot_be_measured_is_refused(
    wrong: tuple[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(*wrong)
    assert message in capsys.readouterr().err


def test_every_batch_finds_a_choice_of_its_own_height() -> None:
    """Of the rows measured by default: at most one tile higher, from half a tile on."""
    choices = Choices({})
    for rows in gemm_choices.ROWS:
        choices.add(rows, 6144, 4096, 132, BF16, Choice("cublas", None, float(rows), float(rows)))
    for rows in [*range(64, 1024, 64), *range(1024, 2049, 128)]:
        found = choices.find(rows, 6144, 4096, 132, BF16)
        assert found is not None and rows <= found.milliseconds < rows + 256
    assert choices.find(33, 6144, 4096, 132, BF16) is not None
    assert choices.find(32, 6144, 4096, 132, BF16) is None  # cuBLAS: read once, the weight bounds it


@pytest.mark.parametrize(
    ("times", "winner"),
    [
        ({"cublas": 1.0, "triton": 0.997, "deep_gemm": 0.985}, "cublas"),
        ({"cublas": 1.0, "triton": 0.99, "deep_gemm": 0.98}, "triton"),
        ({"cublas": 1.0, "triton": 0.99, "deep_gemm": 0.96}, "deep_gemm"),
    ],
)
def test_noise_and_a_little_gain_choose_nothing(times: dict[str, float], winner: str) -> None:
    kernels = {name: (Choice(name, None, 0.0, 0.0), None) for name in times}  # type: ignore[arg-type]
    chosen = choose(kernels, lambda calls, seconds: {name: times[name] for name in calls})
    assert (chosen.kernel, chosen.milliseconds, chosen.cublas_milliseconds) == (winner, times[winner], 1.0)


@pytest.mark.parametrize("silu", [False, True])
def test_the_calls_of_a_case_compute_it(silu: bool) -> None:
    case = Case("gate_up", 48, 40, 7, 4, True, silu)
    x, weights = case.inputs_and_weights("cpu")
    call = case.calls("cublas", None, x, weights)[0]
    wanted = x.float() @ weights[0].float().T
    if silu:
        wanted = torch.nn.functional.silu(wanted[:, :24]) * wanted[:, 24:]
    torch.testing.assert_close(call().float(), wanted, atol=0.05, rtol=0.05)  # type: ignore[attr-defined]


def test_the_section_of_the_kernel_benchmark_has_a_row_for_what_it_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    ceilings = MeasuredCeilings(1.0, 10.0, 8.0)
    monkeypatch.setattr("benchmarks.kernels.common.device_ceilings", lambda device="cuda": ceilings)
    rows = gemm.measure(Case("gate_up", 48, 40, 7, 4, True, True), "cpu", 0.01)
    assert [row["name"] for row in rows] == ["gemm try", "gemm"]
    assert {row["shape"] for row in rows} == {"gate_up + silu_mul 7x48x40 on 4 SMs"}
    assert all(row["config"] == "cublas" and row["flops"] == 2 * 7 * 48 * 40 for row in rows)
