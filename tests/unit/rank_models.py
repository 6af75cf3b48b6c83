"""Tiny checkpoints for tests of tensor parallelism, without transformers: random weights, and logits far apart."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nanoflow.models.config import ModelConfig
from nanoflow.models.registry import build_graph
from nanoflow.ops.graph import Graph
from nanoflow.ops.linear import Linear
from nanoflow.ops.operation import Weight

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


def tensors(seed: int = 0, **changes: Any) -> dict[str, torch.Tensor]:
    """What a checkpoint of the model holds."""
    graph = graph_of(fused=False, **changes)
    generator = torch.Generator().manual_seed(seed)
    outer = {op.name: op for op in graph.prologue + graph.epilogue}
    made: dict[str, torch.Tensor] = {}
    for layer, name, weight in weights_of(graph):
        op = outer[name] if layer is None else graph.operation(name)
        rows = op.outputs if isinstance(op, Linear) else weight.shape[:1]
        for part, count in zip(weight.parts, rows, strict=True):
            shape = (count, *weight.shape[1:])
            mean = 1.0 if part.endswith("norm.weight") else 0.0
            prefix = "" if layer is None else f"model.layers.{layer}."
            made.setdefault(prefix + part, torch.randn(shape, generator=generator) * 0.3 + mean)
    return made


def save(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    save_file(tensors(**changes), folder / "model.safetensors")
    return folder
