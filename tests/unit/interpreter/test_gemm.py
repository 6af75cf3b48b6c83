"""The Triton GEMM against float64: whole tiles, tiles in pieces, two accumulators, bias, SiLU, with and without TMA."""

import math

import pytest
import torch
from torch.nn import functional

from nanoflow.ops import gemm_config
from nanoflow.ops.device_batch import DeviceBatch
from nanoflow.ops.gemm import matmul
from nanoflow.ops.gemm_config import TILES, GemmConfig, Workspace
from nanoflow.ops.operation import NanoContext
from tests.unit.ops_harness import CPU, Pages, Piece, dense_batch, gate_up_silu

SMALL = GemmConfig(16, 32, 0, 16, 4, 2, group_m=2)
EXTRA = GemmConfig(16, 32, 16, 16, 4, 2, group_m=2, epilogue_parts=2)
SPLIT = GemmConfig(16, 32, 0, 16, 4, 2, group_m=2, epilogue_parts=2, split=True)
SPLIT_EXTRA = GemmConfig(16, 32, 16, 16, 4, 2, group_m=2, epilogue_parts=4, split=True, ctas_per_sm=2)


@pytest.fixture(autouse=True)
def small_tiles_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if handing over partial sums cost next to nothing: otherwise no problem of these sizes would be split."""
    for name, value in {"WRITE": 1, "READ": 0, "LEAST_STEPS": 2, "LEAST_TAIL": 1}.items():
        monkeypatch.setattr(gemm_config, name, value)


def error(
    rows: int,
    columns: int,
    inputs: int,
    config: GemmConfig,
    *,
    sms: int = 3,
    bias: bool = False,
    silu: bool = False,
    dtype: torch.dtype = torch.float16,
    unaligned: bool = False,
) -> float:
    """Largest difference from float64 after two launches over one workspace, into a slice of a poisoned buffer."""
    shift = 1 if unaligned else 0
    x = torch.randn(rows, inputs + shift, dtype=dtype)[:, :inputs]
    w = torch.randn(columns, inputs, dtype=dtype) / inputs**0.5
    b = torch.randn(columns, dtype=dtype) if bias else None
    outputs = columns // 2 if silu else columns
    buffer = torch.full((rows + 2, outputs), torch.nan, dtype=dtype)
    workspace = Workspace(config, sms, torch.device("cpu"), silu=silu)
    workspace.partials.fill_(torch.nan)
    for _ in range(2):
        buffer.fill_(torch.nan)
        out = matmul(
            x, w, buffer[1:-1], bias=b, silu=silu, sms=sms, kernel="triton", config=config,
            scratch=lambda key, make: workspace,
        )  # fmt: skip
        assert not workspace.arrived.any()
    assert buffer[0].isnan().all() and buffer[-1].isnan().all(), "wrote beyond its rows"
    expected = functional.linear(x.double(), w.double(), None if b is None else b.double())
    if silu:
        expected = functional.silu(expected[:, :outputs]) * expected[:, outputs:]
    return float((out.double() - expected).abs().max())


@pytest.mark.parametrize("config", [SMALL, EXTRA, SPLIT, SPLIT_EXTRA], ids=str)
@pytest.mark.parametrize("shape", [(1, 16, 16), (40, 96, 64), (33, 136, 72), (70, 64, 40), (16, 192, 200)], ids=str)
def test_every_kind_of_tile(config: GemmConfig, shape: tuple[int, int, int]) -> None:
    assert error(*shape, config) < 1e-2


@pytest.mark.parametrize("config", [SMALL, SPLIT, SPLIT_EXTRA], ids=str)
@pytest.mark.parametrize("sms", [1, 5, 11])
def test_any_number_of_sms(config: GemmConfig, sms: int) -> None:
    assert error(40, 128, 112, config, sms=sms) < 1e-2


def test_more_sms_than_k_steps() -> None:
    assert error(16, 32, 48, SPLIT, sms=40) < 1e-2


@pytest.mark.parametrize(
    ("rows", "columns", "sms", "pieces", "helped", "whole"),
    [
        (40, 96, 36, 4, False, False),
        (40, 96, 25, 2, True, False),
        (40, 96, 14, 1, True, False),
        (40, 96, 8, 7, False, True),
        (40, 128, 7, 1, True, True),
        (40, 160, 11, 2, True, True),
    ],
)
@pytest.mark.parametrize("extra", [0, 16])
def test_pieces_and_helpers(
    rows: int, columns: int, sms: int, pieces: int, helped: bool, whole: bool, extra: int
) -> None:
    config = GemmConfig(16, 32 - extra, extra, 16, 4, 2, group_m=2, epilogue_parts=2, split=True)
    tiles = math.prod(config.tiles(rows, columns))
    split = config.split_tiles(tiles, 20, sms)
    assert split is not None and (split.pieces, split.helpers > 0, tiles > split.tiles) == (pieces, helped, whole)
    assert error(rows, columns, 312, config, sms=sms) < 1e-2


@pytest.mark.parametrize("config", [SMALL, EXTRA, SPLIT, SPLIT_EXTRA], ids=str)
def test_bias(config: GemmConfig) -> None:
    assert error(35, 120, 48, config, bias=True) < 1e-2


@pytest.mark.parametrize("config", [SMALL, SPLIT], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_silu_of_gate_times_up(config: GemmConfig, bias: bool) -> None:
    assert error(35, 176, 48, config, silu=True, bias=bias) < 1e-2


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("columns", [20, 33, 72])
def test_the_operation_with_silu_gives_its_reference(columns: int, bias: bool) -> None:
    """On the second of two nano-batches, padding included. The fused kernel leaves the value between alone."""
    host = dense_batch([[Piece(0, 0, [1] * 5)], [Piece(1, 3, [2, 3, 4, 5, 6])]], Pages(4, 2, 4), padding=2)
    batch = DeviceBatch(host, CPU, 4)
    op = gate_up_silu(40, columns, bias)
    h = torch.randn(host.rows + 1, 40)
    weights = {weight.name: torch.randn(weight.shape) / 40**0.5 for weight in op.weights}
    found = {}
    for kernel in ("reference", "triton", "cublas", "measured"):
        between = torch.full((host.rows + 1, 2 * columns), torch.nan)
        product = torch.full((host.rows + 1, columns), torch.nan)
        buffers = {"h": h.clone(), "gate_up": between, "product": product}
        op.kernels[kernel](NanoContext(batch, batch.parts[1], 0, buffers, weights, torch.empty(0)))
        assert torch.equal(buffers["h"], h)
        assert between.isnan().all() == (kernel == "triton")
        found[kernel] = product
    rows = batch.parts[1].rows
    assert rows.stop - rows.start == 7 and found["reference"][rows].isfinite().all()
    for kernel, product in found.items():
        torch.testing.assert_close(product, found["reference"], rtol=2e-6, atol=2e-6, equal_nan=True, msg=kernel)


@pytest.mark.parametrize("config", [SMALL, SPLIT_EXTRA], ids=str)
def test_rows_that_tma_cannot_read(config: GemmConfig) -> None:
    assert error(35, 88, 50, config, unaligned=True) < 1e-2
    assert error(35, 44, 50, config, bias=True, silu=config is SMALL) < 1e-2


def test_float32_is_not_rounded_to_tf32() -> None:
    assert error(35, 88, 64, SMALL, dtype=torch.float32) < 1e-5
    assert error(35, 88, 64, SPLIT, dtype=torch.float32) < 1e-5


def test_a_config_that_was_not_named_is_guessed() -> None:
    x, w = torch.randn(40, 64), torch.randn(72, 64)
    out = matmul(x, w, torch.full((40, 72), torch.nan), kernel="triton")
    torch.testing.assert_close(out, x @ w.T, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("config", TILES, ids=str)
def test_the_shipped_tiles(config: GemmConfig) -> None:
    assert error(200, 600, 136, config, sms=3) < 1e-2
