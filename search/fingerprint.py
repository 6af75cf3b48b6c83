"""What a measurement of a plan depends on, written into the stored plan and compared before the plan is used again.

Another model, another GPU, number of SMs or data type: the plan was made for something else, and is refused. A model is
told by its shape: fine-tuned weights, or another folder's name, change nothing of what a plan takes; the name counts
where a plan does not say the shape. Another page size or other versions: the plan can run, but what was measured may
not hold any more.
"""

import hashlib
import re
from dataclasses import asdict, dataclass, replace

from nanoflow.ops.graph import Graph
from nanoflow.ops.row_sharding import ALL_GATHER, ALL_REDUCE
from nanoflow.pipeline.plan import PLAN_FORMAT, FrozenMapping, Plan, PlanError

__all__ = ["Fingerprint", "graph_shape", "ranks_of"]

OWN_KEYS = ("model", "gpu", "sms")
"""Keys that every plan may have; the others stand under `fingerprint`."""
REFUSED = (*OWN_KEYS, "shape", "dtype")
"""Keys of which another value refuses the plan."""
BY_ALL_GATHER = f" {ALL_GATHER},"
"""Stands in the shape of a rank's graph whose weights are laid out for that sharding."""


@dataclass(frozen=True)
class Fingerprint:
    """A run, or what a plan was measured with. None: not known, or of no meaning here; it is not compared."""

    model: str | None = None
    gpu: str | None = None
    """The GPU's name, or ``cpu``."""
    sms: int | None = None
    shape: str | None = None
    """As `graph_shape` gives it."""
    dtype: str | None = None
    page_size: int | None = None
    """Tokens of a KV page."""
    format: int = PLAN_FORMAT
    """Of the plan's YAML."""
    torch: str | None = None
    triton: str | None = None
    cuda: str | None = None
    """That torch was built for."""
    driver: str | None = None

    def stamp(self, plan: Plan) -> Plan:
        """`plan` as one that was measured here."""
        known = {key: value for key, value in asdict(self).items() if value is not None}
        rest = {key: value for key, value in known.items() if key not in OWN_KEYS}
        return replace(
            plan,
            model=self.model or "",
            gpu=self.gpu or "",
            sms=plan.sms if self.sms is None else self.sms,
            fingerprint=FrozenMapping(rest),
        )

    def refusals(self, plan: Plan) -> list[str]:
        """Why `plan` is for something else than this run, one line a difference; nothing if it is for this."""
        return [line for key, line in self._differences(plan) if key in REFUSED]

    def doubts(self, plan: Plan) -> list[str]:
        """What was otherwise when `plan` was measured, one line a difference; it can run all the same.

        Whoever can should measure it again before it is believed (as `pipeline.plan: auto` does).
        """
        return [line for key, line in self._differences(plan) if key not in REFUSED]

    def refuse(self, plan: Plan) -> None:
        """Raise PlanError, with every difference on a line, if `plan` is for something else than this run."""
        lines = self.refusals(plan)
        if lines:
            raise PlanError(
                "\n  ".join(["the plan was tuned for something else than this run", *lines])
                + "\nuse `plan: sequential`, or a plan that was tuned for this: see `nanoflow plan list`"
            )

    def _differences(self, plan: Plan) -> list[tuple[str, str]]:
        tuned = {"model": plan.model, "gpu": plan.gpu, "sms": plan.sms, **plan.fingerprint}
        if self.shape is not None and tuned.get("shape") == self.shape:
            tuned["model"] = None
        return [
            (
                key,
                f"{key}: tuned for {tuned[key]}, here {here}{_ranks_line(key, str(tuned[key]), str(here))}"
                if key in REFUSED
                else f"{key} {tuned[key]}, here {here}",
            )
            for key, here in asdict(self).items()
            if here is not None and tuned.get(key) not in (None, "", here)
        ]


def _ranks_line(key: str, tuned: str, here: str) -> str:
    """Where only the number of ranks, or the layout of their weights, may be what tells two shapes apart, that it
    does."""
    if key != "shape":
        return ""
    if ranks_of(tuned) == ranks_of(here):
        layouts = [ALL_GATHER if BY_ALL_GATHER in shape else ALL_REDUCE for shape in (tuned, here)]
        if layouts[0] == layouts[1]:
            return ""
        return f" (sharding: the plan is for the weights of {layouts[0]}, the run has those of {layouts[1]})"
    return f" (parallel.tensor: the plan is for {ranks_of(tuned)}, the run has {ranks_of(here)})"


def ranks_of(shape: str) -> int:
    """Ranks that share the model of a graph's shape, as `graph_shape` gives it."""
    found = re.search(r" on (\d+) ranks,", shape)
    return int(found[1]) if found else 1


def graph_shape(graph: Graph) -> str:
    """What tells the graphs of two models of one name apart, and those of other numbers of ranks: sizes to read, and a
    hash of operations and columns."""
    operations = [
        (op.name, type(op).__name__, [(access.buffer, access.rows.name, access.write) for access in op.accesses],
         [(weight.name, weight.shape) for weight in op.weights])
        for op in (*graph.prologue, *graph.layer, *graph.epilogue)
    ]  # fmt: skip
    sizes = (graph.layers, graph.heads, graph.kv_heads, graph.head_dim, graph.vocab_size)
    digest = hashlib.sha256(repr((sizes, sorted(graph.values.items()), operations)).encode()).hexdigest()[:12]
    ranks = f" on {graph.ranks} ranks" if graph.ranks > 1 else ""
    layout = BY_ALL_GATHER if graph.sharding == ALL_GATHER else ""
    return f"{graph.layers} layers of {len(graph.layer)} operations{ranks},{layout} {digest}"
