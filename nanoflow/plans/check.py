"""``nanoflow plan check``: all that can be said about a plan without running it.

Pseudo-code::

    compare what it was tuned for with the model, and with this machine's GPU if there is one
    for some random batches that the plan takes, with and without padding:
        look for races with `check_program`, which knows nothing of how waits are derived
    say what was checked; the first fault ends it, with the nano-ops in question marked in a grid
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from nanoflow.devices import gpu_problem
from nanoflow.loading import machine_fingerprint
from nanoflow.pipeline.checker import Violation, check_program
from nanoflow.pipeline.dependencies import derive_dependencies, sequential_order
from nanoflow.pipeline.grid import plain
from nanoflow.pipeline.plan import Plan, PlanError, blamed_on
from nanoflow.pipeline.program import Program
from nanoflow.pipeline.split import BatchCutter
from nanoflow.plans.case import PlanCase
from nanoflow.plans.running import mix_batch
from nanoflow.plans.show import period_grid, stage_text
from nanoflow.search.fingerprint import Fingerprint, ranks_of
from nanoflow.search.mix import Mix

__all__ = ["Finding", "check", "check_races", "random_mixes"]

MIXES = 8
PAGE_SIZE = 4
"""Tokens of a KV page in the batches: small, so that short contexts have several."""
CONTEXT = 10
"""The longest context of decode rows: what was appended before this iteration takes part in no race."""
GRID_WIDTH = 116


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at and found in order."""

    name: str
    text: str


def check(case: PlanCase) -> list[Finding]:
    """Check a plan that `open_case` could read. Raises PlanError at the first fault."""
    plan = case.plan
    device = _check_identity(case)
    waits = sum(len(step.waits) for step in case.program.steps)
    derived = derived_waits(case.program)
    named = {entry.op for stage in plan.period for lane in stage.lanes.values() for entry in lane}
    follow = len(case.program.graph.layer) - len(named)
    lanes = len(case.program.lanes)
    mixes = random_mixes(plan)
    raced = check_races(case, mixes)
    rows = sorted(mix.rows for mix in mixes)
    stages = "; ".join(stage_text(plan, index, stage.partition) for index, stage in enumerate(plan.period))
    return [
        Finding("model", f"{case.model}: {_layers_text(case)}"),
        Finding("device", device),
        Finding("SMs", stages),
        Finding(
            "coverage",
            f"every operation of every layer runs once on all rows: {len(named)} named in the period, {follow} follow "
            "their producer",
        ),
        Finding(
            "deadlock",
            f"none: {len(case.program.steps):,} nano-ops in {lanes} lane{'s' if lanes > 1 else ''} have an order",
        ),
        Finding(
            "waits",
            f"{derived:,} derived between lanes, {waits:,} kept; {derived - waits:,} removed, which lanes, joins and "
            "other waits imply",
        ),
        Finding(
            "races",
            f"none on {len(mixes)} random mixes of {rows[0]:,} to {rows[-1]:,} rows, padded and not, over {raced} "
            "layers, found without the derivation",
        ),
    ]


def _layers_text(case: PlanCase) -> str:
    graph = case.program.graph
    ranks = f", on each of {graph.ranks} ranks, sharding {graph.sharding}" if graph.ranks > 1 else ""
    return f"{graph.layers} layers of {len(graph.layer)} operations{ranks}"


def derived_waits(program: Program) -> int:
    """How many of the derived dependencies are between lanes."""
    graph, count = program.graph, len(program.plan.nano_batches)
    whole = {step.nano_op.op for step in program.steps if step.nano_op.nano_batch is None}
    nano_ops = sequential_order(graph, whole, count)
    lane = {step.nano_op: step.lane for step in program.steps}
    dependencies = derive_dependencies(graph, nano_ops, count)
    return sum(
        lane[nano_op] != lane[nano_ops[other]]
        for nano_op, before in zip(nano_ops, dependencies, strict=True)
        for other in before
    )


def random_mixes(plan: Plan, count: int = MIXES, seed: int = 0) -> list[Mix]:
    """Mixes that the plan takes: all decode rows, all prompts, and random ones; the same for the same seed."""
    draw = random.Random(seed)
    least = max(1, plan.least_rows)
    mixes = [Mix(plan.capacity, CONTEXT), Mix(0, 1, (plan.capacity,)), Mix(least, CONTEXT)]
    while len(mixes) < count:
        rows = draw.randint(least, plan.capacity)
        decode = draw.randint(0, rows)
        tokens = rows - decode
        cuts = draw.sample(range(1, tokens), min(3, tokens - 1)) if tokens else []
        ends = [*sorted(cuts), tokens] if tokens else []
        prompts = tuple(end - begin for begin, end in pairwise([0, *ends]))
        mixes.append(Mix(decode, draw.randint(1, CONTEXT), prompts))
    return mixes


def check_races(case: PlanCase, mixes: list[Mix]) -> int:
    """Check the plan's program on batches of `mixes`; gives the layers that were looked at. Raises PlanError.

    All layers share their buffers, so what can go wrong does within a few periods: more layers would repeat it.
    """
    furthest = max(entry.ahead for stage in case.plan.period for lane in stage.lanes.values() for entry in lane)
    short = case.with_layers(min(case.graph.layers, 2 * furthest + 4))
    for mix in mixes:
        for buckets in ((), (case.plan.capacity,)):
            batch = mix_batch(mix, BatchCutter([case.plan], buckets), PAGE_SIZE, case.graph.vocab_size)
            violations = check_program(short.program, batch, PAGE_SIZE)
            if violations:
                raise _race(short, mix, violations)
    return short.graph.layers


def _race(case: PlanCase, mix: Mix, violations: Sequence[Violation]) -> PlanError:
    fault = violations[0]
    marked = [step for step in (fault.first, fault.second) if step is not None]
    more = f" (and {len(violations) - 1:,} more)" if len(violations) > 1 else ""
    return PlanError(
        f"{case.file}: period: a race on {mix}: {fault.message}{more}. Waits are derived, so this is a bug in "
        f"NanoFlow: report it with the plan\n{plain(period_grid(case.timeline, GRID_WIDTH, marked))}"
    )


def _check_identity(case: PlanCase) -> str:
    """Compare the plan's model, ranks and device with what is here, and say what was compared. Raises PlanError."""
    shape, ranks = str(case.plan.fingerprint.get("shape", "")), case.graph.ranks
    if shape and ranks_of(shape) != ranks:
        raise PlanError(
            f"{case.file}: fingerprint.shape: the plan was tuned for parallel.tensor: {ranks_of(shape)}, not for "
            f"{ranks}; leave --tensor out, or tune for {ranks}"
        )
    gpu = gpu_problem(0) is None
    here = machine_fingerprint(torch.device("cuda", 0)) if gpu else Fingerprint()
    with blamed_on(case.file):
        replace(here, model=case.model).refuse(case.plan)
    if not gpu:
        return "no GPU here: the plan's was not compared"
    doubts = here.doubts(case.plan)
    measured = f"; measured with {'; '.join(doubts)}" if doubts else ""
    whose = "as the plan says" if case.plan.gpu else "any will do"
    return f"{here.gpu} with {here.sms} SMs, {whose}{measured}"
