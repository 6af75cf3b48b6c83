"""The search space: what a tuner may choose of a plan, and the plan that a choice stands for.

Contract: a `PlanChoice` is frozen data that says little; `build_plan` makes a plan of it, the same one every time, and
every choice builds a plan that `nanoflow.pipeline.validate` accepts. `suggest` asks Optuna for one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import pairwise, product
from typing import TYPE_CHECKING, Literal

from nanoflow.ops.attention import OTHER_PROGRAMS
from nanoflow.ops.collectives import Collective
from nanoflow.ops.graph import Graph
from nanoflow.ops.operation import Cost, Work
from nanoflow.ops.row_sharding import shardings_of, with_sharding
from nanoflow.pipeline.plan import WHOLE, FrozenMapping, NanoBatch, Plan
from nanoflow.pipeline.split import UNITS
from nanoflow.search.list_schedule import (
    ATTENTION,
    COMPANIONS,
    PRODUCTS,
    SPLIT,
    Order,
    chains_of,
    collectives_of,
    products_of,
    schedule,
)
from nanoflow.search.mix import Mix, mix_works
from nanoflow.search.rates import Rates

if TYPE_CHECKING:
    from optuna import Trial

__all__ = ["MOST_NANO_BATCHES", "SHARES", "PlanChoice", "build_plan", "collective_forms", "suggest"]

SHARES = 16
"""Shares are counted in parts of so many."""
MOST_NANO_BATCHES = 4
NAMES = "abcd"
GRANULE = 4
"""The memory lane's SMs are a multiple of it: one of the lanes gets those that are in no group of 8."""
LEAST_SMS = 8
"""Of the memory lane."""
NETWORK_UNIT, MOST_NETWORK_SMS = 8, 24
"""SMs of the network lane: whole groups, so that what is in none can go to another lane; a link is full with few."""
LEAST_ROWS = 64
"""Of a nano-batch, on average, for so many to be suggested."""


@dataclass(frozen=True)
class PlanChoice:
    """A point of the search space. The default is the sequential plan."""

    decode: tuple[int, ...] = (SHARES,)
    """Each nano-batch's sixteenths of the decode rows."""
    prefill: tuple[int, ...] = (SHARES,)
    """The same of the prefill rows."""
    row_unit: int = 128
    """Rows of nano-batches are multiples of it, 128 or 64, if each of them gets one."""
    whole: frozenset[str] = frozenset()
    """Products over all rows at once."""
    beside: tuple[bool, ...] = ()
    """For each nano-batch, whether its decode attention runs in a memory lane, beside products of the others; left out:
    none does."""
    with_attention: frozenset[str] = frozenset()
    """What runs in the memory lane too, beside the decode attention of the same nano-batch, of `COMPANIONS`: on few SMs
    they take longer, but products need not wait for them. For plans of one stage with all decode attention there."""
    skew: int = 0
    """Products of a nano-batch that come before the first of the next; beyond them the list scheduler decides."""
    stages: Literal["one", "several"] = "one"
    """One: the lanes go on side by side. Several: the device is split where an attention runs beside products, and
    whole everywhere else."""
    memory_sms: int | None = None
    """SMs of the memory lane, the compute lane having the others; None: the lanes share the device."""
    network: bool = False
    """Collectives in a lane of their own, beside products; with one stage. Else each follows its product."""
    network_sms: int | None = None
    """SMs of the network lane; None: the lanes share the device."""
    kernels: FrozenMapping[str] = field(default_factory=FrozenMapping)
    """Kernel of a product, of decode attention or of a collective, where it is not the device's default; or, by
    ``collective.n``, of a collective on the n-th nano-batch of `decode`, from 0 on."""
    sharding: str | None = None
    """Of ranks that share the model, where their weights leave a choice; None: that of the sequential plan."""

    def __post_init__(self) -> None:
        count = len(self.decode)
        if not 1 <= count <= MOST_NANO_BATCHES:
            raise ValueError(f"decode: {self.decode} is of {count} nano-batches; give 1 to {MOST_NANO_BATCHES}")
        object.__setattr__(self, "beside", self.beside or (False,) * count)
        for key, value in (("prefill", self.prefill), ("beside", self.beside)):
            if len(value) != count:
                raise ValueError(f"{key}: {value} is not of {count} nano-batches, as decode is")
        for key, shares in (("decode", self.decode), ("prefill", self.prefill)):
            if min(shares) < 0 or sum(shares) != SHARES:
                raise ValueError(f"{key}: {shares} are not sixteenths that add up to {SHARES}")
        if any(not decode and not prefill for decode, prefill in zip(self.decode, self.prefill, strict=True)):
            raise ValueError(f"decode, prefill: a nano-batch has no share of {self.decode} and {self.prefill}; drop it")
        if self.row_unit not in UNITS[:2]:
            raise ValueError(f"row_unit: {self.row_unit} is not {UNITS[0]} or {UNITS[1]}")
        if unknown := self.whole - set(PRODUCTS):
            raise ValueError(f"whole: {sorted(unknown)[0]!r} is none of {', '.join(PRODUCTS)}")
        if unknown := self.with_attention - set(COMPANIONS):
            raise ValueError(f"with_attention: {sorted(unknown)[0]!r} is none of {', '.join(COMPANIONS)}")
        if self.with_attention and (self.stages != "one" or not all(self.beside)):
            raise ValueError(
                "with_attention: is for one stage with all decode attention in the memory lane; leave it out"
            )
        if self.skew < 0:
            raise ValueError(f"skew: {self.skew} must be 0 or more")
        if self.stages not in ("one", "several"):
            raise ValueError(f"stages: {self.stages!r} is neither 'one' nor 'several'")
        if self.memory_sms is not None and (self.memory_sms < LEAST_SMS or self.memory_sms % GRANULE):
            raise ValueError(f"memory_sms: {self.memory_sms} is no multiple of {GRANULE} from {LEAST_SMS} on")
        self._check_network()

    def _check_network(self) -> None:
        if self.network and (self.stages != "one" or len(self.decode) == 1):
            raise ValueError("network: is for one stage of several nano-batches; leave it out")
        if self.network_sms is None:
            if self.network and any(self.beside) and self.memory_sms is not None:
                raise ValueError("network_sms: the memory lane has SMs of its own; give the network lane some too")
            return
        if not self.network:
            raise ValueError(f"network_sms: {self.network_sms} SMs are for a lane that network: True makes")
        if any(self.beside) and self.memory_sms is None:
            raise ValueError("memory_sms: the network lane has SMs of its own; give the memory lane some too")
        if self.network_sms < NETWORK_UNIT or self.network_sms % NETWORK_UNIT:
            raise ValueError(f"network_sms: {self.network_sms} is no multiple of {NETWORK_UNIT} from {NETWORK_UNIT} on")


