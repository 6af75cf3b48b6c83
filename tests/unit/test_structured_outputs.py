"""Forms of outputs: the fields that ask for them, the grammars that they become, and the masks of those."""

import json
import random
import re
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings, strategies as st
from tokenizers import decoders, models, normalizers

from nanoflow.batch_file import ErrorRecord, ParsedRequest, parse_line
from nanoflow.errors import ParameterError
from nanoflow.grammars import Constraint, Grammars
from nanoflow.ops.batch import TokenMasks
from nanoflow.sampling_params import SamplingParams
from nanoflow.structured_outputs import LONGEST_DESCRIPTION, StructuredOutputs
from nanoflow.tokenizer import Tokenizer
from tests.unit.tiny_model import EOS, VOCAB, save_tokenizer

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


# What asks for a form


def line(**body: Any) -> ParsedRequest | ErrorRecord:
    text = json.dumps({"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "x", **body}})
    return parse_line(text, 7, SamplingParams(structured_outputs=StructuredOutputs(regex="default")))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, {"regex": "default"}),
        ({"response_format": None, "guided_json": None}, {"regex": "default"}),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "p", "strict": True, "schema": PERSON},
                }
            },
            {"json_schema": PERSON},
        ),
        ({"structured_outputs": {"json": PERSON}}, {"json_schema": PERSON}),
        ({"structured_outputs": {"json": json.dumps(PERSON)}}, {"json_schema": PERSON}),
        ({"structured_outputs": {"json_schema": PERSON}}, {"json_schema": PERSON}),
        ({"structured_outputs": {"json_object": True}}, {"json_object": True}),
        ({"structured_outputs": {"regex": "a+"}}, {"regex": "a+"}),
        ({"structured_outputs": {"choice": ["a", "b"]}}, {"choice": ["a", "b"]}),
        ({"structured_outputs": {"grammar": 'root ::= "a"', "regex": None}}, {"grammar": 'root ::= "a"'}),
        ({"guided_json": PERSON}, {"json_schema": PERSON}),
        ({"guided_json": json.dumps(PERSON)}, {"json_schema": PERSON}),
        ({"guided_regex": "a+", "guided_decoding_backend": "auto"}, {"regex": "a+"}),
        ({"guided_choice": ["a", "b"]}, {"choice": ["a", "b"]}),
        ({"guided_grammar": 'root ::= "a"'}, {"grammar": 'root ::= "a"'}),
    ],
)
def test_every_field_becomes_the_same_form(body: dict[str, Any], expected: dict[str, Any] | None) -> None:
    request = line(**body)
    assert isinstance(request, ParsedRequest), request
    assert request.params.structured_outputs == (None if expected is None else StructuredOutputs(**expected))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"response_format": "json"}, ["response_format", "'json'", "json_schema"]),
        ({"response_format": {"type": "yaml"}}, ["response_format", "yaml", "json_object"]),
        ({"response_format": {"type": "json_schema"}}, ["response_format.json_schema", "schema"]),
        ({"response_format": {"type": "json_schema", "schema": {}}}, ["response_format.schema", "unknown"]),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strickt": True}}},
            ["response_format.json_schema.strickt", "strict"],
        ),
        ({"response_format": {"type": "text"}, "guided_regex": "a"}, ["response_format", "guided_regex"]),
        ({"structured_outputs": "a+"}, ["structured_outputs", "regex"]),
        ({"structured_outputs": {}}, ["structured_outputs", "exactly one"]),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, ["structured_outputs", "regex and choice"]),
        ({"structured_outputs": {"json": {}, "json_schema": {}}}, ["structured_outputs", "one key"]),
        ({"structured_outputs": {"regexp": "a"}}, ["structured_outputs.regexp", "did you mean regex"]),
        ({"structured_outputs": {"regex": ""}}, ["structured_outputs.regex"]),
        ({"structured_outputs": {"regex": "a", "disable_any_whitespace": True}}, ["disable_any_whitespace"]),
        ({"structured_outputs": {"choice": []}}, ["structured_outputs.choice"]),
        ({"structured_outputs": {"choice": ["a", ""]}}, ["structured_outputs.choice.1"]),
        ({"structured_outputs": {"choice": "yes"}}, ["structured_outputs.choice", "list"]),
        ({"structured_outputs": {"json": "{"}}, ["structured_outputs.json_schema", "not JSON"]),
        ({"structured_outputs": {"json": [1]}}, ["structured_outputs.json_schema", "object"]),
        ({"guided_json": 5}, ["guided_json", "5"]),
        ({"guided_choice": "yes"}, ["guided_choice", "list"]),
        ({"guided_regex": "a" * (LONGEST_DESCRIPTION + 1)}, ["guided_regex"]),
        ({"guided_whitespace_pattern": " "}, ["guided_whitespace_pattern"]),
    ],
)
def test_a_wrong_form_is_an_error_record_that_says_why(body: dict[str, Any], words: list[str]) -> None:
    record = line(**body)
    assert isinstance(record, ErrorRecord) and record.custom_id == "a"
    assert all(word in record.message for word in ["line 7", "body.", *words]), record.message
    assert len(record.message) < 300


