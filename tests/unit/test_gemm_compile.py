"""The Triton GEMM compiles for sm_80, sm_90 and sm_100 without a GPU; for sm_90 within an SM's memory and registers."""

import re
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nanoflow.ops import gemm_triton
from nanoflow.ops.gemm_config import AMPERE, SILU_TILES, SINGLE, SMALL, TILES, GemmConfig

SHARED = 227 * 1024
TWO_CTAS = 113 * 1024


def compiled(
    config: GemmConfig, capability: int = 90, *, dtype: str = "bf16", silu: bool = False, bias: bool = False
) -> triton.compiler.CompiledKernel:
    """The kernel as `launch` would ask for it, for aligned sizes."""
    extra = config.block_n if silu else config.extra_n
    part = config.block_n // config.epilogue_parts
    kernel = gemm_triton._split_gemm if config.split else gemm_triton._tile_gemm
    tma = capability >= 90
    blocks = {
        "x": (config.block_m, config.block_k),
        "w": (config.block_n, config.block_k),
        "w_extra": (extra or config.block_n, config.block_k),
        "out": (config.block_m, part),
        "out_extra": (config.block_m, config.extra_n or part),
    }
    types = {name: f"tensordesc<{dtype}[{a},{b}]>" if tma else f"*{dtype}" for name, (a, b) in blocks.items()}
    types |= {"bias": f"*{dtype}", "partials": "*fp32", "arrived": "*i32"}
    constants = {
        "BM": config.block_m,
        "BN": config.block_n,
        "BX": extra,
        "BK": config.block_k,
        "GROUP_M": config.group_m,
        "PARTS": config.epilogue_parts,
        "BIAS": bias,
        "SILU": silu,
        "TMA": tma,
        "PRECISION": "ieee",
        "FLATTEN": config.flatten,
        "PDL": tma,
        "WARPS": min(config.warps, config.block_m // 16),
    }
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    aligned = {"N", "K", "stride_x", "stride_w", "stride_out", "bias", "partials", *(() if tma else blocks)}
    at = {name: (kernel.arg_names.index(name),) for name in kernel.arg_names}
    source = ASTSource(
        kernel,
        signature,
        {at[name]: value for name, value in constants.items() if name in at},
        {at[name]: [["tt.divisibility", 16]] for name in aligned if name in at},
    )
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(kernel: triton.compiler.CompiledKernel, folder: Path) -> tuple[int, int]:
    """Registers a thread, and its bytes of local memory: what ptxas spilled."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    shown = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", shown)
    assert found, shown
    return int(found[1]), int(found[2])


@pytest.mark.parametrize(
    ("config", "silu"),
    [(c, False) for c in (*TILES, SMALL)] + [(c, True) for c in (*SILU_TILES, SMALL)],
    ids=str,
)
def test_every_config_for_hopper_uses_its_tensor_cores_and_spills_nothing(
    config: GemmConfig, silu: bool, tmp_path: Path
) -> None:
    kernel = compiled(config, silu=silu)
    assert kernel.metadata.shared <= (TWO_CTAS if config.ctas_per_sm == 2 else SHARED)
    assert "wgmma.mma_async" in kernel.asm["ptx"]
    assert "cp.async.bulk.tensor" in kernel.asm["ptx"]
    assert resources(kernel, tmp_path)[1] == 0


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("split", [False, True])
def test_other_dtypes_and_gpus(capability: int, split: bool) -> None:
    for dtype, base in (("fp16", AMPERE), ("bf16", AMPERE), ("fp32", SINGLE)):
        config = GemmConfig(**{**base.to_dict(), "split": split})
        kernel = compiled(config, capability, dtype=dtype, bias=True)
        assert kernel.metadata.shared <= (SHARED if capability >= 90 else 163 * 1024)
    assert compiled(SINGLE, capability, dtype="fp32").asm["ptx"].count("tf32") == 0
