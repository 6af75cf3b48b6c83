"""Triton GEMM: ``out = x @ w.T + bias``, and ``out = silu(x @ gate.T) * (x @ up.T)`` of a weight ``[gate | up]``.

Two persistent kernels share one tile's maths. Their grid is the SM budget times the CTAs an SM.

- `_tile_gemm` gives each CTA whole output tiles. It fits where the tiles fill the CTAs' last round.
- `_split_gemm` first cuts the tiles that would not fill whole rounds along K (see `GemmConfig.split_tiles`), then goes
  on with whole tiles. As in stream-K (Osama et al. 2023, arXiv 2301.03598) all CTAs get about the same number of steps;
  but pieces start at the same steps in all tiles, so that CTAs which share a block of x or w want it at the same
  time, while it is in L2. A tile's first piece is its owner's. The others write float32 partial sums to a workspace
  and count up. The owner adds them in a fixed order, so results do not change between runs, and clears the count, so
  that the workspace is ready for the next launch. Owners wait for CTAs that start before them only: no deadlock,
  whatever else runs on the GPU. Two launches that may overlap need two workspaces.

A tile is `block_m` rows by `block_n` + `extra_n` columns: two accumulators side by side, since Triton's own blocks are
powers of two and 160 or 192 columns often fill the GPU better. With SiLU the second accumulator holds `up`'s columns.

On sm_90 and later x, w and out go through TMA descriptors made on the host; elsewhere, and where an address or a row is
not a multiple of 16 bytes, through pointers.

Shape legend: M rows, N output columns, K input columns.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from nanoflow.ops.dependent_launch import dependent_launch, start_after_others
from nanoflow.ops.gemm_config import GemmConfig, Workspace

__all__ = ["launch"]


@triton.jit
def _place(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of a tile: down the rows of a group first, so that CTAs of one round share w's blocks in L2."""
    in_group = GROUP_M * tiles_n
    group = tile // in_group
    first_m = group * GROUP_M
    rows = min(tiles_m - first_m, GROUP_M)
    within = tile % in_group
    return first_m + within % rows, within // rows


@triton.jit
def _load(source, row, column, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):
    if TMA:
        block = source.load([row, column])
    else:
        at_row = row + tl.arange(0, ROWS)
        at_column = column + tl.arange(0, COLUMNS)
        inside = (at_row[:, None] < rows) & (at_column[None, :] < columns)
        block = tl.load(source + at_row[:, None].to(tl.int64) * stride + at_column[None, :], mask=inside, other=0.0)
    return block