def test_the_python_api_takes_objects_texts_and_pydantic_classes() -> None:
    from pydantic import BaseModel

    class Person(BaseModel):
        name: str

    form = StructuredOutputs(json=Person)
    assert form.json_schema == Person.model_json_schema()
    params = SamplingParams(structured_outputs={"json_schema": PERSON}, max_tokens=5)
    assert params.replace(max_tokens=6).structured_outputs == StructuredOutputs(json=json.dumps(PERSON))
    with pytest.raises(ParameterError, match=r"^structured_outputs: it must have exactly one of"):
        SamplingParams(structured_outputs={})
    with pytest.raises(ParameterError, match=r"^structured_outputs\.regex: "):
        SamplingParams(structured_outputs={"regex": 5})
    with pytest.raises(ParameterError, match=r"^it must have exactly one of"):
        StructuredOutputs()
    with pytest.raises(ParameterError, match="not JSON"):
        StructuredOutputs(json_schema={"const": float("nan")})


def test_a_default_in_the_yaml_is_saved_and_read_back(tmp_path: Path) -> None:
    from nanoflow.config import load_config, save_config

    (tmp_path / "m").mkdir()
    path = tmp_path / "job.yaml"
    path.write_text(
        f"model: {{path: m}}\nworkload: {{synthetic: {{input_len: 3, output_len: 3}}}}\n"
        f"output: {{path: {tmp_path}/o}}\n"
        "sampling: {structured_outputs: {json: {type: object, properties: {b: {}, a: {}}}}}\n"
    )
    config = load_config(path)
    assert config.sampling.structured_outputs is not None
    assert list(config.sampling.structured_outputs.json_schema["properties"]) == ["b", "a"]  # type: ignore[index]
    save_config(config)
    assert load_config(config.output.config_path).sampling == config.sampling


# Grammars


def byte_level(folder: Path) -> Tokenizer:
    save_tokenizer(folder)
    return Tokenizer.from_file(folder / "tokenizer.json")


