"""ShareGPT's conversations as requests: real prompts, and outputs as long as the answers."""

import json
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NoReturn, TextIO

import numpy as np
from numpy.typing import NDArray

from nanoflow.errors import InputError
from nanoflow.tokenizer import Tokenizer
from nanoflow.traces import none_left
from nanoflow.validation import shorten
from nanoflow.workload_schema import TraceSection

__all__ = ["read_sharegpt"]

HUMAN, ANSWERING = ("human", "user"), ("gpt", "chatgpt", "assistant")
CHUNK = 1 << 20
"""Characters of JSON read at a time."""
BATCH = 256
"""Conversations tokenised at a time."""


def read_sharegpt(spec: TraceSection, tokenizer: Tokenizer | None) -> Iterator[tuple[NDArray[np.int32], int]]:
    """Tokens of the prompt and length of the output of ShareGPT's conversations, one after the other.

    A conversation gives its first human message, tokenised as a plain prompt, and the tokens of the answer that follows
    it; one without either is left out, as is what `spec` prunes. Without `shuffle` the file is streamed.

    Raises:
        InputError: the file cannot be read or is no such JSON, or there is no tokenizer.
    """
    path = Path(spec.path)
    if tokenizer is None:
        raise InputError(
            f"workload.trace.path: {path} holds text, and this model came without a tokenizer; "
            "use a CSV trace, which has lengths alone"
        )
    kept = _tokenised(path, spec, tokenizer)
    if spec.shuffle:
        requests = list(kept)
        order = np.random.default_rng(spec.seed).permutation(len(requests))
        kept = (requests[place] for place in order)
    none = True
    for prompt, output_len in islice(kept, spec.first):
        none = False
        yield prompt[: spec.max_input], min(output_len, spec.max_output or output_len)
    if none:
        none_left(path, "has no conversation with a prompt and an answer", spec.limits.model_fields_set)


def _tokenised(path: Path, spec: TraceSection, tokenizer: Tokenizer) -> Iterator[tuple[NDArray[np.int32], int]]:
    turns = filter(None, (_first_turn(conversation) for conversation in _conversations(path)))
    limits = spec.limits
    while block := list(islice(turns, BATCH)):
        prompts = tokenizer.encode_batch([prompt for prompt, _ in block])
        answers = tokenizer.encode_batch([answer for _, answer in block], add_special_tokens=False)
        for prompt, answer in zip(prompts, answers, strict=True):
            if prompt and answer and limits.keep(len(prompt), len(answer)):
                yield np.array(prompt, np.int32), len(answer)


def _first_turn(conversation: dict[str, Any]) -> tuple[str, str] | None:
    """The first human message and the answer right after it."""
    messages = conversation.get("conversations")
    if not isinstance(messages, list):
        return None
    for message, after in pairwise(messages):
        if isinstance(message, dict) and isinstance(after, dict) and message.get("from") in HUMAN:
            prompt, answer = message.get("value"), after.get("value")
            if after.get("from") in ANSWERING and isinstance(prompt, str) and isinstance(answer, str):
                # Half a surrogate pair, from an escape, is no text that a tokenizer takes.
                return prompt.encode("utf-8", "replace").decode(), answer.encode("utf-8", "replace").decode()
            return None
    return None


def _conversations(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON list, read piece by piece."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from _JsonList(path, file)
    except OSError as error:
        raise InputError(f"workload.trace.path: {path} cannot be read: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(f"workload.trace.path: {path} is not UTF-8 text ({error.reason})") from None


class _JsonList:
    """Iterates over a JSON list of objects; holds a few objects' text at a time."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self._path, self._file = path, file
        self._text, self._at = "", 0
        self._before = 0
        """Characters of the file before `_text`."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        decoder = json.JSONDecoder()
        self._expect("[")
        if self._next() == "]":
            return
        while True:
            if self._next() != "{":
                self._fail(f"a conversation must be an object, not {shorten(self._text[self._at : self._at + 20])}")
            while True:
                try:
                    # An object ends with its own brace: what was not read in full cannot pass for one.
                    found, self._at = decoder.raw_decode(self._text, self._at)
                    break
                except json.JSONDecodeError as error:
                    if not self._read():
                        self._fail(error.msg, error.pos)
                except (ValueError, RecursionError) as error:
                    self._fail(str(error))
            yield found
            if self._next() == "]":
                return
            self._expect(",")

    def _read(self) -> bool:
        """Append at least as much as is held, so that a long object is not parsed again for each piece of it."""
        held = self._text[self._at :]
        more = self._file.read(max(CHUNK, len(held)))
        self._before += self._at
        self._text, self._at = held + more, 0
        return bool(more)

    def _next(self) -> str:
        """The character after white space; empty at the end of the file."""
        while True:
            while self._at < len(self._text):
                if not self._text[self._at].isspace():
                    return self._text[self._at]
                self._at += 1
            if not self._read():
                return ""

    def _expect(self, character: str) -> None:
        if self._next() != character:
            found = (
                shorten(self._text[self._at : self._at + 20]) if self._at < len(self._text) else "the end of the file"
            )
            self._fail(f"{character} is expected, not {found}")
        self._at += 1

    def _fail(self, problem: str, at: int | None = None) -> NoReturn:
        place = self._before + (self._at if at is None else at) + 1
        raise InputError(
            f"workload.trace.path: {self._path} is not ShareGPT's JSON, a list of conversations: "
            f"character {place}: {problem}"
        )
