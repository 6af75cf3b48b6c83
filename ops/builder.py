"""The graph builder: what a model port calls to describe one layer.

Contract: every method appends operations in program order and returns the `Value` that they wrote. Methods that work in
place (`add`, `rope`, `qk_norm`) return a new version of their first argument; the old one must not be used again, and a
use of it is refused. A layer starts from the residual and must end on it.

Names, as plans use them. A port names its norms and linears; the builder names the rest: ``embed`` before the layers;
``qk_norm``, ``rope``, ``append``, ``decode_attention``, ``prefill_attention``, ``silu_mul``, ``add`` inside;
``final_norm`` and ``lm_head`` behind. After fusion, Llama's layer is: input_layernorm, qkv, rope_append,
decode_attention, prefill_attention, o, add_norm, gate_up (which takes silu_mul in), down, add. What a rank of tensor
parallelism has of it, and its collectives, `nanoflow.ops.sharding` makes of the finished graph.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nanoflow.ops.attention import DecodeAttention, PrefillAttention
from nanoflow.ops.elementwise import Add, SiluMul
from nanoflow.ops.embedding import Embedding
from nanoflow.ops.fusion import fuse
from nanoflow.ops.graph import RESIDUAL, Graph
from nanoflow.ops.linear import Linear, Shard
from nanoflow.ops.norm import Norm, QKNorm
from nanoflow.ops.operation import Operation
from nanoflow.ops.rope import Append, Rope, RopeConfig

__all__ = ["GraphBuilder", "Value", "expand_braces"]


@dataclass(frozen=True)
class Value:
    """What an operation wrote: a buffer's name, its columns, and how many times it had been written."""

    name: str
    columns: int
    version: int


def expand_braces(pattern: str) -> tuple[str, ...]:
    """``a.{q,k}_proj`` -> ``("a.q_proj", "a.k_proj")``; a pattern without braces gives itself."""
    found = re.fullmatch(r"([^{}]*)\{([^{}]+)\}([^{}]*)", pattern)
    if found is None:
        if "{" in pattern or "}" in pattern:
            raise ValueError(f"module pattern {pattern!r} must hold at most one pair of braces, like a.{{b,c}}_d")
        return (pattern,)
    before, names, after = found.groups()
    return tuple(f"{before}{name}{after}" for name in names.split(","))


