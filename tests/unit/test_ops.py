"""Operations against float64 formulas, what they declare against what they touch, the builder and the fusion passes."""

import math

import numpy as np
import pytest
import torch

from nanoflow.models.config import ModelConfig
from nanoflow.models.registry import build_graph
from nanoflow.ops.builder import GraphBuilder, expand_braces
from nanoflow.ops.device_batch import DeviceBatch
from nanoflow.ops.elementwise import Add, SiluMul
from nanoflow.ops.embedding import Embedding
from nanoflow.ops.fusion import fuse_silu
from nanoflow.ops.graph import RESIDUAL
from nanoflow.ops.linear import Linear, LinearSilu
from nanoflow.ops.norm import AddNorm, Norm, QKNorm
from nanoflow.ops.operation import KV, SCRATCH, NanoContext, Operation, RowClass, Work
from nanoflow.ops.rope import Rope, RopeConfig, rope_tables
from tests.unit.ops_harness import CPU, GraphRunner, Pages, Piece, dense_batch, gate_up_silu

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
QWEN3 = {**TINY, "architectures": ["Qwen3ForCausalLM"], "head_dim": 8}
TYPES = [torch.float32, torch.float64, torch.bfloat16]


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    eps = torch.finfo(dtype).eps
    return {"atol": 60 * eps, "rtol": 8 * eps}


def run(op: Operation, buffers: dict, weights: dict, kernel: str = "reference", host=None) -> None:
    """Runs `op` on the second of two nano-batches: rows 5 to 11 of 12."""
    pages = Pages(4, 2, 4)
    if host is None:
        host = dense_batch([[Piece(0, 0, [1] * 5)], [Piece(1, 3, [2, 3, 4, 5, 6])]], pages, padding=0)
    batch = DeviceBatch(host, CPU, 4)
    kv = torch.zeros(pages.pool, 2, 2, 4, 8)
    with torch.inference_mode():
        op.kernels[kernel](NanoContext(batch, batch.parts[1], 0, buffers, weights, kv))


def random_buffers(dtype: torch.dtype, rows: int = 10, **columns: int) -> dict[str, torch.Tensor]:
    return {name: torch.randn(rows, count).to(dtype) for name, count in columns.items()}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kernel", ["reference", "onednn"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(24, (16, 8, 8)), (37, (5,)), (576, (1,))])
def test_linear(dtype, bias, kernel, packed, inputs, outputs) -> None:
    torch.manual_seed(0)
    op = Linear("l", "a", "b", inputs, outputs, [f"m{i}" for i in range(len(outputs))], bias=bias)
    buffers = random_buffers(dtype, a=inputs, b=sum(outputs))
    before = buffers["b"].clone()
    weights = {weight.name: (torch.randn(weight.shape) / math.sqrt(inputs)).to(dtype) for weight in op.weights}
    wanted = buffers["a"].double() @ weights["weight"].double().T + (weights["bias"].double() if bias else 0)
    given = {name: op.pack(name, tensor) if packed else tensor for name, tensor in weights.items()}
    assert given["weight"].is_mkldnn == (packed and dtype == torch.float32)
    run(op, buffers, given, kernel)
    torch.testing.assert_close(buffers["b"][5:].double(), wanted[5:], **tolerance(dtype))
    assert torch.equal(buffers["b"][:5], before[:5])


def test_linear_declares_stacked_parts() -> None:
    op = Linear("qkv", "h", "qkv", 8, (8, 4, 4), ["q", "k", "v"], bias=True)
    assert [(w.name, w.parts, w.shape) for w in op.weights] == [
        ("weight", ("q.weight", "k.weight", "v.weight"), (16, 8)),
        ("bias", ("q.bias", "k.bias", "v.bias"), (16,)),
    ]
    cost = op.cost(Work(decode_rows=3, prefill_rows=2), 2)
    assert cost.flops == 2 * 5 * 8 * 16 and cost.bytes == 2 * (8 * 16 + 5 * 8 + 5 * 16)
    assert op.cost(Work(), 2).bytes == 0


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kernel", ["reference", "onednn", "measured", "cublas"])
@pytest.mark.parametrize("packed", [False, True])
def test_linear_silu(dtype, bias, kernel, packed) -> None:
    torch.manual_seed(0)
    op = gate_up_silu(37, 20, bias)
    buffers = random_buffers(dtype, h=37, gate_up=40, product=20)
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    weights = {weight.name: (torch.randn(weight.shape) / math.sqrt(37)).to(dtype) for weight in op.weights}
    both = buffers["h"].double() @ weights["weight"].double().T + (weights["bias"].double() if bias else 0)
    wanted = torch.nn.functional.silu(both[:, :20]) * both[:, 20:]
    packed = packed and kernel in ("reference", "onednn")
    given = {name: op.pack(name, tensor) if packed else tensor for name, tensor in weights.items()}
    assert given["weight"].is_mkldnn == (packed and dtype == torch.float32)
    run(op, buffers, given, kernel)
    torch.testing.assert_close(buffers["product"][5:].double(), wanted[5:], **tolerance(dtype))
    assert torch.equal(buffers["h"], before["h"])
    assert all(torch.equal(buffers[name][:5], before[name][:5]) for name in buffers)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
