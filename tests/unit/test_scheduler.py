"""The scheduler against a fake executor that sees only the batches: same tokens as each sequence run alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoflow.kv_cache import KVCache
from nanoflow.ops.batch import TOKEN_ON_DEVICE, StepOutput
from nanoflow.sampling_params import SamplingParams
from nanoflow.scheduler import Scheduler
from nanoflow.sequence import Sequence
from tests.unit.fake_executor import EOS, VOCAB, FakeExecutor, reference, run


def split_evenly(nano_batches: int):
    """Uneven enough to cut prompts: the first nano-batches take the remainders of decode, the last those of prefill."""

    def split(decode: int, prefill: int) -> tuple[list[int], list[int]]:
        def share(rows: int) -> list[int]:
            return [rows // nano_batches + (i < rows % nano_batches) for i in range(nano_batches)]

        return share(decode), share(prefill)[::-1]

    return split


def make(
    pages: int = 65,
    page_size: int = 4,
    max_batch_tokens: int = 32,
    max_running: int = 8,
    max_model_len: int = 64,
    nano_batches: int = 1,
    row_multiple: int = 1,
) -> tuple[Scheduler, FakeExecutor]:
    kv = KVCache(pages, page_size, max_running, -(-max_model_len // page_size))
    scheduler = Scheduler(
        kv=kv,
        split=split_evenly(nano_batches),
        max_batch_tokens=max_batch_tokens,
        max_running=max_running,
        max_model_len=max_model_len,
        row_multiple=row_multiple,
        eos_token_ids=[EOS],
    )
    return scheduler, FakeExecutor(pages, page_size, max_running)


def sequence(index: int, prompt: int = 5, **params) -> Sequence:
    tokens = np.random.default_rng(index).integers(1, VOCAB, prompt).astype(np.int32)
    return Sequence(index, tokens, SamplingParams(**params), seed=index + 1)


def check(sequences: list[Sequence], scheduler: Scheduler) -> None:
    for s in sequences:
        output, logprobs, reason = reference(s, scheduler.max_model_len)
        assert s.output == output
        assert s.finish_reason == reason
        if s.params.logprobs is not None:
            assert s.logprobs == pytest.approx(logprobs, rel=1e-6)
            tops = [[(t + k, -(t + k)) for k in range(s.params.logprobs)] for t in output]
            assert s.top_logprobs == tops
    assert scheduler.unfinished == scheduler.running == scheduler.waiting == 0
    assert scheduler.kv.used_pages == 0
    assert (scheduler.kv.page_table == 0).all()


@st.composite
def workloads(draw: st.DrawFn):
    page_size = draw(st.integers(1, 6))
    max_model_len = draw(st.integers(4, 40))
    params = st.builds(
        SamplingParams,
        max_tokens=st.integers(1, 40),
        ignore_eos=st.booleans(),
        stop=st.sampled_from([(), ("x",)]),
        stop_token_ids=st.sampled_from([(), (3,), (4, 5)]),
        logprobs=st.sampled_from([None, 0, 2]),
        repetition_penalty=st.sampled_from([1.0, 1.5]),
        logit_bias=st.sampled_from([{}, {3: 1.0, 4: 2.0}]),
    )
    count = draw(st.integers(1, 12))
    sequences, arrivals = [], {}
    for index in range(count):
        tokens = draw(st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=max_model_len - 1))
        s = Sequence(index, np.array(tokens, np.int32), draw(params), seed=draw(st.integers(0, 2**64 - 1)))
        sequences.append(s)
        arrivals.setdefault(draw(st.sampled_from([0, 0, 0, 3, 9])), []).append(s)
    whole = -(-(max_model_len - 1) // page_size)
    return {
        "sequences": sequences,
        "arrivals": arrivals,
        "page_size": page_size,
        "max_model_len": max_model_len,
        "pages": 1 + draw(st.integers(whole, 4 * whole)),
        "max_batch_tokens": draw(st.integers(1, 48)),
        "max_running": draw(st.integers(1, 10)),
        "nano_batches": draw(st.integers(1, 4)),
        "row_multiple": draw(st.sampled_from([1, 1, 4, 16])),
    }


@settings(max_examples=150, deadline=None)
@given(workloads())
def test_any_workload_gives_the_tokens_of_each_sequence_alone(workload):
    sequences, arrivals = workload.pop("sequences"), workload.pop("arrivals")
    scheduler, executor = make(**workload)
    run(scheduler, executor, arrivals, limit=5000)
    check(sequences, scheduler)
    for batch in executor.batches:
        assert all((part.end - part.start) % workload["row_multiple"] == 0 for part in batch.nano_batches)
        assert len(batch.nano_batches) == workload["nano_batches"]
