"""Input lines: OpenAI's batch format and the short form, read into requests or error records.

A line is one request. What is wrong with it becomes an `ErrorRecord`, and the other lines run. A field that is not
supported is refused, by name, unless its value asks for nothing (``"stream": false``): silence would change the result.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from nanoflow.errors import ParameterError
from nanoflow.input_files import LONGEST_LINE, InputLine, Source
from nanoflow.sampling_params import SamplingParams
from nanoflow.structured_outputs import FIELDS, from_body
from nanoflow.validation import shorten

__all__ = ["ErrorRecord", "Kind", "ParsedRequest", "parse_line", "place", "read_requests"]

Kind = Literal["completion", "chat"]
Message = dict[str, Any]

URLS: dict[str, Kind] = {"/v1/completions": "completion", "/v1/chat/completions": "chat"}

SAMPLING = frozenset(SamplingParams.model_fields)
IGNORED = frozenset(
    (
        "model",
        "user",
        "metadata",
        "service_tier",
        "store",
        "priority",
        "prediction",
        "safety_identifier",
        "prompt_cache_key",
        "guided_decoding_backend",
    )
)
"""Accepted with any value: who asks, how urgently, what to keep. None of it changes the completion."""
OWN = frozenset({"prompt", "messages", "max_completion_tokens", "top_logprobs"}) | FIELDS

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "stream_options": (),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "early_stopping": (False,),
    "min_tokens": (0,),
    "include_stop_str_in_output": (False,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "prompt_logprobs": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "logits_processors": ([],),
    "guided_whitespace_pattern": (),
    "structural_tag": (),
}
"""Fields that other engines have and this one lacks, with the values that ask for nothing; null always does."""

MESSAGE_KEYS = frozenset({"role", "content", "name"})


@dataclass(frozen=True)
class ErrorRecord:
    """Why a line got no answer. `message` names the line, the field, the value and the mend."""

    line: int
    """As `ParsedRequest.line`."""
    custom_id: str | None
    code: str
    message: str
    source: Source | None = None

    @property
    def where(self) -> str:
        """The line, as messages name it."""
        return place(self.line, self.source)


@dataclass(frozen=True, eq=False)
class ParsedRequest:
    """One request as the workload gives it: text or token ids to complete, or a conversation to answer."""

    line: int
    """Line of the input, from 1, counted through all of its files; for made-up workloads the number of the request."""
    custom_id: str
    kind: Kind
    params: SamplingParams
    prompt: str | NDArray[np.int32] | None = None
    """Text or token ids [tokens]; None for a conversation."""
    messages: tuple[Message, ...] = ()
    """The conversation; a message's content is a string or a list of ``{"type": "text", "text": ...}``."""
    metadata: Mapping[str, Any] | None = None
    arrival: float | None = None
    """Seconds after the run's start at which the request arrives; None: it is there from the start."""
    source: Source | None = None
    """The file that `line` is in, if the input has several."""

    @property
    def where(self) -> str:
        """The line, as messages name it."""
        return place(self.line, self.source)

    def error(self, message: str, code: str = "invalid_request") -> ErrorRecord:
        """The record that says why this request, though well formed, cannot be answered."""
        return ErrorRecord(self.line, self.custom_id, code, f"{self.where}: {message}", self.source)


class _Problem(Exception):
    def __init__(self, message: str, code: str = "invalid_request") -> None:
        super().__init__(message)
        self.code = code


def place(line: int, source: Source | None) -> str:
    """How messages name line `line` of the input: with its file if there are several."""
    return f"line {line}" if source is None else source.place(line)


def read_requests(lines: Iterable[InputLine], defaults: SamplingParams) -> Iterator[ParsedRequest | ErrorRecord]:
    """The requests of an input in order, a record for each line that is none; blank lines are passed over.

    Whether a `custom_id` was there before is the ledger's to say (`nanoflow.ledger`).
    """
    for line in lines:
        if line.raw is None:
            message = f"{place(line.number, line.source)}: longer than {LONGEST_LINE >> 20} MiB; each line must be one "
            yield ErrorRecord(line.number, None, "invalid_json", message + "JSON object", line.source)
        elif line.raw.strip():
            yield parse_line(line.raw, line.number, defaults, line.source)


