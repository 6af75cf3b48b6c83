"""The Triton decode attention compiles for several GPUs without one, within a GPU's registers and shared memory; its
work list says what it should."""

from pathlib import Path

import numpy as np
import pytest
import torch

from nanoflow.ops.decode_work import FIELDS, HEADER, decode_blocks, decode_work

triton = pytest.importorskip("triton")

NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


def compiled(
    target: int, heads: int, kv_heads: int, head_dim: int, page_size: int, dtype: torch.dtype, sms: int | None = None
):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from nanoflow.ops.decode_attention_triton import _decode_kernel, decode_config, kernel_constants

    config = decode_config(page_size, head_dim, dtype, divmod(target, 10), heads // kv_heads, sms)
    constants = kernel_constants(heads, kv_heads, head_dim, page_size, config)
    name = NAMES[dtype]
    signature = dict.fromkeys(("q", "kv", "out"), f"*{name}")
    signature |= dict.fromkeys(("pieces", "maxima", "sums"), "*fp32")
    signature |= dict.fromkeys(("work", "arrived"), "*i32")
    signature |= dict.fromkeys(("capacity", "q_stride", "out_stride"), "i32")
    signature["scale"] = "fp32"
    if config.tma:
        signature["kv"] = f"tensordesc<{name}[{config.block_tokens}, {constants['DP']}]>"
    signature |= dict.fromkeys(constants, "constexpr")
    arguments = _decode_kernel.arg_names
    aligned = [*(key for key in signature if signature[key].startswith("*")), "q_stride", "out_stride"]
    attributes = {(arguments.index(key),): [["tt.divisibility", 16]] for key in aligned}
    source = ASTSource(_decode_kernel, {key: signature[key] for key in arguments}, constants, attributes)
    options = {"num_warps": config.warps, "num_stages": config.stages, "maxnreg": config.max_registers}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options), config


@pytest.mark.parametrize(
    ("target", "heads", "kv_heads", "head_dim", "page_size", "dtype"),
    [
        (80, 32, 8, 128, 128, torch.bfloat16),
        (80, 4, 4, 64, 16, torch.float32),
        (90, 32, 8, 128, 128, torch.bfloat16),
        (90, 64, 8, 128, 64, torch.bfloat16),
        (90, 32, 32, 80, 64, torch.float16),
        (90, 9, 3, 64, 16, torch.float32),
        (90, 8, 1, 256, 64, torch.bfloat16),
        (100, 32, 8, 128, 128, torch.bfloat16),
        (100, 14, 2, 64, 48, torch.bfloat16),
    ],
)
def test_compiles(target, heads, kv_heads, head_dim, page_size, dtype) -> None:
    kernel, config = compiled(target, heads, kv_heads, head_dim, page_size, dtype)
    assert kernel.metadata.shared <= SHARED_MEMORY[target]
    if dtype == torch.bfloat16 and head_dim == 128 and target == 90:
        # Keys and values are pipelined, and all programs of an SM fit into its shared memory side by side.
        block = 2 * config.block_tokens * head_dim * 2
        assert kernel.metadata.shared >= (config.stages - 1) * block
        assert config.programs_per_sm * (kernel.metadata.shared + 1024) <= 228 << 10
        assert "cp.async.bulk.tensor" in kernel.asm["ptx"]


