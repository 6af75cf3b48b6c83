"""Tables of what `nanoflow tune` found, of a grid beside it, and of what the simulator predicts, for the pages."""

from collections.abc import Iterator
from typing import Any

__all__ = ["grid", "predictions", "tuned"]

Record = dict[str, Any] | None
NONE = "Nothing is recorded yet: run `nanoflow tune JOB.yaml --record FILE` on a GPU."


def tuned(record: Record) -> Iterator[str]:
    """Each mix that was tuned: the plan that is stored against the sequential one."""
    if record is None:
        yield NONE
        return
    yield (
        "| job | dense batch | share of its time | plans measured | in sequence, ms | tuned, ms | "
        "ratio (least to most of 8 pairs) | mJ a row |"
    )
    yield "|---" * 8 + "|"
    for job, each in record["jobs"].items():
        for mix in each["mixes"]:
            final, rows = mix["final"], mix["mix"]["decode"] + sum(mix["mix"]["prompts"])
            before, after = (1e3 * final[key] / rows for key in ("sequential_joules", "joules"))
            yield (
                f"| {job} | {_described(mix['mix'])} | {mix['weight']:.0%} | {len(mix['steps'])} | "
                f"{1e3 * final['sequential_seconds']:.2f} | {1e3 * final['seconds']:.2f} | **{final['ratio']:.3f}** "
                f"({min(final['ratios']):.3f} to {max(final['ratios']):.3f}) | {before:.1f} to {after:.1f} |"
            )
    for name, each in record["tables"].items():
        if each["stored"] == "sequential":
            yield (
                f"| {name} | {_described(each['mix'])} | {each['weight']:.0%} | {each['plans']} | - | - | "
                f"{each['best_ratio']:.3f}, the best: it runs in sequence | - |"
            )


def grid(record: Record) -> Iterator[str]:
    """The plans of the grid by cut and programs, over the SMs of the memory lane."""
    if record is None:
        yield "Nothing is recorded yet: run `python -m benchmarks.plan_grid JOB.yaml` on a GPU."
        return
    names = [name.split(", ") for name in record["grid"]]
    sizes = list(dict.fromkeys(sms for _, sms, _ in names))
    yield f"| cut, programs of attention an SM | {' | '.join(sizes)} |"
    yield "|---" * (1 + len(sizes)) + "|"
    for cut, kernel in dict.fromkeys((cut, kernel) for cut, _, kernel in names):
        found = [record["grid"][f"{cut}, {sms}, {kernel}"]["ratio"] for sms in sizes]
        cells = " | ".join("failed" if ratio is None else f"{ratio:.3f}" for ratio in found)
        yield f"| {cut}, {PROGRAMS.get(kernel, kernel.removeprefix('triton_'))} | {cells} |"


PROGRAMS = {"usual": "5"}


def predictions(record: Record) -> Iterator[str]:
    """How near the simulator comes, a search or scan a line."""
    if record is None:
        yield "Nothing is recorded yet: run `python -m benchmarks.prediction --record FILE`."
        return
    yield (
        "| measured | plans | error of the ten fastest: mean | at most | of their ratio, at most | "
        "place of the fastest for the simulator |"
    )
    yield "|---" * 6 + "|"
    for name, run in record["runs"].items():
        yield (
            f"| {name} | {run['plans']} | {run['mean_error']:.1%} | {run['largest_error']:.1%} | "
            f"{run['largest_ratio_error']:.1%} | {run['place_of_the_fastest']} |"
        )


def _described(mix: dict[str, Any]) -> str:
    return f"{mix['decode']} decode rows of {mix['context']:,} tokens, {sum(mix['prompts'])} prompt rows"
