"""How the tokens of one request are chosen: the same class for a run's defaults, a line of input and the Python API."""

from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema, field_validator

from nanoflow.errors import ParameterError
from nanoflow.structured_outputs import StructuredOutputs
from nanoflow.validation import explain, text_keys

__all__ = ["MAX_LOGPROBS", "SamplingParams"]

MAX_LOGPROBS = 20
"""The most alternatives a position that `logprobs` may ask for, as in OpenAI's chat API."""

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
StopString = Annotated[str, Field(min_length=1)]
STRING_OR_STRINGS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string", "minLength": 1}}]}
LogitBias = Annotated[float, Field(ge=-100, le=100)]


class SamplingParams(BaseModel):
    """Sampling parameters of one request; immutable. Names and ranges are those of OpenAI's API and of vLLM.

    Raises `ParameterError` (a ValueError) that names the parameter, the value and what is allowed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    temperature: float = Field(0.0, ge=0, description="Divides the logits; 0 takes the most likely token (greedy).")
    top_k: int = Field(0, ge=0, description="Sample among this many most likely tokens; 0 (or -1): all.")
    top_p: float = Field(
        1.0, gt=0, le=1, description="Sample among the most likely tokens that hold this much probability."
    )
    min_p: float = Field(
        0.0, ge=0, le=1, description="Drop tokens less likely than this fraction of the most likely one."
    )
    repetition_penalty: float = Field(
        1.0, gt=0, description="Divides positive and multiplies negative logits of tokens seen in prompt or output."
    )
    presence_penalty: float = Field(
        0.0, ge=-2, le=2, description="Subtracted from the logit of every token already in the output."
    )
    frequency_penalty: float = Field(
        0.0, ge=-2, le=2, description="Subtracted from a token's logit once for each time it is in the output."
    )
    logit_bias: dict[TokenId, LogitBias] = Field(
        default_factory=dict, description="Added to the logits, by token id; from -100 to 100."
    )
    stop: Annotated[tuple[StopString, ...], WithJsonSchema(STRING_OR_STRINGS)] = Field(
        (), description="Strings that end the output; the string itself is left out. One string or a list."
    )
    stop_token_ids: tuple[TokenId, ...] = Field((), description="Token ids that end the output.")
    ignore_eos: bool = Field(False, description="Go on after the end-of-sequence token, up to max_tokens.")
    max_tokens: int = Field(64, ge=1, description="The most tokens to generate.")
    seed: int | None = Field(
        None,
        ge=-(2**63),
        lt=2**64,
        description="Seed of this request's random numbers; null: derived from its place in the input.",
    )
    n: int = Field(1, ge=1, le=128, description="Completions to make for the prompt.")
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Null: no log-probabilities; k: those of the chosen token and of the k most likely ones.",
    )
    structured_outputs: Annotated[StructuredOutputs | None, BeforeValidator(text_keys)] = Field(
        None, description="The form that the output must have, such as a JSON schema; null: any text."
    )
    skip_special_tokens: bool = Field(True, description="Leave special tokens out of the text.")

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            key, problem = explain(error.errors()[0], type(self))
            raise ParameterError(key, problem) from None

    @field_validator("top_k", mode="before")
    @classmethod
    def _minus_one_is_off(cls, value: Any) -> Any:
        return 0 if value == -1 and not isinstance(value, bool) else value

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_as_tuple(cls, value: Any) -> Any:
        value = () if value is None else (value,) if isinstance(value, str) else value
        return _as_tuple(value, "it must be a string or a list of strings")

    @field_validator("stop_token_ids", mode="before")
    @classmethod
    def _ids_as_tuple(cls, value: Any) -> Any:
        return _as_tuple(() if value is None else value, "it must be a list of token ids")

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _bias_keys_as_ids(cls, value: Any) -> Any:
        """JSON's object keys are strings: ``{"42": -100}`` biases token 42."""
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise ValueError("it must map token ids to numbers from -100 to 100")
        return {int(k) if isinstance(k, str) and k.isascii() and k.isdigit() else k: v for k, v in value.items()}

    def replace(self, **changes: Any) -> Self:
        """A copy with some parameters changed, checked like a new one."""
        return type(self)(**{**{name: getattr(self, name) for name in type(self).model_fields}, **changes})

    @property
    def greedy(self) -> bool:
        """Whether the most likely token (after penalties and bias) is always taken."""
        return self.temperature == 0

    @property
    def uses_penalties(self) -> bool:
        """Whether the tokens seen so far change the logits, so that counts must be kept."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def _as_tuple(value: Any, otherwise: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(otherwise)
    return tuple(value)
