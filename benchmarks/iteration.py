"""One iteration of the sequential plan in steady state: the whole, each operation of it, and its timeline.

    python -m benchmarks.iteration                     # on a GPU; benchmarks/results/iteration.json
    python -m benchmarks.iteration --profile           # with every kernel's start and end in three iterations

The batch is that of docs/performance.md: 1,280 rows of Llama-3-8B's shape in bfloat16, 600 of them requests that decode
at 768 tokens of context on average (from 512 to 1,024), the rest two prompts of 340 tokens. Weights and the
whole KV cache are random. The same batch is launched again and again, one ahead of the one that is collected, as the
engine does it.

Operations are timed apart, each in a graph of all its layers one after the other: what the whole iteration takes beyond
their sum is launches, dependencies and a lower clock, what it takes less is overlap of a kernel's start with the end
of the one before.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.kernels.__main__ import machine
from benchmarks.kernels.common import device_ceilings, floor_ms, time_graph
from nanoflow.config_schema import EngineSection, ModelSection
from nanoflow.loading import Model, open_model
from nanoflow.ops.batch import DenseBatch, NanoBatchRows, SamplingBatch
from nanoflow.ops.device_arrays import DeviceArrays
from nanoflow.ops.device_batch import DeviceBatch
from nanoflow.ops.operation import Work
from nanoflow.pipeline.cuda_executor import CudaExecutor
from nanoflow.pipeline.executor import KVLayout
from nanoflow.pipeline.plan import Plan
from nanoflow.pipeline.program import compile_program
from nanoflow.power import EnergyMeter
from nanoflow.search.cost_model import work_of
from nanoflow.weights import load_weights

RESULTS = Path(__file__).parent / "results" / "iteration.json"
MODEL = Path(__file__).parents[1] / "configs" / "models" / "llama-3-8b"


def make_batch(decode: int, context: int, prompts: list[int], page_size: int) -> tuple[DenseBatch, int]:
    """A batch of `decode` requests around `context` tokens of KV each, then whole prompts; the pages that it takes."""
    # Whole pages: the KV cache of 600 such requests then just fits beside the weights.
    wanted = np.linspace(context * 2 / 3, context * 4 / 3, decode) / page_size
    contexts = (np.maximum(np.round(wanted), 1) * page_size).astype(np.int32)
    lengths = np.concatenate([contexts, np.array(prompts, np.int32)])
    counts = -(-lengths // page_size)
    columns = int(counts.max())
    ends = 1 + np.cumsum(counts)
    order = np.random.default_rng(0).permutation(np.arange(1, ends[-1]))  # pages of a request lie anywhere
    table = np.zeros((len(lengths), columns), np.int32)
    for request, (end, count) in enumerate(zip(ends.tolist(), counts.tolist(), strict=True)):
        table[request, :count] = order[end - count - 1 : end - 1]
    starts = np.concatenate([contexts - 1, np.zeros(len(prompts), np.int32)])
    rows = [1] * decode + prompts
    positions = np.concatenate([start + np.arange(n) for start, n in zip(starts, rows, strict=True)]).astype(np.int32)
    slots = np.repeat(np.arange(len(rows)), rows).astype(np.int32)
    pages = table[slots, positions // page_size].astype(np.int64)
    firsts = np.cumsum([0, *rows])[:-1].astype(np.int32)
    sampled = np.concatenate([np.arange(decode), np.cumsum(rows)[decode:] - 1]).astype(np.int32)
    greedy, off = np.zeros(len(rows), np.float32), np.ones(len(rows), np.float32)
    nothing = np.zeros(0, np.int32)
    sampling = SamplingBatch(
        rows=sampled, slots=np.arange(len(rows), dtype=np.int32), positions=np.zeros(len(rows), np.int32),
        seeds=np.zeros(len(rows), np.uint64), temperature=greedy, top_k=np.zeros(len(rows), np.int32), top_p=off,
        min_p=greedy, repetition_penalty=off, presence_penalty=greedy, frequency_penalty=greedy,
        logprobs=np.full(len(rows), -1, np.int32), bias_entries=nothing, bias_tokens=nothing,
        bias_values=np.zeros(0, np.float32),
    )  # fmt: skip
    total = len(positions)
    batch = DenseBatch(
        nano_batches=(NanoBatchRows(0, decode, total - decode),),
        token_ids=np.random.default_rng(1).integers(0, 1000, total).astype(np.int32),
        positions=positions, slots=slots, kv_index=pages * page_size + positions % page_size,
        decode_rows=np.arange(decode, dtype=np.int32), decode_context=contexts, decode_pages=table[:decode],
        decode_splits=np.array([0, decode], np.int32), prefill_rows=firsts[decode:],
        prefill_lengths=np.array(prompts, np.int32), prefill_context=np.array(prompts, np.int32),
        prefill_pages=table[decode:], prefill_splits=np.array([0, len(prompts)], np.int32), sampling=sampling,
    )  # fmt: skip
    return batch, int(ends[-1])


def make_executor(model: Model, batch: DenseBatch, pages: int, page_size: int, largest: int) -> CudaExecutor:
    """An executor whose KV cache and weights are random."""
    layout = KVLayout(pages, page_size, -(-model.max_model_len // page_size))
    plan = Plan.sequential(model.graph, max(largest, batch.rows))
    weights = load_weights(model.graph, model.checkpoint, model.dtype, model.device, "random")
    slots = len(batch.sampling) if batch.sampling is not None else 1
    executor = CudaExecutor(
        [compile_program(plan, model.graph)], weights, layout, slots=slots, dtype=model.dtype, device=model.device
    )
    for kv in executor.bound.kv:
        kv.normal_()
    return executor


def whole(executor: CudaExecutor, batch: DenseBatch, seconds: float) -> dict[str, Any]:
    """Steady state of the whole iteration: launched one ahead."""
    device = executor.bound.device
    times: list[float] = []
    idle: list[float] = []
    launch: list[float] = []
    executor.launch(batch)
    warm, ends = time.perf_counter() + seconds / 3, time.perf_counter() + seconds * 4 / 3
    meter: EnergyMeter | None = None
    while (now := time.perf_counter()) < ends or len(times) < 3:
        if meter is None and now >= warm:
            meter = EnergyMeter(device)
            began = now
        begun = time.perf_counter()
        executor.launch(batch)
        launched = time.perf_counter() - begun
        output = executor.collect()
        if meter is not None:
            launch.append(launched)
            times.append(output.seconds)
            idle.append(output.idle_seconds)
    wall = time.perf_counter() - began
    energy = meter.since_start() if meter is not None else None
    executor.collect()
    return {
        "iterations": len(times),
        "milliseconds": statistics.median(times) * 1e3,
        "p10": float(np.percentile(times, 10)) * 1e3,
        "p90": float(np.percentile(times, 90)) * 1e3,
        "idle_share": sum(idle) / wall,
        "launch_milliseconds": statistics.median(launch) * 1e3,
        "rows_per_second": batch.tokens * len(times) / wall,
        "watts": energy.mean_watts if energy is not None else None,
        "joules": energy.joules / len(times) if energy is not None else None,
    }


def operations(executor: CudaExecutor, host: DenseBatch, seconds: float) -> list[dict[str, Any]]:
    """Every operation by itself, all layers in turn, and what it has to do."""
    bound = executor.bound
    program, device = bound.programs[0], bound.device
    batch = DeviceBatch(host, device, bound.kv_layout.page_size, DeviceArrays(device))
    work = work_of(host)
    itemsize = bound.buffers["x"].element_size()
    rows: list[dict[str, Any]] = []

    def add(name: str, calls: int, run: Any, cost: Any) -> None:
        timing = time_graph(run, seconds, device=device)
        each = timing.median_ms / calls
        rows.append(
            {
                "name": name, "calls": calls, "flops": cost.flops, "bytes": cost.bytes, "milliseconds": each,
                "all_milliseconds": timing.median_ms, "watts": timing.watts,
                "floor_ms": floor_ms(str(device), flops=cost.flops, bytes=cost.bytes),
            }
        )  # fmt: skip

    last_tokens = executor.sampler.last_tokens
    tokens = batch.token_ids_T

    def begin() -> None:
        batch.token_ids_T = tokens
        bound.begin(batch, last_tokens)

    add("embed", 1, begin, sum_cost(program.graph.prologue, work, itemsize))
    for op in program.graph.layer:
        steps = [index for index, step in enumerate(program.steps) if step.nano_op.op == op.name]

        def run(steps: list[int] = steps) -> None:
            for index in steps:
                bound.step(batch, index)

        add(op.name, len(steps), run, op.cost(work, itemsize))
    sampled = batch.sampled_rows_S
    add(
        "final_norm, lm_head",
        1,
        lambda: bound.head(batch, sampled),
        sum_cost(program.graph.epilogue, Work(prefill_rows=len(sampled)), itemsize),
    )
    return rows


def sum_cost(ops: Any, work: Work, itemsize: int) -> Any:
    first, *rest = (op.cost(work, itemsize) for op in ops)
    return sum(rest, first)


def profile(executor: CudaExecutor, batch: DenseBatch, iterations: int = 3) -> dict[str, Any]:
    """Every kernel and copy of some iterations: name, start and length in microseconds; and the gaps between them."""
    from torch.profiler import ProfilerActivity, profile as profiler

    executor.launch(batch)
    with profiler(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        for _ in range(iterations + 2):
            executor.launch(batch)
            executor.collect()
        executor.collect()
        if executor.bound.device.type == "cuda":
            torch.cuda.synchronize()
    events = [e for e in recorded.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((e.time_range.start, e.time_range.end, e.name) for e in events)
    names = sorted({name for _, _, name in spans})
    number = {name: n for n, name in enumerate(names)}
    start, busy_until, idle, longest = spans[0][0], spans[0][0], 0.0, 0.0
    for begun, ended, _ in spans:
        idle += max(0.0, begun - busy_until)
        longest = max(longest, begun - busy_until)
        busy_until = max(busy_until, ended)
    return {
        "names": names,
        "spans": [[number[name], round(a - start, 2), round(b - a, 2)] for a, b, name in spans],
        "idle_share": idle / (busy_until - start),
        "longest_gap_us": longest,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--decode", type=int, default=600)
    parser.add_argument("--context", type=int, default=768)
    parser.add_argument("--prompts", type=int, nargs="*", default=[340, 340])
    parser.add_argument("--page-size", type=int, default=128)
    parser.add_argument("--largest", type=int, default=2048, help="rows of the largest bucket")
    parser.add_argument("--seconds", type=float, default=5.0, help="of the whole iteration")
    parser.add_argument("--op-seconds", type=float, default=0.5, help="of each operation")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()

    section = ModelSection(path=str(args.model), weights="random", dtype=args.dtype)
    model = open_model(section, EngineSection(device=args.device))
    batch, pages = make_batch(args.decode, args.context, args.prompts, args.page_size)
    ceilings = vars(device_ceilings(str(model.device)))  # before the KV cache takes all memory
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    begun = time.perf_counter()
    with torch.inference_mode():
        executor = make_executor(model, batch, pages, args.page_size, args.largest)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        made = time.perf_counter() - begun
        result: dict[str, Any] = {
            **machine(str(model.device)),
            "model": model.checkpoint.name,
            "batch": {key: getattr(args, key) for key in ("decode", "context", "prompts", "page_size")},
            "rows": batch.rows,
            "ceilings": ceilings,
            "make_seconds": round(made, 2),
            "capture_seconds": round(executor.capture_seconds, 2),
            "whole": whole(executor, batch, args.seconds),
        }
        if args.profile:
            result["timeline"] = profile(executor, batch)
        if args.op_seconds:
            result["operations"] = operations(executor, batch, args.op_seconds)
            result["whole_again"] = whole(executor, batch, args.seconds)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result) + "\n")
    for key in ("make_seconds", "capture_seconds", "whole", "whole_again"):
        print(key, json.dumps(result.get(key)))
    if args.profile:
        timeline = result["timeline"]
        print(f"timeline: {len(timeline['spans'])} kernels, idle {timeline['idle_share']:.2%}, "
              f"longest gap {timeline['longest_gap_us']:.1f} us")  # fmt: skip
    for row in result.get("operations", ()):
        print(
            f"{row['name']:<22} x{row['calls']:<3} {row['milliseconds'] * 1e3:9.1f} us, "
            f"floor {row['floor_ms'] * 1e3:9.1f}, all {row['all_milliseconds']:7.2f} ms, {row['watts'] or 0:4.0f} W"
        )
    total = sum(row["all_milliseconds"] for row in result.get("operations", ()))
    print(f"sum of operations {total:.2f} ms")


if __name__ == "__main__":
    main()
