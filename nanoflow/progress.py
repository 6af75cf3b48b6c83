"""The progress of a run on stderr: a bar on a terminal, else a line from time to time."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from nanoflow.feed import FeedTotals
from nanoflow.recording import IterationRecord

__all__ = ["RunProgress", "format_seconds", "remaining_tokens"]

REFRESH_SECONDS = 0.1
LINE_SECONDS = 30.0
"""Between lines where there is no terminal."""
LEAST_SECONDS = 2.0
"""Of running, before a remaining time is named."""


def remaining_tokens(requests: int, totals: FeedTotals, rows: int, output_tokens: int, finished: int) -> float:
    """Rows (prompt and output tokens) that the device still has to work through: an estimate.

    A prompt is taken to be as long as the mean of those read so far. An output is taken to be as long as output tokens
    there are for each finished completion, which is not misled by short ones finishing first; but not longer than
    `max_tokens` on average.

    Args:
        requests: of this run, those that are not read yet included.
        totals: of the requests read so far.
        rows: worked through so far.
        output_tokens: among them.
        finished: completions that have ended.
    """
    if not totals.requests:
        return 0.0
    completions = totals.completions / totals.requests
    limit = totals.limits / totals.completions
    output = min(limit, output_tokens / finished) if finished else limit
    prompt = totals.prompt_tokens / totals.requests
    return max(0.0, requests * completions * (prompt + output) - rows)


class RunProgress:
    """Shows finished requests, output tokens a second and the time that is left; drawing costs nothing in between.

    Args:
        totals: of the feed, which grow as it reads.
        earlier: requests of the run that have had their record before.
        quiet: show nothing.
    """

    def __init__(
        self, totals: FeedTotals, *, earlier: int = 0, quiet: bool = False, console: Console | None = None
    ) -> None:
        self.total: int | None = None
        """Requests of the run, the `earlier` ones included, once they are known."""
        self._totals = totals
        self._earlier = earlier
        self._quiet = quiet
        self._console = console or Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeElapsedColumn(),
            console=self._console,
            auto_refresh=False,
            disable=quiet or not self._console.is_terminal,
        )
        self._task = self._bar.add_task("requests", total=None, shown="")
        self._done = 0
        self._completions = 0
        self._rows = 0
        self._tokens = 0
        self._start = time.perf_counter()
        self._drawn = self._start

    def observe(self, record: IterationRecord) -> None:
        """Count an iteration; an observer of the engine."""
        self._rows += record.decode_rows + record.prefill_rows
        self._tokens += record.output_tokens

    def advance(self, requests: int = 1, completions: int = 0) -> None:
        """Count requests that got their record, with their completions."""
        self._done += requests
        self._completions += completions

    def tick(self) -> None:
        """Draw if it is time to."""
        now = time.perf_counter()
        if self._quiet or now - self._drawn < (REFRESH_SECONDS if self._console.is_terminal else LINE_SECONDS):
            return
        self._draw(now)

    def __enter__(self) -> Self:
        self._start = self._drawn = time.perf_counter()
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._console.is_terminal and not self._quiet:
            self._draw(time.perf_counter())
        self._bar.stop()

    def text(self, now: float) -> str:
        """How far the run is, in words."""
        elapsed = now - self._start
        done = self._earlier + self._done
        parts = [
            f"{done:,} of {self.total:,} requests" if self.total is not None else f"{done:,} requests",
            f"{self._tokens / max(elapsed, 1e-9):,.0f} output tokens/s",
        ]
        if self.total is not None and self._rows and elapsed >= LEAST_SECONDS:
            left = remaining_tokens(
                self.total - self._earlier, self._totals, self._rows, self._tokens, self._completions
            )
            parts.append(f"{format_seconds(left * elapsed / self._rows)} left")
        return ", ".join(parts)

    def _draw(self, now: float) -> None:
        self._drawn = now
        text = self.text(now)
        if self._console.is_terminal:
            done = self._earlier + self._done
            self._bar.update(self._task, completed=done, total=self.total, shown=text, refresh=True)
        else:
            self._console.print(f"{text}, {format_seconds(now - self._start)} so far", highlight=False)


def format_seconds(seconds: float) -> str:
    """A time in its two largest units, such as ``2 h 05 min`` or ``40 s``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"
