"""A rank's share of a model: of the graph, of the weights, and of what is read from a checkpoint."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from nanoflow.checkpoints import Checkpoint, open_checkpoint
from nanoflow.checkpoints.base import FileReader, Region
from nanoflow.errors import CheckpointError
from nanoflow.models.config import ModelConfig
from nanoflow.models.registry import build_graph
from nanoflow.ops.collectives import AllReduce
from nanoflow.ops.graph import Graph
from nanoflow.ops.linear import Linear
from nanoflow.ops.operation import Work
from nanoflow.ops.rope import RopeAppend
from nanoflow.ops.sharding import ShardError, shard_graph
from nanoflow.pipeline.plan import Plan
from nanoflow.pipeline.program import compile_program
from nanoflow.pipeline.validate import validate
from nanoflow.search.fingerprint import graph_shape
from nanoflow.weights import ModelWeights, load_weights, required_bytes
from tests.unit import test_gguf_checkpoint as ggufs
from tests.unit.rank_models import graph_of, save, weights_of

BIASES = {"attention_bias": True, "mlp_bias": True}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("changes", [{}, QWEN3])
def test_every_operation_has_its_share(fused: bool, changes: dict[str, Any]) -> None:
    whole = graph_of(fused, **changes)
    for rank in range(4):
        graph = shard_graph(whole, rank, 4)
        assert (graph.heads, graph.kv_heads, graph.ranks, graph.vocab_size) == (2, 1, 4, 151)
        names = [op.name for op in graph.layer]
        assert [name for name in names if not name.endswith("_all_reduce")] == [op.name for op in whole.layer]
        for linear in ("o", "down"):
            assert names[names.index(linear) + 1] == f"{linear}_all_reduce"
        assert {name: graph.values[name] for name in ("x", "qkv", "attention", "gate_up", "silu_mul", "o", "down")} == {
            "x": 64,
            "qkv": (2 + 1 + 1) * 8,
            "attention": 16,
            "gate_up": 48,
            "silu_mul": 24,
            "o": 64,
            "down": 64,
        }
        assert graph.values["logits"] == 151 and graph.values["logits_share"] == 40
        sizes = {(op.heads, op.kv_heads) for op in graph.layer if hasattr(op, "heads")}
        norms = [op.norm for op in graph.layer if isinstance(op, RopeAppend) and op.norm is not None]
        assert sizes == {(2, 1)} and all((norm.heads, norm.kv_heads) == (2, 1) for norm in norms)
        assert bool(norms) == (fused and changes == QWEN3)
    assert shard_graph(whole, 0, 1) is whole
    assert whole.heads == 8 and "o_all_reduce" not in {op.name for op in whole.layer}


def test_key_value_heads_are_held_by_several_ranks_where_there_are_more_ranks() -> None:
    whole = graph_of(num_key_value_heads=2)
    found = []
    for rank in range(4):
        graph = shard_graph(whole, rank, 4)
        (weight,) = graph.operation("qkv").weights
        assert graph.kv_heads == 1 and weight.shape == (2 * 8 + 8 + 8, 64) and weight.slice is not None
        found.append([begin // 8 for begin, _ in weight.slice.ranges])
    assert found == [[0, 8, 10], [2, 8, 10], [4, 9, 11], [6, 9, 11]]


@pytest.mark.parametrize(
    ("changes", "size", "words"),
    [
        ({}, 3, r"parallel\.tensor: 3 ranks .* 8 query heads, which 3 does not divide.* Use one of 1, 2, 4, 8;"),
        ({}, 16, r"16 ranks .* 8 query heads"),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 6},
            4,
            r"6 key/value heads, which 4 neither divides .* Use one of 1, 2, 3, 6, 12;",
        ),
        ({"intermediate_size": 90}, 4, r"the 90 output columns of gate_up do not divide by 4\. Use one of 1, 2;"),
        ({"intermediate_size": 90}, 3, r"8 query heads, which 3 does not divide\. Use one of 1, 2;"),
        ({"intermediate_size": 91}, 2, r"the 91 output columns of gate_up do not divide by 2\. Use 1;"),
    ],
)
def test_what_cannot_be_split_is_refused_with_what_can(changes: dict[str, Any], size: int, words: str) -> None:
    with pytest.raises(ShardError, match=words):
        shard_graph(graph_of(**changes), 0, size)


def test_a_port_that_forgets_a_shard_is_told() -> None:
    whole = graph_of(fused=False)
    o = whole.operation("o")
    assert isinstance(o, Linear)
    o.shard = None
    with pytest.raises(ValueError, match="o needs all columns of attention, of which a rank has a share"):
        shard_graph(whole, 0, 2)


def test_plans_are_those_of_the_sharded_graph() -> None:
    whole = graph_of()
    graph = shard_graph(whole, 0, 2)
    validate(Plan.sequential(graph, 64), graph)
    assert len({graph_shape(g) for g in (whole, graph, shard_graph(whole, 0, 4))}) == 3
    lanes = "period: [whole: {main: [%s]}]"
    head = "{capacity: 64, nano_batches: {a: {decode: 1, prefill: 1, rows: 64}}, "
    text = head + lanes % "qkv, decode_attention, prefill_attention, o, gate_up, down" + "}"
    program = compile_program(Plan.loads(text, graph), graph)
    names = [step.nano_op.op for step in program.steps if step.nano_op.layer == 0]
    assert names.index("o_all_reduce") == names.index("o") + 1
    assert [program.steps[i].nano_op.op for i in program.collectives] == ["o_all_reduce", "down_all_reduce"] * 2
    text = text.replace("main: [", "net: [o_all_reduce, down_all_reduce], main: [")
    assert {step.lane for step in compile_program(Plan.loads(text, graph), graph).steps} == {"main", "net"}


def test_costs_are_divided_and_the_wire_has_its_own() -> None:
    whole = graph_of(vocab_size=160)
    work = Work(prefill_rows=100, prefill_pairs=100, sampled_rows=10)
    for size in (2, 4):
        graph = shard_graph(whole, 0, size)
        cost, alone = graph.cost(work, 2), whole.cost(work, 2)
        ring = 4 * (size - 1) / size * 100 * 64 * 2 * 2  # the paper's, of 2 layers
        assert math.isclose(cost.wire_bytes, ring + (size - 1) / size * 10 * 160 * 2)
        assert alone.wire_bytes == 0
        products = sum(op.cost(work, 2).flops for op in whole.layer if op.resource == "compute")
        shares = sum(op.cost(work, 2).flops for op in graph.layer if op.resource == "compute")
        assert math.isclose(shares * size, products)
    reduce = AllReduce("r", "x", 64, 2)
    assert reduce.cost(work, 4).wire_bytes == reduce.cost_with("one_shot", work, 4).wire_bytes == 100 * 64 * 4
    of_four = AllReduce("r", "x", 64, 4)
    assert of_four.cost_with("two_shot", work, 4) == of_four.cost(work, 4)
    assert of_four.cost_with("one_shot", work, 4).wire_bytes == 3 * 100 * 64 * 4


def assert_shares_make(graph: Graph, whole: ModelWeights, shares: list[ModelWeights]) -> None:
    """Assert that the ranks' shares of every weight, put where they say they are from, are the whole weight."""
    graphs = [shard_graph(graph, rank, len(shares)) for rank in range(len(shares))]
    covered: dict[tuple[int | None, str, str], torch.Tensor] = {}
    for sharded, share in zip(graphs, shares, strict=True):
        for layer, op, weight in weights_of(sharded):
            held = (share.outer if layer is None else share.layers[layer])[op][weight.name]
            full = (whole.outer if layer is None else whole.layers[layer])[op][weight.name]
            held, full = (t.to_dense() if t.is_mkldnn else t for t in (held, full))
            seen = covered.setdefault((layer, op, weight.name), torch.zeros(full.shape, dtype=torch.bool))
            if weight.slice is None:
                assert torch.equal(held, full)
                seen |= True
                continue
            dim, place = weight.slice.dim, 0
            for begin, end in weight.slice.ranges:
                assert torch.equal(held.narrow(dim, place, end - begin), full.narrow(dim, begin, end - begin))
                seen.narrow(dim, begin, end - begin).fill_(True)
                place += end - begin
            assert not held.narrow(dim, place, held.shape[dim] - place).any()
    expected = {(layer, op, weight.name) for layer, op, weight in weights_of(graph)}
    assert covered.keys() == expected
    assert all(seen.all() for seen in covered.values())


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("changes", [{}, BIASES, QWEN3, {"vocab_size": 17}])
def test_shares_of_a_folder_make_the_whole(tmp_path: Path, changes: dict[str, Any], size: int) -> None:
    source = open_checkpoint(str(save(tmp_path, **changes)))
    graph = graph_of(**changes)
    whole = load_weights(graph, source, torch.float32, "cpu")
    shares = [load_weights(shard_graph(graph, r, size), source, torch.float32, "cpu") for r in range(size)]
    assert_shares_make(graph, whole, shares)
    biased = ["bias" in share.layers[0]["down"] for share in shares]
    assert biased == [bool(changes.get("mlp_bias")) and rank == 0 for rank in range(size)]


