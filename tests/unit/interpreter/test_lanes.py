"""Kernels in lanes that have a part of the SMs: grids of their budget, memory of their own, the same results."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from benchmarks import decode_blocks
from nanoflow.ops import decode_attention_triton, gemm, gemm_config, gemm_triton
from nanoflow.ops.attention import OTHER_PROGRAMS, DecodeAttention
from nanoflow.ops.device_arrays import DeviceArrays
from nanoflow.ops.device_batch import DeviceBatch
from nanoflow.ops.gemm_choice import Choice, Choices
from nanoflow.ops.gemm_config import GemmConfig
from nanoflow.ops.linear import Linear, LinearSilu
from nanoflow.ops.operation import NanoContext, Operation
from tests.unit.interpreter.test_decode_attention import case_of
from tests.unit.ops_harness import CPU, Pages, Piece, dense_batch, gate_up_silu
from tests.unit.test_ops_attention import LENGTHS, check
from tests.unit.test_prepare import SHARING, made_by

TILE = GemmConfig(16, 32, 0, 16, 4, 2, group_m=2)
NARROW = GemmConfig(16, 16, 0, 16, 4, 2)
SPLIT = GemmConfig(16, 32, 0, 16, 4, 2, group_m=2, epilogue_parts=2, split=True)


class Grids:
    """Stands for a kernel, and notes the grids that it is launched on and what it is given."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.grids: list[int] = []
        self.arguments: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **options: Any) -> None:
            self.grids.append(math.prod(grid))
            self.arguments.append(arguments)
            self.kernel[grid](*arguments, **options)

        return run


@pytest.fixture
def grids(monkeypatch: pytest.MonkeyPatch) -> dict[str, Grids]:
    found = {}
    for module, name in (
        (decode_attention_triton, "_decode_kernel"),
        (gemm_triton, "_tile_gemm"),
        (gemm_triton, "_split_gemm"),
    ):
        found[name] = Grids(getattr(module, name))
        monkeypatch.setattr(module, name, found[name])
    return found


@pytest.mark.parametrize("fused", [False, True])
def test_layers_make_nothing_that_they_share(fused: bool) -> None:
    def kernel_of(op: Operation) -> str:
        return "triton" if isinstance(op, SHARING) else "reference"

    prepared, late = made_by(kernel_of, fused=fused, whole=False)
    names = {name for key in prepared for name in (key, *(key if isinstance(key, tuple) else ()))}
    assert {("from_host", "kv_index"), ("from_host", "decode_pages"), ("decode_work", 16, 11)} <= names
    assert not late


def test_decode_attention_fills_its_lane_and_shares_nothing_with_others(grids: dict[str, Grids]) -> None:
    """Two nano-batches on lanes of 3 and 5 SMs, then both on one lane, then an unconfined lane of each name."""
    case = case_of("GQA", 64, 32, False)
    heads, _, head_dim = case.sizes
    halves = [[0, 3, 9, 6], [1, 2, 4, 5, 7, 8]]
    pieces = [[Piece(r, LENGTHS[r] - 1, [0], decode=True) for r in half] for half in halves]
    host = dense_batch(pieces, case.pages, padding=1)
    op = DecodeAttention("decode_attention", "qkv", "attention", *case.sizes, [None, 40])
    arrays = DeviceArrays(CPU)
    seen: dict[tuple[str, int | None], set[int]] = {}
    for lanes in ([("compute", 3), ("memory", 5)], [("memory", 5)] * 2, [("compute", None), ("memory", None)]):
        batch = DeviceBatch(host, CPU, 32, arrays)
        for layer, window in enumerate(op.windows):
            buffers = case.buffers(host.rows)
            for number, (lane, sms) in enumerate(lanes):
                context = NanoContext(batch, batch.part(number), layer, buffers, {}, case.kv, sms, lane)
                op.kernels["triton"](context)
                kernel = grids["_decode_kernel"]
                config = decode_attention_triton.decode_config(32, 64, case.kv.dtype, (8, 0), 3, sms)
                assert kernel.grids[-1] == (sms or 4) * config.programs_per_sm
                seen.setdefault((lane, sms), set()).add(kernel.arguments[-1][4].data_ptr())
            for number, half in enumerate(halves):
                for offset, request in enumerate(half):
                    row = host.nano_batches[number].start + offset
                    q_THD = buffers["qkv"][row : row + 1, : heads * head_dim].view(1, heads, head_dim)
                    wanted = case.expected(request, q_THD, LENGTHS[request], window)
                    check(buffers["attention"][row].view(1, heads, head_dim), wanted)
    assert [len(addresses) for addresses in seen.values()] == [1] * 4
    assert len(set().union(*seen.values())) == 4
    for name, count in OTHER_PROGRAMS.items():
        batch, buffers = DeviceBatch(host, CPU, 32, arrays), case.buffers(host.rows)
        context = NanoContext(batch, batch.part(0), 0, buffers, {}, case.kv, 3, "memory")
        op.prepare(context, name)
        op.kernels[name](context)
        assert grids["_decode_kernel"].grids[-1] == 3 * count
        for offset, request in enumerate(halves[0]):
            row = host.nano_batches[0].start + offset
            q_THD = buffers["qkv"][row : row + 1, : heads * head_dim].view(1, heads, head_dim)
            wanted = case.expected(request, q_THD, LENGTHS[request], None)
            check(buffers["attention"][row].view(1, heads, head_dim), wanted)


@pytest.fixture
def small_tiles_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WRITE": 1, "READ": 0, "LEAST_STEPS": 2, "LEAST_TAIL": 1}.items():
        monkeypatch.setattr(gemm_config, name, value)


