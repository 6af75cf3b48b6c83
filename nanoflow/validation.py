"""Turns pydantic's findings into messages that name the key, the value and the mend."""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from nanoflow.errors import InputError, ParameterError

__all__ = ["checked", "explain", "known_keys", "plain", "shorten", "suggest", "text_keys"]

Model = TypeVar("Model", bound=BaseModel)


def checked(model: type[Model], values: Mapping[str, Any]) -> Model:
    """``model(**values)``; raises InputError, with the first problem, instead of pydantic's own error."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        key, problem = explain(error.errors()[0], model)
        raise InputError(f"{key}: {problem}" if key else problem) from None


def explain(error: Any, model: type[BaseModel]) -> tuple[str, str]:
    """One entry of `ValidationError.errors()` for `model`, as (dotted key, problem with its mend)."""
    location = [plain(str(part)) for part in error["loc"] if part != "[key]"]
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, ParameterError):
        return ".".join([*location, *filter(None, [cause.key])]), cause.problem
    key = ".".join(location)
    kind, value = error["type"], error.get("input")
    if kind == "extra_forbidden":
        return key, f"unknown key; {suggest(key, model)}"
    if kind == "missing":
        return key, "is missing; give it a value"
    message = error["msg"].removeprefix("Value error, ")
    if kind in ("model_type", "model_attributes_type"):
        return key, f"{shorten(value)} is not allowed; it must be a section with keys of its own"
    if isinstance(value, dict) and kind == "value_error":
        return key, message
    before, should, rest = message.partition(" should ")
    return key, f"{shorten(value)} is not allowed; it must {rest}" if should else f"{shorten(value)}: {before}"


def shorten(value: Any, length: int = 60) -> str:
    """`repr(value)`, cut to `length` characters so that a message stays one line."""
    shown = repr(value)
    return shown if len(shown) <= length else shown[: length - 3] + "..."


def plain(text: str, length: int = 120) -> str:
    """`text` if it fits into a message as it is; quoted, escaped and cut to `length` characters if not."""
    return text if text.isprintable() and len(text) <= length else shorten(text, length)


def suggest(key: str, model: type[BaseModel]) -> str:
    """How a message about the unknown dotted `key` of `model` ends: with the nearest key that exists."""
    section, _, leaf = key.rpartition(".")
    known = list(known_keys(model))
    elsewhere = [k for k in known if k.rpartition(".")[2] == leaf]
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    while True:
        prefix = section + "." if section else ""
        beside = [k[len(prefix) :] for k in known if k.startswith(prefix) and "." not in k[len(prefix) :]]
        if beside:
            break
        section = section.rpartition(".")[0]  # no section: the key itself holds a dot
    nearest = get_close_matches(leaf, beside, n=1, cutoff=0.0)
    if get_close_matches(leaf, beside, n=1, cutoff=0.5):
        return f"did you mean {prefix}{nearest[0]}?"
    return f"the nearest known key is {prefix}{nearest[0]} (known here: {', '.join(beside)})"


def known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key that `model` accepts, sections included, in the order of declaration."""
    for name, field in model.model_fields.items():
        yield prefix + name
        annotation: Any = field.annotation
        for candidate in (annotation, *get_args(annotation)):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                yield from known_keys(candidate, f"{prefix}{name}.")


def text_keys(value: Any) -> Any:
    """A validator for a section whose class has a constructor of its own: Python takes only text for its keywords."""
    if isinstance(value, dict) and (wrong := [key for key in value if not isinstance(key, str)]):
        raise ValueError(f"the key {shorten(wrong[0])} is not the name of a key")
    return value
