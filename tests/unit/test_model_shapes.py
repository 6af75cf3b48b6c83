"""The shapes shipped under configs/models: each is the published model, by its number of parameters."""

import json
from math import prod
from pathlib import Path

import pytest

from nanoflow.models.config import ModelConfig
from nanoflow.models.registry import build_graph
from nanoflow.ops.graph import Graph

SHAPES = Path(__file__).parents[2] / "configs" / "models"

# Parameters as published on the models' pages (safetensors metadata), and bytes of KV cache a token in bfloat16.
PUBLISHED = {
    "llama-2-7b": (6_738_415_616, 524_288),
    "llama-2-70b": (68_976_648_192, 327_680),
    "llama-3-8b": (8_030_261_248, 131_072),
    "llama-3-70b": (70_553_706_496, 327_680),
    "mistral-7b": (7_241_732_096, 131_072),
    "qwen2-7b": (7_615_616_512, 57_344),
    "qwen2-72b": (72_706_203_648, 327_680),
    "deepseek-llm-67b": (67_424_559_104, 389_120),
}


def graph_of(name: str) -> Graph:
    config = json.loads((SHAPES / name / "config.json").read_text())
    return build_graph(ModelConfig.from_dict(config))


def parameters(graph: Graph) -> int:
    """Elements of all weights."""
    outer = sum(prod(weight.shape) for op in graph.prologue + graph.epilogue for weight in op.weights)
    return outer + graph.layers * sum(prod(weight.shape) for op in graph.layer for weight in op.weights)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_shape_is_the_published_model(name: str) -> None:
    graph = graph_of(name)
    count, kv_bytes = PUBLISHED[name]
    assert parameters(graph) == pytest.approx(count, rel=2e-5)
    assert 2 * 2 * graph.layers * graph.kv_heads * graph.head_dim == kv_bytes


def test_every_shape_is_known() -> None:
    shipped = {path.parent.name for path in SHAPES.glob("*/config.json")}
    assert shipped == set(PUBLISHED) | {"tiny-llama"}


def test_windows_are_the_models_own() -> None:
    windows = {name: set(_config(name).windows) for name in PUBLISHED}
    assert windows.pop("mistral-7b") == {4096}
    assert set().union(*windows.values()) == {None}


def _config(name: str) -> ModelConfig:
    return ModelConfig.from_dict(json.loads((SHAPES / name / "config.json").read_text()))