def product(op: Linear | LinearSilu, kernel: str, lanes: list[tuple[str, int | None]]) -> None:
    """Runs `op` on 40 rows in each of the lanes, which keep their memory, and compares with float64."""
    pages = Pages(4, 1, 12)
    host = dense_batch([[Piece(0, 0, [1] * 40)]], pages)
    arrays = DeviceArrays(CPU)
    linear = op.linear if isinstance(op, LinearSilu) else op
    target = op.silu_mul.target if isinstance(op, LinearSilu) else op.target
    for lane, sms in lanes:
        batch = DeviceBatch(host, CPU, 4, arrays)
        weight = torch.randn(sum(linear.outputs), linear.inputs) / linear.inputs**0.5
        columns = {linear.source: linear.inputs, linear.target: sum(linear.outputs), target: linear.outputs[0]}
        buffers = {name: torch.randn(40, count) for name, count in columns.items()}
        buffers[target].fill_(torch.nan)
        op.kernels[kernel](NanoContext(batch, batch.whole, 0, buffers, {"weight": weight}, torch.empty(0), sms, lane))
        wanted = functional.linear(buffers[linear.source].double(), weight.double())
        if isinstance(op, LinearSilu):
            wanted = functional.silu(wanted[:, : columns[target]]) * wanted[:, columns[target] :]
        torch.testing.assert_close(buffers[target].double(), wanted, rtol=1e-4, atol=1e-5)


LINEAR = Linear("o", "attention", "o", 312, [96], ["o_proj"])


def stored(monkeypatch: pytest.MonkeyPatch, *entries: tuple[int, Choice], silu: bool = False, columns: int) -> None:
    choices = Choices({"sms": 132})
    for sms, choice in entries:
        choices.add(48, columns, 312, sms, torch.float32, choice, silu=silu)
    monkeypatch.setattr(gemm, "stored_choices", lambda device: choices)


@pytest.mark.usefixtures("small_tiles_are_split")
def test_split_products_of_lanes_share_no_partial_sums(
    grids: dict[str, Grids], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored(monkeypatch, (7, Choice("triton", SPLIT, 1.0, 1.0)), (11, Choice("triton", SPLIT, 1.0, 1.0)), columns=96)
    lanes = [("compute", 7), ("other", 7), ("compute", 11), ("compute", 7)]
    product(LINEAR, "measured", lanes)
    kernel = grids["_split_gemm"]
    assert kernel.grids == [7, 7, 11, 7] and not grids["_tile_gemm"].grids
    partials = [arguments[6] for arguments in kernel.arguments]
    arrived = [arguments[7] for arguments in kernel.arguments]
    for memory in (partials, arrived):
        assert len({tensor.data_ptr() for tensor in memory}) == 3 and memory[0] is memory[3]
    assert not any(tensor.any() for tensor in arrived)


@pytest.mark.parametrize(
    ("silu", "others", "expected"),
    [
        # 9 tiles of 16 x 32 are two rounds on 5 and on 6 SMs, and one on 9; 18 of 16 x 16 are six rounds on 3.
        (False, (6, 9), [(TILE, 5), (NARROW, 3), (TILE, 6)]),
        # With SiLU 9 tiles of 16 x 16 are three rounds on 3 and on 4.
        (True, (4, 9), [(TILE, 5), (NARROW, 3), (NARROW, 4)]),
    ],
)
def test_a_product_runs_what_was_measured_for_its_budget(
    silu: bool,
    others: tuple[int, int],
    expected: list[tuple[GemmConfig, int]],
    grids: dict[str, Grids],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or for the nearest that is still right; where there is none, the interpreter's CPU has its library."""
    entries = [(5, Choice("triton", TILE, 1.0, 1.0)), (3, Choice("triton", NARROW, 1.0, 1.0))]
    stored(monkeypatch, *entries, silu=silu, columns=96)
    op = gate_up_silu(312, 48, bias=False) if silu else LINEAR
    product(op, "measured", [("compute", sms) for sms in (5, 3, *others)])
    kernel = grids["_tile_gemm"]
    widths = [arguments[1].block_shape[0] for arguments in kernel.arguments]
    assert list(zip(widths, kernel.grids, strict=True)) == [(config.block_n, sms) for config, sms in expected]


def test_the_benchmark_of_decode_attention_on_parts_checks_and_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a CPU, where a part is a number of programs."""
    few = (decode_blocks.PART_CANDIDATES[0], decode_blocks.PART_CANDIDATES[-1])
    monkeypatch.setattr(decode_blocks, "PART_CANDIDATES", few)
    monkeypatch.setattr(decode_blocks, "HEADS", (4, 1, 128))
    out = tmp_path / "parts.json"
    options = ["--requests", "1", "--seconds", "0.01", "--device", "cpu", "--out", str(out)]
    decode_blocks.main(["--sms", "2", "3", *options])
    record = json.loads(out.read_text())
    assert [row["sms"] for row in record["parts"]] == [2, 2, 3, 3]
    assert {row["config"] for row in record["parts"]} == {"tma b64 s3 w2 x3", "pointers b64 s3 w4 x2"}
    assert all(row["gbytes_per_second"] > 0 for row in record["parts"]) and set(record["chosen"]) == {"2", "3"}
    assert "3 SMs: tma b64 s3 w2 x3" in capsys.readouterr().out

    wrong = torch.zeros(1, 4, 128)
    monkeypatch.setattr(decode_blocks.Case, "expected", lambda case: wrong)
    with pytest.raises(AssertionError, match="tma b64 s3 w2 x3 on 2 SMs"):
        decode_blocks.main(["--sms", "2", *options])
