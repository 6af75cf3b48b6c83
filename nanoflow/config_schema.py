"""The sections and keys of a run's YAML: their types, ranges, defaults and descriptions.

Paths of inputs are relative to the folder of the YAML file, the output's path to the working folder; in a loaded
`RunConfig` all of them are absolute, so that a saved one means the same wherever it is read.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from nanoflow.sampling_params import SamplingParams

__all__ = [
    "EngineSection",
    "Length",
    "LognormalLength",
    "ModelSection",
    "OutputSection",
    "PipelineSection",
    "RunConfig",
    "SyntheticSection",
    "TraceSection",
    "WorkloadSection",
]

SIZE = re.compile(r"\d+(\.\d+)?\s*([KMGT]i?)?B", re.IGNORECASE)
DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


def _auto_or_count(value: Any) -> Any:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError("it must be auto or a whole number of at least 1")


def _kv_memory(value: Any) -> Any:
    if value == "auto" or (isinstance(value, str) and SIZE.fullmatch(value.strip())):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value > 1:
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1:
        return float(value)
    raise ValueError("it must be auto, a fraction such as 0.5, or a size such as 4GiB, 512MB or a number of bytes")


def _device(value: Any) -> Any:
    if isinstance(value, str) and DEVICE.fullmatch(value):
        return value
    raise ValueError("it must be auto, cpu, cuda or cuda:N")


def _range(value: Any) -> Any:
    if isinstance(value, list | tuple) and len(value) == 2:
        return tuple(value)
    raise ValueError("it must be [low, high]")


AutoOrCount = Annotated[int | Literal["auto"], BeforeValidator(_auto_or_count)]
Count = Annotated[int, Field(ge=1)]
Range = Annotated[tuple[Count, Count], BeforeValidator(_range)]
Name = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """A frozen section that refuses unknown keys and does not turn one type into another."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelSection(Section):
    """Which model, and how its weights are held."""

    path: Name = Field(
        description="A Hugging Face folder, a .gguf file, package:IMPORT_NAME/FILE, or a Hub id such as org/name."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Of weights and activations; auto: bfloat16 on a GPU, float32 on a CPU."
    )
    weights: Literal["load", "random"] = Field(
        "load", description="random needs nothing but the model's config.json: for measuring speed."
    )


class TraceSection(Section):
    """Request lengths from a CSV file with the columns ContextTokens and GeneratedTokens; the tokens are random."""

    path: Name = Field(description="The CSV file.")
    first: Count | None = Field(None, description="Take only this many rows, from the top; null: all.")
    max_input: Count | None = Field(None, description="Longer prompts are cut to this many tokens; null: as they are.")
    max_output: Count | None = Field(None, description="Longer outputs are cut to this many tokens; null: as they are.")
    seed: int = Field(0, ge=0, description="Of the random token ids.")


