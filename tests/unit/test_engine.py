"""The engine on a tiny model: a mix of everything gives each request what it gets alone, whatever memory and plan."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanoflow import LLM, RequestOutput, SamplingParams
from nanoflow.config_schema import EngineSection, PipelineSection
from nanoflow.errors import InputError, UserError
from nanoflow.loading import build_engine, run_fingerprint
from nanoflow.ops.batch import RESERVED_PAGE, DenseBatch
from nanoflow.ops.operation import NanoContext
from nanoflow.pipeline.plan_mix import PlanMix
from nanoflow.pipeline.plan_text import parse_plan
from nanoflow.pipeline.reference_executor import ReferenceExecutor
from nanoflow.pipeline.split import BatchCutter
from nanoflow.search.cost_model import work_of
from nanoflow.search.store import store_plan
from nanoflow.summing_up import idle_share
from tests.unit.tiny_model import VOCAB, save_tiny_llama

PAGE_BYTES = 2 * 2 * 2 * 16 * 4
"""Bytes of KV cache a token: layers, k and v, kv heads, head size, float32."""

TWO = """
capacity: 32
nano_batches:
  a: {decode: 1/2, prefill: 1/2, rows: 24}
  b: {decode: 1/2, prefill: 1/2, rows: 24}
period:
  - whole:
      compute: [o.a, gate_up.a, down.a, qkv.a@1, o.b, gate_up.b, down.b, qkv.b@1]
      memory: [decode_attention.b, prefill_attention.b, decode_attention.a@1, prefill_attention.a@1]
"""
FOUR = """
capacity: 32
nano_batches:
  a: {decode: 1/2, prefill: 0, rows: 16}
  b: {decode: 1/4, prefill: 1/4, rows: 8}
  c: {decode: 1/4, prefill: 1/4, rows: 8}
  d: {decode: 0, prefill: 1/2, rows: 16}
period:
  - whole:
      first: [qkv, decode_attention.a, prefill_attention.a, decode_attention.b, prefill_attention.b]
      second: [decode_attention.c, prefill_attention.c, decode_attention.d, prefill_attention.d]
  - whole:
      first: [o, gate_up.a, down.a, gate_up.c, down.c]
      third: [gate_up.b, down.b, gate_up.d, down.d]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


def make_llm(folder: Path, **options: Any) -> LLM:
    return LLM(model=folder, dtype="float32", device="cpu", **{"kv_memory": "1MiB", "page_size": 8, **options})


@pytest.fixture(scope="module")
def alone(folder: Path) -> LLM:
    return make_llm(folder)


def random_request(number: int) -> tuple[list[int], SamplingParams]:
    rng = random.Random(number)
    prompt = [rng.randrange(2, VOCAB) for _ in range(rng.choice([1, 2, 7, 8, 9, 30, 90]))]
    params: dict[str, Any] = {"max_tokens": rng.choice([1, 2, 8, 30, 60]), "logprobs": rng.choice([None, 0, 3])}
    if rng.random() < 0.6:
        params |= {"temperature": rng.choice([0.7, 1.5]), "seed": rng.randrange(100)}
        params |= rng.choice([{}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.05}, {"top_k": 50, "top_p": 0.9}])
    if rng.random() < 0.3:
        params |= {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.3}
    if rng.random() < 0.3:
        params["logit_bias"] = {rng.randrange(VOCAB): 5.0, rng.randrange(VOCAB): -100.0}
    if rng.random() < 0.4:
        params["stop"] = ["a", "bc", "e"]
    if rng.random() < 0.3:
        params["stop_token_ids"] = [rng.randrange(VOCAB) for _ in range(20)]
    if rng.random() < 0.3:
        params["ignore_eos"] = True
    if rng.random() < 0.2:
        params["n"] = 2
    return prompt, SamplingParams(**params)


REQUESTS = [random_request(number) for number in range(48)]


@pytest.fixture(scope="module")
def expected(alone: LLM) -> list[RequestOutput]:
    outputs = []
    for prompt, params in REQUESTS:
        seeded = params if params.seed is not None else params.replace(seed=5)
        outputs.append(alone.generate([prompt], seeded)[0])
    return outputs


