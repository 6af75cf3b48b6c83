"""The plan: how one dense batch is cut into nano-batches, and which lane runs which nano-op in which order.

Contract: a plan is frozen data. It can be compared, hashed, pickled, written as YAML and read back equal. It describes
one layer in steady state (`Plan.period`); `nanoflow.pipeline.program` unrolls it over all layers. It names no wait:
waits are derived from what the operations read and write.

Pseudo-code of what a plan means, for a graph of L layers and entries that look at most A layers ahead::

    for k in range(-A, L):
        for stage in period:
            join all lanes, if the stage is not the one that ran last
            for every lane of the stage, side by side:
                for entry in lane:
                    if 0 <= k + entry.ahead < L:
                        run entry.op on entry.nano_batch in layer k + entry.ahead
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Generic, TypeVar

from nanoflow.ops.collectives import Collective
from nanoflow.ops.graph import Graph
from nanoflow.ops.row_sharding import ALL_REDUCE, REDUCE_SCATTER, layout_of, with_sharding
from nanoflow.pipeline.plan_mix import PlanMix

__all__ = [
    "FINGERPRINT_KEYS",
    "MAIN_LANE",
    "PLAN_FORMAT",
    "SMALL_ROWS",
    "WHOLE",
    "Entry",
    "FrozenMapping",
    "NanoBatch",
    "Plan",
    "PlanError",
    "Stage",
    "blamed_on",
]

PLAN_FORMAT = 1
"""Of the YAML. It grows when a key gets another meaning: a stored plan might then run otherwise than was measured."""

FINGERPRINT_KEYS = ("shape", "dtype", "page_size", "format", "torch", "triton", "cuda", "driver")
"""What a stored plan says of its measurement, beside model, GPU and SMs: see `nanoflow.search.fingerprint`."""

WHOLE = "whole"
"""The partition that every plan has: where `partitions` says nothing else of it, its lanes share the whole device."""

MAIN_LANE = "main"
"""The only lane of the sequential plan."""

SEQUENTIAL_FORMS = {2: (REDUCE_SCATTER, "push", "copy_engine")}
"""Sharding of the sequential plan, and kernels of its collectives, in batches of up to `SMALL_ROWS` rows and in larger
ones, by the number of ranks that reach each other's memory; of other numbers nothing was measured. On two H200s
iterations of Llama-3-70B are 3 to 4% faster so than with NCCL's all-reduce (benchmarks/results/network_lanes.json)."""
SMALL_ROWS = 1536
"""Between 1,024, where `push` was faster, and 2,048, where the copy engines were."""

V = TypeVar("V")


class PlanError(ValueError):
    """A plan that cannot be read or run. The message names key, value and mend, and the file if known."""


@contextmanager
def blamed_on(source: object) -> Iterator[None]:
    """Puts `source`, the file that a plan was read from, before the message of a PlanError."""
    try:
        yield
    except PlanError as error:
        raise PlanError(f"{source}: {error}") from None


class FrozenMapping(Mapping[str, V], Generic[V]):
    """A mapping that cannot be changed and can be hashed. It keeps its order; equality does not look at the order."""

    __slots__ = ("_items",)
    _items: dict[str, V]

    def __init__(self, items: Mapping[str, V] | None = None) -> None:
        object.__setattr__(self, "_items", dict(items or {}))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a frozen mapping has no settable attribute {name!r}")

    def __getitem__(self, key: str) -> V:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)

    def __reduce__(self) -> tuple[type["FrozenMapping[V]"], tuple[dict[str, V]]]:
        return type(self), (self._items,)


@dataclass(frozen=True)
class NanoBatch:
    """A contiguous range of the dense batch's rows.

    `decode` and `prefill` are its shares of the decode rows and of the prefill rows, `rows` is its capacity in rows
    (padding included).
    """

    name: str
    decode: Fraction
    prefill: Fraction
    rows: int


_ENTRY = re.compile(r"(?P<op>[A-Za-z_]\w*)(?:\.(?P<nano_batch>\w+))?(?:@(?P<ahead>-?\w+))?")


