"""``nanoflow tune --simulate``: the search without a device, on what is known of a GPU.

The same proposals, each valued by the simulator. Nothing of it is stored or told to a search that measures: what is
written is plan files, to look at and to measure.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from nanoflow.config_schema import RunConfig
from nanoflow.errors import InputError, OutputError
from nanoflow.loading import DTYPES, PAGE_SIZES, gpu_kv_tokens, open_model, shard_model
from nanoflow.pipeline.cuda_executor import buckets
from nanoflow.pipeline.plan import Plan
from nanoflow.pipeline.validate import validate
from nanoflow.plans.case import DEVICES, H100, H200, PlanCase, known_device
from nanoflow.plans.job_mixes import WeightedMix, job_mixes
from nanoflow.plans.plot import plot_plan
from nanoflow.search.files import replace_file
from nanoflow.search.fingerprint import Fingerprint, graph_shape
from nanoflow.search.simulate import Simulation
from nanoflow.search.space import collective_forms
from nanoflow.search.tuner import Outcome, PlanSearch, Target, search
from nanoflow.tuning.job import plan_mix

__all__ = ["Estimated", "SimulatedMix", "print_simulated", "simulate_job"]

MEMORY = {H100.name: 84.9e9, H200.name: 150.1e9}
"""Bytes, as the driver tells."""
BEST = 10
TRIALS = 100
"""Plans for each mix, unless told otherwise: a minute or so of one CPU core."""
LEAST_WEIGHT = 0.1
"""Of a mix that is looked at, but for the heaviest."""


@dataclass(frozen=True)
class Estimated:
    """A plan and what is predicted of it."""

    plan: Plan
    found: Simulation
    ratio: float
    """How many times as fast as in sequence, under the power limit."""


@dataclass(frozen=True)
class SimulatedMix:
    """The best plans of a mix that is a tenth of the job or more, or its heaviest."""

    mix: WeightedMix
    device: str
    ranks: int
    """GPUs that share the model."""
    tried: int
    sequential: Simulation
    best: tuple[Estimated, ...]
    files: tuple[Path, ...]
    """Those of `best`, then pictures; empty if nothing was to be written."""


def simulate_job(
    config: RunConfig,
    *,
    gpu: str | None = None,
    minutes: float | None = None,
    trials: int | None = None,
    out: Path | None = None,
    seed: int = 0,
) -> list[SimulatedMix]:
    """Search for plans for the job of `config` on paper.

    Args:
        gpu: one that is known, or a part of its name that no other has, such as h200; None: an H100.
        minutes: of all mixes together; None: until there were enough plans.
        trials: plans for each mix; None: `TRIALS`, unless `minutes` are given.
        out: folder for the best plans of every mix, and a picture of the best beside sequence; None: nothing is
            written.

    Raises UserError.
    """
    name = _known(gpu or H100.name)
    # Opened where this runs, for its shapes; what is on the GPU follows from the configuration.
    section = config.model.model_copy(update={"weights": "random"})
    engine = config.engine.model_copy(update={"device": "cpu"})
    config = config.model_copy(update={"model": section, "engine": engine})
    dtype = torch.bfloat16 if section.dtype == "auto" else DTYPES[section.dtype]
    # With several ranks, all of this is of one of them: their shares are alike, and so are their plans.
    model = shard_model(replace(open_model(section, engine), dtype=dtype), 0, config.parallel.tensor)
    device = known_device(Plan(1, (), (), gpu=name), model.graph, str(dtype).removeprefix("torch."))
    page_size = PAGE_SIZES["cuda"] if engine.page_size == "auto" else int(engine.page_size)
    job = job_mixes(
        config,
        model,
        kv_tokens=gpu_kv_tokens(model.graph, engine, int(MEMORY[name]), dtype),
        page_size=page_size,
        row_buckets=buckets(engine.max_batch_tokens),
        ceilings=device.ceilings,
        itemsize=dtype.itemsize,
    )
    here = Fingerprint(
        model=model.checkpoint.name,
        gpu=name,
        sms=device.sms,
        shape=graph_shape(model.graph),
        dtype=str(dtype).removeprefix("torch."),
        page_size=page_size,
    )
    limit = trials if trials is not None or minutes is not None else TRIALS
    found = []
    heavy = [mix for place, mix in enumerate(job.mixes) if not place or mix.weight >= LEAST_WEIGHT]
    for number, mix in enumerate(heavy, start=1):
        forms = collective_forms(model.graph)
        target = Target(model.graph, mix.mix, mix.bucket, device.rates, device.sms, forms)
        ends = (
            None
            if minutes is None
            else time.monotonic() + 60 * minutes * mix.weight / sum(each.weight for each in heavy)
        )
        plans, tried = _search(target, seed, limit, ends)
        sequential = target.simulate(Plan.sequential(target.graph, target.rows))
        different: dict[tuple[float, float], Estimated] = {}
        for plan in plans:
            validate(plan, model.graph)
            simulation = target.simulate(plan)
            ratio = sequential.limited_seconds / simulation.limited_seconds
            estimate = simulation.seconds, simulation.limited_seconds
            different.setdefault(estimate, Estimated(_stamped(plan, mix, here), simulation, ratio))
            if len(different) == BEST:
                break
        # Of the whole model; the search looks at a layer in steady state.
        estimated = sorted(different.values(), key=lambda each: -each.ratio)
        files: list[Path] = []
        if out is not None:
            files = _write(estimated, out, number)
            if files:
                case = PlanCase(
                    str(files[0]), estimated[0].plan, model.checkpoint.name, section.path, model.graph, mix.mix, device
                )
                for form in ("png", "svg"):
                    files += plot_plan(case, out / f"mix-{number}-best.{form}", compare=True)
        found.append(SimulatedMix(mix, name, model.graph.ranks, tried, sequential, tuple(estimated), tuple(files)))
    return found


def _search(target: Target, seed: int, trials: int | None, ends: float | None) -> tuple[list[Plan], int]:
    """All plans that were tried, the best first, and how many there were."""
    plans = PlanSearch(target, seed=seed)
    sequential = target.predict(plans.sequential)
    search(
        plans,
        lambda asked: [Outcome(sequential / target.predict(plan)) for plan in asked],
        trials=trials,
        goes_on=lambda: ends is None or not plans.measured or time.monotonic() < ends,
    )
    return [tried.plan for tried in plans.best(plans.measured)], plans.measured


def _known(gpu: str) -> str:
    """The name of a GPU, of which `gpu` may be a part. Raises InputError unless it is one's alone."""
    found = [name for name in DEVICES if gpu.lower() in name.lower()]
    if len(found) != 1:
        raise InputError(f"--gpu {gpu}: nothing is known of it; give {' or '.join(DEVICES)}")
    return found[0]


