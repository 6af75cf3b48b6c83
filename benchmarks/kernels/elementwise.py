"""Element-wise operations of a Llama-3-8B layer: right against float32, and timed against the bytes that they move.

The target is for the layer's four together, 32 layers: buffers take turns over several sets, as GEMM outputs would not
all be in the L2 cache either.
"""

from typing import Any

import torch

from benchmarks.kernels.common import check_row, poisoned, randn, relative_error, time_interleaved, time_row
from nanoflow.ops.rope import RopeConfig, rope_tables

E, F, HEADS, KV_HEADS, D, LAYERS, PAGE = 4096, 14336, 32, 8, 128, 32, 128
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}


class Inputs:
    """One set of buffers for T rows."""

    def __init__(self, rows: int, device: str, dtype: torch.dtype = torch.bfloat16) -> None:
        self.residual, self.branch = (
            randn(rows, E, device=device, dtype=dtype),
            randn(rows, E, device=device, dtype=dtype),
        )
        self.weight, self.normed = randn(E, device=device, dtype=dtype), poisoned(rows, E, device=device, dtype=dtype)
        self.gate_up = randn(rows, 2 * F, device=device, dtype=dtype)
        self.product = poisoned(rows, F, device=device, dtype=dtype)
        self.qkv = randn(rows, (HEADS + 2 * KV_HEADS) * D, device=device, dtype=dtype)
        pages = 1 + -(-rows // PAGE)
        self.kv = randn(pages, 2, KV_HEADS, PAGE, D, device=device, dtype=dtype)
        self.kv_index = PAGE + torch.randperm(rows, device=device)
        self.positions = torch.randint(0, 8192, (rows,), device=device)
        self.cos, self.sin = rope_tables(RopeConfig(D, theta=500000.0), self.positions)
        self.head_weight = randn(D, device=device, dtype=dtype)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x[..., : D // 2], x[..., D // 2 :]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def check(device: str) -> list[dict[str, Any]]:
    """Every kernel against float32 (float64 for float32), for odd numbers of rows."""
    from nanoflow.ops import elementwise_triton, norm_triton, rope_triton

    table = []
    for dtype, limit in LIMIT.items():
        for rows in (1, 77, 1280):
            x = Inputs(rows, device, dtype)
            wide = torch.float64 if dtype == torch.float32 else torch.float32
            shape = f"{rows} rows {str(dtype).removeprefix('torch.')}"

            def row(name: str, out: torch.Tensor, reference: torch.Tensor, shape=shape, limit=limit) -> None:
                table.append(check_row(name, shape, relative_error(out, reference), limit))

            def rms(y: torch.Tensor) -> torch.Tensor:
                return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)

            gate, up = x.gate_up.to(wide).chunk(2, -1)
            elementwise_triton.silu_mul(x.gate_up, x.product)
            row("silu_mul", x.product, torch.nn.functional.silu(gate) * up)
            total = x.residual.to(wide) + x.branch.to(wide)
            norm_triton.add_norm(x.residual, x.branch, x.weight, 1e-5, x.normed)
            row("add_norm: sum", x.residual, total)
            row("add_norm: norm", x.normed, rms(total) * x.weight.to(wide))
            norm_triton.norm(x.branch, x.weight, 1e-5, x.normed)
            row("norm", x.normed, rms(x.branch.to(wide)) * x.weight.to(wide))
            total = x.branch.to(wide) + x.residual.to(wide)
            elementwise_triton.add(x.branch, x.residual)
            row("add", x.branch, total)
            elementwise_triton.gather_rows(x.gate_up[:, :E], torch.arange(rows - 1, -1, -1, device=device), x.normed)
            row("gather_rows", x.normed, x.gate_up[:, :E].flip(0))
            for norm in (False, True):
                x = Inputs(rows, device, dtype)
                heads = x.qkv.to(wide).view(rows, -1, D).clone()
                if norm:
                    heads[:, : HEADS + KV_HEADS] = rms(heads[:, : HEADS + KV_HEADS]) * x.head_weight.to(wide)
                rotated = _rotated(heads[:, : HEADS + KV_HEADS], x.cos.to(wide), x.sin.to(wide))
                weights = (x.head_weight, x.head_weight, 1e-5) if norm else None
                sizes = (HEADS, KV_HEADS, D)
                x.kv.fill_(torch.nan)
                rope_triton.rope_append(x.qkv, x.cos, x.sin, x.kv, x.kv_index, *sizes, weights)
                name = "qk_norm_rope_append" if norm else "rope_append"
                row(f"{name}: q", x.qkv.view(rows, -1, D)[:, :HEADS], rotated[:, :HEADS])
                page, offset = x.kv_index // PAGE, x.kv_index % PAGE
                row(f"{name}: k", x.kv[page, 0, :, offset], rotated[:, HEADS:])
                row(f"{name}: v", x.kv[page, 1, :, offset], heads[:, HEADS + KV_HEADS :])
    return table


def time(device: str, quick: bool) -> list[dict[str, Any]]:
    """Each operation alone with candidate configs, then the four of a layer together."""
    from nanoflow.ops import elementwise_triton, norm_triton, rope_triton

    rows, seconds = 1280, 0.1 if quick else 0.5
    sets = [Inputs(rows, device) for _ in range(3)]
    sizes = (HEADS, KV_HEADS, D)
    item = 2 * rows

    def rope_append(x: Inputs, **config: int) -> None:
        rope_triton.rope_append(x.qkv, x.cos, x.sin, x.kv, x.kv_index, *sizes, **config)

    def add_norm(x: Inputs, **config: int) -> None:
        norm_triton.add_norm(x.residual, x.branch, x.weight, 1e-5, x.normed, **config)

    def silu_mul(x: Inputs, **config: int) -> None:
        elementwise_triton.silu_mul(x.gate_up, x.product, **config)

    def layer(x: Inputs) -> None:
        rope_append(x)
        add_norm(x)
        silu_mul(x)
        add_norm(x)

    blocks = [
        {"block": block, "warps": warps} for block, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (1024, 2))
    ]
    heads = [{"heads_block": block, "warps": warps} for block, warps in ((16, 4), (8, 2), (8, 4), (16, 8), (64, 8))]
    warps = [{"warps": count} for count in (2, 4, 8, 16)]
    table = []
    for name, fn, configs, elements in (
        ("silu_mul", silu_mul, blocks, 3 * F),
        ("add_norm", add_norm, warps, 4 * E),
        ("rope_append", rope_append, heads, 2 * (HEADS + 2 * KV_HEADS) * D),
    ):
        calls = {
            str(config): [lambda x=x, f=fn, c=config: f(x, **c) for x in sets]
            for config in configs[: 1 if quick else 9]
        }
        for config, timing in time_interleaved(calls, seconds, device=device).items():
            table.append(time_row(name, f"{rows} rows", timing, config=config, bytes=elements * item, device=device))
        _restore(sets)

    timing = time_interleaved({"layer": [lambda x=x: layer(x) for x in sets]}, seconds, device=device)["layer"]
    micros = timing.median_ms * 1e3 * LAYERS / rows
    elements = 3 * F + 8 * E + 2 * (HEADS + 2 * KV_HEADS) * D
    table.append(
        time_row(
            "element-wise ops of a layer",
            f"{rows} rows",
            timing,
            config=f"{micros:.2f} us a token for {LAYERS} layers",
            bytes=elements * item,
            device=device,
            target="2.0 us a token for 32 layers or less",
            met=micros <= 2.0,
        )
    )
    _restore(sets)
    return table


def _restore(sets: list[Inputs]) -> None:
    """New values: a residual that only ever grows would end in infinities."""
    for x in sets:
        x.residual.normal_()
        x.branch.normal_()
        x.qkv.normal_()
