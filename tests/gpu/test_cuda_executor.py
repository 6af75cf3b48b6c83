"""CUDA graphs: the reference executor's tokens under thousands of random iterations, and eager launches bit by bit."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from nanoflow import LLM, RequestOutput, SamplingParams
from nanoflow.errors import OutOfMemoryError
from nanoflow.pipeline.cuda_executor import CudaExecutor
from nanoflow.pipeline.reference_executor import ReferenceExecutor
from nanoflow.structured_outputs import StructuredOutputs
from tests.gpu.checkpoints import save_model
from tests.unit.test_engine import PAGE_BYTES, assert_same, random_request
from tests.unit.tiny_model import VOCAB

pytestmark = pytest.mark.gpu

REQUESTS = 1200
MOST_DIFFERENT = 3
"""Requests of `REQUESTS` that may differ from the CPU's, all of them drawn at random: a draw may lie so close to the
border between two tokens (1e-6) that the rounding of another device moves it across."""


def mix(count: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Requests with every kind of parameter, some with a grammar."""
    pairs = [random_request(number) for number in range(count)]
    params = [one if one.seed is not None else one.replace(seed=5) for _, one in pairs]
    for number in range(0, count, 40):
        form = StructuredOutputs(regex="[a-d]{4}-[0-9]{2,6}")
        params[number] = params[number].replace(structured_outputs=form, stop_token_ids=(), logit_bias={})
    return [prompt for prompt, _ in pairs], params


def make_llm(folder: Path, device: str = "cuda", **options: Any) -> LLM:
    return LLM(model=folder, dtype="float32", device=device, **{"kv_memory": "64MiB", "page_size": 16, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[RequestOutput]:
    prompts, params = mix(REQUESTS)
    with make_llm(folder, "cpu") as llm:
        assert isinstance(llm.engine.executor, ReferenceExecutor)
        return llm.generate(prompts, params)


def test_two_thousand_iterations_of_a_random_mix(folder: Path, expected: list[RequestOutput]) -> None:
    """The KV cache has a tenth of the pages that 24 running requests would need."""
    prompts, params = mix(REQUESTS)
    pages = 24 * 10 // 10
    memory = pages * 16 * PAGE_BYTES
    with make_llm(folder, max_batch_tokens=40, max_running=24, kv_memory=memory) as llm:
        executor = llm.engine.executor
        assert isinstance(executor, CudaExecutor) and executor._layers and executor._heads
        outputs = llm.generate(prompts, params)
        different = [i for i, (one, other) in enumerate(zip(outputs, expected, strict=True)) if not same(one, other)]
        print(f"{len(different)} of {REQUESTS} differ: {[params[i] for i in different]}")
        assert len(different) <= MOST_DIFFERENT and all(params[i].temperature > 0 for i in different)
        assert llm.engine.stats.iterations >= 2000 and llm.engine.stats.padding_rows > 0
        assert llm.engine.scheduler.preemptions > 20
        assert llm.engine.scheduler.kv.used_pages == 0


def same(output: RequestOutput, expected: RequestOutput) -> bool:
    try:
        assert_same([output], [expected])
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_replayed_graphs_equal_eager_launches_bit_by_bit(folder: Path, dtype: str) -> None:
    rng = random.Random(7)
    prompts = [[rng.randrange(2, VOCAB) for _ in range(rng.randrange(1, 90))] for _ in range(80)]
    params = SamplingParams(max_tokens=60, ignore_eos=True, temperature=0.8, seed=3, logprobs=2)
    runs = []
    for graphs in (True, False):
        sizes: dict[str, Any] = {"max_batch_tokens": 300, "kv_memory": "16MiB", "page_size": 16}
        with LLM(model=folder, dtype=dtype, device="cuda", cuda_graphs=graphs, **sizes) as llm:
            outputs = llm.generate(prompts, params)
            executor: Any = llm.engine.executor
            assert bool(executor._layers) == graphs
            torch.cuda.synchronize()
            runs.append((outputs, [kv.clone() for kv in executor.bound.kv], llm.engine.stats))
    (replayed, replayed_kv, stats), (eager, eager_kv, eager_stats) = runs
    assert stats.iterations == eager_stats.iterations and stats.padding_rows == eager_stats.padding_rows > 0
    for one, other in zip(replayed, eager, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        assert one.outputs[0].logprobs == other.outputs[0].logprobs
    for one_kv, other_kv in zip(replayed_kv, eager_kv, strict=True):
        # Page 0 takes the writes of padding rows, which race with each other.
        assert torch.equal(one_kv[1:].view(torch.uint8), other_kv[1:].view(torch.uint8))


def test_many_runs_give_the_same_tokens(folder: Path) -> None:
    """A result that changes from run to run is a race."""
    prompts, params = mix(200)
    seen = []
    with make_llm(folder, max_batch_tokens=64, kv_memory=40 * 16 * PAGE_BYTES) as llm:
        for _ in range(5):
            seen.append([[c.token_ids for c in output.outputs] for output in llm.generate(prompts, params)])
    assert all(one == seen[0] for one in seen)


def test_memory_that_runs_out_in_a_capture_is_a_message(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", full)
    with pytest.raises(OutOfMemoryError, match=r"memory ran out in the capture of 2048 rows: .* Lower kv_memory"):
        make_llm(folder)
