"""Every plan of a small space on a job's heaviest mix, beside the plan that `nanoflow tune` has stored for it.

    python -m benchmarks.plan_grid configs/synthetic-8b.yaml             # after `nanoflow tune` of the same job
    python -m benchmarks.plan_grid JOB.yaml --memory-sms 28 32 --device cpu --out /tmp/grid.json

The space: two nano-batches half a layer apart with all attention, and RoPE, in the memory lane; cut evenly or tilted;
the memory lane's SMs; and how many programs of decode attention an SM has. Plans are measured as a round of the tuner
measures them, then the fastest of the grid and the stored plan as its last comparison does. The file is written after
every round.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

from nanoflow.config import load_config
from nanoflow.errors import UserError
from nanoflow.ops.attention import OTHER_PROGRAMS
from nanoflow.pipeline.plan import FrozenMapping, Plan
from nanoflow.plans.job_mixes import WeightedMix
from nanoflow.search.files import replace_file
from nanoflow.search.list_schedule import ATTENTION, COMPANIONS
from nanoflow.search.space import PlanChoice, build_plan
from nanoflow.search.store import judge, same_mix, stored_plans
from nanoflow.search.tuner import ROUND
from nanoflow.tuning.job import TuningJob, open_job, plan_mix, tuning_folder
from nanoflow.tuning.rounds import Blocks, Final, MixRounds
from nanoflow.weights import load_weights

RESULTS = Path(__file__).parent / "results" / "plan_grid.json"
SMS = (24, 28, 32, 36, 40)
CUTS = {"even": ((8, 8), (8, 8)), "tilt": ((7, 9), (11, 5))}


def grid(job: TuningJob, mix: WeightedMix, sms: Sequence[int]) -> dict[str, Plan]:
    """All plans by name; without SMs to set apart, those of two plain streams."""
    rows = job.rows(mix)[1]
    parts: Sequence[int | None] = sms if job.sms else (None,)
    programs = ("", *OTHER_PROGRAMS) if job.sms else ("",)
    found = {}
    for (cut, (decode, prefill)), memory, kernel in product(CUTS.items(), parts, programs):
        choice = PlanChoice(
            decode,
            prefill,
            128,
            beside=(True, True),
            skew=4,
            memory_sms=memory,
            with_attention=frozenset(COMPANIONS),
            kernels=FrozenMapping({ATTENTION: kernel} if kernel else {}),
        )
        name = f"{cut}, {memory or 'shared'} SMs, {kernel or 'usual'}"
        found[name] = build_plan(choice, job.model.graph, mix.mix, rows, job.rates)
    return found


def stored_plan(job: TuningJob, mix: WeightedMix) -> Plan | None:
    """What the user's store has for the mix, if it has lanes."""
    verdicts = judge(stored_plans(), job.here, job.model.graph, job.config.engine.max_batch_tokens)
    for verdict in verdicts:
        plan = verdict.stored.plan
        if plan is not None and plan.mix is not None and same_mix(plan.mix, plan_mix(mix.mix)) and not verdict.against:
            return plan if len(plan.nano_batches) > 1 else None
    return None


def figures(final: Final) -> dict[str, Any]:
    """What is recorded of a plan in the last comparison."""
    values = asdict(replace(final, plan=Plan(1, (), ())))
    del values["plan"]
    return {"ratio": final.ratio, **values}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The grid and the last comparison."""
    config = load_config(args.job, args.overrides)
    job = open_job(config, args.device, tuning_folder())
    mix = job.mixes.mixes[0]
    weights = load_weights(job.model.graph, job.model.checkpoint, job.model.dtype, job.model.device, "random")
    plans, tuned = grid(job, mix, args.memory_sms), stored_plan(job, mix)
    record: dict[str, Any] = {
        "what": "all plans of a small space, and the tuner's, on a job's heaviest mix; ratios to the sequential plan",
        "here": asdict(job.here), "mix": asdict(mix.mix), "rows": job.rows(mix)[1],
        "seconds": args.seconds, "pairs": args.pairs, "grid": {}, "final": None,
        "tuned": None if tuned is None else tuned.dumps(),
    }  # fmt: skip
    assert job.here.page_size is not None
    rounds = MixRounds(job.model, weights, mix.mix, job.rows(mix)[1], job.here.page_size)
    with rounds:
        names = list(plans)
        for begin in range(0, len(names), ROUND):
            some = names[begin : begin + ROUND]
            outcomes = rounds.measure([plans[name] for name in some], Blocks(args.seconds, args.pairs))
            for name, outcome in zip(some, outcomes, strict=True):
                record["grid"][name] = {"ratio": outcome.ratio, "why": outcome.why, **outcome.figures}
                print(f"{name:<32} {outcome.why or f'{outcome.ratio:.4f}'}", flush=True)
            save(args.out, record)
        best = sorted((n for n in names if record["grid"][n]["ratio"]), key=lambda n: -record["grid"][n]["ratio"])
        finalists = {f"grid: {name}": plans[name] for name in best[: args.keep]}
        if tuned is not None:
            finalists["tuned"] = tuned
        finals = rounds.compare(list(finalists.values()), Blocks(args.final_seconds, args.final_pairs))
    by_plan = {id(plan): name for name, plan in finalists.items()}
    record["final"] = {by_plan[id(final.plan)]: figures(final) for final in finals}
    for name, each in record["final"].items():
        print(f"{name:<32} {each['ratio']:.4f} ({min(each['ratios']):.4f} to {max(each['ratios']):.4f})")
    save(args.out, record)
    return record


def save(path: Path, record: dict[str, Any]) -> None:
    replace_file(path, json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", metavar="JOB", type=Path)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--device")
    parser.add_argument("--memory-sms", type=int, nargs="+", default=SMS)
    parser.add_argument("--seconds", type=float, default=0.5, help="of a block of a round")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--keep", type=int, default=2, help="of the grid, for the last comparison")
    parser.add_argument("--final-seconds", type=float, default=3.0)
    parser.add_argument("--final-pairs", type=int, default=6)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    try:
        measure(args)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
