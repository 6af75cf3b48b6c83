"""Decode attention over the paged KV cache in Triton.

All (key/value head, block) pairs of the work list form one line of work, head after head. The grid is persistent: each
program takes an equal stretch of the line, whatever segments it crosses, so that the load is even for any mix of
context lengths, and long contexts are split by themselves. Inside a program one flat, software-pipelined loop runs over
blocks: loads for the next segment are under way while the last one is finished.

A segment that lies in one program is written at once. One that crosses programs leaves its pieces (unnormalised output,
maximum, sum) in a workspace; whichever program arrives last joins them, in a fixed order, so results do not depend on
timing. No program waits for another.

Keys and values come through a TMA descriptor over the whole pool (sm_90 and up; the unseen rest of a page must hold
finite numbers, as on the CPU) or through pointers (unseen tokens are not read).

Legend: H query heads, K key/value heads, G query heads a key/value head (padded to M rows), D head size (padded to
DP), B tokens a block (padded to BP), P programs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from nanoflow.ops.attention import LANE_PROGRAMS
from nanoflow.ops.decode_list_triton import COLUMNS, decode_segments, list_blocks, pages_in_a_row
from nanoflow.ops.decode_work import FIELDS, HEADER
from nanoflow.ops.device_batch import BatchPart
from nanoflow.ops.operation import NanoContext, device_sms

__all__ = [
    "MAX_HEAD_DIM",
    "DecodeConfig",
    "DecodeWorkspace",
    "decode_attention",
    "decode_config",
    "paged_decode_triton",
    "prepare_decode",
]

MAX_HEAD_DIM = 256
FEW_SMS = 64
"""With so many SMs or fewer, an SM must fetch some 70 bytes a nanosecond, three times its share of the whole device's
rate. Five programs of one warp, each with two buffers (stages less one) of 32 tokens, keep 160 KiB on the way and pass
no scores from warp to warp: 2.62 TB/s on 24 SMs of an H100 and 2.82 on 32, where four programs of two warps read 1.85
and 2.42 (benchmarks/results/decode_partitions.json)."""
LOG2_E = 1.4426950408889634
_HEADER = tl.constexpr(HEADER)


@dataclass(frozen=True)
class DecodeConfig:
    """How to run the kernel; `decode_config` gives the measured choice."""

    block_tokens: int
    """Tokens a block; must divide the page size."""
    stages: int
    """Depth of the software pipeline."""
    warps: int
    programs_per_sm: int
    tma: bool
    max_registers: int | None = None
    """Registers a thread; None leaves them to the compiler. Fewer make room for more programs on an SM."""


class DecodeWorkspace:
    """Where programs leave the pieces of split segments; one launch at a time may use it, any number in turn."""

    def __init__(self, programs: int, group: int, head_dim: int, device: torch.device) -> None:
        self.programs = programs
        self.pieces = torch.empty(2 * programs, group, head_dim, dtype=torch.float32, device=device)
        self.maxima = torch.empty(2 * programs, group, dtype=torch.float32, device=device)
        self.sums = torch.empty(2 * programs, group, dtype=torch.float32, device=device)
        self.arrived = torch.zeros(programs, dtype=torch.int32, device=device)
        """Pieces that are there, by the last program of their segment. Every launch leaves zeros."""


def block_tokens_for(page_size: int, largest: int) -> int:
    """The largest divisor of the page size that is at most `largest`."""
    return next(tokens for tokens in range(min(page_size, largest), 0, -1) if page_size % tokens == 0)


def decode_config(
    page_size: int,
    head_dim: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    group: int = 1,
    sms: int | None = None,
) -> DecodeConfig:
    """The configuration for a layer's shape on a GPU of this compute capability, or on `sms` SMs of it."""
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"decode attention: head size {head_dim} is not supported; the largest is {MAX_HEAD_DIM}")
    row_bytes = triton.next_power_of_2(head_dim) * dtype.itemsize
    # Of a request's last block only a part is seen, but a TMA load reads all of it: for contexts of some hundred tokens
    # 8 KiB of keys a block (32 tokens of head size 128 in 16 bits) beat 16 KiB by 3% (benchmarks/decode_blocks.py).
    block = block_tokens_for(page_size, min(128, max(16, (8 << 10) // row_bytes)))
    tma = capability[0] == 9 and block >= 16 and block & (block - 1) == 0 and head_dim * dtype.itemsize % 16 == 0
    if not tma:
        block = block_tokens_for(page_size, min(128, max(16, (16 << 10) // row_bytes)))
    if dtype.itemsize > 2 or head_dim > 128 or group > 16:  # for being right; nobody runs these fast
        return DecodeConfig(block, stages=2, warps=4, programs_per_sm=2, tma=tma)
    few = sms is not None and sms <= FEW_SMS
    if tma and few:
        return DecodeConfig(block, stages=3, warps=1, programs_per_sm=LANE_PROGRAMS, tma=True)
    if tma:
        return DecodeConfig(block, stages=3, warps=2, programs_per_sm=4, tma=True)
    return DecodeConfig(block, stages=3, warps=4, programs_per_sm=2, tma=False)


@triton.jit
def _entry(work, capacity, head, count, position):
    """Fields of the work list at a position on the line, of which `head` is the head."""
    entry = work + _HEADER + (position - head * count)
    block = tl.load(entry)
    row = tl.load(entry + capacity)
    span = tl.load(entry + 2 * capacity)
    done = tl.load(entry + 3 * capacity)
    return block, row, span, done


@triton.jit
def _remaining(work, capacity, count, position):
    """Blocks of the same segment after a position on the line."""
    return tl.load(work + _HEADER + 4 * capacity + position - position // count * count)


@triton.jit
def _program_of(position, total, programs):
    """The program whose stretch of the line holds `position`."""
    return (((position.to(tl.int64) + 1) * programs - 1) // total).to(tl.int32)


@triton.jit
def _join(
    start, end, row, head, total, programs, out, out_stride, pieces, maxima, sums, arrived,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, M: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Reports a piece of the segment at positions ``start .. end - 1`` as written; the last to report joins all."""
    first_program = _program_of(start, total, programs)
    last_program = _program_of(end - 1, total, programs)
    before = tl.atomic_add(arrived + last_program, 1, sem="acq_rel")
    if before == last_program - first_program:
        tl.store(arrived + last_program, 0)
        g = tl.arange(0, M)
        d = tl.arange(0, DP)
        inside = (g < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
        acc = tl.zeros([M, DP], tl.float32)
        maximum = tl.full([M], float("-inf"), tl.float32)
        sum_ = tl.zeros([M], tl.float32)
        for program in tl.range(first_program, last_program + 1, loop_unroll_factor=2):
            slot = 2 * program + (program == first_program).to(tl.int32)
            # Other SMs wrote these: read past the first-level cache.
            one_max = tl.load(maxima + slot * GROUP + g, mask=g < GROUP, other=0.0, cache_modifier=".cg")
            one_sum = tl.load(sums + slot * GROUP + g, mask=g < GROUP, other=1.0, cache_modifier=".cg")
            offsets = (slot * GROUP + g)[:, None] * HEAD_DIM + d[None, :]
            piece = tl.load(pieces + offsets, mask=inside, other=0.0, cache_modifier=".cg")
            new = tl.maximum(maximum, one_max)
            old_weight = tl.exp2(maximum - new)
            weight = tl.exp2(one_max - new)
            acc = acc * old_weight[:, None] + piece * weight[:, None]
            sum_ = sum_ * old_weight + one_sum * weight
            maximum = new
        target = out + row.to(tl.int64) * out_stride + (head * GROUP + g)[:, None] * HEAD_DIM + d[None, :]
        tl.store(target, (acc * (1.0 / sum_)[:, None]).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["capacity"])
def _decode_kernel(
    q, kv, out, work, pieces, maxima, sums, arrived, capacity, q_stride, out_stride, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, B: tl.constexpr,
    M: tl.constexpr, DP: tl.constexpr, BP: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    count = tl.load(work)
    total = count.to(tl.int64) * KV_HEADS
    # No stretch in the middle may be empty: it would never report. Programs past the line's length have none.
    programs = tl.minimum(tl.num_programs(0), tl.maximum(total, 1)).to(tl.int32)
    first = (program * total // programs).to(tl.int32)
    last = tl.where(program < programs, (program + 1) * total // programs, first).to(tl.int32)
    g = tl.arange(0, M)
    d = tl.arange(0, DP)
    n = tl.arange(0, BP)
    inside = (g < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
    q_tile = tl.zeros([M, DP], q.dtype.element_ty)
    acc = tl.zeros([M, DP], tl.float32)
    maximum = tl.full([M], float("-inf"), tl.float32)
    sum_ = tl.zeros([M], tl.float32)
    # An entry is loaded a turn ahead: no load of keys waits for it, and the compiler pipelines keys and values alone.
    head = first // tl.maximum(count, 1)
    block, row, span, done = _entry(work, capacity, head, count, first)
    ends_segment = _remaining(work, capacity, tl.maximum(count, 1), tl.maximum(last - 1, 0)) == 0
    for position in range(first, last):
        following = tl.minimum(position + 1, last - 1)
        next_head = head + (following >= (head + 1) * count).to(tl.int32)
        next_block, next_row, next_span, next_done = _entry(work, capacity, next_head, count, following)
        page = block // (PAGE // B)
        begin = span & 0xFFFF
        end = span >> 16
        if TMA:
            token = (page * 2 * KV_HEADS + head) * PAGE + (block % (PAGE // B)) * B
            k = kv.load([token, 0])
            v = kv.load([token + KV_HEADS * PAGE, 0])
        else:
            token = (page.to(tl.int64) * 2 * KV_HEADS + head) * PAGE + (block % (PAGE // B)) * B
            source = kv + token * HEAD_DIM + n[:, None] * HEAD_DIM + d[None, :]
            seen = ((n >= begin) & (n < end))[:, None] & (d < HEAD_DIM)[None, :]
            k = tl.load(source, mask=seen, other=0.0)
            v = tl.load(source + KV_HEADS * PAGE * HEAD_DIM, mask=seen, other=0.0)
        if (done == 0) | (position == first):
            source_q = q + row.to(tl.int64) * q_stride + (head * GROUP + g)[:, None] * HEAD_DIM + d[None, :]
            q_tile = tl.load(source_q, mask=inside, other=0.0)
        # Scores in base 2. Every block has a seen token, so the maximum is finite.
        scores = tl.dot(q_tile, k.T, input_precision="ieee") * scale
        scores = tl.where(((n >= begin) & (n < end))[None, :], scores, float("-inf"))
        new = tl.maximum(maximum, tl.max(scores, 1))
        weights = tl.exp2(scores - new[:, None])
        shrink = tl.exp2(maximum - new)
        sum_ = sum_ * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
        maximum = new
        is_last = position == last - 1
        if (next_done == 0) | is_last:
            begun_here = position - done >= first
            if begun_here & (ends_segment | (is_last == 0)):
                target = out + row.to(tl.int64) * out_stride + (head * GROUP + g)[:, None] * HEAD_DIM + d[None, :]
                tl.store(target, (acc * (1.0 / sum_)[:, None]).to(out.dtype.element_ty), mask=inside)
            else:
                slot = 2 * program + begun_here.to(tl.int32)
                tl.store(pieces + (slot * GROUP + g)[:, None] * HEAD_DIM + d[None, :], acc, mask=inside)
                tl.store(maxima + slot * GROUP + g, maximum, mask=g < GROUP)
                tl.store(sums + slot * GROUP + g, sum_, mask=g < GROUP)
            acc = tl.zeros([M, DP], tl.float32)
            maximum = tl.full([M], float("-inf"), tl.float32)
            sum_ = tl.zeros([M], tl.float32)
        head = next_head
        block, row, span, done = next_block, next_row, next_span, next_done

    if first < last:
        # Every thread's pieces are written before one thread reports them.
        tl.debug_barrier()
        head = first // count
        _, row, _, done = _entry(work, capacity, head, count, first)
        remaining = _remaining(work, capacity, count, first)
        if done > 0:
            _join(
                first - done, first + remaining + 1, row, head, total, programs, out, out_stride, pieces, maxima,
                sums, arrived, GROUP, HEAD_DIM, M, DP,
            )  # fmt: skip
        head = (last - 1) // count
        _, row, _, done = _entry(work, capacity, head, count, last - 1)
        remaining = _remaining(work, capacity, count, last - 1)
        start = last - 1 - done
        if (remaining > 0) & (start >= first):
            _join(
                start, last + remaining, row, head, total, programs, out, out_stride, pieces, maxima,
                sums, arrived, GROUP, HEAD_DIM, M, DP,
            )  # fmt: skip


def kernel_constants(
    heads: int, kv_heads: int, head_dim: int, page_size: int, config: DecodeConfig
) -> dict[str, int | bool]:
    """The kernel's compile-time arguments."""
    group = heads // kv_heads
    return {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "PAGE": page_size,
        "B": config.block_tokens,
        "M": max(16, triton.next_power_of_2(group)),
        "DP": max(16, triton.next_power_of_2(head_dim)),
        "BP": max(16, triton.next_power_of_2(config.block_tokens)),
        "TMA": config.tma,
    }


def decode_attention(
    q_THD: torch.Tensor,
    kv: torch.Tensor,
    out_THD: torch.Tensor,
    work: torch.Tensor,
    workspace: DecodeWorkspace,
    *,
    scale: float,
    config: DecodeConfig,
) -> None:
    """``out[row] = softmax(scale * q[row] k^T) v`` over each listed row's context, rows and heads as in `work`.

    Rows that `work` does not list are not touched. The grid is the workspace's number of programs.

    Args:
        q_THD: queries [T, H, D], head sizes contiguous; rows may be strided (a view of the qkv buffer).
        kv: [pages, 2, K, page size, D], contiguous.
        out_THD: [T, H, D], as `q_THD`.
        work: int32, from `decode_work` with the config's `block_tokens`, on the device.
        workspace: of H / K query heads a key/value head.
    """
    heads, head_dim = q_THD.shape[1:]
    _, _, kv_heads, page_size, _ = kv.shape
    if page_size % config.block_tokens:
        raise ValueError(f"blocks of {config.block_tokens} tokens do not divide pages of {page_size}")
    constants = kernel_constants(heads, kv_heads, head_dim, page_size, config)
    source: Any = kv
    if config.tma:
        from triton.tools.tensor_descriptor import TensorDescriptor

        source = TensorDescriptor.from_tensor(kv.view(-1, head_dim), [config.block_tokens, constants["DP"]])
    _decode_kernel[(workspace.programs,)](
        q_THD, source, out_THD, work, workspace.pieces, workspace.maxima, workspace.sums, workspace.arrived,
        (len(work) - HEADER) // FIELDS, q_THD.stride(0), out_THD.stride(0), scale * LOG2_E,
        **constants, num_warps=config.warps, num_stages=config.stages, maxnreg=config.max_registers,
    )  # fmt: skip


def paged_decode_triton(
    context: NanoContext,
    q_THD: torch.Tensor,
    out_THD: torch.Tensor,
    scale: float,
    window: int | None,
    *,
    config: DecodeConfig | None = None,
    programs_per_sm: int | None = None,
) -> None:
    """Attention of the nano-batch's decode rows on the SMs of its lane.

    Args:
        config: by default the measured choice.
        programs_per_sm: another number than the configuration has; see `nanoflow.ops.attention.OTHER_PROGRAMS`.
    """
    if context.part.decode.start == context.part.decode.stop:
        return
    chosen, workspace = _launch_of(context, q_THD.shape[1], config, programs_per_sm)
    work = _work_list(context, chosen.block_tokens, window)
    decode_attention(q_THD, context.kv, out_THD, work, workspace, scale=scale, config=chosen)


def prepare_decode(
    context: NanoContext, heads: int, windows: Sequence[int | None], *, programs_per_sm: int | None = None
) -> None:
    """Make the lists that `paged_decode_triton` reads in layers of these windows, and the lane's workspace."""
    chosen, _ = _launch_of(context, heads, None, programs_per_sm)
    for window in dict.fromkeys(windows):
        _work_list(context, chosen.block_tokens, window)


def _launch_of(
    context: NanoContext, heads: int, config: DecodeConfig | None, programs_per_sm: int | None
) -> tuple[DecodeConfig, DecodeWorkspace]:
    """The lane's configuration and workspace, made once."""
    _, _, kv_heads, page_size, head_dim = context.kv.shape
    device = context.kv.device

    def make() -> tuple[DecodeConfig, DecodeWorkspace]:
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
        sms, group = context.sms or device_sms(device), heads // kv_heads
        chosen = config or decode_config(page_size, head_dim, context.kv.dtype, capability, group, context.sms)
        if programs_per_sm:
            stages = 2 if programs_per_sm > LANE_PROGRAMS else chosen.stages
            chosen = replace(chosen, programs_per_sm=programs_per_sm, stages=stages)
        return chosen, DecodeWorkspace(sms * chosen.programs_per_sm, group, head_dim, device)

    return context.scratch(("decode_attention", heads, config, programs_per_sm), make)


def _work_list(context: NanoContext, block_tokens: int, window: int | None) -> torch.Tensor:
    """The nano-batch's work list; made on the device, once an iteration, in memory that stays."""
    part, device = context.part, context.kv.device
    pages, page_size = context.kv.shape[0], context.kv.shape[3]
    # Every page belongs to one request, so the list never has more blocks than the pool.
    capacity = pages * (page_size // block_tokens)

    def segments(part: BatchPart) -> NDArray[np.int32]:
        host = part.batch.host
        return decode_segments(
            host.decode_rows[part.decode],
            host.decode_context[part.decode],
            page_size=page_size,
            block_tokens=block_tokens,
            window=window,
        )

    def pages_of(part: BatchPart) -> NDArray[np.int32]:
        host = part.batch.host
        return pages_in_a_row(host.decode_context[part.decode], host.decode_pages[part.decode], page_size)

    key = ("decode_work", block_tokens, window)

    def make() -> torch.Tensor:
        work = part.kept(key, lambda: torch.zeros(HEADER + FIELDS * capacity, dtype=torch.int32, device=device))
        rows = part.rows.stop - part.rows.start
        listed = part.from_host(("decode_segments", block_tokens, window), segments, (1 + rows, COLUMNS))
        in_a_row = part.from_host("decode_pages", pages_of, (pages,))
        list_blocks(listed, in_a_row, work, page_size=page_size, block_tokens=block_tokens, window=window)
        return work

    return part.cached(key, make)
