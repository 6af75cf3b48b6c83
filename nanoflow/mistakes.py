"""How a command ends on an error: one message for what the user can mend, a traceback for a bug."""

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from nanoflow.errors import ParallelError, UserError
from nanoflow.interrupt import Interrupted
from nanoflow.parallel.torchrun import beside_rank_0

__all__ = ["EXIT_FAILED", "DebugOption", "exit_at_once", "is_mistake", "mistakes_as_messages", "short"]

EXIT_FAILED = 2

DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@contextmanager
def mistakes_as_messages(debug: bool) -> Iterator[None]:
    """End in one message and status 2 on what the user can mend; anything else is a bug and shows where it is."""
    try:
        yield
    except (KeyboardInterrupt, Interrupted) as interrupt:
        number = interrupt.signal if isinstance(interrupt, Interrupted) else signal.SIGINT
        typer.echo("stopped before any request ran; the output is as it was", err=True)
        raise typer.Exit(128 + number) from None
    except Exception as error:
        mistake = is_mistake(error)
        if debug or not mistake:
            traceback.print_exc()
        if mistake:
            if not beside_rank_0():
                typer.echo(f"error: {error}", err=True)
            if isinstance(error, ParallelError):
                # Threads may wait inside a library for a process that is gone, and the interpreter's end for them.
                exit_at_once(EXIT_FAILED)
        else:
            typer.echo("error: this is a bug in NanoFlow; the lines above say where it is", err=True)
        raise typer.Exit(EXIT_FAILED) from None


def exit_at_once(status: int) -> NoReturn:
    """End the process without waiting for its threads."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(status)


def short(path: Path) -> str:
    """The path, relative to the working folder if it is in there."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def is_mistake(error: Exception) -> bool:
    """Whether the error's message is meant for the user. The parts below the engine have error classes of their own."""
    if isinstance(error, UserError):
        return True
    below = (
        ("nanoflow.pipeline.plan", "PlanError"),
        ("nanoflow.models.config", "UnsupportedModel"),
        ("nanoflow.ops.sharding", "ShardError"),
        ("nanoflow.search.profile", "ProfileError"),
    )
    for module, name in below:
        # A module that is not loaded has raised nothing.
        kind = getattr(sys.modules.get(module), name, None)
        if kind is not None and isinstance(error, kind):
            return True
    return False
