"""What a job's own scheduler would form: against recorded runs, and on jobs small enough to see through."""

import json
import os
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from nanoflow.config import RunConfig, load_config
from nanoflow.config_schema import EngineSection
from nanoflow.errors import ConfigError, InputError, OutOfMemoryError
from nanoflow.loading import gpu_kv_tokens, open_model
from nanoflow.models.config import ModelConfig
from nanoflow.models.registry import build_graph
from nanoflow.ops.graph import Graph
from nanoflow.ops.operation import Work
from nanoflow.pipeline.cuda_executor import buckets
from nanoflow.pipeline.plan import NanoBatch, Plan
from nanoflow.pipeline.split import BatchCutter
from nanoflow.plans import job_sample
from nanoflow.plans.case import H100, shipped_shapes
from nanoflow.plans.job_mixes import HELD, MOST_MIXES, JobMixes, form_mixes, job_mixes
from nanoflow.plans.job_sample import JobRequest, JobSample, job_requests, take_sample
from nanoflow.plans.running import mix_batch, mix_pages
from nanoflow.rehearsal import Rehearsal, rehearsal_scheduler
from nanoflow.sampling_params import SamplingParams
from nanoflow.scheduler import Scheduler
from nanoflow.search.cost_model import bounds, sequential_seconds, work_of, works_of
from nanoflow.search.mix import Mix, mix_works
from nanoflow.sequence import Sequence

RECORDED = json.loads(
    (Path(__file__).parents[2] / "benchmarks" / "results" / "offline_throughput.json").read_text(encoding="utf-8")
)["runs"]


def shape(name: str) -> Graph:
    return build_graph(ModelConfig.from_dict(json.loads((shipped_shapes()[name] / "config.json").read_text())))


LLAMA = shape("llama-3-8b")


def scheduler_of(kv_tokens: int = 4096, longest_first: bool = False, **changes) -> Scheduler:
    sizes = {"page_size": 16, "max_batch_tokens": 256, "max_running": 64, "max_model_len": 1024}
    scheduler = rehearsal_scheduler(kv_tokens=kv_tokens, **{**sizes, "row_buckets": buckets(256), **changes})
    scheduler.longest_first = longest_first
    return scheduler


def seconds(work: Work) -> float:
    return 1.0 + work.rows / 256


def whole(requests: list[JobRequest], iterations: int = 3000) -> JobSample:
    return JobSample(tuple(requests), True, iterations)


def check(found: JobMixes, scheduler: Scheduler) -> None:
    """What holds for the mixes of any job."""
    assert sum(mix.weight for mix in found.mixes) == pytest.approx(1)
    assert HELD - 1e-9 <= found.held <= 1 + 1e-9 and 1 <= len(found.mixes) <= MOST_MIXES
    weights = [mix.weight for mix in found.mixes]
    assert weights == sorted(weights, reverse=True)
    for each in found.mixes:
        # The mix is an iteration that was formed: it fits its bucket, and the KV cache holds its context.
        assert 1 <= each.mix.rows <= each.bucket <= scheduler.max_batch_tokens
        assert each.mix.decode <= scheduler.max_running and all(chunk > 0 for chunk in each.mix.prompts)
        assert each.mix.decode * each.mix.context <= scheduler.sizes["kv_tokens"] + each.mix.decode
        assert 0 <= each.near <= 1 + 1e-9 and len(each.mix.starts) == len(each.mix.prompts)
        if len(scheduler.row_buckets):
            assert each.bucket == min(rows for rows in scheduler.row_buckets if rows >= each.mix.rows)


