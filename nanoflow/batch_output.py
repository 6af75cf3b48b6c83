"""Output lines: a finished request as OpenAI's batch response, or the error that took its place."""

import codecs
from typing import Any, Protocol

from nanoflow.batch_file import ErrorRecord, ParsedRequest
from nanoflow.outputs import Completion, RequestOutput, TokenLogprobs

__all__ = ["TokenText", "error_line", "response_line"]

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot hold."""


class TokenText(Protocol):
    """The part of a tokenizer that log-probabilities need."""

    def token_bytes(self, id: int) -> bytes | None:
        """The bytes that the token stands for; None if it stands for no text of its own."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids."""


def response_line(
    request: ParsedRequest, output: RequestOutput, *, model: str, created: int, tokenizer: TokenText | None
) -> dict[str, Any]:
    """The output line of an answered request.

    Args:
        created: seconds since 1970.
        tokenizer: writes tokens as text; without one (random weights) the choices carry `token_ids` instead.
    """
    chat = request.kind == "chat"
    generated = sum(len(completion.token_ids) for completion in output.outputs)
    body: dict[str, Any] = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{request.line}",
        "object": "chat.completion" if chat else "text_completion",
        "created": created,
        "model": model,
        "choices": [_choice(completion, chat, tokenizer) for completion in output.outputs],
        "usage": {
            "prompt_tokens": len(output.prompt_token_ids),
            "completion_tokens": generated,
            "total_tokens": len(output.prompt_token_ids) + generated,
        },
    }
    if request.metadata:
        body["metadata"] = dict(request.metadata)
    return {
        "id": f"batch_req_{request.line}",
        "custom_id": request.custom_id,
        "response": {"status_code": 200, "request_id": f"req_{request.line}", "body": body},
        "error": None,
    }


def error_line(record: ErrorRecord) -> dict[str, Any]:
    """The output line of a request that got no answer."""
    return {
        "id": f"batch_req_{record.line}",
        "custom_id": record.custom_id,
        "response": None,
        "error": {"code": record.code, "message": record.message},
    }


def _choice(completion: Completion, chat: bool, tokenizer: TokenText | None) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": completion.index}
    if chat:
        choice["message"] = {"role": "assistant", "content": completion.text, "refusal": None}
    else:
        choice["text"] = completion.text
    if tokenizer is None:
        choice["token_ids"] = completion.token_ids
    choice["logprobs"] = None
    if completion.logprobs is not None:
        write = _chat_logprobs if chat else _completion_logprobs
        choice["logprobs"] = write(completion.logprobs, tokenizer)
    choice["finish_reason"] = completion.finish_reason
    return choice


class _Written(dict[int, tuple[str, bytes]]):
    """Text and bytes of tokens, each made once: the same few come again and again among the alternatives.

    Bytes that are no whole characters are written out, ``bytes:\\xe2\\x80``, as OpenAI does.
    """

    def __init__(self, tokenizer: TokenText | None) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, token_id: int) -> tuple[str, bytes]:
        self[token_id] = made = self._make(token_id)
        return made

    def _make(self, token_id: int) -> tuple[str, bytes]:
        if self._tokenizer is None:
            return f"token_id:{token_id}", b""
        known = self._tokenizer.token_bytes(token_id)
        raw = self._tokenizer.decode([token_id], skip_special_tokens=False).encode() if known is None else known
        try:
            return raw.decode("utf-8"), raw
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw


def _completion_logprobs(logprobs: list[TokenLogprobs], tokenizer: TokenText | None) -> dict[str, Any]:
    """OpenAI's form for completions: parallel lists; the alternatives of a position are keyed by their text."""
    written = _Written(tokenizer)
    # Several tokens may make one character; it counts where its last byte is.
    characters = codecs.getincrementaldecoder("utf-8")("ignore")
    tokens, offsets, at = [], [], 0
    for entry in logprobs:
        text, raw = written[entry.token_id]
        tokens.append(text)
        offsets.append(at)
        at += len(characters.decode(raw))
    top: list[dict[str, float]] | None = None
    if any(entry.top for entry in logprobs):
        top = []
        for token, entry in zip(tokens, logprobs, strict=True):
            alternatives: dict[str, float] = {}
            for token_id, logprob in entry.top:
                # Two tokens may share a text; the likelier one, which comes first, keeps the key.
                alternatives.setdefault(written[token_id][0], _finite(logprob))
            alternatives.setdefault(token, _finite(entry.logprob))
            top.append(alternatives)
    return {
        "text_offset": offsets,
        "token_logprobs": [_finite(entry.logprob) for entry in logprobs],
        "tokens": tokens,
        "top_logprobs": top,
    }


def _chat_logprobs(logprobs: list[TokenLogprobs], tokenizer: TokenText | None) -> dict[str, Any]:
    """OpenAI's form for chats: one entry a token, with its bytes and its alternatives."""
    written = _Written(tokenizer)

    def entry_of(token_id: int, logprob: float) -> dict[str, Any]:
        text, raw = written[token_id]
        return {"token": text, "logprob": _finite(logprob), "bytes": list(raw) if tokenizer is not None else None}

    content = []
    for entry in logprobs:
        chosen = entry_of(entry.token_id, entry.logprob)
        chosen["top_logprobs"] = [entry_of(token_id, logprob) for token_id, logprob in entry.top]
        content.append(chosen)
    return {"content": content, "refusal": None}


def _finite(logprob: float) -> float:
    return max(float(logprob), LOWEST_LOGPROB)