def test_linear_silu_on_a_cpu_gives_the_bits_of_its_two_operations(dtype, packed) -> None:
    torch.manual_seed(0)
    op = gate_up_silu(64, 48, bias=False)
    buffers = random_buffers(dtype, h=64, gate_up=96, product=48)
    other = {name: buffer.clone() for name, buffer in buffers.items()}
    weight = (torch.randn(96, 64) / 8).to(dtype)
    weights = {"weight": op.pack("weight", weight) if packed else weight}
    run(op, buffers, weights, "onednn")
    run(op.linear, other, weights, "onednn")
    run(op.silu_mul, other, {}, "reference")
    assert torch.equal(buffers["product"], other["product"])


def test_linear_silu_declares_its_parts_and_the_least_it_moves() -> None:
    op = gate_up_silu(8, 16, bias=True)
    assert op.name == "gate_up" and op.resource == "compute"
    assert [(w.name, w.parts, w.shape) for w in op.weights] == [
        ("weight", ("gate.weight", "up.weight"), (32, 8)),
        ("bias", ("gate.bias", "up.bias"), (32,)),
    ]
    accesses = {(access.buffer, access.write) for access in op.accesses}
    assert accesses == {("h", False), ("gate_up", True), ("product", True)}
    cost = op.cost(Work(decode_rows=3, prefill_rows=2), 2)
    assert cost.flops == 2 * 5 * 8 * 32 + 5 * 5 * 16 and cost.bytes == 2 * (8 * 32 + 5 * 8 + 5 * 16)
    assert op.cost(Work(), 2).bytes == 0
    assert op.preferred_kernel(CPU, torch.float32) == "onednn"


def test_a_product_that_something_else_uses_is_not_activated_in_place() -> None:
    op = gate_up_silu(8, 16, bias=False)
    alone: list[Operation] = [op.linear, op.silu_mul]
    (fused,) = fuse_silu(alone)
    assert isinstance(fused, LinearSilu) and (fused.linear, fused.silu_mul) == (op.linear, op.silu_mul)
    other = Norm("n", "gate_up", "normed", 32, 1e-6, "n")
    for operations in ([*alone, other], [op.linear, other, op.silu_mul], [op.silu_mul, op.linear]):
        assert fuse_silu(operations) == tuple(operations)
    elsewhere = Linear("other", "h", "other", 8, (16, 16), ["a", "b"])
    assert fuse_silu([elsewhere, op.silu_mul]) == (elsewhere, op.silu_mul)


@pytest.mark.parametrize("dtype", TYPES)
def test_norms(dtype) -> None:
    torch.manual_seed(0)
    weight = (1 + torch.randn(24) / 4).to(dtype)
    eps = 1e-2

    def norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        x = x.double()
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w.double()

    buffers = random_buffers(dtype, x=24, h=24)
    wanted = norm(buffers["x"][5:], weight)
    run(Norm("n", "x", "h", 24, eps, "n"), buffers, {"weight": weight})
    torch.testing.assert_close(buffers["h"][5:].double(), wanted, **tolerance(dtype))

    buffers = random_buffers(dtype, x=24, y=24, h=24)
    total = buffers["x"] + buffers["y"]
    run(AddNorm("an", "x", "y", Norm("n", "x", "h", 24, eps, "n")), buffers, {"weight": weight})
    assert torch.equal(buffers["x"][5:], total[5:])
    torch.testing.assert_close(buffers["h"][5:].double(), norm(total[5:], weight), **tolerance(dtype))

    buffers = random_buffers(dtype, qkv=(4 + 2 * 2) * 24)
    heads = buffers["qkv"].clone().view(10, 8, 24)
    k_weight = (1 + torch.randn(24) / 4).to(dtype)
    run(QKNorm("qk", "qkv", 4, 2, 24, eps, "q", "k"), buffers, {"q": weight, "k": k_weight})
    found = buffers["qkv"].view(10, 8, 24)
    torch.testing.assert_close(found[5:, :4].double(), norm(heads[5:, :4], weight), **tolerance(dtype))
    torch.testing.assert_close(found[5:, 4:6].double(), norm(heads[5:, 4:6], k_weight), **tolerance(dtype))
    assert torch.equal(found[5:, 6:], heads[5:, 6:]) and torch.equal(found[:5], heads[:5])