@pytest.mark.parametrize("name", ["512-512", "1024-512", "512-1024"])
def test_the_steady_state_of_recorded_runs_is_found(name):
    recorded = RECORDED[name]
    steady = recorded["repetitions"][0]["steady"]
    prompt, output = (
        recorded["config"]["workload"]["synthetic"][key]["constant"] for key in ("input_len", "output_len")
    )
    sizes = {**recorded["sizes"], "row_buckets": buckets(2048)}
    scheduler = rehearsal_scheduler(**sizes)
    sample = take_sample([JobRequest(prompt, output)] * 20_000, scheduler)
    assert not sample.whole and sample.iterations >= 3000
    sample = replace(sample, iterations=2 * output + 300)  # what the test can wait for
    found = form_mixes(sample, scheduler, lambda work: sequential_seconds(LLAMA, work, H100.ceilings, 2))
    check(found, scheduler)
    assert found.part == "steady" and len(found.mixes) <= 2, (
        "batches of one job are alike: they end on two buckets at most"
    )
    decode = sum(each.weight * each.mix.decode for each in found.mixes)
    rows = sum(each.weight * each.rows for each in found.mixes)
    assert decode == pytest.approx(steady["output_tokens"] / steady["iterations"], rel=0.025)
    assert rows == pytest.approx(steady["rows"] / steady["iterations"], rel=0.025)
    assert {each.mix.context for each in found.mixes} <= set(range(prompt + output // 2 - 8, prompt + output // 2 + 8))
    assert sum(each.near for each in found.mixes) > 0.99, "a plan for each would serve all of the steady state"
    # The estimate stands beside what was measured: within a quarter, from below.
    assert 0.75 < found.seconds / found.iterations / (steady["seconds"] / steady["iterations"]) <= 1.0


def test_two_populations_give_mixes_of_either():
    chats, summaries = JobRequest(20, 120), JobRequest(600, 10)
    scheduler = scheduler_of()
    found = form_mixes(whole([chats] * 300 + [summaries] * 100), scheduler, seconds)
    check(found, scheduler)
    assert found.part == "whole"
    decoding = [each for each in found.mixes if each.mix.decode > 20 and not each.mix.prompts]
    reading = [each for each in found.mixes if each.mix.decode < 12 and sum(each.mix.prompts) > 200]
    assert sum(each.weight for each in decoding) > 0.4 and sum(each.weight for each in reading) > 0.2
    assert max(each.mix.context for each in decoding) < 140
    assert max(each.mix.context for each in reading) > 600


def test_a_whole_job_counts_its_ramp_and_tail_and_a_longer_one_does_not():
    requests = [JobRequest(64, 64)] * 200
    short = form_mixes(whole(requests), scheduler_of(), seconds)
    long = form_mixes(JobSample(tuple(requests), False, 3000), scheduler_of(), seconds)
    cut = form_mixes(whole(requests, iterations=100), scheduler_of(), seconds)
    assert (short.part, long.part, cut.part) == ("whole", "steady", "steady")
    assert cut.iterations < long.iterations < short.iterations - 64
    least = [min(each.mix.decode for each in found.mixes) for found in (short, long)]
    assert least[0] < 0.8 * least[1]


def test_a_mix_knows_what_of_its_prompts_came_before():
    """Prompts of 900 tokens are cut into chunks: most of them have a good part of the prompt before them."""
    scheduler = scheduler_of(kv_tokens=16_384)
    found = form_mixes(JobSample((JobRequest(900, 20),) * 300, False, 1000), scheduler, seconds)
    check(found, scheduler)
    heaviest = found.mixes[0].mix
    chunks = [*zip(heaviest.prompts, heaviest.starts, strict=True)]
    assert all(tokens + before <= 900 for tokens, before in chunks)
    assert 200 < sum(tokens * (before + tokens / 2) for tokens, before in chunks) / sum(heaviest.prompts) < 700
    assert f"behind {heaviest.before[0]:,}" in str(heaviest)


def test_a_batch_of_a_mix_has_its_prompts_behind_what_came_before():
    plan = Plan(
        256,
        (NanoBatch("a", Fraction(1, 2), Fraction(1, 4), 128), NanoBatch("b", Fraction(1, 2), Fraction(3, 4), 128)),
        (),
    )
    mix = Mix(9, 40, (70, 50), (0, 300))
    batch = mix_batch(mix, BatchCutter([plan]), page_size=16, vocab_size=50)
    for made, said in zip(works_of(batch), mix_works(plan, mix), strict=True):
        assert replace(made, decode_context=0) == replace(said, decode_context=0)
    assert work_of(batch).prefill_pairs == 70 * 71 // 2 + 50 * 300 + 50 * 51 // 2
    assert mix_pages(mix, 16) > mix_pages(replace(mix, before=()), 16) + 300 // 16 - 2
    with pytest.raises(ValueError, match="a number for each of 2 prompts"):
        Mix(9, 40, (70, 50), (300,))


def test_the_same_job_gives_the_same_mixes():
    random = np.random.default_rng(1)
    requests = [JobRequest(int(a), int(b)) for a, b in random.integers(1, 200, (150, 2))]
    assert form_mixes(whole(requests), scheduler_of(), seconds) == form_mixes(whole(requests), scheduler_of(), seconds)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_few_mixes_hold_the_time_of_any_job(data):
    request = st.builds(JobRequest, st.integers(1, 300), st.integers(1, 80), st.booleans(), st.just(0.0))
    requests = data.draw(st.lists(request, min_size=1, max_size=60))
    scheduler = scheduler_of(
        kv_tokens=data.draw(st.sampled_from([512, 2048, 16_384])),
        longest_first=data.draw(st.booleans()),
        row_buckets=data.draw(st.sampled_from([(), buckets(256), (256,)])),
    )
    mean_output = data.draw(st.sampled_from([None, 5.5]))
    sample = JobSample(tuple(requests), data.draw(st.booleans()), data.draw(st.sampled_from([1, 40, 3000])))
    found = form_mixes(sample, scheduler, seconds, mean_output=mean_output)
    check(found, scheduler)
    assert found.iterations <= sample.iterations


def test_requests_that_arrive_slowly_run_alone():
    """An iteration takes a second or two here, a request eight of them, and one comes every hundred seconds."""
    requests = [JobRequest(40, 8, arrival=100.0 * n) for n in range(20)]
    alone, together = (
        form_mixes(whole(r), scheduler_of(), seconds) for r in (requests, [JobRequest(40, 8) for _ in requests])
    )
    assert max(each.mix.decode + len(each.mix.prompts) for each in alone.mixes) == 1
    assert alone.iterations == 20 * 8 and max(each.mix.decode for each in together.mixes) > 5


def test_outputs_that_may_stop_end_after_the_mean_that_was_seen():
    requests = [JobRequest(30, 100, certain=False)] * 200
    sizes = {"kv_tokens": 65_536}
    to_the_limit = form_mixes(whole(requests), scheduler_of(**sizes), seconds)
    stopped = form_mixes(whole(requests), scheduler_of(**sizes), seconds, mean_output=10)
    certain = form_mixes(whole([JobRequest(30, 100)] * 200), scheduler_of(**sizes), seconds, mean_output=10)
    assert stopped.iterations < to_the_limit.iterations / 2 < certain.iterations
    assert max(each.mix.context for each in stopped.mixes) <= 30 + 11 < max(each.mix.context for each in certain.mixes)


def test_a_rehearsal_with_nothing_to_do_says_so():
    rehearsal = Rehearsal(scheduler_of())
    with pytest.raises(RuntimeError, match="0 sequences are unfinished and none can run"):
        rehearsal.step()
    rehearsal.scheduler.add(Sequence(0, np.zeros(5, np.int32), SamplingParams(max_tokens=1, ignore_eos=True), seed=0))
    formed = rehearsal.step()
    assert formed is not None and formed.batch.tokens == 5 and rehearsal.step() is None
    assert rehearsal.scheduler.unfinished == 0


def test_a_sample_is_as_long_as_the_iterations_need():
    scheduler = scheduler_of(kv_tokens=65_536)
    least = job_sample.LEAST_ITERATIONS
    sample = take_sample(iter([JobRequest(10, 64)] * 9000), scheduler)
    # 64 slots take one request an iteration.
    assert not sample.whole and least <= len(sample.requests) <= least + 256 and sample.iterations == least
    first_long = take_sample([JobRequest(10, 64)] * 9000, scheduler_of(kv_tokens=65_536, longest_first=True))
    assert 0.6 * least < len(first_long.requests) < 0.8 * least
    # A KV cache is full after one mean output at the soonest.
    assert take_sample([JobRequest(10, 1014)] * 10, scheduler) == whole([JobRequest(10, 1014)] * 10, 3042)
    may_stop = [JobRequest(10, 1014, certain=False)] * 10
    assert take_sample(may_stop, scheduler, mean_output=20).iterations == least
    wide = scheduler_of(kv_tokens=2**26, max_model_len=2**16, max_batch_tokens=2048)
    assert take_sample([JobRequest(1, 60_000)] * 10, wide).iterations == job_sample.MOST_ITERATIONS


def test_a_sample_of_short_requests_is_bounded_too(monkeypatch):
    monkeypatch.setattr(job_sample, "MOST_REQUESTS", 300)
    reads = iter([JobRequest(1, 1)] * 1000)
    sample = take_sample(reads, scheduler_of())
    assert len(sample.requests) == 300 and not sample.whole and len(list(reads)) == 1000 - 301


def test_requests_that_can_never_run_are_left_out():
    scheduler = scheduler_of(kv_tokens=512)
    fitting = JobRequest(10, 5)
    sample = take_sample([JobRequest(2000, 1), fitting, JobRequest(600, 1), JobRequest(0, 5)], scheduler)
    assert sample.requests == (fitting,) and sample.whole
    with pytest.raises(InputError, match="no request that can run"):
        take_sample([JobRequest(2000, 1)], scheduler)


def test_the_example_trace():
    config = load_config("trace")
    model = open_model(config.model, config.engine)
    limits = {"kv_tokens": 8192, "page_size": 64, "row_buckets": buckets(512), "ceilings": H100.ceilings, "itemsize": 4}
    found = job_mixes(config, model, **limits)
    trace = list(job_requests(config, model))
    assert len(trace) == 40 and trace[0] == JobRequest(260, 94)
    assert all(request.prompt <= 600 and request.output <= 128 and request.certain for request in trace)
    assert found.part == "whole" and found.iterations < 1000
    order = form_mixes(
        whole(trace), _like(config, limits), lambda w: sequential_seconds(model.graph, w, H100.ceilings, 4)
    )
    assert found != order, "the trace's own order is longest-first"
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"order": "input"})})
    assert job_mixes(config, model, **limits) == order


