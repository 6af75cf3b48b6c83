"""What is measured for a job: the sizes that its batches and their nano-batches have, on the SMs that lanes may have.

Contract: the cases follow from the job's mixes, the model and the device alone. Those that plans need most come first:
all of the whole device, then each split of it, nearest to a fourth for the memory lane first, and what runs beside
what there; then the splits that are further off, then what takes little time anyway. On a device without partitions
there is the whole device alone. Where ranks share the model, collectives come behind the rest of the whole device, in
each form, and before the splits for memory those for a network lane, and products beside collectives there; those of
other shardings come behind the nearer splits.

    rows                the buckets that the job's batches are padded to, their quarters, halves and three quarters in
                        whole units, and on the whole device powers of two below, for the tail of a run
    requests x context  of the job's mixes, a half and a quarter of the requests, half and twice the context; for some
                        ten thousand tokens attention's time is a straight line, and a few sizes tell it
    rows x start        of the job's longest piece of a prompt, a half and a quarter of it; where pieces begin
"""

from collections.abc import Iterable, Sequence

from nanoflow.ops.collectives import Collective
from nanoflow.ops.graph import Graph
from nanoflow.ops.linear import Linear, LinearSilu
from nanoflow.ops.operation import Operation
from nanoflow.pipeline.split import UNITS
from nanoflow.plans.job_mixes import WeightedMix
from nanoflow.profiling.network_cases import NetworkCases
from nanoflow.search.list_schedule import ATTENTION, COMPANIONS
from nanoflow.search.profile import At, axes_of
from nanoflow.search.profiler import PairCase, SoloCase, close, network_splits, splits

__all__ = ["job_cases", "nano_rows", "part_rows"]

LEAST_ROWS = 8
"""Of the whole device's smaller sizes."""
APART = 1.7
"""Of sizes of attention, and of the head, that are closer the larger is measured: in between, interpolation tells."""
HEAVY = 0.05
"""Share of the job's time of a mix whose sizes are measured; those of the others lie among them, or matter little."""
MOST_SAMPLED = 1024
"""Rows of the head; a run takes more in several turns."""
SHARE = 1 / 4
"""Of the SMs, what the memory lane of a good plan has, about."""


