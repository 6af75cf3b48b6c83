"""How the Triton GEMM is cut: one tile's size, how tiles are spread over the SMs, and a default for any shape."""

from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch

__all__ = ["SILU_TILES", "TILES", "GemmConfig", "Workspace", "candidates", "default_config"]


@dataclass(frozen=True)
class GemmConfig:
    """Of one launch. Blocks are powers of two; a tile is `block_m` rows by ``block_n + extra_n`` columns."""

    block_m: int = 128
    block_n: int = 256
    extra_n: int = 0
    """Columns of a second accumulator, 0 for none. A weight with SiLU has `block_n` of them instead."""
    block_k: int = 64
    warps: int = 8
    stages: int = 3
    group_m: int = 8
    """Tiles down the rows that run together."""
    ctas_per_sm: int = 1
    epilogue_parts: int = 1
    """Pieces that the first accumulator is stored in: 1, 2 or 4."""
    stream: bool = False
    """Spread the last rounds' K steps evenly over all CTAs instead of leaving some without a tile."""
    flatten: bool = False
    """Let the loads of a CTA's next tile start before the last one is stored."""
    specialize: bool = False
    """Warps that only load beside two groups that multiply: `warps` is 4, no bias, no SiLU; see
    `gemm_specialized_triton`. Where that cannot be, the same tile runs with eight warps."""
    registers: int = 0
    """Most registers a thread; 0 leaves it to the compiler."""

    def __str__(self) -> str:
        """Short, for tables: ``128x256x64 w8 s3 stream``."""
        columns = f"{self.block_n}+{self.extra_n}" if self.extra_n else f"{self.block_n}"
        words = [f"{self.block_m}x{columns}x{self.block_k} w{self.warps} s{self.stages}"]
        words += [f"g{self.group_m}"] if self.group_m != 8 else []
        words += [f"c{self.ctas_per_sm}"] if self.ctas_per_sm != 1 else []
        words += [f"e{self.epilogue_parts}"] if self.epilogue_parts != 1 else []
        words += [f"r{self.registers}"] if self.registers else []
        words += [word for word in ("stream", "flatten", "specialize") if getattr(self, word)]
        return " ".join(words)

    def to_dict(self) -> dict[str, Any]:
        """What differs from the defaults; ``GemmConfig(**config.to_dict()) == config``."""
        default = asdict(GemmConfig())
        return {key: value for key, value in asdict(self).items() if value != default[key]}

    def columns(self, silu: bool) -> int:
        """Output columns of one tile."""
        return self.block_n if silu else self.block_n + self.extra_n

    def tiles(self, rows: int, columns: int, silu: bool = False) -> tuple[int, int]:
        """Tiles down the rows and along the columns; `columns` are the weight's."""
        outputs = columns // 2 if silu else columns
        return -(-rows // self.block_m), -(-outputs // self.columns(silu))

    def spread_tiles(self, tiles: int, sms: int) -> int:
        """Tiles whose K steps are spread over all CTAs: those that would not fill a round, and one full round more, so
        that a CTA takes part in few of them."""
        programs = sms * self.ctas_per_sm
        if not self.stream or tiles % programs == 0:
            return 0
        return tiles if tiles < 2 * programs else tiles % programs + programs

    def programs(self, tiles: int, steps: int, sms: int) -> int:
        """CTAs to launch for tiles of `steps` K steps each. Where tiles are spread, each CTA has a step at least: its
        share must not be empty, since others wait for it; four, if the tiles are few."""
        programs = sms * self.ctas_per_sm
        spread = self.spread_tiles(tiles, sms)
        return min(programs, spread * -(-steps // 4) if spread else tiles)

    def workspace_bytes(self, sms: int, silu: bool = False) -> int:
        """Bytes of partial sums that a stream config needs on `sms` SMs; 0 for others."""
        if not self.stream:
            return 0
        columns = 2 * self.block_n if silu else self.block_n + self.extra_n
        return sms * self.ctas_per_sm * self.block_m * columns * 4


class Workspace:
    """Partial sums and flags of stream configs. One for each stream that runs GEMMs: launches must not overlap."""

    def __init__(self, nbytes: int, programs: int, device: torch.device) -> None:
        self.partials = torch.empty(max(nbytes // 4, 1), dtype=torch.float32, device=device)
        self.flags = torch.zeros(max(programs, 1), dtype=torch.int32, device=device)

    def holds(self, nbytes: int, programs: int) -> bool:
        return self.partials.numel() * 4 >= nbytes and self.flags.numel() >= programs


TILES = (
    GemmConfig(128, 256, 0, 64, 8, 3, epilogue_parts=2),
    GemmConfig(128, 256, 0, 64, 8, 4, epilogue_parts=4),
    GemmConfig(128, 256, 0, 64, 8, 3, epilogue_parts=2, flatten=True),
    GemmConfig(128, 256, 0, 64, 8, 4, epilogue_parts=4, flatten=True),
    GemmConfig(128, 256, 0, 64, 8, 4, epilogue_parts=2, stream=True),
    GemmConfig(128, 256, 0, 64, 8, 4, epilogue_parts=4, stream=True),
    GemmConfig(256, 128, 0, 64, 8, 4, epilogue_parts=2),
    GemmConfig(256, 128, 0, 64, 8, 3, epilogue_parts=2, flatten=True),
    GemmConfig(256, 128, 0, 64, 8, 4, epilogue_parts=2, stream=True),
    GemmConfig(128, 128, 64, 64, 8, 4, epilogue_parts=2),
    GemmConfig(128, 128, 64, 64, 8, 4, epilogue_parts=2, flatten=True),
    GemmConfig(128, 128, 64, 64, 8, 5, epilogue_parts=4, stream=True),
    GemmConfig(128, 128, 32, 64, 8, 4, epilogue_parts=2),
    GemmConfig(128, 128, 32, 64, 8, 5, epilogue_parts=4),
    GemmConfig(128, 128, 0, 64, 8, 5, epilogue_parts=2, flatten=True),
    GemmConfig(128, 128, 0, 128, 8, 3, epilogue_parts=2),
    GemmConfig(128, 128, 0, 64, 4, 3, ctas_per_sm=2, epilogue_parts=2),
    GemmConfig(128, 128, 0, 64, 4, 3, ctas_per_sm=2, epilogue_parts=2, stream=True),
    GemmConfig(64, 256, 0, 64, 4, 4, epilogue_parts=2),
    GemmConfig(128, 256, 0, 64, 4, 3, specialize=True),
    GemmConfig(256, 128, 0, 64, 4, 3, specialize=True),
    GemmConfig(128, 128, 0, 64, 4, 4, specialize=True),
)
"""Configs of 16-bit types for sm_90 worth measuring. None spills registers there."""

SILU_TILES = (
    GemmConfig(128, 128, 0, 64, 8, 4, epilogue_parts=2),
    GemmConfig(128, 128, 0, 64, 8, 3, epilogue_parts=2, flatten=True),
    GemmConfig(128, 128, 0, 64, 8, 4, epilogue_parts=4, stream=True),
    GemmConfig(256, 64, 0, 64, 8, 4),
    GemmConfig(128, 64, 0, 64, 8, 4),
)
"""The same with SiLU, where a tile has two accumulators of `block_n` columns."""

SINGLE = GemmConfig(64, 64, 0, 16, 8, 3)
"""Of float32, which is computed without tensor cores."""

SMALL = GemmConfig(64, 128, 0, 64, 4, 4)
"""Of up to 64 rows."""

AMPERE = GemmConfig(128, 128, 0, 32, 8, 4)
"""Of 16-bit types without TMA."""


def candidates(rows: int, columns: int, sms: int, *, silu: bool = False) -> list[GemmConfig]:
    """The configs worth measuring for one shape on `sms` SMs, likeliest first, those that waste too much left out."""
    tiles = SILU_TILES if silu else TILES
    useful = [config for config in tiles if not config.stream or _spreads(config, rows, columns, sms, silu)]
    rated = sorted(useful, key=lambda config: _idle(config, rows, columns, sms, silu))
    least = _idle(rated[0], rows, columns, sms, silu)
    return [config for config in rated if _idle(config, rows, columns, sms, silu) < least * 1.35]


@cache
def default_config(
    rows: int, columns: int, sms: int, dtype: torch.dtype, *, tma: bool, silu: bool = False
) -> GemmConfig:
    """A config for any shape when none was measured."""
    if dtype == torch.float32:
        return SINGLE
    if not tma:
        return AMPERE
    if rows <= 64:
        return SMALL
    return candidates(rows, columns, sms, silu=silu)[0]


def _count(config: GemmConfig, rows: int, columns: int, silu: bool) -> int:
    tiles_m, tiles_n = config.tiles(rows, columns, silu)
    return tiles_m * tiles_n


def _spreads(config: GemmConfig, rows: int, columns: int, sms: int, silu: bool) -> bool:
    return config.spread_tiles(_count(config, rows, columns, silu), sms) > 0


def _idle(config: GemmConfig, rows: int, columns: int, sms: int, silu: bool) -> float:
    """Rough time: rounds of tiles, each by its area and by how its blocks' loads compare with its arithmetic."""
    tiles = _count(config, rows, columns, silu)
    programs = sms * config.ctas_per_sm
    width = config.columns(silu) * (2 if silu else 1)
    rounds = tiles / programs + 0.06 if config.spread_tiles(tiles, sms) else -(-tiles // programs)
    area = config.block_m * width
    loads = 1 + 12 / config.block_m + 12 / width
    return rounds * area * loads * config.ctas_per_sm
