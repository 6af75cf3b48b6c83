"""Where a search begins: the families of plans that have won, or nearly, wherever plans were measured.

On an H100 the best plans have one stage, two nano-batches half a layer apart, and the decode attention of one beside
the products of the other on a fourth of the SMs or a little less: that many read nearly as fast as all do, and products
lose least.

Where ranks share the model, what won on two H200s are halves whose sums run beside the products of the other half,
through copy engines: they leave products nearly all SMs. Then come the families above, with a network lane. Each
sharding that leaves the weights as they are is tried.
"""

from collections.abc import Sequence
from typing import Any

from nanoflow.ops.collectives import Collective
from nanoflow.ops.graph import Graph
from nanoflow.ops.row_sharding import shardings_of, with_sharding
from nanoflow.pipeline.plan import Plan
from nanoflow.search.list_schedule import ATTENTION, COMPANIONS, products_of
from nanoflow.search.space import GRANULE, LEAST_ROWS, LEAST_SMS, NETWORK_UNIT, SHARES

__all__ = ["favourites"]

FEW_SMS = ("copy_engine", "nccl_8", "two_shot")
"""Forms of collectives that leave products most SMs, the most promising first."""
ALONE = ("push_64", "two_shot", "copy_engine")
"""Forms that are fast with nothing beside them, for few rows first."""
EVEN = 8
"""SMs of a group, whose whole multiples every device can set apart."""


def favourites(graph: Graph, rows: int, sms: int, kernels: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Parameters of `nanoflow.search.space.suggest`, the most promising first; none for a model or for batches that
    are not cut."""
    try:
        before, behind = products_of(graph)
    except ValueError:
        return []
    if rows < 2 * LEAST_ROWS:
        return []
    skew = min(4, len(before) + len(behind))
    companions = sum(op.name in COMPANIONS for op in graph.layer)
    base: dict[str, Any] = {
        "nano_batches": 2, "decode_cut_1": SHARES // 2, "alike": True, "any_whole": False, "all_beside": True,
        "row_unit": 128, "skew": skew, "several_stages": False, "with_attention": companions,
        "network_lane": True, "network_sms": NETWORK_UNIT, "forms_apart": False,
    }  # fmt: skip
    shardings = shardings_of(graph)
    base["sharding"] = shardings[0]
    for sharding in shardings:  # of all that is in here only some is asked for
        base |= {f"kernel_{op.name}": "" for op in with_sharding(graph, sharding).layer}
    fourth = round(sms / 4 / EVEN) * EVEN
    # Fewer decode rows and more of the prompts in the larger nano-batch: its attention runs beside the smaller one.
    tilt = {"decode_cut_1": 7, "alike": False, "prefill_cut_1": 11}
    attention = next(op for op in graph.layer if op.name == ATTENTION)
    # Attention on more SMs with fewer programs on each reads as fast, and leaves products more of the bandwidth.
    fewer = [{f"kernel_{ATTENTION}": each} for each in reversed(kernels) if each in attention.kernels][:2]
    found: list[dict[str, Any]] = _ranks_first(graph, base, sms, kernels)
    for memory in _sizes(sms, fourth, (0, -GRANULE)):
        found += [{**base, **memory}, {**base, **memory, "with_attention": 0}, {**base, **memory, **tilt}]
    for memory in _sizes(sms, fourth, (GRANULE, 0)):
        found += [{**base, **memory, **change, **kernel} for kernel in fewer for change in ({}, tilt)]
    for memory in _sizes(sms, fourth, (2 * GRANULE,) if fewer else (GRANULE, 2 * GRANULE)):
        found += [{**base, **memory, **kernel} for kernel in fewer or [{}]]
    found += [{**base, **memory, **tilt} for memory in _sizes(sms, fourth, (-2 * GRANULE,))]
    found += [{**base, **memory, "row_unit": 64} for memory in _sizes(sms, fourth, (0,))]
    for memory in _sizes(sms, fourth, (0,)):
        # What runs on the whole device is not slowed down by lanes; there is less beside which attention runs.
        halves = {**base, **memory, "several_stages": True, "any_whole": True, "all_beside": False}
        halves |= {f"whole_{op}": op in before for op in (*before, *behind)}
        found.append({**halves, "beside_0": False, "beside_1": True})
    found.append({**base, "confined": False} if sms else base)  # two plain streams
    return found


def _ranks_first(graph: Graph, base: dict[str, Any], sms: int, kernels: Sequence[str]) -> list[dict[str, Any]]:
    """Where ranks share the model: halves that take turns, and collectives in a lane of their own, confined and not;
    and halves that are apart, not confined.
    Sequential plans first, in two forms where there are some."""
    shardings = shardings_of(graph) if graph.ranks > 1 else ()
    collectives = {
        sharding: [op for op in with_sharding(graph, sharding).layer if isinstance(op, Collective)]
        for sharding in shardings
    }
    turns = {**base, "all_beside": False, "beside_0": False, "beside_1": False, "skew": 1}
    usual = Plan.sequential(graph, 1).sharding

    def chosen(sharding: str, form: str) -> dict[str, Any]:
        return {**turns, "sharding": sharding, **{f"kernel_{op.name}": form for op in collectives[sharding]}}

    def known(sharding: str, forms: Sequence[str]) -> list[str]:
        ops = collectives[sharding]
        return [form for form in forms if form in kernels and all(form in op.kernels for op in ops)][:2]

    found = [
        {**chosen(sharding, form), "nano_batches": 1}
        for sharding in shardings
        for form in known(sharding, ALONE) or [""] * (sharding != usual)
    ]
    for sharding in shardings:
        for form in known(sharding, FEW_SMS)[:1]:
            shared = {**chosen(sharding, form), "confined": False}
            apart = {key: base[key] for key in ("all_beside", "skew")}  # with decode attention in a lane, too
            found += [shared, {**shared, **apart}, *([{**shared, "confined": True}] if sms else [])]
    return found


def _sizes(sms: int, fourth: int, steps: tuple[int, ...]) -> list[dict[str, Any]]:
    """Parameters of a memory lane of about a fourth of the SMs; none where SMs cannot be set apart."""
    largest = sms // 2 // GRANULE * GRANULE
    if largest < LEAST_SMS:
        return []
    sizes = dict.fromkeys(min(largest, max(LEAST_SMS, fourth + step)) for step in steps)
    return [{"confined": True, "memory_sms": size} for size in sizes]
