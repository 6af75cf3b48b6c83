"""Plans with lanes against the sequential one, at the mixes of the reference runs in steady state.

    python -m benchmarks.lanes 512-512                        # on a GPU: all candidates, then the best ones longer
    python -m benchmarks.lanes 512-512 --only skew --keep 2   # fewer of them
    python -m benchmarks.lanes 512-512 --save configs/plans   # and keep the best as a plan file, if it wins

All candidates, the sequential plan among them, run on one executor: Llama-3-8B's shape in bfloat16, random weights,
a random KV cache. First a block of each in turn, short; then the `--keep` fastest against the sequential plan in blocks
of five seconds, eight pairs. Results go to benchmarks/results/lanes.json under the run's name.

The families of candidates (a and b are nano-batches, of half of all rows each but for `phase`):

- skew: one stage. b is half a layer behind a, and the decode attention of one runs beside the products of the other.
- prefill, rope: skew, with prefill attention in the memory lane too, or all from RoPE on.
- half: QKV and a's decode attention on the whole device; b's decode attention beside a's products; b's products on the
  whole device.
- less: half, with down over all rows too, on the whole device.
- inner: gate_up and down over all rows, on the whole device; the decode attention of one beside QKV and o of the other.
- phase: a has the prompts' rows, b the decode rows. b's decode attention beside a's products, then b's products.
- tilt: rope, with fewer decode rows and more of the prompts in the larger nano-batch: its attention runs beside the
  products of the smaller one.
- streams: skew without partitions, on two plain streams.
- cut: nothing overlaps; the nano-batches one after the other on the whole device. In the last comparison beside the
  best, it says what cutting costs and what overlapping wins.
"""

import argparse
import json
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.kernels.__main__ import machine
from benchmarks.lane_tables import CUT
from nanoflow.config_schema import EngineSection
from nanoflow.devices import device_sms
from nanoflow.loading import run_fingerprint
from nanoflow.ops.graph import Graph
from nanoflow.pipeline.plan import FrozenMapping, Plan
from nanoflow.pipeline.plan_mix import PlanMix
from nanoflow.plans.ablation import SEQUENTIAL
from nanoflow.plans.case import H100, PlanCase, known_device, open_graph
from nanoflow.plans.running import measuring_executor, mix_batch, open_here
from nanoflow.power import EnergyMeter
from nanoflow.search.fingerprint import Fingerprint
from nanoflow.search.measure import Block, Comparison, compare, largest_error, output_error
from nanoflow.search.mix import Mix
from nanoflow.search.space import PlanChoice, build_plan
from nanoflow.search.store import store_plan

RESULTS = Path(__file__).parent / "results" / "lanes.json"
RUNS = {
    "512-512": Mix(551, 768, (512, 89)),
    "512-512 smaller": Mix(551, 768, (473,)),
    "1024-512": Mix(341, 1280, (683,)),
    "512-1024": Mix(421, 1024, (219,)),
}
"""Batches of the reference runs in steady state (`benchmarks/results/offline_throughput.json`), which end on a bucket:
decode rows as they were on average, prompts to fill it. 512-512 takes 1,152 and 1,024 rows in turn."""
SPLITS = (24, 28, 32, 36, 40)
"""SMs of the memory lane."""