@pytest.mark.parametrize("sms", [None, 40])
def test_the_programs_of_an_sm_run_side_by_side_and_fill_it(sms: int | None, tmp_path: Path) -> None:
    from tests.unit.test_gemm_compile import resources

    kernel, config = compiled(90, 32, 8, 128, 128, torch.bfloat16, sms)
    registers, local = resources(kernel, tmp_path)
    assert local == 0
    assert config.programs_per_sm * config.warps * 32 * -(-registers // 8) * 8 <= 65536
    assert config.programs_per_sm * (kernel.metadata.shared + 1024) <= 228 << 10
    # On a part of the SMs, the more has to be under way.
    under_way = config.programs_per_sm * (config.stages - 1) * 2 * config.block_tokens * 128 * 2
    assert under_way == (160 << 10 if sms else 128 << 10)


@pytest.mark.parametrize(("page_size", "head_dim"), [(64, 128), (32, 128), (128, 64), (64, 64), (16, 128), (128, 96)])
def test_a_part_of_the_sms_has_a_config_for_every_shape(page_size: int, head_dim: int) -> None:
    from nanoflow.ops.decode_attention_triton import decode_config

    for dtype in NAMES:
        for capability in ((8, 0), (9, 0), (10, 0)):
            few, many, whole = (decode_config(page_size, head_dim, dtype, capability, 4, sms) for sms in (32, 92, None))
            assert many == whole
            assert page_size % few.block_tokens == 0 and few.tma == whole.tma
            assert few.block_tokens == whole.block_tokens
            assert (few.warps == 1) == (few.tma and dtype != torch.float32)


@pytest.mark.parametrize("window", [None, 1, 20, 64])
def test_work_list(window) -> None:
    page_size, block = 16, 8
    context = np.array([1, 8, 9, 40, 64, 17], np.int32)
    rows = np.array([3, 4, 5, 9, 10, 11], np.int32)
    pages = np.random.default_rng(0).permutation(100)[: len(rows) * 4].reshape(-1, 4).astype(np.int32)
    work = decode_work(rows, context, pages, page_size=page_size, block_tokens=block, window=window, capacity=50)
    count = int(work[0])
    assert len(work) == HEADER + FIELDS * 50
    assert count == decode_blocks(context, block_tokens=block, window=window)
    blocks, row, span, done, remaining = work[HEADER:].reshape(FIELDS, 50)[:, :count]
    seen: dict[int, list[int]] = {int(r): [] for r in rows}
    for i in range(count):
        seen[int(row[i])] += [int(blocks[i]) * block + t for t in range(span[i] & 0xFFFF, span[i] >> 16)]
        same = np.flatnonzero(row == row[i])
        assert (done[i], remaining[i]) == (i - same[0], same[-1] - i)
    for segment, length in enumerate(context.tolist()):
        tokens = range(0 if window is None else max(0, length - window), length)
        wanted = [int(pages[segment, t // page_size]) * page_size + t % page_size for t in tokens]
        assert seen[int(rows[segment])] == wanted


def test_a_work_list_that_does_not_fit_is_refused() -> None:
    one = np.array([100], np.int32)
    with pytest.raises(ValueError, match="do not fit into a work list of 5"):
        decode_work(one, one, np.zeros((1, 7), np.int32), page_size=16, block_tokens=16, capacity=5)
    with pytest.raises(ValueError, match="do not divide pages of 24"):
        decode_work(one, one, np.zeros((1, 7), np.int32), page_size=24, block_tokens=16)


def test_an_unsupported_head_size_is_refused() -> None:
    from nanoflow.ops.decode_attention_triton import decode_config

    with pytest.raises(ValueError, match="head size 512 is not supported; the largest is 256"):
        decode_config(64, 512, torch.bfloat16, (9, 0))


@pytest.mark.parametrize("target", [80, 90, 100])
@pytest.mark.parametrize("window", [0, 300])
def test_the_list_of_blocks_compiles(target: int, window: int) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from nanoflow.ops.decode_list_triton import LANES, _list_kernel

    constants = {"PER_PAGE": 4, "B": 32, "WINDOW": window, "LANES": LANES}
    signature = dict.fromkeys(("segments", "pages", "work"), "*i32") | {"capacity": "i32"}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(_list_kernel, {name: signature[name] for name in _list_kernel.arg_names}, constants)
    kernel = triton.compile(source, target=GPUTarget("cuda", target, 32), options={"num_warps": 2})
    assert kernel.metadata.shared == 0 and "ld.global" in kernel.asm["ptx"]
