"""Grammars of structured outputs: compiled once, followed token by token, and turned into masks of allowed tokens.

Contract: a `Constraint` is where one completion stands in its grammar. The engine's thread moves it on with each token
that it has seen; the masks that the next iteration is sampled under are made on a thread of `MaskMaker` meanwhile,
beside the device's work. The two never touch a constraint at the same time: the tokens of an iteration are seen only
after its masks were made.

The library is llguidance; it works on bytes, so every tokenizer whose tokens stand for bytes will do. It lets go of
Python's lock while it compiles and while it makes masks.
"""

import os
from collections import OrderedDict
from collections.abc import Sequence as ListLike
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nanoflow.errors import ParameterError
from nanoflow.ops.batch import TokenMasks
from nanoflow.structured_outputs import StructuredOutputs
from nanoflow.tokenizer import Tokenizer
from nanoflow.validation import shorten

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

__all__ = ["Constraint", "Grammars", "MaskMaker"]

CACHED = 256
"""Compiled grammars that are kept, the ones used last."""

WHITESPACE = r"[\x20\t]|\r?\n[\x20\t]{0,40}"
"""Between the tokens of JSON. Without a bound, a model that likes blanks writes them until max_tokens."""

LONGEST_FORCED = 4096
"""Characters of forced text that are cut as the model's tokenizer would; longer ones are cut in a simpler way."""

THREADS = 8
"""The most threads that make masks; each takes ten to a hundred microseconds a row."""


class Constraint:
    """Where one completion stands in its grammar."""

    def __init__(self, matcher: "LLMatcher", *, goes_on: bool) -> None:
        self.matcher = matcher
        self.goes_on = goes_on
        """Whether the end of sequence is only allowed where nothing else is (`ignore_eos`)."""
        self.error: str | None = None
        """Why the grammar cannot be followed any further."""

    def advance(self, token: int) -> bool:
        """Takes a token that was sampled under the mask; whether the output ends with it."""
        if not self.matcher.consume_token(token):
            self.error = _first_line(self.matcher.get_error()) or f"token {token} does not fit the grammar"
            return True
        return self.matcher.is_stopped()