@pytest.mark.parametrize("dtype", TYPES)
def test_elementwise(dtype) -> None:
    torch.manual_seed(0)
    buffers = random_buffers(dtype, x=24, y=24)
    wanted = buffers["x"] + buffers["y"]
    run(Add("add", "x", "y", 24), buffers, {})
    assert torch.equal(buffers["x"][5:], wanted[5:]) and not torch.equal(buffers["x"][:5], wanted[:5])

    buffers = random_buffers(dtype, gate_up=34, out=17)
    gate, up = buffers["gate_up"].double().split(17, -1)
    run(SiluMul("s", "gate_up", "out", 17), buffers, {})
    torch.testing.assert_close(buffers["out"][5:].double(), (gate * gate.sigmoid() * up)[5:], **tolerance(dtype))


def test_embedding_refuses_unresolved_tokens() -> None:
    table = torch.randn(30, 24)
    buffers = random_buffers(torch.float32, x=24)
    op = Embedding("embed", "x", 30, 24, "model.embed_tokens")
    run(op, buffers, {"weight": table})
    assert torch.equal(buffers["x"][5:], table[[2, 3, 4, 5, 6]])
    pages = Pages(4, 2, 4)
    host = dense_batch([[Piece(0, 0, [1] * 5)], [Piece(1, 3, [2, -1])]], pages)
    with pytest.raises((IndexError, RuntimeError)):  # a token that only the device knew was left in
        run(op, buffers, {"weight": table}, host=host)


@pytest.mark.parametrize("rotary_dim", [8, 4])
@pytest.mark.parametrize("dtype", TYPES)
def test_rope_turns_pairs(dtype, rotary_dim) -> None:
    torch.manual_seed(0)
    config = RopeConfig(rotary_dim, theta=100.0)
    buffers = random_buffers(dtype, qkv=(4 + 2 * 2) * 8)
    before = buffers["qkv"].clone().view(10, 8, 8).double()
    run(Rope("rope", "qkv", 4, 2, 8, config), buffers, {})
    half = rotary_dim // 2
    wanted = before.clone()
    for row, position in zip(range(5, 10), range(3, 8), strict=True):
        for pair in range(half):
            turn = np.exp(1j * position * 100.0 ** (-2 * pair / rotary_dim))
            plane = torch.complex(before[row, :6, pair], before[row, :6, pair + half]) * complex(turn)
            wanted[row, :6, pair], wanted[row, :6, pair + half] = plane.real, plane.imag
    # Angles are in float32 whatever the activations' type.
    widest = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    torch.testing.assert_close(buffers["qkv"].view(10, 8, 8).double(), wanted, **tolerance(widest))


def test_dynamic_rope_depends_on_the_position_alone() -> None:
    config = RopeConfig(8, theta=50.0, type="dynamic", factor=2.0, max_positions=16)
    cos, sin = rope_tables(config, torch.arange(64))
    for position in (0, 15, 16, 40, 63):
        length = max(position + 1, 16)
        base = 50.0 * (2.0 * length / 16 - 1) ** (8 / 6)
        angles = [position * base ** (-2 * pair / 8) for pair in range(4)]
        np.testing.assert_allclose(cos[position].numpy(), np.cos(angles), atol=1e-5)
        np.testing.assert_allclose(sin[position].numpy(), np.sin(angles), atol=1e-5)


