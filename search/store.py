"""Where tuned plans are kept: the plans shipped with the package, and those that this user's tuning runs stored.

Contract: a stored plan is a plan file that names model, GPU and mix and carries a fingerprint of what it was measured
with. Storing one loses nothing that was there, whatever ends the process or fills the disk. Looking for plans never
fails: a file that cannot be read is one verdict among the others.

Pseudo-code of `judge`::

    for every stored plan, the user's first, then by what they were measured to gain:
        refused if it cannot be read, is for something else, is too large, lost to sequence,
            or if one before it is for the same mix and rows
        else used; differing versions are doubts
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nanoflow.ops.graph import Graph
from nanoflow.pipeline.plan import Plan, PlanError
from nanoflow.pipeline.plan_mix import PlanMix
from nanoflow.pipeline.validate import validate
from nanoflow.search.files import replace_file, slug
from nanoflow.search.fingerprint import Fingerprint

__all__ = ["MOST_PLANS", "StoredPlan", "Verdict", "judge", "plan_folders", "same_mix", "store_plan", "stored_plans"]

MOST_PLANS = 8
"""Plans of a run: for each of them every bucket of rows is captured, which takes seconds and memory."""
SAME_MIX = 0.1
"""Two plans whose mixes are no further apart (`PlanMix.distance`) are for the same: a job that is tuned twice is."""


@dataclass(frozen=True)
class StoredPlan:
    """A file of the store."""

    file: Path
    shipped: bool
    """Whether it came with the package."""
    plan: Plan | None
    problem: str = ""
    """Why there is no plan: one message that names the file."""

    @property
    def ratio(self) -> float | None:
        """How many times as fast as in sequence it was measured to be; None if the file does not say."""
        ratio = None if self.plan is None else self.plan.measured.get("ratio")
        return float(ratio) if isinstance(ratio, int | float) else None


@dataclass(frozen=True)
class Verdict:
    """Whether a stored plan serves a run."""

    stored: StoredPlan
    against: tuple[str, ...] = ()
    """Why it is not used; empty if it is."""
    doubts: tuple[str, ...] = ()
    """Of one that is used: what was otherwise when it was measured (see `Fingerprint.doubts`)."""
    damaged: bool = False
    """It cannot be read, or cannot run the model that it names."""


def plan_folders() -> tuple[Path, Path]:
    """The user's store (``$XDG_CACHE_HOME/nanoflow/plans``, by default under ``~/.cache``), then the shipped one."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "nanoflow" / "plans", Path(__file__).parent.parent / "configs" / "plans"


def stored_plans(folders: tuple[Path, Path] | None = None) -> list[StoredPlan]:
    """Every file of the store, the user's first. Raises nothing for what cannot be read."""
    user, shipped = plan_folders() if folders is None else folders
    found = []
    for folder in (user, shipped):
        for file in sorted(folder.glob("*.yaml")):
            try:
                found.append(StoredPlan(file, folder == shipped, Plan.load(file)))
            except PlanError as error:
                found.append(StoredPlan(file, folder == shipped, None, str(error)))
    return found


def store_plan(plan: Plan, here: Fingerprint, folder: Path | None = None) -> Path:
    """Write `plan`, as measured `here`, into the user's store, in the place of one for the same; gives its file.

    The file is there as a whole or as it was before. Raises PlanError if it cannot be written, and ValueError if `here`
    does not say model and GPU.
    """
    if not here.model or not here.gpu:
        raise ValueError(f"a plan is stored for a model and a GPU, and neither may be empty: {here}")
    stamped = here.stamp(plan)
    path = (plan_folders()[0] if folder is None else folder) / file_name(stamped)
    try:
        replace_file(path, stamped.dumps())
    except OSError as error:
        raise PlanError(f"{path}: the plan cannot be stored: {error.strerror}; what was there before is kept") from None
    return path


def file_name(plan: Plan) -> str:
    """The name that `plan` is stored by: model, GPU and mix, and a few digits for what else it must fit."""
    mix = plan.mix
    what = "any-mix" if mix is None else f"{mix.decode}-decode-{mix.prefill}-prefill-{mix.context}-context"
    digest = hashlib.sha256(repr(_fits(plan)).encode()).hexdigest()[:6]
    return f"{slug(plan.model)}--{slug(plan.gpu)}--{what}--{digest}.yaml"


def judge(
    stored: Sequence[StoredPlan], here: Fingerprint, graph: Graph | None = None, capacity: int | None = None
) -> list[Verdict]:
    """Which stored plans serve a run, in the order of preference, those first that do.

    Args:
        here: what the run is; what it does not say is not compared.
        graph: the run's model, which must be able to run them; None: not checked.
        capacity: most rows of the run's batches; None: any.
    """
    used: list[Verdict] = []
    others: list[Verdict] = []
    for candidate in sorted(stored, key=_preference):
        verdict = _judge(candidate, here, graph, capacity)
        if not verdict.against:
            before = next((v for v in used if _serve_the_same(v.stored, candidate)), None)
            if before is not None:
                verdict = replace(verdict, against=(f"{before.stored.file.name} is for the same mix and comes first",))
            elif capacity is not None and len(used) == MOST_PLANS:
                verdict = replace(verdict, against=(f"a run takes {MOST_PLANS} plans at most, and others come first",))
        (others if verdict.against else used).append(verdict)
    return used + others


def _preference(stored: StoredPlan) -> tuple[bool, float, int, str]:
    capacity = 0 if stored.plan is None else stored.plan.capacity
    return stored.shipped, -(stored.ratio or 0.0), -capacity, stored.file.name


def _judge(stored: StoredPlan, here: Fingerprint, graph: Graph | None, capacity: int | None) -> Verdict:
    plan, ratio = stored.plan, stored.ratio
    if plan is None:
        return Verdict(stored, (stored.problem,), damaged=True)
    against = here.refusals(plan)
    against += [f"{key}: it names none" for key in ("model", "gpu") if not getattr(plan, key)]
    if capacity is not None and plan.capacity > capacity:
        against.append(f"capacity: it is for {plan.capacity:,} rows, engine.max_batch_tokens is {capacity:,}")
    if ratio is not None and ratio < 1:  # 1 is the sequential plan itself, stored where nothing won
        against.append(f"measured.ratio: it was {ratio:g} times as fast as in sequence")
    damaged = False
    if graph is not None and not against:
        try:
            validate(plan, graph)
        except PlanError as error:
            against, damaged = [f"{stored.file}: {error}"], True
    return Verdict(stored, tuple(against), () if against else tuple(here.doubts(plan)), damaged)


def _fits(plan: Plan) -> tuple[object, ...]:
    """All that a run must be to take the plan."""
    return plan.model, plan.gpu, plan.sms, plan.fingerprint.get("shape"), plan.fingerprint.get("dtype")


def _serve_the_same(first: StoredPlan, second: StoredPlan) -> bool:
    a, b = first.plan, second.plan
    assert a is not None and b is not None
    same_name = replace(a, model=b.model) if a.fingerprint.get("shape") else a  # the shape is the model
    if _fits(same_name) != _fits(b) or a.least_rows > b.capacity or b.least_rows > a.capacity:
        return False
    if a.mix is None or b.mix is None:
        return a.mix is b.mix
    return same_mix(a.mix, b.mix)


def same_mix(first: PlanMix, second: PlanMix) -> bool:
    """Whether plans for either mix are for the same: a job that is tuned twice has mixes that differ a little."""
    return first.distance(second.decode, second.prefill, second.decode * second.context) <= SAME_MIX
