"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) and the write of keys and values to the KV cache.

A head's first `rotary_dim` elements are rotated in pairs ``(i, i + rotary_dim / 2)`` by the angle
``position * inv_freq[i]``. Frequencies, angles and their cosines are computed in float32, as transformers does.

Shape legend: T rows, H query heads, K key/value heads, D head size, R half of the rotated elements.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch

from nanoflow.ops.norm import QKNorm, rms_norm
from nanoflow.ops.operation import KV, Access, Cost, Kernel, NanoContext, Operation, Weight, Work, triton_on_cuda

__all__ = ["ROPE_TYPES", "Append", "Rope", "RopeAppend", "RopeConfig", "rope_tables"]

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True)
class RopeConfig:
    """A model's rotary embedding. Fields that a type does not use are ignored.

    `dynamic` (NTK-aware) raises the base with the length once it passes `max_positions`. Here the length is the row's
    own position plus one, so that a token's rotation never depends on how its prompt was chunked; transformers does the
    same for tokens decoded one by one, but uses the prompt's last position for all rows of a prompt longer than
    `max_positions`.
    """

    rotary_dim: int
    theta: float = 10000.0
    type: str = "default"
    factor: float = 1.0
    max_positions: int = 2048
    """The model's context (`dynamic`)."""
    original_max_positions: int = 2048
    """The context before it was extended (`yarn`, `llama3`)."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    frequency_factors: tuple[float, ...] = ()
    """Divisors of the frequencies, one a pair (GGUF's `rope_freqs`); applied after the type's own scaling."""

    def __post_init__(self) -> None:
        if self.type not in ROPE_TYPES:
            raise ValueError(f"rope type {self.type!r} is not one of {', '.join(ROPE_TYPES)}")
        if self.rotary_dim <= 0 or self.rotary_dim % 2:
            raise ValueError(f"rotary_dim must be positive and even, not {self.rotary_dim}")
        if self.frequency_factors and len(self.frequency_factors) != self.rotary_dim // 2:
            raise ValueError(f"{len(self.frequency_factors)} frequency factors for {self.rotary_dim // 2} pairs")

    @property
    def attention_scaling(self) -> float:
        """Factor of the cosines and sines (`yarn`, Peng et al. 2023, arXiv 2309.00071); 1 for the other types."""
        if self.type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return _yarn_scale(self.factor, self.mscale) / _yarn_scale(self.factor, self.mscale_all_dim)
        return _yarn_scale(self.factor, 1.0)

    def inverse_frequencies(self, device: torch.device) -> torch.Tensor:
        """[R] float32: angle of each pair at position 1 (for `dynamic`: within `max_positions`)."""
        exponent_R = torch.arange(0, self.rotary_dim, 2, dtype=torch.float32, device=device) / self.rotary_dim
        inv_freq_R = 1.0 / (self.theta**exponent_R)
        if self.type == "linear":
            inv_freq_R = inv_freq_R / self.factor
        elif self.type == "yarn":
            inv_freq_R = self._yarn(1.0 / inv_freq_R)
        elif self.type == "llama3":
            inv_freq_R = self._llama3(inv_freq_R)
        if self.frequency_factors:
            inv_freq_R = inv_freq_R / torch.tensor(self.frequency_factors, dtype=torch.float32, device=device)
        return inv_freq_R

    def _yarn(self, wavelength_R: torch.Tensor) -> torch.Tensor:
        # Pairs that turn more than beta_fast times in the original context keep their frequency, those that turn less
        # than beta_slow times are interpolated, and a linear ramp joins the two.
        def pair(turns: float) -> float:
            length = self.original_max_positions / (turns * 2 * math.pi)
            return self.rotary_dim * math.log(length) / (2 * math.log(self.theta))

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.rotary_dim - 1)
        if low == high:
            high += 0.001
        index_R = torch.arange(len(wavelength_R), dtype=torch.float32, device=wavelength_R.device)
        keep_R = 1 - ((index_R - low) / (high - low)).clamp(0, 1)
        return 1.0 / (self.factor * wavelength_R) * (1 - keep_R) + 1.0 / wavelength_R * keep_R

    def _llama3(self, inv_freq_R: torch.Tensor) -> torch.Tensor:
        # As yarn, but the ramp runs over turns in the original context, from low_freq_factor to high_freq_factor.
        turns_R = self.original_max_positions * inv_freq_R / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        keep_R = ((turns_R - self.low_freq_factor) / span).clamp(0, 1)
        return inv_freq_R / self.factor * (1 - keep_R) + inv_freq_R * keep_R


def _yarn_scale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@lru_cache(maxsize=16)
def _frequencies(config: RopeConfig, device: torch.device) -> torch.Tensor:
    """`inverse_frequencies`, made once a device: no copy from the host while a CUDA graph is captured."""
    with torch.inference_mode(False):
        return config.inverse_frequencies(device)


def rope_tables(config: RopeConfig, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of every row's angles, both [T, R] float32."""
    inv_freq_R = _frequencies(config, positions_T.device)
    positions_T1 = positions_T.to(torch.float32).unsqueeze(-1)
    if config.type == "dynamic":
        length_T1 = (positions_T1 + 1).clamp(min=config.max_positions)
        stretch_T1 = config.factor * length_T1 / config.max_positions - (config.factor - 1)
        # base * stretch^(d / (d - 2)), to the power -2i / d: the stretch's share of the frequency.
        pair_R = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device=positions_T.device)
        angles_TR = positions_T1 * inv_freq_R * stretch_T1 ** (-pair_R / max(config.rotary_dim - 2, 1))
    else:
        angles_TR = positions_T1 * inv_freq_R
    scaling = config.attention_scaling
    return angles_TR.cos() * scaling, angles_TR.sin() * scaling


