"""How well the tiles of a product fill some SMs, by counting.

A persistent GEMM runs its tiles in rounds, one a CTA; in the last round some SMs have nothing to do. It is no
measurement: cycles are counted for the tile that is likely the fastest on sm_90 in 16-bit types.
"""

import math
from dataclasses import dataclass
from functools import cache

from nanoflow.ops.gemm_config import GemmConfig, candidates, guess_cycles

__all__ = ["FLOPS_A_CYCLE", "Waves", "waves"]

FLOPS_A_CYCLE = 4096
"""Of an SM of sm_90 in 16-bit types without sparsity."""


@dataclass(frozen=True)
class Waves:
    """One linear at one number of rows and SMs."""

    config: GemmConfig
    rounds: float
    """Tiles over CTAs: a split config fills the last round."""
    cycles: float
    used: float
    """Share of the tensor cores' cycles."""

    def __str__(self) -> str:
        tile = f"{self.config.block_m}x{self.config.columns(False)}"
        return f"{tile}{'/' if self.config.split else ' '}{self.rounds:5.2f} {self.used:4.0%}"


@cache
def waves(columns: int, inputs: int, rows: int, sms: int, *, silu: bool) -> Waves:
    """The tile that is likely the fastest."""
    config = candidates(rows, columns, inputs, sms, silu=silu)[0]
    cycles = guess_cycles(config, rows, columns, inputs, sms, silu=silu)
    tiles = math.prod(config.tiles(rows, columns, silu))
    used = 2.0 * rows * columns * inputs / (FLOPS_A_CYCLE * sms * cycles)
    return Waves(config, tiles / (sms * config.ctas_per_sm), cycles, used)
