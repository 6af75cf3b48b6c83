"""How well the simulator predicts what plans take: its estimates beside what `python -m benchmarks.lanes` measured.

    python -m benchmarks.prediction                             # every recorded scan, by the H100's profile or ceilings
    python -m benchmarks.prediction 512-512 --profile FILE      # one of them, by a profile
    python -m benchmarks.prediction --best 5 --record FILE

The candidates of each recorded comparison are built anew and simulated; no GPU is needed. Estimates are of all layers,
under the power limit, and of embedding, final norm and head, alone; sampling is in none of them. For each plan:
measured and predicted milliseconds, the error, and the same of the ratio to the sequential plan, in which errors that
all plans share drop out. Below: the largest error among the ten plans that were measured to be the fastest, and the
place of the fastest in the simulator's order.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
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


def predicted(plan: Plan, graph: Graph, mix: Mix, rates: Rates) -> float:
    """Seconds of an iteration, sampling left out."""
    found = simulate(compile_program(plan, graph), mix_works(plan, mix), rates)
    sampled = Work(prefill_rows=mix.decode + len(mix.prompts))
    rows = Work(prefill_rows=mix.rows)
    outside = sum(rates.seconds(op, rows, None) for op in graph.prologue)
    return found.limited_seconds + outside + sum(rates.seconds(op, sampled, None) for op in graph.epilogue)


def compared(recorded: Mapping[str, Any], graph: Graph, rates: Rates) -> list[dict[str, Any]]:
    """A row for each plan of a comparison that can still be built, fastest first."""
    raw = recorded["mix"]
    mix, rows = Mix(raw["decode"], raw["context"], tuple(raw["prompts"]), tuple(raw["before"])), recorded["rows"]
    plans = {SEQUENTIAL: Plan.sequential(graph, rows)}
    plans |= candidates(graph, mix, rows, rates.device_sms, ("measured",))
    found = []
    for label, each in recorded["scan"].items():
        if label in plans:
            seconds = median(block["seconds"] for block in each["blocks"])
            found.append(
                {
                    "plan": label, "measured_ms": seconds * 1e3, "ratio": each["ratio"],
                    "predicted_ms": predicted(plans[label], graph, mix, rates) * 1e3,
                }
            )  # fmt: skip
    base = next(row["predicted_ms"] for row in found if row["plan"] == SEQUENTIAL)
    for row in found:
        row["error"] = row["predicted_ms"] / row["measured_ms"] - 1
        row["predicted_ratio"] = base / row["predicted_ms"]
        row["ratio_error"] = row["predicted_ratio"] / row["ratio"] - 1
    return sorted(found, key=lambda row: -row["ratio"])


def summed_up(rows: list[dict[str, Any]], best: int) -> dict[str, Any]:
    """The largest errors among the `best` plans, and the place of the fastest in the simulator's order."""
    first = rows[:best]
    order = sorted(rows, key=lambda row: row["predicted_ms"])
    return {
        "plans": len(rows),
        "largest_error": max(abs(row["error"]) for row in first),
        "largest_ratio_error": max(abs(row["ratio_error"]) for row in first),
        "place_of_the_fastest": 1 + order.index(rows[0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="names in the recorded file; default: all")
    parser.add_argument("--model", default="llama-3-8b", help="a shipped shape or a folder: that of the record")
    parser.add_argument("--profile", type=Path, help="a profile; default: that of the H100, if there is one")
    parser.add_argument("--lanes", type=Path, default=RESULTS, help="what benchmarks.lanes recorded")
    parser.add_argument("--best", type=int, default=10, help="plans that errors are summed up over")
    parser.add_argument("--record", type=Path, help="save all of it here, as JSON")
    args = parser.parse_args()
    recorded = json.loads(args.lanes.read_text())
    unknown = [name for name in args.runs if name not in recorded]
    if unknown:
        parser.error(f"{unknown[0]!r} is not in {args.lanes}; there are {', '.join(recorded)}")
    graph = open_graph(args.model, Plan(1, (), ()), "benchmarks/prediction.py")[2]
    device = known_device(Plan(1, (), (), gpu=H100.name), graph)
    rates: Rates = device.rates
    source = str(device.profile_file or f"ceilings of {device.name}")
    if args.profile is not None:
        rates, source = profile_rates(Profile.load(args.profile), ITEMSIZE, H100.energy), str(args.profile)
    print(source)
    made: dict[str, Any] = {"rates": source, "runs": {}}
    for name in args.runs or recorded:
        rows = compared(recorded[name], graph, rates)
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
            f"  largest error of the {min(args.best, len(rows))} fastest: {summary['largest_error']:.1%}, of the ratio "
            f"{summary['largest_ratio_error']:.1%}; the fastest is number {summary['place_of_the_fastest']} of "
            f"{summary['plans']} for the simulator"
        )
    if args.record is not None:
        args.record.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
