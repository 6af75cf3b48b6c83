"""The table of waves: what it counts, by hand, and what it refuses."""

import pytest

from benchmarks import gemm_waves
from benchmarks.gemm_waves import parse_cut
from nanoflow.ops.gemm_config import GemmConfig, guess_cycles
from nanoflow.ops.gemm_waves import FLOPS_A_CYCLE, waves


def test_cycles_of_whole_tiles_are_rounds_of_k_steps() -> None:
    """A step of 128 x 256 x 64 takes 1,024 cycles; `qkv` of 640 rows has 120 tiles and 64 steps."""
    config = GemmConfig(128, 256, stages=4, epilogue_parts=4)
    for sms, rounds in ((132, 1), (120, 1), (119, 2), (60, 2), (59, 3)):
        assert guess_cycles(config, 640, 6144, 4096, sms) == rounds * 64 * 1024


@pytest.mark.parametrize("sms", [84, 92, 100, 108, 132])
@pytest.mark.parametrize("rows", [512, 576, 640, 1280])
def test_no_share_is_above_one_and_full_rounds_are_near_it(rows: int, sms: int) -> None:
    for columns, inputs, silu in ((6144, 4096, False), (28672, 4096, True), (4096, 14336, False)):
        found = waves(columns, inputs, rows, sms, silu=silu)
        assert 0.5 < found.used <= 1
        assert found.used == pytest.approx(2 * rows * columns * inputs / (FLOPS_A_CYCLE * sms * found.cycles))
    exact = waves(256 * sms, 4096, 128, sms, silu=False)
    assert exact.rounds == 1 and exact.used == 1


def test_the_tables_say_what_a_cut_and_a_whole_product_cost(capsys: pytest.CaptureFixture[str]) -> None:
    assert gemm_waves.main(["--cuts", "1280", "640+640", "--sms", "92", "100", "--ghz", "1.0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:4] == ["640", "100", "128x320", "1.00"] for line in lines), lines
    begun = next(number for number, line in enumerate(lines) if line.startswith("us a layer at 1 GHz"))
    assert lines[begun + 2].split() == ["rows", "92", "SMs", "100", "SMs"]
    numbers = {line[:14].strip(): [float(number) for number in line[14:].split()] for line in lines[begun + 3 :]}
    whole, cut = numbers["1280"], numbers["640+640"]
    assert all(few > many for few, many in (whole, cut)), "more SMs, less time"
    for column in (0, 1):
        saved = sum(numbers[f"{name} whole"][column] for name in ("qkv", "o", "gate_up", "down"))
        assert saved == pytest.approx(cut[column] - whole[column], abs=4)


@pytest.mark.parametrize("wrong", [("--cuts", "640+x"), ("--cuts", "0"), ("--sms", "0"), ("--model", "nowhere")])
def test_what_cannot_be_counted_is_refused(wrong: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gemm_waves.main(list(wrong))
    assert wrong[0] in capsys.readouterr().err


def test_cuts_are_read() -> None:
    assert parse_cut("1280") == (1280,) and parse_cut("640+512+128") == (640, 512, 128)
