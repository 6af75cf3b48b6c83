"""The executor of CUDA graphs on two ranks, on a CPU: what graphs would replay is launched again on the same arrays.

Collectives are among it, and the head's; see `test_cuda_executor`.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton.runtime.interpreter as interpreter

from nanoflow import LLM, RequestOutput, SamplingParams, loading
from nanoflow.checkpoints import open_checkpoint
from nanoflow.ops.attention import DecodeAttention, PrefillAttention
from nanoflow.ops.sharding import shard_graph
from nanoflow.pipeline.cuda_executor import CudaExecutor
from nanoflow.pipeline.plan import Plan
from nanoflow.pipeline.program import compile_program
from nanoflow.structured_outputs import StructuredOutputs
from nanoflow.weights import load_weights
from tests.unit.rank_models import save
from tests.unit.rank_threads import ThreadRanks
from tests.unit.test_engine import assert_same

NETWORK = """
capacity: 32
least_rows: 4
nano_batches: {a: {decode: 1/2, prefill: 1/2, rows: 16}, b: {decode: 1/2, prefill: 1/2, rows: 16}}
period:
- whole:
    compute: [qkv.a, decode_attention.a, prefill_attention.a, o.a, qkv.b, decode_attention.b, prefill_attention.b, o.b,
      add_norm.a, gate_up.a, down.a, add_norm.b, gate_up.b, down.b]
    network: [o_all_reduce.a, o_all_reduce.b, down_all_reduce.a, down_all_reduce.b]
"""
ROWS = """
sharding: reduce_scatter
capacity: 32
least_rows: 4
nano_batches: {a: {decode: 1/2, prefill: 1/2, rows: 16}, b: {decode: 1/2, prefill: 1/2, rows: 16}}
period:
- whole:
    compute: [qkv.a, decode_attention.a, prefill_attention.a, o.a, qkv.b, decode_attention.b, prefill_attention.b, o.b,
      gate_up.a, down.a, gate_up.b, down.b]
    network: [o_reduce_scatter.a, add_norm.a, add_norm_all_gather.a, o_reduce_scatter.b, add_norm.b,
      add_norm_all_gather.b, down_reduce_scatter.a, add.a, input_layernorm.a@1, input_layernorm_all_gather.a@1,
      down_reduce_scatter.b, add.b, input_layernorm.b@1, input_layernorm_all_gather.b@1]
"""
"""Beside a sequential plan with all-reduces: a head is captured for either."""
MIX = [
    ([5, 6], SamplingParams(max_tokens=6, seed=3, structured_outputs=StructuredOutputs(regex="[a-d]{4}-[0-9]{2,6}"))),
    *(([7 + n] * (3 * n + 1), SamplingParams(max_tokens=6, temperature=1.0, seed=n, logprobs=1)) for n in range(6)),
]


def generate(folder: Path) -> list[RequestOutput]:
    sizes: dict[str, Any] = {"kv_memory": "1MiB", "page_size": 16, "max_batch_tokens": 32, "max_running": 8}
    with LLM(model=folder, dtype="float32", device="cpu", **sizes) as llm:
        return llm.generate([prompt for prompt, _ in MIX], [params for _, params in MIX])


@pytest.mark.parametrize("text", [NETWORK, ROWS], ids=["all_reduce", "reduce_scatter"])
def test_two_ranks_of_graphs_give_the_tokens_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    folder = save(tmp_path, vocab_size=301, head_dim=16, num_attention_heads=4, num_key_value_heads=2)
    expected = generate(folder)
    made: list[ThreadRanks] = []
    replayed = [0, 0]

    def counted(rank: int, send: Callable[[], None]) -> Callable[[], None]:
        def count() -> None:
            replayed[rank] += 1
            send()

        return count

    def executor(model: Any, engine: Any, programs: Any, weights: Any, kv: Any, *_: Any) -> ThreadRanks:
        graphs = [shard_graph(model.graph, rank, 2) for rank in range(2)]
        source = open_checkpoint(str(folder))
        shares = [load_weights(graph, source, torch.float32, "cpu") for graph in graphs]
        plans = [[Plan.loads(text, graph), programs[0].plan] for graph in graphs]
        ranks = [[compile_program(plan, g) for plan in each] for each, g in zip(plans, graphs, strict=True)]
        sizes = {"slots": engine.max_running, "dtype": model.dtype, "device": model.device}
        made.append(ThreadRanks(CudaExecutor, ranks, shares, kv, **sizes))
        for number, rank in enumerate(made[0].ranks):
            assert {rows for program, rows in rank._layers if program == 0} == {(4, 4), (8, 8), (16, 16)}
            assert {program for program, _ in rank._heads} == ({0} if text == NETWORK else {0, 1})
            monkeypatch.setattr(rank._static, "send", counted(number, rank._static.send))
        return made[0]

    monkeypatch.setattr(loading, "make_executor", executor)
    for op in (DecodeAttention, PrefillAttention):  # as on a GPU; the kernels for a CPU look at the batch itself
        monkeypatch.setattr(op, "preferred_kernel", lambda *_: "triton")
    # The interpreter changes triton's own module while a kernel runs, and parses it before, which Python 3.11 can do in
    # one thread at a time alone. No collective is in a kernel.
    lock = threading.RLock()

    def alone(call: Callable[..., Any]) -> Callable[..., Any]:
        def locked(*arguments: Any, **options: Any) -> Any:
            with lock:
                return call(*arguments, **options)

        return locked

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", alone(interpreter.GridExecutor.__call__))
    monkeypatch.setattr(interpreter.InterpretedFunction, "rewrite", alone(interpreter.InterpretedFunction.rewrite))
    assert_same(generate(folder), expected)
    assert replayed[0] == replayed[1] >= 5
