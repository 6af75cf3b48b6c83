"""Attention kernels and reference maths against a float64 softmax written from the formula, on scattered pages."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from nanoflow.ops.attention import DecodeAttention, PrefillAttention
from nanoflow.ops.device_batch import DeviceBatch
from nanoflow.ops.operation import NanoContext, Operation
from tests.unit.ops_harness import CPU, Pages, Piece, dense_batch

HEADS = {"MHA": (4, 4), "GQA": (6, 2), "MQA": (5, 1)}
LENGTHS = (1, 2, 7, 8, 9, 31, 64, 77, 150, 300)
"""Context lengths of the requests: one token, a page's edges, several blocks."""


class Case:
    """Some requests with random keys and values, laid in scattered pages; everything else in the pool is NaN.

    With `stale`, the rest of a request's own pages holds the finite leftovers of an earlier request, as in a real run.
    """

    def __init__(self, heads: int, kv_heads: int, head_dim: int, page_size: int, dtype: torch.dtype, seed: int) -> None:
        torch.manual_seed(seed)
        self.sizes = (heads, kv_heads, head_dim)
        self.pages = Pages(page_size, len(LENGTHS), -(-max(LENGTHS) // page_size), seed=seed)
        self.kv = torch.full((self.pages.pool, 2, kv_heads, page_size, head_dim), torch.nan, dtype=dtype)
        self.k = [torch.randn(length, kv_heads, head_dim).to(dtype) for length in LENGTHS]
        self.v = [torch.randn(length, kv_heads, head_dim).to(dtype) for length in LENGTHS]
        for request, length in enumerate(LENGTHS):
            for column in range(-(-length // page_size)):
                first, last = column * page_size, min((column + 1) * page_size, length)
                page = self.kv[int(self.pages.table[request, column])]
                page.copy_(torch.randn(page.shape) * 30)
                page[0, :, : last - first] = self.k[request][first:last].transpose(0, 1)
                page[1, :, : last - first] = self.v[request][first:last].transpose(0, 1)

    def expected(self, request: int, q_THD: torch.Tensor, last: int, window: int | None) -> torch.Tensor:
        """The T queries stand at positions ``last - T .. last - 1``."""
        heads, kv_heads, head_dim = self.sizes
        k = self.k[request].double().repeat_interleave(heads // kv_heads, 1)
        v = self.v[request].double().repeat_interleave(heads // kv_heads, 1)
        out = torch.empty(q_THD.shape, dtype=torch.float64)
        for row in range(len(q_THD)):
            position = last - len(q_THD) + row
            seen = slice(0 if window is None else max(0, position - window + 1), position + 1)
            scores = torch.einsum("hd,lhd->hl", q_THD[row].double(), k[seen]) / head_dim**0.5
            out[row] = torch.einsum("hl,lhd->hd", scores.softmax(-1), v[seen])
        return out

    def run(self, op: Operation, kernel: str, host, nano_batch: int | None, buffers: dict[str, torch.Tensor]) -> None:
        batch = DeviceBatch(host, CPU, self.pages.page_size)
        with torch.inference_mode():
            op.kernels[kernel](NanoContext(batch, batch.part(nano_batch), 1, buffers, {}, self.kv))

    def buffers(self, rows: int) -> dict[str, torch.Tensor]:
        heads, kv_heads, head_dim = self.sizes
        qkv = torch.randn(rows, (heads + 2 * kv_heads) * head_dim).to(self.kv.dtype)
        return {"qkv": qkv, "attention": torch.full((rows, heads * head_dim), -77.0, dtype=self.kv.dtype)}


def check(found: torch.Tensor, wanted: torch.Tensor) -> None:
    tolerance = 2e-2 if found.dtype == torch.bfloat16 else 2e-5
    assert not found.isnan().any()
    torch.testing.assert_close(found.double(), wanted, atol=tolerance, rtol=tolerance)


SHAPES = [
    pytest.param(*HEADS[name], head_dim, page_size, dtype, id=f"{name}-{head_dim}-page{page_size}-{dtype}")
    for name, head_dim, page_size, dtype in [
        ("MHA", 64, 16, torch.float32),
        ("GQA", 64, 8, torch.float32),
        ("GQA", 128, 32, torch.float32),
        ("MQA", 80, 16, torch.float32),
        ("GQA", 96, 64, torch.float32),
        ("MQA", 20, 1, torch.float32),
        ("MHA", 7, 1024, torch.float32),
        ("GQA", 64, 16, torch.bfloat16),
    ]
]


@pytest.mark.parametrize("kernel", ["reference", "paged"])
@pytest.mark.parametrize("window", [None, 1, 5, 64])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "page_size", "dtype"), SHAPES)
def test_decode(heads, kv_heads, head_dim, page_size, dtype, window, kernel) -> None:
    case = Case(heads, kv_heads, head_dim, page_size, dtype, seed=head_dim)
    requests = np.random.default_rng(0).permutation(len(LENGTHS)).tolist()
    halves = [requests[:4], requests[4:]]
    # A prefill segment stands behind the decode rows and padding behind both: neither may be written.
    pieces = [[Piece(r, LENGTHS[r] - 1, [0], decode=True) for r in half] for half in halves]
    pieces[0].append(Piece(9, 0, [0] * 3))
    host = dense_batch(pieces, case.pages, padding=2)
    op = DecodeAttention("decode_attention", "qkv", "attention", heads, kv_heads, head_dim, [3, window])
    for nano_batch, members in ((0, [0]), (1, [1]), (None, [0, 1])):
        buffers = case.buffers(host.rows)
        for rows in host.nano_batches:
            buffers["qkv"][rows.end - rows.padding : rows.end] = torch.nan
        case.run(op, kernel, host, nano_batch, buffers)
        written = torch.zeros(host.rows, dtype=torch.bool)
        for member in members:
            for offset, request in enumerate(halves[member]):
                row = host.nano_batches[member].start + offset
                written[row] = True
                q_THD = buffers["qkv"][row : row + 1, : heads * head_dim].view(1, heads, head_dim)
                wanted = case.expected(request, q_THD, LENGTHS[request], window)
                check(buffers["attention"][row].view(1, heads, head_dim), wanted)
        assert (buffers["attention"][~written] == -77).all(), "rows that are not the operation's were written"


@pytest.mark.parametrize("kernel", ["reference", "gathered"])
@pytest.mark.parametrize("window", [None, 1, 5, 64])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "page_size", "dtype"), SHAPES)
def test_prefill(heads, kv_heads, head_dim, page_size, dtype, window, kernel) -> None:
    case = Case(heads, kv_heads, head_dim, page_size, dtype, seed=head_dim + 1)
    # Whole prompts, a middle piece, a last piece, one row; request 7 straddles both nano-batches.
    spans = [[(3, 0, 8), (6, 10, 64), (7, 20, 50)], [(7, 50, 77), (8, 0, 150), (9, 299, 300), (0, 0, 1)]]
    pieces = [[Piece(r, first, [0] * (last - first)) for r, first, last in half] for half in spans]
    pieces[1].append(Piece(2, LENGTHS[2] - 1, [0], decode=True))
    host = dense_batch(pieces, case.pages, padding=3)
    op = PrefillAttention("prefill_attention", "qkv", "attention", heads, kv_heads, head_dim, [3, window])
    starts = iter(host.prefill_rows.tolist())
    first_rows = [[next(starts) for _ in half] for half in spans]
    for nano_batch, members in ((0, [0]), (1, [1]), (None, [0, 1])):
        buffers = case.buffers(host.rows)
        for rows in host.nano_batches:
            buffers["qkv"][rows.end - rows.padding : rows.end] = torch.nan
        case.run(op, kernel, host, nano_batch, buffers)
        written = torch.zeros(host.rows, dtype=torch.bool)
        for member in members:
            for start, (request, first, last) in zip(first_rows[member], spans[member], strict=True):
                rows = slice(start, start + last - first)
                written[rows] = True
                q_THD = buffers["qkv"][rows, : heads * head_dim].view(-1, heads, head_dim)
                found = buffers["attention"][rows].view(-1, heads, head_dim)
                check(found, case.expected(request, q_THD, last, window))
        assert (buffers["attention"][~written] == -77).all(), "rows that are not the operation's were written"


def test_blocks_follow_the_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    from nanoflow.ops import attention_cpu

    assert attention_cpu._pages_per_block(np.array([1, 1, 1]), 16) == 1
    assert attention_cpu._pages_per_block(np.array([24] * 9), 16) == 24
    assert attention_cpu._pages_per_block(np.array([1] * 99 + [200]), 16) < 8
    assert attention_cpu._pages_per_block(np.array([3]), 4096) == 1
    # However little is gathered at a time, the result is the same.
    case = Case(6, 2, 64, 16, torch.float32, seed=0)
    host = dense_batch([[Piece(r, n - 1, [0], decode=True) for r, n in enumerate(LENGTHS)]], case.pages)
    op = DecodeAttention("decode_attention", "qkv", "attention", 6, 2, 64, [None, None])
    buffers = case.buffers(host.rows)
    found = []
    for size in (1, 100_000, 1 << 30):
        monkeypatch.setattr(attention_cpu, "GATHER_BYTES", size)
        case.run(op, "paged", host, None, buffers)
        found.append(buffers["attention"].clone())
    for one, other in pairwise(found):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_heads_must_divide() -> None:
    with pytest.raises(ValueError, match="5 query heads do not divide over 2"):
        DecodeAttention("decode_attention", "qkv", "attention", 5, 2, 64, [None])