def job_cases(
    graph: Graph,
    mixes: Sequence[WeightedMix],
    *,
    max_model_len: int,
    kv_tokens: int,
    sms: int | None,
    streams: bool,
    itemsize: int = 2,
) -> list[SoloCase | PairCase]:
    """All cases of a job, in order.

    Args:
        max_model_len: of a request, in tokens.
        kv_tokens: that the KV cache holds: no larger contexts are measured.
        sms: of the device, if it can be split into parts; None: it cannot.
        streams: whether operations can run side by side there, which is so on a GPU.
        itemsize: bytes of an element.
    """
    mixes = _heavy(mixes)
    parts = part_rows(mixes)
    whole = sorted({*parts, *_smaller(max(parts))})
    decode, prefill = _decode(mixes, max_model_len, kv_tokens), _prefill(mixes, max_model_len)
    sampled = [min(each.mix.decode + len(each.mix.prompts), MOST_SAMPLED) for each in mixes]
    head = _apart([1, *(max(1, count // 2) for count in sampled), *sampled])
    sizes = {"decode": decode, "prefill": prefill}

    def solo(op: Operation, budget: int | None, rows: Iterable[int]) -> SoloCase:
        kind = axes_of(op)
        at = sizes[kind] if kind in sizes else tuple((count,) for count in rows)
        return SoloCase(op.name, kind, budget, at)

    layer = [op for op in graph.layer if not isinstance(op, Collective)]
    heavy = [op for op in layer if _is_product(op) or axes_of(op) != "rows"]
    light = [op for op in layer if op not in heavy]
    found: list[SoloCase | PairCase] = [solo(op, None, whole) for op in (*heavy, *light, *graph.prologue)]
    found += [solo(op, None, head) for op in graph.epilogue if not isinstance(op, Collective)]
    network = NetworkCases(graph, itemsize, gpu=streams)
    lanes = network_splits(sms) if sms is not None and network else []
    products, attention = ([op for op in heavy if name(op)] for name in (_is_product, _is_decode_attention))
    half = (min(parts, key=lambda count: abs(count - parts[-1] / 2)),)
    found += network.solos(None, whole, head)
    for compute, _ in lanes:
        found += [solo(op, compute, parts) for op in heavy if op.name != ATTENTION]

    def beside_network(own: bool) -> list[SoloCase | PairCase]:
        """Collectives of the graph itself, or of its other shardings, in a lane, and what runs beside them."""
        cases: list[SoloCase | PairCase] = []
        for compute, lane in lanes:
            cases += network.solos(lane, parts, own=own)
            cases += network.pairs(products, half, half, (compute, lane), own=own)
        if streams:
            cases += network.pairs(products, half, half, (None, None), own=own)
            cases += network.pairs(attention, max(decode), half, (None, None), own=own) if decode else []
        return cases

    found += beside_network(own=True)
    ordered = [] if sms is None else sorted(splits(sms), key=lambda split: (abs(split[1] - SHARE * sms), split))
    near = [split for split in ordered if sms is not None and close(split[1], sms)]
    for splits_now in (near, [split for split in ordered if split not in near]):
        for compute, memory in splits_now:
            found += [solo(op, compute, parts) for op in heavy if op.name != ATTENTION]
            found += [solo(op, memory, parts) for op in layer if op.name in (ATTENTION, *COMPANIONS)]
        if streams:
            side_by_side: list[tuple[int | None, int | None]] = [split for split in splits_now if split[1] % 8 == 0]
            if splits_now is near:
                side_by_side.append((None, None))  # two plain streams
            found += _pairs(graph, mixes[0], decode, prefill, side_by_side)
        if splits_now is near:
            found += beside_network(own=False)
    for compute, _ in (*lanes, *ordered):
        found += [solo(op, compute, parts) for op in light]
    return [case for case in dict.fromkeys(found) if isinstance(case, PairCase) or case.at]


def _heavy(mixes: Sequence[WeightedMix]) -> Sequence[WeightedMix]:
    """The heaviest, and the others that are worth measuring for."""
    return [each for place, each in enumerate(mixes) if not place or each.weight >= HEAVY]


def nano_rows(mixes: Sequence[WeightedMix]) -> list[int]:
    """Of `part_rows`, those that one of two nano-batches may have in the job's larger batches."""
    rows = part_rows(mixes)
    return [count for count in rows if rows[-1] <= 4 * count <= 3 * rows[-1]] or rows


def part_rows(mixes: Sequence[WeightedMix]) -> list[int]:
    """Rows of a nano-batch, or of a product over all rows: what lanes on a part of the SMs get."""
    found = set()
    for each in _heavy(mixes):
        bucket = each.bucket
        unit = next((unit for unit in UNITS if bucket >= 4 * unit), 1)
        for quarters in (1, 2, 3):
            exact = bucket * quarters / 4
            found |= {int(exact // unit) * unit, -int(-exact // unit) * unit}
        found.add(bucket)
    return sorted(rows for rows in found if rows)


def _smaller(most: int) -> list[int]:
    rows, found = LEAST_ROWS, []
    while rows < most:
        found.append(rows)
        rows *= 2
    return found


def _decode(mixes: Sequence[WeightedMix], max_model_len: int, kv_tokens: int) -> tuple[At, ...]:
    """Requests and contexts. Contexts are spread up to four thirds around their mean, in pages of their own."""
    own = [each.mix for each in mixes if each.mix.decode]
    if not own:
        return ()
    requests = _apart([max(1, mix.decode * quarters // 4) for mix in own for quarters in (1, 2, 4)])
    around = [context for mix in own for context in (mix.context // 2, mix.context, 2 * mix.context)]
    longest = max_model_len * 3 // 4 - 1
    contexts = _apart([min(max(1, context), max(1, longest)) for context in around])
    most = max([kv_tokens, *(mix.decode * mix.context for mix in own)])
    return tuple((count, context) for count in requests for context in contexts if count * context <= most)


def _prefill(mixes: Sequence[WeightedMix], max_model_len: int) -> tuple[At, ...]:
    pieces = [piece for each in mixes for piece in each.mix.prompts]
    if not pieces:
        return ()
    rows = _apart([max(1, max(pieces) * quarters // 4) for quarters in (1, 2, 4)])
    latest = max(start for each in mixes for start in (*each.mix.starts, 0))
    starts = _apart([latest // 2, latest]) if latest else []
    return tuple((count, start) for count in rows for start in (0, *starts) if count + start <= max_model_len)


def _pairs(
    graph: Graph,
    heaviest: WeightedMix,
    decode: Sequence[At],
    prefill: Sequence[At],
    where: Sequence[tuple[int | None, int | None]],
) -> list[PairCase]:
    """Each product, and prefill attention, beside decode attention, of one of two nano-batches each."""
    if not decode or ATTENTION not in {op.name for op in graph.layer}:
        return []
    half = heaviest.mix.decode // 2
    attended = min(decode, key=lambda at: (abs(at[0] - half), abs(at[1] - heaviest.mix.context)))
    rows = part_rows([heaviest])
    own = (min(rows, key=lambda count: abs(count - heaviest.bucket / 2)),)
    found = []
    for compute, memory in where:
        for op in graph.layer:
            if _is_product(op):
                found.append(PairCase(op.name, own, compute, ATTENTION, attended, memory))
            elif axes_of(op) == "prefill" and prefill:
                found.append(PairCase(op.name, max(prefill), compute, ATTENTION, attended, memory))
    return found


def _is_product(op: Operation) -> bool:
    return isinstance(op, Linear | LinearSilu)


def _is_decode_attention(op: Operation) -> bool:
    return op.name == ATTENTION


def _apart(values: Iterable[int]) -> list[int]:
    """Ascending, the largest and of the others those that are far enough below the next."""
    found: list[int] = []
    for value in sorted(set(values), reverse=True):
        if not found or value * APART <= found[-1]:
            found.append(value)
    return found[::-1]