def parse_line(
    text: str | bytes, line_number: int, defaults: SamplingParams, source: Source | None = None
) -> ParsedRequest | ErrorRecord:
    """One line as a request, or the record that says what is wrong with it. The line's values win over `defaults`."""
    custom_id = None
    try:
        line = _parse_json(text)
        given = line.get("custom_id")
        custom_id = given if isinstance(given, str) and given else None
        if custom_id is None:
            problem = f"custom_id: {shorten(given)} is not a string" if "custom_id" in line else "custom_id is missing"
            _fail(f"{problem}; give each line a text of its own")
        kind, body, prefix = _form(line)
        return _request(line_number, custom_id, kind, body, prefix, defaults, source)
    except _Problem as problem:
        return ErrorRecord(line_number, custom_id, problem.code, f"{place(line_number, source)}: {problem}", source)


def _fail(message: str, code: str = "invalid_request") -> NoReturn:
    raise _Problem(message, code)


def _parse_json(text: str | bytes) -> dict[str, Any]:
    def refuse_constant(name: str) -> NoReturn:
        _fail(f"not JSON: {name} is not a JSON value", "invalid_json")

    def refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            _fail(f"the key {shorten(twice)} is given twice; keep one", "invalid_json")
        return made

    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        line = json.loads(text, parse_constant=refuse_constant, object_pairs_hook=refuse_twice)
    except UnicodeDecodeError as error:
        _fail(f"byte {error.start + 1} is not UTF-8; save the file as UTF-8 text", "invalid_json")
    except json.JSONDecodeError as error:
        _fail(f"not JSON: {error.msg} at column {error.pos + 1}; each line must be one JSON object", "invalid_json")
    except (ValueError, RecursionError) as error:
        _fail(f"not usable JSON: {error}", "invalid_json")
    if not isinstance(line, dict):
        _fail(f"{shorten(line)} is not a JSON object", "invalid_json")
    return line


def _form(line: dict[str, Any]) -> tuple[Kind, dict[str, Any], str]:
    """Kind of the request, its fields, and what to put before their names in messages."""
    if not {"url", "body", "method"} & line.keys():
        fields = {key: value for key, value in line.items() if key != "custom_id"}
        if fields.get("prompt") is not None and fields.get("messages") is not None:
            _fail("has both prompt and messages; give one of them")
        return ("chat" if fields.get("messages") is not None else "completion"), fields, ""
    url, body = line.get("url"), line.get("body")
    if not isinstance(url, str) or url not in URLS:
        _fail(f"url: {shorten(url)} is not supported; use {' or '.join(URLS)}", "unsupported_url")
    if line.get("method", "POST") != "POST":
        _fail(f"method: {shorten(line['method'])} is not supported; use POST")
    if not isinstance(body, dict):
        _fail(f"body: {shorten(body)} is not an object; put the request's fields there")
    for key in line.keys() - {"custom_id", "method", "url", "body"}:
        if line[key] is not None:
            _fail(f"{shorten(key)} stands beside body; put the request's fields into body", "unsupported_parameter")
    return URLS[url], body, "body."


def _request(
    number: int,
    custom_id: str,
    kind: Kind,
    body: dict[str, Any],
    prefix: str,
    defaults: SamplingParams,
    source: Source | None,
) -> ParsedRequest:
    for key, value in body.items():
        _check_field(key, value, body, prefix)
    other = "prompt" if kind == "chat" else "messages"
    if body.get(other) is not None:
        right = next(url for url, k in URLS.items() if k != kind)
        _fail(f"{prefix}{other} does not belong to this url; use {right} for it", "unsupported_parameter")
    values = {key: value for key, value in body.items() if key in SAMPLING and value is not None}
    _max_tokens(body, values, prefix)
    _logprobs(body, values, kind, prefix)
    try:
        if any(body.get(key) is not None for key in ("structured_outputs", *FIELDS)):
            values["structured_outputs"] = from_body(body)  # None (text) replaces the default too
        params = defaults.replace(**values)
    except ParameterError as error:
        _fail(f"{prefix}{error}")
    metadata = body.get("metadata")
    return ParsedRequest(
        line=number,
        custom_id=custom_id,
        kind=kind,
        params=params,
        prompt=_prompt(body.get("prompt"), prefix) if kind == "completion" else None,
        messages=_messages(body.get("messages"), prefix) if kind == "chat" else (),
        metadata=metadata if isinstance(metadata, dict) else None,
        source=source,
    )


