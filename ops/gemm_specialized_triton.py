"""Triton GEMM for Hopper whose warps share the work out: some only load, two groups of four multiply half a tile each.

The loads of a CTA's next tile run on while the last one is stored. Triton splits the tile between the groups itself,
which works with descriptors made inside the kernel only, so this kernel makes its own: plain ``out = x @ w.T``, all
addresses and rows in multiples of 16 bytes, `warps` four.

Shape legend: M rows, N output columns, K input columns.
"""

import torch
import triton
import triton.language as tl

from nanoflow.ops.gemm_config import GemmConfig
from nanoflow.ops.gemm_triton import _place

__all__ = ["launch_specialized"]


@triton.jit(do_not_specialize=["M", "tiles_m", "tiles_n"])
def _specialized_gemm(
    x, w, out, M, N, K, stride_x, stride_w, stride_out, tiles_m, tiles_n,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    x_blocks = tl.make_tensor_descriptor(x, [M, K], [stride_x, 1], [BM, BK])
    w_blocks = tl.make_tensor_descriptor(w, [N, K], [stride_w, 1], [BN, BK])
    out_blocks = tl.make_tensor_descriptor(out, [M, N], [stride_out, 1], [BM, BN])
    steps = tl.cdiv(K, BK)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), warp_specialize=True):
        tile_m, tile_n = _place(tile, tiles_m, tiles_n, GROUP_M)
        row = tile_m * BM
        column = tile_n * BN
        total = tl.zeros((BM, BN), dtype=tl.float32)
        for step in range(0, steps):
            x_block = x_blocks.load([row, step * BK])
            w_block = w_blocks.load([column, step * BK])
            total = tl.dot(x_block, w_block.T, total)
        out_blocks.store([row, column], total.to(out.dtype.element_ty))


def _descriptor_memory(nbytes: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Where a launch keeps its CTAs' descriptors (torch aligns to 512 bytes)."""
    return torch.empty(nbytes, dtype=torch.int8, device="cuda")


def launch_specialized(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor, config: GemmConfig, *, sms: int) -> None:
    """``out = x @ w.T`` for 16-bit x [M, K], w [N, K], out [M, N]."""
    rows, inputs = x.shape
    columns = w.shape[0]
    tiles_m, tiles_n = config.tiles(rows, columns)
    triton.set_allocator(_descriptor_memory)
    _specialized_gemm[(min(tiles_m * tiles_n, sms),)](
        x, w, out, rows, columns, inputs, x.stride(0), w.stride(0), out.stride(0), tiles_m, tiles_n,
        BM=config.block_m, BN=config.block_n, BK=config.block_k, GROUP_M=config.group_m,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
