"""The sections and keys of a run's YAML: their types, ranges, defaults and descriptions.

Paths of inputs are relative to the folder of the YAML file, the output's path to the working folder; in a loaded
`RunConfig` all of them are absolute, so that a saved one means the same wherever it is read.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from nanoflow.sampling_params import SamplingParams
from nanoflow.section import Count, Name, Section
from nanoflow.validation import text_keys
from nanoflow.workload_schema import ArrivalSection, SyntheticSection, TraceSection, also_words

__all__ = [
    "EngineSection",
    "MetricsSection",
    "ModelSection",
    "OutputSection",
    "ParallelSection",
    "PipelineSection",
    "ReportSection",
    "RunConfig",
    "SloSection",
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


def _as_items(value: Any) -> Any:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list | tuple):
        return tuple(value)
    raise ValueError("it must be a path, or a list of paths")


def _none_is_null(value: Any) -> Any:
    return None if value == "none" else value


AutoOrCount = Annotated[int | Literal["auto"], BeforeValidator(_auto_or_count)]
STRING_OR_STRINGS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}
Inputs = Annotated[tuple[Name, ...], Field(min_length=1), BeforeValidator(_as_items), WithJsonSchema(STRING_OR_STRINGS)]
Arrival = Annotated[ArrivalSection | None, BeforeValidator(_none_is_null)]


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


class WorkloadSection(Section):
    """What is to be run: exactly one of input, trace and synthetic is set."""

    input: Inputs | None = Field(
        None,
        description="JSONL (OpenAI batch lines, or the short form), plain, .gz or .zst: a file, a folder, a glob, a "
        "list of these, or - for standard input.",
    )
    trace: TraceSection | None = Field(None, description="Request lengths from a CSV file.")
    synthetic: SyntheticSection | None = Field(None, description="Random requests.")
    arrival: Arrival = Field(
        None,
        description="When requests arrive: none (all are there from the start), trace, {poisson: RATE}, "
        "{constant: RATE} or {gamma: {rate: RATE, burstiness: B}}, in requests a second.",
        json_schema_extra=also_words("none"),
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [name for name in ("input", "trace", "synthetic") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"it must have exactly one of input, trace and synthetic, not {' and '.join(given) or 'none of them'}"
            )
        if self.arrival is not None and self.arrival.trace is not None and (self.trace is None or self.trace.sharegpt):
            without = given[0] if self.trace is None else "ShareGPT's JSON"
            raise ValueError(f"arrival: trace needs a CSV trace, and {without} has no times; use poisson, for example")
        return self


class EngineSection(Section):
    """Sizes of the engine; what is auto is chosen from the model and the machine."""

    device: Annotated[str, BeforeValidator(_device)] = Field(
        "auto", description="auto (a GPU if there is one), cpu, cuda or cuda:N."
    )
    max_batch_tokens: Count = Field(2048, description="The most rows (tokens) of one iteration's dense batch.")
    max_running: Count = Field(1024, description="The most sequences that hold KV pages at a time.")
    order: Literal["input", "longest-first"] = Field(
        "input",
        description="Which waiting request is admitted next: the first of the input, or the one that may have the most "
        "output tokens (then the longest prompt), so that no long one is left over at the end. Tokens stay the same.",
    )
    max_model_len: AutoOrCount = Field("auto", description="Tokens of a prompt with its output; auto: the model's own.")
    cuda_graphs: bool = Field(
        True, description="On a GPU, capture whole iterations; false launches every kernel on its own, to find faults."
    )
    page_size: AutoOrCount = Field("auto", description="Tokens of a KV page.")
    kv_memory: Annotated[float | int | str, BeforeValidator(_kv_memory)] = Field(
        "auto",
        description="For the KV cache: a fraction, bytes such as 4GiB, or auto (on a GPU what is left of 92%; on a CPU "
        "what the job can use, at most a quarter of what is free).",
    )


class PipelineSection(Section):
    """How an iteration is cut into nano-batches and ordered."""

    plan: Name = Field(
        "auto",
        description="auto (stored plans that were measured to win here, else sequential), sequential, or a plan's YAML "
        "file.",
    )


class ParallelSection(Section):
    """How the run is spread over GPUs of this machine (on a CPU: over processes)."""

    tensor: Count = Field(
        1,
        description="GPUs that share every layer, from engine.device on: each holds its part of the weights and of the "
        "KV cache.",
    )
    data: Count = Field(
        1, description="Replicas of the model, each on `tensor` GPUs of its own, behind one queue of requests."
    )


class OutputSection(Section):
    """Where results go."""

    path: Name = Field("out/completions.jsonl", description="A JSONL file, relative to the working folder.")
    sort: bool = Field(
        False,
        description="Whether a complete output is put into the order of the input; until then its lines are in the "
        "order in which requests finish.",
    )

    @property
    def report_path(self) -> Path:
        """``out/x.report.json`` beside ``out/x.jsonl``."""
        return self._beside(".report.json")

    @property
    def state_path(self) -> Path:
        """``out/x.state.json`` beside ``out/x.jsonl``: what tells this run from others, for going on with it."""
        return self._beside(".state.json")

    @property
    def config_path(self) -> Path:
        """``out/x.config.yaml`` beside ``out/x.jsonl``: the resolved configuration."""
        return self._beside(".config.yaml")

    @property
    def series_path(self) -> Path:
        """``out/x.series.jsonl`` beside ``out/x.jsonl``: the run's course over time."""
        return self._beside(".series.jsonl")

    @property
    def bench_path(self) -> Path:
        """``out/x.bench.json`` beside ``out/x.jsonl``: what `nanoflow bench` measured."""
        return self._beside(".bench.json")

    def _beside(self, ending: str) -> Path:
        path = Path(self.path)
        return path.with_name(path.name.removesuffix(".jsonl") + ending)