def _check_field(key: str, value: Any, body: Mapping[str, Any], prefix: str) -> None:
    """Refuse a field that is not supported, unless its value asks for nothing."""
    if key in SAMPLING or key in OWN or key in IGNORED or value is None:
        return
    if key in NEUTRAL:
        if any(value == neutral and isinstance(value, bool) is isinstance(neutral, bool) for neutral in NEUTRAL[key]):
            return
        if key == "best_of" and value == body.get("n"):
            return
        _fail(f"{prefix}{key}: {shorten(value)} is not supported; leave {key} out", "unsupported_parameter")
    near = get_close_matches(key, sorted(SAMPLING | OWN), n=1, cutoff=0.6)
    mend = f"did you mean {near[0]}?" if near else "leave it out"
    _fail(f"{prefix}{key}: unknown field with the value {shorten(value)}; {mend}", "unsupported_parameter")


def _max_tokens(body: Mapping[str, Any], values: dict[str, Any], prefix: str) -> None:
    newer = body.get("max_completion_tokens")
    if newer is None:
        return
    older = values.setdefault("max_tokens", newer)
    if older != newer:
        both = f"max_completion_tokens: {shorten(newer)} contradicts max_tokens: {shorten(older)}"
        _fail(f"{prefix}{both}; give one of them")


def _logprobs(body: Mapping[str, Any], values: dict[str, Any], kind: Kind, prefix: str) -> None:
    """Bring both APIs' forms to one number: completions give it, chats a switch (`logprobs`) and `top_logprobs`."""
    wanted, top = body.get("logprobs"), body.get("top_logprobs")
    if kind == "completion":
        if top is not None:
            _fail(f"{prefix}top_logprobs belongs to chats; use logprobs: {shorten(top)}", "unsupported_parameter")
        return
    if wanted is True:
        values["logprobs"] = 0 if top is None else top
    elif wanted is False or wanted is None:
        if top is not None and (top != 0 or isinstance(top, bool)):
            _fail(f"{prefix}top_logprobs: {shorten(top)} needs logprobs: true beside it")
        if wanted is False:
            values["logprobs"] = None
    else:
        _fail(f"{prefix}logprobs: {shorten(wanted)} is not allowed in a chat; use true with top_logprobs")


def _prompt(prompt: Any, prefix: str) -> str | NDArray[np.int32]:
    if prompt is None:
        _fail(f"{prefix}prompt is missing; give a text or a list of token ids, or messages for a chat")
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list):
        _fail(f"{prefix}prompt: {shorten(prompt)} is neither a text nor a list of token ids")
    if not prompt:
        _fail(f"{prefix}prompt: [] has no tokens; give at least one")
    if all(isinstance(part, str | list) for part in prompt):
        _fail(f"{prefix}prompt: a list of {len(prompt)} prompts is not supported; give one prompt a line")
    for place, token in enumerate(prompt):
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < 2**31:
            _fail(f"{prefix}prompt: {shorten(token)} at place {place} is not a token id")
    return np.array(prompt, dtype=np.int32)


def _messages(messages: Any, prefix: str) -> tuple[Message, ...]:
    if not isinstance(messages, list) or not messages:
        problem = "is missing" if messages is None else f"{shorten(messages)} is not a list with at least one message"
        _fail(f"{prefix}messages: {problem}; give " + '[{"role": "user", "content": "..."}]')
    for index, message in enumerate(messages):
        _check_message(message, f"{prefix}messages[{index}]")
    return tuple(messages)


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, dict):
        _fail(f"{where}: {shorten(message)} is not an object with role and content")
    if not isinstance(message.get("role"), str) or not message["role"]:
        _fail(f"{where}.role: {shorten(message.get('role'))} is not a role such as user")
    for key, value in message.items():
        if key not in MESSAGE_KEYS and value not in (None, [], ""):
            _fail(f"{where}.{key}: {shorten(value)} is not supported; leave it out", "unsupported_parameter")
    content = message.get("content")
    if isinstance(content, str):
        return
    if not isinstance(content, list) or not content:
        _fail(f"{where}.content: {shorten(content)} is neither a text nor a list of text parts")
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            _fail(f"{where}.content: {shorten(part)} is not supported; only text parts are", "unsupported_parameter")
