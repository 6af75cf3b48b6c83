"""From a configuration to an engine that is ready to run: checkpoint, graph, plan, weights, KV cache, executor."""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch

from nanoflow.checkpoints import Checkpoint, open_checkpoint
from nanoflow.config_schema import EngineSection, ModelSection, PipelineSection
from nanoflow.devices import check_head_size, choose_device, device_sms, driver_version, ranks_reach
from nanoflow.engine import Engine
from nanoflow.errors import ConfigError, OutOfMemoryError
from nanoflow.kv_cache import KVCache
from nanoflow.memory import format_bytes, free_bytes, kv_bytes, release
from nanoflow.models.config import ModelConfig
from nanoflow.models.registry import build_graph
from nanoflow.ops.communicator import Communicator
from nanoflow.ops.graph import Graph
from nanoflow.ops.row_sharding import ALL_REDUCE
from nanoflow.ops.sharding import ShardError, shard_graph
from nanoflow.parallel.executor import RunExecutor, TensorParallelExecutor
from nanoflow.parallel.messages import KVNeeds, Load
from nanoflow.pipeline.cuda_executor import CudaExecutor
from nanoflow.pipeline.executor import CaptureError, KVLayout, Weights
from nanoflow.pipeline.partitions import PartitionError
from nanoflow.pipeline.plan import Plan, PlanError, blamed_on
from nanoflow.pipeline.program import Program, compile_program
from nanoflow.pipeline.reference_executor import ReferenceExecutor
from nanoflow.plan_choice import asked_layout, choose_plans
from nanoflow.scheduler import Scheduler
from nanoflow.search.fingerprint import Fingerprint, graph_shape
from nanoflow.tokenizer import Tokenizer
from nanoflow.weights import load_weights, required_bytes

if TYPE_CHECKING:
    from nanoflow.parallel.group import TensorGroup

__all__ = [
    "Model",
    "build_engine",
    "gpu_kv_tokens",
    "here_kv_tokens",
    "kv_layout",
    "kv_pages",
    "make_executor",
    "open_model",
    "shard_model",
]

PAGE_SIZES = {"cpu": 64, "cuda": 128}
"""Tokens of a KV page. On a CPU attention works page by page, and shorter pages cost more than they save; on an H100
decode attention reads pages of 128 tokens 3% faster than pages of 64."""

