"""Measuring operations as a run launches them: the engine's own kernels, in an executor's buffers, on random values.

A few of the model's layers stand for all: so many that their weights do not stay in the cache between two calls, which
then take turns, as they do in a run. Two operations that run at once have buffers of their own each, since nano-batches
have rows of their own.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, prod
from typing import cast

import torch

from nanoflow.errors import OutOfMemoryError
from nanoflow.loading import Model
from nanoflow.memory import format_bytes, free_bytes
from nanoflow.ops.batch import DenseBatch
from nanoflow.ops.communicator import Communicator
from nanoflow.ops.device_arrays import DeviceArrays
from nanoflow.ops.device_batch import BatchPart, DeviceBatch, RowsOnly
from nanoflow.ops.linear import Linear, LinearSilu
from nanoflow.ops.operation import NanoContext, Operation
from nanoflow.pipeline.bound_programs import BoundPrograms
from nanoflow.pipeline.executor import KVLayout
from nanoflow.pipeline.partitions import Partition, PartitionError
from nanoflow.pipeline.plan import Plan
from nanoflow.pipeline.program import compile_program
from nanoflow.pipeline.split import BatchCutter
from nanoflow.plans.running import mix_batch, mix_pages
from nanoflow.profiling.rank_bench import RankBench, collectives_in
from nanoflow.search.gemm_measure import ROTATED_BYTES
from nanoflow.search.mix import Mix
from nanoflow.search.profile import At, Point, axes_of
from nanoflow.search.profiler import PairCase, SoloCase, Unmeasurable
from nanoflow.search.timing import Candidate, EnergyCounter, Replays, capture, on_sms, time_interleaved, time_together
from nanoflow.weights import load_weights

__all__ = ["DeviceBench", "Seconds", "few_layers"]

PIECE = 512
"""Tokens of the prompts that stand for rows of any kind: they take fewer pages than as many requests do."""
KV_SHARE = 0.7
"""Of the memory that the weights leave, what the KV cache may take: kernels and graphs need some too."""
_LANES = ("first", "second")


@dataclass(frozen=True)
class Seconds:
    """How long each size is measured."""

    whole: float
    """The larger sizes on the whole device, in turns of half of it: long enough to see the energy counter move."""
    part: float
    """The others, and on a part of the SMs, in turns of half of it; no energy is read there."""
    warm: float
    """Before each case."""
    pair: float
    """Of two operations at once."""


GPU_SECONDS = Seconds(whole=0.6, part=0.12, warm=0.15, pair=0.5)
CPU_SECONDS = Seconds(whole=0.02, part=0.02, warm=0.0, pair=0.0)


def few_layers(model: Model) -> Model:
    """The model with as many layers as it takes for the smallest product's weights to fall out of a GPU's cache."""
    sizes = []
    for op in model.graph.layer:
        linear = op.linear if isinstance(op, LinearSilu) else op
        if isinstance(linear, Linear):
            sizes.append(linear.inputs * sum(linear.outputs) * model.dtype.itemsize)
    rotated = ceil(ROTATED_BYTES / min(sizes)) if sizes and model.device.type == "cuda" else 2
    return replace(model, graph=replace(model.graph, layers=min(model.graph.layers, rotated)))


class DeviceBench:
    """The `nanoflow.search.profiler.Bench` of a model's device.

    Args:
        model: of `few_layers`.
        cases: all that will be measured: what memory is laid out for.
        joules: reads the device's energy counter.
        communicator: to the other ranks that share the model, each of which makes one too and measures the same cases
            in the same order; None: there are none.

    Raises OutOfMemoryError if weights and buffers do not fit, CommunicatorError.
    """

    def __init__(
        self,
        model: Model,
        cases: Sequence[SoloCase | PairCase],
        page_size: int,
        joules: EnergyCounter,
        seconds: Seconds | None = None,
        communicator: Communicator | None = None,
    ) -> None:
        graph, device = model.graph, model.device
        self._model, self._joules, self._page_size = model, joules, page_size
        self._seconds = seconds or (GPU_SECONDS if device.type == "cuda" else CPU_SECONDS)
        self._ops = {op.name: op for op in (*graph.prologue, *graph.layer, *graph.epilogue)}
        self._outer = {op.name for op in (*graph.prologue, *graph.epilogue)}
        self._sampled = {op.name for op in graph.epilogue}
        self._piece = min(PIECE, model.max_model_len)
        self._collectives = collectives_in(graph)
        self._ranks: RankBench | None = None
        mixes = [self._mix(kind, at) for kind, at in _sizes(cases, {**self._collectives, **self._ops})]
        capacity = max([mix.rows for mix in mixes], default=1)
        sampled = [at[0] for case in cases if isinstance(case, SoloCase) and case.op in self._sampled for at in case.at]
        # Not the one that rank 0 would choose: the same on every rank.
        plan = Plan.sequential(graph, capacity, sharding=graph.sharding)
        self._cut = BatchCutter([plan])
        needed = max([mix_pages(mix, page_size) for mix in mixes], default=2)
        columns = -(-model.max_model_len // page_size)
        try:
            weights = load_weights(graph, model.checkpoint, model.dtype, device, "random")
            page = 2 * graph.layers * graph.kv_heads * graph.head_dim * page_size * model.dtype.itemsize
            self._pages = min(needed, int(free_bytes(device) * KV_SHARE) // page)
            if self._pages < 2:
                raise OutOfMemoryError(
                    f"engine.device: {format_bytes(free_bytes(device))} are free beside the weights of {graph.layers} "
                    "layers, too little for a KV cache; end what else uses the device, or profile a smaller model"
                )
            with torch.inference_mode():
                self._bound = BoundPrograms(
                    [compile_program(plan, graph)],
                    weights,
                    KVLayout(self._pages, page_size, columns),
                    dtype=model.dtype,
                    device=device,
                    sampled_rows=max(sampled, default=1),
                    communicator=communicator,
                )
                # Zeros would draw less power, and run faster.
                for tensor in (*self._bound.buffers.values(), *self._bound.kv):
                    tensor.normal_()
                self._second = {name: buffer.clone() for name, buffer in self._bound.buffers.items()}
                if communicator is not None:
                    own = communicator, self._collectives, cases, self._second, device, model.dtype, joules
                    self._ranks = RankBench(*own)
        except torch.OutOfMemoryError:
            raise OutOfMemoryError(
                f"engine.max_batch_tokens: the weights of {graph.layers} layers and buffers for {capacity:,} rows do "
                "not fit this device; lower it, or end what else uses the device"
            ) from None
        # What every capture of a graph would have the collector walk again.
        gc.collect()
        gc.freeze()

    @property
    def missing(self) -> Mapping[str, str]:
        """Forms of collectives that cannot run here, and why."""
        return {} if self._ranks is None else self._ranks.missing

    def can(self, case: SoloCase | PairCase) -> bool:
        """Whether what a case is of runs here: forms of collectives may not."""
        return self._ranks is None or self._ranks.can(case)

    def close(self) -> None:
        """Give what was laid out back to the collector, and what ranks have in common of their memory."""
        gc.unfreeze()
        if self._ranks is not None:
            self._ranks.close()

    def solo(self, case: SoloCase) -> list[Point]:
        """See `Bench.solo`; the sizes of a case take turns."""
        device, seconds = self._model.device, self._seconds
        if self._ranks is not None and case.op in self._collectives:
            most = max(at[0] for at in case.at)

            def how_long(at: At) -> float:
                return seconds.whole if case.sms is None and 2 * at[0] >= most else seconds.part

            with self._here():
                return self._ranks.solo(case, how_long)
        fitting = [at for at in case.at if self._problem(case.kind, at) is None]
        if not fitting:
            raise Unmeasurable(str(self._problem(case.kind, case.at[0])))
        # Energy too of what matters most, the larger sizes on the whole device. The others take turns of their own:
        # a card's counter lags behind, and would give the large what the small drew.
        size = {at: prod(at) if case.kind == "decode" else at[0] for at in fitting}
        large = [at for at in fitting if case.sms is None and 2 * size[at] >= max(size.values())]
        points: dict[At, Point] = {}
        with self._here(), on_sms(case.sms, device) as stream:
            for some, length in (([at for at in fitting if at not in large], seconds.part), (large, seconds.whole)):
                if not some:
                    continue
                candidates: dict[str, Candidate] = {
                    str(n): self._calls(case.op, at, case.sms) for n, at in enumerate(some)
                }
                found = time_interleaved(
                    candidates,
                    length,
                    warmup_seconds=seconds.warm,
                    slice_seconds=length / 2,
                    device=device,
                    stream=stream,
                    joules=self._joules if some is large else None,
                )
                points |= {
                    at: Point(at, found[str(n)].median_ms / 1e3, found[str(n)].joules) for n, at in enumerate(some)
                }
        return [points[at] for at in fitting]

    def pair(self, case: PairCase) -> tuple[float, float]:
        """See `Bench.pair`; each one's solo speed is taken before and after, on the same SMs."""
        device = self._model.device
        if device.type != "cuda":
            raise Unmeasurable("operations run side by side on a GPU alone")
        if self._ranks is not None and case.other in self._collectives:
            with self._here():
                return self._ranks.pair(case, lambda: self._fitting(case), self._seconds.pair)
        for name, at in ((case.op, case.at), (case.other, case.other_at)):
            if (problem := self._problem(axes_of(self._ops[name]), at)) is not None:
                raise Unmeasurable(problem)
        sms = [budget for budget in (case.sms, case.other_sms) if budget is not None]
        with self._here():
            partition = Partition(sms, device) if sms else None
            try:
                if partition is not None:
                    streams = list(partition.streams)
                else:  # as a plan's lanes have them that are not confined: the later lane goes first
                    streams = [torch.cuda.Stream(device, priority=-n) for n in (0, 1)]  # type: ignore[no-untyped-call]
                alone, together = self._side_by_side(case, streams)
            finally:
                if partition is not None:
                    partition.close()
        first, second = (min(1.0, own / beside) for own, beside in zip(alone, together, strict=True))
        return first, second

    def _fitting(self, case: PairCase) -> list[Callable[[], None]]:
        """Calls of the first of a pair. Raises Unmeasurable if its size does not fit."""
        if (problem := self._problem(axes_of(self._ops[case.op]), case.at)) is not None:
            raise Unmeasurable(problem)
        return self._calls(case.op, case.at, case.sms)

    def _side_by_side(
        self, case: PairCase, streams: Sequence[torch.cuda.Stream]
    ) -> tuple[tuple[float, float], tuple[float, float]]:
        """Milliseconds of a call of each: alone, and while the other runs."""
        device, seconds = self._model.device, self._seconds.pair
        calls = (
            self._calls(case.op, case.at, case.sms),
            self._calls(case.other, case.other_at, case.other_sms, lane=1),
        )
        torch.cuda.synchronize(device)
        graphs: list[Replays] = []
        try:
            for own, stream in zip(calls, streams, strict=True):
                graphs.append(capture(own, device, stream))

            def alone(record: bool) -> None:
                for place in (0, 1):
                    graphs[place].run_for(seconds / 4, record)

            alone(False)
            alone(True)
            together = time_together(graphs[0], graphs[1], seconds)
            alone(True)
            return (graphs[0].timing().median_ms, graphs[1].timing().median_ms), together
        finally:
            graphs.clear()  # they must be gone before the partition is
            gc.collect()
            torch.cuda.synchronize(device)

    @contextmanager
    def _here(self) -> Iterator[None]:
        """On the device; what goes wrong in one case is no reason to leave out the others."""
        device = self._model.device
        try:
            with torch.inference_mode():
                if device.type != "cuda":
                    yield
                    return
                with torch.cuda.device(device):
                    yield
        except (PartitionError, torch.OutOfMemoryError) as error:
            raise Unmeasurable(str(error).splitlines()[0]) from None
        finally:
            if device.type == "cuda":
                torch.cuda.empty_cache()

    def _problem(self, kind: str, at: At) -> str | None:
        """Why a size cannot be measured, or None."""
        mix, tokens = self._mix(kind, at), self._page_size
        needed = mix_pages(mix, tokens)
        if needed <= self._pages:
            return None
        return f"{mix} takes {needed * tokens:,} KV tokens, and {self._pages * tokens:,} fit"

    def _calls(self, name: str, at: At, sms: int | None, lane: int = 0) -> list[Callable[[], None]]:
        """The operation in every layer, one call each, on a batch of its own."""
        op, model, bound = self._ops[name], self._model, self._bound
        batch = self._batch(self._mix(axes_of(op), at))
        part = batch.whole
        if name in self._sampled:
            part = cast(BatchPart, RowsOnly(slice(0, at[0])))
        chosen = op.preferred_kernel(model.device, model.dtype, sms)
        kernel = op.kernels[chosen]
        buffers: Mapping[str, torch.Tensor] = bound.buffers if lane == 0 else self._second

        def context(layer: int) -> NanoContext:
            weights = bound.weights.outer if name in self._outer else bound.weights.layers[layer]
            own = weights.get(name, {})
            return NanoContext(batch, part, layer, buffers, own, bound.kv[layer], sms, _LANES[lane])

        if name in self._outer:
            return [partial(kernel, context(0))]
        op.prepare(context(0), chosen)
        return [partial(kernel, context(layer)) for layer in range(model.graph.layers)]

    def _batch(self, mix: Mix) -> DeviceBatch:
        host: DenseBatch = mix_batch(mix, self._cut, self._page_size, self._model.graph.vocab_size)
        columns = self._bound.kv_layout.pages_per_sequence
        return DeviceBatch(host, self._model.device, self._page_size, DeviceArrays(self._model.device), columns)

    def _mix(self, kind: str, at: At) -> Mix:
        if kind == "decode":
            return Mix(at[0], at[1])
        if kind == "prefill":
            return Mix(0, 1, (at[0],), (at[1],))
        whole, rest = divmod(at[0], self._piece)
        return Mix(0, 1, (self._piece,) * whole + ((rest,) if rest else ()))


def _sizes(cases: Sequence[SoloCase | PairCase], ops: Mapping[str, Operation]) -> Iterator[tuple[str, At]]:
    for case in cases:
        if isinstance(case, SoloCase):
            yield from ((case.kind, at) for at in case.at)
        else:
            yield axes_of(ops[case.op]), case.at
            yield axes_of(ops[case.other]), case.other_at