class SloSection(Section):
    """A latency objective: the report says how many requests met both."""

    ttft_ms: float = Field(gt=0, description="Most milliseconds from a request's arrival to its first token.")
    tpot_ms: float = Field(gt=0, description="Most milliseconds for each token after the first, on average.")


class ReportSection(Section):
    """What is measured beside the results."""

    series_seconds: float = Field(
        1.0, ge=0.01, le=3600, description="Seconds of an interval of the time series; one line each."
    )
    slo: SloSection | None = Field(None, description="A latency objective, for the goodput; null: none.")


class MetricsSection(Section):
    """A Prometheus endpoint while the run goes on."""

    port: int | None = Field(None, ge=0, le=65535, description="Its TCP port; 0: a free one; null: no endpoint.")
    host: Name = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 opens it to the network.")


class RunConfig(Section):
    """One run. Everything but `model.path` and a workload has a default."""

    model: ModelSection = Field(description="Which model.")
    workload: WorkloadSection = Field(description="What to run.")
    sampling: Annotated[SamplingParams, BeforeValidator(text_keys)] = Field(
        default_factory=SamplingParams, description="Defaults of the sampling parameters; a line's own values win."
    )
    engine: EngineSection = Field(default_factory=lambda: EngineSection(), description="Sizes of the engine.")
    pipeline: PipelineSection = Field(
        default_factory=lambda: PipelineSection(), description="Nano-batches and their order."
    )
    parallel: ParallelSection = Field(
        default_factory=lambda: ParallelSection(), description="GPUs that the run is spread over."
    )
    output: OutputSection = Field(default_factory=lambda: OutputSection(), description="Where results go.")
    report: ReportSection = Field(default_factory=lambda: ReportSection(), description="What is measured.")
    metrics: MetricsSection = Field(
        default_factory=lambda: MetricsSection(), description="A Prometheus endpoint while the run goes on."
    )
