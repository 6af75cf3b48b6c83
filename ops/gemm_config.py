"""How the Triton GEMM is cut: one tile's size, how tiles are spread over the SMs, and a default for any shape."""

import math
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch

__all__ = ["SILU_TILES", "TILES", "GemmConfig", "Split", "Workspace", "candidates", "default_config", "guess_cycles"]

LEAST_STEPS = 8
"""K steps of a piece, at least."""
LEAST_TAIL = 4
"""K steps of a tile that a helper takes, at least."""
WRITE, READ = 6, 10
"""K steps that it takes to fill a piece's pipeline and write its partial sums, and to wait for and add those of one.
Measured for tiles of 128 x 256 on an H100."""


@dataclass(frozen=True)
class Split:
    """How the first `tiles` tiles are cut along K: into `pieces` of `length` steps, and a `tail` for the helpers."""

    tiles: int
    pieces: int
    length: int
    tail: int
    helpers: int

    @property
    def programs(self) -> int:
        """CTAs that take part."""
        return self.tiles * self.pieces + self.helpers

    @property
    def partials(self) -> int:
        """Partial sums of a tile."""
        return self.pieces - 1 + (self.helpers > 0)

    @property
    def steps(self) -> int:
        """K steps that it takes about as long as."""
        others = self.length + WRITE if self.pieces > 1 else self.length
        if self.helpers:
            others = max(others, -(-self.tiles // self.helpers) * (self.tail + WRITE))
        return others + READ * self.partials


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
    split: bool = False
    """Cut the K steps of the tiles that would not fill a last round among all CTAs; see `split_tiles`."""
    flatten: bool = False
    """Let the loads of a CTA's next tile start before the last one is stored."""

    def __str__(self) -> str:
        """Short, for tables: ``128x256x64 w8 s3 split``."""
        columns = f"{self.block_n}+{self.extra_n}" if self.extra_n else f"{self.block_n}"
        words = [f"{self.block_m}x{columns}x{self.block_k} w{self.warps} s{self.stages}"]
        words += [f"g{self.group_m}"] if self.group_m != 8 else []
        words += [f"c{self.ctas_per_sm}"] if self.ctas_per_sm != 1 else []
        words += [f"e{self.epilogue_parts}"] if self.epilogue_parts != 1 else []
        words += [word for word in ("split", "flatten") if getattr(self, word)]
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

    def split_tiles(self, tiles: int, steps: int, sms: int) -> Split | None:
        """How the tiles of the last, unfilled round are cut, for tiles of `steps` K steps; None if they stay whole.

        Each is cut into pieces of one length, one a CTA. CTAs that are left over help: each takes the last steps of
        some tiles, one after the other, so many steps that helpers and owners end together.
        """
        programs = sms * self.ctas_per_sm
        rest = tiles % programs
        if not self.split or not rest:
            return None
        found = []
        for pieces in range(1, max(1, min(programs // rest, steps // LEAST_STEPS)) + 1):
            length = -(-steps // pieces)
            found.append(Split(rest, -(-steps // length), length, 0, 0))
            helpers = programs - pieces * rest
            if not 0 < helpers < rest:  # none, or enough for another piece
                continue
            turns = -(-rest // helpers)
            length = math.ceil(turns * (steps + WRITE) / (1 + turns * pieces))
            tail = steps - pieces * length
            if tail >= LEAST_TAIL:
                found.append(Split(rest, pieces, length, tail, helpers))
        best = min(found, key=lambda split: split.steps)
        return best if best.partials else None

    def split_of(self, rows: int, columns: int, inputs: int, sms: int, *, silu: bool = False) -> Split | None:
        """`split_tiles` of one shape."""
        return self.split_tiles(math.prod(self.tiles(rows, columns, silu)), -(-inputs // self.block_k), sms)

    def tile_bytes(self, silu: bool = False) -> int:
        """Of one tile's partial sums."""
        return self.block_m * (2 * self.block_n if silu else self.block_n + self.extra_n) * 4


class Workspace:
    """Partial sums of split configs, and how many of each tile have come.

    One for each lane that runs GEMMs, since launches that share one must not overlap; of a size that holds any split of
    `config` on up to `sms` SMs.
    """

    def __init__(self, config: GemmConfig, sms: int, device: torch.device, *, silu: bool = False) -> None:
        slots = sms * config.ctas_per_sm if config.split else 1
        self.partials = torch.empty(slots * config.tile_bytes(silu) // 4, dtype=torch.float32, device=device)
        self.arrived = torch.zeros(slots, dtype=torch.int32, device=device)


TILES = (
    GemmConfig(128, 256, 0, 64, 8, 3, epilogue_parts=2),
    GemmConfig(128, 256, 0, 64, 8, 4, epilogue_parts=4),
    GemmConfig(128, 256, 0, 64, 8, 3, epilogue_parts=2, flatten=True),
    GemmConfig(128, 256, 0, 64, 8, 4, epilogue_parts=4, flatten=True),
    GemmConfig(128, 256, 0, 64, 8, 4, epilogue_parts=4, split=True),
    GemmConfig(128, 256, 64, 64, 8, 3, epilogue_parts=4),
    GemmConfig(64, 256, 64, 64, 4, 4, epilogue_parts=4),
    GemmConfig(256, 128, 32, 64, 8, 4, epilogue_parts=4),
    GemmConfig(256, 128, 0, 64, 8, 4, epilogue_parts=2),
    GemmConfig(256, 128, 0, 64, 8, 4, epilogue_parts=2, split=True),
    GemmConfig(128, 128, 64, 64, 8, 4, epilogue_parts=2),
    GemmConfig(128, 128, 32, 64, 8, 5, epilogue_parts=4),
    GemmConfig(128, 128, 0, 64, 8, 5, epilogue_parts=2, flatten=True),
    GemmConfig(128, 128, 0, 64, 4, 3, ctas_per_sm=2, epilogue_parts=2),
)
"""Configs of 16-bit types for sm_90 worth measuring. None spills registers there."""

SILU_TILES = (
    GemmConfig(128, 128, 0, 64, 8, 4, epilogue_parts=2),
    GemmConfig(128, 128, 0, 64, 8, 4, epilogue_parts=4, split=True),
    GemmConfig(128, 128, 0, 64, 8, 4, epilogue_parts=4, flatten=True),
    GemmConfig(128, 128, 0, 64, 8, 3, epilogue_parts=2, flatten=True),
    GemmConfig(128, 64, 0, 64, 4, 3, ctas_per_sm=2, epilogue_parts=2),
    GemmConfig(64, 128, 0, 64, 4, 4, epilogue_parts=2),
)
"""The same with SiLU, where a tile has two accumulators of `block_n` columns."""

SINGLE = GemmConfig(64, 64, 0, 16, 8, 3)
"""Of float32, which is computed without tensor cores."""

SMALL = GemmConfig(64, 128, 0, 64, 4, 4)
"""Of up to 64 rows."""

AMPERE = GemmConfig(128, 128, 0, 32, 8, 4)
"""Of 16-bit types without TMA."""


def candidates(rows: int, columns: int, inputs: int, sms: int, *, silu: bool = False) -> list[GemmConfig]:
    """The configs worth measuring for one shape on `sms` SMs, likeliest first, those that waste too much left out."""
    rated = []
    for config in SILU_TILES if silu else TILES:
        if config.split and not config.split_of(rows, columns, inputs, sms, silu=silu):
            continue
        rated.append((guess_cycles(config, rows, columns, inputs, sms, silu=silu), config))
    rated.sort(key=lambda entry: entry[0])
    return [config for guess, config in rated if guess < rated[0][0] * 1.3]


@cache
def default_config(
    rows: int, columns: int, inputs: int, sms: int, dtype: torch.dtype, *, tma: bool, silu: bool = False
) -> GemmConfig:
    """A config for any shape when none was measured."""
    if dtype == torch.float32:
        return SINGLE
    if not tma:
        return AMPERE
    if rows <= 64:
        return SMALL
    return candidates(rows, columns, inputs, sms, silu=silu)[0]


def guess_cycles(config: GemmConfig, rows: int, columns: int, inputs: int, sms: int, *, silu: bool = False) -> float:
    """Rough time in SM cycles: K steps of the CTA that has most of them, each the longer of its arithmetic and its
    traffic in shared memory (what the copies write and the matrix units read, 128 bytes a cycle)."""
    steps = -(-inputs // config.block_k)
    rounds = -(-math.prod(config.tiles(rows, columns, silu)) // (sms * config.ctas_per_sm))
    split = config.split_of(rows, columns, inputs, sms, silu=silu)
    most = (rounds - 1) * steps + split.steps if split else rounds * steps
    widths = [config.block_n, config.block_n if silu else config.extra_n]
    groups = config.block_m / 64
    arithmetic = sum(widths) * groups * 2  # m64nNk16 takes N / 2 cycles, and a step of 64 has four
    read = sum(4 * groups * (16 + width / 4) for width in widths if width)
    return most * max(arithmetic, read + config.block_m + sum(widths)) * config.block_k / 64 * config.ctas_per_sm
