"""The feed: order kept, memory bounded, tokenised as one by one, failures told."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from nanoflow import feed as feed_module
from nanoflow.batch_file import ErrorRecord, ParsedRequest
from nanoflow.errors import InputError
from nanoflow.feed import Feed, Prompt
from nanoflow.ledger import Ledger
from nanoflow.sampling_params import SamplingParams
from nanoflow.tokenizer import Tokenizer
from tests.unit.tiny_model import save_tokenizer

PARAMS = SamplingParams(max_tokens=7)
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}<eos>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return Tokenizer.from_file(folder / "tokenizer.json", chat_template=TEMPLATE)


def request(line: int, prompt: object = None, chat: str | None = None, **params: object) -> ParsedRequest:
    messages = ({"role": "user", "content": chat},) if chat is not None else ()
    return ParsedRequest(
        line=line,
        custom_id=f"r{line}",
        kind="chat" if messages else "completion",
        params=PARAMS.replace(**params),
        prompt=prompt,  # type: ignore[arg-type]
        messages=messages,
    )


def take_all(feed: Feed) -> list[Prompt | ErrorRecord]:
    found = []
    while not feed.exhausted:
        feed.wait(5)
        while (item := feed.take()) is not None:
            found.append(item)
    return found


def test_every_kind_of_request_in_order(tokenizer: Tokenizer) -> None:
    items = []
    for line in range(1, 400):
        prompt = (f"text {line}", None, np.array([line % 300], np.int32), "half \ud800 pair", None)[line % 5]
        item = request(line, prompt, chat=f"chat {line}" if line % 5 == 1 else None)
        items.append(ErrorRecord(line, None, "x", "bad") if line % 5 == 4 and line % 2 else item)
    items[3] = request(4, "half \ud800 pair")
    items = [item for item in items if isinstance(item, ErrorRecord) or item.prompt is not None or item.messages]
    with Feed(items, Ledger(), tokenizer) as feed:
        found = take_all(feed)
    lines = [item.line if isinstance(item, ErrorRecord) else item.request.line for item in found]
    assert lines == [item.line for item in items]
    for item, made in zip(items, found, strict=True):
        if isinstance(item, ErrorRecord):
            assert made is item
        elif isinstance(item.prompt, str) and "\ud800" in item.prompt:
            assert isinstance(made, ErrorRecord) and "surrogate" in made.message
        else:
            assert isinstance(made, Prompt)
            if item.messages:
                expected = tokenizer.encode_chat(item.messages)
            elif isinstance(item.prompt, str):
                expected = tokenizer.encode(item.prompt)
            else:
                assert item.prompt is not None
                expected = item.prompt.tolist()
            assert made.token_ids.tolist() == expected
            # Texts are not held on to.
            assert made.request.prompt is None and made.request.messages == ()
    prompts = [item for item in found if isinstance(item, Prompt)]
    assert (feed.totals.items, feed.totals.requests) == (len(items), len(prompts))
    assert feed.totals.prompt_tokens == sum(len(prompt.token_ids) for prompt in prompts)
    assert feed.totals.limits == 7 * len(prompts)


def test_without_a_tokenizer_only_token_ids_run() -> None:
    items = [request(1, "text"), request(2, np.array([3], np.int32)), request(3, chat="x")]
    with Feed(items, Ledger(), None, "the/model") as feed:
        found = take_all(feed)
    assert [type(item).__name__ for item in found] == ["ErrorRecord", "Prompt", "ErrorRecord"]
    assert isinstance(found[0], ErrorRecord) and "the/model has no tokenizer; give token ids" in found[0].message


@pytest.mark.parametrize(("length", "most"), [(1, 4096), (50_000, 42)])
def test_a_bounded_number_is_read_ahead(length: int, most: int) -> None:
    """Of a workload without end; what is held counts by requests and by tokens."""
    made = 0

    def endless() -> Iterator[ParsedRequest]:
        nonlocal made
        while True:
            made += 1
            yield request(made, np.zeros(length, np.int32))

    with Feed(endless(), Ledger(), None) as feed:
        assert len(feed.look_ahead(60)) == most
        time.sleep(0.2)
        assert most <= made <= most + 3 * feed_module._BATCH
        for _ in range(10):
            assert feed.take() is not None
        feed.wait(1)
    before = made
    time.sleep(0.5)
    assert made <= before + 1 and not feed.exhausted


def test_a_failure_comes_after_what_was_read_before_it(tokenizer: Tokenizer) -> None:
    def failing() -> Iterator[ParsedRequest]:
        yield request(1, "one")
        yield request(2, "two")
        raise InputError("the file is damaged")

    with Feed(failing(), Ledger(), tokenizer) as feed:
        assert len(take_all(feed)) == 2
        with pytest.raises(InputError, match="the file is damaged"):
            feed.check()
    with Feed(iter(failing()), Ledger(), tokenizer) as feed:
        assert len(feed.look_ahead(5)) == 2


def test_a_failure_of_the_first_item_is_raised_at_once(tmp_path: Path) -> None:
    def failing() -> Iterator[ParsedRequest]:
        raise InputError("no such file")
        yield

    with Feed(failing(), Ledger(), None) as feed, pytest.raises(InputError, match="no such file"):
        feed.look_ahead(5)


def test_a_bug_in_a_worker_is_told_too(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(tokenizer, "encode_batch", broken)
    with Feed([request(1, "one")], Ledger(), tokenizer) as feed:
        assert take_all(feed) == []
        with pytest.raises(ZeroDivisionError):
            feed.check()


def test_items_of_a_slow_source_do_not_wait_for_each_other() -> None:
    """As from a pipe: each is ready before the next is there."""
    go = threading.Semaphore(0)

    def slow() -> Iterator[ParsedRequest]:
        for line in range(1, 4):
            go.acquire()
            yield request(line, np.array([line], np.int32))

    with Feed(slow(), Ledger(), None) as feed:
        for line in range(1, 4):
            assert feed.peek() is None and not feed.exhausted
            go.release()
            feed.wait(5)
            item = feed.take()
            assert isinstance(item, Prompt) and item.request.line == line
        feed.wait(5)
        assert feed.exhausted


def test_grammars_are_prepared_before_a_request_is_ready() -> None:
    prepared = []

    def prepare(token_ids: object, params: SamplingParams) -> None:
        prepared.append(params)
        raise InputError("it will be said again when the request is submitted")

    items = [
        request(1, np.array([1], np.int32)),
        request(2, np.array([1], np.int32), structured_outputs={"regex": "a"}),
    ]
    feed = Feed(items, Ledger(), None)
    feed.prepare = prepare
    with feed:
        assert len(take_all(feed)) == 2
    assert [params.structured_outputs is not None for params in prepared] == [True]
