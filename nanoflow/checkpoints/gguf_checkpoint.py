"""A GGUF file as a checkpoint: its metadata and tensor names in Hugging Face terms, its row order undone."""

import re
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanoflow.checkpoints.base import Checkpoint, Region, check_shape
from nanoflow.checkpoints.gguf_file import GgufFile
from nanoflow.checkpoints.gguf_tokenizer import build_tokenizer
from nanoflow.errors import CheckpointError
from nanoflow.tokenizer import Tokenizer

__all__ = ["GgufCheckpoint"]

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK = re.compile(r"blk\.(\d+)\.([a-z_]+)\.(weight|bias)")
_INTERLEAVED = re.compile(r"blk\.\d+\.attn_[qk]\.(weight|bias)")
"""Tensors of ``llama`` files whose rows are in another order: pairs to be rotated stand side by side, where Hugging
Face keeps a head's first halves of all pairs together, then the second halves."""
_FREQUENCIES = "rope_freqs.weight"


class GgufCheckpoint(Checkpoint):
    """A model in one GGUF file. Raises CheckpointError for a damaged file or one without a model's metadata."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path = str(path)
        self.name = name or path.stem
        self._file = GgufFile(path)
        self._metadata = self._file.metadata
        count = self._metadata.get("split.count", 1)
        if count > 1:
            raise CheckpointError(f"{path}: one of {count} parts of a split GGUF. Merge them with llama-gguf-split.")
        architecture = self._metadata.get("general.architecture")
        if not isinstance(architecture, str):
            raise CheckpointError(f"{path}: the file names no general.architecture, so it holds no model.")
        self._architecture = architecture
        self._names = {self._rename(name): name for name in self._file.shapes if name != _FREQUENCIES}
        self.tensors = {name: self._file.shapes[source] for name, source in self._names.items()}
        self.eos_token_ids = self._eos()
        self.config = self._config()

    def read(self, name: str, out: torch.Tensor, region: Region | None = None) -> None:
        check_shape(self, name, out, region)
        source = self._names[name]
        if self._architecture == "llama" and _INTERLEAVED.fullmatch(source):
            head = int(self.config["head_dim"])
            width = prod(self.tensors[name][1:])
            if region is not None and (region.dim or region.begin % head or region.end % head):
                raise ValueError(f"the rows of {name!r} lie in another order: only whole heads can be read, {region}")

            def reorder(piece: torch.Tensor) -> torch.Tensor:
                return piece.view(-1, head // 2, 2, width).transpose(1, 2)

            self._file.read(source, out, name, unit=head * width, reorder=reorder, region=region)
        else:
            self._file.read(source, out, name, region=region)

    def tokenizer(self) -> Tokenizer | None:
        return build_tokenizer(self._file.path, self._metadata, self.eos_token_ids)

    @staticmethod
    def _rename(name: str) -> str:
        block = _BLOCK.fullmatch(name)
        if block and block[2] in _LAYER:
            return f"model.layers.{block[1]}.{_LAYER[block[2]]}.{block[3]}"
        stem, _, kind = name.rpartition(".")
        return f"{_OUTER[stem]}.{kind}" if stem in _OUTER else name

    def _eos(self) -> tuple[int, ...]:
        keys = ("eos", "eot", "eom")
        ids = [self._metadata.get(f"tokenizer.ggml.{key}_token_id") for key in keys]
        return tuple(dict.fromkeys(int(id) for id in ids if id is not None))

    def _get(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(f"{self._architecture}.{key}", default)

    def _need(self, key: str) -> int:
        value = self._get(key)
        if not isinstance(value, int) or value <= 0:
            raise CheckpointError(
                f"{self.path}: {self._architecture}.{key} is {'missing' if value is None else repr(value)}, expected a "
                "positive number. Convert the model again."
            )
        return value

    def _config(self) -> dict[str, Any]:
        """The keys of ``config.json``."""
        architecture = _ARCHITECTURES.get(self._architecture, self._architecture)
        if self._get("expert_count", 0):
            architecture = f"{self._architecture} with experts"
        if architecture not in _ARCHITECTURES.values():
            # The registry of models knows what is supported and says so.
            return {"architectures": [architecture], "model_type": self._architecture}
        hidden, heads = self._need("embedding_length"), self._need("attention.head_count")
        head_dim = int(self._get("attention.key_length", hidden // heads))
        embedding = self.tensors.get("model.embed_tokens.weight", ())
        window = self._get("attention.sliding_window")
        config: dict[str, Any] = {
            "architectures": ["MistralForCausalLM" if architecture == "LlamaForCausalLM" and window else architecture],
            "model_type": "mistral" if self._architecture == "llama" and window else self._architecture,
            "hidden_size": hidden,
            "intermediate_size": self._need("feed_forward_length"),
            "num_hidden_layers": self._need("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": int(self._get("attention.head_count_kv", heads)),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self._need("context_length"),
            "rms_norm_eps": float(self._get("attention.layer_norm_rms_epsilon", 1e-6)),
            "rope_theta": float(self._get("rope.freq_base", 10000.0)),
            "vocab_size": int(embedding[0] if embedding else self._get("vocab_size", 0)),
            "tie_word_embeddings": "lm_head.weight" not in self.tensors,
            "bos_token_id": self._metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": list(self.eos_token_ids),
        }
        first = "model.layers.0."
        if self._architecture != "qwen2":  # whose projections always have a bias
            config["attention_bias"] = f"{first}self_attn.q_proj.bias" in self.tensors
        if self._architecture == "llama":
            config["mlp_bias"] = f"{first}mlp.gate_proj.bias" in self.tensors
        if window:
            config["sliding_window"] = int(window)
        rotated = int(self._get("rope.dimension_count", head_dim))
        if rotated != head_dim:
            config["partial_rotary_factor"] = rotated / head_dim
        scaling = self._rope_scaling(head_dim, config["rope_theta"], config["max_position_embeddings"])
        if scaling is not None:
            config["rope_scaling"] = scaling
        return config

    def _rope_scaling(self, head_dim: int, theta: float, context: int) -> dict[str, Any] | None:
        kind = self._get("rope.scaling.type", "none")
        factor = float(self._get("rope.scaling.factor", self._get("rope.scale_linear", 1.0)))
        original = self._get("rope.scaling.original_context_length")
        if _FREQUENCIES in self._file.shapes:
            divisors = torch.empty(self._file.shapes[_FREQUENCIES], dtype=torch.float32)
            self._file.read(_FREQUENCIES, divisors)
            scaling = llama3_scaling(divisors.double().numpy(), head_dim, theta, original)
            if scaling is None:
                raise CheckpointError(
                    f"{self.path}: the rotary frequencies in {_FREQUENCIES} follow no scaling of type 'llama3'. "
                    "Use the Hugging Face folder."
                )
            return scaling if scaling["factor"] != 1.0 else None
        if kind == "linear" or (kind == "none" and "rope.scaling.type" not in self._metadata and factor != 1.0):
            return {"rope_type": "linear", "factor": factor}
        if kind == "yarn":
            scaling = {
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": int(original or round(context / factor)),
            }
            for key, source in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
                if self._get(f"rope.scaling.{source}") is not None:
                    scaling[key] = float(self._get(f"rope.scaling.{source}"))
            strength = float(self._get("rope.scaling.attn_factor", 1.0))
            if strength != 1.0:
                # GGUF multiplies yarn's usual factor; Hugging Face's key replaces it.
                scaling["attention_factor"] = strength * (1.0 + 0.1 * float(np.log(factor)))
            return scaling
        if kind != "none":
            raise CheckpointError(
                f"{self.path}: {self._architecture}.rope.scaling.type is {kind!r}; none, linear and yarn are supported."
            )
        return None


def llama3_scaling(
    divisors: np.ndarray[Any, np.dtype[np.float64]], head_dim: int, theta: float, original: int | None
) -> dict[str, Any] | None:
    """The ``llama3`` scaling whose frequency divisors, one for each pair of rotated elements, are `divisors`.

    Llama 3.1 leaves wavelengths under original / high alone, divides the frequency of those over original / low by
    `factor`, and between them blends: 1 / divisor = (1 - s) / factor + s with s = (original / wavelength - low) /
    (high - low). The three parameters are known up to a common scale, so the usual ones are tried first and then low
    is taken as 1. None if no parameters give these divisors.
    """
    frequencies = theta ** (-np.arange(0, 2 * len(divisors), 2) / (2 * len(divisors)))
    turns = frequencies / (2 * np.pi)  # a token, that is 1 / wavelength
    factor = float(f"{divisors.max():.6g}")  # what float32 rounding made of a round number
    if factor == 1.0:
        candidates = [(8192.0, 1.0, 4.0)]
    else:
        candidates = [(float(original or 8192), 1.0, 4.0)]
        smooth = (1 / divisors - 1 / factor) / (1 - 1 / factor)
        between = (smooth > 1e-4) & (smooth < 1 - 1e-4)
        if between.sum() >= 2:
            slope, intercept = np.polyfit(turns[between], smooth[between], 1)
            if slope > 0 and intercept < 0:
                high = 1 - 1 / intercept
                candidates.append((float(slope * (high - 1)), 1.0, float(high)))
    for length, low, high in candidates:
        smooth = np.clip((length * turns - low) / (high - low), 0.0, 1.0)
        if np.allclose(1 / ((1 - smooth) / factor + smooth), divisors, rtol=1e-3):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": round(length),
            }
    return None
