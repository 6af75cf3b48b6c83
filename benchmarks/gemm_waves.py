"""How well tiles fill a part of the SMs: which numbers of SMs and rows are good for a model's products, by counting.

    python -m benchmarks.gemm_waves                               # Llama-3-8B: 1,280 rows, whole and cut
    python -m benchmarks.gemm_waves --cuts 1152 576+576 640+512 --sms 84 92 100

A persistent GEMM runs its tiles in rounds, one a CTA; in the last round some SMs have nothing to do. For each number of
rows and SMs and each linear: the tile that is likely the fastest (`nanoflow.ops.gemm_config.candidates`), the rounds it
takes, and the share of the SMs' tensor-core cycles that is used. Then what a layer takes with its rows cut, and which
linear is faster left whole. It takes no GPU and is no measurement (that is `python -m benchmarks.gemm_choices --sms`):
cycles are counted, at --ghz. What a launch, the first loads and the last stores take is left out, about 4 us a product:
whole products are better than they look here.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.gemm_choices import HEAD, MODEL, linears
from nanoflow.ops.gemm_waves import waves

CUTS = ("1280", "640+640", "768+512", "704+576")
SMS = (84, 92, 100, 108, 116, 132)


def parse_cut(text: str) -> tuple[int, ...]:
    """``640+512`` -> (640, 512). Raises ValueError."""
    rows = tuple(int(part) for part in text.split("+"))
    if min(rows) < 1:
        raise ValueError(text)
    return rows


def table(
    shapes: Mapping[str, tuple[int, int, bool]], cuts: Sequence[tuple[int, ...]], budgets: Sequence[int], ghz: float
) -> str:
    """Both tables as text. `shapes`: columns, inputs and SiLU by linear."""
    found = {
        (name, rows, sms): waves(columns, inputs, rows, sms, silu=silu)
        for rows in sorted({rows for cut in cuts for rows in (*cut, sum(cut))})
        for sms in budgets
        for name, (columns, inputs, silu) in shapes.items()
    }
    lines = ["tile, rounds, share of the tensor cores' cycles; / fills its last round with pieces of tiles", ""]
    lines.append(f"{'rows':>5} {'SMs':>4}  " + "".join(f"{name:22}" for name in shapes).rstrip())
    for rows in sorted({rows for _, rows, _ in found}):
        for sms in budgets:
            cells = "".join(f"{found[name, rows, sms]!s:22}" for name in shapes)
            lines.append(f"{rows:5} {sms:4}  {cells.rstrip()}")
    lines += ["", f"us a layer at {ghz:g} GHz, and us that a linear left whole saves (or costs, below 0)", ""]
    lines.append(f"{'rows':>14}" + "".join(f"{f'{sms} SMs':>9}" for sms in budgets))

    def line(head: str, numbers: Sequence[float]) -> str:
        return f"{head:>14}" + "".join(f"{number / ghz / 1e3:9.0f}" for number in numbers)

    for cut in cuts:
        parted = {(name, sms): sum(found[name, rows, sms].cycles for rows in cut) for name in shapes for sms in budgets}
        lines.append(line("+".join(map(str, cut)), [sum(parted[name, sms] for name in shapes) for sms in budgets]))
        if len(cut) > 1:
            for name in shapes:
                saved = [parted[name, sms] - found[name, sum(cut), sms].cycles for sms in budgets]
                lines.append(line(f"{name} whole", saved))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gemm_waves", description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=MODEL, help="folder with a config.json")
    parser.add_argument("--cuts", nargs="+", default=list(CUTS), metavar="ROWS+ROWS", help="rows of the nano-batches")
    parser.add_argument("--sms", type=int, nargs="+", default=list(SMS), help="of the lane with the products")
    parser.add_argument("--ghz", type=float, default=1.4, help="clock; 1.4 is what an H100 keeps up at its power limit")
    args = parser.parse_args(arguments)
    try:
        cuts = [parse_cut(cut) for cut in args.cuts]
    except ValueError as error:
        parser.error(f"--cuts {error}: give rows such as 1280 or 640+640")
    if min(args.sms) < 1 or args.ghz <= 0:
        parser.error("--sms and --ghz: give numbers above 0")
    try:
        shapes = {name: (columns, inputs, silu) for name, columns, inputs, silu in linears(args.model) if name != HEAD}
    except (OSError, json.JSONDecodeError):
        parser.error(f"--model {args.model}: no config.json there; give a folder such as {MODEL}")
    print(table(shapes, cuts, args.sms, args.ghz))
    return 0


if __name__ == "__main__":
    sys.exit(main())