CONTEXT_BYTES = 600_000_000
"""Of a GPU's memory, what CUDA and PyTorch take before the KV cache is made. With it, `gpu_kv_tokens` comes within 0.2%
of the tokens that runs of Llama-3-8B had on an H100 (79.1 GiB; benchmarks/results/offline_throughput.json)."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Model:
    """An opened checkpoint: everything about a model but its weights."""

    checkpoint: Checkpoint
    config: ModelConfig
    graph: Graph
    tokenizer: Tokenizer | None
    dtype: torch.dtype
    device: torch.device
    max_model_len: int
    """Tokens of a prompt with its output."""


def open_model(model: ModelSection, engine: EngineSection, *, use: bool = True) -> Model:
    """Open the checkpoint and trace the graph; no weights are read yet. Raises UserError or UnsupportedModel.

    `use`: whether this process will compute on the device (see `choose_device`).
    """
    device = choose_device(engine.device, use=use)
    dtype = _dtype(model.dtype, device)
    checkpoint = open_checkpoint(model.path, need_weights=model.weights == "load")
    config = ModelConfig.from_dict(checkpoint.config)
    check_head_size(config.head_dim, device)
    limit = config.max_position_embeddings
    if engine.max_model_len != "auto" and engine.max_model_len > limit:
        raise ConfigError(
            f"engine.max_model_len: {engine.max_model_len} is more than the {limit} tokens of {checkpoint.name}; "
            f"use {limit} or less, or auto"
        )
    max_model_len = limit if engine.max_model_len == "auto" else int(engine.max_model_len)
    return Model(checkpoint, config, build_graph(config), checkpoint.tokenizer(), dtype, device, max_model_len)


def shard_model(model: Model, rank: int, size: int, layout: str = ALL_REDUCE) -> Model:
    """`model` as rank `rank` of `size` has it: its share of the graph, and so of weights and KV cache.

    `layout` is that of the weights: see `shard_graph`. Raises ConfigError if the model cannot be split over so many
    ranks.
    """
    try:
        graph = shard_graph(model.graph, rank, size, layout)
    except ShardError as error:
        raise ConfigError(str(error)) from None
    return replace(model, graph=replace(graph, peers=ranks_reach(model.device, size)) if size > 1 else graph)


def build_engine(
    model: Model,
    engine: EngineSection,
    pipeline: PipelineSection | None = None,
    *,
    weights: Literal["load", "random"] = "load",
    job: Sequence[int] | None = None,
    more: bool = False,
    quiet: bool = False,
    ranks: "TensorGroup | None" = None,
) -> Engine:
    """Load the weights and make the engine.

    Args:
        model: the whole one, also where ranks share it.
        job: for each completion of the job, the tokens of its prompt with its longest output. It bounds the KV cache of
            `kv_memory: auto` on a CPU; None if the job is not known.
        more: `job` is only the beginning of the job, and one longer request may follow.
        quiet: do not say on standard error which plans `pipeline.plan: auto` found.
        ranks: those that share the model with this process, which is rank 0; they do all of this too. None: it has the
            model for itself.

    Raises:
        OutOfMemoryError: the weights, or one request's pages, do not fit.
        PlanError: the plan file cannot be used.
        ShardError: the model cannot be split over so many ranks.
        ParallelError: a rank was lost.
    """
    asked = pipeline or PipelineSection()
    split = asked_layout(asked.plan)
    share = model if ranks is None else shard_model(model, 0, ranks.size, split)
    here = run_fingerprint(share, engine)
    chosen = choose_plans(asked.plan, share.graph, here, engine.max_batch_tokens)
    if not quiet and not (chosen.nothing_stored and "plan" not in asked.model_fields_set):
        for note in chosen.notes:
            print(note, file=sys.stderr, flush=True)
    needs = _kv_needs(share, engine, job, more)
    if share.device.type == "cuda":
        # Before minutes of loading: whether what the weights will leave holds the job's longest request.
        left = free_bytes(share.device) - required_bytes(share.graph, share.dtype)
        if left >= 0:  # loading refuses the rest, with a better message
            kv_pages(share, engine, needs, free=left)
    if ranks is not None:
        ranks.load(Load(weights, needs, layout=split))
        if share.graph.peers and not ranks.peers:  # the devices would, and the system does not let them
            share = replace(share, graph=replace(share.graph, peers=False))
            chosen = choose_plans(asked.plan, share.graph, here, engine.max_batch_tokens)
    loaded = load_weights(share.graph, share.checkpoint, share.dtype, share.device, weights)
    pages = kv_pages(share, engine, needs)
    layout = kv_layout(share, engine, pages if ranks is None else ranks.least(pages))

    def build(plans: Sequence[Plan]) -> RunExecutor:
        programs = [compile_program(plan, share.graph) for plan in plans]
        if ranks is None:
            return make_executor(share, engine, programs, loaded, layout)
        return ranks.executor(
            tuple(plan.dumps() for plan in plans),
            lambda communicator: make_executor(share, engine, programs, loaded, layout, communicator),
        )

    with nullcontext() if asked.plan in ("sequential", "auto") else blamed_on(asked.plan):
        executor = build(chosen.plans)
    if chosen.doubtful:
        from nanoflow.plan_recheck import recheck, without  # which needs this module

        found = recheck(executor, chosen, here, share, engine.max_running)
        if not quiet:
            print(*found.notes, sep="\n", file=sys.stderr, flush=True)
        if found.lost:
            executor.release() if isinstance(executor, TensorParallelExecutor) else executor.close()
            del executor
            release(share.device)  # two KV caches would not fit
            executor = build(without(chosen.plans, found.lost))
    pages_per_sequence = -(-model.max_model_len // layout.page_size)
    scheduler = Scheduler(
        kv=KVCache(layout.pages, layout.page_size, engine.max_running, pages_per_sequence),
        cut=executor.cut,
        max_batch_tokens=executor.cut.capacity,
        max_running=engine.max_running,
        max_model_len=model.max_model_len,
        row_buckets=executor.cut.row_buckets,
        eos_token_ids=model.checkpoint.eos_token_ids,
    )
    scheduler.longest_first = engine.order == "longest-first"
    return Engine(
        executor=executor,
        scheduler=scheduler,
        graph=share.graph,
        itemsize=model.dtype.itemsize,
        tokenizer=model.tokenizer,
    )


def machine_fingerprint(device: torch.device) -> Fingerprint:
    """What plans that are measured on `device` depend on, as far as it is the machine's."""
    here = Fingerprint(gpu=device_name(device), torch=torch.__version__.split("+")[0])
    if device.type != "cuda":
        return here
    triton = version("triton") if find_spec("triton") else None
    return replace(here, sms=device_sms(device), triton=triton, cuda=torch.version.cuda, driver=driver_version())