@triton.jit
def _multiply(
    x, w, w_extra, row, column, extra, first, last, M, N, K, stride_x, stride_w,
    BM: tl.constexpr, BN: tl.constexpr, BX: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """K steps `first` to `last` - 1 of one tile, in float32."""
    sum_0 = tl.zeros((BM, BN), dtype=tl.float32)
    sum_1 = tl.zeros((BM, BX if BX else 1), dtype=tl.float32)
    for step in range(first, last):
        at = step * BK
        x_block = _load(x, row, at, M, K, stride_x, BM, BK, TMA)
        w_block = _load(w, column, at, N, K, stride_w, BN, BK, TMA)
        sum_0 = tl.dot(x_block, w_block.T, sum_0, input_precision=PRECISION)
        if BX:
            extra_block = _load(w_extra, extra, at, N, K, stride_w, BX, BK, TMA)
            sum_1 = tl.dot(x_block, extra_block.T, sum_1, input_precision=PRECISION)
    return sum_0, sum_1


@triton.jit
def _add_bias(value, bias, column, N, COLUMNS: tl.constexpr):
    at_column = column + tl.arange(0, COLUMNS)
    return value + tl.load(bias + at_column, mask=at_column < N, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _store(out, value, row, column, M, N, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):
    if TMA:
        out.store([row, column], value.to(out.dtype))
    else:
        at_row = row + tl.arange(0, ROWS)
        at_column = column + tl.arange(0, COLUMNS)
        inside = (at_row[:, None] < M) & (at_column[None, :] < N)
        pointers = out + at_row[:, None].to(tl.int64) * stride + at_column[None, :]
        tl.store(pointers, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _halves(value, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(value, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _put_partial(start, value, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr):
    """Write partial sums, in an order that lets each thread write what it holds, 16 bytes at a time and beside its
    neighbours, without a detour through shared memory.

    A thread of a tensor-core product holds, of each 16 rows by 8 columns, pairs of neighbours in two rows that are
    eight apart: rows are (group, warp, half, row of eight), columns (group, pair, column of two), and threads (warp,
    row, pair). `WARPS` is at most the number of 16 rows.
    """
    value = tl.reshape(value, (ROWS // (16 * WARPS), WARPS, 2, 8, COLUMNS // 8, 4, 2))
    value = tl.permute(value, (0, 4, 1, 3, 5, 2, 6))
    value = tl.reshape(value, (ROWS * COLUMNS,))
    tl.store(start + tl.arange(0, ROWS * COLUMNS), value, cache_modifier=".cg")


@triton.jit
def _add_partial(value, start, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr):
    """`value` and the partial sums that `_put_partial` wrote."""
    other = tl.load(start + tl.arange(0, ROWS * COLUMNS), cache_modifier=".cg")
    other = tl.reshape(other, (ROWS // (16 * WARPS), COLUMNS // 8, WARPS, 8, 4, 2, 2))
    other = tl.permute(other, (0, 2, 5, 3, 1, 4, 6))
    return value + tl.reshape(other, (ROWS, COLUMNS))


@triton.jit
def _finish(
    out, bias, value, up, row, column, up_column, M, N, stride_out,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Add the bias, apply SiLU and store: in `PARTS` (1, 2 or 4) pieces along the columns, which keeps registers and
    the store's buffer small."""
    if PARTS > 1:
        value_0, value_1 = _halves(value, ROWS, COLUMNS)
        up_0, up_1 = up, up
        if SILU:
            up_0, up_1 = _halves(up, ROWS, COLUMNS)
        half: tl.constexpr = COLUMNS // 2
        _finish(
            out, bias, value_0, up_0, row, column, up_column, M, N, stride_out,
            ROWS, half, PARTS // 2, BIAS, SILU, TMA,
        )  # fmt: skip
        _finish(
            out, bias, value_1, up_1, row, column + half, up_column + half, M, N, stride_out,
            ROWS, half, PARTS // 2, BIAS, SILU, TMA,
        )  # fmt: skip
    else:
        if BIAS:
            value = _add_bias(value, bias, column, N, COLUMNS)
            if SILU:
                up = _add_bias(up, bias, up_column, N, COLUMNS)
        if SILU:
            value = value / (1.0 + tl.exp(-value)) * up
            _store(out, value, row, column, M, N // 2, stride_out, ROWS, COLUMNS, TMA)
        else:
            _store(out, value, row, column, M, N, stride_out, ROWS, COLUMNS, TMA)


@triton.jit
def _finish_tile(
    out, out_extra, bias, sum_0, sum_1, row, column, extra, M, N, stride_out,
    BM: tl.constexpr, BN: tl.constexpr, BX: tl.constexpr, PARTS: tl.constexpr,
    BIAS: tl.constexpr, SILU: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Both accumulators of a tile."""
    _finish(
        out, bias, sum_0, sum_1, row, column, extra, M, N, stride_out, BM, BN, PARTS, BIAS, SILU, TMA,
    )  # fmt: skip
    if BX and not SILU:
        _finish(
            out_extra, bias, sum_1, sum_1, row, extra, extra, M, N, stride_out, BM, BX, 1, BIAS, False, TMA,
        )  # fmt: skip


@triton.jit
def _columns(tile_n, N, BN: tl.constexpr, BX: tl.constexpr, SILU: tl.constexpr):
    """First columns of a tile's two accumulators. Of the last tile, the first may be cut off and the second empty."""
    if SILU:
        column = tile_n * BN
        extra = N // 2 + column
    else:
        column = tile_n * (BN + BX)
        extra = column + BN
    return column, extra


@triton.jit(do_not_specialize=["M", "tiles_m", "tiles_n"])
def _tile_gemm(
    x, w, w_extra, out, out_extra, bias, M, N, K, stride_x, stride_w, stride_out, tiles_m, tiles_n,
    BM: tl.constexpr, BN: tl.constexpr, BX: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
    PARTS: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    FLATTEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        start_after_others()
    first = tl.program_id(0)
    programs = tl.num_programs(0)
    steps = tl.cdiv(K, BK)
    stored = first - programs
    for tile in tl.range(first, tiles_m * tiles_n, programs, flatten=FLATTEN):
        tile_m, tile_n = _place(tile, tiles_m, tiles_n, GROUP_M)
        column, extra = _columns(tile_n, N, BN, BX, SILU)
        sum_0, sum_1 = _multiply(
            x, w, w_extra, tile_m * BM, column, extra, 0, steps, M, N, K, stride_x, stride_w,
            BM, BN, BX, BK, TMA, PRECISION,
        )  # fmt: skip
        # Counted anew, so that the place does not live through the K loop and hold up its pipeline.
        stored += programs
        tile_m, tile_n = _place(stored, tiles_m, tiles_n, GROUP_M)
        column, extra = _columns(tile_n, N, BN, BX, SILU)
        _finish_tile(
            out, out_extra, bias, sum_0, sum_1, tile_m * BM, column, extra, M, N, stride_out,
            BM, BN, BX, PARTS, BIAS, SILU, TMA,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M", "tiles_m", "tiles_n", "split_tiles", "pieces", "length", "tail", "helpers"])
def _split_gemm(
    x, w, w_extra, out, out_extra, bias, partials, arrived, M, N, K, stride_x, stride_w, stride_out, tiles_m, tiles_n,
    split_tiles, pieces, length, tail, helpers,
    BM: tl.constexpr, BN: tl.constexpr, BX: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
    PARTS: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """The first `split_tiles` tiles in pieces, the others whole. A tile has `pieces` slots for partial sums."""
    if PDL:
        start_after_others()
    programs = tl.num_programs(0)
    steps = tl.cdiv(K, BK)
    # Those who are waited for have the higher rank, and start earlier.
    rank = programs - 1 - tl.program_id(0)
    owned = split_tiles * pieces
    piece = rank // split_tiles
    split_tile = rank % split_tiles
    turn = split_tiles
    if rank >= owned + helpers:
        split_tile = split_tiles
    elif rank >= owned:
        piece = pieces
        split_tile = rank - owned
        turn = helpers
    whole = split_tiles + tl.program_id(0)
    while (split_tile < split_tiles) | (whole < tiles_m * tiles_n):
        if split_tile < split_tiles:
            tile = split_tile
            first = piece * length
            last = steps
            if (piece < pieces - 1) | (tail > 0) & (piece < pieces):
                last = min(steps, first + length)
            split_tile += turn
        else:
            tile = whole
            first = 0
            last = steps
            whole += programs
        tile_m, tile_n = _place(tile, tiles_m, tiles_n, GROUP_M)
        column, extra = _columns(tile_n, N, BN, BX, SILU)
        sum_0, sum_1 = _multiply(
            x, w, w_extra, tile_m * BM, column, extra, first, last, M, N, K, stride_x, stride_w,
            BM, BN, BX, BK, TMA, PRECISION,
        )  # fmt: skip
        slots = partials + tile.to(tl.int64) * pieces * (BM * (BN + BX))
        if first > 0:
            mine = slots + (piece - 1) * (BM * (BN + BX))
            _put_partial(mine, sum_0, BM, BN, WARPS)
            if BX:
                _put_partial(mine + BM * BN, sum_1, BM, BX, WARPS)
            tl.debug_barrier()  # all threads' partial sums are written before one thread counts them as there
            tl.atomic_add(arrived + tile, 1, sem="release")
        else:
            if tile < split_tiles:
                others = pieces - 1 + (tail > 0).to(tl.int32)
                while tl.atomic_cas(arrived + tile, others, 0, sem="acquire") != others:
                    pass
                for other in range(0, others):
                    theirs = slots + other * (BM * (BN + BX))
                    sum_0 = _add_partial(sum_0, theirs, BM, BN, WARPS)
                    if BX:
                        sum_1 = _add_partial(sum_1, theirs + BM * BN, BM, BX, WARPS)
            _finish_tile(
                out, out_extra, bias, sum_0, sum_1, tile_m * BM, column, extra, M, N, stride_out,
                BM, BN, BX, PARTS, BIAS, SILU, TMA,
            )  # fmt: skip


def launch(
    x: torch.Tensor,
    w: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    config: GemmConfig,
    *,
    sms: int,
    silu: bool,
    tma: bool,
    workspace: Workspace | None,
) -> None:
    """Run `config` on x [M, K], w [N, K], out [M, N] (or [M, N // 2] with `silu`, w being ``[gate | up]``).

    Rows of all three are contiguous. `tma` needs addresses and rows of multiples of 16 bytes. `workspace` is needed by
    a `split` config.
    """
    rows, inputs = x.shape
    columns = w.shape[0]
    tiles_m, tiles_n = config.tiles(rows, columns, silu)
    tiles = tiles_m * tiles_n
    split = config.split_tiles(tiles, -(-inputs // config.block_k), sms)
    block_x = config.block_n if silu else config.extra_n
    parts = config.epilogue_parts
    if tma:
        part = config.block_n // parts
        sources = (
            TensorDescriptor(x, [rows, inputs], [x.stride(0), 1], [config.block_m, config.block_k]),
            TensorDescriptor(w, [columns, inputs], [w.stride(0), 1], [config.block_n, config.block_k]),
            TensorDescriptor(w, [columns, inputs], [w.stride(0), 1], [block_x or config.block_n, config.block_k]),
            TensorDescriptor(out, list(out.shape), [out.stride(0), 1], [config.block_m, part]),
            TensorDescriptor(out, list(out.shape), [out.stride(0), 1], [config.block_m, config.extra_n or part]),
        )
    else:
        sources = (x, w, w, out, out)
    sizes = (rows, columns, inputs, x.stride(0), w.stride(0), out.stride(0), tiles_m, tiles_n)
    constants = {
        "BM": config.block_m,
        "BN": config.block_n,
        "BX": block_x,
        "BK": config.block_k,
        "GROUP_M": config.group_m,
        "PARTS": parts,
        "BIAS": bias is not None,
        "SILU": silu,
        "TMA": tma,
        "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
        "num_warps": config.warps,
        "num_stages": config.stages,
        **dependent_launch(x.device),
    }
    bias = x if bias is None else bias
    programs = sms * config.ctas_per_sm
    if split:
        if workspace is None:
            raise ValueError(f"{config} cuts tiles along K and needs a workspace")
        grid = programs if tiles > split.tiles else split.programs
        cut = (split.tiles, split.pieces, split.length, split.tail, split.helpers)
        sums = (workspace.partials, workspace.arrived)
        _split_gemm[(grid,)](
            *sources, bias, *sums, *sizes, *cut, WARPS=min(config.warps, config.block_m // 16), **constants
        )
    else:
        _tile_gemm[(min(tiles, programs),)](*sources, bias, *sizes, FLATTEN=config.flatten, **constants)
