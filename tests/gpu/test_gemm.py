"""GEMM on the GPU against float64: every config, odd sizes, unaligned rows, poisoned outputs, graphs, two streams."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from nanoflow.ops.device_arrays import DeviceArrays
from nanoflow.ops.gemm import matmul, unavailable
from nanoflow.ops.gemm_config import SILU_TILES, TILES, GemmConfig, Workspace
from nanoflow.ops.operation import NanoContext
from tests.unit.ops_harness import gate_up_silu

pytestmark = pytest.mark.gpu

LIMITS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}
SPLIT = GemmConfig(128, 256, stages=4, epilogue_parts=4, split=True)


def relative_error(
    rows: int,
    columns: int,
    inputs: int,
    config: GemmConfig | None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    kernel: str = "triton",
    sms: int | None = None,
    bias: bool = False,
    silu: bool = False,
    shift: int = 0,
) -> float:
    """Of three launches into a slice of a poisoned buffer; `shift` moves x's address off 16 bytes."""
    x = torch.randn(rows, inputs + shift, device="cuda", dtype=dtype)[:, shift:]
    w = torch.randn(columns, inputs, device="cuda", dtype=dtype) / inputs**0.5
    b = torch.randn(columns, device="cuda", dtype=dtype) if bias else None
    outputs = columns // 2 if silu else columns
    buffer = torch.empty(rows + 2, outputs, device="cuda", dtype=dtype)
    for _ in range(3):
        buffer.fill_(torch.nan)
        matmul(x, w, buffer[1:-1], bias=b, silu=silu, sms=sms, kernel=kernel, config=config)  # type: ignore[arg-type]
    assert buffer[0].isnan().all() and buffer[-1].isnan().all()
    expected = functional.linear(x.double(), w.double(), None if b is None else b.double())
    if silu:
        expected = functional.silu(expected[:, :outputs]) * expected[:, outputs:]
    return float((buffer[1:-1].double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("config", TILES, ids=str)
@pytest.mark.parametrize("shape", [(600, 4000, 4096), (333, 1000, 520)], ids=str)
def test_every_config(config: GemmConfig, shape: tuple[int, int, int]) -> None:
    assert relative_error(*shape, config) < LIMITS[torch.bfloat16]
    assert relative_error(*shape, config, sms=100, bias=True) < LIMITS[torch.bfloat16]


@pytest.mark.parametrize("config", SILU_TILES, ids=str)
@pytest.mark.parametrize("shape", [(640, 8192, 4096), (333, 1200, 520)], ids=str)
def test_every_silu_config(config: GemmConfig, shape: tuple[int, int, int]) -> None:
    assert relative_error(*shape, config, silu=True) < LIMITS[torch.bfloat16]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("kernel", ["reference", "cublas", "triton", "measured"])
def test_the_operation_with_silu_in_a_graph_that_allocates_nothing(dtype: torch.dtype, kernel: str) -> None:
    op = gate_up_silu(256, 1200, bias=False)
    weight = torch.randn(2400, 256, device="cuda", dtype=dtype) / 16
    for rows in (1, 8, 64, 320, 1280):
        h = torch.randn(rows, 256, device="cuda", dtype=dtype)
        between, product = (torch.empty(rows, count, device="cuda", dtype=dtype) for count in (2400, 1200))
        part = SimpleNamespace(rows=slice(0, rows))
        buffers = {"h": h, "gate_up": between, "product": product}
        context = NanoContext(None, part, 0, buffers, {"weight": weight}, h)  # type: ignore[arg-type]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            op.kernels[kernel](context)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            op.kernels[kernel](context)  # a library may still take its workspace
            before = torch.cuda.memory_allocated()
            op.kernels[kernel](context)
            after = torch.cuda.memory_allocated()
        h.normal_()
        for buffer in (between, product):
            buffer.fill_(torch.nan)
        graph.replay()
        both = functional.linear(h.double(), weight.double())
        expected = functional.silu(both[:, :1200]) * both[:, 1200:]
        assert after == before or kernel == "reference"
        # An unfused kernel rounds the value between too.
        assert float((product.double() - expected).norm() / expected.norm()) < 1.5 * LIMITS[dtype], rows


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("kernel", ["cublas", "triton"])
def test_guessed_configs(dtype: torch.dtype, kernel: str) -> None:
    for shape in [(1, 128, 64), (65, 300, 200), (700, 1111, 515)]:
        assert relative_error(*shape, None, dtype=dtype, kernel=kernel, bias=True) < LIMITS[dtype]
        assert relative_error(*shape, None, dtype=dtype, kernel=kernel, shift=1) < LIMITS[dtype]


def test_deep_gemm() -> None:
    x = torch.randn(640, 4096, device="cuda", dtype=torch.bfloat16)
    if problem := unavailable("deep_gemm", x, x, x):
        pytest.skip(problem)
    for sms in (None, 100):
        assert relative_error(640, 4096, 4096, None, kernel="deep_gemm", sms=sms, bias=True) < LIMITS[torch.bfloat16]


@pytest.mark.parametrize("sms", [30, 33, 110, 132])
def test_a_split_config_gives_the_same_bits_each_time(sms: int) -> None:
    sms = min(sms, torch.cuda.get_device_properties(0).multi_processor_count)
    x = torch.randn(640, 4096, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16) / 64
    assert SPLIT.split_tiles(5 * 16, 64, sms) is not None
    workspace = Workspace(SPLIT, sms, x.device)
    outs = [torch.full((640, 4096), torch.nan, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    for _ in range(200):
        for out in outs:
            matmul(x, w, out, kernel="triton", config=SPLIT, sms=sms, scratch=lambda *_: workspace)
        assert torch.equal(*outs)
    assert not workspace.arrived.any()


def test_two_streams_at_once_and_graph_replays() -> None:
    x = torch.randn(640, 4096, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16) / 64
    expected = x @ w.T
    streams = [torch.cuda.Stream() for _ in range(2)]
    outs = [torch.empty_like(expected) for _ in streams]
    kept = [DeviceArrays(x.device).kept for _ in streams]

    def both() -> None:
        for stream, out, scratch in zip(streams, outs, kept, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                matmul(x, w, out, kernel="triton", config=SPLIT, sms=64, scratch=scratch)
            torch.cuda.current_stream().wait_stream(stream)

    both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        both()
    for _ in range(50):
        for out in outs:
            out.fill_(torch.nan)
        graph.replay()
        for out in outs:
            torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


def test_more_than_two_to_the_31_elements() -> None:
    rows, columns = 17_000, 131_072
    if torch.cuda.get_device_properties(0).total_memory < 30 * 2**30:
        pytest.skip("needs 30 GiB")
    x = torch.randn(rows, 64, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(columns, 64, device="cuda", dtype=torch.bfloat16) / 8
    for shift in (0, 1):  # through TMA, and through pointers
        out = torch.full((rows, columns + shift), torch.nan, device="cuda", dtype=torch.bfloat16)[:, :columns]
        matmul(x, w, out, kernel="triton", config=GemmConfig(128, 128, stages=3))
        torch.testing.assert_close(out[-64:], x[-64:] @ w.T, rtol=2e-2, atol=2e-2)
        assert not out[::500].isnan().any()
        del out
