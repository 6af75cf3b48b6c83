"""Measuring plans against each other: steady-state iterations in alternating blocks, in one process, on one executor.

A card's speed drifts with its temperature, and its power limit answers only after a while. So plans are not timed one
after the other: each gets a block of some seconds in turn, the order is turned round every time, and what is compared
are neighbours. A block is cut at its begin, where the card still runs as the block before left it.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from nanoflow.ops.batch import TOKEN_ON_DEVICE, DenseBatch
from nanoflow.ops.graph import RESIDUAL
from nanoflow.ops.sampling import Sampler
from nanoflow.pipeline.bound_programs import BoundPrograms
from nanoflow.pipeline.executor import Executor

__all__ = ["Block", "Comparison", "Measured", "compare", "largest_error", "output_error", "run_block"]

SETTLING = 0.2
"""Share of a block that is not counted."""
ERROR_OF_A_LAYER = 0.02
"""See `largest_error`. Measured with random weights in bfloat16: up to 0.041 of Llama-3-8B's 32 layers
(benchmarks/results/lanes.json), of Llama-3-70B's 80 0.079 where most rows decode and 0.128 where all are prompts'
(network_lanes.json)."""
WORST_ROW = 1 / 4
"""How much of the worst row's error counts, see `output_error`."""


class Measured(Executor, Protocol):
    """An executor whose buffers, and last tokens, can be looked into."""

    @property
    def bound(self) -> BoundPrograms: ...

    @property
    def sampler(self) -> Sampler: ...


@dataclass(frozen=True)
class Block:
    """Steady-state iterations of one plan, one after the other."""

    iterations: int
    seconds: float
    """Of one iteration by the device's clock, idle time before it included: the median."""
    wall_seconds: float
    """Of all of them."""
    joules: float | None
    """Of all of them; None if the device does not tell."""

    @property
    def watts(self) -> float | None:
        return None if self.joules is None else self.joules / self.wall_seconds


@dataclass(frozen=True)
class Comparison:
    """Blocks of several plans, taken in turn: block i of one is the neighbour of block i of every other."""

    blocks: Mapping[str, tuple[Block, ...]]

    def seconds(self, name: str) -> float:
        """Of an iteration: the median of its blocks."""
        return statistics.median(block.seconds for block in self.blocks[name])

    def joules(self, name: str) -> float | None:
        """Of an iteration: the median of its blocks."""
        each = [block.joules / block.iterations for block in self.blocks[name] if block.joules is not None]
        return statistics.median(each) if each else None

    def watts(self, name: str) -> float | None:
        each = [block.watts for block in self.blocks[name] if block.watts is not None]
        return statistics.median(each) if each else None

    def ratios(self, base: str, name: str) -> list[float]:
        """How many times as fast as `base` it was, block by block."""
        pairs = zip(self.blocks[base], self.blocks[name], strict=True)
        return [first.seconds / second.seconds for first, second in pairs]


def run_block(
    executor: Measured,
    batch: DenseBatch,
    seconds: float,
    joules: Callable[[], float | None],
) -> Block:
    """Launch `batch` again and again for `seconds`, one ahead of the one that is collected, as the engine does.

    Args:
        joules: reads the device's energy counter.
    """
    times: list[float] = []
    first: float | None = None
    settled = False
    begun = counted = time.perf_counter()
    executor.launch(batch)
    while (now := time.perf_counter()) < begun + seconds or len(times) < 3 or not settled:
        if not settled and now >= begun + SETTLING * seconds:
            first, counted, settled = joules(), now, True
            times.clear()
        executor.launch(batch)
        output = executor.collect()
        times.append(output.seconds + output.idle_seconds)
    last, ended = joules(), time.perf_counter()
    executor.collect()
    used = None if first is None or last is None else last - first
    return Block(len(times), statistics.median(times), ended - counted, used)


def compare(
    executor: Measured,
    batches: Mapping[str, DenseBatch],
    *,
    seconds: float,
    pairs: int,
    joules: Callable[[], float | None],
    progress: Callable[[str, Block], None] = lambda name, block: None,
) -> Comparison:
    """Blocks of every batch in turn, `pairs` of each, `seconds` long.

    Args:
        batches: the same mix laid out for each of the executor's programs, by a name for it.
        progress: told of every block.
    """
    found: dict[str, list[Block]] = {name: [] for name in batches}
    for name in batches:  # warm up; nothing of it counts
        run_block(executor, batches[name], min(seconds, 1.0), joules)
    for turn in range(pairs):
        for name in batches if turn % 2 == 0 else reversed(list(batches)):
            block = run_block(executor, batches[name], seconds, joules)
            found[name].append(block)
            progress(name, block)
    return Comparison({name: tuple(blocks) for name, blocks in found.items()})


def output_error(executor: Measured, base: DenseBatch, other: DenseBatch) -> float:
    """How far the last layer's outputs of the sampled rows are apart in two layouts of one batch.

    The root of the mean squared difference over that of `base`'s values: 0 where kernels add in the same order, some
    hundredths in bfloat16 where they do not. Or a fourth of the same of the worst row, if that is more: rounding is
    alike in all rows, and a race may show in few.
    """
    outputs: list[torch.Tensor] = []
    known = np.ones(0 if base.sampling is None else len(base.sampling), np.bool_)
    # What the first samples is not what the second starts from, on whichever rank: both bring their tokens along.
    last_tokens = executor.sampler.last_tokens.cpu().numpy().copy()
    for batch in (base, other):
        assert batch.sampling is not None
        token_ids = np.where(batch.token_ids == TOKEN_ON_DEVICE, last_tokens[batch.slots], batch.token_ids)
        executor.launch(replace(batch, token_ids=token_ids.astype(np.int32)))
        executor.collect()
        bound, rows = executor.bound, batch.sampling.rows.astype(np.int64)
        found = bound.buffers[RESIDUAL][torch.from_numpy(rows).to(bound.device)].double()
        # Other ranks may have some of the rows. The head's last ones have come together here.
        last = (len(rows) - 1) // bound.sampled_rows * bound.sampled_rows
        found[last:] = bound.buffers["sampled"][: len(rows) - last]
        here = bound.own(batch)[rows]
        here[last:] = True
        known &= here
        outputs.append(found)
    first, second = (found[torch.from_numpy(known).to(found.device)] for found in outputs)
    of_rows = (first - second).square().mean(1) / first.square().mean()
    return max(float(of_rows.mean().sqrt()), WORST_ROW * float(of_rows.max().sqrt()))


def largest_error(executor: Measured) -> float:
    """What `output_error` of a plan that is right stays below.

    bfloat16 rounds otherwise where a product is cut otherwise. The layers' errors are independent of each other, so
    they add up as the root of their number does.
    """
    return ERROR_OF_A_LAYER * math.sqrt(max(16, executor.bound.graph.layers))
