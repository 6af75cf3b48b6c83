"""Text to token ids and back, and conversations to text."""

import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from nanoflow.chat_template import ChatTemplate
from nanoflow.errors import CheckpointError, InputError

__all__ = ["TextStream", "Tokenizer"]


class TextStream(Protocol):
    """Turns a growing list of token ids into text. All pieces joined equal `Tokenizer.decode` of all the ids.

    One exception: where a SentencePiece tokenizer falls back to bytes that are not valid UTF-8, `decode` replaces every
    byte of the run, valid or not, by U+FFFD; a stream has given the valid ones already.
    """

    def push(self, ids: Iterable[int]) -> str:
        """Take more ids; returns the new text that is complete: never half a character."""

    def finish(self) -> str:
        """What was held back; a character that stayed incomplete becomes U+FFFD."""


class Tokenizer:
    """A model's tokenizer: `tokenizers.Tokenizer`, its special tokens and its chat template.

    `special_tokens` are by name (``bos_token``: ``<s>``); `eos_token_ids` end a completion.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        # Limits that training left in the file would cut or pad prompts silently.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.backend = tokenizer
        self.special_tokens = dict(special_tokens or {})
        self.eos_token_ids = tuple(eos_token_ids)
        self._template_source = chat_template
        self._template: ChatTemplate | None = None
        self._bytes: list[bytes] | None = None
        self._special_ids = frozenset(id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special)

    @classmethod
    def from_file(cls, path: Path, **options: Any) -> "Tokenizer":
        """From a ``tokenizer.json``; `options` as for the constructor. Raises CheckpointError if it cannot be read."""
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises plain Exception
            raise CheckpointError(f"{path}: cannot be read as a tokenizer ({error}). Fetch it again.") from None
        return cls(backend, **options)

    @property
    def vocab_size(self) -> int:
        """Tokens, added ones included; a model's own vocabulary may be larger (padded) than this."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are no text: begin and end of sequence, turns of a chat."""
        return self._special_ids

    @property
    def has_chat_template(self) -> bool:
        return self._template_source is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. With `add_special_tokens`, the start or end tokens that the file asks for."""
        try:
            return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)
        except (TypeError, UnicodeEncodeError):
            raise InputError("the text is not valid Unicode: it holds half of a surrogate pair") from None

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` for many texts at once, on all cores."""
        try:
            encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeEncodeError):
            raise InputError("a text is not valid Unicode: it holds half of a surrogate pair") from None
        return [list(encoding.ids) for encoding in encodings]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids. Ids that the tokenizer does not know (a padded vocabulary) give no text."""
        return str(self.backend.decode([int(id) for id in ids], skip_special_tokens=skip_special_tokens))

    def token_bytes(self, id: int) -> bytes | None:
        """The bytes that one token stands for (of a byte-level tokenizer), or its text in UTF-8."""
        table = self._byte_table()
        if table is not None:
            return table[id] if 0 <= id < len(table) else None
        token = self.backend.id_to_token(id)
        if token is None:
            return None
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return token.replace("\u2581", " ").encode()

    def stream(self, skip_special_tokens: bool = True) -> TextStream:
        """Decode token by token, for stop strings and for text that is shown as it comes."""
        table = self._byte_table()
        skipped = self._special_ids if skip_special_tokens else frozenset()
        if table is not None:
            return _ByteStream(table, skipped)
        return _WindowStream(self, skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation, special tokens written out: encode it without adding special tokens again.

        A message's content is a string or a list of text parts. Raises InputError if the model has no chat template or
        its template refuses the messages.
        """
        if self._template_source is None:
            raise InputError("messages: the model has no chat template. Give a prompt instead.")
        if self._template is None:
            self._template = ChatTemplate(self._template_source, self.special_tokens)
        return self._template.render(messages, add_generation_prompt, tools, **variables)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Token ids of a conversation: `apply_chat_template`, then `encode` without adding special tokens."""
        return self.encode(self.apply_chat_template(messages, **options), add_special_tokens=False)

    def _byte_table(self) -> list[bytes] | None:
        """Bytes of every token of a byte-level tokenizer; None for another kind."""
        if self._bytes is None:
            # The decoder's state is its part of tokenizer.json; asking for all of that would write out the vocabulary.
            state = self.backend.decoder.__getstate__() if self.backend.decoder is not None else b"{}"
            decoder = json.loads(state)
            parts = decoder.get("decoders", [decoder])
            if [part.get("type") for part in parts] != ["ByteLevel"]:
                self._bytes = []
            else:
                characters = _byte_level_alphabet()
                table = [b""] * (max(self.backend.get_vocab().values(), default=-1) + 1)
                for token, id in self.backend.get_vocab().items():
                    known = [characters.get(character) for character in token]
                    table[id] = token.encode() if None in known else bytes(byte for byte in known if byte is not None)
                self._bytes = table
        return self._bytes or None


class _ByteStream:
    """For byte-level tokenizers: a token is bytes whatever stands beside it, so decoding is one table look-up."""

    def __init__(self, table: list[bytes], skipped: frozenset[int]) -> None:
        self._table = table
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        table, skipped = self._table, self._skipped
        return self._decoder.decode(b"".join(table[id] for id in ids if id < len(table) and id not in skipped))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _WindowStream:
    """For any tokenizer: decode a window that begins at the last complete text, and give what it grew by.

    The window starts one piece earlier than the new text, since a decoder may treat the first token of a text
    differently (SentencePiece drops its leading space).
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window: list[int] = []
        self._read = 0
        """Ids of the window whose text was given."""
        self._given = ""
        """Text of those ids, decoded alone."""

    def push(self, ids: Iterable[int]) -> str:
        pieces = []
        for id in ids:
            self._window.append(id)
            text = self._tokenizer.decode(self._window, self._skip)
            if len(text) > len(self._given) and not text.endswith("\ufffd"):
                pieces.append(text[len(self._given) :])
                self._window = self._window[self._read :]
                self._read = len(self._window)
                self._given = self._tokenizer.decode(self._window, self._skip)
        return "".join(pieces)

    def finish(self) -> str:
        text = self._tokenizer.decode(self._window, self._skip)[len(self._given) :]
        self._window, self._read, self._given = [], 0, ""
        return text


def _byte_level_alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level vocabularies (GPT-2's choice), inverted.

    Printable Latin-1 characters stand for themselves; the others follow from U+0100 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return alphabet
