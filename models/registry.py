"""Which port serves which architecture."""

from collections.abc import Mapping
from typing import Any

from nanoflow.models.base import Model
from nanoflow.models.config import ModelConfig, UnsupportedModel
from nanoflow.models.llama import Llama, Mistral
from nanoflow.models.qwen import Qwen2, Qwen3
from nanoflow.ops.graph import Graph

__all__ = ["PORTS", "build_graph", "find_port", "supported_architectures"]

PORTS: tuple[type[Model], ...] = (Llama, Mistral, Qwen2, Qwen3)


def supported_architectures() -> tuple[str, ...]:
    """Names that may stand in ``architectures`` of a config.json."""
    return tuple(name for port in PORTS for name in port.architectures)


def find_port(config: Mapping[str, Any] | ModelConfig) -> type[Model]:
    """The port of a config's architecture; raises `UnsupportedModel` naming it and the supported ones."""
    if isinstance(config, ModelConfig):
        names: Any = [config.architecture]
    else:
        names = config.get("architectures")
    name = names[0] if isinstance(names, list | tuple) and names else None
    for port in PORTS:
        if name in port.architectures:
            return port
    found = f"architecture {name!r}" if name else "a config.json without architectures"
    raise UnsupportedModel(f"{found} is not supported; supported: {', '.join(supported_architectures())}")


def build_graph(config: ModelConfig, *, fused: bool = True) -> Graph:
    """The operation graph of a model; without the fusion passes if `fused` is false."""
    return find_port(config)(config).graph(fused=fused)
