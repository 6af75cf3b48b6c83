"""Whether a request can run, asked before it is queued: its tokens, its lengths, its grammar."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nanoflow.errors import InputError
from nanoflow.grammars import Grammars
from nanoflow.sampling_params import SamplingParams
from nanoflow.tokenizer import Tokenizer

__all__ = ["Lengths", "RequestCheck", "Tokens"]

Tokens = Sequence[int] | NDArray[np.int32]


@dataclass(frozen=True)
class Lengths:
    """How long a sequence may be."""

    max_model_len: int
    """Tokens of prompt and output."""
    page_size: int
    """Tokens of a KV page."""
    pages: int
    """Of the KV cache, that one sequence may have."""

    def check(self, prompt: int, max_tokens: int) -> int:
        """Output tokens that a sequence with `prompt` prompt tokens may have.

        Raises ValueError if it is empty or can never fit.
        """
        if prompt == 0:
            raise ValueError("the prompt has no tokens; give it at least one")
        if prompt >= self.max_model_len:
            raise ValueError(
                f"the prompt has {prompt} tokens, which leaves no room for output in a context of {self.max_model_len} "
                "(engine.max_model_len); shorten it"
            )
        limit = min(max_tokens, self.max_model_len - prompt)
        pages = -(-(prompt + limit - 1) // self.page_size)  # the last token's KV is never needed
        if pages > self.pages:
            raise ValueError(
                f"a prompt of {prompt} tokens with {limit} output tokens needs {pages} KV pages of {self.page_size} "
                f"tokens, and there are {self.pages}; lower max_tokens, shorten the prompt or raise engine.kv_memory"
            )
        return limit


class RequestCheck:
    """What is asked of every request. Safe to call from any thread.

    Args:
        vocab_size: token ids of the model.
        lengths: as `Lengths.check`: raises ValueError for what is too long.
        grammars: where those of structured outputs are compiled, once, and kept.
    """

    def __init__(
        self, vocab_size: int, tokenizer: Tokenizer | None, lengths: Callable[[int, int], object], grammars: Grammars
    ) -> None:
        self._vocab_size = vocab_size
        self._tokenizer = tokenizer
        self._lengths = lengths
        self._grammars = grammars

    def __call__(self, prompt_token_ids: Tokens, params: SamplingParams) -> None:
        """Say whether a request can run.

        Raises:
            InputError: the prompt is empty, has a token id that the model lacks, or leaves no room in the context; or
                the grammar of its structured outputs cannot be compiled.
        """
        vocab_size = self._vocab_size
        prompt = np.asarray(prompt_token_ids)
        if len(unknown := prompt[(prompt < 0) | (prompt >= vocab_size)]):
            raise InputError(f"prompt: token id {unknown[0]} is unknown; this model's ids are 0 to {vocab_size - 1}")
        if wrong := [token for token in (*params.logit_bias, *params.stop_token_ids) if token >= vocab_size]:
            raise InputError(
                f"logit_bias or stop_token_ids: token id {wrong[0]} is unknown; "
                f"this model's ids are 0 to {vocab_size - 1}"
            )
        if params.stop and self._tokenizer is None:
            raise InputError("stop: strings need a tokenizer, and this model came without one; use stop_token_ids")
        try:
            self._lengths(len(prompt_token_ids), params.max_tokens)
        except ValueError as error:
            raise InputError(f"prompt: {error}") from None
        if params.structured_outputs is not None:
            self._grammars.compile(params.structured_outputs)
