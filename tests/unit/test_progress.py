"""Progress: what is left is estimated in tokens; a bar on a terminal, lines elsewhere."""

import io
from typing import Any

import pytest
from rich.console import Console

from nanoflow import progress as progress_module
from nanoflow.feed import FeedTotals
from nanoflow.progress import RunProgress, format_seconds, remaining_tokens
from nanoflow.recording import IterationRecord


def totals(requests: int, prompt: int, limit: int, n: int = 1) -> FeedTotals:
    return FeedTotals(requests, requests, requests * prompt, requests * n, requests * n * limit)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        # Nothing finished: outputs are taken to be as long as they may.
        ((100, totals(10, 20, 30), 50, 0, 0), 100 * 50 - 50),
        # Ten tokens of output for each that ended, whether or not others still run.
        ((100, totals(10, 20, 30), 350, 150, 15), 100 * 30 - 350),
        # More tokens than max_tokens for each that ended: the rest runs.
        ((100, totals(10, 20, 30), 999, 900, 2), 100 * 50 - 999),
        # Each completion computes its prompt.
        ((100, totals(10, 20, 30, n=4), 0, 0, 0), 100 * 4 * 50),
        ((10, totals(10, 20, 30), 9999, 300, 10), 0),
        ((10, FeedTotals(), 0, 0, 0), 0),
    ],
)
def test_what_is_left(arguments: Any, expected: float) -> None:
    assert remaining_tokens(*arguments) == expected


def test_times_have_two_units() -> None:
    shown = [format_seconds(seconds) for seconds in (0.4, 59.4, 59.6, 3599, 3600, 86399, 90000)]
    assert shown == ["0 s", "59 s", "1 min 00 s", "59 min 59 s", "1 h 00 min", "23 h 59 min", "1 d 01 h"]


def iteration(**values: int) -> IterationRecord:
    names = ("decode_rows", "prefill_rows", "padding_rows", "running", "waiting", "kv_pages", "kv_capacity")
    rest = {"preemptions": 0, "output_tokens": 0, "token_gaps": {}}
    return IterationRecord(time=0.0, seconds=0.1, **(dict.fromkeys(names, 0) | rest | values))  # type: ignore[arg-type]


def run_progress(monkeypatch: pytest.MonkeyPatch, terminal: bool, **options: Any) -> str:
    """A hundred requests in 200 s, forty of them done before; what was shown."""
    now = [1000.0]
    monkeypatch.setattr(progress_module.time, "perf_counter", lambda: now[0])
    console = Console(file=io.StringIO(), force_terminal=terminal, width=150)
    progress = RunProgress(totals(60, 10, 40), earlier=40, console=console, **options)
    with progress:
        for number in range(60):
            progress.total = 100 if number > 5 else None
            now[0] += 200 / 60
            progress.observe(iteration(prefill_rows=10, decode_rows=9, output_tokens=10))
            progress.advance(1, 1)
            progress.tick()
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_without_a_terminal_there_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = run_progress(monkeypatch, terminal=False).splitlines()
    assert len(lines) == 6
    # 60 requests of 20 tokens, 19 of which are rows: 649 rows are left after 29 of them, at 5.7 a second.
    assert lines[2] == "69 of 100 requests, 3 output tokens/s, 1 min 54 s left, 1 min 37 s so far"
    assert all("\x1b" not in line for line in lines)


def test_on_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = run_progress(monkeypatch, terminal=True)
    assert "100 of 100 requests, 3 output tokens/s" in shown
    assert "41 requests, " in shown  # before the total was known


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet_shows_nothing(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    assert run_progress(monkeypatch, terminal, quiet=True) == ""
