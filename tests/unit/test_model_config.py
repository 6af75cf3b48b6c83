"""Reading config.json: both spellings of rotary settings, families' defaults, and what is refused."""

import pytest

from nanoflow.models.config import ModelConfig, UnsupportedModel
from nanoflow.models.registry import PORTS, build_graph, find_port, supported_architectures
from nanoflow.ops.rope import RopeConfig

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
}


def read(**changes) -> ModelConfig:
    return ModelConfig.from_dict({**BASE, **changes})


def test_defaults_of_llama() -> None:
    config = read()
    assert (config.kv_heads, config.head_dim, config.max_position_embeddings) == (8, 8, 2048)
    assert config.rope == RopeConfig(8, theta=10000.0) and config.eps == 1e-6
    assert config.windows == (None, None, None) and not config.tie_embeddings and config.eos_token_ids == ()
    assert not (config.attention_bias or config.o_bias or config.mlp_bias)


def test_both_spellings_of_rope_are_the_same() -> None:
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    old = read(rope_theta=500000.0, rope_scaling={"type": "llama3", **scaling}, max_position_embeddings=131072)
    new = read(
        rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, **scaling}, max_position_embeddings=131072
    )
    assert old == new
    assert old.rope == RopeConfig(
        8,
        theta=500000.0,
        type="llama3",
        factor=8.0,
        max_positions=131072,
        original_max_positions=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )


def test_rope_details() -> None:
    assert read(rope_parameters={"rope_theta": 7.0}, rope_theta=9.0).rope.theta == 7.0
    assert read(rope_scaling=None, rope_theta=9.0).rope.theta == 9.0
    assert read(partial_rotary_factor=0.5).rope.rotary_dim == 4
    yarn = {"rope_type": "yarn", "original_max_position_embeddings": 1024}
    assert read(rope_scaling=yarn, max_position_embeddings=4096).rope.factor == 4.0
    assert read(rope_scaling={"rope_type": "yarn", "factor": 2.0}).rope.original_max_positions == 2048


def test_windows() -> None:
    assert read(sliding_window=5).windows == (None,) * 3  # Llama has none, whatever its file says, as in transformers
    qwen = {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 8}
    assert read(**qwen).windows == (None, None, None)
    assert read(**qwen, use_sliding_window=False, sliding_window=5).windows == (None, None, None)
    assert read(**qwen, use_sliding_window=True, sliding_window=5, max_window_layers=1).windows == (None, 5, 5)
    assert read(**qwen, use_sliding_window=True, max_window_layers=0).windows == (4096,) * 3
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    assert read(**qwen, use_sliding_window=True, sliding_window=5, layer_types=types).windows == (5, None, 5)
    mistral = {"architectures": ["MistralForCausalLM"], "num_key_value_heads": 8}
    assert read(**mistral).windows == (4096,) * 3
    assert read(**mistral, sliding_window=None).windows == (None,) * 3


def test_families() -> None:
    qwen2 = read(architectures=["Qwen2ForCausalLM"], num_key_value_heads=8, attention_bias=False)
    assert qwen2.attention_bias and not qwen2.o_bias
    llama = read(attention_bias=True, mlp_bias=True)
    assert llama.attention_bias and llama.o_bias and llama.mlp_bias
    assert read(architectures=["Qwen3ForCausalLM"], num_key_value_heads=2).head_dim == 128
    assert read(eos_token_id=[3, 5]).eos_token_ids == (3, 5) and read(eos_token_id=2).eos_token_ids == (2,)


def test_tied_head_reads_the_embedding() -> None:
    tied, apart = build_graph(read(tie_word_embeddings=True)), build_graph(read())
    assert tied.epilogue[-1].weights[0].parts == ("model.embed_tokens.weight",)
    assert apart.epilogue[-1].weights[0].parts == ("lm_head.weight",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"hidden_size": None}, "key 'hidden_size' is missing"),
        ({"vocab_size": "big"}, "vocab_size must be a positive integer, not 'big'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, not 0"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(8\) is not a multiple of num_key_value_heads \(3\)"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a number of 0 or more, not 'small'"),
        ({"eos_token_id": ["x"]}, r"eos_token_id must be a token id or a list of them, not \['x'\]"),
        ({"layer_types": 3}, "layer_types must be a list, not 3"),
        ({"head_dim": 7}, "rotary_dim must be positive and even, not 7"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope type 'longrope' is not supported; supported: default"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope 'linear' needs a factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor of rope 'linear' must be a number, not '2'"),
        ({"rope_scaling": 3}, "rope_parameters must be a mapping, not 3"),
        (
            {"architectures": ["MistralForCausalLM"], "sliding_window": -4},
            "sliding_window must be a positive integer or null, not -4",
        ),
        ({"layer_types": ["full_attention"] * 2}, "layer_types has 2 entries; expected 3"),
        ({"layer_types": ["full_attention"] * 2 + ["mamba"]}, "'mamba' in layer_types is not supported"),
        ({"quantization_config": {"quant_method": "awq"}}, r"quantization_config \(awq\) is not supported"),
    ],
)
def test_refused(changes: dict, message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        read(**changes)


def test_unknown_architecture_is_named_with_the_supported_ones() -> None:
    with pytest.raises(UnsupportedModel, match="'GPT2LMHeadModel' is not supported; supported: LlamaForCausalLM, "):
        read(architectures=["GPT2LMHeadModel"])
    with pytest.raises(UnsupportedModel, match="without architectures is not supported"):
        read(architectures=None)
    assert [find_port({"architectures": [name]}) for name in supported_architectures()] == list(PORTS)