def _like(config: RunConfig, limits: dict) -> Scheduler:
    sizes = {"max_batch_tokens": config.engine.max_batch_tokens, "max_running": config.engine.max_running}
    return rehearsal_scheduler(
        **sizes, max_model_len=2048, **{key: limits[key] for key in ("kv_tokens", "page_size", "row_buckets")}
    )


def test_lines_of_text_are_tokenised_and_counted_by_completion(tmp_path):
    lines = [
        {"custom_id": "a", "prompt": "twelve bytes", "max_tokens": 7, "n": 3, "ignore_eos": True},
        {"custom_id": "b", "prompt": 5},
        {"custom_id": "c", "prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True, "stop_token_ids": [9]},
        {"custom_id": "d", "prompt": [5], "max_tokens": 4},
    ]
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = load_config("quickstart", [f"workload.input={file}"])
    model = open_model(config.model, config.engine)
    assert model.tokenizer is not None
    tokens = len(model.tokenizer.encode("twelve bytes"))
    expected = [JobRequest(tokens, 7)] * 3 + [JobRequest(3, 4, certain=False), JobRequest(1, 4, certain=False)]
    assert list(job_requests(config, model)) == expected


def test_what_can_be_read_only_once_is_refused(tmp_path):
    config = load_config("quickstart")
    model = open_model(config.model, config.engine)
    os.mkfifo(tmp_path / "pipe")
    for path in ("-", str(tmp_path / "pipe")):
        once = config.model_copy(update={"workload": config.workload.model_copy(update={"input": (path,)})})
        with pytest.raises(ConfigError, match=f"workload.input: {path} can be read only once.*save it to a file"):
            next(job_requests(once, model))


def test_kv_tokens_of_a_gpu_that_is_not_here():
    engine = EngineSection(kv_memory=0.92)
    h100 = 84_932_978_278  # 79.1 GiB
    found = gpu_kv_tokens(LLAMA, engine, h100)
    assert found % 128 == 0 and found == pytest.approx(RECORDED["512-512"]["sizes"]["kv_tokens"], rel=0.002)
    assert found == gpu_kv_tokens(LLAMA, EngineSection(), h100)
    assert gpu_kv_tokens(LLAMA, EngineSection(kv_memory="4GiB", page_size=64), h100) == 4 * 2**30 // 131_072 - 64
    with pytest.raises(OutOfMemoryError, match="leaves nothing of the 92%"):
        gpu_kv_tokens(LLAMA, engine, 16 * 10**9)
    with pytest.raises(OutOfMemoryError, match=r"16.0 MiB on a GPU of 79.1 GiB, less than the 32.0 MiB of two pages"):
        gpu_kv_tokens(LLAMA, EngineSection(kv_memory="16MiB"), h100)


@pytest.mark.parametrize(
    "work",
    [
        Work(decode_rows=551, prefill_rows=553, decode_context=551 * 768, prefill_context=600, prefill_pairs=10**5),
        Work(decode_rows=4, decode_context=4000, sampled_rows=4),
        Work(prefill_rows=2048, prefill_context=2048, prefill_pairs=2**21, sampled_rows=1),
    ],
)
def test_in_sequence_is_between_perfect_overlap_and_none_at_all(work):
    alone = bounds(LLAMA.cost(work, 2), H100.ceilings).seconds
    found = sequential_seconds(LLAMA, work, H100.ceilings, 2)
    assert max(alone["compute"], alone["memory"]) <= found <= alone["compute"] + alone["memory"]
    # Beside attention's bytes, or the head's, there is always an operation bound by the other resource.
    half = sequential_seconds(LLAMA, work, H100.ceilings, 4)
    assert found <= half <= 2 * found
