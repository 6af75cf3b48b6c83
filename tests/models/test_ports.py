"""Every port and variant on tiny random weights: logits within 1e-4 of transformers', however a prompt is cut."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from nanoflow.models.config import ModelConfig
from nanoflow.models.registry import build_graph
from nanoflow.ops.rope import RopeConfig
from tests.unit.ops_harness import GraphRunner, Pages, Piece, dense_batch

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 92,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
VARIANTS = {
    "llama": ("Llama", {}),
    "llama-mha": ("Llama", {"num_key_value_heads": 6}),
    "llama-mqa": ("Llama", {"num_key_value_heads": 1}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-head-dim": ("Llama", {"head_dim": 20}),
    "llama-bias": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-eps": ("Llama", {"rms_norm_eps": 0.03}),
    "llama-theta": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 33.0}}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}}),
    "llama-llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "llama-yarn-untruncated": ("Llama", {"rope_parameters": {**YARN, "truncate": False, "beta_fast": 8.0}}),
    "llama-yarn-attention-factor": ("Llama", {"rope_parameters": {**YARN, "attention_factor": 1.7}}),
    "llama-yarn-mscale": ("Llama", {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {}),
    "qwen2-windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen2-layer-types": (
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-bias-tied-yarn": (
        "Qwen3",
        {"head_dim": 12, "attention_bias": True, "tie_word_embeddings": True, "rope_parameters": YARN},
    ),
    "qwen3-windows": (
        "Qwen3",
        {"head_dim": 16, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    ),
}
LENGTHS = (41, 17, 30)


def make_model(family: str, changes: dict, seed: int = 0):
    """A tiny model with weights large enough that attention and every bias matter."""
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes}, attn_implementation="eager")
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name and parameter.ndim == 1 else 0.0, 0.15)
    given = {**config.to_dict(), "architectures": [f"{family}ForCausalLM"]}
    return model, ModelConfig.from_dict(given)


def prompts(lengths=LENGTHS, seed: int = 1) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, SIZES["vocab_size"], length).tolist() for length in lengths]


@torch.no_grad()
def expected_logits(model, tokens: list[int]) -> torch.Tensor:
    return model(torch.tensor([tokens])).logits[0]


def feed(runner: GraphRunner, requests: list[list[int]], chunk: int, decode_from: int, nano_batches: int, **options):
    """Feeds all requests side by side, `chunk` tokens an iteration and one by one from position `decode_from`."""
    found: list[list[torch.Tensor]] = [[] for _ in requests]
    done = [0] * len(requests)
    while any(at < len(tokens) for at, tokens in zip(done, requests, strict=True)):
        pieces: list[list[Piece]] = [[] for _ in range(nano_batches)]
        for request, tokens in enumerate(requests):
            at = done[request]
            if at >= len(tokens):
                continue
            if at >= decode_from:
                pieces[request % nano_batches].append(Piece(request, at, tokens[at : at + 1], decode=True))
                done[request] += 1
                continue
            # The chunk straddles the nano-batches: a piece in each, earlier pieces first.
            end = min(at + chunk, decode_from, len(tokens))
            bounds = np.linspace(at, end, nano_batches + 1).astype(int)
            for index, (first, last) in enumerate(itertools.pairwise(bounds)):
                if last > first:
                    pieces[index].append(Piece(request, int(first), tokens[first:last]))
            done[request] = end
        batch = dense_batch(pieces, runner.pages, padding=options.get("padding", 0))
        logits = runner.step(batch, split=options.get("split", True), poison=options.get("poison", False))
        for start, length, context in [
            *zip(batch.prefill_rows, batch.prefill_lengths, batch.prefill_context, strict=True),
            *((row, 1, context) for row, context in zip(batch.decode_rows, batch.decode_context, strict=True)),
        ]:
            request = int(batch.slots[start])
            found[request].append((int(context) - int(length), logits[start : start + length]))
    return [torch.cat([rows for _, rows in sorted(parts, key=lambda part: part[0])]) for parts in found]


@pytest.mark.parametrize("reference", [True, False], ids=["reference", "kernels"])
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_match_transformers(name: str, reference: bool) -> None:
    family, changes = VARIANTS[name]
    model, config = make_model(family, changes)
    requests = prompts()
    expected = [expected_logits(model, tokens) for tokens in requests]
    graph = build_graph(config)
    ways = {
        "whole prompts": {"chunk": 1000, "decode_from": 1000, "nano_batches": 1},
        "chunks of 7 over 3 nano-batches, then decoding": {"chunk": 7, "decode_from": 13, "nano_batches": 3},
        "unsplit ops over 2 nano-batches, padded with NaN": {
            "chunk": 9,
            "decode_from": 14,
            "nano_batches": 2,
            "split": False,
            "padding": 3,
            "poison": True,
        },
    }
    for way, options in ways.items():
        runner = GraphRunner(graph, model.state_dict(), Pages(4, len(requests), 16), reference=reference)
        for found, wanted in zip(feed(runner, requests, **options), expected, strict=True):
            assert wanted.std() > 0.3
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0, msg=lambda text, way=way: f"{way}: {text}")


SETTINGS = {
    "rope": [name for name in VARIANTS if any(word in name for word in ("theta", "linear", "llama3", "yarn"))],
    "windows": [name for name in VARIANTS if "window" in name or "layer-types" in name],
    "eps": ["llama-eps"],
}


@pytest.mark.parametrize(
    ("setting", "name"), [(setting, name) for setting, names in SETTINGS.items() for name in names]
)
def test_a_variant_without_its_setting_would_be_noticed(setting: str, name: str) -> None:
    family, changes = VARIANTS[name]
    model, config = make_model(family, changes)
    plain = {"rope": RopeConfig(config.head_dim), "windows": (None,) * config.layers, "eps": 1e-6}[setting]
    tokens = prompts()[0]
    graph = build_graph(replace(config, **{setting: plain}))
    runner = GraphRunner(graph, model.state_dict(), Pages(4, 1, 16), reference=True)
    (found,) = feed(runner, [tokens], chunk=1000, decode_from=1000, nano_batches=1)
    assert (found - expected_logits(model, tokens)).abs().max() > 1e-2


@pytest.mark.parametrize("prompt", [1, 20, 32])
def test_dynamic_rope_matches_decoding_past_the_trained_context(prompt: int) -> None:
    """transformers stretches the base when a token passes the context, and keeps the keys that it rotated before."""
    rope = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 3.0}
    model, config = make_model("Llama", {"rope_parameters": rope, "max_position_embeddings": 32})
    (tokens,) = prompts((58,))
    expected = []
    with torch.no_grad():
        given = model(torch.tensor([tokens[:prompt]]), use_cache=True)
        expected.append(given.logits[0])
        for token in tokens[prompt:]:
            given = model(torch.tensor([[token]]), past_key_values=given.past_key_values, use_cache=True)
            expected.append(given.logits[0])
    wanted = torch.cat(expected)
    for chunk, decode_from in ((1000, 1000), (7, 40), (5, prompt)):
        runner = GraphRunner(build_graph(config), model.state_dict(), Pages(4, 1, 16), reference=False)
        (found,) = feed(runner, [tokens], chunk=chunk, decode_from=decode_from, nano_batches=2)
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def test_bfloat16_stays_near_float32() -> None:
    model, config = make_model("Llama", {})
    (tokens,) = prompts((40,))
    wanted = expected_logits(model, tokens)
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    theirs = model.to(torch.bfloat16)
    error = (expected_logits(theirs, tokens).float() - wanted).abs().mean()
    for reference in (True, False):
        runner = GraphRunner(build_graph(config), state, Pages(4, 1, 16), reference=reference)
        (found,) = feed(runner, [tokens], chunk=9, decode_from=20, nano_batches=2)
        assert found.dtype == torch.bfloat16
        assert (found.float() - wanted).abs().mean() < 1.5 * error
