"""The scheduler against a fake executor that sees only the batches: same tokens as each sequence run alone."""

from collections.abc import Sequence as Many

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from nanoflow.kv_cache import KVCache
from nanoflow.ops.batch import TOKEN_ON_DEVICE, StepOutput
from nanoflow.pipeline.split import Cut
from nanoflow.sampling_params import SamplingParams
from nanoflow.scheduler import Scheduler
from nanoflow.sequence import Sequence
from tests.unit.fake_executor import EOS, VOCAB, FakeExecutor, reference, run


def cut_evenly(nano_batches: int, row_buckets: Many[int]):
    """Each nano-batch is padded to a bucket of its own, more than an executor asks for."""

    def cut(decode: int, prefill: int, decode_tokens: int) -> Cut:
        def share(rows: int) -> list[int]:
            return [rows // nano_batches + (i < rows % nano_batches) for i in range(nano_batches)]

        decode_rows, prefill_rows = share(decode), share(prefill)[::-1]
        rows = [padded(d + p, row_buckets) for d, p in zip(decode_rows, prefill_rows, strict=True)]
        return Cut(decode_rows, prefill_rows, rows)

    return cut


def padded(rows: int, row_buckets: Many[int]) -> int:
    return next((bucket for bucket in row_buckets if bucket >= rows > 0), rows)


def make(
    pages: int = 65,
    page_size: int = 4,
    max_batch_tokens: int = 32,
    max_running: int = 8,
    max_model_len: int = 64,
    nano_batches: int = 1,
    row_buckets: tuple[int, ...] | range = (),
) -> tuple[Scheduler, FakeExecutor]:
    kv = KVCache(pages, page_size, max_running, -(-max_model_len // page_size))
    scheduler = Scheduler(
        kv=kv,
        cut=cut_evenly(nano_batches, row_buckets),
        max_batch_tokens=max_batch_tokens,
        max_running=max_running,
        max_model_len=max_model_len,
        row_buckets=row_buckets,
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
        "row_buckets": draw(st.sampled_from([(), (), range(4, 49, 4), (16, 32, 48), (1, 2, 3, 8, 20)])),
    }


@settings(max_examples=150, deadline=None)
@given(workloads())
def test_any_workload_gives_the_tokens_of_each_sequence_alone(workload):
    sequences, arrivals = workload.pop("sequences"), workload.pop("arrivals")
    scheduler, executor = make(**workload)
    run(scheduler, executor, arrivals, limit=5000)
    check(sequences, scheduler)
    for batch in executor.batches:
        for part in batch.nano_batches:
            rows = part.decode + part.prefill
            assert part.end - part.start == padded(rows, workload["row_buckets"])
        assert len(batch.nano_batches) == workload["nano_batches"]


def sampled_positions(executor: FakeExecutor) -> list[tuple[int, int]]:
    """(seed, output position) of every token that was sampled."""
    return [
        (int(seed), int(position))
        for batch in executor.batches
        if batch.sampling is not None
        for seed, position in zip(batch.sampling.seeds, batch.sampling.positions, strict=True)
    ]


@settings(max_examples=60, deadline=None)
@given(workloads())
def test_no_position_is_sampled_twice(workload):
    arrivals = workload.pop("arrivals")
    sequences = workload.pop("sequences")
    for s in sequences:
        s.seed = s.index
    scheduler, executor = make(**workload)
    run(scheduler, executor, arrivals, limit=5000)
    positions = sampled_positions(executor)
    assert len(positions) == len(set(positions))


def test_an_iteration_is_formed_before_the_last_one_is_seen():
    scheduler, executor = make()
    scheduler.add(sequence(0, prompt=5, max_tokens=8, ignore_eos=True))
    first = scheduler.form()
    executor.launch(first.batch)
    second = scheduler.form()
    assert second.batch.token_ids.tolist() == [TOKEN_ON_DEVICE]
    assert second.batch.positions.tolist() == [5]
    assert second.batch.decode_context.tolist() == [6]
    assert second.batch.sampling.positions.tolist() == [1]
    third = scheduler.form()  # even two in flight would be right
    assert third.batch.sampling.positions.tolist() == [2]


@pytest.mark.parametrize("how", ["eos", "stop_token_ids", "stop string"])
def test_the_token_after_a_stop_is_dropped(how):
    scheduler, _ = make()
    s = sequence(0, max_tokens=20, logprobs=1, stop_token_ids=[7] if how == "stop_token_ids" else [])
    other = sequence(1, max_tokens=20, ignore_eos=True, logprobs=0)
    scheduler.add(s)
    scheduler.add(other)
    iterations = [scheduler.form(), scheduler.form()]
    last = {"eos": EOS, "stop_token_ids": 7, "stop string": 5}[how]

    def output(tokens: list[int]) -> StepOutput:
        array = np.array(tokens, np.int32)
        return StepOutput(array, -array.astype(np.float32), array[:, None], -array[:, None].astype(np.float32))

    assert scheduler.update(iterations[0], output([last, 9])) == [s, other]
    if how == "stop string":
        assert not s.finished
        scheduler.finish(s, "stop")
    assert s.finish_reason == "stop" and s.slot == -1
    assert scheduler.kv.used_pages == 2  # only the other's
    assert scheduler.update(iterations[1], output([11, 12])) == [other]
    assert s.output == [last] and s.logprobs == [-last] and s.top_logprobs == [[(last, -last)]]
    assert other.output == [9, 12] and other.logprobs == [-9, -12] and other.top_logprobs == [[], []]
    assert scheduler.form().sampled == [other]


@pytest.mark.parametrize(("max_tokens", "max_model_len", "outputs"), [(4, 64, 4), (1, 64, 1), (50, 12, 7)])
def test_a_length_stop_is_foreseen(max_tokens, max_model_len, outputs):
    scheduler, executor = make(max_model_len=max_model_len)
    s = sequence(0, prompt=5, max_tokens=max_tokens, ignore_eos=True)
    run(scheduler, executor, {0: [s]})
    assert len(s.output) == outputs and s.finish_reason == "length"
    # The last token is not fed back: no row, no KV and no sampling is spent on it.
    assert sum(batch.tokens for batch in executor.batches) == 5 + outputs - 1
    assert max(batch.positions.max() for batch in executor.batches) < max_model_len - 1
    assert len(sampled_positions(executor)) == outputs


def start(scheduler: Scheduler, executor: FakeExecutor, count: int, **params):
    """Adds `count` sequences with 4-token prompts and runs until all decode and nothing is in flight."""
    sequences = [sequence(i, prompt=4, ignore_eos=True, **params) for i in range(count)]
    for s in sequences:
        scheduler.add(s)
    while not all(s.output for s in sequences):
        iteration = scheduler.form()
        executor.launch(iteration.batch)
        scheduler.update(iteration, executor.collect())
    return sequences


def tight(count: int, outputs: int = 1) -> tuple[Scheduler, FakeExecutor, list[Sequence]]:
    """Sequences with `outputs` tokens seen, nothing in flight and no page free: all others are hoarded."""
    scheduler, executor = make(pages=1 + 64, page_size=4, max_batch_tokens=32, max_model_len=256)
    running = start(scheduler, executor, count, max_tokens=20)
    while len(running[0].output) < outputs:
        step(scheduler, executor)
    assert scheduler.running == count and all(len(s.output) == outputs for s in running)
    hoard(scheduler)
    return scheduler, executor, running


def hoard(scheduler: Scheduler) -> None:
    """Takes all free pages for a slot that no sequence has."""
    scheduler.kv.allocate(np.array([scheduler.kv.max_running - 1]), np.array([scheduler.kv.free_pages]))


def release_hoard(scheduler: Scheduler) -> None:
    scheduler.kv.free(scheduler.kv.max_running - 1)


def step(scheduler: Scheduler, executor: FakeExecutor) -> None:
    """One iteration with nothing in flight before or after."""
    iteration = scheduler.form()
    executor.launch(iteration.batch)
    scheduler.update(iteration, executor.collect())


def test_a_row_whose_token_was_seen_preempts_the_latest_admitted():
    scheduler, _, (first, second, third) = tight(3)
    iteration = scheduler.form()
    assert third.preemptions == 1 and third.slot == -1 and scheduler.waiting == 1
    assert iteration.sampled == [first]
    # The second is now the latest admitted: it sits out, since it preempts nobody that came before it.
    assert second.slot >= 0 and second.preemptions == 0


def test_a_row_with_a_token_in_flight_sits_out_and_preempts_nobody():
    scheduler, executor, (first, second) = tight(2, outputs=4)  # one token below the end of their second page
    flying = scheduler.form()
    assert flying.sampled == [first, second]
    executor.launch(flying.batch)
    assert scheduler.form() is None  # both need a page, and either may have stopped
    assert scheduler.preemptions == 0 and first.slot >= 0 and second.slot >= 0
    scheduler.update(flying, executor.collect())
    assert scheduler.form().sampled == [first]
    assert second.preemptions == 1 and first.preemptions == 0


def test_a_preempted_sequence_waits_for_its_token_in_flight_and_goes_on_after_it():
    scheduler, executor, (first, second) = tight(2, outputs=4)
    release_hoard(scheduler)
    flying = scheduler.form()
    executor.launch(flying.batch)
    assert flying.sampled == [first, second]
    scheduler._preempt(second.slot)
    assert second.in_flight == 1
    following = scheduler.form()
    assert following.sampled == [first], "readmitted before its token was seen"
    executor.launch(following.batch)
    assert scheduler.update(flying, executor.collect()) == [first, second]
    assert len(second.output) == 5 and second.in_flight == 0
    after = scheduler.form()
    executor.launch(after.batch)
    assert after.batch.prefill_context.tolist() == after.batch.prefill_lengths.tolist() == [4 + 5]
    prefilled = after.batch.token_ids[after.batch.prefill_rows[0] :][: 4 + 5]
    assert prefilled.tolist() == second.prompt.tolist() + second.output
    assert after.batch.sampling.positions[after.sampled.index(second)] == 5
    scheduler.update(following, executor.collect())
    scheduler.update(after, executor.collect())
    while scheduler.unfinished:
        step(scheduler, executor)
    check([first, second], scheduler)


def test_a_preempted_sequence_that_its_token_in_flight_ends_does_not_come_back():
    scheduler, _, (first, second) = tight(2, outputs=4)
    second.params = second.params.replace(stop_token_ids=[7])
    release_hoard(scheduler)
    flying = scheduler.form()
    scheduler._preempt(second.slot)
    scheduler.update(flying, StepOutput(np.array([3, 7], np.int32)))
    assert second.finish_reason == "stop" and second.output[-1] == 7
    assert scheduler.form().sampled == [first] and scheduler.waiting == 0


def test_penalty_counts_are_rebuilt_at_every_admission_and_only_then():
    scheduler, executor = make(pages=1 + 6, page_size=4, max_running=4, max_batch_tokens=16, max_model_len=24)
    sequences = [
        sequence(i, prompt=4, max_tokens=16, ignore_eos=True, repetition_penalty=1.5 if i else 1.0) for i in range(3)
    ]
    scheduler._admissible = lambda *_: True  # nobody may rely on the prediction being right
    run(scheduler, executor, {0: sequences})
    assert scheduler.preemptions > 0
    check(sequences, scheduler)
    admitted = []  # (seed, output position) of what was sampled at the end of a prompt
    resets = []
    for batch in executor.batches:
        if batch.sampling is None:
            continue
        resets += batch.sampling.penalty_resets
        at_end = ~np.isin(batch.sampling.rows, batch.decode_rows)
        admitted += zip(batch.sampling.seeds[at_end].tolist(), batch.sampling.positions[at_end].tolist(), strict=True)
    prompts = {tuple(s.prompt.tolist()): s.seed for s in sequences[1:]}
    assert [(prompts[tuple(r.prompt.tolist())], len(r.output)) for r in resets] == [a for a in admitted if a[0] > 1]
    assert any(len(r.output) for r in resets)


def test_a_chunk_ends_anywhere_and_straddles_nano_batches():
    scheduler, executor = make(nano_batches=3, max_batch_tokens=10, row_buckets=[4, 8])
    s = sequence(0, prompt=17, max_tokens=2, ignore_eos=True)
    run(scheduler, executor, {0: [s]})
    first, second = executor.batches[:2]
    assert first.sampling is None
    assert first.prefill_lengths.tolist() == [3, 3, 4] and first.prefill_context.tolist() == [3, 6, 10]
    assert first.prefill_rows.tolist() == [0, 4, 8] and first.prefill_splits.tolist() == [0, 1, 2, 3]
    assert [(n.prefill, n.padding) for n in first.nano_batches] == [(3, 1), (3, 1), (4, 0)]
    assert second.prefill_context.tolist()[-1] == 17 and second.sampling.rows.tolist() == [second.prefill_rows[-1] + 2]
    check([s], scheduler)


def test_arrival_order_is_the_priority():
    scheduler, executor = make(max_running=1)
    late, early = sequence(5, max_tokens=2, ignore_eos=True), sequence(2, max_tokens=2, ignore_eos=True)
    received = run(scheduler, executor, {0: [late, early]})
    assert [s.index for batch in received for s in batch] == [2, 2, 5, 5]


def test_finishing_sequences_that_do_not_run():
    scheduler, executor = make(max_running=1)
    running, waiting, other = (sequence(i, max_tokens=6, ignore_eos=True) for i in range(3))
    for s in (running, waiting, other):
        scheduler.add(s)
    flying = scheduler.form()
    executor.launch(flying.batch)
    scheduler._preempt(running.slot)
    scheduler.finish(running, "stop")
    scheduler.finish(waiting, "stop")
    assert scheduler.update(flying, executor.collect()) == [] and running.output == []
    run(scheduler, executor, {})
    assert len(other.output) == 6 and scheduler.unfinished == 0
    with pytest.raises(ValueError, match="finished already"):
        scheduler.finish(other, "stop")


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        (0, {}, "no tokens"),
        (64, {}, "no room for output in a context of 64"),
        (30, {"max_tokens": 30}, "needs 15 KV pages of 4 tokens, and there are 9"),
    ],
)
def test_what_can_never_fit_is_refused(prompt, params, message):
    scheduler, _ = make(pages=10)
    with pytest.raises(ValueError, match=message):
        scheduler.add(sequence(0, prompt=prompt, **params))
    assert scheduler.unfinished == 0 and scheduler.form() is None


def test_what_fits_to_the_last_page_runs():
    scheduler, executor = make(pages=10)
    s = sequence(0, prompt=30, max_tokens=7, ignore_eos=True)  # 36 tokens of KV: the last token needs none
    run(scheduler, executor, {0: [s]})
    check([s], scheduler)


def test_a_split_that_loses_rows_is_refused():
    kv = KVCache(9, 4, 2, 4)
    scheduler = Scheduler(
        kv=kv, cut=lambda d, p, _: Cut([d], [p - 1], [d + p]), max_batch_tokens=8, max_running=2, max_model_len=16
    )
    scheduler.add(sequence(0, max_tokens=2))
    with pytest.raises(ValueError, match="must sum to its rows"):
        scheduler.form()


def test_a_cut_that_has_too_little_room_is_refused():
    kv = KVCache(9, 4, 2, 4)
    scheduler = Scheduler(
        kv=kv, cut=lambda d, p, _: Cut([d], [p], [d + p - 1]), max_batch_tokens=8, max_running=2, max_model_len=16
    )
    scheduler.add(sequence(0, max_tokens=2))
    with pytest.raises(ValueError, match=r"nano-batches of \[4\] rows do not hold the \[5\]"):
        scheduler.form()


@pytest.mark.parametrize("tokens", [None, [1, 2]])
def test_an_output_that_does_not_match_is_refused(tokens):
    scheduler, _ = make()
    scheduler.add(sequence(0, max_tokens=2))
    output = None if tokens is None else StepOutput(np.array(tokens, np.int32))
    with pytest.raises(ValueError, match="samples 1 sequences came back with"):
        scheduler.update(scheduler.form(), output)


@pytest.mark.parametrize("buckets", [[8, 8], [8, 4], [0, 8]])
def test_row_buckets_that_do_not_ascend_are_refused(buckets):
    with pytest.raises(ValueError, match="row_buckets must be ascending numbers from 1"):
        make(row_buckets=buckets)
