"""What a job's own scheduler would form: a few mixes that stand for nearly all of its time.

Contract: the scheduler itself, with the job's lengths, order, arrivals and limits, is rehearsed on a sample of the job
without a model (`job_sample` says how it is taken). If the sample is the whole job and comes to its end, all
iterations count, ramp and tail too; of a longer job only the steady state does, since a longer run is made of it
(`steady_state`), or all of them if there is none. The clock goes by an estimate of each iteration, which is
also what it weighs. The same job and limits give the same mixes.

    sample the job; rehearse it; leave out what a longer run would have little of
    cluster the iterations by bucket of rows, decode rows, prefill rows and KV tokens read (`clusters`), so that the
    heaviest `most` clusters hold HELD of the time
    of the heaviest that together hold HELD:
        mix: the iteration nearest to the mean of those in the cluster's heaviest bucket; pairs of prefill attention
            count too there, but not in clusters: the engine does not choose a plan by them
        weight: the cluster's share of the time of all that are kept
"""

from collections import deque
from collections.abc import Callable, Sequence as Many
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nanoflow.config_schema import RunConfig
from nanoflow.loading import Model
from nanoflow.ops.operation import Work
from nanoflow.pipeline.plan_mix import NEAR_MIX, PlanMix
from nanoflow.plans.clusters import cluster
from nanoflow.plans.job_sample import JobRequest, JobSample, job_requests, take_sample
from nanoflow.rehearsal import Rehearsal, Rehearsed, rehearsal_scheduler
from nanoflow.sampling_params import SamplingParams
from nanoflow.scheduler import Scheduler
from nanoflow.search.cost_model import Ceilings, sequential_seconds, work_of
from nanoflow.search.mix import Mix
from nanoflow.sequence import Sequence
from nanoflow.steady_state import steady_state

__all__ = ["JobMixes", "WeightedMix", "form_mixes", "job_mixes"]

MOST_MIXES = 6
HELD = 0.95
"""Share of the time that the mixes hold at least; the rest is left out."""
UNBUCKETED = 128
"""Where batches are not padded, those whose rows round up to the same multiple of this count as of one bucket."""
FLOOR = 1 / 16
"""Of the largest batch's rows: differences of fewer rows matter little, so relative ones are to at least so many."""
TOKENS_A_ROW, PAIRS_A_ROW = 512, 13_000
"""KV tokens that are read, and (query, key) pairs of prefill attention, in about the time in which the products of a
row are computed (Llama-3-8B on an H100)."""

Float = NDArray[np.float64]


@dataclass(frozen=True)
class WeightedMix:
    """One of the dense batches that were formed, and what it stands for."""

    mix: Mix
    """Its prompts are the chunks of this iteration."""
    weight: float
    """Share of the job's time; those of all mixes add up to 1."""
    rows: float
    """Of the iterations that it stands for, on average, padding not counted."""
    bucket: int
    """Rows that it is padded to."""
    near: float
    """Share of the job's time in batches that would take a plan for this mix, were there one for each (`NEAR_MIX`)."""


@dataclass(frozen=True)
class JobMixes:
    """The mixes of a job, heaviest first."""

    mixes: tuple[WeightedMix, ...]
    iterations: int
    """That they were made of."""
    seconds: float
    """What these were estimated to take."""
    held: float
    """Share of that time that the mixes stand for."""
    part: str
    """What of the job they are: ``whole``, ``steady`` (of its beginning, the steady state) or ``beginning``."""


@dataclass(frozen=True, eq=False)
class _Formed:
    work: Work
    padded: int
    chunks: tuple[int, ...]
    starts: tuple[int, ...]
    """Tokens of each chunk's prompt that were computed before."""
    seconds: float
    kv_pages: int
    waiting: int
    slots_full: bool


