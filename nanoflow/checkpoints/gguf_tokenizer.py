"""The tokenizer that a GGUF file describes, rebuilt with the `tokenizers` package.

Two kinds: ``gpt2``, byte-level BPE whose way of cutting text is named by ``tokenizer.ggml.pre``; and ``llama``,
SentencePiece BPE with byte fallback, whose merges follow from the pieces' scores.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer as Backend,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from nanoflow.errors import CheckpointError
from nanoflow.tokenizer import Tokenizer

__all__ = ["build_tokenizer"]

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
"""Values of ``tokenizer.ggml.token_type`` that matter here."""

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_REGEX = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "smaug-bpe"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2),
    "tekken": _TEKKEN,
}
_GPT2 = ("gpt-2", "default", "mpt", "olmo", "phi-2", "jina-es", "jina-de")
_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")
"""As GPT-2, but every digit is a piece of its own."""
_WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "tekken")
"""Those that take a word that is in the vocabulary as it is, without merging, and begin every text with BOS."""


def build_tokenizer(path: Path, metadata: Mapping[str, Any], eos_token_ids: tuple[int, ...]) -> Tokenizer | None:
    """The tokenizer in a GGUF file's metadata, or None if there is none. Raises CheckpointError for an unknown kind."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None or kind == "no_vocab" or "tokenizer.ggml.tokens" not in metadata:
        return None
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if len(types) != len(tokens):
        raise CheckpointError(f"{path}: {len(tokens)} tokens but {len(types)} token types. Fetch the file again.")
    try:
        if kind == "gpt2":
            backend, bos_by_default = _byte_level(path, metadata, tokens)
        elif kind == "llama":
            backend, bos_by_default = _sentencepiece(metadata, tokens, types), True
        else:
            raise CheckpointError(
                f"{path}: tokenizer.ggml.model is {kind!r}; 'gpt2' and 'llama' are supported. Use the Hugging Face "
                "folder."
            )
    except CheckpointError:
        raise
    except Exception as error:  # the package raises plain Exception for vocabularies and merges that do not fit
        raise CheckpointError(f"{path}: the tokenizer in it is damaged ({error}). Fetch the file again.") from None
    backend.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, t in zip(tokens, types, strict=True)
            if t == _CONTROL
        ]
    )
    backend.add_tokens(
        [AddedToken(token, normalized=False) for token, t in zip(tokens, types, strict=True) if t == _USER_DEFINED]
    )

    special = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"), ("sep", "seperator")):
        id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if id is not None and 0 <= id < len(tokens):
            special[f"{name}_token"] = tokens[id]
    _add_ends(backend, metadata, special, bos_by_default)
    return Tokenizer(
        backend,
        chat_template=metadata.get("tokenizer.chat_template"),
        special_tokens=special,
        eos_token_ids=eos_token_ids,
    )


def _byte_level(path: Path, metadata: Mapping[str, Any], tokens: list[str]) -> tuple[Backend, bool]:
    """The backend, and whether texts begin with BOS unless the file says otherwise."""
    pre = metadata.get("tokenizer.ggml.pre", "gpt-2")
    cut: pre_tokenizers.PreTokenizer
    if pre in _REGEX:
        split = pre_tokenizers.Split(Regex(_REGEX[pre]), behavior="isolated", invert=False)
        cut = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    elif pre in _DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        cut = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    elif pre in _GPT2:
        cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        raise CheckpointError(
            f"{path}: tokenizer.ggml.pre is {pre!r}; supported are {', '.join(sorted({*_REGEX, *_DIGITS, *_GPT2}))}. "
            "Use the Hugging Face folder."
        )
    merges = []
    for merge in metadata.get("tokenizer.ggml.merges", []):
        # A token may itself hold a space only in its first place, so the separator is the first one after that.
        left, _, right = merge[1:].partition(" ")
        merges.append((merge[:1] + left, right))
    vocabulary = {token: id for id, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in _WHOLE_WORDS))
    if pre in _REGEX and _REGEX[pre] == _QWEN2:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = cut
    backend.decoder = decoders.ByteLevel()
    return backend, pre in _WHOLE_WORDS


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> Backend:
    vocabulary = {token: id for id, token in enumerate(tokens)}
    scores: list[float] = metadata["tokenizer.ggml.scores"]
    unknown = next((token for token, t in zip(tokens, types, strict=True) if t == _UNKNOWN), None)
    backend = Backend(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(vocabulary, tokens, types, scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=_BYTE in types,
        )
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    space = normalizers.Replace(" ", "\u2581")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), space]) if prefix else space
    steps: list[decoders.Decoder] = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _merges(
    vocabulary: Mapping[str, int], tokens: list[str], types: list[int], scores: list[float]
) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose joint piece has the best score; as a list of merges, best first."""
    ranked = []
    for id, token in enumerate(tokens):
        if types[id] in (_UNKNOWN, _CONTROL, _BYTE):
            continue
        for cut in range(1, len(token)):
            left, right = vocabulary.get(token[:cut]), vocabulary.get(token[cut:])
            if left is not None and right is not None:
                ranked.append((-scores[id], id, left, right))
    ranked.sort()
    return [(tokens[left], tokens[right]) for _, _, left, right in ranked]


def _add_ends(backend: Backend, metadata: Mapping[str, Any], special: Mapping[str, str], bos_by_default: bool) -> None:
    """Begin and end texts as the file says; where it is silent, as its kind of tokenizer does."""
    ends = {"bos_token": bos_by_default, "eos_token": False}
    used = {}
    for name, default in ends.items():
        wanted = metadata.get(f"tokenizer.ggml.add_{name}", default)
        if wanted and name in special:
            used[name] = special[name]
    if not used:
        return
    begin = [used["bos_token"]] if "bos_token" in used else []
    end = [used["eos_token"]] if "eos_token" in used else []
    backend.post_processor = processors.TemplateProcessing(
        single=[*begin, "$A", *end],
        pair=[*begin, "$A", *end, *(f"{token}:1" for token in begin), "$B:1", *(f"{token}:1" for token in end)],
        special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys(used.values())],
    )
