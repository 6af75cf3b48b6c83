"""One tuning run: from a job's configuration to the plans that its mixes run fastest with, in the user's store.

Pseudo-code::

    mixes of the job; the minutes are dealt among them by weight
    start the other ranks, if some share the model: they build what rank 0 says, and run what it runs
    load weights; for every mix that gets some:
        search, in rounds, until a third of its time is left at most        (`nanoflow.search.tuner`)
        the fastest two, and what is stored for this mix already, against the sequential plan, long and in pairs
        store the one that wins by 1% and in every pair; if none does, the sequential plan, so that no other is taken
"""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from nanoflow.config_schema import RunConfig
from nanoflow.interrupt import Interrupts
from nanoflow.parallel.group import TensorGroup, check_ranks
from nanoflow.parallel.messages import Load
from nanoflow.pipeline.plan import FrozenMapping, Plan
from nanoflow.plans.job_mixes import JobMixes, WeightedMix
from nanoflow.plans.running import job_on, longest_request, mix_pages
from nanoflow.search.fingerprint import Fingerprint
from nanoflow.search.journal import Journal
from nanoflow.search.rates import CeilingRates, Rates
from nanoflow.search.store import judge, same_mix, store_plan, stored_plans
from nanoflow.search.tuner import PlanSearch, Step, search
from nanoflow.tuning.job import TuningJob, deal, open_job, plan_mix, tuning_folder
from nanoflow.tuning.progress import TuneProgress
from nanoflow.tuning.rounds import Blocks, Final, MixRounds, Stopped
from nanoflow.weights import load_weights

__all__ = ["MixResult", "TuneOutcome", "tune", "winner"]

LEAST_GAIN = 1.01
"""What a plan must win by: less is not told from nothing from one day to the next."""
FINALISTS = 2
LONG = Blocks(seconds=5.0, pairs=8)
"""Of the last comparison. A power limit answers within a second or two; eight pairs show what the median hides."""
SHORT = Blocks(seconds=0.5, pairs=3)
"""Of a round: it ranks plans within about 1%."""
SHORTER = 120
"""A round's blocks take at most this part of a mix's time: there should be ten rounds or so."""
LAST_SHARE = 1 / 3
"""Of a mix's time, what the last comparison takes at most."""
LEAST_SECONDS = {"cuda": 45.0, "cpu": 0.0}
"""Of a mix, for it to be tuned at all: on a GPU kernels are compiled and graphs captured first."""


@dataclass(frozen=True)
class MixResult:
    """What came of one mix."""

    mix: WeightedMix
    measured: int
    """Plans, over all starts; 0 if the mix got no time, or has too few rows to be cut."""
    final: Final | None = None
    """The last comparison of the plan that was stored, or of the best that lost; None if there was none."""
    stored: Path | None = None
    won: bool = False
    """Whether it is the plan of `final` that is stored, not the sequential one."""
    steps: tuple[Step, ...] = ()
    """All plans, over all starts, in their order."""

    @property
    def ratio(self) -> float:
        """How many times as fast as in sequence the mix runs with what is stored."""
        return self.final.ratio if self.won and self.final is not None else 1.0


@dataclass(frozen=True)
class TuneOutcome:
    """What came of a job."""

    here: Fingerprint
    """Of the model and the machine."""
    mixes: JobMixes
    results: tuple[MixResult, ...]
    """Of all mixes, the heaviest first."""
    folder: Path
    """Where the searches are kept."""
    failures: tuple[str, ...]
    """Why plans were given up, each reason once."""
    signal: int | None = None
    """The signal that ended it; None if none did."""

    @property
    def gain(self) -> float:
        """How many times as fast as in sequence the whole job is: only batches near a mix run its plan."""
        return 1 / (1 - sum(each.mix.near * (1 - 1 / each.ratio) for each in self.results))


