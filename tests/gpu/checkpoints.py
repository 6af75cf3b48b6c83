"""Tiny random checkpoints of any shape, made without transformers, which a GPU machine may not have."""

import json
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nanoflow.models.config import ModelConfig
from nanoflow.models.registry import build_graph
from tests.unit.tiny_model import CONTEXT, EOS, VOCAB, save_tokenizer


def save_model(folder: Path, **changes: Any) -> Path:
    """Save a two-layer model with a tokenizer into `folder`; `changes` are keys of its config.json.

    The weights are as wide as they are for logits that lie far apart: rounding then changes no token.
    """
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": VOCAB,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-6,
        "eos_token_id": EOS,
        **changes,
    }
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    graph = build_graph(ModelConfig.from_dict(config))
    for prefix, ops in (
        ("", graph.prologue + graph.epilogue),
        *((f"model.layers.{layer}.", graph.layer) for layer in range(graph.layers)),
    ):
        for op in ops:
            for weight in op.weights:
                whole = torch.randn(prod(weight.shape), generator=generator).view(weight.shape)
                whole = 1 + 0.1 * whole if "norm" in weight.parts[0] else 0.4 * whole
                rows = _rows(config, weight.parts, weight.shape[0])
                for part, tensor in zip(weight.parts, whole.split(rows), strict=True):
                    tensors[prefix + part] = tensor.contiguous()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(folder)
    return folder


def _rows(config: dict[str, Any], parts: tuple[str, ...], total: int) -> list[int]:
    """Rows of each part of a weight."""
    if len(parts) == 3:  # q, k and v
        kv = config["num_key_value_heads"] * config["head_dim"]
        return [total - 2 * kv, kv, kv]
    return [total // len(parts)] * len(parts)