def sentencepiece() -> Tokenizer:
    """As SentencePiece's BPE: a blank in front of every text, bytes where no piece fits, an unknown token."""
    pieces = ["<unk>", "<eos>", "<turn>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = ["\u2581", *'abcdefghijklmnopqrstuvwxyz0123456789{}[]:,."-é']
    merges = [("\u2581", letter) for letter in "abcyn{"] + [("y", "e"), ("ye", "s"), ("n", "o"), ('"', ":"), ("a", "b")]
    vocab = {piece: id for id, piece in enumerate([*pieces, *letters, *(x + y for x, y in merges)])}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<eos>", "<turn>"])
    return Tokenizer(backend)


@pytest.fixture(scope="module", params=["bytes", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return byte_level(tmp_path_factory.mktemp("tokenizer")) if request.param == "bytes" else sentencepiece()


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, tokenizer.vocab_size + 45, [EOS])


def masks_of(grammars: Grammars, constraints: list[Constraint | None]) -> np.ndarray:
    """[M, V] bool, through the thread that makes them."""
    maker = grammars.mask_maker()
    masks = TokenMasks(np.arange(len(constraints), dtype=np.int32))
    maker.start(masks, constraints)
    words = masks.ready.result(timeout=60)
    maker.close()
    return np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, : grammars.vocab_size].astype(bool)


def write(grammars: Grammars, form: StructuredOutputs, seed: int, limit: int = 300, close: float = 0.4) -> list[int]:
    """Random tokens under the form's masks, until it ends; those that end strings and lists are preferred."""
    rng = random.Random(seed)
    constraint = grammars.constraint(form, ignore_eos=False)
    tokens: list[int] = []
    while len(tokens) < limit:
        allowed = np.unpackbits(np.frombuffer(constraint.matcher.compute_bitmask(), np.uint8), bitorder="little")
        choices = np.flatnonzero(allowed[: grammars.vocab_size]).tolist()
        assert choices
        ends = [token for token in choices if token == EOS or words_of(grammars)[token][:1] in (b'"', b"]", b"}")]
        tokens.append(rng.choice(ends if ends and rng.random() < close else choices))
        if constraint.advance(tokens[-1]):
            assert constraint.error is None
            return tokens
    return []


@lru_cache
def words_of(grammars: Grammars) -> list[bytes]:
    assert grammars._tokenizer is not None
    return [grammars._tokenizer.token_bytes(token) or b"" for token in range(grammars.vocab_size)]


def text_of(grammars: Grammars, tokens: list[int]) -> str:
    return b"".join(words_of(grammars)[token] for token in tokens if token != EOS).decode()


@pytest.mark.parametrize(
    ("form", "matches"),
    [
        ({"regex": "[ab]{3}c?"}, lambda text: re.fullmatch("[ab]{3}c?", text)),
        ({"regex": "^(yes|no)é$"}, lambda text: text in ("yesé", "noé")),
        ({"regex": r"\d+(\.\d{2})?"}, lambda text: re.fullmatch(r"\d+(\.\d{2})?", text)),
        ({"choice": ["yes", "no", "ab\n", "é/", 'a"b\\', "日本", "a", "abba"]}, lambda text: text in FORM_CHOICES),
        ({"grammar": 'root ::= "a" root "b" | "no"'}, lambda text: re.fullmatch(r"(a*)no(b*)", text)),
        ({"grammar": 'start: "a" start "b" | "no"'}, lambda text: text.count("a") == text.count("b")),
        ({"json_schema": PERSON}, lambda text: jsonschema.validate(json.loads(text), PERSON) is None),
        ({"json_schema": PERSON, "disable_any_whitespace": True}, lambda text: " " not in text.partition('"name"')[0]),
        ({"json_object": True}, lambda text: isinstance(json.loads(text), dict)),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_random_tokens_under_the_masks_have_the_form(grammars: Grammars, form: dict[str, Any], matches: Any) -> None:
    finished = 0
    for seed in range(12):
        tokens = write(grammars, StructuredOutputs(**form), seed)
        if tokens:
            finished += 1
            assert matches(text_of(grammars, tokens)), text_of(grammars, tokens)
    assert finished >= 6


FORM_CHOICES = ["yes", "no", "ab\n", "é/", 'a"b\\', "日本", "a", "abba"]


def test_the_tokenizer_decodes_what_the_masks_allowed(tokenizer: Tokenizer, grammars: Grammars) -> None:
    for seed in range(6):
        tokens = write(grammars, StructuredOutputs(json_schema=PERSON), seed)
        assert tokenizer.decode(tokens) == text_of(grammars, tokens)


def test_no_special_token_and_no_padding_id_is_ever_allowed(tokenizer: Tokenizer, grammars: Grammars) -> None:
    anything = grammars.constraint(StructuredOutputs(regex="(?s).*"), ignore_eos=False)
    goes_on = grammars.constraint(StructuredOutputs(regex="(?s).*"), ignore_eos=True)
    ended = grammars.constraint(StructuredOutputs(regex="a?"), ignore_eos=True)
    ended.advance(tokenizer.backend.token_to_id("a"))
    masks = masks_of(grammars, [anything, None, goes_on, ended])
    special = sorted(tokenizer.special_ids)
    assert len(special) >= 2
    assert masks[0, special].tolist() == [token == EOS for token in special]
    assert not masks[0, tokenizer.vocab_size :].any()
    assert masks[0].sum() > 200
    assert masks[1].all()
    assert not masks[2, special].any() and masks[2].sum() == masks[0].sum() - 1
    assert np.flatnonzero(masks[3]).tolist() == [EOS]


def test_several_tokens_may_end_the_output(tokenizer: Tokenizer) -> None:
    ends = sorted(tokenizer.special_ids)[:2]
    several = Grammars(tokenizer, tokenizer.vocab_size, [*ends, tokenizer.vocab_size + 9])
    constraint = several.constraint(StructuredOutputs(regex="a|ab"), ignore_eos=False)
    assert not masks_of(several, [constraint])[0, ends].any()
    assert not constraint.advance(tokenizer.backend.token_to_id("a"))
    assert masks_of(several, [constraint])[0, ends].all()
    assert constraint.advance(ends[1]) and constraint.error is None


def test_the_output_ends_where_the_grammar_does(grammars: Grammars, tokenizer: Tokenizer) -> None:
    """Without a token that says so, if nothing may follow."""
    tokens = write(grammars, StructuredOutputs(regex="[xyz]{2}"), 1)
    assert len(tokens) == 2 and EOS not in tokens


BAD = [
    ({"regex": "["}, "unclosed"),
    ({"regex": "(?=a)b"}, "look"),
    ({"regex": r"(a)\1"}, "backref"),
    ({"json_schema": {"type": "strin"}}, "strin"),
    ({"json_schema": {"type": "string", "minLength": 5, "maxLength": 2}}, "minLength"),
    ({"json_schema": {"$ref": "#/nowhere"}}, "nowhere"),
    ({"json_schema": {"$ref": "http://example.com/x.json"}}, "example.com"),
    ({"json_schema": {"not": {}}}, "not"),
    ({"grammar": "root ::= ("}, "Expected"),
    ({"grammar": "start: start"}, ""),
    ({"grammar": "root ::= " + "(" * 5000 + '"a"' + ")" * 5000}, "recursion"),
    ({"regex": "(" * 100000}, ""),
]


@pytest.mark.parametrize(("form", "word"), BAD, ids=lambda value: str(value)[:30])
def test_a_form_that_cannot_be_compiled_is_refused_in_one_line(
    grammars: Grammars, form: dict[str, Any], word: str
) -> None:
    given = StructuredOutputs(**form)
    for _ in range(2):
        with pytest.raises(ParameterError) as refused:
            grammars.compile(given)
        message = str(refused.value)
        assert message.startswith(f"structured_outputs.{given.kind}: ") and word in message
        assert "\n" not in message and len(message) < 350


def test_grammars_and_refusals_are_compiled_once(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = Grammars(tokenizer, tokenizer.vocab_size, [EOS])
    compiled = []
    real = grammars._compile
    monkeypatch.setattr(grammars, "_compile", lambda form: compiled.append(form) or real(form))
    monkeypatch.setattr("nanoflow.grammars.CACHED", 2)
    for _ in range(2):
        assert grammars.compile(StructuredOutputs(regex="a")) is grammars.compile(StructuredOutputs(regex="a"))
        with pytest.raises(ParameterError):
            grammars.compile(StructuredOutputs(regex="["))
    assert len(compiled) == 2
    grammars.compile(StructuredOutputs(choice=["a"]))  # the oldest, "a", makes room
    grammars.compile(StructuredOutputs(choice=["a"]))
    assert len(compiled) == 3
    grammars.compile(StructuredOutputs(regex="a"))
    assert len(compiled) == 4


def test_one_constraint_knows_nothing_of_another(grammars: Grammars, tokenizer: Tokenizer) -> None:
    form = StructuredOutputs(regex="ab|cd")
    first, second = (grammars.constraint(form, ignore_eos=False) for _ in range(2))
    first.advance(tokenizer.backend.token_to_id("c"))
    assert masks_of(grammars, [second])[0, tokenizer.backend.token_to_id("a")]
    assert not masks_of(grammars, [first])[0, tokenizer.backend.token_to_id("a")]


def test_what_models_without_tokenizer_or_end_say(tokenizer: Tokenizer) -> None:
    with pytest.raises(ParameterError, match="needs a tokenizer"):
        Grammars(None, 10, [EOS]).compile(StructuredOutputs(regex="a"))
    with pytest.raises(ParameterError, match="ends the output"):
        Grammars(tokenizer, VOCAB, []).compile(StructuredOutputs(regex="a"))


@pytest.mark.parametrize(
    "form",
    [
        {"regex": "(a{1000}){1000}"},
        {"regex": "(.*a){200}"},
        {"choice": [f"choice number {number}" for number in range(10000)]},
        {"json_schema": {"type": "object", "properties": {f"k{number}": {} for number in range(3000)}}},
        {"json_schema": {"enum": [str(number) for number in range(20000)]}},
        {"grammar": "start: " + " | ".join(f'"w{number}"' for number in range(15000))},
    ],
    ids=lambda form: next(iter(form.values()))[:20] if isinstance(next(iter(form.values())), str) else next(iter(form)),
)
def test_large_forms_compile_or_are_refused_in_bounded_time(grammars: Grammars, form: dict[str, Any]) -> None:
    began = time.perf_counter()
    try:
        grammars.compile(StructuredOutputs(**form))
    except ParameterError as error:
        assert len(str(error)) < 350
    assert time.perf_counter() - began < 20


def test_masks_that_nobody_wants_any_more_are_dropped(grammars: Grammars) -> None:
    maker = grammars.mask_maker()
    masks = TokenMasks(np.zeros(1, np.int32))
    assert masks.ready.cancel()
    maker.start(masks, [None])
    broken = TokenMasks(np.zeros(1, np.int32))
    maker.start(broken, [object()])  # type: ignore[list-item]
    with pytest.raises(AttributeError):
        broken.ready.result(timeout=60)
    maker.close()


NAMES = st.sampled_from(["a", "b", "name", "x y", "é"])
COUNTS = st.tuples(st.integers(0, 4), st.integers(0, 4)).map(sorted)
BOUNDS = st.tuples(st.integers(-999, 9999), st.integers(-999, 9999)).map(sorted)
VALUES = st.lists(st.integers(0, 99) | st.text(max_size=4), min_size=1, max_size=4)
LEAVES = st.one_of(
    st.builds(lambda counts: {"type": "string", "minLength": counts[0], "maxLength": counts[1]}, COUNTS),
    st.builds(lambda text: {"type": "string", "pattern": text}, st.sampled_from(["^[ab]{2}$", "^a+b?$", "^(yes|no)$"])),
    st.builds(lambda bounds: {"type": "integer", "minimum": bounds[0], "maximum": bounds[1]}, BOUNDS),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": "number"}, {"type": ["string", "null"]}]),
    st.builds(lambda values: {"enum": values}, VALUES),
    st.builds(lambda value: {"const": value}, st.text(max_size=4) | st.booleans() | st.none()),
)


def an_object(properties: dict[str, Any], required: list[str], more: bool) -> dict[str, Any]:
    names = [name for name in dict.fromkeys(required) if name in properties]
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": more}


SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(an_object, st.dictionaries(NAMES, inner, max_size=3), st.lists(NAMES, max_size=3), st.booleans()),
        st.builds(lambda item, most: {"type": "array", "items": item, "maxItems": most}, inner, st.integers(0, 3)),
        st.builds(lambda parts: {"anyOf": parts}, st.lists(inner, min_size=1, max_size=3)),
    ),
    max_leaves=6,
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=SCHEMAS, seed=st.integers(0, 99))
def test_random_schemas_are_kept_to(grammars: Grammars, schema: dict[str, Any], seed: int) -> None:
    tokens = write(grammars, StructuredOutputs(json_schema=schema), seed, close=0.7)
    if tokens:
        jsonschema.validate(json.loads(text_of(grammars, tokens)), schema)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["type", "properties", "items", "enum", "pattern", "$ref", "anyOf", "minimum", "a"])
                | st.text(max_size=3),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    ).filter(lambda value: isinstance(value, dict)),
    st.text(st.sampled_from("ab()[]{}|*+?^$.\\dw-,1é\n\"':=_ "), min_size=1, max_size=20),
)
def test_nonsense_is_compiled_or_refused(grammars: Grammars, schema: dict[str, Any], text: str) -> None:
    for form in ({"json_schema": schema}, {"regex": text}, {"grammar": "root ::= " + text}, {"grammar": text}):
        try:
            grammars.compile(StructuredOutputs(**form))
        except ParameterError as error:
            assert "\n" not in str(error)
