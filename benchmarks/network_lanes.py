"""Plans whose collectives run beside products, against the fastest sequential plan, on GPUs that share a model.

    python -m benchmarks.network_lanes                       # two GPUs of 141 GB, Llama-3-70B's shape, both mixes
    python -m benchmarks.network_lanes prefill --keep 2
    python -m benchmarks.network_lanes --model tiny-llama --layers 2 --device cpu --decode 8 --context 16 --prompts 24

All candidates run on one executor with random weights and KV cache, first a short block of each in turn. Then the
fastest of those in sequence, with what form of the all-reduce ever, the same cut into nano-batches without overlap, and
the `--keep` fastest with lanes run in longer blocks. Ratios are to the fastest in sequence.

Candidates are two nano-batches of half of all rows each (`even`), or, with a memory lane, cut as on one GPU; names say
the form of the all-reduces and the SMs of the lanes (compute/memory/network; `shared`: plain streams). `skew` is how
many products a nano-batch is behind the other.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.kernels.__main__ import machine
from benchmarks.lanes import blocks, table, told
from nanoflow.devices import device_sms
from nanoflow.ops.graph import Graph
from nanoflow.ops.sharding import shard_graph
from nanoflow.pipeline.plan import FrozenMapping, Plan
from nanoflow.plans.ablation import ablation_plans
from nanoflow.plans.case import H200, PlanCase, known_device, open_graph
from nanoflow.plans.running import executor_here, mix_batch, open_here
from nanoflow.power import EnergyMeter
from nanoflow.search.files import replace_file
from nanoflow.search.list_schedule import COMPANIONS, collectives_of
from nanoflow.search.measure import compare, largest_error, output_error
from nanoflow.search.mix import Mix
from nanoflow.search.space import PlanChoice, build_plan

RESULTS = Path(__file__).parent / "results" / "network_lanes.json"
MIXES = {"mixed": Mix(500, 768, (512, 512, 524)), "prefill": Mix(0, 1, (512,) * 8)}
"""Llama-3-70B on two H200s: a batch in the middle of a job of 512/512, and one of prompts alone."""
SEQUENTIAL = ("nccl", "nccl_16", "two_shot", "one_shot", "copy_engine")
FORMS = ("copy_engine", "two_shot", "one_shot", "nccl_4", "nccl_8", "nccl")
NETWORK_SMS = (8, 16)
MEMORY_SMS = 32
ON_CPU = ("nccl", "reference")


def candidates(graph: Graph, mix: Mix, rows: int, sms: int, forms: Sequence[str]) -> dict[str, Plan]:
    """Plans with lanes by name; `sms` are those of the device, 0 if they cannot be set apart."""
    rates = replace(H200.rates, device_sms=sms or H200.sms)
    collectives = [name for names in collectives_of(graph).values() for name in names]
    found = {}
    for form in forms:
        even = PlanChoice((8, 8), (8, 8), skew=1, network=True, kernels=FrozenMapping(dict.fromkeys(collectives, form)))
        choices = {f"{form} shared": even, f"{form} shared skew 2": replace(even, skew=2)}
        for network in NETWORK_SMS if sms else ():
            choices[f"{form} {sms - network}/{network}"] = replace(even, network_sms=network)
            if mix.decode:
                memory = replace(even, beside=(True, True), skew=4, memory_sms=MEMORY_SMS, network_sms=network)
                name = f"{form} {sms - MEMORY_SMS - network}/{MEMORY_SMS}/{network}"
                choices[name] = memory
                choices[f"{name} all attention"] = replace(memory, with_attention=frozenset(COMPANIONS))
        found |= {name: build_plan(choice, graph, mix, rows, rates) for name, choice in choices.items()}
    return found


def measure(mix: Mix, args: argparse.Namespace) -> dict[str, Any]:
    rows = args.rows or mix.rows
    name, path, whole = open_graph(args.model, Plan(rows, (), ()), "benchmarks/network_lanes.py")
    if args.layers:
        whole = replace(whole, layers=args.layers)
    graph = shard_graph(whole, 0, args.tensor)
    first = Plan.sequential(graph, rows)
    case = PlanCase("benchmarks/network_lanes.py", first, name, path, graph, mix, known_device(first))
    model, page_size, padded = open_here(case, args.device)
    on_gpu = model.device.type == "cuda"
    collectives = [name for names in collectives_of(graph).values() for name in names]
    in_sequence = {
        f"sequential {form}": replace(first, kernels=FrozenMapping(dict.fromkeys(collectives, form)))
        for form in (SEQUENTIAL if on_gpu else ON_CPU)
    }
    lanes = candidates(graph, mix, rows, device_sms(model.device) if on_gpu else 0, args.forms if on_gpu else ON_CPU)
    lanes = {label: plan for label, plan in lanes.items() if not args.only or any(word in label for word in args.only)}
    cut = ablation_plans(next(iter(lanes.values())), graph, rows)["nano-batches"]
    plans = {**in_sequence, "cut": cut, **lanes}
    print(f"{mix}, {rows} rows, {len(plans)} plans", flush=True)
    with executor_here(case, model, page_size, padded, list(plans.values())) as executor:
        batches = {
            label: mix_batch(mix, executor.cut, page_size, graph.vocab_size, number)
            for number, label in enumerate(plans)
        }
        base = next(iter(plans))
        errors = {label: output_error(executor, batches[base], batch) for label, batch in batches.items()}
        wrong = [label for label, error in errors.items() if not error < largest_error(executor)]
        print(f"captured; {len(wrong)} wrong: {wrong}", flush=True)
        right = {label: batch for label, batch in batches.items() if label not in wrong}
        joules = EnergyMeter(model.device, graph.ranks).joules
        scan = compare(executor, right, seconds=args.seconds, pairs=args.pairs, joules=joules)
        fastest = min((label for label in in_sequence if label in right), key=scan.seconds)
        table(scan, mix, fastest)
        keep = sorted((label for label in lanes if label in right), key=scan.seconds)[: args.keep]
        finalists = {label: batches[label] for label in (fastest, *(["cut"] if "cut" in right else []), *keep)}
        final = compare(
            executor, finalists, seconds=args.final_seconds, pairs=args.final_pairs, joules=joules, progress=told
        )
        table(final, mix, fastest)
        again = {label: output_error(executor, batches[base], batch) for label, batch in finalists.items()}
    return {
        "model": name, "tensor": args.tensor, "layers": graph.layers, "mix": asdict(mix), "rows": rows,
        "errors": errors, "errors_after": again, "fastest_in_sequence": fastest,
        "scan": blocks(scan, fastest), "final": blocks(final, fastest),
        "plans": {label: plans[label].dumps() for label in finalists},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mixes", nargs="*", metavar="MIX", help=f"of {', '.join(MIXES)}; default: all")
    parser.add_argument("--model", default="llama-3-70b", help="a shipped shape or a folder")
    parser.add_argument("--tensor", type=int, default=2, help="ranks")
    parser.add_argument("--layers", type=int, help="only so many")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--decode", type=int, help="another mix: decode rows")
    parser.add_argument("--context", type=int, default=768)
    parser.add_argument("--prompts", type=int, nargs="*", default=[])
    parser.add_argument("--rows", type=int, help="rows of the batch, padding included")
    parser.add_argument("--forms", nargs="*", default=list(FORMS), help="of the all-reduce, in lanes")
    parser.add_argument("--only", nargs="*", help="candidates with lanes whose name has one of these words")
    parser.add_argument("--seconds", type=float, default=0.6, help="of a block of the first round")
    parser.add_argument("--pairs", type=int, default=2, help="blocks of each candidate in the first round")
    parser.add_argument("--keep", type=int, default=2, help="candidates that go on")
    parser.add_argument("--final-seconds", type=float, default=3.0)
    parser.add_argument("--final-pairs", type=int, default=6)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    unknown = [name for name in args.mixes if name not in MIXES]
    if unknown:
        parser.error(f"{unknown[0]!r} is no mix; there are {', '.join(MIXES)}")
    if args.decode is not None:
        chosen = {"other": Mix(args.decode, args.context, tuple(args.prompts))}
    else:
        chosen = {name: mix for name, mix in MIXES.items() if not args.mixes or name in args.mixes}
    for name, mix in chosen.items():
        found = {**machine("cuda" if args.device == "auto" else args.device), **measure(mix, args)}
        known = json.loads(args.out.read_text()) if args.out.exists() else {}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(args.out, json.dumps({**known, name: found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
