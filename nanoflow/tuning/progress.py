"""The progress of tuning on stderr: a bar on a terminal, else a line for each round."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from nanoflow.progress import format_seconds

__all__ = ["TuneProgress"]


class TuneProgress:
    """Shows the mix, how many plans were measured, the best of them, and the time that is left.

    Args:
        quiet: show nothing.
    """

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        self._console = console or Console(stderr=True)
        self._quiet = quiet
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[shown]}"),
            console=self._console,
            auto_refresh=False,
            disable=quiet or not self._console.is_terminal,
        )
        self._task = self._bar.add_task("tuning", total=1.0, shown="")
        self._begun = self._ends = time.monotonic()
        self._name = ""

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def begin(self, name: str, seconds: float) -> None:
        """Another mix, which takes so many seconds."""
        self._name = name
        self._begun = time.monotonic()
        self._ends = self._begun + seconds
        self.say(name)

    def show(self, measured: int, best: float | None, what: str = "") -> None:
        """So many plans were measured; the best is `best` times as fast as in sequence. `what` is done now."""
        now = time.monotonic()
        parts = [f"{measured} plans measured"]
        if best is not None:
            parts.append(f"best {best:.3f}")
        parts.append(what or f"{format_seconds(max(0.0, self._ends - now))} left")
        text = ", ".join(parts)
        if self._console.is_terminal:
            done = (now - self._begun) / max(1e-9, self._ends - self._begun)
            self._bar.update(self._task, completed=min(1.0, done), shown=text, refresh=True)
        else:
            self.say(f"  {text}")

    def say(self, text: str) -> None:
        """A line that stays."""
        if not self._quiet:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)
