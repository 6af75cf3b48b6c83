"""Traces of real requests: lengths and arrival times from a CSV file."""

import csv
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from nanoflow.errors import InputError
from nanoflow.validation import shorten
from nanoflow.workload_schema import TraceSection

__all__ = ["LengthTrace", "none_left", "read_lengths"]

COLUMNS = {
    "input": (
        "tokens of the prompt",
        (
            "contexttokens",
            "requesttokens",
            "numprefilltokens",
            "prompttokens",
            "inputtokens",
            "inputlength",
            "inputlen",
        ),
    ),
    "output": (
        "tokens of the output",
        (
            "generatedtokens",
            "responsetokens",
            "numdecodetokens",
            "completiontokens",
            "outputtokens",
            "outputlength",
            "outputlen",
        ),
    ),
    "arrival": ("arrival times", ("timestamp", "arrivedat", "arrivaltime", "arrival")),
}
"""What a column holds and the names that are known for it, as letters and digits in lower case: those of Azure's public
traces, of BurstGPT, of Vidur's traces, and the plain ones."""


@dataclass(frozen=True, eq=False)
class LengthTrace:
    """Requests of a CSV trace, in order of arrival if that is known."""

    lengths: NDArray[np.int64]
    """Tokens of prompt and output [requests, 2]."""
    times: NDArray[np.float64] | None
    """Seconds from the earliest of these requests [requests]; None if they were not asked for."""


def read_lengths(spec: TraceSection, *, times: bool = False) -> LengthTrace:
    """The requests of a CSV file that `spec` takes, cut to its caps. A length of 0, which nothing can run, counts as 1.

    Args:
        times: read the arrival times too.

    Raises:
        InputError: the file cannot be read, lacks a column, or has a row that is wrong.
    """
    path = Path(spec.path)
    inputs, outputs, seconds = array("q"), array("q"), array("d")
    limits = spec.limits
    enough = None if spec.shuffle else spec.first
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            found = list(reader.fieldnames or ())
            wanted = ["input", "output", *(["arrival"] if times else [])]
            columns = [_column(kind, getattr(spec.columns, kind), found, path) for kind in wanted]
            for row in reader:
                if len(inputs) == enough:
                    break
                where = f"{path}: line {reader.line_num}"
                input_len, output_len = (_length(row, column, where) for column in columns[:2])
                if not limits.keep(input_len, output_len):
                    continue
                inputs.append(min(input_len, spec.max_input or input_len))
                outputs.append(min(output_len, spec.max_output or output_len))
                if times:
                    seconds.append(_seconds(row, columns[2], where))
    except OSError as error:
        raise InputError(f"workload.trace.path: {path} cannot be read: {error.strerror}; check the path") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"workload.trace.path: {path} is not a CSV file: {error}") from None
    if not inputs:
        none_left(path, "has no rows; it needs one line a request below the header", limits.model_fields_set)
    lengths = np.stack([np.array(inputs, np.int64), np.array(outputs, np.int64)], axis=1)
    taken = np.arange(len(lengths))
    if spec.shuffle:
        taken = np.random.default_rng(spec.seed).permutation(len(lengths))[: spec.first]
    if not times:
        return LengthTrace(lengths[taken], None)
    arrivals = np.array(seconds, np.float64)[taken]
    order = np.argsort(arrivals, kind="stable")
    return LengthTrace(lengths[taken][order], arrivals[order] - arrivals.min())


def none_left(path: Path, problem: str, limits: set[str]) -> NoReturn:
    """Refuse a trace of which no request is left; `limits` are the keys of `prune` that are set."""
    left_out = ", or all are left out: see workload.trace.prune" if limits else ""
    raise InputError(f"workload.trace.path: {path} {problem}{left_out}")


def _column(kind: str, named: str | None, found: Sequence[str], path: Path) -> str:
    """The column of the file that holds `kind`."""
    has = f"(it has: {', '.join(found) or 'none'})"
    if named is not None:
        if named not in found:
            raise InputError(f"workload.trace.columns.{kind}: {path} lacks the column {named} {has}; name one of them")
        return named
    what, known = COLUMNS[kind]
    plain = {"".join(filter(str.isalnum, name)).lower(): name for name in reversed(found)}
    for name in known:
        if name in plain:
            return plain[name]
    raise InputError(
        f"workload.trace.path: {path} has no column known to hold {what} {has}; name it: workload.trace.columns.{kind}"
    )


def _length(row: dict[str, str | None], column: str, where: str) -> int:
    text = (row[column] or "").strip()
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not (0 <= value < 2**31 and value.is_integer()):
        raise InputError(f"{where}: {column}: {shorten(text)} is not a number of tokens")
    return max(1, int(value))


def _seconds(row: dict[str, str | None], column: str, where: str) -> float:
    """A number of seconds, or a date with a time (UTC if it names no zone)."""
    text = (row[column] or "").strip()
    try:
        value = float(text)
    except ValueError:
        try:
            moment = datetime.fromisoformat(text)
            value = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        except (ValueError, OverflowError):
            value = math.nan
    if not abs(value) < 1e15:
        raise InputError(
            f"{where}: {column}: {shorten(text)} is neither seconds nor a date with a time; "
            "use another workload.arrival, such as {poisson: 4}"
        )
    return value