def run_fingerprint(model: Model, engine: EngineSection) -> Fingerprint:
    """What plans that are measured with this model and engine on this machine depend on."""
    return replace(
        machine_fingerprint(model.device),
        model=model.checkpoint.name,
        shape=graph_shape(model.graph),
        dtype=str(model.dtype).removeprefix("torch."),
        page_size=_page_size(model, engine),
    )


def make_executor(
    model: Model,
    engine: EngineSection,
    programs: Sequence[Program],
    weights: Weights,
    kv: KVLayout,
    communicator: Communicator | None = None,
    *,
    row_buckets: Sequence[int] | None = None,
) -> CudaExecutor | ReferenceExecutor:
    """What runs the programs on the model's device; `communicator` joins the ranks that share the model. On a GPU there
    are graphs of `row_buckets` rows, by default of the usual ones.

    Raises:
        OutOfMemoryError: there is too little left for the buffers or the CUDA graphs.
        PlanError: the device cannot be split as a plan says.
    """
    sizes: dict[str, Any] = {"slots": engine.max_running, "dtype": model.dtype, "device": model.device}
    sizes["communicator"] = communicator
    if model.device.type != "cuda":
        return ReferenceExecutor(programs, weights, kv, **sizes)
    try:
        return CudaExecutor(programs, weights, kv, graphs=engine.cuda_graphs, row_buckets=row_buckets, **sizes)
    except PartitionError as error:
        raise PlanError(f"partitions: {error}; change the plan's sizes, or use `plan: sequential`") from None
    except (CaptureError, torch.OutOfMemoryError) as error:
        what = str(error) if isinstance(error, CaptureError) else "memory ran out for the buffers of an iteration"
        cache = format_bytes(kv.pages * _page_bytes(model.graph, model.dtype, kv.page_size))
        raise OutOfMemoryError(
            f"engine.kv_memory: {what}: with the weights, {cache} "
            f"of KV cache and buffers for {max(p.plan.capacity for p in programs)} rows, "
            f"{format_bytes(free_bytes(model.device))} are left. Lower kv_memory (a fraction such as 0.85), "
            "engine.max_batch_tokens or engine.max_running"
            + ("; cuda_graphs: false runs without graphs" if isinstance(error, CaptureError) else "")
        ) from None