@dataclass(frozen=True)
class Entry:
    """One nano-op of the period, written ``op``, ``op.nano_batch`` or ``op.nano_batch@ahead``.

    `nano_batch` None means all rows at once. `ahead` 1 means the next layer's.
    """

    op: str
    nano_batch: str | None = None
    ahead: int = 0

    @classmethod
    def parse(cls, text: object) -> "Entry":
        """Read the written form; raises PlanError if it is none."""
        match = _ENTRY.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise PlanError(f"{text!r} is no nano-op: write `op`, `op.nano_batch` or `op.nano_batch@1` (1 layer ahead)")
        ahead = match["ahead"] or "0"
        if not ahead.isdecimal() or len(ahead) > 4:
            raise PlanError(
                f"{text!r:.80} looks {ahead:.20} layers ahead: the number after @ counts layers from this one on and "
                "is 0 to 9999; put the other nano-ops further ahead instead"
            )
        return cls(match["op"], match["nano_batch"], int(ahead))

    def __str__(self) -> str:
        nano_batch = f".{self.nano_batch}" if self.nano_batch is not None else ""
        return f"{self.op}{nano_batch}{f'@{self.ahead}' if self.ahead else ''}"


@dataclass(frozen=True)
class Stage:
    """A stretch of the period on one partition: each lane's nano-ops, in order.

    The i-th lane of `lanes` runs on the i-th part of the partition.
    """

    partition: str
    lanes: FrozenMapping[tuple[Entry, ...]]

    def __post_init__(self) -> None:
        lanes = FrozenMapping({lane: tuple(entries) for lane, entries in self.lanes.items()})
        object.__setattr__(self, "lanes", lanes)

    def __eq__(self, other: object) -> bool:
        # The order of the lanes says which part of the partition each of them has, so it counts here.
        if not isinstance(other, Stage):
            return NotImplemented
        return self.partition == other.partition and tuple(self.lanes.items()) == tuple(other.lanes.items())

    def __hash__(self) -> int:
        return hash((self.partition, self.lanes))


