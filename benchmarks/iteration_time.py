"""How long an iteration takes, as a formula: Llama-3-8B in bfloat16 on one H100, in sequence, no gaps between kernels.

For an iteration of T rows (R with padding) whose decode rows attend to C tokens of KV cache and whose prompts make P
(query, key) pairs, S rows of it sampled:

    GEMM               max(0.64 us * R', 436 MB / 2.9 TB/s), R' being R rounded up to a tile, 128 rows
    decode attention   4,096 B * C / 2.95 TB/s
    prefill attention  4 * 4,096 FLOP * P / 350 TFLOP/s
    element-wise       2.03 us / 32 * R
    iteration          32 layers of these + 0.27 ms + 1.4 us * S for the head and sampling

0.64 us a row is 0.82 ms a layer at 1,280 rows: sustained, all four GEMMs took 0.78 to 0.84 ms there, the clock
lowered by the power limit. The other rates were measured on the same GPU with this project's kernels (hot, in CUDA
graphs; docs/performance.md). 436 MB are a layer's weights, 4,096 B a token's keys and values in a layer, and 4,096 the
32 query heads times 128.

What an iteration takes over the `ideal` of the same work, by cause:

    padding        R and R' rows in place of T, as far as that lengthens it
    small batches  the weights are read, although T rows would take less
    iterations     the 0.27 ms of each iteration beyond the number that was needed
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["IterationTime", "Iterations"]

Float = NDArray[np.float64]

LAYERS = 32
TILE = 128
KV_BYTES = 4096
QUERY_COLUMNS = 4096
WEIGHT_BYTES = 436e6


@dataclass(frozen=True, eq=False)
class Iterations:
    """What iterations had to do, [I] each."""

    rows: Float
    """Rows without padding."""
    padded: Float
    """Rows with padding."""
    context: Float
    """KV tokens that decode attention read."""
    pairs: Float
    """(query, key) pairs of prefill attention."""
    sampled: Float
    """Rows sampled."""


@dataclass(frozen=True)
class IterationTime:
    """The formula's rates; all times in seconds."""

    gemm_row: float = 0.64e-6
    """A row in the four GEMMs of a layer."""
    weight_bytes_per_second: float = 2.9e12
    kv_bytes_per_second: float = 2.95e12
    prefill_flops: float = 350e12
    elementwise_row: float = 2.03e-6
    """A row in the element-wise operations of all layers."""
    head: float = 0.27e-3
    head_row: float = 1.4e-6

    def seconds(self, work: Iterations) -> Float:
        """[I] what the iterations take."""
        return self._needed(work) + self.padding(work) + self.small_batches(work) + self.head

    def ideal(self, work: Iterations, iterations: float) -> float:
        """What all of the work would take in `iterations` iterations without padding and small batches."""
        return float(self._needed(work).sum()) + iterations * self.head

    def small_batches(self, work: Iterations) -> Float:
        """[I] by how much reading the weights takes longer than the GEMMs of the rows without padding."""
        return LAYERS * np.maximum(self._weights - self.gemm_row * work.rows, 0.0)

    def padding(self, work: Iterations) -> Float:
        """[I] what padding adds."""
        tiles = np.ceil(work.padded / TILE) * TILE
        gemm = np.maximum(self.gemm_row * tiles, self._weights) - np.maximum(self.gemm_row * work.rows, self._weights)
        return LAYERS * gemm + self.elementwise_row * (work.padded - work.rows)

    @property
    def _weights(self) -> float:
        return WEIGHT_BYTES / self.weight_bytes_per_second

    def _needed(self, work: Iterations) -> Float:
        rows = LAYERS * self.gemm_row * work.rows + self.elementwise_row * work.rows
        decode = LAYERS * KV_BYTES * work.context / self.kv_bytes_per_second
        prefill = LAYERS * 4 * QUERY_COLUMNS * work.pairs / self.prefill_flops
        return np.asarray(rows + decode + prefill + self.head_row * work.sampled)
