"""Plans on this machine: an executor with random weights, and one mix of requests laid out for each of its programs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nanoflow.config_schema import DEVICE, EngineSection, ModelSection, RunConfig
from nanoflow.dense_batch import form_dense_batch, lay_out
from nanoflow.devices import device_sms, ranks_reach
from nanoflow.errors import InputError, OutOfMemoryError
from nanoflow.kv_cache import KVCache
from nanoflow.loading import PAGE_SIZES, Model, machine_fingerprint, open_model
from nanoflow.ops.batch import DenseBatch, SamplingBatch
from nanoflow.ops.communicator import Communicator
from nanoflow.parallel.executor import RunExecutor
from nanoflow.parallel.group import TensorGroup, check_ranks
from nanoflow.parallel.messages import Load
from nanoflow.pipeline.bound_programs import make_caches
from nanoflow.pipeline.cuda_executor import CudaExecutor, buckets
from nanoflow.pipeline.executor import CaptureError, KVLayout, Weights
from nanoflow.pipeline.partitions import PartitionError, unavailable
from nanoflow.pipeline.plan import Plan, PlanError, blamed_on
from nanoflow.pipeline.program import compile_program
from nanoflow.pipeline.reference_executor import ReferenceExecutor
from nanoflow.pipeline.split import BatchCutter
from nanoflow.plans.case import PlanCase
from nanoflow.search.mix import Mix
from nanoflow.weights import load_weights

__all__ = ["executor_here", "measuring_executor", "mix_batch", "mix_kv", "mix_pages", "open_here", "random_caches"]


def open_here(case: PlanCase, device: str) -> tuple[Model, int, int]:
    """The model of `case` on `device` of this machine, tokens of a page there, and the rows that its mix is padded to.

    Raises UserError.
    """
    _check_device(device)
    capacity, mix = case.plan.capacity, case.mix
    section = EngineSection(device=device, max_batch_tokens=capacity)
    model = open_model(ModelSection(path=case.model_path, weights="random"), section)
    longest = longest_request(mix)
    if longest > model.max_model_len:
        raise InputError(
            f"--context, --prompts: {longest:,} tokens of one request are more than the {model.max_model_len:,} of "
            f"{case.model}; give fewer (contexts are spread up to four thirds of --context)"
        )
    if model.device.type == "cuda":
        with blamed_on(case.file):
            machine_fingerprint(model.device).refuse(case.plan)
    rows = next(rows for rows in buckets(capacity) if rows >= mix.rows)
    graph = (
        replace(case.graph, peers=ranks_reach(model.device, case.graph.ranks)) if case.graph.ranks > 1 else case.graph
    )
    return replace(model, graph=graph), PAGE_SIZES[model.device.type], rows


def job_on(config: RunConfig, device: str | None) -> RunConfig:
    """The job of `config` as it is measured: with random weights, on `device` if one is given.

    How long an iteration takes does not depend on what weights are. Raises InputError.
    """
    changes: dict[str, Any] = {"model": config.model.model_copy(update={"weights": "random"})}
    if device is not None:
        _check_device(device)
        changes["engine"] = config.engine.model_copy(update={"device": device})
    return config.model_copy(update=changes)


def _check_device(device: str) -> None:
    if not DEVICE.fullmatch(device):
        raise InputError(f"--device {device}: it must be auto, cpu, cuda or cuda:N")


def lane_sms(device: torch.device) -> int:
    """SMs that lanes can be confined to parts of; 0 if they cannot."""
    return device_sms(device) if device.type == "cuda" and not unavailable(device) else 0


def longest_request(mix: Mix) -> int:
    """Tokens of the longest request that `mix_batch` makes of `mix`."""
    return max([mix.context * 4 // 3 + 1, *map(sum, zip(mix.prompts, mix.starts, strict=True))])


def mix_pages(mix: Mix, page_size: int) -> int:
    """Pages of KV cache that `mix` takes, the reserved one included."""
    return 1 + int((-(-_lengths(mix) // page_size)).sum())


def mix_batch(mix: Mix, cut: BatchCutter, page_size: int, vocab_size: int, program: int = 0) -> DenseBatch:
    """`mix` as a dense batch for plan `program` of `cut`, padded as that pads it.

    Contexts are spread evenly from two thirds to four thirds of the mix's, in random order. Prompts are
    of random tokens. Every request is sampled greedily. KV pages are dealt out at random. It is the same at every call.
    """
    lengths = _lengths(mix)
    count, prompts = len(lengths), np.array(mix.prompts, np.int32)
    columns = int((-(-lengths // page_size)).max())
    kv = KVCache(mix_pages(mix, page_size), page_size, count, columns)
    order = 1 + np.random.default_rng(0).permutation(kv.pages - 1)
    taken = 0
    for request, pages in enumerate((-(-lengths // page_size)).tolist()):
        kv.page_table[request, :pages] = order[taken : taken + pages]
        taken += pages
    rows = mix.decode, int(prompts.sum())
    attended = int(lengths[: mix.decode].sum())
    layout = lay_out(lambda decode, prefill, _: cut.of(program, decode, prefill), *rows, attended)
    sampled = np.concatenate([layout.decode_rows, layout.prefill_rows[np.cumsum(prompts) - 1]]).astype(np.int32)
    slots = np.arange(count, dtype=np.int32)
    return form_dense_batch(
        layout,
        kv,
        slots[: mix.decode],
        lengths[: mix.decode] - 1,
        slots[mix.decode :],
        np.array(mix.starts, np.int32),
        prompts,
        np.random.default_rng(1).integers(0, vocab_size, rows[1]).astype(np.int32),
        _greedy(sampled, slots),
    )


def measuring_executor(
    model: Model,
    plans: Sequence[Plan],
    mix: Mix,
    page_size: int,
    *,
    row_buckets: Sequence[int] | None = None,
    marks: bool = False,
    weights: Weights | None = None,
    caches: Sequence[torch.Tensor] | None = None,
    communicator: Communicator | None = None,
    slots: int | None = None,
) -> CudaExecutor | ReferenceExecutor:
    """An executor of `plans` on the model's device, with random weights and a random KV cache of what `mix` takes.

    On a GPU it has graphs of `row_buckets` rows, and of each plan's capacity. Raises OutOfMemoryError or PlanError.

    Args:
        weights: those of another executor of the model; None: they are made.
        caches: the KV cache of one of the same mix (`random_caches`); None: it is made.
        communicator: to the other ranks that share the model.
        slots: of requests, the same on all ranks; None: as many as the mix has.
    """
    programs = [compile_program(plan, model.graph) for plan in plans]
    kv = mix_kv(model, mix, page_size)
    weights = weights or load_weights(model.graph, model.checkpoint, model.dtype, model.device, "random")
    count = mix.decode + len(mix.prompts) if slots is None else slots
    sizes: dict[str, Any] = {"slots": count, "dtype": model.dtype, "device": model.device, "marks": marks}
    sizes |= {"caches": caches, "communicator": communicator}
    executor: CudaExecutor | ReferenceExecutor
    try:
        if model.device.type == "cuda":
            executor = CudaExecutor(programs, weights, kv, row_buckets=row_buckets, **sizes)
        else:
            executor = ReferenceExecutor(programs, weights, kv, **sizes)
    except (torch.OutOfMemoryError, CaptureError):
        raise OutOfMemoryError(
            f"--layers, --decode, --prompts: a model of {model.graph.layers} layers and the KV cache of {mix} do not "
            "fit this device; give less of any of them"
        ) from None
    except PartitionError as error:
        raise PlanError(f"partitions: {error}; change the plan's sizes") from None
    if caches is None:
        for cache in executor.bound.kv:
            cache.normal_()
    return executor


@contextmanager
def executor_here(
    case: PlanCase, model: Model, page_size: int, rows: int, plans: Sequence[Plan], *, marks: bool = False
) -> Iterator[RunExecutor]:
    """An executor of `plans` on what `open_here` gave, closed in the end: `measuring_executor` says of what.

    Where ranks share the model of `case`, it is one of all of them, which are started and ended here; `marks` are this
    rank's. Raises UserError, from `with`, also if a rank is lost.
    """
    mix, ranks = case.mix, case.graph.ranks
    if ranks == 1:
        with blamed_on(case.file):
            executor: RunExecutor = measuring_executor(model, plans, mix, page_size, row_buckets=[rows], marks=marks)
        try:
            yield executor
        finally:
            executor.close()
        return
    capacity = max(plan.capacity for plan in plans)
    slots = mix.decode + len(mix.prompts)
    engine = EngineSection(device=str(model.device), max_batch_tokens=capacity, max_running=slots)
    check_ranks(engine, ranks)
    section = ModelSection(path=case.model_path, weights="random")
    with TensorGroup(section, engine, ranks, layers=case.graph.layers) as group:
        pages = mix_pages(mix, page_size)
        group.load(Load("random", pages, longest_request(mix), case.graph.sharding))
        weights = load_weights(model.graph, model.checkpoint, model.dtype, model.device, "random")
        group.least(pages)
        with blamed_on(case.file):
            executor = group.executor(
                tuple(plan.dumps() for plan in plans),
                lambda communicator: measuring_executor(
                    model,
                    plans,
                    mix,
                    page_size,
                    row_buckets=[rows],
                    marks=marks,
                    weights=weights,
                    communicator=communicator,
                ),
                row_buckets=(rows,),
                measuring=True,
            )
        try:
            yield executor
        finally:
            executor.close()


def mix_kv(model: Model, mix: Mix, page_size: int) -> KVLayout:
    """The KV cache that `mix` takes."""
    return KVLayout(mix_pages(mix, page_size), page_size, -(-model.max_model_len // page_size))


def random_caches(model: Model, mix: Mix, page_size: int) -> list[torch.Tensor]:
    """The KV cache that `mix` takes, for each layer, of random values; torch.OutOfMemoryError if it does not fit."""
    caches = make_caches(model.graph, mix_kv(model, mix, page_size), model.dtype, model.device)
    return [cache.normal_() for cache in caches]


def _lengths(mix: Mix) -> NDArray[np.int32]:
    """Tokens of each request at the end of the iteration: those that decode, then the prompts."""
    spread = np.linspace(mix.context * 2 / 3, mix.context * 4 / 3, mix.decode).round().astype(np.int32)
    decode = np.random.default_rng(2).permutation(np.maximum(spread, 1))
    return np.concatenate([decode, np.array(mix.prompts, np.int32) + np.array(mix.starts, np.int32)])


def _greedy(rows: NDArray[np.int32], slots: NDArray[np.int32]) -> SamplingBatch:
    count = len(rows)
    off, nothing = np.zeros(count, np.float32), np.zeros(0, np.int32)
    return SamplingBatch(
        rows=rows, slots=slots, positions=np.zeros(count, np.int32), seeds=np.zeros(count, np.uint64),
        temperature=off, top_k=np.zeros(count, np.int32), top_p=off + 1, min_p=off, repetition_penalty=off + 1,
        presence_penalty=off, frequency_penalty=off, logprobs=np.full(count, -1, np.int32), bias_entries=nothing,
        bias_tokens=nothing, bias_values=np.zeros(0, np.float32),
    )  # fmt: skip
