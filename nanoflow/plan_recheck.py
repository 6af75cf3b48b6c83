"""Measuring stored plans again before a job, where they were tuned with other versions.

On the job's own executor, with its weights and in its KV cache, before any request has a page of it: the plan's mix,
made up, in a few seconds of blocks in turn with the sequential plan.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from nanoflow.loading import Model
from nanoflow.parallel.executor import RunExecutor
from nanoflow.pipeline.plan import Plan
from nanoflow.plan_choice import ChosenPlans
from nanoflow.plans.case import MixOptions, choose_mix
from nanoflow.plans.running import longest_request, mix_batch, mix_pages
from nanoflow.power import EnergyMeter
from nanoflow.search.fingerprint import Fingerprint
from nanoflow.search.measure import compare, largest_error, output_error
from nanoflow.search.mix import Mix
from nanoflow.search.rechecks import keep_recheck

__all__ = ["Rechecked", "recheck", "without"]

SECONDS, PAIRS = 0.5, 3
"""Of the blocks: enough to tell 1%."""


@dataclass(frozen=True)
class Rechecked:
    """What came of it."""

    lost: tuple[int, ...]
    """Of the chosen plans, those that must not run."""
    notes: tuple[str, ...]
    """A line for each plan in doubt."""


def recheck(executor: RunExecutor, chosen: ChosenPlans, here: Fingerprint, model: Model, slots: int) -> Rechecked:
    """Measure the plans in doubt of `chosen`, which `executor` runs and nothing else uses yet, and keep what is found.

    One whose mix does not fit the run's KV cache, slots or lengths is not measured, and runs.
    """
    lost: list[int] = []
    notes: list[str] = []
    for place in chosen.doubtful:
        plan = chosen.plans[place]
        mix = choose_mix(plan, MixOptions())
        name = f"plan for {plan.mix or 'any mix'}"
        if not _fits(mix, executor, model, slots):
            notes.append(f"{name}: its mix does not fit this run, so it is not measured again; it is used")
            continue
        ratio = _ratio(executor, place, len(chosen.plans) - 1, mix, model)
        kept = ""
        try:
            keep_recheck(plan, here, ratio)
        except OSError as error:
            kept = f" (which cannot be kept for the next run: {error.strerror})"
        if ratio < 1:
            lost.append(place)
        result = f"{ratio:.3f} times as fast as in sequence" if ratio else "its outputs are wrong"
        notes.append(f"{name}: measured again, {result}{kept}; it is {'not ' if ratio < 1 else ''}used")
    return Rechecked(tuple(lost), tuple(notes))


def without(plans: Sequence[Plan], lost: Sequence[int]) -> tuple[Plan, ...]:
    """The plans that are left."""
    return tuple(plan for place, plan in enumerate(plans) if place not in lost)


def _fits(mix: Mix, executor: RunExecutor, model: Model, slots: int) -> bool:
    layout = executor.bound.kv_layout
    return (
        mix_pages(mix, layout.page_size) <= layout.pages
        and mix.decode + len(mix.prompts) <= slots
        and longest_request(mix) <= model.max_model_len
    )


def _ratio(executor: RunExecutor, place: int, sequential: int, mix: Mix, model: Model) -> float:
    """How many times as fast as in sequence; 0 if the outputs are wrong."""
    page_size, vocab_size = executor.bound.kv_layout.page_size, model.graph.vocab_size
    base, own = (mix_batch(mix, executor.cut, page_size, vocab_size, number) for number in (sequential, place))
    if model.device.type == "cuda":  # zeros draw less power than what a run has there; nothing of it is read later
        for cache in executor.bound.kv:
            cache.normal_()
    if not output_error(executor, base, own) < largest_error(executor):
        return 0.0
    joules = EnergyMeter(model.device).joules
    found = compare(executor, {"base": base, "own": own}, seconds=SECONDS, pairs=PAIRS, joules=joules)
    return median(found.ratios("base", "own"))
