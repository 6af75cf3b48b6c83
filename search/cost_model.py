"""What bounds a run: the time that its work would take at each measured ceiling.

For every iteration, with `Cost` summed over the model's operations (FLOPs ``F``, bytes ``M``, bytes on the wire ``W``):

    T_compute = F / ceiling FLOP/s        (2 * B * P / FLOPS of the paper, plus attention's and the head's own FLOPs)
    T_memory  = M / ceiling bytes/s       (weights once an iteration, KV cache read and written, activations)
    T_network = W / ceiling link bytes/s  (4 * (N - 1) * B * D * S * L / N of the paper, as the collectives declare it)
    T_power   = joules / power limit

The first three are from "NanoFlow: Towards Optimal Large Language Model Serving Throughput" (arXiv
2408.12757, section 3); power is our addition. The bound is the largest; what a run reaches of it is that time over the
time taken. The optimal throughput of the paper, ``FLOPS / (2 * P)`` tokens a second, is `optimal_tokens_per_second`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from nanoflow.ops.batch import DenseBatch
from nanoflow.ops.graph import Graph
from nanoflow.ops.operation import Cost, Operation, Work

__all__ = ["Bounds", "Ceilings", "bounds", "optimal_tokens_per_second", "sequential_seconds", "work_of", "works_of"]


@dataclass(frozen=True)
class Ceilings:
    """Rates that this machine sustains, measured. None: not there, or not measured."""

    flops: float
    """FLOP/s of a large GEMM in the run's dtype."""
    bytes_per_second: float
    """Of reading main memory (of the GPU, on a GPU)."""
    link_bytes_per_second: float | None = None
    power_limit_watts: float | None = None


@dataclass(frozen=True)
class Bounds:
    """Seconds that the work takes at each ceiling, by resource, and which is the largest."""

    seconds: Mapping[str, float]

    @property
    def bound(self) -> str:
        """The resource that bounds the work: compute, memory, network or power."""
        return max(self.seconds, key=lambda resource: self.seconds[resource])

    def reached(self, seconds_taken: float) -> dict[str, float]:
        """Share of each bound that was reached: 1 means that the run took no longer than that resource needs."""
        return {resource: least / seconds_taken if seconds_taken else 0.0 for resource, least in self.seconds.items()}


def work_of(batch: DenseBatch) -> Work:
    """What one dense batch asks of the operations; padding asks nothing."""
    sampled = len(batch.sampling) if batch.sampling is not None else 0
    return _work(batch, slice(None), slice(None), sampled)


def works_of(batch: DenseBatch) -> tuple[Work, ...]:
    """What each nano-batch of `batch` asks of the operations in the layers."""
    return tuple(
        _work(batch, slice(*decode), slice(*prefill))
        for decode, prefill in zip(pairwise(batch.decode_splits), pairwise(batch.prefill_splits), strict=True)
    )


def _work(batch: DenseBatch, decode: slice, prefill: slice, sampled_rows: int = 0) -> Work:
    """Of some decode segments and some prefill segments."""
    lengths = batch.prefill_lengths[prefill].astype(np.int64)
    context = batch.prefill_context[prefill].astype(np.int64)
    pairs = lengths * (context - lengths) + lengths * (lengths + 1) // 2
    return Work(
        decode_rows=len(batch.decode_rows[decode]),
        prefill_rows=int(lengths.sum()),
        decode_context=int(batch.decode_context[decode].sum(dtype=np.int64)),
        prefill_context=int(context.sum()),
        prefill_pairs=int(pairs.sum()),
        sampled_rows=sampled_rows,
    )


def bounds(cost: Cost, ceilings: Ceilings, joules: float | None = None) -> Bounds:
    """Seconds that work of `cost` takes at each ceiling that is known (the formulas above)."""
    seconds = {"compute": cost.flops / ceilings.flops, "memory": cost.bytes / ceilings.bytes_per_second}
    if cost.wire_bytes and ceilings.link_bytes_per_second:
        seconds["network"] = cost.wire_bytes / ceilings.link_bytes_per_second
    if joules is not None and ceilings.power_limit_watts:
        seconds["power"] = joules / ceilings.power_limit_watts
    return Bounds(seconds)


def sequential_seconds(graph: Graph, work: Work, ceilings: Ceilings, itemsize: int) -> float:
    """Seconds of an iteration with one operation after the other, each as long as its scarcest resource needs.

    An estimate from below: launching, tiles that are not full and the power limit cost nothing. `itemsize`: bytes of an
    element.
    """

    def needed(op: Operation, work: Work) -> float:
        return max(bounds(op.cost(work, itemsize), ceilings).seconds.values())

    outside = sum(needed(op, work) for op in graph.prologue)
    outside += sum(needed(op, Work(prefill_rows=work.sampled_rows)) for op in graph.epilogue if work.sampled_rows)
    return graph.layers * sum(needed(op, work) for op in graph.layer) + outside


def optimal_tokens_per_second(parameters: int, ceilings: Ceilings) -> float:
    """Tokens a second of a model of `parameters` if nothing but its GEMMs took time: ``FLOPS / (2 * P)``."""
    return ceilings.flops / (2 * parameters)
