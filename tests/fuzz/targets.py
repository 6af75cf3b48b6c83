"""What is fuzzed. A target draws an input and checks what holds for any: an answer or one clear message, no loss."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from hypothesis import strategies as st

from nanoflow.batch_file import IGNORED, NEUTRAL, OWN, SAMPLING, ErrorRecord, ParsedRequest
from nanoflow.batch_output import error_line
from nanoflow.config import RunConfig, dump_config, load_config, shipped_configs
from nanoflow.errors import ConfigError, InputError, ParameterError, UserError
from nanoflow.grammars import Grammars
from nanoflow.ledger import DUPLICATE
from nanoflow.pipeline.plan import Plan, PlanError
from nanoflow.pipeline.plan_text import format_plan, parse_plan
from nanoflow.pipeline.validate import validate
from nanoflow.resume import read_output
from nanoflow.runner import run
from nanoflow.sampling_params import SamplingParams
from nanoflow.structured_outputs import StructuredOutputs
from nanoflow.tokenizer import Tokenizer
from nanoflow.validation import known_keys
from nanoflow.workload import read_workload
from nanoflow.workload_schema import TraceSection
from nanoflow.writer import OutputWriter
from tests.fuzz.mutations import SCALARS, TEXTS, VALUES, as_json, as_yaml, mutated, nested
from tests.unit.plan_graphs import llama_graph
from tests.unit.tiny_model import EOS, VOCAB, save_tiny_llama, save_tokenizer

__all__ = ["TARGETS", "Target"]

CONFIGS = Path(__file__).parents[2] / "configs"
LONGEST_MESSAGE = 20_000
MINIMAL = {"model": {"path": "package:x/y.gguf"}, "workload": {"synthetic": {"input_len": 8, "output_len": 4}}}


@dataclass(frozen=True)
class Target:
    """A kind of input and what is asserted of each."""

    inputs: st.SearchStrategy[Any]
    check: Callable[[Any], None]
    seconds: float = 10.0
    """What one input may take; none takes nearly as long, even on a busy machine."""
    share: int = 1
    """For how many inputs of other targets one of this stands: it takes that much longer."""


@cache
def folder() -> Path:
    """Where inputs are written: in memory if the machine has such a place."""
    return Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))


@cache
def tokenizer() -> Tokenizer:
    save_tokenizer(folder())
    return Tokenizer.from_file(folder() / "tokenizer.json")


def assert_one_message(error: UserError | PlanError, name: str) -> None:
    """The message names what it is about, can be printed, and ends."""
    message = str(error)
    assert name in message, message
    assert "Traceback" not in message and 0 < len(message) < LONGEST_MESSAGE, message[:300]
    message.encode("utf-8")


# YAML


def check_yaml(content: bytes) -> None:
    """A configuration, or one message that names the file. What loads is saved and loads again to the same."""
    path = folder() / "run.yaml"
    path.write_bytes(content)
    try:
        config = load_config(path)
    except ConfigError as error:
        assert_one_message(error, str(path))
        return
    assert_reads_back(config)


def check_override(override: str) -> None:
    """As `check_yaml`, for ``--set``."""
    path = folder() / "plain.yaml"
    path.write_bytes(as_yaml(MINIMAL))
    try:
        config = load_config(path, [override])
    except ConfigError as error:
        assert_one_message(error, "")
        return
    assert_reads_back(config)


def assert_reads_back(config: RunConfig) -> None:
    saved = folder() / "saved.yaml"
    saved.write_text(dump_config(config), encoding="utf-8")
    assert load_config(saved) == config


KEYS = [*known_keys(RunConfig), "modle", "engine.max_runing", "workload.synthetic.input_len.uniform.0"]
YAMLS = [path.read_bytes() for path in shipped_configs().values()]
YAML = st.one_of(
    mutated(YAMLS),
    nested(KEYS, MINIMAL).map(as_yaml),
    st.dictionaries(TEXTS, VALUES, max_size=3).map(as_yaml),
    st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")),
)
OVERRIDE = st.one_of(
    st.tuples(st.sampled_from(KEYS), VALUES.map(lambda v: as_yaml(v).decode("utf-8", "replace"))).map("=".join),
    st.tuples(st.sampled_from(KEYS), st.text(max_size=12)).map("=".join),
    st.text(max_size=30),
    mutated([b"engine.max_running=7", b"workload.synthetic.input_len={uniform: [3, 9]}"]).map(
        lambda data: data.decode("utf-8", "replace")
    ),
)

# Plans


def check_plan(content: bytes) -> None:
    """A plan that is valid for its model and reads back from its text, or one message that names the file."""
    path = folder() / "plan.yaml"
    path.write_bytes(content)
    try:
        plan = Plan.load(path, GRAPH)
    except PlanError as error:
        assert_one_message(error, str(path))
        return
    assert parse_plan(format_plan(plan)) == plan
    with suppress(PlanError):
        validate(plan, GRAPH)


GRAPH = llama_graph()
PLANS = [path.read_bytes() for path in sorted(Path(__file__).parents[1].glob("models/plans/*.yaml"))]
PLAN_KEYS = ["capacity", "nano_batches.a", "nano_batches.a.rows", "nano_batches.a.decode", "nano_batches.1", "period"]
PLAN_KEYS += ["partitions.split", "kernels.o", "kernels", "measured.x", "model", "gpu", "sms", "x", "mix", "mix.decode"]
PLAN_KEYS += ["mix.context", "fingerprint", "fingerprint.torch"]
PLAN = st.one_of(mutated(PLANS), *(nested(PLAN_KEYS, yaml.safe_load(plan)).map(as_yaml) for plan in PLANS))

# JSONL


PACKED = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd")
"""How gzip and zstd begin."""


def line_numbers(content: bytes) -> list[int]:
    """Of the lines that are not blank."""
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return [number for number, line in enumerate(lines, start=1) if line.strip()]


def check_jsonl(content: bytes) -> None:
    """Each line that is not blank comes out once and in order: as a request, or as a record that can be written."""
    path = folder() / "in.jsonl"
    path.write_bytes(content)
    if content.startswith(PACKED):
        return  # taken for a compressed file, which is refused as a whole if it is damaged
    found = []
    for parsed in read_workload(run_of({"input": str(path)}), VOCAB, tokenizer()):
        found.append(parsed.line)
        if isinstance(parsed, ErrorRecord):
            assert parsed.message.startswith(f"line {parsed.line}: ") and len(parsed.message) < LONGEST_MESSAGE
            assert json.loads(json.dumps(error_line(parsed)))["error"]["message"] == parsed.message
        else:
            assert_runnable(parsed)
    assert found == line_numbers(content)


def assert_runnable(request: ParsedRequest) -> None:
    """The tokenizer takes the request or refuses it with a message; sampling parameters are such as can be copied."""
    assert request.params.replace() == request.params
    try:
        if request.messages:
            for message in request.messages:
                parts = message["content"] if isinstance(message["content"], list) else [{"text": message["content"]}]
                for part in parts:
                    tokenizer().encode(part["text"])
        elif isinstance(request.prompt, str):
            tokenizer().encode(request.prompt)
        else:
            assert request.prompt is not None and request.prompt.dtype == np.int32
    except InputError as error:
        assert_one_message(error, "")


def run_of(workload: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate({"model": {"path": "m"}, "workload": workload})


FIELDS = sorted(SAMPLING | OWN | IGNORED | NEUTRAL.keys())
GOOD_FIELDS: dict[str, Any] = {"temperature": 0.5, "max_tokens": 3, "n": 2, "stop": ["a"], "logprobs": None, "seed": 1}
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": TEXTS | st.just("user"), "content": TEXTS | VALUES}, optional={"name": SCALARS}),
    max_size=3,
)


@st.composite
def line(draw: st.DrawFn) -> bytes:
    """One line that is near a request: in either form, with a few fields of any value."""
    body: dict[str, Any] = draw(st.sampled_from([{}, GOOD_FIELDS]))
    body = body | draw(st.dictionaries(st.sampled_from(FIELDS) | TEXTS, VALUES, max_size=3))
    kind = draw(st.integers(0, 2))
    if kind:
        body["messages" if kind == 1 else "prompt"] = draw(MESSAGES if kind == 1 else TEXTS | VALUES)
    if draw(st.booleans()):
        custom_id = draw(st.sampled_from(["a", "b"]) | SCALARS)
        body = {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}
        body |= draw(st.dictionaries(st.sampled_from(["url", "method", "body", "x"]), VALUES, max_size=1))
    else:
        body["custom_id"] = draw(TEXTS | st.integers())
    return as_json(body)


LINES = [raw for file in sorted(CONFIGS.rglob("*.jsonl")) for raw in file.read_bytes().splitlines()[:12]]
JSONL = st.one_of(
    mutated([*LINES, b"\n".join(LINES[:3]) + b"\n", b"\r\n".join(LINES[3:5])]),
    st.lists(st.one_of(line(), mutated(LINES), VALUES.map(as_json)), max_size=4).map(b"\n".join),
    st.binary(max_size=40),
)

# Resume: an output that was damaged


def record(number: int, custom_id: str | None, code: str | None = None) -> bytes:
    body = {"choices": [{"index": 0, "text": "é" * number}]}
    response = None if code else {"status_code": 200, "request_id": f"req_{number}", "body": body}
    error = {"code": code, "message": f"line {number}: wrong"} if code else None
    line = {"id": f"batch_req_{number}", "custom_id": custom_id, "response": response, "error": error}
    return json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode()


RECORDS = [record(1, "a"), record(2, "b"), record(3, None, "invalid_json"), record(4, "a", DUPLICATE), record(5, "é")]
ITEMS: list[ParsedRequest | ErrorRecord] = [
    ParsedRequest(1, "a", "completion", SamplingParams(), prompt="x"),
    ParsedRequest(2, "b", "completion", SamplingParams(), prompt="x"),
    ErrorRecord(3, None, "invalid_json", "line 3: wrong"),
    ParsedRequest(4, "a", "completion", SamplingParams(), prompt="x"),
    ParsedRequest(5, "é", "completion", SamplingParams(), prompt="x"),
]
WHOLE = b"\n".join(RECORDS) + b"\n"
OUTPUT = st.one_of(
    mutated([WHOLE, RECORDS[0] + b"\n"]),
    st.integers(0, len(WHOLE)).map(lambda end: WHOLE[:end]),
    st.lists(st.sampled_from(RECORDS) | mutated(RECORDS), max_size=6).map(b"\n".join),
)


def check_output(content: bytes) -> None:
    """What is whole and first with its key stays, the rest goes; what then runs completes the output, each key once."""
    path = folder() / "out.jsonl"
    path.write_bytes(content)
    intact = [line for line in content.split(b"\n")[:-1] if line in RECORDS]
    with OutputWriter(path) as writer:
        ledger = read_output(writer)
        kept = path.read_bytes().split(b"\n")[:-1]
        assert len(kept) == ledger.records
        strangers = [line for line in kept if line not in RECORDS]
        # Only a line before it, damaged and still a record, may have taken a whole line's place.
        lost = set(intact) - set(kept)
        assert len(lost) <= len(strangers)
        for item, line in zip(ITEMS, RECORDS, strict=True):
            taken = ledger.take(item)
            # A record whose own custom_id was damaged counts as that of another request.
            if not strangers:
                assert (taken is None) == (line in kept)
            if taken is not None:
                writer.write(json.loads(line))
    if not strangers:
        assert sorted(path.read_bytes().split(b"\n")[:-1]) == sorted(RECORDS)
    after = path.read_bytes()
    with OutputWriter(path) as writer:
        again = read_output(writer)
    assert again.records == after.count(b"\n") and path.read_bytes() == after


# Structured outputs

TYPES = st.sampled_from(["string", "integer", "number", "boolean", "null", "object", "array"])
KEYWORDS = {
    "type": TYPES | st.lists(TYPES, max_size=2),
    "enum": st.lists(SCALARS, max_size=3),
    "const": VALUES,
    "pattern": st.sampled_from(["^a+$", "(a|b", "[", "a{1,9999}", "(?=a)", "\\\\p{L}", "(a*)*b", ""]),
    "minLength": SCALARS,
    "maxLength": st.integers(-1, 10**6),
    "minimum": SCALARS,
    "maximum": SCALARS,
    "multipleOf": SCALARS,
    "minItems": st.integers(-1, 10**6),
    "required": VALUES,
    "$ref": st.sampled_from(["#", "#/$defs/a", "http://x/y", ""]),
    "format": st.sampled_from(["date", "uuid", "x"]),
    "additionalProperties": st.booleans() | VALUES,
}


def schemas() -> st.SearchStrategy[Any]:
    """JSON schemas, near ones and far ones."""
    leaves = st.fixed_dictionaries({}, optional=KEYWORDS)

    def around(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        some = st.dictionaries(st.sampled_from(["a", "b", "\\ud800", ""]), inner, max_size=3)
        lists = {name: st.lists(inner, max_size=2) for name in ("anyOf", "allOf", "oneOf", "prefixItems")}
        return st.fixed_dictionaries({}, optional={"properties": some, "$defs": some, "items": inner, **lists})

    return st.recursive(leaves, around, max_leaves=6)


FORM = st.one_of(
    st.fixed_dictionaries({"json_schema": schemas() | VALUES}),
    st.fixed_dictionaries({"regex": st.text("ab()[]{}|*+?^$.\\\\0123456789,d-", max_size=16) | TEXTS}),
    st.fixed_dictionaries({"choice": st.lists(TEXTS, max_size=3) | VALUES}),
    st.fixed_dictionaries(
        {"grammar": st.sampled_from(['root ::= "a" root | "b"', "root ::= root", "start: /a+/", "x"])}
    ),
    st.dictionaries(st.sampled_from(["json_schema", "json_object", "regex", "x"]), VALUES, max_size=2),
)


@cache
def grammars() -> Grammars:
    return Grammars(tokenizer(), VOCAB, [EOS])


def check_grammar(form: dict[str, Any]) -> None:
    """A grammar that allows a token until it ends, or one message."""
    try:
        constraint = grammars().constraint(StructuredOutputs(**form), ignore_eos=False)
    except ParameterError as error:
        assert_one_message(error, "")
        return
    from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

    bits = allocate_token_bitmask(1, VOCAB)
    for step in range(8):
        fill_next_token_bitmask(constraint.matcher, bits, 0)
        allowed = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")[:VOCAB])
        assert len(allowed), "no token is allowed, and the output has not ended"
        if constraint.advance(int(allowed[(7 * step) % len(allowed)])):
            break


# Whole runs


@cache
def model() -> Path:
    return save_tiny_llama(folder() / "model")


def check_run(content: bytes) -> None:
    """Each line that is not blank has one record in the output."""
    path, output = folder() / "run.jsonl", folder() / "run.out.jsonl"
    path.write_bytes(content)
    if content.startswith(PACKED):
        return
    job = {
        "model": {"path": str(model())},
        "workload": {"input": str(path)},
        "sampling": {"max_tokens": 4},
        "engine": {"device": "cpu", "max_model_len": 32, "max_running": 16, "kv_memory": "1MiB"},
        "output": {"path": str(output)},
    }
    outcome = run(RunConfig.model_validate(job), restart=True, quiet=True)
    numbers = [int(json.loads(line)["id"].removeprefix("batch_req_")) for line in output.read_bytes().split(b"\n")[:-1]]
    assert sorted(numbers) == line_numbers(content) and outcome.records == len(numbers)


# Traces


def check_csv(content: bytes) -> None:
    """Requests with arrivals that never fall, or one message."""
    path = folder() / "trace.csv"
    path.write_bytes(content)
    trace = {"path": str(path), "max_input": 50, "first": 20}
    for arrival in (None, "trace"):
        try:
            made = list(read_workload(run_of({"trace": trace, "arrival": arrival}), VOCAB))
        except InputError as error:
            assert_one_message(error, str(path))
            continue
        assert made and all(isinstance(request, ParsedRequest) for request in made)
        times = [request.arrival for request in made if isinstance(request, ParsedRequest)]
        assert times == sorted(times, key=lambda time: time or 0) and times[0] == (0 if arrival else None)


def check_sharegpt(content: bytes) -> None:
    """Prompts, or one message."""
    path = folder() / "chats.json"
    path.write_bytes(content)
    spec = TraceSection(path=str(path))
    try:
        made = list(read_workload(run_of({"trace": {"path": spec.path, "prune": "none"}}), VOCAB, tokenizer()))
    except InputError as error:
        assert_one_message(error, str(path))
        return
    assert made and all(isinstance(request, ParsedRequest) for request in made)


CSV_BASE = (CONFIGS / "traces" / "example.csv").read_bytes().splitlines(keepends=True)[:4]
DATES = b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,3,4\n2023-11-16 18:15:50.9951690,9,10\n"
CHATS = [{"id": "x", "conversations": [{"from": "human", "value": "abc"}, {"from": "gpt", "value": "defg"}]}] * 2


def cells() -> Iterator[st.SearchStrategy[Any]]:
    """Rows of a trace of any text and number."""
    row = st.lists(SCALARS.map(str), max_size=4).map(",".join)
    head = st.sampled_from(["ContextTokens,GeneratedTokens", "timestamp,input_len,output_len", '"a\n",b', ""])
    yield st.tuples(head, st.lists(row, max_size=3).map("\n".join)).map("\n".join)


CSV = st.one_of(
    mutated([b"".join(CSV_BASE), DATES]),
    *(cell.map(lambda text: text.encode("utf-8", "surrogatepass")) for cell in cells()),
)
PARTS = st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt"]) | SCALARS, "value": TEXTS | SCALARS})
CONVERSATION = st.fixed_dictionaries({"conversations": st.lists(PARTS | VALUES, max_size=3)})
SHAREGPT = st.one_of(
    mutated([as_json(CHATS), json.dumps(CHATS, indent=1).encode()]),
    st.lists(CONVERSATION | VALUES, max_size=3).map(as_json),
)

TARGETS = {
    "yaml": Target(YAML, check_yaml),
    "override": Target(OVERRIDE, check_override),
    "plan": Target(PLAN, check_plan),
    "jsonl": Target(JSONL, check_jsonl),
    "csv": Target(CSV, check_csv),
    "sharegpt": Target(SHAREGPT, check_sharegpt),
    "output": Target(OUTPUT, check_output),
    "grammar": Target(FORM, check_grammar),
    "run": Target(JSONL, check_run, seconds=60.0, share=10),
}
