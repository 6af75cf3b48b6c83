"""Llama and Mistral."""

from nanoflow.models.base import Model
from nanoflow.models.config import Defaults
from nanoflow.ops.builder import GraphBuilder, Value

__all__ = ["Llama", "Mistral"]


class Llama(Model):
    """Llama 1 to 3 and what shares their layer (SmolLM2, TinyLlama, ...)."""

    architectures = ("LlamaForCausalLM",)

    def layer(self, g: GraphBuilder, x: Value) -> Value:
        c = self.config
        h = g.norm(x, "input_layernorm")
        qkv = g.linear(h, "self_attn.{q,k,v}_proj", shard="columns", name="qkv", bias=c.attention_bias)
        attention = g.attention(g.rope(self.before_rope(g, qkv)))
        o = g.linear(attention, "self_attn.o_proj", shard="rows", name="o", bias=c.o_bias)
        x = g.add(x, o, name="attention_add")
        h = g.norm(x, "post_attention_layernorm")
        gate_up = g.linear(h, "mlp.{gate,up}_proj", shard="columns", name="gate_up", bias=c.mlp_bias)
        down = g.linear(g.silu_mul(gate_up), "mlp.down_proj", shard="rows", name="down", bias=c.mlp_bias)
        return g.add(x, down)

    def before_rope(self, g: GraphBuilder, qkv: Value) -> Value:
        """What a family does to queries and keys before their rotation: nothing here."""
        return qkv


class Mistral(Llama):
    """Llama's layer with a sliding window in every layer, unless the configuration says null."""

    architectures = ("MistralForCausalLM",)
    defaults = Defaults(kv_heads=8, max_positions=131072, sliding_window=4096, uses_windows=True)
