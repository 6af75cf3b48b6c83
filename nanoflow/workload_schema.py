"""The keys of a workload: traces, synthetic requests, and when requests arrive."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from nanoflow.lengths import PRESETS, Length
from nanoflow.section import Count, Name, Section

__all__ = ["ArrivalSection", "ColumnsSection", "PruneSection", "SyntheticSection", "TraceSection", "also_words"]


def also_words(*words: str | bool) -> Any:
    """For a field's `json_schema_extra`: these words stand for a section too."""

    def extend(schema: dict[str, Any]) -> None:
        schema["anyOf"].append({"enum": list(words)})

    return extend


Rate = Annotated[float, Field(ge=1e-6, le=1e9)]
"""Requests a second."""
Preset = Literal["splitwise", "lmsys", "sharegpt"]


class ColumnsSection(Section):
    """Names of a CSV trace's columns; null: the known name that the file has."""

    input: Name | None = Field(None, description="Tokens of the prompt.")
    output: Name | None = Field(None, description="Tokens of the output.")
    arrival: Name | None = Field(None, description="When the request came: seconds, or a date with a time.")


class PruneSection(Section):
    """Requests of a trace that are left out, by their tokens as they are in the file; null: no limit."""

    min_input: Count | None = Field(None, description="Leave out requests with a shorter prompt.")
    min_output: Count | None = Field(None, description="Leave out requests with a shorter output.")
    max_input: Count | None = Field(None, description="Leave out requests with a longer prompt.")
    max_total: Count | None = Field(None, description="Leave out requests with more tokens of prompt and output.")

    def keep(self, input_len: int, output_len: int) -> bool:
        """Whether a request of these lengths stays."""
        return (
            input_len >= (self.min_input or 0)
            and output_len >= (self.min_output or 0)
            and (self.max_input is None or input_len <= self.max_input)
            and (self.max_total is None or input_len + output_len <= self.max_total)
        )


SHAREGPT_PRUNE = PruneSection(min_input=4, min_output=4, max_input=1024, max_total=2048)
"""What vLLM's and other benchmark scripts leave out of ShareGPT's conversations."""


def _prune_words(value: Any) -> Any:
    if value == "auto":
        return None
    return {} if value == "none" else value


class TraceSection(Section):
    """Request lengths from a CSV file (the prompts' tokens are random), or prompts and lengths from ShareGPT's JSON."""

    path: Name = Field(description="A CSV file, or ShareGPT's JSON: a list of conversations.")
    format: Literal["auto", "csv", "sharegpt"] = Field("auto", description="auto: sharegpt if the path ends in .json.")
    columns: ColumnsSection = Field(
        default_factory=lambda: ColumnsSection(), description="Names of the CSV file's columns, where not known ones."
    )
    prune: Annotated[PruneSection | None, BeforeValidator(_prune_words)] = Field(
        None,
        description="Requests to leave out, none, or auto: none of a CSV file; of ShareGPT what vLLM's benchmarks do "
        "({min_input: 4, min_output: 4, max_input: 1024, max_total: 2048}).",
        json_schema_extra=also_words("auto", "none"),
    )
    shuffle: bool = Field(False, description="Take the requests in a random order, drawn from seed.")
    first: Count | None = Field(None, description="Take only this many requests, after prune and shuffle; null: all.")
    max_input: Count | None = Field(None, description="Longer prompts are cut to this many tokens; null: as they are.")
    max_output: Count | None = Field(None, description="Longer outputs are cut to this many tokens; null: as they are.")
    seed: int = Field(0, ge=0, description="Of the random token ids and of shuffle.")

    @property
    def sharegpt(self) -> bool:
        """Whether the file is ShareGPT's JSON and no CSV file."""
        return self.format == "sharegpt" or (self.format == "auto" and self.path.lower().endswith(".json"))

    @property
    def limits(self) -> PruneSection:
        """What is left out."""
        if self.prune is not None:
            return self.prune
        return SHAREGPT_PRUNE if self.sharegpt else PruneSection()


class SyntheticSection(Section):
    """Random prompts; outputs have exactly the drawn length (end-of-sequence is ignored)."""

    preset: Preset | None = Field(
        None, description="Lengths with a dataset's means and deviations, in place of input_len and output_len."
    )
    input_len: Length | None = Field(
        None, description="Tokens of a prompt: N, {uniform: [A, B]}, {normal: {...}} or {lognormal: {...}}."
    )
    output_len: Length | None = Field(None, description="Tokens of an output, in the same forms.")
    max_input: Count | None = Field(None, description="Longer prompts are cut to this many tokens; null: as drawn.")
    max_output: Count | None = Field(None, description="Longer outputs are cut to this many tokens; null: as drawn.")
    requests: Count = Field(100, description="How many requests.")
    seed: int = Field(0, ge=0, description="Of the lengths and the token ids.")

    @model_validator(mode="after")
    def _preset_or_lengths(self) -> Self:
        given = [name for name in ("input_len", "output_len") if getattr(self, name) is not None]
        if self.preset is not None and given:
            raise ValueError(f"preset: {self.preset} stands in place of {given[0]}; give one of them")
        if self.preset is None and len(given) < 2:
            missing = "output_len" if given == ["input_len"] else "input_len"
            raise ValueError(f"{missing} is missing; give input_len and output_len, or preset: {', '.join(PRESETS)}")
        return self

    @property
    def lengths(self) -> tuple[Length, Length]:
        """Of prompts and of outputs."""
        if self.preset is not None:
            return PRESETS[self.preset]
        assert self.input_len is not None and self.output_len is not None
        return self.input_len, self.output_len


class GammaArrival(Section):
    """Gaps between requests with a gamma distribution of shape `burstiness` and mean 1 / `rate`."""

    rate: Rate = Field(description="Requests a second, on average.")
    burstiness: float = Field(
        1.0,
        ge=1e-3,
        le=1e6,
        description="1: as poisson; below 1 in bursts; above 1 more regular (vLLM's option of that name).",
    )


class TraceArrival(Section):
    """The times of the trace's rows, from the earliest of the rows that are taken."""

    speed: float = Field(1.0, ge=1e-6, le=1e9, description="2: twice as fast as it was recorded.")


FORMS = "it must be none, trace, {poisson: RATE}, {constant: RATE} or {gamma: {rate: RATE, burstiness: B}}"


def _word_or_section(schema: dict[str, Any]) -> None:
    section = dict(schema)
    schema.clear()
    schema["anyOf"] = [{"enum": ["trace"]}, section]


class ArrivalSection(Section):
    """When requests arrive: exactly one of poisson, constant, gamma and trace is set."""

    model_config = ConfigDict(json_schema_extra=_word_or_section)

    poisson: Rate | None = Field(None, description="Requests a second; the gaps are exponential.")
    constant: Rate | None = Field(None, description="Requests a second, at equal distances.")
    gamma: GammaArrival | None = Field(None, description="Requests in bursts, or more regular than poisson.")
    trace: TraceArrival | None = Field(
        None, description="true: the times of the trace's rows.", json_schema_extra=also_words(True)
    )
    seed: int = Field(0, ge=0, description="Of the gaps.")

    @model_validator(mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        if value == "trace":
            value = {"trace": True}
        if not isinstance(value, dict):
            if isinstance(value, ArrivalSection):
                return value
            raise ValueError(FORMS)
        if value.get("trace") is True:
            value = {**value, "trace": {}}
        return value

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if sum(v is not None for v in (self.poisson, self.constant, self.gamma, self.trace)) != 1:
            raise ValueError("it must have exactly one of poisson, constant, gamma and trace")
        return self