def _stamped(plan: Plan, mix: WeightedMix, here: Fingerprint) -> Plan:
    return replace(here.stamp(plan), mix=plan_mix(mix.mix))


def _write(estimated: Sequence[Estimated], folder: Path, number: int) -> list[Path]:
    """Write the plans, the best first. Raises OutputError."""
    files = []
    for place, each in enumerate(estimated, start=1):
        path = folder / f"mix-{number}-plan-{place:02d}.yaml"
        try:
            replace_file(path, each.plan.dumps())
        except OSError as error:
            raise OutputError(f"--out {folder}: {path.name} cannot be written: {error.strerror}") from None
        files.append(path)
    return files


def print_simulated(found: Sequence[SimulatedMix], console: Console) -> None:
    """A table for each mix: the best plans, predicted."""
    for number, each in enumerate(found, start=1):
        title = f"mix {number}, {each.mix.weight:.0%} of the job: {each.mix.mix}"
        console.print(title, highlight=False, markup=False, soft_wrap=True)
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        headings = ["", "nano-batches", "SMs", "sharding"][: 3 + (each.ranks > 1)]
        for heading in headings:
            table.add_column(heading, no_wrap=True)
        for heading in ("ms", "at limit", "mJ/row", "ratio"):
            table.add_column(heading, justify="right", no_wrap=True)
        rows = each.mix.mix.rows
        first = ["", "sequential", "", ""][: len(headings)]
        table.add_row(*first, *_figures(each.sequential, rows), "1.000")
        for place, best in enumerate(each.best, start=1):
            cut = " + ".join(f"{nano_batch.rows:,}" for nano_batch in best.plan.nano_batches)
            parts = "; ".join(" + ".join(map(str, sizes)) for sizes in best.plan.partitions.values())
            lanes = len(best.plan.lanes)
            parts = parts or ("all" if lanes == 1 else f"shared by {lanes}")
            first = [str(place), cut, parts, best.plan.sharding][: len(headings)]
            table.add_row(*first, *_figures(best.found, rows), f"{best.ratio:.3f}")
        console.print(table)
        for file in each.files:
            console.print(f"saved {file}", highlight=False, markup=False, soft_wrap=True)
    if found:
        tried = sum(each.tried for each in found)
        left = 1 - sum(each.mix.weight for each in found)
        if left > 0.005:
            console.print(
                f"mixes of less than {LEAST_WEIGHT:.0%} each, {left:.0%} in all, are left out", highlight=False
            )
        where = f"each of {found[0].ranks} {found[0].device}" if found[0].ranks > 1 else found[0].device
        text = f"{tried} plans estimated for {where}; nothing was measured, and no plan is stored"
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def _figures(found: Simulation, rows: int) -> tuple[str, str, str]:
    energy = "-" if found.joules is None else f"{found.joules / rows * 1e3:.2f}"
    return f"{found.seconds * 1e3:.2f}", f"{found.limited_seconds * 1e3:.2f}", energy
