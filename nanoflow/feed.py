"""Requests for the engine, read, parsed and tokenised ahead of it.

Contract: at most `MOST_ITEMS` items and `MOST_TOKENS` prompt tokens are held at a time, whatever the workload's size;
items come out in the order of the workload, and whoever takes one never waits for a tokenizer.

    reader thread:     next item of the workload -> not done yet? -> a few parsed items
    tokeniser thread:  all parsed items there are, as one batch (outside of Python's lock) -> ready items
    engine's loop:     take a ready item
"""

import queue
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from threading import Condition, Event, Thread
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from nanoflow.batch_file import ErrorRecord, ParsedRequest
from nanoflow.errors import InputError
from nanoflow.ledger import Ledger
from nanoflow.sampling_params import SamplingParams
from nanoflow.tokenizer import Tokenizer

__all__ = ["MOST_ITEMS", "MOST_TOKENS", "Feed", "FeedTotals", "Prompt"]

MOST_ITEMS = 4096
MOST_TOKENS = 2**21
_BATCH = 64
"""Parsed items that wait for the tokenizer, and the most that it gets at a time."""
_CHECK_SECONDS = 0.2
"""How soon a thread that waits for room notices that the feed was closed."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """A request with its prompt as tokens. The text is not kept: a million of them would be the whole input."""

    request: ParsedRequest
    token_ids: NDArray[np.int32]

    @property
    def longest(self) -> int:
        """Tokens of the prompt with the longest output that it may have."""
        return len(self.token_ids) + self.request.params.max_tokens


@dataclass
class FeedTotals:
    """What has gone through a feed so far."""

    items: int = 0
    """Requests and error records."""
    requests: int = 0
    prompt_tokens: int = 0
    completions: int = 0
    limits: int = 0
    """Sum of the completions' `max_tokens`."""