class LognormalLength(Section):
    """Lengths whose logarithm is normal, as the lengths of real prompts roughly are."""

    mean: float = Field(gt=0, description="Mean length in tokens, before the cut to min and max.")
    sigma: float = Field(ge=0, description="Standard deviation of the natural logarithm of the length.")
    min: Count = Field(1, description="Shorter lengths become this.")
    max: Count | None = Field(None, description="Longer lengths become this; null: no limit.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max ({self.max}) must be at least min ({self.min})")
        return self


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
    lognormal: LognormalLength | None = Field(None, description="Lengths whose logarithm is normal.")

    @model_validator(mode="before")
    @classmethod
    def _number_is_constant(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            return {"constant": value}
        if not isinstance(value, dict | Length):
            raise ValueError("it must be a number, {uniform: [low, high]} or {lognormal: {mean: M, sigma: S}}")
        return value

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if sum(v is not None for v in (self.constant, self.uniform, self.lognormal)) != 1:
            raise ValueError("it must have exactly one of constant, uniform and lognormal")
        if self.uniform is not None and self.uniform[0] > self.uniform[1]:
            raise ValueError("uniform must be [low, high] with low no larger than high")
        return self

    def sample(self, generator: np.random.Generator, count: int) -> NDArray[np.int64]:
        """`count` lengths in tokens, each at least 1."""
        if self.uniform is not None:
            return generator.integers(self.uniform[0], self.uniform[1], count, endpoint=True)
        if self.lognormal is not None:
            # The mean of exp(N(mu, sigma^2)) is exp(mu + sigma^2 / 2).
            spec = self.lognormal
            mu = np.log(spec.mean) - spec.sigma**2 / 2
            drawn = np.rint(np.minimum(generator.lognormal(mu, spec.sigma, count), 2.0**31))
            return np.clip(drawn, spec.min, spec.max).astype(np.int64)
        assert self.constant is not None
        return np.full(count, self.constant, dtype=np.int64)


class SyntheticSection(Section):
    """Random prompts; outputs have exactly the drawn length (end-of-sequence is ignored)."""

    input_len: Length = Field(description="Tokens of a prompt: N, {uniform: [A, B]} or {lognormal: {...}}.")
    output_len: Length = Field(description="Tokens of an output, in the same forms.")
    requests: Count = Field(100, description="How many requests.")
    seed: int = Field(0, ge=0, description="Of the lengths and the token ids.")


class WorkloadSection(Section):
    """What is to be run: exactly one of the keys is set."""

    input: Name | None = Field(None, description="A JSONL file: OpenAI batch lines, or the short form.")
    trace: TraceSection | None = Field(None, description="Request lengths from a CSV file.")
    synthetic: SyntheticSection | None = Field(None, description="Random requests.")

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [name for name in ("input", "trace", "synthetic") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"it must have exactly one of input, trace and synthetic, not {' and '.join(given) or 'none of them'}"
            )
        return self


class EngineSection(Section):
    """Sizes of the engine; what is auto is chosen from the model and the machine."""

    device: Annotated[str, BeforeValidator(_device)] = Field(
        "auto", description="auto (a GPU if there is one), cpu, cuda or cuda:N."
    )
    max_batch_tokens: Count = Field(2048, description="The most rows (tokens) of one iteration's dense batch.")
    max_running: Count = Field(1024, description="The most sequences that hold KV pages at a time.")
    max_model_len: AutoOrCount = Field("auto", description="Tokens of a prompt with its output; auto: the model's own.")
    page_size: AutoOrCount = Field("auto", description="Tokens of a KV page.")
    kv_memory: Annotated[float | int | str, BeforeValidator(_kv_memory)] = Field(
        "auto",
        description="For the KV cache: a fraction, bytes such as 4GiB, or auto (on a GPU what is left of 92%; on a CPU "
        "what the job can use, at most a quarter of what is free).",
    )


class PipelineSection(Section):
    """How an iteration is cut into nano-batches and ordered."""

    plan: Name = Field("sequential", description="sequential, auto (from the plan store), or a plan's YAML file.")


class OutputSection(Section):
    """Where results go."""

    path: Name = Field("out/completions.jsonl", description="A JSONL file, relative to the working folder.")

    @property
    def report_path(self) -> Path:
        """``out/x.report.json`` beside ``out/x.jsonl``."""
        return self._beside(".report.json")

    @property
    def config_path(self) -> Path:
        """``out/x.config.yaml`` beside ``out/x.jsonl``: the resolved configuration."""
        return self._beside(".config.yaml")

    def _beside(self, ending: str) -> Path:
        path = Path(self.path)
        return path.with_name(path.name.removesuffix(".jsonl") + ending)


class RunConfig(Section):
    """One run. Everything but `model.path` and a workload has a default."""

    model: ModelSection = Field(description="Which model.")
    workload: WorkloadSection = Field(description="What to run.")
    sampling: SamplingParams = Field(
        default_factory=SamplingParams, description="Defaults of the sampling parameters; a line's own values win."
    )
    engine: EngineSection = Field(default_factory=lambda: EngineSection(), description="Sizes of the engine.")
    pipeline: PipelineSection = Field(
        default_factory=lambda: PipelineSection(), description="Nano-batches and their order."
    )
    output: OutputSection = Field(default_factory=lambda: OutputSection(), description="Where results go.")