def assert_same(outputs: list[RequestOutput], expected: list[RequestOutput]) -> None:
    for output, want in zip(outputs, expected, strict=True):
        for completion, wanted in zip(output.outputs, want.outputs, strict=True):
            assert completion.token_ids == wanted.token_ids
            assert completion.text == wanted.text
            assert completion.finish_reason == wanted.finish_reason
            assert (completion.logprobs is None) == (wanted.logprobs is None)
            for entry, other in zip(completion.logprobs or [], wanted.logprobs or [], strict=True):
                assert entry.token_id == other.token_id
                assert entry.logprob == pytest.approx(other.logprob, abs=1e-3)
                assert len(entry.top) == output.params.logprobs
                for (_, logprob), (_, other_logprob) in zip(entry.top, other.top, strict=True):
                    assert logprob == pytest.approx(other_logprob, abs=1e-3)


def run_all(llm: LLM) -> list[RequestOutput]:
    prompts = [prompt for prompt, _ in REQUESTS]
    params = [params if params.seed is not None else params.replace(seed=5) for _, params in REQUESTS]
    return llm.generate(prompts, params)


def test_the_mix_covers_what_it_should(expected: list[RequestOutput]) -> None:
    reasons = [completion.finish_reason for output in expected for completion in output.outputs]
    assert reasons.count("stop") >= 10 and reasons.count("length") >= 10
    by_text = [output for output in expected if output.params.stop and output.outputs[0].finish_reason == "stop"]
    assert len(by_text) >= 4
    assert sum(output.params.uses_penalties for output in expected) >= 8
    assert sum(len(output.outputs) == 2 for output in expected) >= 4


def test_all_at_once(folder: Path, expected: list[RequestOutput]) -> None:
    with make_llm(folder) as llm:
        assert_same(run_all(llm), expected)
        assert_same(run_all(llm), expected)  # what an earlier job left behind changes nothing


@pytest.mark.parametrize("plan", ["sequential", TWO, FOUR], ids=["sequential", "two", "four"])
def test_little_memory_and_small_batches(
    folder: Path, expected: list[RequestOutput], plan: str, tmp_path: Path
) -> None:
    """The KV cache holds one or two requests of the largest kind; batches of 32 rows cut prompts anywhere."""
    if plan != "sequential":
        (tmp_path / "plan.yaml").write_text(plan)
        plan = str(tmp_path / "plan.yaml")
    pages = 24
    with make_llm(folder, plan=plan, max_batch_tokens=32, kv_memory=pages * 8 * PAGE_BYTES * 2) as llm:
        assert_same(run_all(llm), expected)
        assert llm.engine.scheduler.preemptions > 0
        assert llm.engine.scheduler.kv.used_pages == 0


def test_unseeded_runs_repeat_and_completions_differ(folder: Path) -> None:
    params = SamplingParams(temperature=1.5, max_tokens=20, n=3, ignore_eos=True)
    prompts = [[5, 6, 7], [5, 6, 7]]
    with make_llm(folder) as llm:
        first = llm.generate(prompts, params)
    with make_llm(folder) as llm:
        again = llm.generate(prompts, params)
    assert_same(again, first)
    texts = {tuple(completion.token_ids) for output in first for completion in output.outputs}
    assert len(texts) == 6


def test_batches_that_a_plan_is_not_meant_for_run_in_sequence(
    folder: Path, expected: list[RequestOutput], tmp_path: Path
) -> None:
    """Smaller ones than `least_rows`, and larger ones than its capacity."""
    (tmp_path / "plan.yaml").write_text("least_rows: 12\n" + TWO.lstrip())
    with make_llm(folder, plan=tmp_path / "plan.yaml", max_batch_tokens=64) as llm:
        executor, seen = llm.engine.executor, []
        launch = executor.launch

        def watched(batch: DenseBatch) -> None:
            seen.append((batch.program, batch.rows))
            launch(batch)

        executor.launch = watched  # type: ignore[method-assign]
        assert_same(run_all(llm), expected)
        assert {program for program, _ in seen} == {0, 1}
        assert all((program == 0) == (12 <= rows <= 32) for program, rows in seen)
        assert max(rows for _, rows in seen) == 64
        stats = llm.engine.stats
        assert stats.iterations == len(seen) and stats.planned_iterations == sum(program == 0 for program, _ in seen)


