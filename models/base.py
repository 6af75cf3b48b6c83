"""The porting interface: a port gives one layer's maths in the model's own terms, and this class the rest.

A port knows no stream, no nano-batch and no tensor-parallel arithmetic. Where its modules have other names than the
common ones, or other sizes, it overrides `outputs` or the module names below.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from nanoflow.models.config import Defaults, ModelConfig
from nanoflow.ops.builder import GraphBuilder, Value
from nanoflow.ops.graph import Graph

__all__ = ["Model"]


class Model(ABC):
    """One model family. Subclasses name their `architectures` and describe one `layer`."""

    architectures: ClassVar[tuple[str, ...]]
    """Entries of ``architectures`` in config.json that this port serves."""
    defaults: ClassVar[Defaults] = Defaults()
    embedding: ClassVar[str] = "model.embed_tokens"
    final_norm: ClassVar[str] = "model.norm"
    head: ClassVar[str] = "lm_head"

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    @abstractmethod
    def layer(self, g: GraphBuilder, x: Value) -> Value:
        """Appends one layer's operations to `g`, from the residual `x` to the residual that it returns."""

    @property
    def outputs(self) -> Mapping[str, int]:
        """Output columns of every linear module in a layer."""
        config = self.config
        return {
            "self_attn.q_proj": config.heads * config.head_dim,
            "self_attn.k_proj": config.kv_heads * config.head_dim,
            "self_attn.v_proj": config.kv_heads * config.head_dim,
            "self_attn.o_proj": config.hidden_size,
            "mlp.gate_proj": config.intermediate_size,
            "mlp.up_proj": config.intermediate_size,
            "mlp.down_proj": config.hidden_size,
        }

    def graph(self, *, fused: bool = True) -> Graph:
        """The model's operation graph: the layer traced once, the embedding before it, norm and head behind it."""
        config = self.config
        g = GraphBuilder(
            layers=config.layers,
            hidden_size=config.hidden_size,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            eps=config.eps,
            rope=config.rope,
            windows=config.windows,
            outputs=self.outputs,
        )
        out = self.layer(g, g.residual)
        return g.build(
            out,
            vocab_size=config.vocab_size,
            embedding=self.embedding,
            final_norm=self.final_norm,
            head=self.embedding if config.tie_embeddings else self.head,
            fused=fused,
        )