class _QKV(Operation):
    """What the operations on ``qkv`` rows share: ``[H query heads | K key heads | K value heads]``, each of size D."""

    resource = "memory"

    def __init__(self, name: str, qkv: str, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__(name)
        self.qkv = qkv
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_dim = head_dim

    def split(self, context: NanoContext) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views of the nano-batch's queries [T, H, D], keys [T, K, D] and values [T, K, D]."""
        heads_TND = torch.unflatten(context.rows(self.qkv), -1, (self.heads + 2 * self.kv_heads, self.head_dim))
        first_value = self.heads + self.kv_heads
        return heads_TND[:, : self.heads], heads_TND[:, self.heads : first_value], heads_TND[:, first_value:]

    def prepare_places(self, context: NanoContext, kernel: str) -> None:
        """What a kernel that writes to the KV cache asks for."""
        if kernel == "reference":
            self.places(context)
        else:
            context.batch.kv_index_T  # noqa: B018 - copied when it is first asked for

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.heads, self.kv_heads, self.head_dim

    def cosines(self, context: NanoContext, rope: RopeConfig) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [T, 1, R], the same in every layer of an iteration."""

        def make() -> tuple[torch.Tensor, torch.Tensor]:
            cos_TR, sin_TR = rope_tables(rope, context.batch.positions_T[context.part.rows])
            return cos_TR.unsqueeze(1), sin_TR.unsqueeze(1)

        return context.part.cached(("rope", rope), make)

    def places(self, context: NanoContext) -> tuple[torch.Tensor, torch.Tensor]:
        """Page and token in the page of each row's key and value, [T] both; padding rows' are in the reserved page."""

        def make() -> tuple[torch.Tensor, torch.Tensor]:
            index_T = context.batch.kv_index_T[context.part.rows]
            return index_T // context.batch.page_size, index_T % context.batch.page_size

        return context.part.cached("kv_write", make)

    def write_cache(self, context: NanoContext, k_TKD: torch.Tensor, v_TKD: torch.Tensor) -> None:
        """Writes keys and values [T, K, D] where the batch's `kv_index` says."""
        page_T, offset_T = self.places(context)
        context.kv[page_T, 0, :, offset_T] = k_TKD
        context.kv[page_T, 1, :, offset_T] = v_TKD


def _rotate(x_TND: torch.Tensor, cos_T1R: torch.Tensor, sin_T1R: torch.Tensor, out_TND: torch.Tensor) -> None:
    """Rotates [T, N, D] in float32 (or float64) and writes to `out_TND`, which may be `x_TND`."""
    half = cos_T1R.shape[-1]
    wide = x_TND.to(torch.promote_types(x_TND.dtype, torch.float32))
    first, second = wide[..., :half], wide[..., half : 2 * half]
    rotated = first * cos_T1R - second * sin_T1R
    out_second = second * cos_T1R + first * sin_T1R
    out_TND[..., :half] = rotated
    out_TND[..., half : 2 * half] = out_second
    if out_TND is not x_TND and 2 * half < x_TND.shape[-1]:
        out_TND[..., 2 * half :] = x_TND[..., 2 * half :]


class Rope(_QKV):
    """Rotates the queries and keys of ``qkv`` in place."""

    def __init__(self, name: str, qkv: str, heads: int, kv_heads: int, head_dim: int, rope: RopeConfig) -> None:
        super().__init__(name, qkv, heads, kv_heads, head_dim)
        self.rope = rope

    @property
    def accesses(self) -> tuple[Access, ...]:
        return (Access(self.qkv), Access(self.qkv, write=True))

    def cost(self, work: Work, itemsize: int) -> Cost:
        elements = work.rows * (self.heads + self.kv_heads) * self.head_dim
        return Cost(flops=3.0 * elements, bytes=2.0 * elements * itemsize)

    def reference(self, context: NanoContext) -> None:
        cos, sin = self.cosines(context, self.rope)
        q_THD, k_TKD, _ = self.split(context)
        _rotate(q_THD, cos, sin, q_THD)
        _rotate(k_TKD, cos, sin, k_TKD)

    def triton(self, context: NanoContext) -> None:
        """See `rope_triton`."""
        from nanoflow.ops import rope_triton

        cos_T1R, sin_T1R = self.cosines(context, self.rope)
        rope_triton.rope(context.rows(self.qkv), cos_T1R.squeeze(1), sin_T1R.squeeze(1), *self.sizes)

    @property
    def kernels(self) -> Mapping[str, Kernel]:
        return {"reference": self.reference, "triton": self.triton}

    def preferred_kernel(self, device: torch.device, dtype: torch.dtype, sms: int | None = None) -> str:
        return triton_on_cuda(device, dtype)

    def prepare(self, context: NanoContext, kernel: str) -> None:
        self.cosines(context, self.rope)


class Append(_QKV):
    """Writes the rows' keys and values to the KV cache."""

    @property
    def accesses(self) -> tuple[Access, ...]:
        return (Access(self.qkv), Access(KV, write=True))

    def cost(self, work: Work, itemsize: int) -> Cost:
        return Cost(bytes=4.0 * work.rows * self.kv_heads * self.head_dim * itemsize)

    def reference(self, context: NanoContext) -> None:
        _, k_TKD, v_TKD = self.split(context)
        self.write_cache(context, k_TKD, v_TKD)

    def triton(self, context: NanoContext) -> None:
        """See `rope_triton`."""
        from nanoflow.ops import rope_triton

        index_T = context.batch.kv_index_T[context.part.rows]
        rope_triton.append(context.rows(self.qkv), context.kv, index_T, *self.sizes)

    @property
    def kernels(self) -> Mapping[str, Kernel]:
        return {"reference": self.reference, "triton": self.triton}

    def preferred_kernel(self, device: torch.device, dtype: torch.dtype, sms: int | None = None) -> str:
        return triton_on_cuda(device, dtype)

    def prepare(self, context: NanoContext, kernel: str) -> None:
        self.prepare_places(context, kernel)


class RopeAppend(_QKV):
    """`Rope` and `Append` in one, after `norm` if given: finished queries stay in ``qkv``, finished keys go to the KV
    cache only."""

    def __init__(self, name: str, rope: Rope, norm: QKNorm | None = None) -> None:
        super().__init__(name, rope.qkv, rope.heads, rope.kv_heads, rope.head_dim)
        self.rope = rope.rope
        self.norm = norm

    @property
    def accesses(self) -> tuple[Access, ...]:
        return (Access(self.qkv), Access(self.qkv, write=True), Access(KV, write=True))

    @property
    def weights(self) -> tuple[Weight, ...]:
        return () if self.norm is None else self.norm.weights

    def cost(self, work: Work, itemsize: int) -> Cost:
        rotated = work.rows * (self.heads + self.kv_heads) * self.head_dim
        copied = work.rows * self.kv_heads * self.head_dim
        flops = 3.0 if self.norm is None else 7.0
        return Cost(flops=flops * rotated, bytes=2.0 * (rotated + copied) * itemsize)

    def reference(self, context: NanoContext) -> None:
        cos, sin = self.cosines(context, self.rope)
        q_THD, k_TKD, v_TKD = self.split(context)
        rotated_TKD = torch.empty_like(k_TKD)
        if self.norm is not None:
            rms_norm(q_THD, context.weights["q"], self.norm.eps, q_THD)
            rms_norm(k_TKD, context.weights["k"], self.norm.eps, rotated_TKD)
            k_TKD = rotated_TKD
        _rotate(q_THD, cos, sin, q_THD)
        _rotate(k_TKD, cos, sin, rotated_TKD)
        self.write_cache(context, rotated_TKD, v_TKD)

    def triton(self, context: NanoContext) -> None:
        """See `rope_triton`."""
        from nanoflow.ops import rope_triton

        cos_T1R, sin_T1R = self.cosines(context, self.rope)
        index_T = context.batch.kv_index_T[context.part.rows]
        weights = context.weights
        norm = None if self.norm is None else (weights["q"], weights["k"], self.norm.eps)
        tables = (cos_T1R.squeeze(1), sin_T1R.squeeze(1))
        rope_triton.rope_append(context.rows(self.qkv), *tables, context.kv, index_T, *self.sizes, norm)

    @property
    def kernels(self) -> Mapping[str, Kernel]:
        return {"reference": self.reference, "triton": self.triton}

    def preferred_kernel(self, device: torch.device, dtype: torch.dtype, sms: int | None = None) -> str:
        return triton_on_cuda(device, dtype)

    def prepare(self, context: NanoContext, kernel: str) -> None:
        self.cosines(context, self.rope)
        self.prepare_places(context, kernel)
