"""Writes the report of runs to a file or to standard output."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from nanoflow.errors import InputError, OutputError
from nanoflow.reports.load import Run, load_runs
from nanoflow.reports.page import as_html
from nanoflow.reports.text import as_json, as_markdown

__all__ = ["FORMATS", "write_report"]

FORMATS: dict[str, Callable[[Sequence[Run]], str]] = {"html": as_html, "markdown": as_markdown, "json": as_json}
ENDINGS = {".html": "html", ".htm": "html", ".md": "markdown", ".markdown": "markdown", ".json": "json"}
STANDARD_OUTPUT = Path("-")


def write_report(paths: Sequence[Path], out: Path | None = None, form: str | None = None) -> Path | None:
    """Write the report of the runs that `paths` name.

    Args:
        out: the file. Without one, a web page goes beside the first run's report, the others to standard output.
        form: one of `FORMATS`; None: by the ending of `out`, else a web page.

    Returns:
        The file written; None for standard output.

    Raises:
        UserError: a run's report cannot be read, or the file cannot be written.
    """
    if form is None and out is not None and out != STANDARD_OUTPUT:
        form = ENDINGS.get(out.suffix.lower())
        if form is None:
            known = ", ".join(FORMATS)
            raise InputError(f"--out {out}: {out.suffix or 'no ending'} names no format; add --format, one of {known}")
    form = form or "html"
    runs = load_runs(paths)
    text = FORMATS[form](runs)
    if out is None and form == "html":
        out = runs[0].path.with_name(runs[0].path.name.removesuffix(".json") + ".html")
    if out is None or out == STANDARD_OUTPUT:
        sys.stdout.write(text)
        return None
    if any(out.absolute() == run.path.absolute() for run in runs):
        raise InputError(f"--out {out}: is one of the runs' own reports; choose another file")
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"--out {out}: cannot be written: {error.strerror}; choose another file") from None
    return out
