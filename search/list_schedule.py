"""The order of a period: a list scheduler that deals a layer's products and decode attentions to lanes and stages.

Contract: the result is one linear order of a layer in steady state, dealt to lanes and cut into stages. In that order
every nano-op comes after those that it needs, so no plan made of it can deadlock. What the period does not name follows
its producer (`nanoflow.pipeline.period`).

Pseudo-code. A nano-batch's window is the products behind decode attention, then those before it, of the next layer::

    while a window has products left:
        take of the nano-batches whose next product may run the one with the longest path to the end of its window
            # it may run when its decode attention is done; a product that is left whole waits for all nano-batches;
            # keys are appended in the nano-batches' order; the first of a nano-batch waits for `skew` of the one before
    decode attention that runs beside others goes to the memory lane behind its queries; the rest before what reads it
    collectives that run beside products go to the network lane, in the order of the products that they follow; what
        reads their sums comes before the next product of the same rows, which is not ready before they are done.
        Where ranks divide the rows, what works on a rank's own and the all-gather behind it go there too
    one stage: all lanes side by side throughout; what shall run with attention comes beside it, in the layer's order
    several:   an attention of the memory lane has the longest stretch that it may run beside for itself, split between
               the two; all others run on the whole device
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from nanoflow.ops.collectives import Collective
from nanoflow.ops.graph import Graph
from nanoflow.ops.row_sharding import SCATTERED
from nanoflow.pipeline.dependencies import producer
from nanoflow.pipeline.plan import WHOLE, Entry, FrozenMapping, Stage

__all__ = [
    "ATTENTION",
    "COMPANIONS",
    "COMPUTE",
    "MEMORY",
    "NETWORK",
    "PRODUCTS",
    "SPLIT",
    "Order",
    "chains_of",
    "collectives_of",
    "products_of",
    "schedule",
]

PRODUCTS = ("qkv", "o", "gate_up", "down")
"""The matrix products of a layer, as ports name them."""
ATTENTION = "decode_attention"
COMPANIONS = ("rope_append", "prefill_attention")
"""What can run in the memory lane with decode attention, in the layer's order."""
COMPUTE, MEMORY, NETWORK, SPLIT = "compute", "memory", "network", "split"


@dataclass(frozen=True)
class Order:
    """What is asked of a schedule."""

    names: tuple[str, ...]
    """Of the nano-batches, in the order of their rows."""
    whole: frozenset[str]
    """Products over all rows at once."""
    beside: tuple[bool, ...]
    """For each nano-batch, whether its decode attention runs in the memory lane."""
    with_attention: frozenset[str]
    """What runs in the memory lane with decode attention, of `COMPANIONS`; with one stage and all attention there."""
    skew: int
    several: bool
    """Stages on the split and on the whole device, not one."""
    partition: str
    """Of stages that have a memory lane, or a network lane."""
    network: bool = False
    """Collectives in a lane of their own, beside products; with one stage. Else they follow the product before them."""


@dataclass(frozen=True)
class _Item:
    """A nano-op of the compute lane."""

    entry: Entry
    nano_batch: int | None
    seconds: float

    @property
    def attention(self) -> bool:
        return self.entry.op == ATTENTION


Seconds = Callable[[str, int | None, bool], float]
"""Of an operation on a nano-batch (None: on all rows), in the memory lane or not; of a collective in the network lane,
if the order has one."""


def products_of(graph: Graph) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the products before decode attention, and of those behind it. Raises ValueError if either has none."""
    names = [op.name for op in graph.layer]
    place = names.index(ATTENTION) if ATTENTION in names else 0
    before, behind = (tuple(name for name in part if name in PRODUCTS) for part in (names[:place], names[place:]))
    if not before or not behind:
        raise ValueError(
            f"the layer's operations are {', '.join(names)}: plans with several nano-batches need {ATTENTION} with one "
            f"of {', '.join(PRODUCTS)} before it and one behind it"
        )
    return before, behind


def collectives_of(graph: Graph) -> dict[str, tuple[str, ...]]:
    """The collectives behind each product that has any: only a rank's graph has them."""
    found: dict[str, tuple[str, ...]] = {}
    for op in graph.layer:
        before = producer(graph, op) if isinstance(op, Collective) else None
        if before is not None and before[0].name in PRODUCTS:
            found[before[0].name] = (*found.get(before[0].name, ()), op.name)
    return found


