"""Random plans that are valid by construction, and random dense batches for them."""

from fractions import Fraction
from itertools import pairwise

from hypothesis import strategies as st

from nanoflow.ops.batch import DenseBatch
from nanoflow.ops.graph import Graph
from nanoflow.ops.operation import KV
from nanoflow.pipeline.plan import WHOLE, Entry, FrozenMapping, NanoBatch, Plan, Stage
from tests.unit.plan_graphs import dense_batch


@st.composite
def nano_batch_tuples(draw: st.DrawFn, count: int) -> tuple[NanoBatch, ...]:
    """`count` nano-batches with shares in sixteenths that add up to 1."""

    def shares() -> list[Fraction]:
        cuts = sorted(draw(st.lists(st.integers(0, 16), min_size=count - 1, max_size=count - 1)))
        ends = [0, *cuts, 16]
        return [Fraction(b - a, 16) for a, b in pairwise(ends)]

    rows = draw(st.lists(st.integers(1, 64), min_size=count, max_size=count))
    return tuple(NanoBatch(*parts) for parts in zip("abcd"[:count], shares(), shares(), rows, strict=True))


@st.composite
def plans(draw: st.DrawFn, graph: Graph) -> Plan:
    """A plan of 1 to 4 nano-batches, up to 3 lanes and 3 stages, random unsplit operations, skew and order.

    A steady state is played: every nano-batch has a place in the endless sequence of operations, ahead of the others by
    its skew; in random order each moves on by one layer, and unsplit operations wait for all. The order in which the
    operations were met cannot deadlock, however it is dealt to lanes and cut into stages.
    """
    operations = [op.name for op in graph.layer]
    length = len(operations)
    count = draw(st.integers(1, 4))
    split = [name for name in operations if draw(st.integers(0, 3))]
    # A nano-batch's prompts need the keys that the ones before it append: they must not run behind past that point.
    reads_prefix = {op.name for op in graph.layer if any(access.prefix for access in op.accesses)}
    appends = max(i for i, op in enumerate(graph.layer) if any(a.write and a.buffer == KV for a in op.accesses))
    barriers = [i for i, name in enumerate(operations) if name not in split]
    if barriers:
        # Between two unsplit operations every nano-batch may have any place; past one, none until all have met.
        chosen = draw(st.integers(0, len(barriers) - 1))
        low = barriers[chosen] + 1
        high = barriers[chosen + 1] if chosen + 1 < len(barriers) else barriers[0] + length
    else:
        low, high = 0, draw(st.integers(0, 2 * length))
    places = sorted(draw(st.lists(st.integers(low, high), min_size=count, max_size=count)), reverse=True)
    ends = [place + length for place in places]
    order: list[Entry] = []
    while places != ends:
        ready = []
        for n, place in enumerate(places):
            name, layer = operations[place % length], place // length
            if place == ends[n] or (name not in split and len(set(places)) > 1):
                continue
            if name in reads_prefix and any(places[m] <= layer * length + appends for m in range(n)):
                continue
            ready.append(n)
        n = draw(st.sampled_from(ready))
        name, layer = operations[places[n] % length], places[n] // length
        if name in split:
            order.append(Entry(name, "abcd"[n], layer))
            places[n] += 1
        else:
            order.append(Entry(name, None, layer))
            places = [place + 1 for place in places]
    period = draw(stages(order))
    nano_batches = draw(nano_batch_tuples(count))
    capacity = draw(st.integers(1, sum(nano_batch.rows for nano_batch in nano_batches)))
    return Plan(capacity=capacity, nano_batches=nano_batches, period=period)


@st.composite
def stages(draw: st.DrawFn, order: list[Entry]) -> tuple[Stage, ...]:
    """`order` cut into 1 to 3 stages, each of 1 to 3 lanes."""
    cuts = sorted(draw(st.sets(st.integers(1, max(len(order) - 1, 1)), max_size=2)))
    result = []
    for start, end in zip([0, *cuts], [*cuts, len(order)], strict=True):
        lanes: dict[str, list[Entry]] = {}
        names = draw(st.permutations(["compute", "memory", "network"]))[: draw(st.integers(1, 3))]
        for entry in order[start:end]:
            lanes.setdefault(draw(st.sampled_from(names)), []).append(entry)
        if lanes:
            result.append(Stage(WHOLE, FrozenMapping({lane: tuple(entries) for lane, entries in lanes.items()})))
    return tuple(result)


@st.composite
def batches(draw: st.DrawFn, nano_batches: int) -> DenseBatch:
    """A dense batch for `nano_batches` nano-batches; any of them may be empty, prompts may straddle them."""
    parts = st.tuples(st.integers(0, 3), st.lists(st.integers(1, 3), max_size=3), st.integers(0, 2))
    return dense_batch(draw(st.lists(parts, min_size=nano_batches, max_size=nano_batches)))


def full_batch(nano_batches: int) -> DenseBatch:
    """A batch in which every conflict that accesses declare is a real one: one prompt runs through all nano-batches."""
    return dense_batch([(2, (2, 1) if n == nano_batches - 1 else (2,), 1) for n in range(nano_batches)])
