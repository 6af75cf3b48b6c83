"""The Triton decode attention through the interpreter, against a float64 softmax, on scattered pages."""

import numpy as np
import pytest
import torch

from nanoflow.ops.attention import DecodeAttention
from nanoflow.ops.decode_attention_triton import (
    DecodeConfig,
    DecodeWorkspace,
    block_tokens_for,
    decode_attention,
    paged_decode_triton,
)
from nanoflow.ops.decode_list_triton import COLUMNS, decode_segments, list_blocks, pages_in_a_row
from nanoflow.ops.decode_work import FIELDS, HEADER, decode_work
from nanoflow.ops.device_batch import DeviceBatch
from nanoflow.ops.operation import NanoContext
from tests.unit.ops_harness import CPU, Piece, dense_batch
from tests.unit.test_ops_attention import HEADS, LENGTHS, Case, check


def case_of(name: str, head_dim: int, page_size: int, tma: bool, dtype: torch.dtype = torch.float32) -> Case:
    case = Case(*HEADS[name], head_dim, page_size, dtype, seed=head_dim)
    if tma:
        # Reads whole blocks; what a segment does not see of them must be finite.
        case.kv.nan_to_num_(1e4)
    else:
        # Reads nothing unseen.
        for request, length in enumerate(LENGTHS):
            page = case.kv[int(case.pages.table[request, (length - 1) // page_size])]
            page[:, :, (length - 1) % page_size + 1 :] = torch.nan
    return case


def run_and_check(case: Case, window: int | None, config: DecodeConfig, sms: int, tolerance: float = 2e-5) -> None:
    heads, kv_heads, head_dim = case.sizes
    requests = np.random.default_rng(0).permutation(len(LENGTHS)).tolist()
    halves = [requests[:4], requests[4:]]
    pieces = [[Piece(r, LENGTHS[r] - 1, [0], decode=True) for r in half] for half in halves]
    pieces[0].append(Piece(9, 0, [0] * 3))
    host = dense_batch(pieces, case.pages, padding=2)
    batch = DeviceBatch(host, CPU, case.pages.page_size)
    op = DecodeAttention("decode_attention", "qkv", "attention", heads, kv_heads, head_dim, [3, window])
    buffers = case.buffers(host.rows)
    for _ in range(2 if window else 1):  # the second launch finds the workspace as the first left it
        buffers["attention"].fill_(-77)
        context = NanoContext(batch, batch.part(1), 1, buffers, {}, case.kv, sms=sms)
        paged_decode_triton(context, op.queries(context), op.output(context), op.scale, window, config=config)
        written = torch.zeros(host.rows, dtype=torch.bool)
        for offset, request in enumerate(halves[1]):
            row = host.nano_batches[1].start + offset
            written[row] = True
            q_THD = buffers["qkv"][row : row + 1, : heads * head_dim].view(1, heads, head_dim)
            found = buffers["attention"][row].view(1, heads, head_dim)
            assert not found.isnan().any()
            wanted = case.expected(request, q_THD, LENGTHS[request], window)
            torch.testing.assert_close(found.double(), wanted, atol=tolerance, rtol=tolerance)
        assert (buffers["attention"][~written] == -77).all()


@pytest.mark.parametrize(
    ("name", "head_dim", "page_size", "sms", "window", "tma"),
    [
        ("GQA", 64, 32, 1, None, True),
        ("GQA", 64, 32, 7, 5, False),
        ("GQA", 64, 32, 41, None, True),
        ("MHA", 80, 16, 7, 40, True),
        ("MHA", 80, 16, 7, None, False),
        ("MQA", 128, 64, 7, None, True),
        ("MQA", 128, 64, 100, None, False),  # more programs than blocks
        ("MQA", 128, 64, 100, 20, True),
    ],
)
def test_decode(name, head_dim, page_size, sms, window, tma) -> None:
    config = DecodeConfig(block_tokens=16, stages=2, warps=4, programs_per_sm=1, tma=tma)
    run_and_check(case_of(name, head_dim, page_size, tma), window, config, sms)


@pytest.mark.parametrize(
    ("name", "head_dim", "page_size"), [("GQA", 96, 64), ("MQA", 20, 2), ("MHA", 7, 1024), ("GQA", 256, 24)]
)
def test_any_head_size_and_page_size(name, head_dim, page_size) -> None:
    config = DecodeConfig(block_tokens_for(page_size, 64), stages=2, warps=4, programs_per_sm=3, tma=False)
    run_and_check(case_of(name, head_dim, page_size, False), 64, config, sms=3)


def test_float16() -> None:
    config = DecodeConfig(block_tokens=32, stages=2, warps=4, programs_per_sm=2, tma=True)
    run_and_check(case_of("GQA", 128, 32, True, torch.float16), None, config, sms=5, tolerance=2e-3)


def test_the_operation_picks_the_kernel_and_its_config() -> None:
    case = case_of("GQA", 64, 16, False)
    host = dense_batch([[Piece(r, LENGTHS[r] - 1, [0], decode=True) for r in (1, 6, 8)]], case.pages)
    op = DecodeAttention("decode_attention", "qkv", "attention", *case.sizes, [None, None])
    assert op.preferred_kernel(torch.device("cuda"), torch.bfloat16) == "triton"
    buffers = case.buffers(host.rows)
    case.run(op, "triton", host, None, buffers)
    heads, _, head_dim = case.sizes
    for row, request in enumerate((1, 6, 8)):
        q_THD = buffers["qkv"][row : row + 1, : heads * head_dim].view(1, heads, head_dim)
        wanted = case.expected(request, q_THD, LENGTHS[request], None)
        check(buffers["attention"][row].view(1, heads, head_dim), wanted)


def test_one_launch_serves_any_work_list_of_its_capacity() -> None:
    """The same buffers, refilled in place, as a captured graph has them; the last list is empty."""
    case = case_of("GQA", 64, 16, True)
    heads, kv_heads, head_dim = case.sizes
    config = DecodeConfig(block_tokens=16, stages=2, warps=4, programs_per_sm=1, tma=True)
    workspace = DecodeWorkspace(5, heads // kv_heads, head_dim, CPU)
    work = torch.zeros(HEADER + FIELDS * 100, dtype=torch.int32)
    q_THD = torch.randn(len(LENGTHS), heads, head_dim)
    out_THD = torch.empty_like(q_THD)
    for requests in ([0, 3, 9], [9], [1, 2, 4, 5, 6, 7, 8], []):
        rows = np.array(requests, np.int32)
        lengths = np.array(LENGTHS, np.int32)[rows]
        listed = decode_work(rows, lengths, case.pages.table[rows], page_size=16, block_tokens=16, capacity=100)
        work.copy_(torch.from_numpy(listed))
        out_THD.fill_(-77)
        decode_attention(q_THD, case.kv, out_THD, work, workspace, scale=head_dim**-0.5, config=config)
        for request in range(len(LENGTHS)):
            if request in requests:
                wanted = case.expected(request, q_THD[request : request + 1], LENGTHS[request], None)
                check(out_THD[request : request + 1], wanted)
            else:
                assert (out_THD[request] == -77).all()
        assert not workspace.arrived.any()


def test_the_list_made_on_the_device_is_that_of_the_host() -> None:
    rng = np.random.default_rng(4)
    for page_size, block, window in ((16, 8, None), (64, 16, 50), (32, 32, 1), (128, 32, None), (64, 8, 300)):
        for count in (5, 0, 1, 12):
            lengths = rng.integers(1, 700, count).astype(np.int32)
            table = rng.integers(1, 5000, (count, -(-700 // page_size))).astype(np.int32)
            rows = np.sort(rng.choice(100, count, replace=False)).astype(np.int32)
            sizes = {"page_size": page_size, "block_tokens": block, "window": window}
            wanted = decode_work(rows, lengths, table, capacity=2000, **sizes)
            room = torch.full((16, COLUMNS), 77, dtype=torch.int32)
            made = torch.from_numpy(decode_segments(rows, lengths, **sizes))
            room[: len(made)] = made
            pages = torch.from_numpy(pages_in_a_row(lengths, table, page_size))
            work = torch.full((HEADER + FIELDS * 2000,), -5, dtype=torch.int32)
            list_blocks(room, pages, work, **sizes)
            total = int(wanted[0])
            assert int(work[0]) == total
            found = work[HEADER:].view(FIELDS, 2000)
            assert (found[:, :total].numpy() == wanted[HEADER:].reshape(FIELDS, 2000)[:, :total]).all()
            assert (found[:, total:] == -5).all()