def tune(
    config: RunConfig,
    *,
    minutes: float = 10.0,
    trials: int | None = None,
    out: Path | None = None,
    device: str | None = None,
    seed: int = 0,
    progress: TuneProgress | None = None,
    interrupts: Interrupts | None = None,
) -> TuneOutcome:
    """Search for plans for the job of `config`, or go on with it, and store those that win.

    Args:
        minutes: of searching and comparing, opening and loading not counted.
        trials: most plans that are measured for a mix, those of earlier starts included.
        out: folder of the searches; None: that of the user's cache.
        device: in place of the configuration's.
        interrupts: entered; the first signal ends the search after the block that runs.

    Raises UserError and PlanError. What was measured is kept whatever happens.
    """
    folder = out or tuning_folder()
    progress = progress or TuneProgress(quiet=True)
    check_ranks(job_on(config, device).engine, config.parallel.tensor)
    job = open_job(config, device, folder)
    model, mixes = job.model, job.mixes.mixes
    least = LEAST_SECONDS[model.device.type]
    tuned = [mix for mix, seconds in zip(mixes, deal(60 * minutes, mixes, least), strict=True) if seconds]
    journals = [Journal(job.journal(mix, folder)) for mix in tuned]  # before loading: whether they can be written
    page_size = job.here.page_size
    assert page_size is not None
    slots = max((mix.mix.decode + len(mix.mix.prompts) for mix in tuned), default=1) if model.graph.ranks > 1 else None
    with _ranks(job, slots or 1) as group:
        if group is not None:
            pages = max(mix_pages(mix.mix, page_size) for mix in tuned)
            group.load(Load("random", pages, max(longest_request(mix.mix) for mix in tuned)))
            job = replace(job, rates=_with_link(job.rates, group.link_bytes_per_second))
        weights = load_weights(model.graph, model.checkpoint, model.dtype, model.device, "random")
        if group is not None:
            group.least(pages)
        if interrupts is not None:
            interrupts.drain()

        def stopping() -> bool:
            return interrupts is not None and interrupts.signal is not None

        ends = time.monotonic() + 60 * minutes
        results: list[MixResult] = []
        failures: dict[str, None] = {}
        for place, (mix, journal) in enumerate(zip(tuned, journals, strict=True)):
            # What a mix did not use goes to those after it.
            dealt = deal(max(0.0, ends - time.monotonic()), tuned[place:], 0.0)[0]
            if dealt <= least / 2:
                break  # the ones before took longer than they were to
            progress.begin(f"mix {place + 1} of {len(mixes)}, {mix.weight:.0%} of the job: {mix.mix}", dealt)
            rounds = MixRounds(model, weights, mix.mix, job.rows(mix)[1], page_size, stopping, group=group, slots=slots)
            plans = PlanSearch(job.target(mix), journal, seed=seed)
            try:
                with rounds:
                    result = _tune_mix(job, mix, plans, rounds, dealt, trials, progress)
                results.append(replace(result, steps=plans.steps))
            except Stopped:
                assert interrupts is not None
                interrupts.drained()
                results.append(MixResult(mix, plans.measured, steps=plans.steps))
                break
            finally:
                failures |= dict.fromkeys(plans.failures)
    results += [MixResult(mix, 0) for mix in mixes[len(results) :]]
    return TuneOutcome(
        job.here,
        job.mixes,
        tuple(results),
        folder,
        tuple(failures),
        interrupts.signal if interrupts is not None else None,
    )


def _ranks(job: TuningJob, slots: int) -> AbstractContextManager[TensorGroup | None]:
    """The other ranks that share the model, with room for `slots` requests; None if there are none."""
    config, size = job.config, job.config.parallel.tensor
    if size == 1:
        return nullcontext()
    engine = config.engine.model_copy(update={"device": str(job.model.device), "max_running": slots})
    then = "what was measured is kept, and the same command goes on"
    return TensorGroup(config.model, engine, size, then=then)


def _with_link(rates: Rates, link: float | None) -> Rates:
    """Estimates with the link as it was just measured, where nothing is known of the device's."""
    if not isinstance(rates, CeilingRates) or rates.ceilings.link_bytes_per_second is not None:
        return rates
    return replace(rates, ceilings=replace(rates.ceilings, link_bytes_per_second=link))


