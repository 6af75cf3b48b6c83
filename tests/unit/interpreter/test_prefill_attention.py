"""Prefill attention's Triton kernel through the interpreter, on the cases of the CPU kernels and on odd ones."""

import numpy as np
import pytest
import torch

from nanoflow.ops.attention import PrefillAttention
from nanoflow.ops.device_batch import DeviceBatch
from nanoflow.ops.operation import NanoContext
from nanoflow.ops.prefill_attention_triton import prefill_attention, run_prefill_attention
from nanoflow.ops.prefill_work import PrefillTile, prefill_work
from tests.unit.ops_harness import CPU, Piece, dense_batch
from tests.unit.test_ops_attention import LENGTHS, Case

POINTERS = PrefillTile(32, 16, warps=4, stages=2)
UNPACKED = PrefillTile(16, 32, warps=4, stages=2, pack=1)
TMA = PrefillTile(32, 16, warps=4, stages=2, tma=True)
TMA_32 = PrefillTile(64, 32, warps=4, stages=2, tma=True)
F32, F16 = torch.float32, torch.float16

CASES = {
    "default": (6, 2, 64, 8, F32, None, None),
    "default-window": (6, 2, 64, 8, F32, 64, None),
    "whole-pages": (4, 4, 32, 32, F32, None, POINTERS),
    "blocks-over-pages": (6, 2, 32, 8, F32, None, POINTERS),
    "window-1": (6, 2, 32, 8, F32, 1, POINTERS),
    "window-5": (4, 2, 32, 16, F32, 5, POINTERS),
    "window-64": (4, 2, 32, 32, F32, 64, POINTERS),
    "heads-apart": (4, 2, 32, 32, F32, None, UNPACKED),
    "head-80": (5, 1, 80, 16, F32, None, POINTERS),
    "head-7-pages-of-1": (3, 1, 7, 1, F32, 64, POINTERS),
    "tma": (4, 2, 64, 32, F16, None, TMA),
    "tma-head-80-window": (4, 2, 80, 16, F16, 20, TMA),
    "tma-blocks-of-32": (6, 2, 64, 32, F16, 64, TMA_32),
}


@pytest.mark.parametrize("name", CASES)
def test_against_float64(name: str) -> None:
    heads, kv_heads, head_dim, page_size, dtype, window, tile = CASES[name]
    case = Case(heads, kv_heads, head_dim, page_size, dtype, seed=head_dim + 1)
    # Whole prompts, a middle piece, a last piece, one row; request 7 straddles both nano-batches.
    spans = [[(3, 0, 8), (6, 10, 64), (7, 20, 50)], [(7, 50, 77), (8, 0, 150), (9, 299, 300), (0, 0, 1)]]
    pieces = [[Piece(r, first, [0] * (last - first)) for r, first, last in half] for half in spans]
    pieces[1].append(Piece(2, LENGTHS[2] - 1, [0], decode=True))
    host = dense_batch(pieces, case.pages, padding=3)
    op = PrefillAttention("prefill_attention", "qkv", "attention", heads, kv_heads, head_dim, [3, window])
    starts = iter(host.prefill_rows.tolist())
    first_rows = [[next(starts) for _ in half] for half in spans]
    batch = DeviceBatch(host, CPU, page_size)
    for nano_batch, members in ((0, [0]), (None, [0, 1])):
        buffers = case.buffers(host.rows)
        for rows in host.nano_batches:
            buffers["qkv"][rows.end - rows.padding : rows.end] = torch.nan
        context = NanoContext(batch, batch.part(nano_batch), 1, buffers, {}, case.kv)
        if tile is None:
            op.kernels["triton"](context)
        else:
            run_prefill_attention(context, op.queries(context), op.output(context), op.scale, window, tile)
        written = torch.zeros(host.rows, dtype=torch.bool)
        for member in members:
            for start, (request, first, last) in zip(first_rows[member], spans[member], strict=True):
                rows = slice(start, start + last - first)
                written[rows] = True
                q_THD = buffers["qkv"][rows, : heads * head_dim].view(-1, heads, head_dim)
                found = buffers["attention"][rows].view(-1, heads, head_dim)
                tolerance = 2e-5 if dtype == F32 else 4e-3
                wanted = case.expected(request, q_THD, last, window)
                torch.testing.assert_close(found.double(), wanted, atol=tolerance, rtol=tolerance)
        assert (buffers["attention"][~written] == -77).all(), "rows that are not the operation's were written"


def test_a_list_with_room_to_spare_and_one_emptied() -> None:
    """What a captured graph sees: a list of fixed size whose contents change between launches."""
    torch.manual_seed(0)
    tile, heads, kv_heads, head_dim = PrefillTile(16, 16, warps=4, stages=1), 4, 2, 16
    kv = torch.randn(4, 2, kv_heads, 16, head_dim)
    q, out = torch.randn(20, heads, head_dim), torch.full((20, heads, head_dim), torch.nan)
    pages = torch.tensor([[3, 1]], dtype=torch.int32)
    work = prefill_work(
        np.array([2]), np.array([17]), np.array([20]), tile,
        heads=heads, kv_heads=kv_heads, kv_token_bytes=128, capacity=50,
    )  # fmt: skip
    work[1 + work[0, 0] :] = 1 << 20  # never read
    items = torch.from_numpy(work)
    prefill_attention(q, kv, pages, items, out, tile=tile, scale=0.25)
    assert out[2:19].isfinite().all() and out[:2].isnan().all() and out[19:].isnan().all()
    items[0, 0] = 0
    out.fill_(torch.nan)
    prefill_attention(q, kv, pages, items, out, tile=tile, scale=0.25)
    assert out.isnan().all()


def test_a_tile_with_tma_that_does_not_fit_is_refused() -> None:
    kv, q = torch.zeros(2, 2, 1, 8, 64, dtype=F16), torch.zeros(4, 1, 64, dtype=F16)
    pages, work = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(2, 8, dtype=torch.int32)
    with pytest.raises(ValueError, match="pages of a multiple of 16 tokens"):
        prefill_attention(q, kv, pages, work, q.clone(), tile=TMA, scale=1.0)