class Feed:
    """The items of a workload that have no record yet. Use as a context manager; `take` is for one thread.

    Args:
        items: the workload, in order.
        ledger: says which items have their record.
        tokenizer: None if the model has none; requests with text then become error records.
        where: the model's path, for messages.
    """

    def __init__(
        self,
        items: Iterable[ParsedRequest | ErrorRecord],
        ledger: Ledger,
        tokenizer: Tokenizer | None,
        where: str = "the model",
    ) -> None:
        self.totals = FeedTotals()
        self.prepare: Callable[[Sequence[int] | NDArray[np.int32], SamplingParams], None] | None = None
        """Called with requests before they are ready, away from the engine's loop, since it may be slow: it compiles
        grammars. Whether it raises does not matter here."""
        self._items = items
        self._ledger = ledger
        self._tokenizer = tokenizer
        self._where = where
        self._parsed: queue.Queue[ParsedRequest | ErrorRecord | None] = queue.Queue(_BATCH)
        self._ready: deque[Prompt | ErrorRecord] = deque()
        self._tokens = 0  # of the prompts in `_ready`
        self._changed = Condition()
        self._ended = False
        self._failure: BaseException | None = None
        self._closed = Event()
        # Daemons: one may be waiting for standard input when the process ends.
        self._threads = [
            Thread(target=self._guarded, args=(work,), name=f"feed-{work.__name__.strip('_')}", daemon=True)
            for work in (self._read, self._tokenise)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading; the threads end by themselves."""
        self._closed.set()
        with self._changed:
            self._changed.notify_all()

    def peek(self) -> Prompt | ErrorRecord | None:
        """The next item; None if none is ready yet, or there is none."""
        try:
            return self._ready[0]
        except IndexError:
            return None

    def take(self) -> Prompt | ErrorRecord | None:
        """Take out what `peek` returns."""
        with self._changed:
            if not self._ready:
                return None
            item = self._ready.popleft()
            if isinstance(item, Prompt):
                self._tokens -= len(item.token_ids)
            self._changed.notify_all()
        return item

    @property
    def exhausted(self) -> bool:
        """Whether every item was taken, or reading has failed (`check` says) and what was read before was taken."""
        return self._ended and not self._ready

    @property
    def ended(self) -> bool:
        """Whether the whole workload was read, so that `totals` is final."""
        return self._ended

    def check(self) -> None:
        """Raise what reading the workload has failed with, if it has."""
        if self._failure is not None:
            raise self._failure

    def wait(self, seconds: float) -> None:
        """Wait until an item is ready, there will be none, or the time is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._ended, seconds)

    def look_ahead(self, seconds: float) -> list[Prompt]:
        """The prompts that are ready once the feed is full, the workload read, or the time over: at least one by then.

        They stay in the feed. Raises what reading failed with, if it did before the first item.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._full or self._ended, seconds)
            # In pieces, since a wait without end takes no signals on some systems.
            while not self._ready and not self._ended:
                self._changed.wait(_CHECK_SECONDS)
            if not self._ready:
                self.check()
            return [item for item in self._ready if isinstance(item, Prompt)]

    @property
    def _full(self) -> bool:
        return len(self._ready) >= MOST_ITEMS or self._tokens >= MOST_TOKENS

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._end(error)

    def _end(self, failure: BaseException | None = None) -> None:
        with self._changed:
            self._failure = self._failure or failure
            self._ended = True
            self._changed.notify_all()

    def _read(self) -> None:
        failure: BaseException | None = None
        try:
            for item in self._items:
                if (new := self._ledger.take(item)) is not None and not self._hand_on(new):
                    return
        except BaseException as error:
            failure = error
        # What was read before a failure is still to be tokenised.
        self._failure = failure
        self._hand_on(None)

    def _hand_on(self, item: ParsedRequest | ErrorRecord | None) -> bool:
        while not self._closed.is_set():
            try:
                self._parsed.put(item, timeout=_CHECK_SECONDS)
            except queue.Full:
                continue
            return True
        return False

    def _tokenise(self) -> None:
        while not self._closed.is_set():
            try:
                batch = [self._parsed.get(timeout=_CHECK_SECONDS)]
            except queue.Empty:
                continue
            while len(batch) < _BATCH and batch[-1] is not None:
                try:
                    batch.append(self._parsed.get_nowait())
                except queue.Empty:
                    break
            for item in self._with_tokens([item for item in batch if item is not None]):
                self._offer(item)
            if batch[-1] is None:
                self._end()
                return

    def _offer(self, item: Prompt | ErrorRecord) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._full or self._closed.is_set())
            self._ready.append(item)
            self.totals.items += 1
            if isinstance(item, Prompt):
                params = item.request.params
                self._tokens += len(item.token_ids)
                self.totals.requests += 1
                self.totals.prompt_tokens += len(item.token_ids)
                self.totals.completions += params.n
                self.totals.limits += params.n * params.max_tokens
            self._changed.notify_all()

    def _with_tokens(self, batch: list[ParsedRequest | ErrorRecord]) -> list[Prompt | ErrorRecord]:
        """The batch with prompts as tokens; conversations go through the chat template first."""
        done: list[Prompt | ErrorRecord | None] = [None] * len(batch)
        texts: dict[bool, list[tuple[int, str]]] = {False: [], True: []}
        for place, item in enumerate(batch):
            if isinstance(item, ErrorRecord):
                done[place] = item
            elif isinstance(item.prompt, np.ndarray):
                done[place] = _prompt(item, item.prompt)
            else:
                try:
                    # A template writes special tokens out; they must not be added again.
                    texts[item.prompt is not None].append((place, self._text(item)))
                except InputError as error:
                    done[place] = item.error(str(error))
        for special, entries in texts.items():
            for (place, _), ids in zip(entries, self._encode([text for _, text in entries], special), strict=True):
                request = batch[place]
                assert isinstance(request, ParsedRequest)
                done[place] = request.error(str(ids)) if isinstance(ids, InputError) else _prompt(request, ids)
        ready = [item for item in done if item is not None]
        if self._tokenizer is not None and any(
            isinstance(item, Prompt) and (item.request.params.stop or item.request.params.logprobs is not None)
            for item in ready
        ):
            self._tokenizer.token_bytes(0)  # makes the table of all tokens, which takes some 0.2 s, away from the loop
        if self.prepare is not None:
            for prompt in ready:
                if isinstance(prompt, Prompt) and prompt.request.params.structured_outputs is not None:
                    with suppress(InputError):
                        self.prepare(prompt.token_ids, prompt.request.params)
        return ready

    def _text(self, request: ParsedRequest) -> str:
        if self._tokenizer is None:
            raise InputError(f"prompt: {self._where} has no tokenizer; give token ids")
        if isinstance(request.prompt, str):
            return request.prompt
        return self._tokenizer.apply_chat_template(request.messages)

    def _encode(self, texts: list[str], special: bool) -> list[list[int] | InputError]:
        if not texts or self._tokenizer is None:
            return []
        try:
            return list(self._tokenizer.encode_batch(texts, add_special_tokens=special))
        except InputError:
            pass  # one of them; which one shows when they are taken alone
        each: list[list[int] | InputError] = []
        for text in texts:
            try:
                each.append(self._tokenizer.encode(text, add_special_tokens=special))
            except InputError as error:
                each.append(error)
        return each


def _prompt(request: ParsedRequest, token_ids: list[int] | NDArray[np.int32]) -> Prompt:
    return Prompt(replace(request, prompt=None, messages=()), np.asarray(token_ids, np.int32))
