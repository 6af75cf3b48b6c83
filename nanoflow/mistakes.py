"""How a command ends on an error: one message for what the user can mend, a traceback for a bug."""

import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from nanoflow.errors import UserError
from nanoflow.interrupt import Interrupted

__all__ = ["EXIT_FAILED", "DebugOption", "is_mistake", "mistakes_as_messages", "short"]

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
            typer.echo(f"error: {error}", err=True)
        else:
            typer.echo("error: this is a bug in NanoFlow; the lines above say where it is", err=True)
        raise typer.Exit(EXIT_FAILED) from None


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
        ("nanoflow.search.profile", "ProfileError"),
    )
    for module, name in below:
        # A module that is not loaded has raised nothing.
        kind = getattr(sys.modules.get(module), name, None)
        if kind is not None and isinstance(error, kind):
            return True
    return False
