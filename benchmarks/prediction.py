"""How well the simulator predicts what plans take: its estimates beside what was measured on an H100.

    python -m benchmarks.prediction                                      # all searches and scans
    python -m benchmarks.prediction "512-512, last scan" --profile FILE  # one of them, by another than the shipped
    python -m benchmarks.prediction --ceilings --record FILE             # by the device's ceilings alone

Measured are the searches of `nanoflow tune` (benchmarks/results/tuning.json: the plans as they were) and the scans of
`python -m benchmarks.lanes` (benchmarks/results/lanes.json: plans that are built anew). No GPU is needed. Plans that
took much longer than in sequence are left out: they ran launch by launch, for a reason that has been mended since
(`nanoflow.pipeline.capture_batch`). Estimates are of all layers, under the power limit, and of embedding, final norm
and head, alone; sampling is in none of them. For each plan: measured and predicted milliseconds, the error, and the
same of the ratio to the sequential plan, in which errors that all plans share drop out. Below: the errors among the
ten plans that were measured to be the fastest, and the place of the fastest in the simulator's order.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.lanes import RESULTS, candidates
from nanoflow.ops.graph import Graph
from nanoflow.ops.operation import Work
from nanoflow.pipeline.plan import Plan
from nanoflow.pipeline.program import compile_program
from nanoflow.plans.ablation import SEQUENTIAL
from nanoflow.plans.case import H100, known_device, open_graph
from nanoflow.search.mix import Mix, mix_works
from nanoflow.search.profile import Profile
from nanoflow.search.profile_rates import profile_rates
from nanoflow.search.rates import Rates
from nanoflow.search.simulate import simulate

ITEMSIZE = 2
BROKEN = 0.6
TUNING = RESULTS.with_name("tuning.json")


def predicted(plan: Plan, graph: Graph, mix: Mix, rates: Rates) -> float:
    """Seconds of an iteration, sampling left out."""
    found = simulate(compile_program(plan, graph), mix_works(plan, mix), rates)
    sampled = Work(prefill_rows=mix.decode + len(mix.prompts))
    rows = Work(prefill_rows=mix.rows)
    outside = sum(rates.seconds(op, rows, None) for op in graph.prologue)
    return found.limited_seconds + outside + sum(rates.seconds(op, sampled, None) for op in graph.epilogue)


@dataclass(frozen=True)
class Measured:
    """A plan of a search or a scan."""

    label: str
    plan: Plan
    milliseconds: float
    ratio: float


def scanned(recorded: Mapping[str, Any], graph: Graph) -> tuple[Mix, list[Measured]]:
    """A scan of `benchmarks.lanes`: the plans that can still be built."""
    raw = recorded["mix"]
    mix, rows = Mix(raw["decode"], raw["context"], tuple(raw["prompts"]), tuple(raw["before"])), recorded["rows"]
    plans = {SEQUENTIAL: Plan.sequential(graph, rows)}
    plans |= candidates(graph, mix, rows, H100.sms, ("measured",))
    return mix, [
        Measured(label, plans[label], median(block["seconds"] for block in each["blocks"]) * 1e3, each["ratio"])
        for label, each in recorded["scan"].items()
        if label in plans
    ]


def searched(recorded: Mapping[str, Any], graph: Graph) -> tuple[Mix, list[Measured]]:
    """The search of `nanoflow tune` for a mix; the sequential plan as it was beside all others."""
    mix, rows = (
        Mix(**{key: tuple(v) if isinstance(v, list) else v for key, v in recorded["mix"].items()}),
        recorded["rows"],
    )
    ran = [step for step in recorded["steps"] if step["ratio"] is not None]
    beside = median(step["figures"]["sequential_ms"] for step in ran)
    found = [Measured(SEQUENTIAL, Plan.sequential(graph, rows), beside, 1.0)]
    for step in ran:
        plan = Plan.loads(step["plan"])
        cut = "+".join(str(part.rows) for part in plan.nano_batches)
        kernel = plan.kernels.get("decode_attention", "usual")
        parts = "/".join(map(str, next(iter(plan.partitions.values()), ("streams",))))
        stages = "" if len(plan.period) == 1 else f" {len(plan.period)} stages"
        label = f"{cut} {parts} {kernel}{stages}"
        found.append(Measured(label, plan, step["figures"]["iteration_ms"], step["ratio"]))
    return mix, found


def compared(mix: Mix, plans: Sequence[Measured], graph: Graph, rates: Rates) -> list[dict[str, Any]]:
    """A row for each plan, fastest first."""
    found = [
        {
            "plan": each.label, "measured_ms": each.milliseconds, "ratio": each.ratio,
            "predicted_ms": predicted(each.plan, graph, mix, rates) * 1e3,
        }
        for each in plans
        if each.ratio > BROKEN
    ]  # fmt: skip
    base = next(row["predicted_ms"] for row in found if row["plan"] == SEQUENTIAL)
    for row in found:
        row["error"] = row["predicted_ms"] / row["measured_ms"] - 1
        row["predicted_ratio"] = base / row["predicted_ms"]
        row["ratio_error"] = row["predicted_ratio"] / row["ratio"] - 1
    return sorted(found, key=lambda row: -row["ratio"])


def summed_up(rows: list[dict[str, Any]], best: int) -> dict[str, Any]:
    """The errors among the `best` plans, and the place of the fastest in the simulator's order."""
    first = rows[:best]
    order = sorted(rows, key=lambda row: row["predicted_ms"])
    return {
        "plans": len(rows),
        "largest_error": max(abs(row["error"]) for row in first),
        "mean_error": mean(abs(row["error"]) for row in first),
        "largest_ratio_error": max(abs(row["ratio_error"]) for row in first),
        "place_of_the_fastest": 1 + order.index(rows[0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="names of searches or scans; default: all")
    parser.add_argument("--model", default="llama-3-8b", help="a shipped shape or a folder: that of the record")
    parser.add_argument("--profile", type=Path, help="a profile; default: that of the H100, if there is one")
    parser.add_argument("--ceilings", action="store_true", help="without a profile, by the H100's ceilings")
    parser.add_argument("--best", type=int, default=10, help="plans that errors are summed up over")
    parser.add_argument("--record", type=Path, help="save all of it here, as JSON")
    args = parser.parse_args()
    graph = open_graph(args.model, Plan(1, (), ()), "benchmarks/prediction.py")[2]
    device = replace(H100, profile=None) if args.ceilings else known_device(Plan(1, (), (), gpu=H100.name), graph)
    rates: Rates = device.rates
    source = str(device.profile_file or f"ceilings of {device.name}")
    if args.profile is not None:
        rates, source = profile_rates(Profile.load(args.profile), ITEMSIZE, H100.energy), str(args.profile)
    recorded: dict[str, tuple[Mix, list[Measured]]] = {}
    for job, each in json.loads(TUNING.read_text())["jobs"].items():
        for own in each["mixes"]:
            recorded[f"{job} search, {own['rows']:,} rows"] = searched(own, graph)
    for name, scan in json.loads(RESULTS.read_text()).items():
        recorded[name if "scan" in name else f"{name}, last scan"] = scanned(scan, graph)
    unknown = [name for name in args.runs if name not in recorded]
    if unknown:
        parser.error(f"{unknown[0]!r} is not among {', '.join(recorded)}")
    print(source)
    made: dict[str, Any] = {"rates": source, "runs": {}}
    for name in args.runs or recorded:
        rows = compared(*recorded[name], graph, rates)
        summary = summed_up(rows, args.best)
        made["runs"][name] = {**summary, "rows": rows}
        print(f"\n{name}")
        for row in rows:
            print(
                f"  {row['plan']:<34} {row['measured_ms']:7.2f} ms, predicted {row['predicted_ms']:7.2f} "
                f"({row['error']:+6.1%}); ratio {row['ratio']:.3f}, predicted {row['predicted_ratio']:.3f} "
                f"({row['ratio_error']:+6.1%})"
            )
        print(
            f"  error of the {min(args.best, len(rows))} fastest: {summary['mean_error']:.1%} on average, "
            f"{summary['largest_error']:.1%} at most, of the ratio {summary['largest_ratio_error']:.1%}; "
            f"the fastest is number {summary['place_of_the_fastest']} of {summary['plans']} for the simulator"
        )
    if args.record is not None:
        args.record.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
