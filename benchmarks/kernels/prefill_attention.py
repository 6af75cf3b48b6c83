"""Prefill attention: correctness on ragged chunks, and tiles timed against torch's fused attention on gathered keys."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from benchmarks.kernels.common import check_row, poisoned, randn, relative_error, time_interleaved, time_row
from nanoflow.ops.prefill_attention_triton import default_tile, prefill_attention
from nanoflow.ops.prefill_work import PrefillTile, prefill_work

TILES = (
    PrefillTile(128, 64, warps=4, stages=2, tma=True),
    PrefillTile(128, 128, warps=8, stages=3, tma=True),
    PrefillTile(128, 128, warps=8, stages=2, tma=True),
    PrefillTile(128, 32, warps=4, stages=3, tma=True),
    PrefillTile(128, 64, warps=8, stages=3, tma=True),
    PrefillTile(256, 64, warps=8, stages=2, tma=True),
    PrefillTile(256, 64, warps=8, stages=3, tma=True),
    PrefillTile(128, 64, warps=4, stages=2, tma=True, pack=1),
    PrefillTile(128, 128, warps=8, stages=3, tma=True, pack=1),
    PrefillTile(64, 64, warps=4, stages=3, tma=True),
    PrefillTile(128, 64, warps=4, stages=2),
    PrefillTile(128, 128, warps=8, stages=2),
)
"""Likeliest first; `--quick` times the first four."""


def label(tile: PrefillTile) -> str:
    """A tile in short."""
    loads = "tma" if tile.tma else "pointers"
    pack = f" pack {tile.pack}" if tile.pack else ""
    return f"{tile.block_m}x{tile.block_n} {tile.warps} warps {tile.stages} stages {loads}{pack}"


@dataclass
class Problem:
    """Prompt chunks: the last `lengths` rows of `context` tokens each, in scattered pages."""

    lengths: list[int]
    context: list[int]
    heads: int
    kv_heads: int
    head_dim: int
    page: int = 128
    dtype: torch.dtype = torch.bfloat16
    window: int | None = None
    spare_pages: int = 1
    device: str = "cuda"

    def __post_init__(self) -> None:
        columns = -(-max(self.context) // self.page)
        used = len(self.lengths) * columns
        pool = used + self.spare_pages
        pages = np.random.default_rng().permutation(np.arange(pool - used, pool))
        self.table = torch.from_numpy(pages.reshape(-1, columns).astype(np.int32)).to(self.device)
        self.kv = torch.empty(pool, 2, self.kv_heads, self.page, self.head_dim, dtype=self.dtype, device=self.device)
        self.kv[pool - used :].normal_()
        rows = sum(self.lengths)
        columns_T = (self.heads + 2 * self.kv_heads) * self.head_dim
        qkv = randn(rows, columns_T, dtype=self.dtype, device=self.device)
        self.q = qkv[:, : self.heads * self.head_dim].unflatten(1, (self.heads, self.head_dim))
        self.out = poisoned(rows, self.heads, self.head_dim, dtype=self.dtype, device=self.device)
        self.scale = self.head_dim**-0.5

    @property
    def pairs(self) -> int:
        """(query, key) pairs after the mask."""
        total = 0
        for length, context in zip(self.lengths, self.context, strict=True):
            seen = np.arange(context - length + 1, context + 1)
            total += int((seen if self.window is None else np.minimum(seen, self.window)).sum())
        return total

    @property
    def flops(self) -> float:
        return 4.0 * self.pairs * self.heads * self.head_dim

    @property
    def bytes(self) -> float:
        elements = 2 * sum(self.lengths) * self.heads + 2 * sum(self.context) * self.kv_heads
        return float(elements * self.head_dim * self.dtype.itemsize)

    @property
    def shape(self) -> str:
        kind = f"{self.heads}/{self.kv_heads} heads, D={self.head_dim}, {str(self.dtype).removeprefix('torch.')}"
        window = f", window {self.window}" if self.window else ""
        if len(set(self.lengths)) == 1 and self.lengths == self.context:
            return f"{len(self.lengths)} prompts x {self.lengths[0]}, {kind}{window}"
        return f"{len(self.lengths)} chunks, {sum(self.lengths)} rows, {sum(self.context)} keys, {kind}{window}"

    def call(self, tile: PrefillTile) -> Callable[[], None]:
        lengths = np.array(self.lengths, np.int32)
        work = prefill_work(
            (np.cumsum(lengths) - lengths).astype(np.int32), lengths, np.array(self.context, np.int32), tile,
            heads=self.heads, kv_heads=self.kv_heads, kv_token_bytes=2 * self.head_dim * self.dtype.itemsize,
            window=self.window,
        )  # fmt: skip
        items = torch.from_numpy(work).to(self.device)
        return lambda: prefill_attention(
            self.q, self.kv, self.table, items, self.out, tile=tile, scale=self.scale, window=self.window
        )

    def expected(self) -> torch.Tensor:
        """Float64 attention of rows drawn at random; [rows, H, D] with NaN where nothing was computed."""
        expected = torch.full(self.out.shape, math.nan, dtype=torch.float64, device=self.device)
        start = 0
        for segment, (length, context) in enumerate(zip(self.lengths, self.context, strict=True)):
            used = self.table[segment, : -(-context // self.page)].long()
            k, v = self.kv[used].transpose(0, 1).transpose(1, 2).flatten(2, 3)[:, :, :context].double()
            rows = np.unique(np.r_[0, length - 1, np.random.default_rng().integers(0, length, 24)])
            position = torch.from_numpy(rows + context - length).to(self.device)[:, None]
            keys = torch.arange(context, device=self.device)
            hidden = keys > position
            if self.window:
                hidden |= keys <= position - self.window
            at = torch.from_numpy(rows).to(self.device) + start
            q = self.q[at].double().unflatten(1, (self.kv_heads, -1))
            scores = torch.einsum("tkgd,kld->kgtl", q, k) * self.scale
            weights = scores.masked_fill_(hidden, -math.inf).softmax(-1)
            expected[at] = torch.einsum("kgtl,kld->tkgd", weights, v).flatten(1, 2)
            start += length
        return expected


RAGGED = ([1, 130, 77, 512, 33, 5, 640], [700, 130, 1500, 512, 1057, 5, 2000])


def problems(device: str) -> list[tuple[Problem, PrefillTile]]:
    """Ragged chunks for head sizes, groups, dtypes, windows and tiles; one with pages past 2^31 elements."""
    capability = torch.cuda.get_device_capability() if torch.device(device).type == "cuda" else (0, 0)
    tma = capability == (9, 0)
    cases = []

    def add(tile: PrefillTile | None, *sizes: int, **options: Any) -> None:
        problem = Problem(*map(list, RAGGED), *sizes, device=device, **options)
        found = tile or default_tile(problem.head_dim, problem.dtype.itemsize, problem.page, capability)
        cases.append((problem, found if tma else replace(found, tma=False)))

    for tile in TILES:
        add(tile, 32, 8, 128)
    for sizes in ((32, 8, 64), (8, 8, 80), (28, 4, 96), (16, 1, 128), (8, 4, 256)):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            add(None, *sizes, dtype=dtype)
    for window in (1, 100, 1000):
        add(None, 32, 8, 128, window=window)
        add(TILES[1], 32, 8, 128, window=window)
    add(None, 6, 2, 64, page=16)
    add(PrefillTile(64, 64, warps=4, stages=2), 6, 2, 64, page=8, window=200)
    if torch.device(device).type == "cuda":
        pages = 2**31 // (2 * 8 * 128 * 128) + 8
        add(None, 32, 8, 128, spare_pages=pages)
        add(TILES[-1], 32, 8, 128, spare_pages=pages)
    return cases


def check(device: str) -> list[dict[str, Any]]:
    """Relative error against float64, over rows drawn at random and the first and last of each chunk."""
    rows = []
    for problem, tile in problems(device):
        problem.call(tile)()
        expected = problem.expected()
        chosen = expected.isfinite()
        error = relative_error(problem.out[chosen], expected[chosen])
        if not problem.out.isfinite().all():
            error = math.nan
        limit = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[problem.dtype]
        rows.append(check_row("prefill_attention", f"{problem.shape}, page {problem.page}", error, limit, label(tile)))
    return rows


def gathered_sdpa(problem: Problem, backend: Any) -> Callable[[], torch.Tensor]:
    """Keys gathered and torch's attention with one backend, for prompts of one length."""
    prompts, length = len(problem.lengths), problem.lengths[0]
    pages = problem.table.flatten().long()
    group = problem.heads // problem.kv_heads

    def run() -> torch.Tensor:
        kv = problem.kv.index_select(0, pages).unflatten(0, (prompts, -1))
        k, v = kv.permute(2, 0, 3, 1, 4, 5).flatten(3, 4)[:, :, :, :length].repeat_interleave(group, 2)
        q = problem.q.unflatten(0, (prompts, length)).transpose(1, 2)
        with torch.nn.attention.sdpa_kernel(backend):
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    return run