def gpu_kv_tokens(graph: Graph, engine: EngineSection, total: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """KV tokens that an engine would have on a GPU with `total` bytes of memory that nothing else uses; needs no GPU.

    `total` is what the driver tells: 84.9e9 of an H100 with 80 GB. A job that can use less gets less. Raises
    OutOfMemoryError if the model and two pages do not fit.
    """
    page_size = PAGE_SIZES["cuda"] if engine.page_size == "auto" else int(engine.page_size)
    page_bytes = _page_bytes(graph, dtype, page_size)
    free = total - CONTEXT_BYTES - required_bytes(graph, dtype)
    size = kv_bytes(engine.kv_memory, device="cuda", job_bytes=0, free=free, total=total)
    if size < 2 * page_bytes:
        raise OutOfMemoryError(
            f"engine.kv_memory: {engine.kv_memory} is {format_bytes(size)} on a GPU of {format_bytes(total)}, less "
            f"than the {format_bytes(2 * page_bytes)} of two pages; raise kv_memory, or take a GPU with more memory"
        )
    return (size // page_bytes - 1) * page_size


def here_kv_tokens(model: Model, engine: EngineSection) -> int:
    """KV tokens that an engine would have on the model's device, with a job that uses all of them; nothing is loaded.

    Raises OutOfMemoryError.
    """
    if model.device.type == "cuda":
        return gpu_kv_tokens(model.graph, engine, int(torch.cuda.mem_get_info(model.device)[1]), model.dtype)
    return (kv_pages(model, engine, _kv_needs(model, engine, None)) - 1) * _page_size(model, engine)


def _page_size(model: Model, engine: EngineSection) -> int:
    """Tokens of a KV page."""
    return PAGE_SIZES[model.device.type] if engine.page_size == "auto" else int(engine.page_size)


def _page_bytes(graph: Graph, dtype: torch.dtype, page_size: int) -> int:
    return 2 * graph.layers * graph.kv_heads * graph.head_dim * page_size * dtype.itemsize


def kv_layout(model: Model, engine: EngineSection, pages: int) -> KVLayout:
    """A KV cache of so many pages, the reserved one included."""
    page_size = _page_size(model, engine)
    return KVLayout(pages, page_size, -(-model.max_model_len // page_size))


def _kv_needs(model: Model, engine: EngineSection, job: Sequence[int] | None, more: bool = False) -> KVNeeds:
    """What the job needs of the KV cache: `job` and `more` as `build_engine` has them."""
    page_size = _page_size(model, engine)
    longest = -(-model.max_model_len // page_size)
    if job is None:
        return KVNeeds(1, longest * (engine.max_running + more))
    each = sorted((-(-min(tokens, model.max_model_len) // page_size) for tokens in job), reverse=True)
    return KVNeeds(each[0] if each else 1, sum(each[: engine.max_running]) + longest * more)


def kv_pages(model: Model, engine: EngineSection, needs: KVNeeds, free: int | None = None) -> int:
    """Pages of the KV cache, the reserved one included, by `engine.kv_memory` (see `kv_bytes`).

    `free` memory of the device is measured unless given; on a CPU, ranks share it. Raises OutOfMemoryError if the
    longest request does not fit.
    """
    page_size = _page_size(model, engine)
    page_bytes = _page_bytes(model.graph, model.dtype, page_size)
    if free is None:
        free = free_bytes(model.device) // (model.graph.ranks if model.device.type == "cpu" else 1)
    size = kv_bytes(engine.kv_memory, device=model.device, job_bytes=(needs.useful + 1) * page_bytes, free=free)
    pages = min(size // page_bytes, needs.useful + 1)
    if pages < needs.least + 1:
        need, room = (needs.least + 1) * page_bytes, (pages - 1) * page_size
        holds = f" What is there holds {room} tokens: lower max_tokens or engine.max_model_len to that;"
        half = " use model.dtype: bfloat16, which halves what is needed;" if model.dtype.itemsize > 2 else ""
        raise OutOfMemoryError(
            f"engine.kv_memory: {engine.kv_memory} is {format_bytes(size)} here, with {format_bytes(free)} free, and "
            f"the job's longest request alone needs {format_bytes(need)} of KV cache: {format_bytes(need - size)} are "
            f"missing.{holds if room > 0 else ''}{half} raise kv_memory, or use a machine with more memory"
        )
    return pages


def device_name(device: torch.device) -> str:
    """What plans and reports call the device: the GPU's name, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]
