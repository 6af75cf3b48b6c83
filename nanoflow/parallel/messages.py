"""What rank 0 and the other ranks of a tensor-parallel run say to each other while the engine is built.

rank r          settings (as it is started)    open the model
rank r -> 0     HERE                           rank 0 knows that all have started before it waits for them
rank 0 -> r     Load                           meet; measure the link between them; load its share of the weights
                (or Profiling, and all else is said by `nanoflow.profiling.ranks`)
rank r -> 0     int                            pages that fit there
rank 0 -> r     int, a descriptor              the least of all ranks' pages; the memory of the batches
rank 0 -> r     Build                          executor of these plans
rank r -> 0     READY                          then batches, up to the next Build or the line's end; when measuring, or
                CannotBuild                    then the next Build
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from nanoflow.config_schema import EngineSection, ModelSection
from nanoflow.ops.row_sharding import ALL_REDUCE

__all__ = ["HERE", "LINK_DTYPE", "READY", "Build", "CannotBuild", "KVNeeds", "Load", "Profiling", "RankSettings"]

HERE, READY = "here", "ready"
LINK_DTYPE = torch.float32
"""In which the link is measured: a library sends bytes, whatever they are."""


@dataclass(frozen=True)
class RankSettings:
    """All that a rank is told before it opens the model."""

    model: ModelSection
    engine: EngineSection
    """Its device is the rank's own."""
    rank: int
    size: int
    threads: int
    """Of the processor, for this rank."""
    port: int
    """On 127.0.0.1, of the store where ranks find each other."""
    timeout: float
    """Seconds that a rank waits for the others in a collective."""
    layers: int | None = None
    """Only so many of the model's, for measuring; None: all."""

    def of_rank(self, rank: int) -> "RankSettings":
        """Of another rank: on a GPU, the devices follow one another from rank 0's on."""
        kind, _, index = self.engine.device.partition(":")
        device = f"{kind}:{int(index or 0) + rank - self.rank}" if kind == "cuda" else kind
        return replace(self, rank=rank, engine=self.engine.model_copy(update={"device": device}))


@dataclass(frozen=True)
class KVNeeds:
    """What a job needs of the KV cache, in pages, the reserved one left out."""

    least: int
    """For its longest request."""
    useful: int
    """More are never used."""


@dataclass(frozen=True)
class Load:
    """Meet the other ranks, and load the weights."""

    weights: Literal["load", "random"]
    needs: KVNeeds | int
    """Or, for measuring, so many pages, whatever is configured."""
    longest: int = 0
    """Tokens of the longest request, for measuring, where it may be longer than the model allows."""
    layout: str = ALL_REDUCE
    """Of the weights: see `nanoflow.ops.sharding.shard_graph`."""


@dataclass(frozen=True)
class Profiling:
    """In place of `Load`: meet the other ranks, and measure operations as `nanoflow.profiling.ranks` says then."""

    longest: int = 0
    """As `Load` has it."""
    layout: str = ALL_REDUCE
    """Likewise."""


@dataclass(frozen=True)
class Build:
    """Make an executor."""

    plans: tuple[str, ...]
    """In their text form, so that all ranks run what rank 0 chose."""
    number: int
    """How many were made before it: each has communicators of its own."""
    row_buckets: tuple[int, ...] | None = None
    """Rows that a GPU's graphs are captured for; None: the usual ones. All ranks capture the same, since a capture is
    preceded by an iteration of all of them."""
    measuring: bool = False
    """The KV cache is filled with random values, since zeros draw less power, and plans that cannot run here are told
    of, not raised."""


@dataclass(frozen=True)
class CannotBuild:
    """What was asked for cannot run on this rank; it waits for another order."""

    why: str
