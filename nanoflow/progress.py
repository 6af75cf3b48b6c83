"""The progress bar of a run."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["RunProgress"]

REFRESH_SECONDS = 0.1


class RunProgress:
    """Shows finished requests and output tokens a second, on stderr; drawing costs nothing between refreshes.

    Args:
        total: requests of the run.
        quiet: show nothing.
    """

    def __init__(self, total: int, *, quiet: bool = False, console: Console | None = None) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:,.0f} output tokens/s"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console or Console(stderr=True),
            auto_refresh=False,
            disable=quiet,
        )
        self._task = self._bar.add_task("requests", total=total, rate=0.0)
        self._done = 0
        self._tokens = 0
        self._start = time.perf_counter()
        self._drawn = 0.0

    def advance(self, requests: int, output_tokens: int) -> None:
        """Count `requests` more finished and `output_tokens` more made."""
        self._done += requests
        self._tokens += output_tokens
        if time.perf_counter() - self._drawn > REFRESH_SECONDS:
            self._draw()

    def __enter__(self) -> Self:
        self._start = time.perf_counter()
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._draw()
        self._bar.stop()

    def _draw(self) -> None:
        self._drawn = time.perf_counter()
        rate = self._tokens / max(self._drawn - self._start, 1e-9)
        self._bar.update(self._task, completed=self._done, rate=rate, refresh=True)
