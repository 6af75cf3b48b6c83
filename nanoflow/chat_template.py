"""Chat templates: Jinja programs that come with a checkpoint and turn messages into the text that the model was taught.

A template is somebody else's program, so it runs in Jinja's sandbox. What it may use follows the Hugging Face
convention: `messages`, `tools`, `add_generation_prompt`, the special tokens by name, `raise_exception`, `strftime_now`,
loop controls, a `tojson` that leaves characters alone, and a ``{% generation %}`` tag, which changes nothing here.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.parser import Parser

from nanoflow.errors import InputError

__all__ = ["ChatTemplate"]


class _Generation(jinja2.ext.Extension):
    """``{% generation %} ... {% endgeneration %}`` marks the model's own words for training; it renders its body."""

    tags = {"generation"}  # noqa: RUF012 - declared so by the base class

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which a model was never taught.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


class ChatTemplate:
    """A compiled template. `special_tokens` are what it may name: ``bos_token``, ``eos_token`` and so on."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self.source = source
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise InputError(f"the model's chat template does not compile: {error}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation. Raises InputError for messages that the template refuses."""
        if not messages:
            raise InputError("messages: the list is empty. Give at least one message with a role and content.")
        try:
            return self._template.render(
                **{
                    **self._special_tokens,
                    "documents": None,
                    **variables,
                    "messages": [_plain(message, index) for index, message in enumerate(messages)],
                    "tools": list(tools) if tools else None,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except InputError:
            raise
        except Exception as error:
            # Whatever a template does wrong with a conversation (an unknown role, a missing key) is about that one
            # conversation, and the template's own words are the best explanation there is.
            raise InputError(f"messages: the model's chat template refuses them: {error}") from None


def _plain(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The message with a content of text parts joined into one string, as most templates expect."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InputError(f"messages[{index}]: expected an object with 'role' and 'content', got {message!r:.80}")
    content = message.get("content")
    if content is not None and not isinstance(content, str | list):
        raise InputError(f"messages[{index}].content: expected a string or a list of text parts, got {content!r:.80}")
    if not isinstance(content, list):
        return dict(message)
    texts = []
    for number, part in enumerate(content):
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else part
        if not isinstance(text, str):
            raise InputError(f"messages[{index}].content[{number}]: only text parts are supported, got {part!r:.80}")
        texts.append(text)
    return {**message, "content": "\n".join(texts)}