def build_plan(choice: PlanChoice, graph: Graph, mix: Mix, rows: int, rates: Rates) -> Plan:
    """The plan for dense batches of up to `rows` rows.

    The order in the lanes is by what `mix` takes at `rates` (`nanoflow.search.list_schedule`). Nano-batches without
    prefill rows come last: prefill attention waits for the keys of all nano-batches before its own.

    Raises ValueError if `mix` has more than `rows` rows, if there are fewer rows than nano-batches, if the memory and
    the network lane would have all SMs, if there is a network lane and the graph has no collectives, or if it has no
    products before or behind its decode attention.
    """
    count = len(choice.decode)
    if mix.rows > rows:
        raise ValueError(f"rows: the mix has {mix.rows:,}, more than {rows:,}; give more")
    if rows < count:
        raise ValueError(f"rows: {rows} cannot be cut into {count} nano-batches; choose fewer")
    sequential = Plan.sequential(graph, rows, sharding=choice.sharding)
    if count == 1:
        return replace(sequential, kernels=choice.kernels or sequential.kernels)
    graph = sequential.graph(graph)
    sms = rates.device_sms
    memory = choice.memory_sms if any(choice.beside) else None
    apart = tuple(lane for lane in (memory, choice.network_sms) if lane is not None)
    if apart and sum(apart) >= sms:
        names = "memory_sms" if memory is not None else "network_sms"
        if len(apart) > 1:
            names = "memory_sms, network_sms"
        raise ValueError(f"{names}: {sum(apart)} of {sms} SMs leave none for the products; choose fewer")
    if choice.network and not collectives_of(graph):
        raise ValueError("network: there are no collectives on one rank; leave it out")
    ranks = sorted(range(count), key=lambda n: not choice.prefill[n])
    decode, prefill = ([shares[n] for n in ranks] for shares in (choice.decode, choice.prefill))
    nano_batches = tuple(
        NanoBatch(NAMES[n], Fraction(decode[n], SHARES), Fraction(prefill[n], SHARES), own)
        for n, own in enumerate(_rows(decode, prefill, mix, rows, choice.row_unit))
    )
    kernels = {}
    for key, kernel in choice.kernels.items():
        op, *n = key.split(".")
        kernels[".".join((op, *(NAMES[ranks.index(int(each))] for each in n)))] = kernel
    plan = Plan(rows, nano_batches, (), kernels=FrozenMapping(kernels), sharding=sequential.sharding)
    order = Order(
        names=tuple(NAMES[:count]),
        whole=choice.whole,
        beside=tuple(choice.beside[n] for n in ranks),
        with_attention=choice.with_attention,
        skew=choice.skew,
        several=choice.stages == "several",
        partition=SPLIT if apart else WHOLE,
        network=choice.network,
    )
    parts = (sms - sum(apart), memory) if apart else (None, None)
    seconds = _Seconds(graph, plan, mix_works(plan, mix), rates, parts, choice)
    plan = replace(plan, period=schedule(graph, order, seconds))
    if not apart or all(stage.partition == WHOLE for stage in plan.period):
        return plan
    return replace(plan, partitions=FrozenMapping({SPLIT: (sms - sum(apart), *apart)}), sms=sms)