@pytest.mark.parametrize("size", [2, 4])
def test_random_shares_are_those_of_the_whole(size: int) -> None:
    graph = graph_of()
    whole = load_weights(graph, None, torch.float32, "cpu", "random")
    graphs = [shard_graph(graph, rank, size) for rank in range(size)]
    shares = [load_weights(share, None, torch.float32, "cpu", "random") for share in graphs]
    assert_shares_make(graph, whole, shares)


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Byte ranges that are read from now on."""
    reads: list[tuple[int, int]] = []
    read_into: Callable[..., None] = FileReader.read_into

    def counted(self: FileReader, buffer: memoryview, offset: int, tensor: str) -> None:
        reads.append((offset, offset + len(buffer)))
        read_into(self, buffer, offset, tensor)

    monkeypatch.setattr(FileReader, "read_into", counted)
    return reads


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_reads_its_shard_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    whole = graph_of()
    source = open_checkpoint(str(save(tmp_path)))
    for rank in range(size):
        graph = shard_graph(whole, rank, size)
        padding = max(0, (rank + 1) * graph.values["logits_share"] - 151) * 64 * 4
        with monkeypatch.context() as patch:
            reads = count_reads(patch)
            load_weights(graph, source, torch.float32, "cpu")
        assert sum(end - begin for begin, end in reads) == required_bytes(graph, torch.float32) - padding
        ends = sorted(reads)
        assert all(a[1] <= b[0] for a, b in pairwise(ends)), "something is read twice"


@pytest.mark.parametrize("piece", [64, 200, 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_regions_of_safetensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, dtype: torch.dtype
) -> None:
    """Rows and columns, in pieces that are smaller and larger than a row, into another type."""
    source = open_checkpoint(str(save(tmp_path)))
    monkeypatch.setattr("nanoflow.checkpoints.safetensors_file._PIECE", piece)
    check_regions(source, "model.layers.1.mlp.down_proj.weight", dtype, ((0, 3, 40), (1, 7, 90), (1, 0, 96), (0, 5, 5)))
    check_regions(source, "model.norm.weight", dtype, ((0, 3, 40),))
    with pytest.raises(CheckpointError, match=r"down_proj.weight' has shape \[64, 96\], expected \[2, 96\] for its 63"):
        source.read("model.layers.1.mlp.down_proj.weight", torch.empty(2, 96), Region(0, 63, 65))


def check_regions(source: Checkpoint, name: str, dtype: torch.dtype, regions: tuple[tuple[int, int, int], ...]) -> None:
    whole = torch.empty(source.tensors[name], dtype=dtype)
    source.read(name, whole)
    for dim, begin, end in regions:
        expected = whole.narrow(dim, begin, end - begin)
        out = torch.full(expected.shape, torch.nan, dtype=dtype)
        source.read(name, out, Region(dim, begin, end))
        assert torch.equal(out, expected), (name, dim, begin, end)


@pytest.mark.parametrize("piece", [64, 2**16])
def test_regions_of_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """Rows whose order is undone, and columns that begin inside a quantised block."""
    kinds = (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F16)
    for kind in kinds:
        path = ggufs.write_gguf(
            tmp_path / f"{kind.name}.gguf", ggufs.llama_tensors(), kinds=lambda name, kind=kind: kind
        )
        source = open_checkpoint(str(path))
        monkeypatch.setattr("nanoflow.checkpoints.gguf_file._PIECE", piece)
        head = int(source.config["head_dim"])
        name = "model.layers.0.self_attn.q_proj.weight"
        check_regions(source, name, torch.float32, ((0, head, 2 * head),))
        down = "model.layers.0.mlp.down_proj.weight"
        columns = source.tensors[down][1]
        check_regions(source, down, torch.float32, ((1, 5, columns - 3), (1, columns // 2, columns), (0, 1, 4)))
        with pytest.raises(ValueError, match="only whole heads can be read"):
            source.read(name, torch.empty(1, source.tensors[name][1]), Region(0, 0, 1))


def test_shares_of_a_gguf_file_make_the_whole(tmp_path: Path) -> None:
    source = open_checkpoint(str(ggufs.write_gguf(tmp_path / "model.gguf", ggufs.llama_tensors())))
    graph = build_graph(ModelConfig.from_dict(source.config))
    whole = load_weights(graph, source, torch.float32, "cpu")
    shares = [load_weights(shard_graph(graph, r, 2), source, torch.float32, "cpu") for r in range(2)]
    assert_shares_make(graph, whole, shares)
