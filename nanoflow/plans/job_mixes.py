"""What a job's own scheduler would form: a few mixes that stand for nearly all of its time.

Contract: the scheduler itself, with the job's lengths, order, arrivals and limits, is rehearsed on a sample of the job
without a model (`job_sample` says how it is taken). If the sample is the whole job and comes to its end, all
iterations count, ramp and tail too; of a longer job only the steady state does, since a longer run is made of it
(`steady_state`), or all of them if there is none. The clock goes by an estimate of each iteration, which is
also what it weighs. The same job and limits give the same mixes.

    sample the job; rehearse it; leave out what a longer run would have little of
    one cluster for each bucket of rows and each small cell of (decode rows, prefill rows, KV tokens read)
    while the nearest two of a bucket are nearer than CLOSE:             join them
    while the heaviest `most` clusters hold less than HELD of the time:  join those that differ least, by weight
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
CLOSE = 0.1
"""Clusters of one bucket that are nearer are one: the root of the squared relative differences, about."""
UNBUCKETED = 128
"""Where batches are not padded, those whose rows round up to the same multiple of this count as of one bucket."""
FLOOR = 1 / 16
"""Of the largest batch's rows: differences of fewer rows matter little, so relative ones are to at least so many."""
TOKENS_A_ROW, PAIRS_A_ROW = 512, 13_000
"""KV tokens that are read, and (query, key) pairs of prefill attention, in about the time in which the products of a
row are computed (Llama-3-8B on an H100)."""
_CELL = 0.05
_MOST_CELLS = 256
"""Clusters to begin with; cells are made larger until there are no more."""

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
    clusters = _clusters(formed, points[:, :3], bool(len(scheduler.row_buckets)), most)
    weights = [sum(formed[n].seconds for n in cluster) / total for cluster in clusters]
    order = sorted(range(len(clusters)), key=lambda n: (-weights[n], clusters[n][0]))
    # Up to rounding, the loop above ends with enough of them.
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


def _clusters(formed: Many[_Formed], points: Float, bucketed: bool, most: int) -> list[list[int]]:
    """Iterations that one mix stands for, each list ascending."""
    weights = np.array([f.seconds for f in formed])
    groups = np.array([f.padded if bucketed else -(-f.padded // UNBUCKETED) * UNBUCKETED for f in formed])
    cell = _CELL
    while True:
        keys = np.column_stack([groups, np.floor(points / cell).astype(np.int64)])
        cells, own = np.unique(keys, axis=0, return_inverse=True)
        if len(cells) <= _MOST_CELLS or cell > 1:
            break
        cell *= 1.5
    own = own.reshape(-1)
    members = [np.flatnonzero(own == n).tolist() for n in range(len(cells))]
    sums = np.array([weights[m].sum() for m in members])
    centres = np.array([np.average(points[m], axis=0, weights=weights[m]) for m in members])
    bucket = cells[:, 0]

    def join(a: int, b: int) -> None:
        nonlocal sums, centres, bucket
        a, b = min(a, b), max(a, b)
        members[a] = sorted(members[a] + members.pop(b))
        centres[a] = (centres[a] * sums[a] + centres[b] * sums[b]) / (sums[a] + sums[b])
        sums[a] += sums[b]
        sums, bucket = np.delete(sums, b), np.delete(bucket, b)
        centres = np.delete(centres, b, axis=0)

    while len(sums) > 1:
        distances = np.where(bucket[:, None] == bucket, _squares(centres), np.inf)
        a, b, least = _nearest(distances)
        if least >= CLOSE**2:
            break
        join(a, b)
    while len(sums) > most and np.sort(sums)[-most:].sum() < HELD * weights.sum():
        # Ward's criterion: by how much the weighted squares within clusters grow.
        a, b, _ = _nearest(_squares(centres) * (sums[:, None] * sums / (sums[:, None] + sums)))
        join(a, b)
    return members


def _points(formed: Many[_Formed]) -> Float:
    """[I, 4] of each iteration: decode rows, prefill rows, KV tokens that decode attention reads and pairs of prefill
    attention, as logarithms, so that distances are relative differences."""
    works = [f.work for f in formed]
    each = [
        (w.decode_rows, w.prefill_rows, w.decode_context / TOKENS_A_ROW, w.prefill_pairs / PAIRS_A_ROW) for w in works
    ]
    floor = FLOOR * max(f.padded for f in formed)
    return np.asarray(np.log(np.array(each, np.float64) + floor))


def _squares(centres: Float) -> Float:
    return np.asarray(((centres[:, None] - centres) ** 2).sum(axis=2))


def _nearest(costs: Float) -> tuple[int, int, float]:
    """The two clusters with the least cost, the first of equal ones."""
    costs = costs.copy()
    np.fill_diagonal(costs, np.inf)
    a, b = divmod(int(costs.argmin()), len(costs))
    return a, b, float(costs[a, b])


def _mix(formed: Many[_Formed], points: Float, cluster: Many[int], weight: float) -> WeightedMix:
    """The iteration that is nearest to the mean of those in the heaviest bucket of the cluster."""
    by_bucket: dict[int, float] = {}
    for n in cluster:
        by_bucket[formed[n].padded] = by_bucket.get(formed[n].padded, 0.0) + formed[n].seconds
    bucket = max(by_bucket, key=lambda rows: (by_bucket[rows], rows))
    own = [n for n in cluster if formed[n].padded == bucket]
    mean = np.average(points[own], axis=0, weights=[formed[n].seconds for n in own])
    typical = formed[own[int(((points[own] - mean) ** 2).sum(axis=1).argmin())]]
    work = typical.work
    context = max(1, round(work.decode_context / max(1, work.decode_rows)))
    rows = sum(formed[n].work.rows for n in cluster) / len(cluster)
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