def test_auto_runs_all_stored_plans_each_for_its_mix(
    folder: Path,
    expected: list[RequestOutput],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with make_llm(folder, plan="auto", max_batch_tokens=64) as llm:
        assert len(llm.engine.executor.programs) == 1
        here = run_fingerprint(llm.model, EngineSection(page_size=8))
    assert capsys.readouterr().err == f"plan: sequential, since none is stored for {here.model} on cpu\n"
    mixes = [PlanMix(13, 49, 20), PlanMix(9, 0, 36)]
    plan = parse_plan(TWO.replace("capacity: 32", "capacity: 64").replace("rows: 24", "rows: 40"))
    for mix in mixes:
        store_plan(replace(plan, mix=mix), here)
    with make_llm(folder, plan="auto", max_batch_tokens=64) as llm:
        assert capsys.readouterr().err.startswith(f"plan: 2 stored for {here.model} on cpu: ")
        executor, seen = llm.engine.executor, []
        assert {program.plan.mix for program in executor.programs} == {*mixes, None}
        launch = executor.launch

        def watched(batch: DenseBatch) -> None:
            work = work_of(batch)
            seen.append((batch.program, work.decode_rows, work.prefill_rows, work.decode_context))
            launch(batch)

        executor.launch = watched  # type: ignore[method-assign]
        assert_same(run_all(llm), expected)
        for number, *batch in seen:
            assert number == executor.cut.choose(*batch), "the scheduler counts the tokens that decode rows attend to"
        taken = Counter(number for number, *_ in seen)
        assert set(taken) == {0, 1, 2} and taken == llm.engine.stats.program_iterations
        assert llm.engine.stats.planned_iterations == taken[0] + taken[1]
        capsys.readouterr()
        sizes = EngineSection(max_batch_tokens=64, page_size=8, kv_memory="1MiB")
        quiet = build_engine(llm.model, sizes, PipelineSection(plan="auto"), quiet=True)
        assert len(quiet.executor.programs) == 3 and capsys.readouterr().err == ""
        quiet.close()


def test_padding_rows_reach_nothing(folder: Path, expected: list[RequestOutput]) -> None:
    """Every batch is padded to a multiple of 8 rows, and all that padding rows hold or write is NaN."""
    with make_llm(folder) as llm:
        executor = llm.engine.executor
        assert isinstance(executor, ReferenceExecutor)
        llm.engine.scheduler.cut = BatchCutter(executor.cut.plans, range(8, 513, 8))
        for buffer in executor.bound.buffers.values():
            buffer.fill_(torch.nan)
        for kv in executor.bound.kv:
            kv[RESERVED_PAGE] = torch.nan
        embed = executor.bound._outer_kernels[0, "embed"]

        def poisoned(context: NanoContext) -> None:
            embed(context)
            for rows in context.batch.host.nano_batches:
                context.buffers["x"][rows.end - rows.padding : rows.end] = torch.nan

        executor.bound._outer_kernels[0, "embed"] = poisoned
        assert_same(run_all(llm), expected)
        assert llm.engine.stats.padding_rows > 0
        assert all(bool(kv[RESERVED_PAGE].isnan().any()) for kv in executor.bound.kv), "padding rows wrote nothing"


def test_stop_string_is_cut_and_counts_no_late_token(alone: LLM) -> None:
    free = alone.generate([[9, 9]], SamplingParams(max_tokens=40, ignore_eos=True))[0].outputs[0]
    printable = [c for c in free.text if c.isascii() and c.isprintable() and c != " "]
    stop = printable[len(printable) // 2]
    stopped = alone.generate([[9, 9]], SamplingParams(max_tokens=40, ignore_eos=True, stop=stop))[0].outputs[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
    assert len(stopped.token_ids) < 40


def test_context_is_never_exceeded(alone: LLM) -> None:
    output = alone.generate([list(range(2, 152))], SamplingParams(max_tokens=64, ignore_eos=True))[0].outputs[0]
    assert output.finish_reason == "length"
    assert len(output.token_ids) == 10  # 150 + 10 = the context's 160


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ([], {}, "no tokens"),
        ([5] * 160, {}, "160"),
        ([5, VOCAB], {}, str(VOCAB)),
        ([5, -1], {}, "-1"),
        ([5], {"logit_bias": {VOCAB: 1.0}}, "logit_bias"),
        ([5], {"stop_token_ids": [VOCAB + 1]}, "stop_token_ids"),
    ],
)
def test_bad_prompts_are_refused_before_anything_runs(
    alone: LLM, prompt: list[int], params: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        alone.generate([[5], prompt], [SamplingParams(), SamplingParams(**params)])
    assert alone.engine.unfinished == 0
    assert len(alone.generate([[5]])) == 1


def test_options_of_the_api_are_checked(folder: Path) -> None:
    with pytest.raises(UserError, match="max_batch_token"):
        LLM(model=folder, max_batch_token=32)
    with pytest.raises(UserError, match="float8"):
        LLM(model=folder, dtype="float8")
    with pytest.raises(UserError, match="max_model_len"):
        make_llm(folder, max_model_len=1000)
    with pytest.raises(UserError, match="kv_memory"):
        make_llm(folder, kv_memory=1000)


def test_a_failing_kernel_ends_the_run(folder: Path) -> None:
    with make_llm(folder) as llm:
        executor = llm.engine.executor
        assert isinstance(executor, ReferenceExecutor)

        def broken(context: NanoContext) -> None:
            raise RuntimeError("the kernel failed")

        (o,) = (key for key in executor.bound._kernels if key[:2] == (0, "o"))
        executor.bound._kernels[o] = broken
        with pytest.raises(RuntimeError, match="the kernel failed"):
            llm.generate([[5, 6]])


def test_a_renewed_engine_starts_from_nothing_on_the_same_weights(folder: Path) -> None:
    requests = [(prompt, params.replace(seed=None)) for prompt, params in REQUESTS[:16]]
    with make_llm(folder, kv_memory="88KiB", max_batch_tokens=32) as llm:
        before = llm.engine

        def run() -> list[RequestOutput]:
            return llm.generate([prompt for prompt, _ in requests], [params for _, params in requests])

        first, stats, preemptions = run(), before.stats, before.scheduler.preemptions
        assert preemptions, "memory is meant to be short"
        llm.engine = before.renewed()
        assert llm.engine.executor is before.executor and llm.engine.stats.iterations == 0
        # Seeds come from the order of submission: that has begun anew, too.
        assert_same(run(), first)
        assert (llm.engine.stats.iterations, llm.engine.stats.rows) == (stats.iterations, stats.rows)
        assert llm.engine.scheduler.preemptions == preemptions
        llm.engine.submit([5, 6], SamplingParams(max_tokens=4))
        with pytest.raises(RuntimeError, match="1 completions are unfinished"):
            llm.engine.renewed()


def test_time_between_iterations_is_added_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collect = ReferenceExecutor.collect
    monkeypatch.setattr(ReferenceExecutor, "collect", lambda self: replace(collect(self), idle_seconds=0.25))
    with make_llm(folder) as llm:
        llm.generate([[5, 6, 7]], SamplingParams(max_tokens=6, ignore_eos=True))
        stats = llm.engine.stats
        assert stats.idle_seconds == 0.25 * (stats.iterations - 1), "not before the first"
        assert idle_share(stats.busy_seconds, stats.idle_seconds) == pytest.approx(
            stats.idle_seconds / (stats.idle_seconds + stats.busy_seconds)
        )
    assert idle_share(3.0, 0.0) is None