class GraphBuilder:
    """Collects one layer's operations and makes the model's `Graph`."""

    def __init__(
        self,
        *,
        layers: int,
        hidden_size: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        eps: float,
        rope: RopeConfig,
        windows: Sequence[int | None],
        outputs: Mapping[str, int],
    ) -> None:
        """`outputs` gives the output columns of every linear module that a layer may name, like ``self_attn.q_proj``;
        `windows` each layer's sliding window, None for full attention."""
        if len(windows) != layers:
            raise ValueError(f"{len(windows)} windows for {layers} layers")
        self.layers = layers
        self.hidden_size = hidden_size
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.eps = eps
        self._rope = rope
        self.windows = tuple(windows)
        self.outputs = dict(outputs)
        self.operations: list[Operation] = []
        self.columns: dict[str, int] = {RESIDUAL: hidden_size}
        self._versions: dict[str, int] = {RESIDUAL: 0}

    @property
    def residual(self) -> Value:
        """The layer's input."""
        return Value(RESIDUAL, self.hidden_size, self._versions[RESIDUAL])

    def norm(self, x: Value, name: str) -> Value:
        """RMS norm with the checkpoint's module `name`, which also names the operation and its value."""
        self._use(x)
        target = self._new(name, x.columns)
        self.operations.append(Norm(name, x.name, target.name, x.columns, self.eps, name))
        return target

    def linear(self, x: Value, modules: str, *, name: str, shard: Shard | None = None, bias: bool = False) -> Value:
        """One GEMM over the checkpoint's `modules` (braces expand: ``self_attn.{q,k,v}_proj``), outputs side by
        side."""
        self._use(x)
        parts = expand_braces(modules)
        unknown = [part for part in parts if part not in self.outputs]
        if unknown:
            raise ValueError(f"no output size for module {unknown[0]!r}; known: {', '.join(sorted(self.outputs))}")
        outputs = [self.outputs[part] for part in parts]
        target = self._new(name, sum(outputs))
        self.operations.append(Linear(name, x.name, target.name, x.columns, outputs, parts, bias=bias, shard=shard))
        return target

    def qk_norm(self, qkv: Value, q_module: str, k_module: str) -> Value:
        """RMS norm of every query and key head, in place."""
        self._use(qkv)
        self.operations.append(
            QKNorm("qk_norm", qkv.name, self.heads, self.kv_heads, self.head_dim, self.eps, q_module, k_module)
        )
        return self._overwritten(qkv)

    def rope(self, qkv: Value) -> Value:
        """Rotary embedding of the queries and keys, in place."""
        self._use(qkv)
        self.operations.append(Rope("rope", qkv.name, self.heads, self.kv_heads, self.head_dim, self._rope))
        return self._overwritten(qkv)

    def attention(self, qkv: Value) -> Value:
        """Appends keys and values to the KV cache and attends: ``append``, ``decode_attention``,
        ``prefill_attention``."""
        self._use(qkv)
        sizes = (self.heads, self.kv_heads, self.head_dim)
        target = self._new("attention", self.heads * self.head_dim)
        self.operations += [
            Append("append", qkv.name, *sizes),
            DecodeAttention("decode_attention", qkv.name, target.name, *sizes, self.windows),
            PrefillAttention("prefill_attention", qkv.name, target.name, *sizes, self.windows),
        ]
        return target

    def add(self, residual: Value, branch: Value, name: str = "add") -> Value:
        """``residual += branch``, in place."""
        self._use(residual)
        self._use(branch)
        if residual.columns != branch.columns:
            raise ValueError(f"add: {residual.name} has {residual.columns} columns, {branch.name} {branch.columns}")
        self.operations.append(Add(name, residual.name, branch.name, residual.columns))
        return self._overwritten(residual)

    def silu_mul(self, gate_up: Value) -> Value:
        """``silu(gate) * up`` of a value that holds both side by side."""
        self._use(gate_up)
        target = self._new("silu_mul", gate_up.columns // 2)
        self.operations.append(SiluMul("silu_mul", gate_up.name, target.name, target.columns))
        return target

    def build(
        self, out: Value, *, vocab_size: int, embedding: str, final_norm: str, head: str, fused: bool = True
    ) -> Graph:
        """The model's graph. `out` is the layer's output; the others name modules of the checkpoint (`head` is
        `embedding` when the two are tied). `fused` runs the fusion passes."""
        self._use(out)
        if out.name != RESIDUAL or out.version == 0:
            raise ValueError(f"a layer must end on the residual, not on {out.name!r}")
        layer = fuse(self.operations) if fused else tuple(self.operations)
        hidden = self.hidden_size
        values = {**self.columns, "sampled": hidden, "sampled_norm": hidden, "logits": vocab_size}
        return Graph(
            values=values,
            layer=layer,
            layers=self.layers,
            prologue=(Embedding("embed", RESIDUAL, vocab_size, hidden, embedding),),
            epilogue=(
                Norm("final_norm", "sampled", "sampled_norm", hidden, self.eps, final_norm),
                Linear("lm_head", "sampled_norm", "logits", hidden, [vocab_size], [head], shard="columns"),
            ),
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=vocab_size,
        )

    def _use(self, value: Value) -> None:
        current = self._versions.get(value.name)
        if current is None:
            raise ValueError(f"value {value.name!r} does not belong to this layer")
        if current != value.version:
            raise ValueError(
                f"value {value.name!r} was overwritten in place since; use what the last add, rope or qk_norm returned"
            )

    def _new(self, name: str, columns: int) -> Value:
        if name in self.columns:
            raise ValueError(f"value {name!r} is written twice in one layer; give one of them another name")
        self.columns[name] = columns
        self._versions[name] = 0
        return Value(name, columns, 0)

    def _overwritten(self, value: Value) -> Value:
        self._versions[value.name] += 1
        return Value(value.name, value.columns, self._versions[value.name])
