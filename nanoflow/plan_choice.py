"""The plans of a run: what `pipeline.plan` asks for, and what it becomes with this model on this machine."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from nanoflow.errors import ConfigError
from nanoflow.ops.graph import Graph
from nanoflow.ops.row_sharding import ALL_REDUCE, layout_of
from nanoflow.pipeline.plan import SMALL_ROWS, Plan, blamed_on
from nanoflow.pipeline.program import Program
from nanoflow.pipeline.validate import validate
from nanoflow.search.fingerprint import Fingerprint
from nanoflow.search.rechecks import recheck_of
from nanoflow.search.store import StoredPlan, Verdict, judge, stored_plans

__all__ = ["ChosenPlans", "asked_layout", "choose_plans", "in_sequence", "measured_again", "plan_label", "plan_text"]


@dataclass(frozen=True)
class ChosenPlans:
    """The plans of a run, and what is to be said of the choice."""

    plans: tuple[Plan, ...]
    """In the order of preference. Of several, the last is sequential and takes what the others are not meant for; of
    ranks it may have one before it for large batches."""
    notes: tuple[str, ...] = ()
    """For `auto`, a line that says what was chosen and why; before it one for each stored plan in doubt or damaged."""
    doubtful: tuple[int, ...] = ()
    """Of the stored plans in `plans`, those that were measured with other versions, and not again here."""
    nothing_stored: bool = False
    """Nothing is stored for this model on this device: of interest to those alone who asked for `auto`."""


def plan_label(asked: str, programs: Sequence[Program]) -> str:
    """What reports call the plans of a run that asked for `asked`: of `auto`, whether it found any."""
    lanes = any(not program.plan.is_sequential(program.graph) for program in programs)
    return "sequential" if asked == "auto" and not lanes else asked


def choose_plans(asked: str, graph: Graph, here: Fingerprint, max_batch_tokens: int) -> ChosenPlans:
    """The plans of a run, the sequential one among them where the others do not take every batch.

    Args:
        asked: `pipeline.plan`: ``sequential``, ``auto`` (all stored ones that fit), or a plan file.

    Raises PlanError and ConfigError, for a file.
    """
    sequential = in_sequence(graph, max_batch_tokens)
    if asked == "sequential":
        return ChosenPlans(sequential)
    if asked == "auto":
        return _stored(graph, here, sequential)
    plan = Plan.load(asked)
    with blamed_on(asked):
        here.refuse(plan)  # first: another model's plan would fail for a less telling reason
        validate(plan, graph)
    if plan.capacity > max_batch_tokens:
        raise ConfigError(
            f"pipeline.plan: {asked} has a capacity of {plan.capacity} rows, more than "
            f"engine.max_batch_tokens = {max_batch_tokens}; raise max_batch_tokens or use another plan"
        )
    takes_all = plan.mix is None and plan.least_rows <= 1 and plan.capacity >= max_batch_tokens
    return ChosenPlans((plan,) if takes_all else (plan, *sequential), tuple(_doubts(asked, here.doubts(plan))))


def in_sequence(graph: Graph, max_batch_tokens: int) -> tuple[Plan, ...]:
    """The sequential plan for all batches; before it, where other kernels are faster in large ones, that for those."""
    plan = Plan.sequential(graph, max_batch_tokens)
    small = Plan.sequential(graph, min(max_batch_tokens, SMALL_ROWS))
    if small.kernels == plan.kernels:
        return (plan,)
    return replace(plan, least_rows=SMALL_ROWS + 1), replace(plan, kernels=small.kernels)


def asked_layout(asked: str) -> str:
    """The layout of the weights (see `nanoflow.ops.sharding`) for what `pipeline.plan` asks for: other than the usual
    one for a plan file that says so. Raises PlanError."""
    return ALL_REDUCE if asked in ("sequential", "auto") else layout_of(Plan.load(asked).sharding)


def plan_text(stored: StoredPlan, graph: Graph) -> str:
    """What a stored plan of a run's `graph` is for and what it gained, in a line."""
    assert stored.plan is not None
    gain = "not measured" if stored.ratio is None else f"{stored.ratio:.3f} times as fast as in sequence"
    if stored.plan.is_sequential(graph):
        gain = "in sequence"
    return f"{stored.plan.mix or 'any mix'} ({gain}, {stored.file.name})"


def _stored(graph: Graph, here: Fingerprint, sequential: tuple[Plan, ...]) -> ChosenPlans:
    verdicts = [measured_again(v, here) for v in judge(stored_plans(), here, graph, sequential[-1].capacity)]
    used = [verdict.stored for verdict in verdicts if not verdict.against]
    notes = [f"warning: {verdict.against[0].splitlines()[0]}; it is skipped" for verdict in verdicts if verdict.damaged]
    for verdict in verdicts:
        notes += _doubts(str(verdict.stored.file), verdict.doubts)
    run = f"{here.model} on {here.gpu}"
    plans = [stored.plan for stored in used if stored.plan is not None]
    texts = "; ".join(plan_text(stored, graph) for stored in used)
    if used and all(plan.is_sequential(graph) for plan in plans):
        notes.append(f"plan: sequential, which was measured to be the fastest for {texts}")
        return ChosenPlans(sequential, tuple(notes))
    if used:
        notes.append(f"plan: {len(used)} stored for {run}: {texts}; the rest in sequence")
    else:
        why = _why_none(verdicts, here, run)
        notes.append(f"plan: sequential, since {why or f'none is stored for {run}'}")
        return ChosenPlans(sequential, tuple(notes), nothing_stored=not why and len(notes) == 1)
    doubted = [bool(verdict.doubts) for verdict in verdicts if not verdict.against]
    doubtful = tuple(n for n, plan in enumerate(plans) if doubted[n] and not plan.is_sequential(graph))
    return ChosenPlans((*plans, *sequential), tuple(notes), doubtful)


def measured_again(verdict: Verdict, here: Fingerprint) -> Verdict:
    """`verdict`, by what was found if a plan in doubt was measured again here."""
    plan = verdict.stored.plan
    if not verdict.doubts or plan is None:
        return verdict
    ratio = recheck_of(plan, here)
    if ratio is None:
        return verdict
    against = () if ratio >= 1 else (f"measured again here, it was {ratio:g} times as fast as in sequence",)
    return replace(verdict, doubts=(), against=against)


def _why_none(verdicts: list[Verdict], here: Fingerprint, run: str) -> str | None:
    """Why what is stored for the run's model and device does not fit; None if nothing is."""
    for verdict in verdicts:
        plan = verdict.stored.plan
        if plan is not None and (plan.model, plan.gpu) == (here.model, here.gpu):
            why = verdict.against[0].splitlines()[0]
            return f"no plan stored for {run} fits ({verdict.stored.file.name}: {why}; see `nanoflow plan list`)"
    return None


def _doubts(file: str, doubts: tuple[str, ...] | list[str]) -> list[str]:
    if not doubts:
        return []
    return [f"warning: {file}: measured with {'; '.join(doubts)}: it may gain less than it says, or lose"]