def job_mixes(
    config: RunConfig,
    model: Model,
    *,
    kv_tokens: int,
    page_size: int,
    row_buckets: Many[int],
    ceilings: Ceilings,
    itemsize: int,
    mean_output: float | None = None,
) -> JobMixes:
    """The mixes that the job of `config` would have, with the limits of its engine section.

    Args:
        kv_tokens: of the KV cache: of the engine's `Scheduler.sizes`, or of `gpu_kv_tokens` where there is no GPU.
        page_size: tokens of a page.
        row_buckets: to which batches are padded, ascending.
        ceilings: of the device, for the estimates.
        itemsize: bytes of an element.
        mean_output: tokens of outputs that may stop, on average, as an earlier run has seen; None: all go to their
            limit.

    Raises:
        ConfigError: the input can be read only once.
        InputError: it cannot be read, or none of its requests can run.
    """
    engine = config.engine
    scheduler = rehearsal_scheduler(
        kv_tokens=kv_tokens,
        page_size=page_size,
        max_batch_tokens=engine.max_batch_tokens,
        max_running=engine.max_running,
        max_model_len=model.max_model_len,
        row_buckets=row_buckets,
    )
    scheduler.longest_first = engine.order == "longest-first"
    with closing(job_requests(config, model)) as requests:
        sample = take_sample(requests, scheduler, mean_output)

    def seconds(work: Work) -> float:
        return sequential_seconds(model.graph, work, ceilings, itemsize)

    return form_mixes(sample, scheduler, seconds, mean_output=mean_output)


def form_mixes(
    sample: JobSample,
    scheduler: Scheduler,
    seconds: Callable[[Work], float],
    *,
    mean_output: float | None = None,
    most: int = MOST_MIXES,
) -> JobMixes:
    """The mixes that `scheduler` forms of the sample.

    Args:
        scheduler: of `rehearsal_scheduler`, with the engine's limits; nothing was added to it yet.
        seconds: estimate of an iteration from its work; padding is told as prefill rows that attend to nothing.
        mean_output: as of `job_mixes`.
        most: mixes, at most.
    """
    formed, ended = _rehearse(sample, scheduler, seconds, mean_output)
    part = "whole"
    if not ended:
        columns = (np.array([getattr(f, key) for f in formed]) for key in ("kv_pages", "waiting", "slots_full"))
        steady = steady_state(*columns)
        part = "beginning" if steady is None else "steady"
        formed = formed if steady is None else formed[slice(*steady)]
    total = sum(f.seconds for f in formed)
    points = _points(formed)
    seconds_each = np.array([f.seconds for f in formed])
    clusters = cluster(points[:, :3], seconds_each, _groups(formed, len(scheduler.row_buckets) > 0), most, HELD)
    weights = [float(seconds_each[members].sum()) / total for members in clusters]
    order = sorted(range(len(clusters)), key=lambda n: (-weights[n], clusters[n][0]))
    # Up to rounding, the heaviest `most` are always enough.
    count = next((n for n in range(1, most) if sum(weights[c] for c in order[:n]) >= HELD), most)
    kept = order[:count]
    held = sum(weights[n] for n in kept)
    mixes = _with_near([_mix(formed, points, clusters[n], weights[n] / held) for n in kept], formed)
    return JobMixes(mixes, len(formed), total, held, part)


