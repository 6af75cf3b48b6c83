"""The measurement of GEMM choices with Triton's kernels among the candidates, in the interpreter."""

import pytest
import torch

from benchmarks import gemm_choices
from benchmarks.kernels.gemm import Case
from nanoflow.ops import gemm_config
from nanoflow.ops.gemm_config import GemmConfig


@pytest.mark.parametrize("silu", [False, True])
def test_our_own_kernels_are_compared(silu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = (GemmConfig(16, 32, 0, 16, 4, 2), GemmConfig(16, 16, 0, 16, 4, 2))
    monkeypatch.setattr(gemm_config, "SILU_TILES" if silu else "TILES", tiles)
    case = Case("gate_up", 64, 32, 16, 4, True, silu)
    choice, line = gemm_choices.measure(case, torch.device("cpu"), 0.01, deep_gemm=False)
    assert choice.kernel == "cublas" and any(str(tile) in line for tile in tiles)