@dataclass(frozen=True)
class Plan:
    """See the module's text. `nanoflow.pipeline.validate.validate` says whether a plan can run; making one does not."""

    capacity: int
    """Largest number of rows of a dense batch."""
    nano_batches: tuple[NanoBatch, ...]
    """In the order of their rows."""
    period: tuple[Stage, ...]
    """One layer in steady state. Operations that it does not name follow their producer."""
    partitions: FrozenMapping[tuple[int, ...]] = field(default_factory=FrozenMapping)
    """SMs of each lane, by the partition's name. `WHOLE` may be left out: its lanes are then not confined."""
    kernels: FrozenMapping[str] = field(default_factory=FrozenMapping)
    """Kernel of an operation, or of it on a nano-batch alone (``op.nano_batch``, which goes first), where it is not the
    executor's default."""
    measured: FrozenMapping[float | int | str] = field(default_factory=FrozenMapping)
    """What was measured when the plan was stored. Says nothing about how it runs."""
    model: str = ""
    """The model that it was tuned for; empty means any."""
    gpu: str = ""
    """The device that it was tuned for; empty means any."""
    sms: int | None = None
    """SMs of that device; None if no partition is confined."""
    least_rows: int = 0
    """Rows of the smallest dense batch that it is meant for; smaller ones run the sequential plan."""
    mix: PlanMix | None = None
    """What it was tuned for: other mixes do not run it. None means any."""
    fingerprint: FrozenMapping[int | str] = field(default_factory=FrozenMapping)
    """What else it was measured with, by `FINGERPRINT_KEYS`. Says nothing about how it runs."""
    sharding: str = ALL_REDUCE
    """How ranks that share the model share sums and residual: one of `nanoflow.ops.row_sharding.SHARDINGS`."""

    def __post_init__(self) -> None:
        partitions = FrozenMapping({name: tuple(sms) for name, sms in self.partitions.items()})
        object.__setattr__(self, "nano_batches", tuple(self.nano_batches))
        object.__setattr__(self, "period", tuple(self.period))
        object.__setattr__(self, "partitions", partitions)
        object.__setattr__(self, "kernels", FrozenMapping(self.kernels))
        object.__setattr__(self, "measured", FrozenMapping(self.measured))
        object.__setattr__(self, "fingerprint", FrozenMapping(self.fingerprint))

    @classmethod
    def sequential(
        cls, graph: Graph, capacity: int, *, model: str = "", gpu: str = "", sharding: str | None = None
    ) -> "Plan":
        """The plan that runs `graph` in program order: one nano-batch of `capacity` rows, one lane.

        `sharding` None: what other plans are compared with, for batches that nearly fill it.
        """
        usual, form = _sequential_form(graph, capacity)
        sharding = sharding or usual
        layer = with_sharding(graph, sharding).layer
        forms = {op.name: form for op in layer if form and sharding == usual and isinstance(op, Collective)}
        lane = tuple(Entry(op.name) for op in layer)
        return cls(
            capacity=capacity,
            nano_batches=(NanoBatch("a", Fraction(1), Fraction(1), capacity),),
            period=(Stage(WHOLE, FrozenMapping({MAIN_LANE: lane})),),
            model=model,
            gpu=gpu,
            sharding=sharding,
            kernels=FrozenMapping(forms),
        )

    def graph(self, graph: Graph) -> Graph:
        """What the plan runs of a rank's `graph`: it with the plan's sharding, the same object at every call.

        Raises PlanError if there is none.
        """
        try:
            return with_sharding(graph, self.sharding)
        except ValueError as error:
            raise PlanError(f"sharding: {error}") from None

    def is_sequential(self, graph: Graph) -> bool:
        """Whether it runs `graph` as the sequential plan does, rows and kernels aside; but collectives of ranks have
        forms of that one's."""
        usual = [_sequential_form(graph, rows) for rows in (1, SMALL_ROWS + 1)]
        if len(self.nano_batches) > 1 or len(self.lanes) > 1 or self.sharding != usual[0][0]:
            return False
        collectives = [op.name for op in with_sharding(graph, self.sharding).layer if isinstance(op, Collective)]
        return {self.kernel(name, 0) for name in collectives} <= {"", *(form for _, form in usual)}

    @property
    def lanes(self) -> tuple[str, ...]:
        """Every lane's name once, in order of first appearance."""
        return tuple(dict.fromkeys(lane for stage in self.period for lane in stage.lanes))

    @property
    def rows(self) -> int:
        """Rows that the activation buffers need: every nano-batch full, padding included."""
        return sum(nano_batch.rows for nano_batch in self.nano_batches)

    def kernel(self, op: str, nano_batch: int | None) -> str:
        """What `kernels` names for an operation on a nano-batch (None: on all rows); empty: nothing."""
        return self.kernels.get(self.kernel_key(op, nano_batch), "")

    def kernel_key(self, op: str, nano_batch: int | None) -> str:
        """The key of `kernels` that says it."""
        if nano_batch is not None and (key := f"{op}.{self.nano_batches[nano_batch].name}") in self.kernels:
            return key
        return op

    def lane_sms(self, stage: int, lane: str) -> int | None:
        """SMs of `lane` in stage `stage` of the period; None if the lane is not confined."""
        parts, part = self.place(stage, lane)
        return parts[part] if parts else None

    def place(self, stage: int, lane: str) -> tuple[tuple[int, ...], int]:
        """Where `lane` runs in stage `stage`: the SMs of all parts of its partition, and which part is the lane's.

        There are no parts if nothing is confined, because the partition is `WHOLE` without SMs, or has all SMs in one.
        """
        current = self.period[stage]
        parts = self.partitions.get(current.partition, ())
        return () if parts == (self.sms,) else parts, list(current.lanes).index(lane)

    # The text form and the validator stand on the data above, so they are imported where they are used.

    @classmethod
    def loads(cls, text: str, graph: Graph | None = None, *, source: str = "plan") -> "Plan":
        """Read the YAML form, and validate it against `graph` if given. `source` names the text in messages.

        Raises PlanError.
        """
        from nanoflow.pipeline.plan_text import parse_plan
        from nanoflow.pipeline.validate import validate

        with blamed_on(source):
            plan = parse_plan(text)
            if graph is not None:
                validate(plan, graph)
        return plan

    @classmethod
    def load(cls, path: str | Path, graph: Graph | None = None) -> "Plan":
        """Read the YAML file `path`, and validate it against `graph` if given. Raises PlanError."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise PlanError(f"{path}: cannot read the plan: {reason}") from None
        return cls.loads(text, graph, source=str(path))

    def dumps(self) -> str:
        """The YAML form; `Plan.loads` of it is equal to this plan."""
        from nanoflow.pipeline.plan_text import format_plan

        return format_plan(self)


def _sequential_form(graph: Graph, rows: int) -> tuple[str, str]:
    """See `SEQUENTIAL_FORMS`; no kernel: the device's own choice."""
    known = SEQUENTIAL_FORMS.get(graph.ranks) if graph.peers else None
    if known is None or layout_of(graph.sharding) != layout_of(known[0]):
        return graph.sharding, ""
    sharding, small, large = known
    return sharding, small if rows <= SMALL_ROWS else large
