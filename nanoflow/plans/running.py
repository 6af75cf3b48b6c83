"""Plans on this machine: an executor with random weights, and one mix of requests laid out for each of its programs."""

from collections.abc import Sequence

import numpy as np

from nanoflow.dense_batch import form_dense_batch, lay_out
from nanoflow.kv_cache import KVCache
from nanoflow.loading import Model
from nanoflow.ops.batch import DenseBatch, SamplingBatch
from nanoflow.pipeline.cuda_executor import CudaExecutor
from nanoflow.pipeline.executor import KVLayout
from nanoflow.pipeline.plan import Plan
from nanoflow.pipeline.program import compile_program
from nanoflow.pipeline.reference_executor import ReferenceExecutor
from nanoflow.pipeline.split import BatchCutter, Cut
from nanoflow.plans.case import Mix
from nanoflow.weights import load_weights

__all__ = ["make_executor", "mix_batch", "mix_pages"]


def mix_pages(mix: Mix, page_size: int) -> int:
    """Pages of KV cache that `mix` takes, the reserved one included."""
    return 1 + int((-(-_lengths(mix) // page_size)).sum())


def mix_batch(mix: Mix, cut: BatchCutter, page_size: int, program: int = 0) -> DenseBatch:
    """`mix` as a dense batch for plan `program` of `cut`, padded as that pads it.

    Contexts are spread evenly from two thirds to four thirds of the mix's, in random order; prompts are whole. Every
    request is sampled greedily. The KV cache's pages are dealt out at random. All of it is the same at every call.
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
    layout = lay_out(_only(cut, program), *rows)
    sampled = np.concatenate([layout.decode_rows, layout.prefill_rows[np.cumsum(prompts) - 1]]).astype(np.int32)
    slots = np.arange(count, dtype=np.int32)
    return form_dense_batch(
        layout,
        kv,
        slots[: mix.decode],
        lengths[: mix.decode] - 1,
        slots[mix.decode :],
        np.zeros(len(prompts), np.int32),
        prompts,
        np.random.default_rng(1).integers(0, 1000, rows[1]).astype(np.int32),
        _greedy(sampled, slots),
    )


def make_executor(
    model: Model, plans: Sequence[Plan], mix: Mix, page_size: int, *, marks: bool = False
) -> CudaExecutor | ReferenceExecutor:
    """An executor of `plans` on the model's device, with random weights and a random KV cache of what `mix` takes."""
    programs = [compile_program(plan, model.graph) for plan in plans]
    kv = KVLayout(mix_pages(mix, page_size), page_size, -(-model.max_model_len // page_size))
    weights = load_weights(model.graph, model.checkpoint, model.dtype, model.device, "random")
    kind = CudaExecutor if model.device.type == "cuda" else ReferenceExecutor
    count = mix.decode + len(mix.prompts)
    executor = kind(programs, weights, kv, slots=count, dtype=model.dtype, device=model.device, marks=marks)
    for cache in executor.bound.kv:
        cache.normal_()
    return executor


def _lengths(mix: Mix) -> np.ndarray:
    """Tokens of each request at the end of the iteration: those that decode, then the prompts."""
    spread = np.linspace(mix.context * 2 / 3, mix.context * 4 / 3, mix.decode).round().astype(np.int32)
    decode = np.random.default_rng(2).permutation(np.maximum(spread, 1))
    return np.concatenate([decode, np.array(mix.prompts, np.int32)])


def _only(cut: BatchCutter, program: int) -> BatchCutter:
    """`cut` that takes one of its plans, whatever the rows."""
    chosen = BatchCutter([cut.plans[program]], cut.row_buckets)

    def counted(decode: int, prefill: int) -> Cut:
        found = chosen(decode, prefill)
        return Cut(found.decode, found.prefill, found.rows, program)

    return counted  # type: ignore[return-value]


def _greedy(rows: np.ndarray, slots: np.ndarray) -> SamplingBatch:
    count = len(rows)
    off, nothing = np.zeros(count, np.float32), np.zeros(0, np.int32)
    return SamplingBatch(
        rows=rows, slots=slots, positions=np.zeros(count, np.int32), seeds=np.zeros(count, np.uint64),
        temperature=off, top_k=np.zeros(count, np.int32), top_p=off + 1, min_p=off, repetition_penalty=off + 1,
        presence_penalty=off, frequency_penalty=off, logprobs=np.full(count, -1, np.int32), bias_entries=nothing,
        bias_tokens=nothing, bias_values=np.zeros(0, np.float32),
    )  # fmt: skip
