"""What a plan's overlap is worth: the sequential plan, its nano-batches one after the other, and the plan itself.

The three run on one executor with the same weights and KV cache, in alternating blocks. The second is what the plan
would be without lanes: the same cut of the batch, each operation on one nano-batch after the other on the whole device.
Cutting costs: weights are read once a nano-batch, and smaller products fill the device less well. Overlap has to win
that back first.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from nanoflow.errors import OutputError
from nanoflow.loading import device_name
from nanoflow.ops.collectives import Collective
from nanoflow.ops.graph import Graph
from nanoflow.pipeline.period import complete_period
from nanoflow.pipeline.plan import MAIN_LANE, WHOLE, Entry, FrozenMapping, Plan, Stage
from nanoflow.plans.case import PlanCase
from nanoflow.plans.running import executor_here, mix_batch, open_here
from nanoflow.power import EnergyMeter
from nanoflow.search.files import check_writable, replace_file
from nanoflow.search.measure import Block, Comparison, compare, output_error
from nanoflow.search.mix import Mix

__all__ = ["Ablation", "ablate", "ablation_plans", "print_ablation", "save_ablation"]

SEQUENTIAL, CUT, OVERLAPPED = "sequential", "nano-batches", "overlapped"


@dataclass(frozen=True, eq=False)
class Ablation:
    """What was measured, and of what."""

    plan: Plan
    mix: Mix
    model: str
    device: str
    ranks: int
    """Devices that share the model; joules and watts are of all of them."""
    rows: dict[str, int]
    """Rows of the dense batch as each plan pads it."""
    errors: dict[str, float]
    """See `nanoflow.search.measure.output_error`, against the sequential plan."""
    comparison: Comparison

    def to_dict(self) -> dict[str, Any]:
        """All of it, for a file."""
        plans: dict[str, Any] = {}
        tokens = self.mix.rows
        for name, blocks in self.comparison.blocks.items():
            joules = self.comparison.joules(name)
            ratios = self.comparison.ratios(SEQUENTIAL, name)
            plans[name] = {
                "milliseconds": self.comparison.seconds(name) * 1e3,
                "tokens_per_second": tokens / self.comparison.seconds(name),
                "watts": self.comparison.watts(name),
                "joules_per_token": None if joules is None else joules / tokens,
                "ratio": {"median": median(ratios), "least": min(ratios), "most": max(ratios), "each": ratios},
                "rows": self.rows[name],
                "output_error": self.errors[name],
                "blocks": [asdict(block) for block in blocks],
            }
        return {
            "model": self.model,
            "device": self.device,
            "ranks": self.ranks,
            "mix": asdict(self.mix),
            "plan": self.plan.dumps(),
            "plans": plans,
        }


def ablation_plans(plan: Plan, graph: Graph, rows: int) -> dict[str, Plan]:
    """The plans to compare on batches of `rows` rows, padding included, the sequential one first.

    A plan of one nano-batch has no second. Those without overlap take the device's own choice of kernels, since a
    plan's are chosen for its parts of the device; but the second has the plan's forms of collectives.
    """
    period, layer = complete_period(plan, graph), plan.graph(graph).layer
    whole = {e.op for stage in period for lane in stage.lanes.values() for e in lane if e.nano_batch is None}
    names = [nano_batch.name for nano_batch in plan.nano_batches]
    lane = tuple(Entry(op.name, name) for op in layer for name in ([None] if op.name in whole else names))
    found = {SEQUENTIAL: Plan.sequential(graph, rows)}
    if len(names) > 1:
        stage = Stage(WHOLE, FrozenMapping({MAIN_LANE: lane}))
        collectives = {op.name for op in layer if isinstance(op, Collective)}
        forms = {name: kernel for name, kernel in plan.kernels.items() if name.partition(".")[0] in collectives}
        found[CUT] = Plan(
            capacity=plan.capacity,
            nano_batches=plan.nano_batches,
            period=(stage,),
            kernels=FrozenMapping(forms),
            sharding=plan.sharding,
        )
    found[OVERLAPPED] = plan
    return found


def ablate(
    case: PlanCase,
    *,
    device: str = "auto",
    seconds: float = 5.0,
    pairs: int = 8,
    progress: Callable[[str, Block], None] = lambda name, block: None,
) -> Ablation:
    """Measure the plan of `case` on its mix: blocks of `seconds` in turn, `pairs` of each plan.

    Args:
        device: as `engine.device` of a run.
        progress: told of every block.

    Raises UserError.
    """
    model, page_size, rows = open_here(case, device)
    plans = ablation_plans(case.plan, model.graph, rows)
    with executor_here(case, model, page_size, rows, list(plans.values())) as executor:
        batches = {
            name: mix_batch(case.mix, executor.cut, page_size, case.graph.vocab_size, number)
            for number, name in enumerate(plans)
        }
        errors = {name: output_error(executor, batches[SEQUENTIAL], batch) for name, batch in batches.items()}
        joules = EnergyMeter(model.device, case.graph.ranks).joules
        found = compare(executor, batches, seconds=seconds, pairs=pairs, joules=joules, progress=progress)
    padded = {name: batch.rows for name, batch in batches.items()}
    where = device_name(model.device)
    return Ablation(case.plan, case.mix, case.model, where, case.graph.ranks, padded, errors, found)


def print_ablation(found: Ablation, console: Console) -> None:
    """A table: one plan a line."""
    comparison, tokens = found.comparison, found.mix.rows
    where = f"{found.ranks} x {found.device}" if found.ranks > 1 else found.device
    table = Table(title=f"{found.model} on {where}: {found.mix}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for title in ("plan", "rows", "ms", "tok/s", "W", "mJ/tok", "ratio", "least", "most", "error"):
        table.add_column(title, justify="left" if title == "plan" else "right", no_wrap=True)
    for name in comparison.blocks:
        seconds, watts, joules = comparison.seconds(name), comparison.watts(name), comparison.joules(name)
        ratios = comparison.ratios(SEQUENTIAL, name)
        table.add_row(
            name,
            f"{found.rows[name]:,}",
            f"{seconds * 1e3:.2f}",
            f"{tokens / seconds:,.0f}",
            "-" if watts is None else f"{watts:.0f}",
            "-" if joules is None else f"{joules / tokens * 1e3:.2f}",
            *(f"{ratio:.3f}" for ratio in (median(ratios), min(ratios), max(ratios))),
            f"{found.errors[name]:.0e}",
        )
    console.print(table)


def save_ablation(found: dict[str, Any] | None, path: Path) -> None:
    """Write `found` as JSON; None: only see whether it could be. Raises OutputError."""
    try:
        if found is None:
            check_writable(path)
        else:
            replace_file(path, json.dumps(found, indent=1) + "\n")
    except OSError as error:
        raise OutputError(f"--out {path}: cannot be written: {error.strerror}; give another place") from None