def test_frequency_factors_divide() -> None:
    plain = RopeConfig(8).inverse_frequencies(CPU)
    factors = (1.0, 2.0, 4.0, 8.0)
    assert torch.equal(RopeConfig(8, frequency_factors=factors).inverse_frequencies(CPU), plain / torch.tensor(factors))
    with pytest.raises(ValueError, match="2 frequency factors for 4 pairs"):
        RopeConfig(8, frequency_factors=(1.0, 2.0))
    with pytest.raises(ValueError, match="'longrope' is not one of default, linear"):
        RopeConfig(8, type="longrope")


def random_state(config: ModelConfig, graph, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    state: dict[str, torch.Tensor] = {}
    layers = [(f"model.layers.{layer}.", op) for layer in range(graph.layers) for op in graph.layer]
    for prefix, op in layers + [("", op) for op in graph.prologue + graph.epilogue]:
        linear = op.linear if isinstance(op, LinearSilu) else op
        sizes = linear.outputs if isinstance(linear, Linear) else None
        for weight in op.weights:
            for index, part in enumerate(weight.parts):
                rows = sizes[index] if sizes else weight.shape[0]
                state[prefix + part] = torch.randn(rows, *weight.shape[1:]) * 0.3
    return state


BATCH = [
    [Piece(0, 5, [7], decode=True), Piece(1, 0, [3, 9, 11])],
    [Piece(2, 2, [8], decode=True), Piece(1, 3, [4, 60]), Piece(3, 0, [1, 2])],
]


@pytest.mark.parametrize("given", [TINY, QWEN3], ids=["llama", "qwen3"])
def test_fused_graph_equals_traced_graph(given) -> None:
    config = ModelConfig.from_dict(given)
    fused, traced = build_graph(config), build_graph(config, fused=False)
    names = [op.name for op in traced.layer]
    head = ["input_layernorm", "qkv"]
    norm = ["qk_norm"] if given is QWEN3 else []
    attention = ["decode_attention", "prefill_attention", "o"]
    tail = ["down", "add"]
    middle = ["attention_add", "post_attention_layernorm", "gate_up", "silu_mul"]
    assert names == [*head, *norm, "rope", "append", *attention, *middle, *tail]
    assert [op.name for op in fused.layer] == [*head, "rope_append", *attention, "add_norm", "gate_up", *tail]
    state = random_state(config, traced)
    pages = Pages(4, 4, 3)
    host = dense_batch(BATCH, pages, padding=1)
    runners = [GraphRunner(graph, state, pages, reference=True) for graph in (fused, traced)]
    for runner in runners:
        for layer in runner.kv:
            layer.copy_(torch.randn(layer.shape, generator=torch.Generator().manual_seed(1)))
    one, other = (runner.step(host) for runner in runners)
    assert torch.equal(one, other)
    assert all(torch.equal(a[1:], b[1:]) for a, b in zip(runners[0].kv, runners[1].kv, strict=True))


@pytest.mark.parametrize("kernels", ["reference", "preferred"])
@pytest.mark.parametrize("given", [TINY, QWEN3], ids=["llama", "qwen3"])
@pytest.mark.parametrize("fused", [True, False])
def test_operations_touch_only_what_they_declare(given, fused, kernels) -> None:
    """Rows that an operation does not declare to read are NaN, and what it does not declare to write must not
    change. What it declares to write and anything reads is written."""
    config = ModelConfig.from_dict(given)
    graph = build_graph(config, fused=fused)
    state = random_state(config, graph)
    pages = Pages(4, 4, 3)
    host = dense_batch(BATCH, pages, padding=1)
    runner = GraphRunner(graph, state, pages, reference=kernels == "reference")
    batch = DeviceBatch(host, CPU, 4)
    torch.manual_seed(3)
    read = {access.buffer for op in graph.layer for access in op.accesses if not access.write}
    for op in graph.layer:
        for number, part in enumerate(batch.parts):
            rows = host.nano_batches[number]
            spans = {
                RowClass.ALL: range(rows.start, rows.end),
                RowClass.DECODE: range(rows.start, rows.start + rows.decode),
                RowClass.PREFILL: range(rows.start + rows.decode, rows.end - rows.padding),
            }
            reads: dict[str, set[int]] = {name: set() for name in graph.values}
            writes: dict[str, set[int]] = {name: set() for name in graph.values}
            for access in op.accesses:
                assert access.buffer != SCRATCH
                if access.buffer != KV:
                    (writes if access.write else reads)[access.buffer] |= set(spans[access.rows])
            for name, buffer in runner.buffers.items():
                buffer.fill_(torch.nan)
                buffer[sorted(reads[name])] = torch.randn(len(reads[name]), buffer.shape[1])
            kv = runner.kv[0]
            kv.copy_(torch.randn(kv.shape))
            before = {name: buffer.clone() for name, buffer in runner.buffers.items()}
            kv_before = kv.clone()
            runner.run_op(op, batch, part, 0, runner.layers[0][op.name])
            for name, buffer in runner.buffers.items():
                kept = [row for row in range(buffer.shape[0]) if row not in writes[name]]
                torch.testing.assert_close(buffer[kept], before[name][kept], equal_nan=True, rtol=0, atol=0)
                real = sorted(row for row in writes[name] if row < rows.end - rows.padding)
                assert name not in read or not buffer[real].isnan().any(), (op.name, name)
            changed = (kv != kv_before).any(-1).any(1).any(1).nonzero()
            places = {int(page) * 4 + int(offset) for page, offset in changed}
            writes_kv = any(access.buffer == KV and access.write for access in op.accesses)
            assert places == (set(host.kv_index[rows.start : rows.end].tolist()) if writes_kv else set()), op.name


def builder(**changes) -> GraphBuilder:
    given = {
        "layers": 1,
        "hidden_size": 8,
        "heads": 2,
        "kv_heads": 1,
        "head_dim": 4,
        "eps": 1e-6,
        "rope": RopeConfig(4),
        "windows": (None,),
        "outputs": {"m.a": 8, "m.b": 4},
    }
    return GraphBuilder(**{**given, **changes})


def test_builder_refuses_what_would_compute_something_else() -> None:
    names = {"vocab_size": 9, "embedding": "e", "final_norm": "n", "head": "h"}
    g = builder()
    x = g.residual
    y = g.linear(x, "m.a", name="y")
    after = g.add(x, y)
    with pytest.raises(ValueError, match="'x' was overwritten in place"):
        g.norm(x, "n")
    with pytest.raises(ValueError, match=r"no output size for module 'm\.c'; known: m\.a, m\.b"):
        g.linear(after, "m.{a,c}", name="z")
    with pytest.raises(ValueError, match="'y' is written twice"):
        g.linear(after, "m.a", name="y")
    with pytest.raises(ValueError, match="x has 8 columns, z 4"):
        g.add(after, g.linear(after, "m.b", name="z"))
    with pytest.raises(ValueError, match="must end on the residual, not on 'y'"):
        g.build(y, **names)
    with pytest.raises(ValueError, match="does not belong to this layer"):
        builder().add(builder().residual, y)
    with pytest.raises(ValueError, match="2 windows for 1 layers"):
        builder(windows=(None, 3))
    graph = g.build(after, **names)
    assert graph.values[RESIDUAL] == 8 and graph.values["logits"] == 9
    with pytest.raises(KeyError):
        graph.operation("nothing")


def test_braces() -> None:
    assert expand_braces("a.{q,k,v}_proj") == ("a.q_proj", "a.k_proj", "a.v_proj")
    assert expand_braces("plain") == ("plain",)
    for bad in ("a{b", "a}b", "{a}{b}"):
        with pytest.raises(ValueError, match="at most one pair of braces"):
            expand_braces(bad)


def test_graph_cost_is_two_flops_a_parameter_and_row() -> None:
    """Without attention, FLOPs are nearly 2 x rows x parameters of the GEMMs; the head counts sampled rows only."""
    config = ModelConfig.from_dict({**TINY, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4})
    graph = build_graph(config)
    gemms = [op for op in graph.layer if isinstance(op, Linear | LinearSilu)]
    parameters = graph.layers * sum(math.prod(op.weights[0].shape) for op in gemms)
    work = Work(decode_rows=6, prefill_rows=4, sampled_rows=7)
    wanted = 2 * 10 * parameters + 2 * 7 * config.vocab_size * config.hidden_size
    assert graph.cost(work, 4).flops == pytest.approx(wanted, rel=0.02)
    context = {"decode_context": 1000, "prefill_context": 50, "prefill_pairs": 80}
    extra = graph.cost(Work(decode_rows=6, prefill_rows=4, sampled_rows=7, **context), 4)
    assert extra.flops - graph.cost(work, 4).flops == 4 * 1080 * 512 * graph.layers
    kv_bytes = 2 * 1050 * config.kv_heads * config.head_dim * 4 * graph.layers
    assert extra.bytes - graph.cost(work, 4).bytes == kv_bytes