def chains_of(graph: Graph) -> dict[str, tuple[tuple[str, int], ...]]:
    """What a network lane runs behind each product that has collectives behind it, with how many layers ahead of the
    product's own it is: the collectives, and where they leave a rank its own rows, all that comes before the next
    product."""
    found = {}
    names = [op.name for op in graph.layer]
    for product, collectives in collectives_of(graph).items():
        chain = [(name, 0) for name in collectives]
        at = names.index(collectives[-1])
        if graph.sharding in SCATTERED:
            while names[(at + 1) % len(names)] not in PRODUCTS:
                at += 1
                chain.append((names[at % len(names)], at // len(names)))
        found[product] = tuple(chain)
    return found


def _readers(graph: Graph, chain: Sequence[str]) -> list[tuple[str, int]]:
    """What reads the results of a chain of the network lane and is no product, with how many layers behind it is: left
    unnamed, it would follow into that lane."""
    found = []
    for op in graph.layer:
        before = None if op.name in (*PRODUCTS, *chain) else producer(graph, op)
        if before is not None and before[0].name in chain:
            found.append((op.name, before[1]))
    return found


def schedule(graph: Graph, order: Order, seconds: Seconds) -> tuple[Stage, ...]:
    """The period; `seconds` of a product include what follows it. Raises ValueError as `products_of` does."""
    behind_products = chains_of(graph) if order.network else {}
    items = _products(graph, order, seconds, behind_products)
    lone = _Lone(order, seconds)
    if not order.several:
        behind = {n: end for n in range(len(order.names)) for _, end in [_window(items, n)]}
        own = sorted((n for n, there in enumerate(order.beside) if there), key=lambda n: (behind[n], n))
        lanes = {COMPUTE: [item.entry for item in lone.insert(items, order.beside)]}
        if own:
            there = [op.name for op in graph.layer if op.name == ATTENTION or op.name in order.with_attention]
            lanes[MEMORY] = [Entry(name, order.names[n], 1) for n in own for name in there]
        sums = [
            replace(item.entry, op=name, ahead=item.entry.ahead + layers)
            for item in items
            for name, layers in behind_products.get(item.entry.op, ())
        ]
        if sums:
            lanes[NETWORK] = sums
        return (_stage(order.partition if own or sums else WHOLE, lanes),)
    beside = list(order.beside)
    while True:
        filled = lone.insert(items, beside)
        pieces = _pieces(filled, beside)
        found = _deal(filled, pieces, beside)
        left_over = [n for n, there in enumerate(beside) if there and n not in found.values()]
        if not left_over:
            return _stages(filled, pieces, found, order)
        beside[left_over[0]] = False  # nothing is left that it could run beside


def _products(
    graph: Graph, order: Order, seconds: Seconds, chains: Mapping[str, Sequence[tuple[str, int]]]
) -> list[_Item]:
    """The compute lane without attention, by the pseudo-code above. `chains` of the network lane, by product."""
    before, behind = products_of(graph)
    window = [(name, 0) for name in behind] + [(name, 1) for name in before]
    count, length = len(order.names), len(window)
    ready = [0.0] * count
    waiting = [0.0] * count  # seconds of attention in the compute lane
    for n in range(count):
        taken = seconds(ATTENTION, n, order.beside[n])
        if not order.beside[n]:
            waiting[n] = taken
        elif n:  # the first nano-batch's ran at the end of the repetition before
            ready[n] = max(ready) + taken
    last = seconds(ATTENTION, 0, True) if order.beside[0] else 0.0
    path = [[last if not n else 0.0] for n in range(count)]
    for n in range(count):
        for name, _ in reversed(window):
            whole_or_own = None if name in order.whole else n
            takes = seconds(name, whole_or_own, False)
            takes += sum(seconds(each, whole_or_own, False) for each, _ in chains.get(name, ()))
            path[n].insert(0, path[n][0] + takes)
    places, taken_split = [0] * count, [0] * count
    clock = network = 0.0
    items: list[_Item] = []
    readers: list[_Item] = []  # of sums under way

    def may_run(n: int) -> bool:
        if places[n] == length:
            return False
        name, ahead = window[places[n]]
        if name in order.whole:
            return n == 0 and len(set(places)) == 1
        return not ahead or all(places[m] > places[n] for m in range(n))

    while any(place < length for place in places):
        able = [n for n in range(count) if may_run(n)]
        on_time = [n for n in able if not n or taken_split[n] or taken_split[n - 1] >= order.skew]
        # Where the one before cannot go on, it is as far ahead as it may be.
        able = on_time or able
        begin = {n: max(ready) if window[places[n]][0] in order.whole else ready[n] for n in able}
        n = min(able, key=lambda n: (max(clock, begin[n]), -path[n][places[n]], n))
        name, ahead = window[places[n]]
        whole = name in order.whole
        who = range(count) if whole else (n,)
        own = None if whole else n
        takes = seconds(name, own, False)
        due = [item for item in readers if whole or item.nano_batch in (None, n)]
        readers = [item for item in readers if item not in due]
        items += [*due, _Item(Entry(name, None if whole else order.names[n], ahead), own, takes)]
        clock = max(clock, begin[n]) + takes + sum(waiting[m] for m in who)
        for m in who:
            places[m] += 1
            waiting[m] = 0.0
        taken_split[n] += not whole
        if name in chains:
            network = max(network, clock) + sum(seconds(each, own, False) for each, _ in chains[name])
            for m in who:
                ready[m] = network
            entry = items[-1].entry
            for reader, layers in _readers(graph, [each for each, _ in chains[name]]):
                readers.append(_Item(replace(entry, op=reader, ahead=ahead + layers), own, 0.0))
    return items + readers


def _window(items: Sequence[_Item], n: int) -> tuple[int, int]:
    """Where nano-batch `n` has its first product, and where it has had its last."""
    own = [place for place, item in enumerate(items) if item.nano_batch in (n, None) and not item.attention]
    return own[0], own[-1] + 1


class _Lone:
    """Decode attention that runs in the compute lane."""

    def __init__(self, order: Order, seconds: Seconds) -> None:
        self.order = order
        self.seconds = seconds

    def insert(self, items: Sequence[_Item], beside: Sequence[bool]) -> list[_Item]:
        """`items` with each of them before the product that reads it: behind all others of the layer before, if that
        product is the first."""
        at: dict[int, list[_Item]] = {}
        for n, there in enumerate(beside):
            if not there:
                start, _ = _window(items, n)
                entry = Entry(ATTENTION, self.order.names[n], 0 if start else 1)
                at.setdefault(start or len(items), []).append(_Item(entry, n, self.seconds(ATTENTION, n, False)))
        result: list[_Item] = []
        for place, item in enumerate(items):
            result += [*at.get(place, ()), item]
        return result + at.get(len(items), [])


def _pieces(items: Sequence[_Item], beside: Sequence[bool]) -> list[tuple[int, int]]:
    """`items` cut wherever an attention of the memory lane may begin or must have ended, and around the other ones."""
    cuts = {0, len(items)}
    for n, there in enumerate(beside):
        if there:
            cuts.update(_window(items, n))
    for place, item in enumerate(items):
        if item.attention:
            cuts.update((place, place + 1))
    return list(pairwise(sorted(cuts)))


def _deal(items: Sequence[_Item], pieces: Sequence[tuple[int, int]], beside: Sequence[bool]) -> dict[int, int]:
    """Which nano-batch's attention runs beside which piece: one at most, the longest that is left first."""
    options: dict[int, list[int]] = {}
    for n, there in enumerate(beside):
        if there:
            start, end = _window(items, n)
            options[n] = [
                place
                for place, (first, last) in enumerate(pieces)
                if (first >= end or last <= start) and not items[first].attention
            ]
    found: dict[int, int] = {}
    for n in sorted(options, key=lambda n: (len(options[n]), n)):
        start, _ = _window(items, n)

        def worth(place: int, start: int = start) -> tuple[float, bool, int]:
            # Of equals, the one just before the attention is needed: whatever lies before it may lengthen.
            first, last = pieces[place]
            return sum(item.seconds for item in items[first:last]), last <= start, place

        free = [place for place in options[n] if place not in found]
        if free:
            found[max(free, key=worth)] = n
    return found


def _stages(
    items: Sequence[_Item], pieces: Sequence[tuple[int, int]], found: dict[int, int], order: Order
) -> tuple[Stage, ...]:
    stages: list[Stage] = []
    for place, (first, last) in enumerate(pieces):
        entries = [item.entry for item in items[first:last]]
        if place in found:
            n = found[place]
            ahead = int(first >= _window(items, n)[1])
            lanes = {COMPUTE: entries, MEMORY: [Entry(ATTENTION, order.names[n], ahead)]}
            stages.append(_stage(order.partition, lanes))
        elif stages and len(stages[-1].lanes) == 1:
            earlier = stages[-1].lanes[COMPUTE]
            stages[-1] = replace(stages[-1], lanes=FrozenMapping({COMPUTE: (*earlier, *entries)}))
        else:
            stages.append(_stage(WHOLE, {COMPUTE: entries}))
    return tuple(stages)


def _stage(partition: str, lanes: dict[str, list[Entry]]) -> Stage:
    return Stage(partition, FrozenMapping({lane: tuple(entries) for lane, entries in lanes.items()}))
