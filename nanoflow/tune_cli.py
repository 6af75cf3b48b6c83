"""``nanoflow tune``: plans for a job, searched for and measured here, or only estimated."""

import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nanoflow.config import load_config
from nanoflow.errors import InputError
from nanoflow.interrupt import Interrupted, Interrupts
from nanoflow.mistakes import DebugOption, mistakes_as_messages, short

__all__ = ["tune"]

GRACE_SECONDS = 60.0
"""From the first Ctrl-C to the end of the process: a block takes up to five, and kernels that are compiled are not
left half-way. A second one ends it at once."""


def tune(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A run's YAML, or the name of a shipped one.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override a key, as in --set engine.max_running=64. May be repeated."
        ),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option("--minutes", metavar="N", min=0.01, help="Of this start; by default 10.")
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option("--trials", metavar="N", min=1, help="Most plans for each mix, those of earlier starts included."),
    ] = None,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Estimate instead of measuring; needs no GPU, and stores nothing.")
    ] = False,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", metavar="NAME", help="With --simulate: h100, h200; by default h100."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="Where the search is kept; with --simulate, its ten best plans."),
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N; by default CONFIG's.")
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option("--record", metavar="FILE", help="Save what was measured as JSON, and with matplotlib a picture."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Of what is proposed.")] = 0,
    debug: DebugOption = False,
) -> None:
    """Search for plans for the job that CONFIG describes, store those that win, or go on with the search."""
    interrupts = Interrupts(
        stopping="stopping after what runs now; again to stop at once",
        stopped="stopped; what was measured is kept, and the same command goes on",
        grace=GRACE_SECONDS,
    )
    with mistakes_as_messages(debug):
        if simulate and device is not None:
            raise InputError(f"--device {device}: --simulate runs on no device; use --gpu to say what is estimated")
        if gpu is not None and not simulate:
            raise InputError(f"--gpu {gpu}: it is what --simulate estimates; use --device to say where to measure")
        if record is not None and simulate:
            raise InputError(f"--record {record}: --simulate measures nothing; use --out to save what it finds")
        if record is not None and record.suffix != ".json":
            raise InputError(f"--record {record}: give a name that ends in .json; the picture has .png in its place")
        loaded = load_config(config, overrides or ())
        if simulate:
            from nanoflow.tuning.simulated import print_simulated, simulate_job  # loads torch

            print_simulated(
                simulate_job(loaded, gpu=gpu, minutes=minutes, trials=trials, out=out, seed=seed), Console()
            )
            return
        from nanoflow.tuning.progress import TuneProgress
        from nanoflow.tuning.report import print_outcome
        from nanoflow.tuning.tune import tune as tune_job  # loads torch

        try:
            with interrupts, TuneProgress() as progress:
                outcome = tune_job(
                    loaded,
                    minutes=10.0 if minutes is None else minutes,
                    trials=trials,
                    out=out,
                    device=device,
                    seed=seed,
                    progress=progress,
                    interrupts=interrupts,
                )
        except Interrupted as interrupt:
            typer.echo("stopped before anything was measured", err=True)
            raise typer.Exit(128 + interrupt.signal) from None
        print_outcome(outcome, Console())
        if record is not None:
            from nanoflow.tuning.record import outcome_record, plot_search, save_record

            found = outcome_record(outcome)
            save_record(found, record)
            pictures = plot_search(found, record) if find_spec("matplotlib") else []
            for path in (record, *pictures):
                typer.echo(f"saved {short(path.absolute())}")
    if outcome.signal is not None:
        options = {"--minutes": minutes, "--trials": trials, "--out": out, "--device": device, "--record": record}
        options["--seed"] = seed or None
        again = ["nanoflow", "tune", str(config), *(part for key in overrides or () for part in ("--set", key))]
        again += [part for name, value in options.items() if value is not None for part in (name, f"{value}")]
        typer.echo(f"stopped: what was measured is kept in {outcome.folder}; to go on: {shlex.join(again)}", err=True)
        raise typer.Exit(128 + outcome.signal)