def candidates(graph: Graph, mix: Mix, rows: int, sms: int, kernels: tuple[str, ...]) -> dict[str, Plan]:
    """Plans by name; `kernels` are those of the products in confined lanes: "measured" or one kernel for all."""
    # Halves in whole tiles of 128 rows, and even in multiples of 64 where that is another cut.
    cuts = [PlanChoice((8, 8), (8, 8), unit, beside=(True, True), skew=4) for unit in (128, 64)]
    prefill = replace(cuts[0], with_attention=frozenset({"prefill_attention"}))
    rope = replace(cuts[0], with_attention=frozenset({"rope_append", "prefill_attention"}))
    half = replace(cuts[0], whole=frozenset({"qkv"}), beside=(False, True), stages="several")
    # Prompts first: what comes after them may hold more of the same prompt, and would wait for their keys.
    phase = PlanChoice((0, 16), (16, 0), 128, beside=(False, True), skew=4, stages="several")
    families: list[tuple[str, PlanChoice, tuple[int, ...]]] = [
        *(("skew", cut, SPLITS) for cut in cuts),
        ("prefill", prefill, SPLITS),
        ("rope", rope, SPLITS),
        ("half", half, SPLITS),
        ("less", replace(half, whole=frozenset({"qkv", "down"})), SPLITS),
        ("inner", replace(cuts[0], whole=frozenset({"gate_up", "down"}), stages="several"), SPLITS),
        ("streams", cuts[0], ()),
        (CUT, replace(cuts[0], beside=(False, False)), ()),
    ]
    if rows % 256 and mix.prompts:
        families.append(("tilt", replace(rope, decode=(7, 9), prefill=(11, 5)), SPLITS))
    if 0 < -(-mix.decode // 64) * 64 < rows:
        families.append(("phase", phase, SPLITS))
    rates = replace(H100.rates, device_sms=sms)
    products = ("qkv", "o", "gate_up", "down")
    found: dict[str, Plan] = {}
    for family, cut, splits in families:
        for memory, kernel in product(splits or (None,), kernels if splits else kernels[:1]):
            named = {} if kernel == "measured" or memory is None else dict.fromkeys(products, kernel)
            plan = build_plan(replace(cut, memory_sms=memory, kernels=FrozenMapping(named)), graph, mix, rows, rates)
            where = "" if memory is None else f" {sms - memory}/{memory} {kernel}"
            found[f"{family} {'+'.join(str(part.rows) for part in plan.nano_batches)}{where}"] = plan
    return found


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """All candidates of one run, then the best; what was measured."""
    mix = RUNS[name] if args.decode is None else Mix(args.decode, args.context, tuple(args.prompts))
    rows = args.rows or mix.rows
    model_name, path, graph = open_graph(args.model, Plan(rows, (), ()), "benchmarks/lanes.py")
    sequential = Plan.sequential(graph, rows)
    case = PlanCase("benchmarks/lanes.py", sequential, model_name, path, graph, mix, known_device(sequential))
    model, page_size, _ = open_here(case, args.device)
    sms = device_sms(model.device) if model.device.type == "cuda" else case.device.sms
    plans = {SEQUENTIAL: sequential}
    for label, plan in candidates(graph, mix, rows, sms, tuple(args.kernels)).items():
        if not args.only or any(word in label for word in args.only):
            plans[label] = plan
    print(f"{name}: {mix}, {rows} rows, {len(plans)} plans", flush=True)
    executor = measuring_executor(model, list(plans.values()), mix, page_size, row_buckets=[rows])
    try:
        batches = {
            label: mix_batch(mix, executor.cut, page_size, graph.vocab_size, number)
            for number, label in enumerate(plans)
        }
        errors = {label: output_error(executor, batches[SEQUENTIAL], batch) for label, batch in batches.items()}
        wrong = [label for label, error in errors.items() if not error < largest_error(executor)]
        print(f"captured; {len(wrong)} wrong: {wrong}", flush=True)
        right = {label: batch for label, batch in batches.items() if label not in wrong}
        joules = EnergyMeter(model.device).joules
        first = compare(executor, right, seconds=args.seconds, pairs=args.pairs, joules=joules)
        table(first, mix)
        overlapping = [label for label in right if label != SEQUENTIAL and not label.startswith(CUT)]
        best = sorted(overlapping, key=first.seconds)[: args.keep]
        last = None
        if best and args.final_pairs:
            uncut = {f"{CUT} {label.split()[1]}" for label in best} & set(right)
            finalists = {label: batches[label] for label in (SEQUENTIAL, *sorted(uncut), *best)}
            last = compare(
                executor, finalists, seconds=args.final_seconds, pairs=args.final_pairs, joules=joules, progress=told
            )
            table(last, mix)
    finally:
        executor.close()
    decided = last or first
    winner = max(best, key=lambda label: median(decided.ratios(SEQUENTIAL, label))) if best else None
    if winner and args.save is not None and median(decided.ratios(SEQUENTIAL, winner)) >= args.least_ratio:
        here = run_fingerprint(model, EngineSection())
        save(plans[winner], decided, winner, mix, here, args.save)
    return {
        "mix": asdict(mix), "rows": rows, "errors": errors, "winner": winner,
        "scan": blocks(first), "final": None if last is None else blocks(last),
        "plan": plans[winner].dumps() if winner else None,
    }  # fmt: skip


def told(label: str, block: Block) -> None:
    watts = "" if block.watts is None else f" {block.watts:.0f} W"
    print(f"  {label:<40} {block.seconds * 1e3:8.3f} ms{watts}", flush=True)


def table(found: Comparison, mix: Mix, base: str = SEQUENTIAL) -> None:
    """The plans, fastest first, against `base`."""
    for label in sorted(found.blocks, key=found.seconds):
        ratios, joules = found.ratios(base, label), found.joules(label)
        energy = "" if joules is None else f" {found.watts(label):4.0f} W {joules / mix.rows * 1e3:6.2f} mJ/row"
        print(
            f"{label:<40} {found.seconds(label) * 1e3:8.3f} ms  {median(ratios):.4f} "
            f"({min(ratios):.4f} to {max(ratios):.4f}){energy}",
            flush=True,
        )


def blocks(found: Comparison, base: str = SEQUENTIAL) -> dict[str, Any]:
    """All blocks, and the ratio to `base`, of each plan."""
    return {
        label: {"ratio": median(found.ratios(base, label)), "blocks": [asdict(block) for block in each]}
        for label, each in found.blocks.items()
    }


def save(
    plan: Plan, found: Comparison, label: str, mix: Mix, here: Fingerprint, folder: Path, base: str = SEQUENTIAL
) -> None:
    """The plan as a stored one, with what was measured, against `base`."""
    measured = {
        "iteration_ms": round(found.seconds(label) * 1e3, 3),
        "sequential_ms": round(found.seconds(base) * 1e3, 3),
        "ratio": round(median(found.ratios(base, label)), 4),
    }
    kept = replace(
        plan,
        mix=PlanMix(mix.decode, sum(mix.prompts), mix.context),
        least_rows=min(plan.capacity * 7 // 8, mix.rows),
        measured=FrozenMapping(measured),
    )
    print(f"saved {store_plan(kept, here, folder)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"of {', '.join(RUNS)}; default: all")
    parser.add_argument("--model", default="llama-3-8b", help="a shipped shape or a folder")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--decode", type=int, help="another mix: decode rows")
    parser.add_argument("--context", type=int, default=768)
    parser.add_argument("--prompts", type=int, nargs="*", default=[])
    parser.add_argument("--rows", type=int, help="rows of the batch, padding included")
    parser.add_argument("--kernels", nargs="*", default=["measured"], help="of products: measured, triton, deep_gemm")
    parser.add_argument("--only", nargs="*", help="candidates whose name has one of these words")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a block of the first round")
    parser.add_argument("--pairs", type=int, default=2, help="blocks of each candidate in the first round")
    parser.add_argument("--keep", type=int, default=1, help="candidates that go on")
    parser.add_argument("--final-seconds", type=float, default=5.0)
    parser.add_argument("--final-pairs", type=int, default=8, help="0: no last comparison")
    parser.add_argument("--save", type=Path, help="folder for the winner's plan file")
    parser.add_argument("--least-ratio", type=float, default=1.01, help="what a plan must reach to be saved")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    names = args.runs or list(RUNS)
    unknown = [name for name in names if name not in RUNS]
    if unknown:
        parser.error(f"{unknown[0]!r} is no run; there are {', '.join(RUNS)}")
    for name in names:
        found = {**machine("cuda" if args.device == "auto" else args.device), **measure(name, args)}
        known = json.loads(args.out.read_text()) if args.out.exists() else {}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({**known, name: found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
