"""A tiny Llama checkpoint for tests of the whole engine: random, with logits far apart, and a tokenizer of bytes."""

import random
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

VOCAB = 300
EOS = 1
CONTEXT = 160


def save_tiny_llama(folder: Path, **changes: Any) -> Path:
    """Save the model into `folder`; `changes` are keys of transformers' LlamaConfig."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    values: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": VOCAB,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.4,
        "eos_token_id": EOS,
        "bos_token_id": None,
    }
    LlamaForCausalLM(LlamaConfig(**(values | changes))).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def request_lines(count: int) -> list[dict[str, Any]]:
    """Lines of a job, the same at every call: greedy ones, sampled ones, and some of two completions with a seed."""
    rng = random.Random(5)
    lines = []
    for number in range(count):
        line = {"custom_id": f"r{number}", "prompt": [rng.randrange(2, VOCAB) for _ in range(rng.randrange(1, 30))]}
        lines.append(line | rng.choice([{}, {"temperature": 1.0}, {"temperature": 1.2, "seed": 7, "n": 2}]))
    return lines


def save_tokenizer(folder: Path) -> None:
    """Save the tokenizer of bytes and pairs of letters into `folder`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = "abcdefgh"
    words = [(x, y) for x in letters for y in letters][: VOCAB - 2 - len(alphabet)]
    vocab = {"<pad>": 0, "<eos>": EOS, **{c: i + 2 for i, c in enumerate(alphabet)}}
    vocab.update({x + y: len(alphabet) + 2 + i for i, (x, y) in enumerate(words)})
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=words))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>", "<pad>"])
    tokenizer.save(str(folder / "tokenizer.json"))
