"""What an output must look like: a JSON schema, any JSON object, a regular expression, a choice or a grammar.

One class for a run's defaults, a line of input and the Python API; `from_body` maps the fields of OpenAI's API and of
vLLM's onto it.
"""

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from nanoflow.errors import ParameterError
from nanoflow.validation import explain, shorten

__all__ = ["FIELDS", "LONGEST_DESCRIPTION", "StructuredOutputs", "from_body"]

LONGEST_DESCRIPTION = 2**18
"""Characters that a schema, an expression, all choices or a grammar may have: it bounds the time to compile."""

KINDS = ("json_schema", "json_object", "regex", "choice", "grammar")
GUIDED = {f"guided_{kind}": kind for kind in ("json", "regex", "choice", "grammar")}
"""vLLM's older fields."""
FIELDS = frozenset({"response_format", *GUIDED})
"""Fields of a request's body, beside ``structured_outputs`` itself, that `from_body` reads."""

Text = Annotated[str, Field(min_length=1, max_length=LONGEST_DESCRIPTION)]


class StructuredOutputs(BaseModel):
    """The form of an output; exactly one of the kinds is given. Immutable.

    Raises `ParameterError` (a ValueError) that names the key, the value and what is allowed. Whether a grammar can be
    compiled shows only with a model: then the engine refuses the request.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    json_schema: dict[str, Any] | None = Field(
        None, description="A JSON schema (`json` is another name for this key); as an object, or as JSON text."
    )
    json_object: bool = Field(False, description="Any JSON object.")
    regex: Text | None = Field(None, description="A regular expression that the whole output matches.")
    choice: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(
        None, min_length=1, description="The output is one of these texts."
    )
    grammar: Text | None = Field(None, description="A context-free grammar: GBNF (llama.cpp's) or llguidance's Lark.")
    disable_any_whitespace: bool = Field(
        False, description="For JSON: no blanks between tokens; else up to one line break and its indentation."
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            key, problem = explain(error.errors()[0], type(self))
            raise ParameterError(key, problem) from None

    @model_validator(mode="before")
    @classmethod
    def _json_is_json_schema(cls, value: Any) -> Any:
        if not isinstance(value, dict) or "json" not in value:
            return value
        if value.get("json_schema") is not None:
            raise ValueError("json and json_schema are one key; give one of them")
        return {**{key: given for key, given in value.items() if key != "json"}, "json_schema": value["json"]}

    @field_validator("json_schema", mode="before")
    @classmethod
    def _schema_as_object(cls, value: Any) -> Any:
        if hasattr(value, "model_json_schema"):
            value = value.model_json_schema()  # a pydantic class
        try:
            if isinstance(value, str):
                value = json.loads(value)
            text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"it is not JSON ({error})") from None
        if len(text) > LONGEST_DESCRIPTION:
            raise ValueError(f"it has {len(text)} characters of JSON; at most {LONGEST_DESCRIPTION} are allowed")
        if value is not None and not isinstance(value, dict):
            raise ValueError("it must be a JSON schema, which is an object")
        return value

    @field_validator("choice", mode="before")
    @classmethod
    def _choice_as_tuple(cls, value: Any) -> Any:
        if value is None:
            return None
        if not isinstance(value, list | tuple):
            raise ValueError("it must be a list of texts")
        if sum(len(text) for text in value if isinstance(text, str)) > LONGEST_DESCRIPTION:
            raise ValueError(f"the texts have more than {LONGEST_DESCRIPTION} characters together")
        return tuple(value)

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [kind for kind in KINDS if getattr(self, kind) not in (None, False)]
        if len(given) != 1:
            raise ValueError(f"it must have exactly one of {', '.join(KINDS)}, not {' and '.join(given) or 'none'}")
        if self.disable_any_whitespace and not given[0].startswith("json"):
            raise ValueError(f"disable_any_whitespace is for JSON and says nothing about {given[0]}; leave it out")
        return self

    @cached_property
    def kind(self) -> str:
        """The key that is given, one of `KINDS`."""
        return next(kind for kind in KINDS if getattr(self, kind) not in (None, False))

    @cached_property
    def cache_key(self) -> str:
        """A text that is the same for the same form. The order of a schema's properties is part of it."""
        given = getattr(self, self.kind)
        text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
        return f"{self.kind} {self.disable_any_whitespace:d} {text}"


def from_body(body: Mapping[str, Any]) -> StructuredOutputs | None:
    """The form that a request's body asks for through any of `FIELDS` or ``structured_outputs``; None for plain text.

    Raises ParameterError, also if there are several.
    """
    given = [key for key in ("structured_outputs", *sorted(FIELDS)) if body.get(key) is not None]
    if len(given) > 1:
        raise ParameterError(given[1], f"{shorten(body[given[1]])} stands beside {given[0]}; give one of them")
    if not given:
        return None
    key = given[0]
    value = body[key]
    if key == "response_format":
        return _response_format(value)
    if key in GUIDED:
        return _nested(key, {GUIDED[key]: value}, drop=1)
    if not isinstance(value, dict):
        raise ParameterError(
            key, f"{shorten(value)} is not allowed; it must be an object with one of {', '.join(KINDS)}"
        )
    return _nested(key, value)


def _response_format(value: Any) -> StructuredOutputs | None:
    """OpenAI's ``response_format``. A schema is always kept to, whatever ``strict`` says."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in ("text", "json_object", "json_schema"):
        problem = f"{shorten(value)} is not supported; its type must be text, json_object or json_schema"
        raise ParameterError("response_format", problem)
    _refuse_other_keys("response_format", value, {"type", "json_schema"} if kind == "json_schema" else {"type"})
    if kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutputs(json_object=True)
    holder = value.get("json_schema")
    if not isinstance(holder, dict) or not isinstance(holder.get("schema"), dict):
        problem = f'{shorten(holder)} is not allowed; it must be {{"name": ..., "schema": {{...}}}}'
        raise ParameterError("response_format.json_schema", problem)
    _refuse_other_keys("response_format.json_schema", holder, {"name", "description", "schema", "strict"})
    return _nested("response_format.json_schema.schema", {"json_schema": holder["schema"]}, drop=1)


def _refuse_other_keys(where: str, value: Mapping[str, Any], known: set[str]) -> None:
    for key in value:
        if key not in known and value[key] is not None:
            raise ParameterError(f"{where}.{key}", f"unknown key; known here: {', '.join(sorted(known))}")


def _nested(where: str, values: Mapping[str, Any], drop: int = 0) -> StructuredOutputs:
    """``StructuredOutputs(**values)`` whose errors name `where`, and the key in it but for its first `drop` parts."""
    try:
        return StructuredOutputs(**{str(key): value for key, value in values.items()})
    except ParameterError as error:
        parts = error.key.split(".")[drop:] if error.key else []
        raise ParameterError(".".join([where, *parts]), error.problem) from None
