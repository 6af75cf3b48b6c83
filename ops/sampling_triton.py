"""Triton kernels of sampling: argmax, and everything else that makes a token from a row of logits.

Contract: the tokens of `nanoflow.ops.sampling`'s PyTorch path in float32, up to roundings of sums, with no wait for the
host; one launch serves any mix of parameters. Rows that need more than an argmax are described by `ROW` structs in one
int32 tensor (see `nanoflow.ops.sampling_rows`).

Pseudo-code::

    argmax:   each program takes a part of one row; a second launch joins the parts
    prepare:  the same over the rows described, after bias, penalties and mask, which it writes as float32
    draw:     one program a row:
        greedy: the argmax of the parts
        else:   largest threshold with k values at or above it (top-k); with p of the mass at or above it (top-p)
                mass of every tile above the threshold; the tile where it passes u * total; the token in the tile

A threshold is searched by passes over the row: four pivots a pass divide the bracket that is left, and its ends move to
values that exist, so the search ends when one distinct value is left in it (about six passes for 16-bit logits).

Shape legend: S rows, R rows described, V vocabulary, P parts of a row.
"""

import torch
import triton
import triton.language as tl

__all__ = ["MAX_PARTS", "argmax", "parts_for", "sample_rows"]

BLOCK = 4096
WARPS = 4
PREPARE_BLOCK = 1024
SEARCH_BLOCK = 1024
DRAW_BLOCK = 4096
DRAW_WARPS = 8
STAGES = 3
"""Tiles of a row in flight at once in `draw`, where a row has a program of its own."""
PROGRAMS = 2112
"""Programs that fill a large GPU: 16 for each of 132 SMs."""
MAX_PARTS = 64

# Words of a row's description; ROW in nanoflow.ops.sampling_rows is the same as a numpy struct.
ENTRY = tl.constexpr(0)
PLACE = tl.constexpr(1)
BIAS_START = tl.constexpr(2)
BIAS_STOP = tl.constexpr(3)
TOP_K = tl.constexpr(4)
TEMPERATURE = tl.constexpr(5)
TOP_P = tl.constexpr(6)
FLOOR = tl.constexpr(7)
REPETITION = tl.constexpr(8)
FREQUENCY = tl.constexpr(9)
PRESENCE = tl.constexpr(10)
MASK = tl.constexpr(11)
UNIFORM = tl.constexpr(12)
WORDS = tl.constexpr(16)

INFINITY = tl.constexpr(float("inf"))
NO_TOKEN = tl.constexpr(2147483647)


@triton.jit
def _better(x, best, tile, best_tile):
    """Running maximum of each lane and the tile it came from; NaN counts as the largest, the first of equals wins."""
    x = tl.where(x == x, x, INFINITY)
    better = x > best
    return tl.where(better, x, best), tl.where(better, tile, best_tile)


@triton.jit
def _first_best(best, best_tile, BLOCK: tl.constexpr):
    largest = tl.max(best, axis=0)
    token = best_tile * BLOCK + tl.arange(0, BLOCK)
    return largest, tl.min(tl.where(best == largest, token, NO_TOKEN), axis=0)


@triton.jit
def argmax_kernel(
    logits, stride, values, tokens, out, VOCAB: tl.constexpr, PARTS: tl.constexpr, TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // PARTS).to(tl.int64)
    first = (program % PARTS) * TILES
    lane = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], -INFINITY, tl.float32)
    best_tile = tl.zeros([BLOCK], tl.int32) + first
    start = logits + row * stride
    for tile in range(first, first + TILES):
        token = tile * BLOCK + lane
        x = tl.load(start + token, mask=token < VOCAB, other=-INFINITY).to(tl.float32)
        best, best_tile = _better(x, best, tile, best_tile)
    largest, token = _first_best(best, best_tile, BLOCK)
    if PARTS == 1:
        tl.store(out + row, token.to(tl.int64))
    else:
        tl.store(values + program, largest)
        tl.store(tokens + program, token)


