"""The executor of CUDA graphs on a CPU: what its graphs would replay is launched again on the same static arrays.

At that, kernels see the batch of the capture; all that they know of the real one is what the iteration's one copy
brings. A kernel that looks at the batch itself, or an array that has no room, gives wrong tokens here.
"""

import gc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from nanoflow import LLM, RequestOutput, SamplingParams, loading
from nanoflow.ops.attention import DecodeAttention, PrefillAttention
from nanoflow.pipeline.cuda_executor import CudaExecutor, buckets
from nanoflow.structured_outputs import StructuredOutputs
from tests.unit.test_engine import REQUESTS, assert_same
from tests.unit.tiny_model import save_tiny_llama

PLAN = """
capacity: 48
nano_batches:
  a: {decode: 1, prefill: 1, rows: 48}
period:
  - whole:
      main: [qkv]
"""

LANES = """
capacity: 40
least_rows: 20
sms: 8
nano_batches:
  a: {decode: 0.5, prefill: 0.75, rows: 26}
  b: {decode: 0.5, prefill: 0.25, rows: 18}
partitions:
  split: [6, 2]
period:
  - split:
      compute: [o.a, gate_up.a, down.a, qkv.a@1, o.b, gate_up.b, down.b, qkv.b@1]
      memory: [decode_attention.b, decode_attention.a@1]
"""

PHASES = """
capacity: 48
nano_batches:
  a: {decode: 1, prefill: 0, rows: 16}
  b: {decode: 0, prefill: 1, rows: 32}
period:
  - whole:
      compute: [qkv.a, qkv.b, o.b, gate_up.b, down.b, o.a, gate_up.a, down.a]
      memory: [decode_attention.a, decode_attention.b]
"""

# Twenty prompts of one token make more prompts in one batch than a capture has room for.
SHORT = [([7 + number], SamplingParams(max_tokens=3, temperature=1.0, seed=number)) for number in range(20)]
FORMED = [
    ([5, 6], SamplingParams(max_tokens=12, seed=3, structured_outputs=StructuredOutputs(regex="[a-d]{4}-[0-9]{2,6}"))),
    ([9], SamplingParams(max_tokens=6, structured_outputs=StructuredOutputs(choice=("yes", "no", "perhaps")))),
]
MIX = SHORT + FORMED + [pair for pair in REQUESTS if len(pair[0]) < 40 and pair[1].max_tokens <= 30][:8]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_llama(tmp_path_factory.mktemp("tiny"))
    for name, text in (("plan", PLAN), ("lanes", LANES), ("phases", PHASES)):
        (folder / f"{name}.yaml").write_text(text)
    return folder


def run(folder: Path, **options: Any) -> tuple[list[RequestOutput], LLM]:
    sizes = {"kv_memory": "1MiB", "page_size": 16, "max_batch_tokens": 48, "max_running": 24, **options}
    with LLM(model=folder, dtype="float32", device="cpu", **sizes) as llm:
        params = [one if one.seed is not None else one.replace(seed=5) for _, one in MIX]
        return llm.generate([prompt for prompt, _ in MIX], params), llm


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[RequestOutput]:
    return run(folder)[0]


@pytest.mark.parametrize(
    ("plan", "graphs"),
    [
        ("plan.yaml", {(0, (8,)), (0, (16,)), (0, (32,)), (0, (48,))}),
        ("lanes.yaml", {(0, (16, 16)), (0, (26, 18)), (1, (8,)), (1, (16,)), (1, (32,)), (1, (48,))}),
        ("phases.yaml", {(0, (3, 5)), (0, (8, 8)), (0, (16, 16)), (0, (16, 32))}),
    ],
)
def test_a_mix_gives_the_reference_executors_tokens(
    plan: str, graphs: set[Any], folder: Path, expected: list[RequestOutput], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[CudaExecutor] = []
    filled: Counter[bool] = Counter()

    def executor(model: Any, engine: Any, programs: Any, weights: Any, kv: Any, *_: Any) -> CudaExecutor:
        sizes = {"slots": engine.max_running, "dtype": model.dtype, "device": model.device}
        made.append(CudaExecutor(programs, weights, kv, **sizes))
        assert set(made[0]._layers) == graphs and set(made[0]._heads) == {(0, 8), (0, 16), (0, 24)}
        fill = made[0]._static.fill

        def counted(*arguments: Any) -> bool:
            filled[fits := fill(*arguments)] += 1
            return fits

        monkeypatch.setattr(made[0]._static, "fill", counted)
        return made[0]

    monkeypatch.setattr(loading, "make_executor", executor)
    for op in (DecodeAttention, PrefillAttention):  # as on a GPU; the kernels for a CPU look at the batch itself
        monkeypatch.setattr(op, "preferred_kernel", lambda *_: "triton")
    # The head takes 24 rows at a time at most, and memory for some 25 pages makes requests wait and be preempted.
    outputs, llm = run(folder, plan=folder / plan, kv_memory=26 * 16 * 512)
    assert_same(outputs, expected)
    stats = llm.engine.stats
    assert stats.padding_rows > 0
    assert stats.iterations > filled[True] > 15, "iterations were replayed, and some had no room"


def test_batches_of_a_single_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row is a decode row or a prompt's: no graph serves both."""
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "kv_memory": "1MiB", "max_batch_tokens": 1}
    with LLM(model=folder, **options) as llm:
        expected = llm.generate([[5, 6, 7], [9]], params)

    def executor(model: Any, engine: Any, programs: Any, weights: Any, kv: Any, *_: Any) -> CudaExecutor:
        return CudaExecutor(programs, weights, kv, slots=engine.max_running, dtype=model.dtype, device=model.device)

    monkeypatch.setattr(loading, "make_executor", executor)
    with LLM(model=folder, **options) as llm:
        assert isinstance(llm.engine.executor, CudaExecutor) and not llm.engine.executor._layers
        assert gc.get_freeze_count() > 10_000, "the collector leaves alone what is loaded"
        assert_same(llm.generate([[5, 6, 7], [9]], params), expected)
    assert gc.get_freeze_count() == 0, "a closed engine can be collected"


def test_buckets_are_close_and_end_with_the_largest() -> None:
    for most in (1, 7, 8, 48, 64, 100, 1024, 1100, 2048, 8192):
        found = buckets(most)
        assert list(found) == sorted(set(found)) and found[-1] == most
        steps = [(8, 8), (32, 16), (128, 32), (256, 64), (8192, 128)]
        for rows in range(1, most + 1):
            padded = next(bucket for bucket in found if bucket >= rows)
            assert padded - rows < next(step for up_to, step in steps if rows <= up_to)
