"""Jobs that tests run on ranks in threads, the models of them, and what such tests look at.

The fixtures `rank_model` and `of_one_rank` have the models' folders and what one rank generates.
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from nanoflow import LLM, RequestOutput, SamplingParams
from nanoflow.checkpoints import open_checkpoint
from nanoflow.ops.batch import DenseBatch
from nanoflow.ops.device_batch import DeviceBatch
from nanoflow.ops.graph import Graph
from nanoflow.ops.sharding import shard_graph
from nanoflow.pipeline.executor import Weights
from nanoflow.pipeline.plan import Plan
from nanoflow.structured_outputs import StructuredOutputs
from nanoflow.weights import load_weights
from tests.unit.rank_threads import CPU, on_all
from tests.unit.test_engine import REQUESTS

BASE: dict[str, Any] = {"vocab_size": 301, "max_position_embeddings": 160}  # that 301 columns divide by nothing
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "shared-heads": {"num_key_value_heads": 2},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True},
}
FORMED = [
    ([5, 6], SamplingParams(max_tokens=12, seed=3, structured_outputs=StructuredOutputs(regex="[a-d]{4}-[0-9]{2,6}"))),
    ([9], SamplingParams(max_tokens=6, structured_outputs=StructuredOutputs(choice=("yes", "no", "perhaps")))),
]
SHORT = [(prompt, p.replace(max_tokens=min(16, p.max_tokens))) for prompt, p in REQUESTS if p.max_tokens <= 30][:14]
MIX = FORMED + SHORT
FEW = [pair for pair in REQUESTS if pair[1].max_tokens <= 8 and pair[1].n == 1][:5]

Requests = list[tuple[list[int], SamplingParams]]


def generate(folder: Path, requests: Requests) -> list[RequestOutput]:
    with LLM(model=folder, dtype="float32", device="cpu", kv_memory="1MiB", page_size=8, max_batch_tokens=48) as llm:
        params = [one if one.seed is not None else one.replace(seed=5) for _, one in requests]
        return llm.generate([prompt for prompt, _ in requests], params)


def shares(folder: Path, whole: Graph, size: int) -> tuple[list[Graph], list[Weights]]:
    graphs = [shard_graph(whole, rank, size) for rank in range(size)]
    source = open_checkpoint(str(folder))
    return graphs, [load_weights(graph, source, torch.float32, "cpu") for graph in graphs]


def rows_of(plan: Plan, rows: int) -> Plan:
    """`plan` with nano-batches of `rows` rows: its own may be so small that a prompt takes for ever."""
    nano_batches = tuple(replace(nano_batch, rows=rows) for nano_batch in plan.nano_batches)
    return replace(plan, nano_batches=nano_batches, capacity=rows * len(nano_batches))


def step_logits(ranks: list[Any], batch: DenseBatch) -> list[torch.Tensor]:
    """The logits of all rows, on each rank, of a batch that samples nothing."""
    for executor in ranks:
        executor.launch(batch)
    for executor in ranks:
        executor.collect()

    all_rows: Any = SimpleNamespace(rows=np.arange(batch.rows))

    def head(rank: int) -> torch.Tensor:
        bound = ranks[rank].bound
        with torch.inference_mode():
            device_batch = DeviceBatch(replace(batch, sampling=all_rows), CPU, bound.kv_layout.page_size)
            logits: torch.Tensor = bound.head(device_batch, bound.sampled(device_batch))
            return logits.clone()

    return on_all(head, len(ranks))