class Grammars:
    """Compiles the grammars of one model. Safe to use from several threads.

    Args:
        tokenizer: of the model; None refuses every grammar.
        vocab_size: the model's, which may be larger than the tokenizer's: ids without a token are never allowed.
        eos_token_ids: tokens that end an output, allowed wherever the grammar may end.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: ListLike[int]) -> None:
        self.vocab_size = vocab_size
        self._tokenizer = tokenizer
        self._eos = [int(token) for token in eos_token_ids if token < vocab_size]
        self._vocabulary: LLTokenizer | None = None
        self._compiled: OrderedDict[str, LLMatcher | str] = OrderedDict()
        self._lock = Lock()

    def compile(self, form: StructuredOutputs) -> "LLMatcher":
        """The form's grammar at its start; not to be moved on, but copied.

        Raises:
            ParameterError: the grammar is wrong, too large, or allows nothing; or the model cannot follow grammars.
        """
        with self._lock:
            found = self._compiled.get(form.cache_key)
            if found is not None:
                self._compiled.move_to_end(form.cache_key)
        if found is None:
            found = self._compile(form)
            with self._lock:
                self._compiled[form.cache_key] = found
                if len(self._compiled) > CACHED:
                    self._compiled.popitem(last=False)
        if isinstance(found, str):
            raise ParameterError(f"structured_outputs.{form.kind}", found)
        return found

    def constraint(self, form: StructuredOutputs, *, ignore_eos: bool) -> Constraint:
        """A completion's own place in the form's grammar, at its start. Raises ParameterError as `compile` does."""
        return Constraint(self.compile(form).deep_copy(), goes_on=ignore_eos)

    def mask_maker(self) -> "MaskMaker":
        """What makes this model's masks."""
        return MaskMaker(self.vocab_size, self._eos)

    def _compile(self, form: StructuredOutputs) -> "LLMatcher | str":
        """The compiled grammar, or what is wrong with it."""
        if self._tokenizer is None:
            return "needs a tokenizer, and this model came without one"
        if not self._eos:
            return "needs a token that ends the output, and this model names none"
        from llguidance import LLMatcher, LLParserLimits

        given = getattr(form, form.kind)
        try:
            grammar = _grammar(form)
            matcher = LLMatcher(self._llguidance(), grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
            if not matcher.is_error():
                matcher.compute_bitmask()  # some limits are met, and some contradictions found, only here
        except ValueError as error:
            return f"{shorten(given)} cannot be compiled: {_first_line(str(error))}"
        if matcher.is_error():
            return f"{shorten(given)} cannot be compiled: {_first_line(matcher.get_error())}"
        return matcher

    def _llguidance(self) -> "LLTokenizer":
        """The vocabulary as llguidance wants it; made at the first use, since it takes a good part of a second."""
        with self._lock:
            if self._vocabulary is None:
                from llguidance import LLTokenizer, TokenizerWrapper

                assert self._tokenizer is not None
                words = _Words(self._tokenizer, self.vocab_size, self._eos[0])
                self._vocabulary = LLTokenizer(
                    TokenizerWrapper(words), n_vocab=self.vocab_size, eos_token=list(self._eos)
                )
                words.vocabulary = self._vocabulary
            return self._vocabulary


class _Words:
    """A tokenizer in the form that llguidance's wrapper reads: every token's bytes, and a way to cut text."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_id: int) -> None:
        self.eos_token_id = eos_token_id
        self.bos_token_id = None
        self.tokens = [tokenizer.token_bytes(token) or b"" for token in range(vocab_size)]
        self.special_token_ids = sorted(token for token in tokenizer.special_ids if token < vocab_size)
        self.vocabulary: LLTokenizer | None = None
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        """Tokens of text that the grammar forces. A tokenizer that changes text (a blank put in front) must not."""
        wanted = text.encode() if isinstance(text, str) else text
        text = wanted.decode(errors="replace")
        if len(text) <= LONGEST_FORCED:
            for before in ("", "\x02"):  # behind a character that merges with nothing, no blank is put in front
                tokens = self._tokenizer.encode(before + text, add_special_tokens=False)
                pieces = [self.tokens[token] if token < len(self.tokens) else b"" for token in tokens]
                first = len(tokens)
                missing = len(wanted)
                while first and missing > 0:
                    first -= 1
                    missing -= len(pieces[first])
                if missing == 0 and b"".join(pieces[first:]) == wanted:
                    return tokens[first:]
        return [] if self.vocabulary is None else self.vocabulary.greedy_tokenize(text)


class MaskMaker:
    """Fills the masks of launched batches on a thread of its own."""

    def __init__(self, vocab_size: int, eos_token_ids: ListLike[int]) -> None:
        from llguidance import LLExecutor

        self._words = -(-vocab_size // 32)
        self._eos_bits = np.zeros(self._words, np.int32)
        for token in eos_token_ids:
            self._eos_bits[token // 32] |= np.uint32(1 << token % 32).astype(np.int32)
        self._executor = LLExecutor(max(1, min(THREADS, (os.cpu_count() or 1) // 2)))
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="masks")

    def start(self, masks: TokenMasks, constraints: ListLike[Constraint | None]) -> None:
        """Begin to make `masks`, one row each of `constraints`; None (it has ended meanwhile) may get any token."""
        self._thread.submit(self._make, masks.ready, constraints)

    def _make(self, ready: "Future[NDArray[np.int32]]", constraints: ListLike[Constraint | None]) -> None:
        if not ready.set_running_or_notify_cancel():
            return
        try:
            ready.set_result(self._fill(constraints))
        except BaseException as error:  # whoever waits for the masks must not wait for ever
            ready.set_exception(error)

    def _fill(self, constraints: ListLike[Constraint | None]) -> NDArray[np.int32]:
        from llguidance.numpy import fill_next_token_bitmask_par

        bits = np.full((len(constraints), self._words), -1, np.int32)
        wanted = [(c.matcher, row) for row, c in enumerate(constraints) if c is not None]
        if wanted:
            fill_next_token_bitmask_par(self._executor, wanted, bits)
        for row, constraint in enumerate(constraints):
            if constraint is not None and constraint.goes_on:
                without = bits[row] & ~self._eos_bits
                if without.any():
                    bits[row] = without
        return bits

    def close(self) -> None:
        """Wait for the thread; masks that were not begun are dropped."""
        self._thread.shutdown(wait=True, cancel_futures=True)


def _grammar(form: StructuredOutputs) -> str:
    """The form in llguidance's own language. Raises ValueError if a grammar's text cannot be read."""
    from llguidance import LLMatcher, grammar_from

    given: Any = getattr(form, form.kind)
    if form.kind in ("json_schema", "json_object"):
        schema = given if form.kind == "json_schema" else {"type": "object"}
        if form.disable_any_whitespace:
            return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
        return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITESPACE})
    if form.kind == "regex":
        return LLMatcher.grammar_from_regex(given)
    if form.kind == "choice":
        return grammar_from("choice", list(dict.fromkeys(given)))  # type: ignore[arg-type]
    return grammar_from("grammar", given)


def _first_line(message: str) -> str:
    """What a message of llguidance says; the lines after it show its inner state."""
    lines = [line.strip() for line in message.strip().splitlines()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    text = errors[0] if errors else next((line for line in lines if line), "")
    return text if len(text) <= 200 else text[:197] + "..."