def time(device: str, quick: bool) -> list[dict[str, Any]]:
    """The target's shape with all tiles and torch's attention; chunks of a running engine with the first tiles."""
    from torch.nn.attention import SDPBackend

    on_gpu = torch.device(device).type == "cuda"
    sizes = (32, 8, 128) if on_gpu else (4, 2, 64)
    length = 2048 if on_gpu else 64
    tma = on_gpu and torch.cuda.get_device_capability() == (9, 0)
    tiles = [tile for tile in TILES if tma or not tile.tma] if on_gpu else [PrefillTile(32, 32, warps=4, stages=2)]
    seconds = 0.25 if quick else 0.5
    full = Problem([length] * 8, [length] * 8, *sizes, device=device)
    chunked = Problem([length // 4] * 4, [length // 4 * n for n in (1, 2, 3, 4)], *sizes, device=device)
    short = Problem([length // 4] * 2, [length // 4] * 2, *sizes, device=device)
    rows = []
    for problem, chosen, target in (
        (full, tiles[:4] if quick else tiles, "400 TFLOP/s"),
        (chunked, tiles[:2] if quick else tiles[:5], ""),
        (short, tiles[:2] if quick else tiles[:5], ""),
    ):
        candidates: dict[str, Callable[[], object]] = {label(tile): problem.call(tile) for tile in chosen}
        if problem is full and on_gpu:
            for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
                candidate = gathered_sdpa(problem, backend)
                try:
                    candidate()
                except RuntimeError:
                    continue
                candidates[f"gathered, torch {backend.name}"] = candidate
        for name, timing in time_interleaved(candidates, seconds, device=device).items():
            # The first tile is the one that runs take; the others are there for comparison.
            met = problem.flops / timing.median_ms / 1e9 >= 400 if target and name == label(chosen[0]) else None
            rows.append(
                time_row(
                    "prefill_attention",
                    problem.shape,
                    timing,
                    config=name,
                    flops=problem.flops,
                    bytes=problem.bytes,
                    device=device,
                    target=target if met is not None else "",
                    met=met,
                )
            )
    return rows
