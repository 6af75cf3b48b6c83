"""Tiny models for tests of tensor parallelism, with more heads than the other tests have: eight ranks get some."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanoflow.models.config import ModelConfig
from nanoflow.models.registry import build_graph
from nanoflow.ops.graph import Graph
from nanoflow.ops.operation import Weight
from tests.gpu.checkpoints import save_model

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "vocab_size": 151,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 1,
}


def graph_of(fused: bool = True, **changes: Any) -> Graph:
    """The whole model's graph; `changes` are keys of config.json."""
    return build_graph(ModelConfig.from_dict({**CONFIG, **changes}), fused=fused)


def weights_of(graph: Graph) -> Iterator[tuple[int | None, str, Weight]]:
    """Layer (None outside of them), operation and weight of all that a graph has."""
    for layer, ops in [(None, graph.prologue + graph.epilogue), *((n, graph.layer) for n in range(graph.layers))]:
        for op in ops:
            for weight in op.weights:
                yield layer, op.name, weight


def save(folder: Path, **changes: Any) -> Path:
    """Save the model into `folder`, with a tokenizer and logits that lie far apart."""
    return save_model(folder, **{**CONFIG, **changes})


def write_job_of_ranks(model: Path, folder: Path) -> Path:
    """The YAML of a job that two ranks share on a CPU, to be measured."""
    path = folder / "job.yaml"
    path.write_text(
        f"model: {{path: {model}, weights: random}}\n"
        "workload: {synthetic: {input_len: 24, output_len: 12, requests: 60, seed: 0}}\n"
        "engine: {device: cpu, max_batch_tokens: 160, max_running: 64}\n"
        "parallel: {tensor: 2}\n"
        "output: {path: out.jsonl}\n"
    )
    return path
