"""``nanoflow profile``: measuring what a job's operations take here, and showing what was measured."""

import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nanoflow.config import load_config
from nanoflow.errors import InputError
from nanoflow.mistakes import DebugOption, mistakes_as_messages, short

__all__ = ["profile"]

WIDE = 200
"""Columns of the tables where they go to a file: room for every number of SMs."""


def profile(
    file: Annotated[
        Path, typer.Argument(metavar="CONFIG|PROFILE", help="A run's YAML to measure, or a profile (.json) to show.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key of CONFIG. May be repeated."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="The profile; by default in the user's cache, where plans find it."),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option("--minutes", metavar="N", help="After so many nothing new is begun; 10 by default."),
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N; CONFIG's by default.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FOLDER", help="Draw it there too, as .png and .svg.")
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Measure the operations of CONFIG's job here, alone and side by side; the same command goes on where it ended."""
    stopped = False
    with mistakes_as_messages(debug):
        if file.suffix == ".json":
            given = {"--set": overrides, "--out": out, "--minutes": minutes, "--device": device}
            for name, value in given.items():
                if value is not None:
                    raise InputError(f"{name}: {file} is a profile, which is only shown; give a run's YAML to measure")
            from nanoflow.profiling.plot import plot_profile  # loads torch
            from nanoflow.profiling.show import print_profile
            from nanoflow.search.profile import Profile

            path, found = file, Profile.load(file)
        else:
            if minutes is not None and not minutes > 0:
                raise InputError(f"--minutes {minutes:g}: give more than 0")
            loaded = load_config(file, overrides or ())
            from nanoflow.pictures import pyplot_here
            from nanoflow.profiling.plot import plot_profile  # loads torch
            from nanoflow.profiling.run import profile_job
            from nanoflow.profiling.show import print_profile

            if plot is not None:
                with pyplot_here():  # before minutes of measuring: whether it can be drawn
                    pass
            with _progress() as progress:
                done = profile_job(
                    loaded,
                    out=out,
                    minutes=10.0 if minutes is None else minutes,
                    device=device,
                    progress=progress,
                )
            path, found, stopped = done.path, done.profile, done.stopped
            for note in done.notes:
                typer.echo(f"not measured: {note}", err=True)
        if found.solos and not stopped:
            print_profile(found, Console() if sys.stdout.isatty() else Console(width=WIDE))
        if plot is not None and not stopped:
            for picture in plot_profile(found, path.stem, plot):
                typer.echo(f"saved {short(picture.absolute())}")
        if file.suffix != ".json":
            again = ["nanoflow", "profile", str(file), *(part for key in overrides or () for part in ("--set", key))]
            again += ["--out", str(out)] if out is not None else []
            again += ["--device", device] if device is not None else []
            more = f"; {done.left} are left, to go on: {shlex.join(again)}" if done.left else ""
            typer.echo(f"{done.measured} cases measured, saved {short(path.absolute())}{more}", err=stopped)
    if stopped:
        raise typer.Exit(128 + signal.SIGINT)


@contextmanager
def _progress() -> Iterator[Callable[[str, int], None]]:
    """What is measured, on standard error: one line that changes on a terminal, else a line each."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda what, left: typer.echo(f"{left:4d} to go: {what}", err=True)
        return
    with console.status("the job's batches and the device's ceilings") as status:
        yield lambda what, left: status.update(f"{left} to go: {what}")
