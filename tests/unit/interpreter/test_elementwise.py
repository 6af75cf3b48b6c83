"""The element-wise kernels through the interpreter, each against its operation's reference maths."""

import pytest
import torch

from nanoflow.ops import elementwise_triton
from nanoflow.ops.device_batch import DeviceBatch
from nanoflow.ops.elementwise import Add, SiluMul
from nanoflow.ops.embedding import Embedding
from nanoflow.ops.norm import AddNorm, Norm, QKNorm
from nanoflow.ops.operation import KV, NanoContext, Operation
from nanoflow.ops.rope import Append, Rope, RopeAppend, RopeConfig
from tests.unit.ops_harness import CPU, Pages, Piece, dense_batch

DTYPES = (torch.float32, torch.float16)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}
HEADS = {"gqa": (6, 2, 16, 16), "mha-80": (3, 3, 80, 80), "partial": (4, 1, 20, 12), "mqa": (17, 1, 8, 8)}


def run(op: Operation, columns: dict[str, int], dtype: torch.dtype, kv_heads: int = 1, head_dim: int = 4) -> None:
    """Runs both kernels of `op` on one nano-batch of two and compares every buffer and the whole cache."""
    torch.manual_seed(0)
    pages = Pages(page_size=4, requests=3, columns=3)
    pieces = [[Piece(0, 7, [5], decode=True), Piece(1, 2, [1, 2, 3, 4, 5])], [Piece(2, 0, [9, 8, 7])]]
    host = dense_batch(pieces, pages, padding=2)
    batch = DeviceBatch(host, CPU, pages.page_size)
    buffers = {name: torch.randn(host.rows + 3, count, dtype=dtype) for name, count in columns.items()}
    for access in op.accesses:
        if (
            access.write
            and access.buffer != KV
            and not any(a.buffer == access.buffer for a in op.accesses if not a.write)
        ):
            buffers[access.buffer].fill_(torch.nan)
    weights = {weight.name: torch.randn(weight.shape, dtype=dtype) for weight in op.weights}
    kv = torch.randn(pages.pool, 2, kv_heads, pages.page_size, head_dim, dtype=dtype)
    found = []
    for kernel in ("reference", "triton"):
        mine, cache = {name: buffer.clone() for name, buffer in buffers.items()}, kv.clone()
        for part in (batch.parts[1], batch.parts[0]):
            op.kernels[kernel](NanoContext(batch, part, 0, mine, weights, cache))
        # Padding rows of a nano-batch may write the same places of the reserved page.
        found.append([*mine.values(), cache[1:]])
    for expected, out in zip(*found, strict=True):
        torch.testing.assert_close(out, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype], equal_nan=True)
    assert not all(torch.equal(out, before) for out, before in zip(found[1], [*buffers.values(), kv[1:]], strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 100, 3000])
def test_rows(columns: int, dtype: torch.dtype) -> None:
    run(SiluMul("silu_mul", "source", "target", columns), {"source": 2 * columns, "target": columns}, dtype)
    run(Add("add", "residual", "branch", columns), {"residual": columns, "branch": columns}, dtype)
    norm = Norm("norm", "residual", "target", columns, 1e-5, "norm")
    run(norm, {"residual": columns, "target": columns}, dtype)
    fused = AddNorm("add_norm", "residual", "branch", norm)
    run(fused, {"residual": columns, "branch": columns, "target": columns}, dtype)
    run(Embedding("embed", "residual", 10, columns, "embed"), {"residual": columns}, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", HEADS)
def test_heads(sizes: str, dtype: torch.dtype) -> None:
    heads, kv_heads, head_dim, rotary_dim = HEADS[sizes]
    columns = {"qkv": (heads + 2 * kv_heads) * head_dim}
    norm = QKNorm("qk_norm", "qkv", heads, kv_heads, head_dim, 1e-5, "q", "k")
    rope = Rope("rope", "qkv", heads, kv_heads, head_dim, RopeConfig(rotary_dim))
    append = Append("append", "qkv", heads, kv_heads, head_dim)
    for op in (norm, rope, append, RopeAppend("rope_append", rope), RopeAppend("rope_append", rope, norm)):
        run(op, columns, dtype, kv_heads, head_dim)


def test_tokens_that_only_the_device_knows() -> None:
    table, out = torch.randn(50, 33), torch.full((4, 33), torch.nan)
    tokens, slots = torch.tensor([3, -1, 49, -1]), torch.tensor([9, 1, 9, 0])
    elementwise_triton.embed(table, tokens, torch.tensor([7, 8]), slots, out)
    assert torch.equal(out, table[[3, 8, 49, 7]])


def test_a_gather_of_int32_rows_from_wider_rows() -> None:
    table, out = torch.randn(50, 40)[:, :33], torch.full((3, 33), torch.nan)
    elementwise_triton.gather_rows(table, torch.tensor([49, 0, 7], dtype=torch.int32), out)
    assert torch.equal(out, table[[49, 0, 7]])
