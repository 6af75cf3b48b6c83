"""Qwen2 and Qwen3: Llama's layer with biases on q, k and v, or with normalised queries and keys."""

from nanoflow.models.config import Defaults
from nanoflow.models.llama import Llama
from nanoflow.ops.builder import GraphBuilder, Value

__all__ = ["Qwen2", "Qwen3"]


class Qwen2(Llama):
    """Qwen 1.5, 2 and 2.5: q, k and v have a bias, o never."""

    architectures = ("Qwen2ForCausalLM",)
    defaults = Defaults(kv_heads=32, max_positions=32768, sliding_window=4096, uses_windows=None, qkv_bias=True)


class Qwen3(Llama):
    """Qwen 3: every query and key head is normalised before its rotation."""

    architectures = ("Qwen3ForCausalLM",)
    defaults = Defaults(kv_heads=32, head_dim=128, max_positions=32768, sliding_window=4096, uses_windows=None)

    def before_rope(self, g: GraphBuilder, qkv: Value) -> Value:
        return g.qk_norm(qkv, "self_attn.q_norm", "self_attn.k_norm")
