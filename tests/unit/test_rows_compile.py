"""The element-wise and sampling kernels compile for sm_80, sm_90 and sm_100, without a GPU and without spills.

Compiling needs no GPU, but a process in which the interpreter was not chosen.
"""

import re

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from nanoflow.ops import elementwise_triton, norm_triton, rope_triton, sampling_triton  # noqa: E402

VOCAB = 128256
ROPE = {
    "HEADS": 32, "KV_HEADS": 8, "HEAD_DIM": 128, "HALF": 64, "PAGE_SIZE": 128, "HEADS_BLOCK": 16, "HALF_BLOCK": 64,
    "REST_BLOCK": 1,
}  # fmt: skip
ROPE_ARGUMENTS = {
    "qkv": "*T", "qkv_stride": "i32", "cosines": "*fp32", "sines": "*fp32", "q_weight": "*T", "k_weight": "*T",
    "eps": "fp32", "kv": "*T", "kv_index": "*i64", "page_stride": "i32", "kind_stride": "i32", "head_stride": "i32",
}  # fmt: skip
PREPARE_ARGUMENTS = {
    "logits": "*T", "stride": "i32", "rows": "*i32", "prompt": "*u8", "output": "*i32", "masks": "*i32",
    "work": "*fp32", "values": "*fp32", "tokens": "*i32",
}  # fmt: skip
PARTS = {"VOCAB": VOCAB, "PARTS": 4, "TILES": 8}
KERNELS = {
    "silu_mul": (
        elementwise_triton.silu_mul_kernel,
        {"source": "*T", "out": "*T", "source_stride": "i32", "out_stride": "i32"},
        {"COLUMNS": 14336, "BLOCK": 2048},
        4,
    ),
    "add": (
        elementwise_triton.add_kernel,
        {"residual": "*T", "branch": "*T", "residual_stride": "i32", "branch_stride": "i32"},
        {"COLUMNS": 4096, "BLOCK": 2048},
        4,
    ),
    "gather": (
        elementwise_triton.gather_kernel,
        {"table": "*T", "index": "*i64", "last_tokens": "*i64", "slots": "*i64", "out": "*T"}
        | {"table_stride": "i32", "out_stride": "i32"},
        {"ON_DEVICE": True, "COLUMNS": 4096, "BLOCK": 2048},
        4,
    ),
    "add_norm": (
        norm_triton.norm_kernel,
        {"source": "*T", "branch": "*T", "weight": "*T", "out": "*T"}
        | {"source_stride": "i32", "branch_stride": "i32", "out_stride": "i32", "eps": "fp32"},
        {"ADD": True, "COLUMNS": 4096, "BLOCK": 4096},
        4,
    ),
    "rope_append": (
        rope_triton.qkv_kernel,
        ROPE_ARGUMENTS,
        {"NORM": False, "ROTATE": True, "APPEND": True, "FIRST": 0, "LAST": 48, **ROPE},
        4,
    ),
    "qk_norm_rope_append": (
        rope_triton.qkv_kernel,
        ROPE_ARGUMENTS,
        {"NORM": True, "ROTATE": True, "APPEND": True, "FIRST": 0, "LAST": 48, **ROPE},
        4,
    ),
    "argmax": (
        sampling_triton.argmax_kernel,
        {"logits": "*T", "stride": "i32", "values": "*fp32", "tokens": "*i32", "out": "*i64"},
        {**PARTS, "BLOCK": 4096},
        4,
    ),
    "join": (
        sampling_triton.join_kernel,
        {"values": "*fp32", "tokens": "*i32", "out": "*i64"},
        {"PARTS": 4, "BLOCK": 4},
        1,
    ),
    "prepare": (
        sampling_triton.prepare_kernel,
        PREPARE_ARGUMENTS,
        {"MASKED": False, **PARTS, "TILES": 32, "BLOCK": 1024},
        4,
    ),
    "prepare_masked": (
        sampling_triton.prepare_kernel,
        PREPARE_ARGUMENTS,
        {"MASKED": True, **PARTS, "TILES": 32, "BLOCK": 1024},
        4,
    ),
    "draw": (
        sampling_triton.draw_kernel,
        {"rows": "*i32", "work": "*fp32", "values": "*fp32", "tokens": "*i32", "output": "*i32", "out": "*i64"},
        {"VOCAB": VOCAB, "PARTS": 4, "PARTS_BLOCK": 4, "SEARCH_BLOCK": 2048, "TILES": 32, "BLOCK": 4096}
        | {"STAGES": 3},
        16,
    ),
}


def compiled(name: str, capability: int, dtype: str = "bf16"):
    """The kernel for the sizes of Llama-3-8B; arguments are multiples of 16, as they are in a run."""
    kernel, arguments, constants, warps = KERNELS[name]
    if "PDL" in kernel.arg_names:
        constants = {**constants, "PDL": capability >= 90}
    signature = {argument: kind.replace("T", dtype) for argument, kind in arguments.items()}
    attributes = {
        (index,): [["tt.divisibility", 16]] for index, kind in enumerate(signature.values()) if kind != "fp32"
    }
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", KERNELS)
def test_compiles(name: str, capability: int) -> None:
    kernel = compiled(name, capability)
    ptx = kernel.asm["ptx"]
    if "PDL" in KERNELS[name][0].arg_names:
        assert ptx.count("griddepcontrol.wait") == (1 if capability >= 90 else 0)
    if name in ("silu_mul", "add", "gather", "add_norm", "rope_append", "argmax"):
        assert re.search(r"ld\.global[\w.:]*\.v4\.b32", ptx), "accesses are not 16 bytes wide"
    assert ".local" not in ptx, "an array went to local memory"
    assert kernel.metadata.shared <= 48 * 1024


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("name", ["silu_mul", "add_norm", "qk_norm_rope_append", "argmax", "prepare"])
def test_other_types_compile(name: str, dtype: str) -> None:
    assert compiled(name, 90, dtype).asm["cubin"]