def _tune_mix(
    job: TuningJob,
    mix: WeightedMix,
    plans: PlanSearch,
    rounds: MixRounds,
    seconds: float,
    trials: int | None,
    progress: TuneProgress,
) -> MixResult:
    """Search for `seconds`, the last comparison included. Raises Stopped."""
    begun = time.monotonic()
    last = min(seconds * LAST_SHARE, (FINALISTS + 1) * LONG.pairs * LONG.seconds)
    ends = begun + seconds - last
    blocks = Blocks(min(SHORT.seconds, seconds / SHORTER), SHORT.pairs)
    marks = [begun]

    def goes_on() -> bool:
        """Whether another round ends in time, if it is as short as the shortest: others have compiled kernels. The
        first is always begun."""
        rounds_seconds = [last - first for first, last in pairwise(marks)]
        return not rounds_seconds or time.monotonic() + min(rounds_seconds) <= ends

    def told() -> None:
        marks.append(time.monotonic())
        best = plans.best(1)
        progress.show(plans.measured, best[0].ratio if best else None)

    search(plans, lambda asked: rounds.measure(asked, blocks), trials=trials, goes_on=goes_on, told=told)
    if not plans.measured:  # batches that are too small to be cut
        return MixResult(mix, 0)
    # A plan that a round has behind by more than what rounds are right within will not win by as much.
    finalists = [tried.plan for tried in plans.best(FINALISTS) if tried.ratio > 2 - LEAST_GAIN]
    finalists += [plan for plan in _stored_here(job, mix) if _bare(plan) not in finalists]
    finals: list[Final] = []
    if finalists:
        progress.show(plans.measured, plans.best(1)[0].ratio if plans.best(1) else None, "last comparison")
        each = last / ((len(finalists) + 1) * LONG.pairs)
        finals = rounds.compare(finalists, Blocks(min(LONG.seconds, each), LONG.pairs))
    return _store(job, mix, plans.measured, finals)


def winner(finals: Sequence[Final]) -> Final | None:
    """The plan that wins against the sequential one by enough, and in every pair; None if none does."""
    won = [final for final in finals if final.ratio >= LEAST_GAIN and min(final.ratios) >= 1]
    return max(won, key=lambda final: final.ratio, default=None)


def _stored_here(job: TuningJob, mix: WeightedMix) -> list[Plan]:
    """The plan that a run would take for `mix` now, if it is none that this search stores in the place of: it must be
    beaten, since a user's own plans come first."""
    asked = plan_mix(mix.mix)
    verdicts = judge(stored_plans(), job.here, job.model.graph, job.config.engine.max_batch_tokens)
    for verdict in verdicts:
        plan = verdict.stored.plan
        if plan is None or verdict.against or plan.mix is None or plan.is_sequential(job.model.graph):
            continue
        if same_mix(plan.mix, asked) and plan.least_rows <= mix.mix.rows <= plan.capacity:
            return [plan]
    return []


def _bare(plan: Plan) -> Plan:
    """A stored plan as the search has it."""
    bare = Plan(plan.capacity, plan.nano_batches, plan.period, kernels=plan.kernels, partitions=plan.partitions)
    return replace(bare, sms=plan.sms if plan.partitions else None, sharding=plan.sharding)


def _store(job: TuningJob, mix: WeightedMix, measured: int, finals: Sequence[Final]) -> MixResult:
    """Store what won, or the sequential plan."""
    won = winner(finals)
    best = won or max(finals, key=lambda final: final.ratio, default=None)
    least_rows, rows = job.rows(mix)
    plan, figures = Plan.sequential(job.model.graph, rows), {"ratio": 1.0}
    if best is not None:
        figures |= {"iteration_ms": round(best.sequential_seconds * 1e3, 4)}
        figures |= _joules("joules_per_token", best.sequential_joules, mix.mix.rows)
    if won is not None:
        plan = won.plan
        figures = {
            "iteration_ms": round(won.seconds * 1e3, 4),
            "sequential_ms": round(won.sequential_seconds * 1e3, 4),
            "ratio": round(won.ratio, 4),
            **_joules("joules_per_token", won.joules, mix.mix.rows),
            **_joules("sequential_joules_per_token", won.sequential_joules, mix.mix.rows),
        }
    stamped = replace(
        plan, mix=plan_mix(mix.mix), least_rows=plan.least_rows or least_rows, measured=FrozenMapping(figures)
    )
    return MixResult(mix, measured, best, store_plan(stamped, job.here), won is not None)


def _joules(key: str, joules: float | None, rows: int) -> dict[str, float]:
    return {} if joules is None else {key: round(joules / rows, 6)}
