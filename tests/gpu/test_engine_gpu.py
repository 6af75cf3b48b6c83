"""The engine on a GPU: the CPU's tokens in float32, whatever the model's shape, the batching, memory and plan."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from nanoflow import LLM, RequestOutput, SamplingParams
from nanoflow.config import load_config
from nanoflow.errors import ConfigError, OutOfMemoryError
from nanoflow.ops.batch import RESERVED_PAGE
from nanoflow.pipeline.split import BatchCutter
from tests.gpu.checkpoints import save_model
from tests.unit.test_engine import FOUR, PAGE_BYTES, TWO, assert_same, run_all
from tests.unit.tiny_model import VOCAB

pytestmark = pytest.mark.gpu

SHAPES = Path(__file__).parents[2] / "configs" / "models"
VARIANTS: dict[str, dict[str, Any]] = {
    "gqa-16": {},
    "gqa-64": {"head_dim": 64},
    "mha-80": {"head_dim": 80, "num_key_value_heads": 4},
    "gqa-96": {"head_dim": 96},
    # At a width of 96 one draw lies within 1e-6 of the next token, which is less than rounding moves it.
    "mqa-128": {"head_dim": 128, "num_key_value_heads": 1, "intermediate_size": 104},
    "gqa-256": {"head_dim": 256},
    "group-of-3": {"head_dim": 32, "num_attention_heads": 6},
    "window": {"architectures": ["MistralForCausalLM"], "sliding_window": 11, "head_dim": 64},
    "tied": {"tie_word_embeddings": True},
    "qwen2-bias": {"architectures": ["Qwen2ForCausalLM"], "head_dim": 64},
    "qwen3-norm": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 64},
    "odd-widths": {"hidden_size": 72, "intermediate_size": 92},
}


def make_llm(folder: Path, device: str, **options: Any) -> LLM:
    return LLM(model=folder, dtype="float32", device=device, **{"kv_memory": "64MiB", "page_size": 16, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[RequestOutput]:
    with make_llm(folder, "cpu") as llm:
        return run_all(llm)


def test_the_mix_covers_what_it_should(expected: list[RequestOutput]) -> None:
    reasons = [completion.finish_reason for output in expected for completion in output.outputs]
    assert reasons.count("stop") >= 8 and reasons.count("length") >= 8


def test_all_at_once_twice(folder: Path, expected: list[RequestOutput]) -> None:
    with make_llm(folder, "cuda") as llm:
        assert llm.model.device.type == "cuda"
        assert_same(run_all(llm), expected)
        assert_same(run_all(llm), expected)


@pytest.mark.parametrize("page_size", [8, 16, 64])
@pytest.mark.parametrize("plan", ["sequential", TWO, FOUR], ids=["sequential", "two", "four"])
def test_little_memory_and_small_batches(
    folder: Path, expected: list[RequestOutput], plan: str, page_size: int, tmp_path: Path
) -> None:
    if plan != "sequential":
        (tmp_path / "plan.yaml").write_text(plan)
        plan = str(tmp_path / "plan.yaml")
    memory = {8: 30, 16: 18, 64: 6}[page_size] * page_size * PAGE_BYTES
    with make_llm(folder, "cuda", plan=plan, max_batch_tokens=32, page_size=page_size, kv_memory=memory) as llm:
        assert_same(run_all(llm), expected)
        assert llm.engine.scheduler.preemptions > 0 or page_size > 8  # larger pages leave predictions more room
        assert llm.engine.scheduler.kv.used_pages == 0


def test_padding_rows_reach_nothing(folder: Path, expected: list[RequestOutput]) -> None:
    """Batches are padded to a multiple of 8 rows, and buffers and the reserved page start as NaN."""
    with make_llm(folder, "cuda") as llm:
        executor: Any = llm.engine.executor
        llm.engine.scheduler.cut = BatchCutter(executor.cut.plans, range(8, 513, 8))
        for buffer in executor.bound.buffers.values():
            if buffer.is_floating_point():
                buffer.fill_(torch.nan)
        for kv in executor.bound.kv:
            kv[RESERVED_PAGE] = torch.nan
        assert_same(run_all(llm), expected)
        assert llm.engine.stats.padding_rows > 0


@pytest.mark.parametrize("name", VARIANTS)
def test_every_shape_gives_the_cpus_tokens(name: str, tmp_path: Path) -> None:
    save_model(tmp_path, **VARIANTS[name])
    with make_llm(tmp_path, "cpu") as llm:
        wanted = run_all(llm)
    with make_llm(tmp_path, "cuda") as llm:
        assert_same(run_all(llm), wanted)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs_and_repeats(folder: Path, dtype: str) -> None:
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    prompts = [[5 + i] * (3 + 7 * i) for i in range(12)]
    runs = []
    for _ in range(2):
        with LLM(model=folder, dtype=dtype, device="cuda", kv_memory="64MiB", page_size=16) as llm:
            runs.append([output.outputs[0].token_ids for output in llm.generate(prompts, params)])
    assert runs[0] == runs[1]
    assert all(len(tokens) == 40 and max(tokens) < VOCAB for tokens in runs[0])


def test_the_command_line_writes_the_cpus_file(folder: Path, tmp_path: Path) -> None:
    """The whole run, but for times and ids."""
    from nanoflow.runner import run

    lines = [{"custom_id": f"r{i}", "prompt": "abc" * (i + 1), "max_tokens": 20} for i in range(6)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = {}
    for device in ("cpu", "cuda"):
        (tmp_path / "run.yaml").write_text(
            f"model: {{path: {folder}, dtype: float32}}\nworkload: {{input: in.jsonl}}\n"
            f"engine: {{device: {device}, kv_memory: 64MiB}}\noutput: {{path: {tmp_path / device}.jsonl}}\n"
        )
        report = run(load_config(tmp_path / "run.yaml"), restart=True, quiet=True)
        assert report.completed == 6 and report.errors == 0
        written = [json.loads(line) for line in (tmp_path / f"{device}.jsonl").read_text().splitlines()]
        texts[device] = {line["custom_id"]: line["response"]["body"]["choices"] for line in written}
        assert set(written[0]) == {"id", "custom_id", "response", "error"}
    assert texts["cuda"] == texts["cpu"]


def test_random_weights_of_a_real_shape_in_seconds() -> None:
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    started = time.perf_counter()
    with LLM(
        model=SHAPES / "llama-3-8b", weights="random", device="cuda", kv_memory="2GiB", max_batch_tokens=512
    ) as llm:
        torch.cuda.synchronize()
        assert time.perf_counter() - started < 30
        outputs = llm.generate([[7] * 100, [9] * 300], SamplingParams(max_tokens=8, ignore_eos=True))
    assert [len(output.outputs[0].token_ids) for output in outputs] == [8, 8]


def test_a_model_that_does_not_fit_is_refused_at_once() -> None:
    with pytest.raises(OutOfMemoryError) as caught:
        LLM(model=SHAPES / "llama-3-70b", weights="random", dtype="float32", device="cuda")
    for words in ("need 262.8 GiB as float32", "are missing", "bfloat16 (131.4 GiB", "parallel.tensor: "):
        assert words in str(caught.value)


def test_a_request_that_does_not_fit_is_refused_before_loading() -> None:
    """A page of 64 tokens takes 8 MiB of KV cache, and another is kept for padding."""
    started = time.perf_counter()
    with pytest.raises(OutOfMemoryError, match=r"longest request alone needs 16.0 MiB .* are missing"):
        LLM(model=SHAPES / "llama-3-8b", weights="random", device="cuda", kv_memory="12MiB", page_size=64)
    assert time.perf_counter() - started < 10


def test_gpus_and_head_sizes_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cuda:99 was asked for, but this machine has \d+ GPU"):
        LLM(model=SHAPES / "llama-3-8b", weights="random", device="cuda:99")
    save_model(tmp_path, head_dim=24)
    with pytest.raises(ConfigError, match="head size is 24"):
        make_llm(tmp_path, "cuda")


def test_doctor_finds_the_gpu() -> None:
    from nanoflow import doctor

    checks = {check.name: check for check in doctor.examine()}
    assert checks["GPU 0"].state == "ok" and torch.cuda.get_device_name(0) in checks["GPU 0"].found
    assert checks["NVIDIA driver"].state == "ok" and checks["Triton"].state == "ok"
    assert checks["green contexts"].state in ("ok", "optional")
