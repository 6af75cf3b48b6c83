"""Prefill attention's kernel compiles for every GPU generation without a GPU, and its tiles fit their registers."""

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from nanoflow.ops.prefill_attention_triton import (  # noqa: E402
    default_tile,
    kernel_constants,
    prefill_attention_kernel,
)
from nanoflow.ops.prefill_work import PrefillTile  # noqa: E402

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


def compiled(tile: PrefillTile, capability: int, head_dim: int, page: int, window: int | None, dtype: torch.dtype):
    constants = kernel_constants(
        tile, heads=32, kv_heads=8, head_dim=head_dim, page_size=page, window=window, itemsize=dtype.itemsize
    )
    names = prefill_attention_kernel.arg_names
    signature = dict.fromkeys(names, "constexpr")
    pointers = {"q": f"*{TYPES[dtype]}", "kv": f"*{TYPES[dtype]}", "out": f"*{TYPES[dtype]}"}
    strides = {"q_stride": "i32", "out_stride": "i32", "pages_stride": "i32"}
    signature.update({**pointers, "pages": "*i32", "work": "*i32", **strides, "scale": "fp32"})
    if tile.tma:
        signature["kv_rows"] = f"tensordesc<{TYPES[dtype]}[{tile.block_n},{constants['BLOCK_D']}]>"
    else:
        constants["kv_rows"] = None
    aligned = ("q", "kv", "out", "pages", "work", "q_stride", "out_stride")
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    return triton.compile(
        ASTSource(prefill_attention_kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
    )


@pytest.mark.parametrize(
    ("capability", "head_dim", "page", "window", "dtype"),
    [
        (80, 128, 128, None, torch.bfloat16),
        (80, 64, 16, 100, torch.float16),
        (90, 128, 128, None, torch.bfloat16),
        (90, 128, 128, 4096, torch.bfloat16),
        (90, 80, 64, None, torch.float16),
        (90, 96, 16, None, torch.bfloat16),
        (90, 256, 128, None, torch.bfloat16),
        (90, 64, 64, None, torch.float32),
        (90, 256, 64, None, torch.float32),
        (100, 128, 128, None, torch.bfloat16),
    ],
)
def test_default_tiles_compile(capability, head_dim, page, window, dtype) -> None:
    tile = default_tile(head_dim, dtype.itemsize, page, divmod(capability, 10))
    assert tile.tma == (capability == 90 and page >= 64 and dtype.itemsize == 2)
    kernel = compiled(tile, capability, head_dim, page, window, dtype)
    assert kernel.metadata.shared <= SHARED[capability]
    if tile.tma:
        assert "cp.async.bulk.tensor" in kernel.asm["ptx"] and "wgmma" in kernel.asm["ptx"]