def _rehearse(
    sample: JobSample,
    scheduler: Scheduler,
    seconds: Callable[[Work], float],
    mean_output: float | None,
) -> tuple[list[_Formed], bool]:
    """What is formed, and whether all of the job has come to its end."""
    rehearsal = Rehearsal(scheduler, mean_output)
    upcoming = deque(enumerate(sample.requests))
    tokens = np.zeros(max(request.prompt for request in sample.requests), np.int32)
    params: dict[tuple[int, bool], SamplingParams] = {}

    def add(index: int, request: JobRequest) -> None:
        key = (request.output, request.certain)
        if key not in params:
            params[key] = SamplingParams(max_tokens=request.output, ignore_eos=request.certain)
        scheduler.add(Sequence(index, tokens[: request.prompt], params[key], seed=index))

    formed: list[_Formed] = []
    clock = 0.0
    while upcoming or scheduler.unfinished:
        if upcoming and not scheduler.unfinished:
            clock = max(clock, upcoming[0][1].arrival)
        while upcoming and upcoming[0][1].arrival <= clock:
            add(*upcoming.popleft())
        # As in a run: what waits for its arrival is not there yet.
        scheduler.expects_more = not sample.whole and not upcoming
        if len(formed) == sample.iterations or (scheduler.expects_more and not scheduler.waiting):
            return formed, False
        step = rehearsal.step()
        if step is not None:
            formed.append(_measured(step, seconds))
            clock += formed[-1].seconds
    return formed, sample.whole


def _measured(step: Rehearsed, seconds: Callable[[Work], float]) -> _Formed:
    batch = step.batch
    work = work_of(batch)
    return _Formed(
        work,
        batch.rows,
        tuple(batch.prefill_lengths.tolist()),
        tuple((batch.prefill_context - batch.prefill_lengths).tolist()),
        seconds(work + Work(prefill_rows=batch.rows - work.rows)),
        step.kv_pages,
        step.waiting,
        step.slots_full,
    )


def _groups(formed: Many[_Formed], bucketed: bool) -> NDArray[np.int64]:
    """[I] the bucket of each iteration."""
    padded = np.array([f.padded for f in formed], np.int64)
    return padded if bucketed else -(-padded // UNBUCKETED) * UNBUCKETED


def _points(formed: Many[_Formed]) -> Float:
    """[I, 4] of each iteration: decode rows, prefill rows, KV tokens that decode attention reads and pairs of prefill
    attention, as logarithms, so that distances are relative differences."""
    works = [f.work for f in formed]
    each = [
        (w.decode_rows, w.prefill_rows, w.decode_context / TOKENS_A_ROW, w.prefill_pairs / PAIRS_A_ROW) for w in works
    ]
    floor = FLOOR * max(f.padded for f in formed)
    return np.asarray(np.log(np.array(each, np.float64) + floor))


def _mix(formed: Many[_Formed], points: Float, members: Many[int], weight: float) -> WeightedMix:
    """The iteration that is nearest to the mean of those in the heaviest bucket of the cluster."""
    by_bucket: dict[int, float] = {}
    for n in members:
        by_bucket[formed[n].padded] = by_bucket.get(formed[n].padded, 0.0) + formed[n].seconds
    bucket = max(by_bucket, key=lambda rows: (by_bucket[rows], rows))
    own = [n for n in members if formed[n].padded == bucket]
    mean = np.average(points[own], axis=0, weights=[formed[n].seconds for n in own])
    typical = formed[own[int(((points[own] - mean) ** 2).sum(axis=1).argmin())]]
    work = typical.work
    context = max(1, round(work.decode_context / max(1, work.decode_rows)))
    rows = sum(formed[n].work.rows for n in members) / len(members)
    before = typical.starts if any(typical.starts) else ()
    return WeightedMix(Mix(work.decode_rows, context, typical.chunks, before), weight, rows, bucket, near=0.0)


def _with_near(mixes: Many[WeightedMix], formed: Many[_Formed]) -> tuple[WeightedMix, ...]:
    """The mixes, each with the time of the batches that are nearest to it, if they are near enough."""
    plans = [PlanMix(each.mix.decode, sum(each.mix.prompts), each.mix.context) for each in mixes]
    near = [0.0] * len(mixes)
    for one in formed:
        work = one.work
        distances = [plan.distance(work.decode_rows, work.prefill_rows, work.decode_context) for plan in plans]
        least = min(distances)
        if least < NEAR_MIX:
            near[distances.index(least)] += one.seconds
    total = sum(one.seconds for one in formed)
    return tuple(replace(each, near=seconds / total) for each, seconds in zip(mixes, near, strict=True))
