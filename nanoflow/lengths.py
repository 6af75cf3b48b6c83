"""Distributions of lengths in tokens, and those of the paper's datasets."""

from typing import Annotated, Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from nanoflow.section import Count, Section

__all__ = ["PRESETS", "Length", "LognormalLength", "NormalLength"]

LONGEST = 2.0**31
"""Draws are cut here before they become whole numbers; no context is nearly as long."""

Mean = Annotated[float, Field(ge=1, le=LONGEST)]
Deviation = Annotated[float, Field(ge=0, le=LONGEST)]


def _range(value: Any) -> Any:
    if isinstance(value, list | tuple) and len(value) == 2:
        return tuple(value)
    raise ValueError("it must be [low, high]")


Range = Annotated[tuple[Count, Count], BeforeValidator(_range)]


class _Bounded(Section):
    """Draws outside of the bounds become the bound, which moves the mean; keep them few."""

    min: Count = Field(1, description="Shorter lengths become this.")
    max: Count | None = Field(None, description="Longer lengths become this; null: no limit.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max ({self.max}) must be at least min ({self.min})")
        return self

    def _cut(self, drawn: NDArray[np.float64]) -> NDArray[np.int64]:
        whole = np.rint(np.clip(drawn, 0, LONGEST))
        return np.clip(whole, self.min, self.max).astype(np.int64)


class NormalLength(_Bounded):
    """Lengths around a mean. Where std is large beside the mean, many draws are cut to `min`: use lognormal there."""

    mean: Mean = Field(description="Mean length in tokens, before the cut to min and max.")
    std: Deviation = Field(description="Standard deviation in tokens, before that cut.")

    def sample(self, generator: np.random.Generator, count: int) -> NDArray[np.int64]:
        """`count` lengths in tokens."""
        return self._cut(generator.normal(self.mean, self.std, count))


class LognormalLength(_Bounded):
    """Lengths whose logarithm is normal, as the lengths of real prompts roughly are: exactly one of sigma and std."""

    mean: Mean = Field(description="Mean length in tokens, before the cut to min and max.")
    sigma: float | None = Field(
        None, ge=0, le=100, description="Standard deviation of the natural logarithm of the length."
    )
    std: Deviation | None = Field(None, description="Standard deviation in tokens, before the cut to min and max.")

    @model_validator(mode="after")
    def _one_deviation(self) -> Self:
        if (self.sigma is None) == (self.std is None):
            raise ValueError("it must have exactly one of sigma (of the logarithm) and std (in tokens)")
        return self

    def sample(self, generator: np.random.Generator, count: int) -> NDArray[np.int64]:
        """`count` lengths in tokens."""
        # exp(N(mu, sigma^2)) has the mean exp(mu + sigma^2 / 2), and (std / mean)^2 = exp(sigma^2) - 1.
        if self.sigma is not None:
            sigma = self.sigma
        else:
            assert self.std is not None
            sigma = float(np.sqrt(2 * np.log(np.hypot(1.0, self.std / self.mean))))
        mu = np.log(self.mean) - sigma**2 / 2
        with np.errstate(over="ignore"):  # an infinite draw is cut like any other long one
            return self._cut(generator.lognormal(mu, sigma, count))


def _number_or_section(schema: dict[str, Any]) -> None:
    section = dict(schema)
    schema.clear()
    schema["anyOf"] = [{"type": "integer", "minimum": 1}, section]


class Length(Section):
    """A distribution of lengths in tokens: exactly one of the keys is set. A bare number N means ``{constant: N}``."""

    model_config = ConfigDict(json_schema_extra=_number_or_section)

    constant: Count | None = Field(None, description="Every length is this.")
    uniform: Range | None = Field(
        None, description="[low, high]: every length from low to high is equally likely, both included."
    )
    normal: NormalLength | None = Field(None, description="Lengths around a mean.")
    lognormal: LognormalLength | None = Field(None, description="Lengths whose logarithm is normal.")

    @model_validator(mode="before")
    @classmethod
    def _number_is_constant(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            return {"constant": value}
        if not isinstance(value, dict | Length):
            raise ValueError(
                "it must be a number, {uniform: [low, high]}, {normal: {mean: M, std: S}} or "
                "{lognormal: {mean: M, std: S}}"
            )
        return value

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if sum(v is not None for v in (self.constant, self.uniform, self.normal, self.lognormal)) != 1:
            raise ValueError("it must have exactly one of constant, uniform, normal and lognormal")
        if self.uniform is not None and self.uniform[0] > self.uniform[1]:
            raise ValueError("uniform must be [low, high] with low no larger than high")
        return self

    def sample(self, generator: np.random.Generator, count: int) -> NDArray[np.int64]:
        """`count` lengths in tokens, each at least 1."""
        if self.uniform is not None:
            return generator.integers(self.uniform[0], self.uniform[1], count, endpoint=True)
        if self.normal is not None:
            return self.normal.sample(generator, count)
        if self.lognormal is not None:
            return self.lognormal.sample(generator, count)
        assert self.constant is not None
        return np.full(count, self.constant, dtype=np.int64)


def _lognormal(mean: float, std: float) -> Length:
    return Length(lognormal=LognormalLength(mean=mean, std=std))


PRESETS = {
    "splitwise": (_lognormal(1155, 1109), _lognormal(211, 163)),
    "lmsys": (_lognormal(102, 169), _lognormal(222, 210)),
    "sharegpt": (_lognormal(246, 547), _lognormal(322, 244)),
}
"""Lengths of prompts and of outputs: the means and standard deviations of table 4 of the NanoFlow paper (OSDI 2025,
arXiv 2408.12757). The paper gives no shape; lognormal is ours, since all are positive and most deviate by about
their mean."""