class _Seconds:
    """What the list scheduler asks: seconds of attention, and of products with all that stands behind them, but for
    what is in a network lane, which is asked for itself."""

    def __init__(
        self,
        graph: Graph,
        plan: Plan,
        works: Sequence[Work],
        rates: Rates,
        parts: tuple[int | None, int | None],
        choice: PlanChoice,
    ) -> None:
        self.graph, self.plan, self.works, self.rates = graph, plan, works, rates
        self.sms = dict(zip((False, True), parts, strict=True))
        self.attention = (ATTENTION, *choice.with_attention)
        chains = chains_of(graph).values() if choice.network else ()
        self.apart = {name: choice.network_sms for chain in chains for name, _ in chain}
        self.behind: dict[str, list[str]] = {}
        products = [op.name for op in graph.layer if op.name in PRODUCTS]
        leader = products[-1]  # of what stands before the first: it follows the layer before
        for op in graph.layer:
            leader = op.name if op.name in products else leader
            if op.name not in self.attention and op.name not in self.apart:
                self.behind.setdefault(leader, []).append(op.name)

    def __call__(self, op: str, nano_batch: int | None, memory: bool) -> float:
        work = sum(self.works, Work()) if nano_batch is None else self.works[nano_batch]
        # Attention in the compute lane of a plan in stages has the whole device; elsewhere it does not. The difference
        # only moves the order, and not by much.
        names = self.attention if op == ATTENTION else [op] if op in self.apart else self.behind[op]
        operations = [self.graph.operation(name) for name in names]
        return sum(
            self.rates.seconds(each, work, None, self.plan.kernel(each.name, nano_batch))
            if isinstance(each, Collective)
            else self.rates.seconds(each, work, self.apart.get(each.name, self.sms[memory]))
            for each in operations
            if each.cost(work, self.rates.itemsize) != Cost()
        )


