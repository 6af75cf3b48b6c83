"""What is measured of the collectives of ranks that share a model: in each form, alone and beside what a rank does."""

from collections.abc import Iterable, Sequence

from nanoflow.ops.collectives import CTAS, Collective
from nanoflow.ops.graph import Graph
from nanoflow.ops.operation import Operation, Work
from nanoflow.ops.peer_all_reduce import UNCONFINED
from nanoflow.ops.peer_rows import PUSH
from nanoflow.profiling.rank_bench import collectives_in
from nanoflow.search.profile import At
from nanoflow.search.profiler import PairCase, SoloCase

__all__ = ["NetworkCases"]

SLOW = ("nccl_2",)
"""Forms that nothing is measured beside: they take longer than what they would leave room for."""
ONE_ROW = Work(prefill_rows=1)


class NetworkCases:
    """Cases of the collectives of a rank's graph, of which those that do the same are measured once; false if there are
    none.

    Args:
        itemsize: bytes of an element.
        gpu: whether the ranks have GPUs.
    """

    def __init__(self, graph: Graph, itemsize: int, *, gpu: bool) -> None:
        self._outer = {op.name for op in graph.epilogue}
        self._own = {op.name for op in graph.layer}
        self._itemsize, self._gpu = itemsize, gpu
        self._alike: dict[object, list[Collective]] = {}
        """By what they do."""
        for op in collectives_in(graph).values():
            same = type(op), op.cost(ONE_ROW, itemsize), tuple(op.kernels), op.name in self._outer
            self._alike.setdefault(same, []).append(op)

    def __bool__(self) -> bool:
        return bool(self._alike)

    def solos(
        self, sms: int | None, rows: Iterable[int], sampled: Iterable[int] = (), *, own: bool | None = None
    ) -> list[SoloCase | PairCase]:
        """Alone on so many SMs (None: all); what comes behind the layers on sampled rows, in the preferred form.

        `own`: of the graph itself alone, or of its other shardings; None: all.
        """
        found: list[SoloCase | PairCase] = []
        for op, *others in self._alike.values():
            outer = op.name in self._outer
            if own is not None and own != (op.name in self._own):
                continue
            at = tuple((count,) for count in (sampled if outer else rows))
            wire, also = op.cost(ONE_ROW, self._itemsize).wire_bytes, _names(others)
            forms = [""] if outer else self._forms(op, sms)
            found += [SoloCase(op.name, "rows", sms, at, form, wire, also) for form in forms if at]
        return found

    def pairs(
        self, ops: Sequence[Operation], at: At, rows: At, where: tuple[int | None, int | None], *, own: bool
    ) -> list[SoloCase | PairCase]:
        """Each of `ops` at `at` beside each form on `rows`, on so many SMs each; `own` as in `solos`."""
        return [
            PairCase(op.name, at, where[0], each.name, rows, where[1], form, _names(others))
            for each, *others in self._alike.values()
            if each.name not in self._outer and own == (each.name in self._own)
            for form in self._forms(each, where[1])
            if form not in SLOW
            for op in ops
        ]

    def _forms(self, op: Collective, sms: int | None) -> list[str]:
        """Kernels on so many SMs, first the preferred one, which has no name in a profile."""
        if not self._gpu:
            return ["", "nccl"]
        named = [name for name in op.kernels if name not in ("reference", "nccl")]
        if sms is not None:  # own kernels have as many thread blocks, whatever they have elsewhere
            named = [name for name in named if CTAS.get(name, 0) <= sms and PUSH.get(name, UNCONFINED) == UNCONFINED]
        return ["", *named]


def _names(ops: Sequence[Operation]) -> tuple[str, ...]:
    return tuple(op.name for op in ops)
