"""The operation graph of a model: one layer, traced once, and what stands before and after the layers.

Contract: `layer` is in program order, so running it from first to last for layer 0, 1, ... is the sequential semantics
that every plan must keep. Each value has one physical buffer that all layers share; the value named `RESIDUAL` carries
a layer's output to the next one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from nanoflow.ops.operation import Cost, Operation, Work

__all__ = ["RESIDUAL", "Graph"]

RESIDUAL = "x"
"""The value that a layer reads as its input and writes as its output."""


@dataclass(frozen=True, eq=False)
class Graph:
    """Operations of a whole model. `values` gives each buffer's columns (elements a row)."""

    values: Mapping[str, int]
    layer: tuple[Operation, ...]
    layers: int
    prologue: tuple[Operation, ...]
    """Unsplit, before the layers: the embedding."""
    epilogue: tuple[Operation, ...]
    """Unsplit, over the sampled rows only: final norm, head. They read and write the values ``sampled`` (hidden states
    that the executor gathered), ``sampled_norm`` and ``logits``; in their `Work` every row is a sampled row."""
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    vocab_size: int = 0
    ranks: int = 1
    """Ranks of tensor parallelism: with more than one, this is the graph of a rank, whose heads are the rank's own, and
    it has collectives. The vocabulary stays whole."""
    rank: int = 0
    """Which of them."""
    sharding: str = "all_reduce"
    """How the ranks share what comes behind products that leave partial sums: see `nanoflow.ops.row_sharding`."""
    peers: bool = False
    """Whether the ranks' devices reach each other's memory, as far as is known. Says nothing about what is computed."""
    _by_name: dict[str, Operation] = field(default_factory=dict, init=False, repr=False)
    _derived: dict[str, "Graph"] = field(default_factory=dict, init=False, repr=False)
    """Graphs of other shardings that were made of this one."""

    def __post_init__(self) -> None:
        self._by_name.update({op.name: op for op in self.layer})
        if len(self._by_name) != len(self.layer):
            raise ValueError(f"two operations of a layer share a name: {[op.name for op in self.layer]}")

    def operation(self, name: str) -> Operation:
        """The layer's operation `name`; raises KeyError for an unknown one."""
        return self._by_name[name]

    def derived(self, sharding: str, make: Callable[["Graph"], "Graph"]) -> "Graph":
        """What `make` gave of this graph when it was first asked for `sharding`: always the same object."""
        if sharding not in self._derived:
            self._derived[sharding] = make(self)
        return self._derived[sharding]

    def cost(self, work: Work, itemsize: int) -> Cost:
        """FLOPs and bytes of one iteration of the whole model."""
        total = Cost()
        for op in self.layer:
            total = total + op.cost(work, itemsize) * self.layers
        for op in self.prologue:
            total = total + op.cost(work, itemsize)
        sampled = Work(prefill_rows=work.sampled_rows)
        for op in self.epilogue:
            total = total + op.cost(sampled, itemsize)
        return total