def _rows(decode: Sequence[int], prefill: Sequence[int], mix: Mix, rows: int, unit: int) -> list[int]:
    """Rows of each nano-batch: as the mix fills them, in multiples of `unit` or the next smaller one that gives each
    nano-batch one. Those without prefill rows hold all their decode rows: what they could not would go to the others,
    whose decode attention it would lengthen. What is no multiple goes to the last."""
    prompts = sum(mix.prompts)
    wanted = [d * mix.decode + p * prompts for d, p in zip(decode, prefill, strict=True)]  # in sixteenths of a row
    for size in (*(each for each in UNITS if each <= unit), 1):
        units = rows // size
        fixed = {n: -(-wanted[n] // (SHARES * size)) for n, share in enumerate(prefill) if not share}
        fixed = {n: max(1, own) for n, own in fixed.items()}
        others = [n for n in range(len(decode)) if n not in fixed]
        if units - sum(fixed.values()) >= len(others):
            break
    else:  # the decode rows alone fill them all
        fixed, others = {}, list(range(len(decode)))
    left = units - sum(fixed.values())
    # Each gets one, and the rest goes by what is wanted: largest remainder, the earlier one winning a tie.
    weights = [max(1, wanted[n]) for n in others]
    quotas = [left * weight // sum(weights) for weight in weights]
    by_remainder = sorted(range(len(others)), key=lambda i: (-(left * weights[i] % sum(weights)), i))
    for i in by_remainder[: left - sum(quotas)]:
        quotas[i] += 1
    while 0 in quotas:
        quotas[quotas.index(max(quotas))] -= 1
        quotas[quotas.index(0)] += 1
    result = [fixed.get(n, 0) * size for n in range(len(decode))]
    for n, quota in zip(others, quotas, strict=True):
        result[n] = quota * size
    result[-1] += rows - sum(result)
    return result


def collective_forms(graph: Graph) -> tuple[str, ...]:
    """Kernels of the graph's collectives in all shardings that it can have, but for the reference and the one that is
    taken anyway; none on one rank."""
    layers = [with_sharding(graph, sharding).layer for sharding in shardings_of(graph)]
    names = [kernel for layer in layers for op in layer if isinstance(op, Collective) for kernel in op.kernels]
    return tuple(name for name in dict.fromkeys(names) if name not in ("reference", "nccl"))


def suggest(trial: "Trial", graph: Graph, rows: int, sms: int, kernels: Sequence[str] = ()) -> PlanChoice:
    """Ask `trial` for a choice for dense batches of `rows` rows on a device of `sms` SMs.

    `kernels` are those that products, decode attention and collectives may have beside the device's default, where they
    are among an operation's. The parameters ``{"nano_batches": 1}`` are the sequential plan. Nano-batches that get no
    share are dropped. What is likely good is a parameter of its own before what else there is, so that samplers meet it
    often: all products cut, all attention beside them, prefill rows shared out as decode rows are.
    """
    chosen: dict[str, str] = {}
    forms: dict[str, list[str]] = {}
    sharding = None
    if graph.ranks > 1 and len(shardings_of(graph)) > 1:
        sharding = trial.suggest_categorical("sharding", shardings_of(graph))
        graph = with_sharding(graph, sharding)
    for op in graph.layer:
        # "triton" is what decode attention has anyway; a product has it only if it is the fastest, or chosen.
        free = op.name in PRODUCTS or isinstance(op, Collective)
        own = op.kernels if free else OTHER_PROGRAMS if op.name == ATTENTION else {}
        known = [kernel for kernel in kernels if kernel in own]
        if known and isinstance(op, Collective):
            forms[op.name] = known
        if known and (kernel := trial.suggest_categorical(f"kernel_{op.name}", ("", *known))):
            chosen[op.name] = kernel
    most = max(1, min(MOST_NANO_BATCHES, rows // LEAST_ROWS))
    count = trial.suggest_int("nano_batches", 1, most)
    if count == 1:
        return PlanChoice(kernels=FrozenMapping(chosen), sharding=sharding)
    decode = _shares(trial, "decode", count)
    prefill = decode if trial.suggest_categorical("alike", (True, False)) else _shares(trial, "prefill", count)
    filled = [n for n in range(count) if decode[n] or prefill[n]]
    before, behind = products_of(graph)
    whole: set[str] = set()
    if trial.suggest_categorical("any_whole", (False, True)):
        whole = {op for op in (*before, *behind) if trial.suggest_categorical(f"whole_{op}", (True, False))}
    apart = bool(forms) and len(filled) > 1 and not whole and trial.suggest_categorical("forms_apart", (False, True))
    if apart:
        for (name, known), n in product(forms.items(), range(len(filled))):
            if kernel := trial.suggest_categorical(f"kernel_{name}_{n}", ("", *known)):
                chosen[f"{name}.{n}"] = kernel
    beside = [True] * count
    if not trial.suggest_categorical("all_beside", (True, False)):
        beside = [trial.suggest_categorical(f"beside_{n}", (False, True)) for n in range(count)]
    row_unit = trial.suggest_categorical("row_unit", UNITS[:2])
    skew = trial.suggest_int("skew", 0, len(before) + len(behind))
    stages: Literal["one", "several"] = "one"
    memory = None
    beside_it: frozenset[str] = frozenset()
    largest = sms // 2 // GRANULE * GRANULE
    if any(beside) and trial.suggest_categorical("several_stages", (False, True)):
        stages = "several"
    network = (
        bool(collectives_of(graph)) and stages == "one" and trial.suggest_categorical("network_lane", (True, False))
    )
    network_sms = None
    confined = False
    if any(beside) or network:
        confined = largest >= LEAST_SMS and trial.suggest_categorical("confined", (True, False))
    if network and confined:
        room = min(MOST_NETWORK_SMS, (sms - largest - 1) // NETWORK_UNIT * NETWORK_UNIT)
        network = room >= NETWORK_UNIT
        if network:
            network_sms = trial.suggest_int("network_sms", NETWORK_UNIT, room, step=NETWORK_UNIT)
    if any(beside):
        if confined:
            memory = trial.suggest_int("memory_sms", LEAST_SMS, largest, step=GRANULE)
        known = [op.name for op in graph.layer if op.name in COMPANIONS]
        if known and stages == "one" and all(beside):
            count_of = trial.suggest_int("with_attention", 0, len(known))
            beside_it = frozenset(known[len(known) - count_of :])
    if len(filled) == 1:
        return PlanChoice(kernels=FrozenMapping(chosen), sharding=sharding)
    return PlanChoice(
        decode=tuple(decode[n] for n in filled),
        prefill=tuple(prefill[n] for n in filled),
        row_unit=row_unit,
        whole=frozenset(whole),
        beside=tuple(beside[n] for n in filled),
        with_attention=beside_it,
        skew=skew,
        stages=stages,
        memory_sms=memory,
        network=network,
        network_sms=network_sms,
        kernels=FrozenMapping(chosen),
        sharding=sharding,
    )


def _shares(trial: "Trial", key: str, count: int) -> list[int]:
    cuts = sorted(trial.suggest_int(f"{key}_cut_{n}", 0, SHARES) for n in range(1, count))
    return [last - first for first, last in pairwise((0, *cuts, SHARES))]
