"""Decode attention: against float32, and how fast it streams the KV cache.

The floor is the KV bytes over the memory's measured rate. Lengths are exact or ragged; pages are scattered at random.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.kernels.common import check_row, poisoned, randn, relative_error, time_interleaved, time_row
from nanoflow.ops.attention import DecodeAttention
from nanoflow.ops.decode_attention_triton import DecodeConfig, DecodeWorkspace, decode_attention, decode_config
from nanoflow.ops.decode_work import decode_work
from nanoflow.ops.operation import device_sms

TARGET_GBYTES_PER_SECOND = 2850

CANDIDATES = (
    # block tokens, stages, warps, programs an SM, TMA, registers. Programs an SM are what its registers and shared
    # memory hold for head size 128 in 16 bits.
    DecodeConfig(64, 3, 4, 3, True, 168),
    DecodeConfig(64, 3, 4, 2, True),
    DecodeConfig(64, 4, 4, 2, True),
    DecodeConfig(64, 2, 4, 4, True, 128),
    DecodeConfig(64, 3, 2, 3, True),
    DecodeConfig(32, 3, 4, 4, True, 128),
    DecodeConfig(32, 4, 4, 3, True, 168),
    DecodeConfig(32, 5, 4, 3, True, 168),
    DecodeConfig(32, 3, 2, 4, True),
    DecodeConfig(32, 3, 1, 5, True),
    DecodeConfig(16, 4, 1, 6, True),
    DecodeConfig(128, 2, 4, 2, True),
    DecodeConfig(128, 3, 4, 1, True),
    DecodeConfig(128, 2, 8, 2, True, 128),
    DecodeConfig(64, 3, 4, 2, False),
    DecodeConfig(64, 3, 4, 3, False, 168),
    DecodeConfig(32, 3, 4, 4, False, 128),
)


@dataclass(frozen=True)
class Shape:
    """A decode batch of one layer."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    lengths: tuple[int, ...]
    window: int | None = None
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        window = f", window {self.window}" if self.window else ""
        precision = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.name}; {self.heads}/{self.kv_heads} heads of {self.head_dim}, page {self.page_size}{window}, "
            f"{precision}"
        )

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values that are seen."""
        tokens = sum(min(length, self.window or length) for length in self.lengths)
        return tokens * 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def flops(self) -> int:
        tokens = sum(min(length, self.window or length) for length in self.lengths)
        return 4 * tokens * self.heads * self.head_dim


class Case:
    """A shape's buffers on a device, with random contents, and the kernel bound to them."""

    def __init__(self, shape: Shape, device: str) -> None:
        self.shape = shape
        self.device = torch.device(device)
        columns = -(-max(shape.lengths) // shape.page_size)
        used = [-(-length // shape.page_size) for length in shape.lengths]
        scattered = iter(1 + np.random.default_rng().permutation(sum(used)))
        self.pages = np.zeros((len(used), columns), np.int32)
        for request, count in enumerate(used):
            self.pages[request, :count] = [next(scattered) for _ in range(count)]
        pool = (1 + sum(used), 2, shape.kv_heads, shape.page_size, shape.head_dim)
        self.kv = randn(*pool, device=device, dtype=shape.dtype)
        rows = len(shape.lengths)
        width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        self.qkv = randn(rows, width, device=device, dtype=shape.dtype)
        self.q_THD = self.qkv[:, : shape.heads * shape.head_dim].unflatten(1, (shape.heads, shape.head_dim))
        self.out_THD = poisoned(rows, shape.heads, shape.head_dim, device=device, dtype=shape.dtype)

    def default(self, sms: int | None = None) -> DecodeConfig:
        """What an engine runs on all SMs, or in a lane that has `sms`."""
        shape = self.shape
        capability = torch.cuda.get_device_capability(self.device) if self.device.type == "cuda" else (8, 0)
        group = shape.heads // shape.kv_heads
        return decode_config(shape.page_size, shape.head_dim, shape.dtype, capability, group, sms)

    def bound(self, config: DecodeConfig, sms: int | None = None) -> Callable[[], None]:
        """The launch, for all SMs or for `sms`, as a function without arguments; its metadata and workspace are made
        here."""
        shape = self.shape
        work = decode_work(
            np.arange(len(shape.lengths), dtype=np.int32),
            np.array(shape.lengths, np.int32),
            self.pages,
            page_size=shape.page_size,
            block_tokens=config.block_tokens,
            window=shape.window,
        )
        on_device = torch.from_numpy(work).to(self.device)
        group = shape.heads // shape.kv_heads
        programs = (sms or device_sms(self.device)) * config.programs_per_sm
        workspace = DecodeWorkspace(programs, group, shape.head_dim, self.device)
        scale = shape.head_dim**-0.5

        def launch() -> None:
            decode_attention(self.q_THD, self.kv, self.out_THD, on_device, workspace, scale=scale, config=config)

        return launch

    def expected(self) -> torch.Tensor:
        """In float32, request by request."""
        shape = self.shape
        op = DecodeAttention("", "", "", shape.heads, shape.kv_heads, shape.head_dim, [shape.window])
        rows = []
        for row, length in enumerate(shape.lengths):
            pages = torch.from_numpy(self.pages[row]).to(self.device, torch.int64)
            rows.append(op.attend(self.q_THD[row : row + 1].float(), pages, length, shape.window, self.kv))
        return torch.cat(rows)


def name_of(config: DecodeConfig) -> str:
    loads = "tma" if config.tma else "pointers"
    registers = f" r{config.max_registers}" if config.max_registers else ""
    return f"{loads} b{config.block_tokens} s{config.stages} w{config.warps} x{config.programs_per_sm}{registers}"


def ragged(count: int, low: int, high: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng().integers(low, high + 1, count).tolist())


def check(device: str) -> list[dict[str, Any]]:
    """Every head layout, head size and dtype with its own config; every candidate on ragged lengths."""
    small = torch.device(device).type != "cuda"
    few = (lambda *a: ragged(*a)[:3]) if small else ragged
    edges = (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 257)
    rows: list[dict[str, Any]] = []

    def one(shape: Shape, config: DecodeConfig | None) -> None:
        case = Case(shape, device)
        config = config or case.default()
        case.bound(config)()
        limit = 1e-4 if shape.dtype == torch.float32 else 1e-2
        error = relative_error(case.out_THD, case.expected())
        rows.append(check_row("decode_attention", str(shape), error, limit, name_of(config)))

    half, single = (torch.float16, torch.float32) if small else (torch.bfloat16, torch.float32)
    for heads, kv_heads, head_dim, page in [(32, 8, 128, 128), (64, 8, 128, 64), (32, 32, 128, 64), (9, 3, 64, 16)]:
        one(Shape("ragged", heads, kv_heads, head_dim, page, few(37, 1, 900) + edges, None, half), None)
    for head_dim in (64, 80, 96, 128, 256):
        for dtype in (half, torch.float16, single):
            one(Shape("ragged", 8, 2, head_dim, 64, few(20, 1, 500) + edges, 100, dtype), None)
    one(Shape("MQA", 16, 1, 128, 64, few(20, 1, 500), None, half), None)
    one(Shape("page of 24", 8, 2, 64, 24, few(20, 1, 500), None, half), None)
    one(Shape("one long context", 32, 8, 128, 128, (500 if small else 100_003,), None, half), None)
    for config in () if small else CANDIDATES:
        one(Shape("ragged", 32, 8, 128, 128, ragged(150, 1, 1500) + edges), config)
    return rows


def time(device: str, quick: bool) -> list[dict[str, Any]]:
    """All candidates on the targeted shape; the default on the others."""
    shapes = [
        Shape("300 x 768 tokens", 32, 8, 128, 128, (768,) * 300),
        Shape("600 ragged, 512 to 1,024 tokens", 32, 8, 128, 128, ragged(600, 512, 1024)),
        Shape("32 x 16,384 tokens", 32, 8, 128, 128, (16384,) * 32),
        Shape("1 x 131,072 tokens", 32, 8, 128, 128, (131072,)),
        Shape("600 x 768 tokens", 32, 8, 128, 64, (768,) * 600),
        Shape("150 x 768 tokens", 32, 32, 128, 128, (768,) * 150),
        Shape("600 x 768 tokens", 64, 8, 128, 128, (768,) * 600),
        Shape("600 x 768 tokens", 28, 4, 128, 128, (768,) * 600),
        Shape("600 x 768 tokens", 9, 3, 64, 64, (768,) * 600),
        Shape("600 x 4,000 tokens", 32, 8, 128, 128, (4000,) * 600, window=1024),
    ]
    seconds = 0.2 if quick else 0.5
    if torch.device(device).type != "cuda":
        small = Case(Shape("3 x 100 tokens", 8, 2, 64, 64, (100,) * 3, dtype=torch.float16), device)
        return _rows(small, [small.default()], device, seconds, "")
    target = f">= {TARGET_GBYTES_PER_SECOND} GB/s"
    aimed = Case(Shape("600 x 768 tokens", 32, 8, 128, 128, (768,) * 600), device)
    default = aimed.default()
    others = () if quick else tuple(config for config in CANDIDATES if config != default)
    rows = _rows(aimed, [default, *others], device, seconds, target)
    for shape in shapes[: 3 if quick else None]:
        case = Case(shape, device)
        rows += _rows(case, [case.default()], device, seconds, "")
    return rows


def _rows(case: Case, configs: list[DecodeConfig], device: str, seconds: float, target: str) -> list[dict[str, Any]]:
    """`target` is for the first of the configurations."""
    shape = case.shape
    timings = time_interleaved({name_of(config): case.bound(config) for config in configs}, seconds, device=device)
    rows = []
    for index, (name, timing) in enumerate(timings.items()):
        rate = shape.kv_bytes / timing.median_ms / 1e6
        aim = {"target": target, "met": rate >= TARGET_GBYTES_PER_SECOND} if target and index == 0 else {}
        rows.append(
            time_row(
                "decode_attention", str(shape), timing, config=name, flops=shape.flops, bytes=shape.kv_bytes,
                device=device, **aim,
            )
        )  # fmt: skip
    return rows