@triton.jit
def _join(values, tokens, row, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    part = tl.arange(0, BLOCK)
    value = tl.load(values + row * PARTS + part, mask=part < PARTS, other=-INFINITY)
    token = tl.load(tokens + row * PARTS + part, mask=part < PARTS, other=NO_TOKEN)
    largest = tl.max(value, axis=0)
    return largest, tl.min(tl.where(value == largest, token, NO_TOKEN), axis=0)


@triton.jit
def join_kernel(values, tokens, out, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    _, token = _join(values, tokens, row, PARTS, BLOCK)
    tl.store(out + row, token.to(tl.int64))


@triton.jit
def _float(rows, word):
    return tl.load(rows + word).to(tl.float32, bitcast=True)


@triton.jit
def prepare_kernel(
    logits, stride, rows, prompt, output, masks, work, values, tokens, MASKED: tl.constexpr, VOCAB: tl.constexpr,
    PARTS: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    index = (program // PARTS).to(tl.int64)
    about = rows + index * WORDS
    entry = tl.load(about + ENTRY).to(tl.int64)
    if entry >= 0:
        place = tl.load(about + PLACE).to(tl.int64)
        mask_row = tl.load(about + MASK).to(tl.int64)
        bias_start, bias_stop = tl.load(about + BIAS_START), tl.load(about + BIAS_STOP)
        repetition, frequency = _float(about, REPETITION), _float(about, FREQUENCY)
        presence = _float(about, PRESENCE)
        first = (program % PARTS) * TILES
        lane = tl.arange(0, BLOCK)
        best = tl.full([BLOCK], -INFINITY, tl.float32)
        best_tile = tl.zeros([BLOCK], tl.int32) + first
        for tile in range(first, first + TILES):
            token = tile * BLOCK + lane
            mask = token < VOCAB
            x = tl.load(logits + entry * stride + token, mask=mask, other=-INFINITY).to(tl.float32)
            for bias in range(bias_start, bias_stop):
                x += tl.where(token == tl.load(rows + 2 * bias), _float(rows, 2 * bias + 1), 0.0)
            if place >= 0:
                count = tl.load(output + place * VOCAB + token, mask=mask, other=0)
                seen = (tl.load(prompt + place * VOCAB + token, mask=mask, other=0) != 0) | (count > 0)
                repeated = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
                x = tl.where(seen, repeated, x) - frequency * count.to(tl.float32)
                x -= tl.where(count > 0, presence, 0.0)
            if MASKED and mask_row >= 0:
                word = tl.load(masks + mask_row * ((VOCAB + 31) // 32) + token // 32, mask=mask, other=0)
                x = tl.where(((word >> (token % 32)) & 1) != 0, x, -INFINITY)
            tl.store(work + index * VOCAB + token, x, mask=mask)
            best, best_tile = _better(x, best, tile, best_tile)
        largest, token = _first_best(best, best_tile, BLOCK)
        tl.store(values + program, largest)
        tl.store(tokens + program, token)


@triton.jit
def _exp(x):
    """e^x, accurate to about one unit in the last place: the argument of the hardware's 2^x is kept small."""
    whole = tl.floor(x * 1.4426950408889634 + 0.5)
    rest = tl.fma(x, 1.44269502162933349609375, -whole)
    rest = tl.fma(x, 1.925963033500011079e-08, rest)
    power = tl.exp2(rest) * tl.exp2(whole)
    return tl.where(x < -80.0, tl.exp(x), power)


@triton.jit
def _scaled(work, token, largest, temperature, floor, VOCAB: tl.constexpr):
    x = tl.load(work + token, mask=token < VOCAB, other=-INFINITY)
    x = tl.div_rn(x - largest, temperature)
    return tl.where(x < floor, -INFINITY, x)


@triton.jit
def _above(
    work, largest, temperature, floor, threshold, VOCAB: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr
):
    """How many values lie above `threshold`, and their mass."""
    lane = tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, VOCAB, BLOCK, num_stages=STAGES):
        x = _scaled(work, start + lane, largest, temperature, floor, VOCAB)
        count += (x > threshold).to(tl.int32)
        mass += tl.where(x > threshold, _exp(x), 0.0)
    return tl.sum(count, axis=0), tl.sum(mass.to(tl.float64), axis=0)


@triton.jit
def _threshold(
    work, largest, temperature, floor, target, MASS: tl.constexpr, VOCAB: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The largest value such that those at or above it weigh `target` (by their mass, or one each)."""
    lane = tl.arange(0, BLOCK)
    low = tl.full([], -INFINITY, tl.float32)  # heavy enough
    high = tl.full([], INFINITY, tl.float32)  # too light
    p0 = tl.full([], -16.0, tl.float32)
    p1 = tl.full([], -8.0, tl.float32)
    p2 = tl.full([], -4.0, tl.float32)
    p3 = tl.full([], -1.0, tl.float32)
    passes = tl.full([], 0, tl.int32)
    while passes < 64:
        w0 = tl.zeros([BLOCK], tl.float32)
        w1 = tl.zeros([BLOCK], tl.float32)
        w2 = tl.zeros([BLOCK], tl.float32)
        w3 = tl.zeros([BLOCK], tl.float32)
        least = tl.full([BLOCK], INFINITY, tl.float32)
        most = tl.full([BLOCK], -INFINITY, tl.float32)
        for start in tl.range(0, VOCAB, BLOCK, num_stages=STAGES):
            x = _scaled(work, start + lane, largest, temperature, floor, VOCAB)
            weight = _exp(x) if MASS else 1.0
            w0 += tl.where(x >= p0, weight, 0.0)
            w1 += tl.where(x >= p1, weight, 0.0)
            w2 += tl.where(x >= p2, weight, 0.0)
            w3 += tl.where(x >= p3, weight, 0.0)
            inside = (x >= low) & (x < high) & (x > -INFINITY)
            least = tl.minimum(least, tl.where(inside, x, INFINITY))
            most = tl.maximum(most, tl.where(inside, x, -INFINITY))
        bottom, top = tl.min(least, axis=0), tl.max(most, axis=0)
        low, high = _narrow(p0, w0, target, low, high)
        low, high = _narrow(p1, w1, target, low, high)
        low, high = _narrow(p2, w2, target, low, high)
        low, high = _narrow(p3, w3, target, low, high)
        passes += 1
        if bottom < INFINITY:
            low = tl.maximum(low, bottom)
        if top > low:
            # A top that no pivot has refused is tried itself; else the pivots lie between the ends.
            step = tl.where(top < high, (top - low) * 0.25, (high - low) * 0.2)
            p0, p1, p2 = low + step, low + 2 * step, low + 3 * step
            p3 = tl.where(top < high, top, low + 4 * step)
        else:
            passes += 64
    return low


@triton.jit
def _narrow(pivot, weights, target, low, high):
    enough = tl.sum(weights.to(tl.float64), axis=0) >= target
    low = tl.where(enough, tl.maximum(low, pivot), low)
    return low, tl.where(enough, high, tl.minimum(high, pivot))


@triton.jit
def _draw(
    work, largest, temperature, floor, threshold, uniform, VOCAB: tl.constexpr, TILES: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The first token whose cumulative mass, in the order of tokens, passes `uniform` of the whole."""
    lane = tl.arange(0, BLOCK)
    place = tl.arange(0, TILES)
    sums = tl.zeros([TILES], tl.float64)
    for start in tl.range(0, VOCAB, BLOCK, num_stages=STAGES):
        x = _scaled(work, start + lane, largest, temperature, floor, VOCAB)
        mass = tl.where(x >= threshold, _exp(x), 0.0).to(tl.float64)
        sums += tl.where(place == start // BLOCK, tl.sum(mass, axis=0), 0.0)
    target = uniform * tl.sum(sums, axis=0)
    ends = tl.cumsum(sums, axis=0)
    # The last tile with mass if rounding lets none pass the target.
    chosen = tl.min(tl.where((ends > target) & (sums > 0), place, TILES), axis=0)
    chosen = tl.where(chosen < TILES, chosen, tl.max(tl.where(sums > 0, place, 0), axis=0))
    before = tl.sum(tl.where(place < chosen, sums, 0.0), axis=0)
    token = chosen * BLOCK + lane
    x = _scaled(work, token, largest, temperature, floor, VOCAB)
    mass = tl.where(x >= threshold, _exp(x), 0.0).to(tl.float64)
    passed = (before + tl.cumsum(mass, axis=0) > target) & (mass > 0)
    found = tl.min(tl.where(passed, token, NO_TOKEN), axis=0)
    last = tl.max(tl.where(mass > 0, token, 0), axis=0)
    return tl.where(found < NO_TOKEN, found, last)


@triton.jit
def draw_kernel(
    rows, work, values, tokens, output, out, VOCAB: tl.constexpr, PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr,
    SEARCH_BLOCK: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    about = rows + index * WORDS
    entry = tl.load(about + ENTRY).to(tl.int64)
    if entry >= 0:
        largest, token = _join(values, tokens, index, PARTS, PARTS_BLOCK)
        temperature = _float(about, TEMPERATURE)
        if temperature > 0:
            floor, top_k = _float(about, FLOOR), tl.load(about + TOP_K)
            top_p = _float(about, TOP_P).to(tl.float64)
            mine = work + index * VOCAB
            threshold = tl.full([], -INFINITY, tl.float32)
            if top_k > 0:
                threshold = _threshold(
                    mine, largest, temperature, floor, top_k.to(tl.float64), False, VOCAB, SEARCH_BLOCK, STAGES
                )
            if top_p < 1:
                above, total = _above(mine, largest, temperature, floor, threshold, VOCAB, SEARCH_BLOCK, STAGES)
                if top_k > 0:  # of values tied with the last one kept, as many as fill k
                    total += tl.maximum(top_k - above, 0).to(tl.float64) * _exp(threshold).to(tl.float64)
                by_mass = _threshold(
                    mine, largest, temperature, floor, top_p * total, True, VOCAB, SEARCH_BLOCK, STAGES
                )
                threshold = tl.maximum(threshold, by_mass)
            low = tl.load(about + UNIFORM).to(tl.int64) & 0xFFFFFFFF
            uniform = (low | (tl.load(about + UNIFORM + 1).to(tl.int64) << 32)).to(tl.float64, bitcast=True)
            token = _draw(mine, largest, temperature, floor, threshold, uniform, VOCAB, TILES, BLOCK, STAGES)
        tl.store(out + entry, token.to(tl.int64))
        place = tl.load(about + PLACE).to(tl.int64)
        if place >= 0:
            counted = output + place * VOCAB + token
            tl.store(counted, tl.load(counted) + 1)


def parts_for(rows: int, vocab: int, block: int = BLOCK) -> int:
    """Parts that each row is cut into so that the programs fill a GPU."""
    return max(1, min(-(-PROGRAMS // max(rows, 1)), -(-vocab // block), MAX_PARTS))


def _split(rows: int, vocab: int, block: int, parts: int | None) -> tuple[int, int, int]:
    """Block, tiles a part, parts: no part is empty."""
    block = min(block, int(triton.next_power_of_2(vocab)))
    tiles = triton.cdiv(triton.cdiv(vocab, block), parts or parts_for(rows, vocab, block))
    return block, tiles, triton.cdiv(triton.cdiv(vocab, block), tiles)


def _workspace(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return logits.new_empty(count, dtype=torch.float32), logits.new_empty(count, dtype=torch.int32)


def argmax(
    logits_SV: torch.Tensor,
    out_S: torch.Tensor,
    *,
    work: tuple[torch.Tensor, torch.Tensor] | None = None,
    parts: int | None = None,
    block: int = BLOCK,
    warps: int = WARPS,
) -> None:
    """The first largest logit's token of each row, int64, to `out_S`.

    Args:
        work: float32 and int32 tensors of at least `parts_for` elements a row; allocated if left out.
    """
    rows, vocab = logits_SV.shape
    if not rows:
        return
    block, tiles, parts = _split(rows, vocab, block, parts)
    values, tokens = work or _workspace(logits_SV, rows * parts)
    sizes = {"VOCAB": vocab, "PARTS": parts, "TILES": tiles, "BLOCK": block}
    argmax_kernel[(rows * parts,)](logits_SV, logits_SV.stride(0), values, tokens, out_S, **sizes, num_warps=warps)
    if parts > 1:
        join_kernel[(rows,)](values, tokens, out_S, PARTS=parts, BLOCK=triton.next_power_of_2(parts), num_warps=1)


def sample_rows(
    logits_SV: torch.Tensor,
    rows: torch.Tensor,
    count: int,
    prompt: torch.Tensor,
    output: torch.Tensor,
    out_S: torch.Tensor,
    *,
    masks: torch.Tensor | None = None,
    work_RV: torch.Tensor | None = None,
    draw_block: int = DRAW_BLOCK,
    search_block: int = SEARCH_BLOCK,
    warps: int = DRAW_WARPS,
    stages: int = STAGES,
) -> None:
    """Samples the `count` rows that `rows` describes and writes their tokens, int64, to their entries of `out_S`.

    Args:
        rows: int32, `WORDS` a row, then the bias pairs; made by `sampling_rows.describe`. An entry of -1 is skipped.
        prompt: [places, V] uint8, tokens that stand in a prompt.
        output: [places, V] int32, how often each token was sampled; the new token is counted.
        masks: [M, ceil(V / 32)] int32, one bit a token, set if it is allowed; None if no row has a mask.
        work_RV: float32, at least [count, V]; allocated if left out.
    """
    if not count:
        return
    vocab = logits_SV.shape[1]
    if work_RV is None:
        work_RV = logits_SV.new_empty(count, vocab, dtype=torch.float32)
    block, tiles, parts = _split(count, vocab, PREPARE_BLOCK, None)
    values, tokens = _workspace(logits_SV, count * parts)
    # Products stay apart from sums (enable_fp_fusion): the values are those of the PyTorch path, bit by bit.
    prepare_kernel[(count * parts,)](
        logits_SV, logits_SV.stride(0), rows, prompt, output, rows if masks is None else masks, work_RV, values, tokens,
        MASKED=masks is not None, VOCAB=vocab, PARTS=parts, TILES=tiles, BLOCK=block, num_warps=WARPS,
        enable_fp_fusion=False,
    )  # fmt: skip
    draw_block = min(draw_block, int(triton.next_power_of_2(vocab)))
    draw_kernel[(count,)](
        rows, work_RV, values, tokens, output, out_S,
        VOCAB=vocab, PARTS=parts, PARTS_BLOCK=triton.next_power_of_2(parts),
        SEARCH_BLOCK=min(search_block, draw_block), TILES=triton.next_power_of_2(triton.cdiv(vocab, draw_block)),
        BLOCK=draw_block, STAGES=stages, num_warps=warps,
    )  # fmt: skip
