"""``nanoflow plan list``: the stored plans, which of them serve here, and why the others do not."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from nanoflow.config_schema import RunConfig
from nanoflow.devices import choose_device
from nanoflow.loading import machine_fingerprint, open_model, run_fingerprint, shard_model
from nanoflow.plan_choice import measured_again
from nanoflow.search.fingerprint import Fingerprint
from nanoflow.search.store import Verdict, judge, plan_folders, stored_plans

__all__ = ["judge_stored", "print_stored"]


def judge_stored(config: RunConfig | None) -> tuple[Fingerprint, list[Verdict]]:
    """What stored plans are compared with, and every one of them: for the run of `config`, or for this machine alone.

    Raises UserError if the run's model cannot be opened; no weights are read.
    """
    if config is None:
        here = machine_fingerprint(choose_device("auto"))
        return here, judge(stored_plans(), here)
    model = shard_model(open_model(config.model, config.engine), 0, config.parallel.tensor)
    here = run_fingerprint(model, config.engine)
    verdicts = judge(stored_plans(), here, model.graph, config.engine.max_batch_tokens)
    return here, [measured_again(verdict, here) for verdict in verdicts]


def print_stored(here: Fingerprint, verdicts: Sequence[Verdict], console: Console) -> None:
    """A table, a plan a line, and below it the files with what is against them."""
    if not verdicts:
        console.print(f"no plan is stored in {plan_folders()[0]}, and none comes with the package", soft_wrap=True)
        return
    where = here.gpu if here.model is None else f"{here.model} on {here.gpu}"
    table = Table(title=f"stored plans, for {where}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    for title, justify in (("", "right"), ("model", "left"), ("GPU", "left"), ("mix", "left"), ("rows", "right")):
        table.add_column(title, justify=justify, overflow="fold")  # type: ignore[arg-type]
    table.add_column("ratio", justify="right")
    table.add_column("from")
    table.add_column("here")
    for number, verdict in enumerate(verdicts, start=1):
        table.add_row(str(number), *_cells(verdict))
    console.print(table)
    for number, verdict in enumerate(verdicts, start=1):
        console.print(f"{number}  {verdict.stored.file}", highlight=False, markup=False, soft_wrap=True)
        for line in (*verdict.against, *(f"measured with {doubt}" for doubt in verdict.doubts)):
            text = line.splitlines()[0].removeprefix(f"{verdict.stored.file}: ")
            console.print(f"   {text}", highlight=False, markup=False, soft_wrap=True)


def _cells(verdict: Verdict) -> tuple[str, ...]:
    stored = verdict.stored
    plan, source = stored.plan, "package" if stored.shipped else "you"
    state = "no" if verdict.against else "in doubt" if verdict.doubts else "yes"
    if plan is None:
        return "-", "-", "-", "-", "-", source, "damaged"
    mix = plan.mix
    return (
        plan.model or "-",
        plan.gpu or "-",
        "any" if mix is None else f"{mix.decode:,} + {mix.prefill:,}, context {mix.context:,}",
        f"{plan.least_rows:,}-{plan.capacity:,}" if plan.least_rows else f"{plan.capacity:,}",
        "-" if stored.ratio is None else f"{stored.ratio:.3f}",
        source,
        "damaged" if verdict.damaged else state,
    )
