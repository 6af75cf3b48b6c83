"""Where tuned plans are kept: the plans shipped with the package, and those that this user's tuning runs stored.

A plan is found by what it was tuned for: the model's name, the device's name and its capacity in rows.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from nanoflow.ops.graph import Graph
from nanoflow.pipeline.plan import Plan
from nanoflow.pipeline.validate import validate

__all__ = ["find_plan", "plan_folders"]


def plan_folders() -> tuple[Path, ...]:
    """The user's store (``$XDG_CACHE_HOME/nanoflow/plans``, by default under ``~/.cache``), then the shipped one."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "nanoflow" / "plans", Path(__file__).parent.parent / "configs" / "plans"


def find_plan(
    graph: Graph, *, model: str, device: str, capacity: int, folders: tuple[Path, ...] | None = None
) -> Plan | None:
    """The stored plan for `model` on `device` with the largest capacity that is at most `capacity` rows, or None.

    Raises:
        PlanError: a stored plan for this model and device cannot be read or does not fit the graph.
    """
    candidates = [
        plan
        for plan in _stored(plan_folders() if folders is None else folders)
        if plan.model == model and plan.gpu == device and plan.capacity <= capacity
    ]
    best = max(candidates, key=lambda plan: plan.capacity, default=None)
    if best is not None:
        validate(best, graph)
    return best


def _stored(folders: tuple[Path, ...]) -> Iterator[Plan]:
    for folder in folders:
        for file in sorted(folder.glob("*.yaml")):
            yield Plan.load(file)
