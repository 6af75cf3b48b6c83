"""Triton decode attention on the GPU: against float32, poisoned outputs, far pages, a captured graph, repeats."""

import numpy as np
import pytest
import torch

from nanoflow.ops.attention import DecodeAttention
from nanoflow.ops.decode_work import FIELDS, HEADER, decode_work

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
EDGES = (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 257)


class Case:
    """Random queries, keys and values of requests with these lengths; pages from `first_page` on, in random order."""

    def __init__(self, heads, kv_heads, head_dim, page_size, lengths, dtype, window=None, first_page=1) -> None:
        from nanoflow.ops.decode_attention_triton import DecodeWorkspace, decode_config

        self.lengths = np.array(lengths, np.int32)
        self.window = window
        self.page_size = page_size
        used = -(-self.lengths // page_size)
        order = first_page + np.random.default_rng().permutation(used.sum())
        self.pages = np.zeros((len(used), used.max()), np.int32)
        for request, (count, end) in enumerate(zip(used, np.cumsum(used), strict=True)):
            self.pages[request, :count] = order[end - count : end]
        self.kv = torch.empty(first_page + len(order), 2, kv_heads, page_size, head_dim, dtype=dtype, device=DEVICE)
        self.kv[first_page:].normal_()
        self.kv[0] = torch.nan
        qkv = torch.randn(len(used), (heads + 2 * kv_heads) * head_dim, device=DEVICE).to(dtype)
        self.q_THD = qkv[:, : heads * head_dim].unflatten(1, (heads, head_dim))
        self.out_THD = torch.full((len(used), heads, head_dim), torch.nan, dtype=dtype, device=DEVICE)
        self.op = DecodeAttention("", "", "", heads, kv_heads, head_dim, [window])
        capability = torch.cuda.get_device_capability()
        self.config = decode_config(page_size, head_dim, dtype, capability, heads // kv_heads)
        programs = self.config.programs_per_sm * torch.cuda.get_device_properties(DEVICE).multi_processor_count
        self.workspace = DecodeWorkspace(programs, heads // kv_heads, head_dim, DEVICE)

    def work(self, capacity: int | None = None, chosen: slice = slice(None)) -> torch.Tensor:
        rows = np.arange(len(self.lengths), dtype=np.int32)[chosen]
        listed = decode_work(
            rows,
            self.lengths[chosen],
            self.pages[chosen],
            page_size=self.page_size,
            block_tokens=self.config.block_tokens,
            window=self.window,
            capacity=capacity,
        )
        return torch.from_numpy(listed).to(DEVICE)

    def run(self, work: torch.Tensor) -> torch.Tensor:
        from nanoflow.ops.decode_attention_triton import decode_attention

        scale = self.op.scale
        decode_attention(self.q_THD, self.kv, self.out_THD, work, self.workspace, scale=scale, config=self.config)
        return self.out_THD

    def check(self, rows: range | None = None) -> None:
        limit = 1e-5 if self.kv.dtype == torch.float32 else 6e-3
        for row in range(len(self.lengths)) if rows is None else rows:
            pages = torch.from_numpy(self.pages[row]).to(DEVICE, torch.int64)
            q_THD = self.q_THD[row : row + 1].float()
            wanted = self.op.attend(q_THD, pages, int(self.lengths[row]), self.window, self.kv)
            error = (self.out_THD[row : row + 1].float() - wanted).norm() / wanted.norm()
            assert error <= limit, (row, self.lengths[row], float(error))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("window", [None, 1, 100])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page_size"),
    [(32, 8, 128, 128), (9, 3, 64, 16), (16, 16, 80, 32), (8, 1, 96, 64), (8, 4, 256, 64), (14, 2, 64, 24)],
)
def test_against_float32(heads, kv_heads, head_dim, page_size, window, dtype) -> None:
    lengths = [*EDGES, *np.random.default_rng().integers(1, 1500, 20).tolist()]
    case = Case(heads, kv_heads, head_dim, page_size, lengths, dtype, window)
    case.run(case.work())
    case.check()
    assert not case.workspace.arrived.any()


@pytest.mark.parametrize("tma", [False, True])
def test_pages_past_two_to_the_31_elements(tma) -> None:
    from dataclasses import replace

    if tma and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("TMA is used on sm_90")
    case = Case(32, 8, 128, 128, (300, 77, 128), torch.bfloat16, first_page=8300)
    assert case.kv.numel() > 2**31
    case.config = replace(case.config, tma=tma)
    case.run(case.work())
    case.check()


@pytest.mark.parametrize("lengths", [(100_003,), (5000, 1, 30_000), (700,) * 100], ids=str)
def test_split_contexts_repeat_bit_for_bit(lengths) -> None:
    """Pieces are joined in a fixed order: a difference between launches would be a race."""
    case = Case(32, 8, 128, 128, lengths, torch.bfloat16)
    work = case.work()
    first = case.run(work).clone()
    case.check()
    for _ in range(200):
        case.out_THD.fill_(torch.nan)
        assert torch.equal(case.run(work), first)
    assert not case.workspace.arrived.any()


def test_one_captured_launch_serves_other_batches() -> None:
    lengths = [*EDGES, *np.random.default_rng().integers(1, 3000, 40).tolist()]
    case = Case(32, 8, 128, 128, lengths, torch.bfloat16)
    capacity = 4000
    work = case.work(capacity)
    case.run(work)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.run(work)
    for chosen in (slice(0, 5), slice(20, 53), slice(13, 14), slice(0, 0), slice(0, None)):
        work.copy_(case.work(capacity, chosen))
        assert len(work) == HEADER + FIELDS * capacity
        case.out_THD.fill_(torch.nan)
        graph.replay()
        rows = range(*chosen.indices(len(lengths)))
        case.check(rows)
        others = [row for row in range(len(lengths)) if row not in rows]
        assert case.out_THD[others].isnan().all()
