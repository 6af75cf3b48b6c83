"""Input lines in both forms, every way in which one can be wrong, and the output lines."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from nanoflow.batch_file import NEUTRAL, ErrorRecord, ParsedRequest, parse_line, read_requests
from nanoflow.batch_output import error_line, response_line
from nanoflow.input_files import InputFiles
from nanoflow.ledger import Ledger
from nanoflow.outputs import Completion, RequestOutput, RequestTiming, TokenLogprobs
from nanoflow.sampling_params import SamplingParams

DEFAULTS = SamplingParams(temperature=0.5, max_tokens=33, stop=("default",))
CHAT = [{"role": "user", "content": "Hello"}]


def batch_line(body: Any, url: str = "/v1/completions", **beside: Any) -> str:
    return json.dumps({"custom_id": "a", "method": "POST", "url": url, "body": body, **beside})


def parsed(text: str) -> ParsedRequest:
    request = parse_line(text, 7, DEFAULTS)
    assert isinstance(request, ParsedRequest), request
    return request


def refused(text: str | bytes) -> ErrorRecord:
    record = parse_line(text, 7, DEFAULTS)
    assert isinstance(record, ErrorRecord), record
    assert record.line == 7 and record.message.startswith("line 7: ")
    return record


def completion(**fields: Any) -> str:
    return batch_line({"prompt": "Hi", **fields})


def chat(**fields: Any) -> str:
    return batch_line({"messages": CHAT, **fields}, url="/v1/chat/completions")


def test_a_completion_in_the_batch_format() -> None:
    body = {"model": "any", "prompt": "Hi", "max_tokens": 5, "user": "u", "metadata": {"k": "v"}, "seed": 3, "n": 2}
    request = parsed(batch_line({**body, "logit_bias": {"5": -100}, "stop": "\n", "logprobs": 2}))
    assert (request.kind, request.prompt, request.custom_id, request.line) == ("completion", "Hi", "a", 7)
    assert request.params == DEFAULTS.replace(max_tokens=5, seed=3, n=2, logit_bias={5: -100}, stop="\n", logprobs=2)
    assert request.metadata == {"k": "v"}


def test_a_chat_in_the_batch_format() -> None:
    request = parsed(chat(max_completion_tokens=9, logprobs=True, top_logprobs=4))
    assert (request.kind, request.prompt, list(request.messages)) == ("chat", None, CHAT)
    assert request.params == DEFAULTS.replace(max_tokens=9, logprobs=4)
    assert parsed(chat(logprobs=True)).params.logprobs == 0
    assert parsed(chat(logprobs=False, top_logprobs=0)).params.logprobs is None


def test_the_short_form() -> None:
    request = parsed('{"custom_id": "a", "prompt": "Hi", "temperature": 0, "top_k": 5}')
    assert (request.kind, request.prompt) == ("completion", "Hi")
    assert request.params == DEFAULTS.replace(temperature=0, top_k=5)
    request = parsed(json.dumps({"custom_id": "b", "messages": CHAT, "max_tokens": 3}))
    assert (request.kind, request.params.max_tokens) == ("chat", 3)


def test_what_a_line_leaves_out_or_sets_to_null_is_the_default() -> None:
    assert parsed(completion()).params == DEFAULTS
    assert parsed(completion(temperature=None, stop=None, max_tokens=None, n=None, logprobs=None)).params == DEFAULTS


def test_a_prompt_of_token_ids() -> None:
    prompt = parsed(completion(prompt=[1, 2, 30000])).prompt
    assert not isinstance(prompt, str) and prompt is not None
    assert prompt.tolist() == [1, 2, 30000]


def test_content_in_text_parts() -> None:
    messages = [
        {"role": "system", "content": "Be brief.", "name": "s"},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}], "tool_calls": None},
    ]
    assert list(parsed(chat(messages=messages)).messages) == messages


@pytest.mark.parametrize(
    ("text", "code", "expected"),
    [
        ("{", "invalid_json", "not JSON"),
        ("[1]", "invalid_json", "not a JSON object"),
        ("null", "invalid_json", "not a JSON object"),
        ('{"custom_id": "a", "prompt": NaN}', "invalid_json", "NaN"),
        ('{"custom_id": "a", "n": 1, "n": 2, "prompt": "x"}', "invalid_json", "'n' is given twice"),
        ('{"custom_id": "a", "prompt": [' + "9" * 5000 + "]}", "invalid_json", "not usable JSON"),
        ("[" * 100_000, "invalid_json", "JSON"),
        (b'{"custom_id": "a", "prompt": "\xff"}', "invalid_json", "not UTF-8"),
        ('{"prompt": "x"}', "invalid_request", "custom_id is missing"),
        ('{"custom_id": 5, "prompt": "x"}', "invalid_request", "custom_id: 5 is not a string"),
        ('{"custom_id": "", "prompt": "x"}', "invalid_request", "custom_id"),
        ('{"custom_id": "a"}', "invalid_request", "prompt is missing"),
        ('{"custom_id": "a", "prompt": "x", "messages": []}', "invalid_request", "both prompt and messages"),
        (batch_line({"input": "x"}, url="/v1/embeddings"), "unsupported_url", "'/v1/embeddings'"),
        ('{"custom_id": "a", "url": [], "body": {"prompt": "x"}}', "unsupported_url", "url: [] is not supported"),
        (batch_line({"prompt": "x"}, method="GET"), "invalid_request", "use POST"),
        (batch_line("x"), "invalid_request", "body: 'x' is not an object"),
        (batch_line({"prompt": "x"}, temperature=1), "unsupported_parameter", "'temperature' stands beside body"),
        (batch_line({"messages": CHAT}), "unsupported_parameter", "use /v1/chat/completions"),
        (batch_line({"prompt": "x"}, url="/v1/chat/completions"), "unsupported_parameter", "use /v1/completions"),
        (completion(prompt=None), "invalid_request", "body.prompt is missing"),
        (completion(prompt=5), "invalid_request", "neither a text nor"),
        (completion(prompt=[]), "invalid_request", "no tokens"),
        (completion(prompt=["a", "b"]), "invalid_request", "one prompt a line"),
        (completion(prompt=[[1], [2]]), "invalid_request", "one prompt a line"),
        (completion(prompt=[1, -2]), "invalid_request", "-2 at place 1 is not a token id"),
        (completion(prompt=[1, True]), "invalid_request", "True at place 1"),
        (completion(prompt=[1, 2**31]), "invalid_request", "is not a token id"),
        (completion(max_tokens=-1), "invalid_request", "body.max_tokens: -1"),
        (completion(max_tokens="5"), "invalid_request", "body.max_tokens: '5'"),
        (completion(max_tokens=5, max_completion_tokens=6), "invalid_request", "contradicts"),
        (completion(temperature=-1), "invalid_request", "body.temperature: -1"),
        (completion(logit_bias={"x": 1}), "invalid_request", "body.logit_bias.x"),
        (completion(logprobs=True), "invalid_request", "body.logprobs: True"),
        (completion(top_logprobs=3), "unsupported_parameter", "use logprobs: 3"),
        (completion(temprature=1), "unsupported_parameter", "did you mean temperature?"),
        (completion(xyz=1), "unsupported_parameter", "body.xyz: unknown field"),
        (completion(best_of=3), "unsupported_parameter", "body.best_of: 3"),
        (chat(messages=[]), "invalid_request", "at least one message"),
        (chat(messages="x"), "invalid_request", "body.messages: 'x'"),
        (chat(messages=["x"]), "invalid_request", "body.messages[0]"),
        (chat(messages=[{"content": "x"}]), "invalid_request", "body.messages[0].role"),
        (chat(messages=[{"role": "user"}]), "invalid_request", "body.messages[0].content"),
        (chat(messages=[{"role": "user", "content": 5}]), "invalid_request", "body.messages[0].content: 5"),
        (
            chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
            "unsupported_parameter",
            "only text parts",
        ),
        (
            chat(messages=[{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]),
            "unsupported_parameter",
            "body.messages[0].tool_calls",
        ),
        (chat(top_logprobs=3), "invalid_request", "needs logprobs: true"),
        (chat(logprobs=True, top_logprobs=21), "invalid_request", "body.logprobs: 21"),
        (chat(logprobs=2), "invalid_request", "use true with top_logprobs"),
    ],
)
def test_a_wrong_line_is_an_error_record_that_says_why(text: str | bytes, code: str, expected: str) -> None:
    record = refused(text)
    assert (record.code, expected in record.message) == (code, True), record.message


@pytest.mark.parametrize("key", sorted(NEUTRAL))
def test_an_unsupported_field_passes_only_with_a_value_that_asks_for_nothing(key: str) -> None:
    for value in (None, *NEUTRAL[key]):
        assert parsed(completion(**{key: value})).params == DEFAULTS
    record = refused(completion(**{key: {"something": "else"}}))
    assert record.code == "unsupported_parameter" and f"body.{key}" in record.message


def test_zero_does_not_pass_for_false_nor_true_for_one() -> None:
    assert "stream" in refused(completion(stream=0)).message
    assert "best_of" in refused(completion(best_of=True)).message
    assert parsed(completion(best_of=3, n=3)).params.n == 3


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["custom_id", "url", "body", "prompt", "messages", "role", "content", "stop", "n", "stream"]
                ),
                inner,
                max_size=5,
            )
        ),
    )
)
def test_no_line_raises(value: Any) -> None:
    assert isinstance(parse_line(json.dumps(value), 1, DEFAULTS), ParsedRequest | ErrorRecord)


@given(st.binary(max_size=60))
def test_no_bytes_raise(raw: bytes) -> None:
    assert isinstance(parse_line(raw, 1, DEFAULTS), ErrorRecord)


def test_a_file_keeps_order_and_line_numbers_and_finds_ids_seen_before(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    lines = [
        '{"custom_id": "a", "prompt": "1"}',
        "",
        "oops",
        '{"custom_id": "b", "prompt": "2"}\r',
        '{"custom_id": "a", "prompt": "3"}',
        '{"custom_id": "c"}',
        '{"custom_id": "c", "prompt": "4"}',
    ]
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    ledger = Ledger()
    found = [item for r in read_requests(InputFiles([str(path)]), DEFAULTS) if (item := ledger.take(r)) is not None]
    assert [(type(r).__name__, r.line, r.custom_id) for r in found] == [
        ("ParsedRequest", 1, "a"),
        ("ErrorRecord", 3, None),
        ("ParsedRequest", 4, "b"),
        ("ErrorRecord", 5, "a"),
        ("ErrorRecord", 6, "c"),
        ("ErrorRecord", 7, "c"),
    ]
    duplicate = found[3]
    assert isinstance(duplicate, ErrorRecord)
    assert duplicate.code == "duplicate_custom_id" and "that of line 1" in duplicate.message


class Bytes:
    """A tokenizer whose token i stands for the bytes `table[i]`, or for none of its own."""

    table = (b"Hi", b" ", "é".encode()[:1], "é".encode()[1:], None)

    def token_bytes(self, id: int) -> bytes | None:
        return self.table[id]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "<end>"


def output(logprobs: list[TokenLogprobs] | None = None, n: int = 1) -> RequestOutput:
    completions = [Completion(i, "Hi é", [0, 1, 2, 3, 4], "stop", logprobs) for i in range(n)]
    return RequestOutput("p", [9, 9, 9], completions, DEFAULTS, RequestTiming(0.0, 1.0, 2.0))


def answer(line: str, out: RequestOutput, tokenizer: Any = None) -> dict[str, Any]:
    made = response_line(parsed(line), out, model="m", created=1_700_000_000, tokenizer=tokenizer)
    json.dumps(made, allow_nan=False)
    return made


def test_a_completion_s_response() -> None:
    made = answer(completion(metadata={"k": "v"}), output(n=2), Bytes())
    assert made == {
        "id": "batch_req_7",
        "custom_id": "a",
        "response": {
            "status_code": 200,
            "request_id": "req_7",
            "body": {
                "id": "cmpl-7",
                "object": "text_completion",
                "created": 1_700_000_000,
                "model": "m",
                "choices": [{"index": i, "text": "Hi é", "logprobs": None, "finish_reason": "stop"} for i in range(2)],
                "usage": {"prompt_tokens": 3, "completion_tokens": 10, "total_tokens": 13},
                "metadata": {"k": "v"},
            },
        },
        "error": None,
    }


def test_a_chat_s_response() -> None:
    body = answer(chat(), output(), Bytes())["response"]["body"]
    assert (body["id"], body["object"]) == ("chatcmpl-7", "chat.completion")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hi é", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]


LOGPROBS = [
    TokenLogprobs(0, -0.5, ((0, -0.5), (1, -1.0))),
    TokenLogprobs(1, -3.0, ((0, -0.25), (2, -2.0))),
    TokenLogprobs(2, float("-inf"), ((1, -0.125), (0, -1.5))),
    TokenLogprobs(3, -0.5, ((3, -0.5), (1, -1.0))),
    TokenLogprobs(4, -0.5, ((4, -0.5), (1, -1.0))),
]


def test_logprobs_of_a_completion_have_openai_s_form() -> None:
    got = answer(completion(logprobs=2), output(LOGPROBS), Bytes())["response"]["body"]["choices"][0]["logprobs"]
    assert got["tokens"] == ["Hi", " ", "bytes:\\xc3", "bytes:\\xa9", "<end>"]
    assert got["token_logprobs"] == [-0.5, -3.0, -9999.0, -0.5, -0.5]
    assert got["top_logprobs"][0] == {"Hi": -0.5, " ": -1.0}
    assert got["top_logprobs"][1] == {"Hi": -0.25, "bytes:\\xc3": -2.0, " ": -3.0}
    assert got["text_offset"] == [0, 2, 3, 3, 4]


def test_logprobs_without_alternatives() -> None:
    bare = [TokenLogprobs(0, -0.5), TokenLogprobs(1, -1.0)]
    got = answer(completion(logprobs=0), output(bare), Bytes())["response"]["body"]["choices"][0]["logprobs"]
    assert got["top_logprobs"] is None and got["token_logprobs"] == [-0.5, -1.0]


def test_logprobs_of_a_chat_have_openai_s_form() -> None:
    got = answer(chat(logprobs=True), output(LOGPROBS), Bytes())["response"]["body"]["choices"][0]["logprobs"]
    assert got["refusal"] is None and len(got["content"]) == 5
    assert got["content"][2] == {
        "token": "bytes:\\xc3",
        "logprob": -9999.0,
        "bytes": [0xC3],
        "top_logprobs": [
            {"token": " ", "logprob": -0.125, "bytes": [32]},
            {"token": "Hi", "logprob": -1.5, "bytes": [72, 105]},
        ],
    }


def test_without_a_tokenizer_the_tokens_are_written_as_ids() -> None:
    choice = answer(completion(logprobs=1), output(LOGPROBS))["response"]["body"]["choices"][0]
    assert choice["token_ids"] == [0, 1, 2, 3, 4]
    assert choice["logprobs"]["tokens"][3] == "token_id:3"


def test_an_error_s_line() -> None:
    assert error_line(parsed(completion()).error("prompt is too long", "context_length_exceeded")) == {
        "id": "batch_req_7",
        "custom_id": "a",
        "response": None,
        "error": {"code": "context_length_exceeded", "message": "line 7: prompt is too long"},
    }
