"""Plans whose collectives run beside products, against the fastest sequential plan, on GPUs that share a model.

    python -m benchmarks.network_lanes                       # two GPUs of 141 GB, Llama-3-70B's shape, all mixes
    python -m benchmarks.network_lanes prefill --keep 2
    python -m benchmarks.network_lanes --model tiny-llama --layers 2 --device cpu --decode 8 --context 16 --prompts 24

All candidates run on one executor with random weights and KV cache, first a short block of each in turn. Then the
fastest of those in sequence, the one with NCCL's all-reduces, the same cut into nano-batches without overlap, and the
`--keep` fastest with lanes run in longer blocks. Ratios are to the fastest in sequence. Results are saved after either.

Candidates are two nano-batches of half of all rows each; `cut` runs them one after the other, with the same kernels.
Families:

- turns: products of a and b in turn, so that the collectives of one run beside products of the other.
- apart: b is half a layer behind a; decode attention has a lane too, beside products of the other. With decode rows.

`ar`, `rs` and `fused` are the sharding: all-reduces; reduce-scatter and all-gather with norms on each rank's rows,
which then run in the network lane; the same in one operation. Then come the collectives' form and the SMs of the lanes
(compute/memory/network; `shared`: plain streams). `light` has what reads the sums in the network lane. Products run
with cuBLAS.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from benchmarks.kernels.__main__ import machine
from benchmarks.lanes import blocks, save as save_plan, table, told
from nanoflow.config_schema import EngineSection
from nanoflow.loading import run_fingerprint
from nanoflow.ops.collectives import Collective
from nanoflow.ops.graph import Graph
from nanoflow.ops.row_sharding import ALL_REDUCE, FUSED, REDUCE_SCATTER, with_sharding
from nanoflow.ops.sharding import shard_graph
from nanoflow.pipeline.plan import FrozenMapping, Plan
from nanoflow.plans.ablation import ablation_plans
from nanoflow.plans.case import PlanCase, known_device, open_graph
from nanoflow.plans.running import executor_here, mix_batch, open_here
from nanoflow.power import EnergyMeter
from nanoflow.search.files import replace_file
from nanoflow.search.measure import compare, largest_error, output_error
from nanoflow.search.mix import Mix

RESULTS = Path(__file__).parent / "results" / "network_lanes.json"
MIXES = {
    "mixed": Mix(500, 768, (512, 512, 524)),
    "prefill": Mix(0, 1, (512,) * 8),
    "512-512": Mix(505, 768, (512, 7)),
}
"""Llama-3-70B on two H200s: a batch with many prompt rows, one of prompts alone, and one in the middle of a job of
512/512, whose KV cache is full."""
SplitSms = tuple[int, ...] | None
SMS = 132
"""Of the devices that partitions are for."""
SEQUENTIAL = {
    ALL_REDUCE: ("nccl", "two_shot", "one_shot", "copy_engine"),
    REDUCE_SCATTER: ("nccl", "push", "push_64", "copy_engine"),
    FUSED: ("push", "push_32", "push_64", "push_128", "copy_engine"),
}
SHORT = {ALL_REDUCE: "ar", REDUCE_SCATTER: "rs", FUSED: "fused"}
ON_CPU = ("nccl", "reference")
TURNS: dict[str, dict[str, list[tuple[str, SplitSms]]]] = {
    ALL_REDUCE: {
        "copy_engine": [("", None), ("light", None), ("", (124, 8)), ("light", (124, 8)), ("light", (116, 16))],
        "two_shot": [("", None), ("", (124, 8)), ("light", (116, 16))],
        "nccl_8": [("", None), ("", (124, 8))],
        "nccl": [("", None)],
    },
    REDUCE_SCATTER: {
        "copy_engine": [("light", None), ("light", (124, 8)), ("light", (116, 16))],
        "push": [("light", None), ("light", (124, 8)), ("light", (116, 16))],
        "nccl_8": [("light", None)],
    },
    FUSED: {
        "copy_engine": [("light", None), ("light", (124, 8)), ("light", (116, 16))],
        "push": [("light", None), ("light", (124, 8))],
    },
}
APART: dict[str, dict[str, list[tuple[str, SplitSms]]]] = {
    ALL_REDUCE: {"copy_engine": [("light", None), ("light", (92, 32, 8)), ("light", (100, 24, 8))]},
    REDUCE_SCATTER: {"copy_engine": [("light", None), ("light", (92, 32, 8)), ("light", (92, 24, 16))]},
    FUSED: {"copy_engine": [("light", None), ("light", (92, 32, 8))]},
}
FAMILIES = {
    "turns": (
        "o.a decode_attention.b o.b gate_up.a gate_up.b down.a down.b qkv.a@1 decode_attention.a@1 qkv.b@1",
        "",
        "o.a o.b down.a down.b",
    ),
    "apart": (
        "o.b down.a gate_up.b qkv.a@1 down.b o.a@1 qkv.b@1 gate_up.a@1",
        "decode_attention.a@1 decode_attention.b@1",
        "o.b down.a down.b o.a@1",
    ),
}
"""Products of the compute lane, what is in the memory lane, and the products whose collectives follow one another."""
SUMS = {
    ALL_REDUCE: {
        "o": ("o_all_reduce", "add_norm"),
        "down": ("down_all_reduce", "add", "input_layernorm@1"),
    },
    REDUCE_SCATTER: {
        "o": ("o_reduce_scatter", "add_norm", "add_norm_all_gather"),
        "down": ("down_reduce_scatter", "add", "input_layernorm@1", "input_layernorm_all_gather@1"),
    },
    FUSED: {"o": ("o_add_norm",), "down": ("down_add", "input_layernorm_gather@1")},
}
"""What stands between a product that leaves partial sums and the next product."""
PRODUCTS = ("qkv", "o", "gate_up", "down")


def entry(name: str, nano_batch: str, ahead: int = 0) -> str:
    """`name`, which may say how many layers ahead it is, of a nano-batch as many more layers ahead."""
    op, _, own = name.partition("@")
    layers = int(own or 0) + ahead
    return f"{op}.{nano_batch}{f'@{layers}' if layers else ''}"


def lanes_of(family: str, sharding: str, light: bool) -> dict[str, list[str]]:
    """Entries of each lane; `light`: what reads the sums is in the network lane, else before the product that needs
    it."""
    compute, memory, order = FAMILIES[family]
    network, waiting = [], {}
    for product in order.split():
        name, _, rest = product.partition(".")
        nano_batch, _, ahead = rest.partition("@")
        layer = int(ahead or 0)
        chain = [entry(each, nano_batch, layer) for each in SUMS[sharding][name]]
        count = len(chain) if light else 1
        network += chain[:count]
        reader = entry("gate_up", nano_batch, layer) if name == "o" else entry("qkv", nano_batch, layer + 1)
        waiting[reader] = chain[count:]
    products = [each for product in compute.split() for each in (*waiting.get(product, ()), product)]
    lanes = {"compute": products, "memory": memory.split(), "network": network}
    return {name: entries for name, entries in lanes.items() if entries}


def lanes_plan(family: str, sharding: str, form: str, light: bool, rows: int, sms: SplitSms) -> Plan:
    """One of the families' plans, for batches of `rows` rows; `sms` of the lanes, None: on plain streams."""
    half = {"decode": 0.5, "prefill": 0.5}
    lanes = lanes_of(family, sharding, light)
    own = ("add", "add_norm", "input_layernorm")
    forms = {name: form for each in chains(sharding) if (name := each.partition("@")[0]) not in own}
    made: dict[str, Any] = {
        "capacity": rows,
        "nano_batches": {"a": {**half, "rows": rows - rows // 2}, "b": {**half, "rows": rows // 2}},
        "period": [{"whole" if sms is None else "split": lanes}],
        "kernels": {**dict.fromkeys(PRODUCTS, "cublas"), **forms},
    }
    if sms is not None:
        made |= {"sms": SMS, "partitions": {"split": list(sms)}}
    if sharding != ALL_REDUCE:
        made["sharding"] = sharding
    return Plan.loads(yaml.safe_dump(made, sort_keys=False))


def chains(sharding: str) -> list[str]:
    return [each for chain in SUMS[sharding].values() for each in chain]


def candidates(rows: int, decode: bool, on_gpu: bool) -> dict[str, Plan]:
    """Plans with lanes by name."""
    found = {}
    for family, tried in (("turns", TURNS), ("apart", APART)):
        for sharding, by_form in tried.items() if decode or family == "turns" else ():
            if not on_gpu:
                by_form = {form: [("light", None), ("", None)][: 1 + (sharding == ALL_REDUCE)] for form in ON_CPU}
            for form, ways in by_form.items():
                for light, sms in ways:
                    where = "shared" if sms is None else "/".join(map(str, sms))
                    label = " ".join(filter(None, (family, SHORT[sharding], form, where, light)))
                    plan = lanes_plan(family, sharding, form, bool(light), rows, sms)
                    found[label] = plan if on_gpu else replace(plan, kernels=only_forms(plan))
    return found


def only_forms(plan: Plan) -> FrozenMapping[str]:
    """Of the plan's kernels those of collectives: a CPU has no cuBLAS."""
    return FrozenMapping({op: kernel for op, kernel in plan.kernels.items() if op not in PRODUCTS})


def in_sequence(graph: Graph, rows: int, on_gpu: bool) -> dict[str, Plan]:
    """Sequential plans by name: each sharding with each form."""
    found = {}
    for sharding, forms in SEQUENTIAL.items():
        own = with_sharding(graph, sharding)
        plan = replace(Plan.sequential(own, rows), sharding=sharding)
        collectives = [op.name for op in own.layer if isinstance(op, Collective)]
        for form in forms if on_gpu else ON_CPU:
            kernels = FrozenMapping(dict.fromkeys(collectives, form))
            found[f"sequential {SHORT[sharding]} {form}"] = replace(plan, kernels=kernels)
    return found


def cut_of(plan: Plan, graph: Graph, rows: int) -> Plan:
    """The nano-batches of `plan` one after the other on the whole device, with its kernels."""
    return replace(ablation_plans(plan, graph, rows)["nano-batches"], kernels=plan.kernels)


def measure(mix: Mix, args: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> None:
    """All candidates, then the fastest; `save` gets what was measured after either."""
    rows = args.rows or mix.rows
    name, path, whole = open_graph(args.model, Plan(rows, (), ()), "benchmarks/network_lanes.py")
    if args.layers:
        whole = replace(whole, layers=args.layers)
    graph = shard_graph(whole, 0, args.tensor)
    first = Plan.sequential(graph, rows)
    case = PlanCase("benchmarks/network_lanes.py", first, name, path, graph, mix, known_device(first))
    model, page_size, padded = open_here(case, args.device)
    on_gpu = model.device.type == "cuda"
    sequential = in_sequence(graph, rows, on_gpu)
    lanes = candidates(rows, mix.decode > 0, on_gpu)
    lanes = {label: plan for label, plan in lanes.items() if not args.only or any(word in label for word in args.only)}
    cuts = {
        f"cut {SHORT[sharding]}": cut_of(plan, graph, rows)
        for plan in reversed(list(lanes.values()))
        for sharding in (plan.sharding,)
    }
    plans = {**sequential, **cuts, **lanes}
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
        fastest = min((label for label in sequential if label in right), key=scan.seconds)
        table(scan, mix, fastest)
        keep = sorted((label for label in lanes if label in right), key=scan.seconds)[: args.keep]
        labels = (fastest, base, *(label for label in cuts if label in right), *keep)
        finalists = {label: batches[label] for label in dict.fromkeys(labels)}
        found = {
            "model": name, "tensor": args.tensor, "layers": graph.layers, "mix": asdict(mix), "rows": rows,
            "errors": errors, "fastest_in_sequence": fastest, "scan": blocks(scan, fastest), "final": None,
            "plans": {label: plans[label].dumps() for label in finalists},
        }  # fmt: skip
        save(found)
        final = compare(
            executor, finalists, seconds=args.final_seconds, pairs=args.final_pairs, joules=joules, progress=told
        )
        table(final, mix, fastest)
        again = {label: output_error(executor, batches[base], batch) for label, batch in finalists.items()}
        save({**found, "errors_after": again, "final": blocks(final, fastest)})
        best = min(keep, key=final.seconds) if keep else None
        if args.save is not None and best and min(final.ratios(fastest, best)) > 1:
            here = run_fingerprint(model, EngineSection())
            save_plan(plans[best], final, best, mix, here, args.save, fastest)


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
    parser.add_argument("--only", nargs="*", help="candidates with lanes whose name has one of these words")
    parser.add_argument("--seconds", type=float, default=0.6, help="of a block of the first round")
    parser.add_argument("--pairs", type=int, default=2, help="blocks of each candidate in the first round")
    parser.add_argument("--keep", type=int, default=2, help="candidates that go on")
    parser.add_argument("--final-seconds", type=float, default=3.0)
    parser.add_argument("--final-pairs", type=int, default=6)
    parser.add_argument("--save", type=Path, help="folder for the fastest plan's file, if it wins all pairs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    unknown = [name for name in args.mixes if name not in MIXES]
    if unknown:
        parser.error(f"{unknown[0]!r} is no mix; there are {', '.join(MIXES)}")
    if args.decode is not None:
        chosen = {"other": Mix(args.decode, args.context, tuple(args.prompts))}
    else:
        chosen = {name: mix for name, mix in MIXES.items() if not args.mixes or name in args.mixes}
    here = machine("cuda" if args.device == "auto" else args.device)
    for name, mix in chosen.items():

        def save(found: dict[str, Any], name: str = name) -> None:
            known = json.loads(args.out.read_text()) if args.out.exists() else {}
            args.out.parent.mkdir(parents=True, exist_ok=True)
            replace_file(args.out, json.dumps({**known, name: {**here, **found}}, indent=1) + "\n")

        measure(mix, args, save)


if __name__ == "__main__":
    main()
