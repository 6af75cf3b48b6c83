"""A model's architecture, read from the keys of a Hugging Face ``config.json``.

Defaults of absent keys are those of the family (`Defaults`); whatever would change the maths and is not supported is
refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanoflow.ops.rope import ROPE_TYPES, RopeConfig

__all__ = ["Defaults", "ModelConfig", "UnsupportedModel"]


class UnsupportedModel(ValueError):
    """A model or a value of its configuration that no port supports."""


@dataclass(frozen=True)
class Defaults:
    """What a family's ``config.json`` means where it leaves a key out."""

    kv_heads: int | None = None
    """None: as many as query heads."""
    head_dim: int | None = None
    """None: hidden size / query heads."""
    max_positions: int = 2048
    sliding_window: int | None = None
    uses_windows: bool | None = False
    """Whether the family has sliding windows; None: if `use_sliding_window` says so, from `max_window_layers` on."""
    qkv_bias: bool = False
    """Whether q, k and v always have a bias (and o none), whatever `attention_bias` says."""


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer. Sizes count elements; `windows` has an entry a layer, None for full attention."""

    architecture: str
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    eps: float
    rope: RopeConfig
    windows: tuple[int | None, ...]
    max_position_embeddings: int
    tie_embeddings: bool = False
    attention_bias: bool = False
    """Bias of the q, k and v projections."""
    o_bias: bool = False
    mlp_bias: bool = False
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], defaults: Defaults | None = None) -> "ModelConfig":
        """Reads a ``config.json``. With `defaults` None the port of its architecture gives them.

        Raises `UnsupportedModel` for an architecture or a value that is not supported, or a key that is missing.
        """
        if defaults is None:
            from nanoflow.models.registry import find_port

            defaults = find_port(config).defaults
        _refuse(config)
        hidden, heads = _positive(config, "hidden_size"), _positive(config, "num_attention_heads")
        layers = _positive(config, "num_hidden_layers")
        kv_heads = _positive(config, "num_key_value_heads", defaults.kv_heads or heads)
        head_dim = _positive(config, "head_dim", defaults.head_dim or hidden // heads)
        if heads % kv_heads:
            raise UnsupportedModel(
                f"config.json: num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({kv_heads})"
            )
        max_positions = _positive(config, "max_position_embeddings", defaults.max_positions)
        bias = bool(config.get("attention_bias", False))
        return cls(
            architecture=str((config.get("architectures") or ["?"])[0]),
            hidden_size=hidden,
            intermediate_size=_positive(config, "intermediate_size"),
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=_positive(config, "vocab_size"),
            eps=_number(config, "rms_norm_eps", 1e-6),
            rope=_rope(config, head_dim, max_positions),
            windows=_windows(config, layers, defaults),
            max_position_embeddings=max_positions,
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bias or defaults.qkv_bias,
            o_bias=bias and not defaults.qkv_bias,
            mlp_bias=bool(config.get("mlp_bias", False)),
            eos_token_ids=_token_ids(config.get("eos_token_id")),
        )


def _refuse(config: Mapping[str, Any]) -> None:
    """Refuses what would change the maths and has no operation here."""
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedModel(f"config.json: hidden_act {activation!r} is not supported; supported: 'silu'")
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else quantization
        raise UnsupportedModel(
            f"config.json: quantization_config ({method}) is not supported; use the unquantized checkpoint or GGUF"
        )


def _positive(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise UnsupportedModel(f"config.json: key {key!r} is missing")
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise UnsupportedModel(f"config.json: {key} must be a positive integer, not {value!r}")
    return value


def _number(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise UnsupportedModel(f"config.json: {key} must be a number of 0 or more, not {value!r}")
    return float(value)


def _token_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    tokens = tuple(value) if isinstance(value, list | tuple) else (value,)
    if any(isinstance(token, bool) or not isinstance(token, int) for token in tokens):
        raise UnsupportedModel(f"config.json: eos_token_id must be a token id or a list of them, not {value!r}")
    return tokens


def _windows(config: Mapping[str, Any], layers: int, defaults: Defaults) -> tuple[int | None, ...]:
    """Each layer's window: by `layer_types` if given, else the family's rule."""
    window = config.get("sliding_window", defaults.sliding_window)
    first = 0
    if defaults.uses_windows is None:
        first = int(_number(config, "max_window_layers", 28))
        if not config.get("use_sliding_window", False):
            window = None
    elif not defaults.uses_windows:
        window = None
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window <= 0):
        raise UnsupportedModel(f"config.json: sliding_window must be a positive integer or null, not {window!r}")
    types = config.get("layer_types")
    if types is None:
        return tuple(window if layer >= first else None for layer in range(layers))
    if not isinstance(types, list | tuple):
        raise UnsupportedModel(f"config.json: layer_types must be a list, not {types!r}")
    known = {"full_attention": None, "sliding_attention": window}
    unknown = [kind for kind in types if kind not in known]
    if unknown or len(types) != layers:
        what = f"{unknown[0]!r} in layer_types is not supported" if unknown else f"layer_types has {len(types)} entries"
        raise UnsupportedModel(
            f"config.json: {what}; expected {layers} of 'full_attention' and 'sliding_attention' (num_hidden_layers)"
        )
    return tuple(known[kind] for kind in types)


def _rope(config: Mapping[str, Any], head_dim: int, max_positions: int) -> RopeConfig:
    """From ``rope_parameters``, or the older ``rope_theta`` and ``rope_scaling``."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise UnsupportedModel(f"config.json: rope_parameters must be a mapping, not {given!r}")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise UnsupportedModel(f"config.json: rope type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}")

    def number(key: str, default: float | None) -> float | None:
        value = given.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UnsupportedModel(f"config.json: {key} of rope {kind!r} must be a number, not {value!r}")
        return float(value)

    def required(key: str, default: float) -> float:
        value = number(key, default)
        assert value is not None
        return value

    if kind in ("linear", "dynamic", "llama3") and number("factor", None) is None:
        raise UnsupportedModel(f"config.json: rope {kind!r} needs a factor")
    original = config.get("original_max_position_embeddings") or required(
        "original_max_position_embeddings", max_positions
    )
    share = number("partial_rotary_factor", None)
    if share is None:
        share = float(config.get("partial_rotary_factor") or 1.0)
    theta = number("rope_theta", None)
    factor = number("factor", None)
    if factor is None:
        factor = max_positions / float(original) if kind == "yarn" else 1.0
    try:
        return RopeConfig(
            rotary_dim=int(head_dim * share),
            theta=float(config.get("rope_theta") or 10000.0) if theta is None else theta,
            type=str(kind),
            factor=factor,
            max_positions=max_positions,
            original_max_positions=int(original),
            low_freq_factor=required("low_freq_factor", 1.0),
            high_freq_factor=required("high_freq_factor", 4.0),
            beta_fast=required("beta_fast", 32.0),
            beta_slow=required("beta_slow", 1.0),
            attention_factor=number("attention_factor", None),
            mscale=number("mscale", None),
            mscale_all_dim=number("mscale_all_dim", None),
            truncate=bool(given.get("truncate", True)),
            frequency_factors=tuple(float(value) for value in given.get("frequency_factors") or ()),
        )
    except ValueError as error:
        raise UnsupportedModel(f"config.json: {error}") from None
