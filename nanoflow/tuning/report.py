"""What is shown of a tuning run when it is over."""

from rich import box
from rich.console import Console
from rich.table import Table

from nanoflow.tuning.job import plan_mix
from nanoflow.tuning.tune import MixResult, TuneOutcome

__all__ = ["print_outcome"]


def print_outcome(found: TuneOutcome, console: Console) -> None:
    """A table, a mix a line, with the files that were stored, and what it is worth for the whole job. Milliseconds and
    joules are those in sequence, then those of the plan."""
    table = Table(
        title=f"tuned: {found.here.model} on {found.here.gpu}",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title_justify="left",
    )
    table.add_column("mix", no_wrap=True)
    for title in ("share", "plans", "ms", "mJ/row", "ratio", "least", "most"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("stored", no_wrap=True)
    for number, each in enumerate(found.results, start=1):
        table.add_row(str(number), f"{each.mix.weight:.0%}", *_cells(each))
    console.print(table)
    for number, each in enumerate(found.results, start=1):
        mix = plan_mix(each.mix.mix)
        text = f"{number}  {mix.decode:,} decode rows of context {mix.context:,} + {mix.prefill:,} prompt rows"
        stored = "" if each.stored is None else f": {each.stored}"
        console.print(text + stored, highlight=False, markup=False, soft_wrap=True)
    for reason in found.failures:
        console.print(f"given up: {reason}", highlight=False, markup=False, soft_wrap=True)
    untouched = sum(each.mix.weight for each in found.results if not each.measured)
    if untouched:
        text = f"no plan was measured for mixes that are {untouched:.0%} of the job: more --minutes reach them"
        console.print(text, highlight=False, soft_wrap=True)
    near = sum(each.mix.near for each in found.results if each.won)
    if near:
        text = f"the whole job: {found.gain:.3f} times as fast as in sequence; plans serve {near:.0%} of its time"
    else:
        text = "the whole job runs in sequence: no plan won by 1%, and in every pair"
    console.print(text, highlight=False)


def _cells(each: MixResult) -> tuple[str, ...]:
    final, rows = each.final, each.mix.mix.rows
    if final is None:
        stored = "-" if each.stored is None else "sequential"
        return str(each.measured), "-", "-", "-", "-", "-", stored
    joules = (final.sequential_joules, final.joules)
    energy = " > ".join("-" if each_joules is None else f"{each_joules / rows * 1e3:.2f}" for each_joules in joules)
    return (
        str(each.measured),
        f"{final.sequential_seconds * 1e3:.2f} > {final.seconds * 1e3:.2f}",
        "-" if final.joules is None else energy,
        f"{final.ratio:.3f}",
        f"{min(final.ratios):.3f}",
        f"{max(final.ratios):.3f}",
        "plan" if each.won else "sequential",
    )
