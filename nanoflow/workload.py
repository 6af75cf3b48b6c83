"""What a run has to do: requests from an input file, from a trace of lengths, or made up."""

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nanoflow.batch_file import ErrorRecord, ParsedRequest, read_requests
from nanoflow.config_schema import RunConfig
from nanoflow.errors import InputError
from nanoflow.lengths import LONGEST
from nanoflow.sampling_params import SamplingParams
from nanoflow.validation import shorten
from nanoflow.workload_schema import SyntheticSection, TraceSection

__all__ = ["TRACE_COLUMNS", "read_workload"]

TRACE_COLUMNS = ("ContextTokens", "GeneratedTokens")
"""Columns of a trace: tokens of the prompt and of the output, as in Azure's public traces."""


def read_workload(config: RunConfig, vocab_size: int) -> Iterator[ParsedRequest | ErrorRecord]:
    """The run's requests in order; an error record for each input line that is none.

    Requests of a trace and synthetic ones have random token ids below `vocab_size` and outputs of exactly the given
    length: end-of-sequence and stops are ignored. Raises InputError if a file cannot be read or is no trace.
    """
    workload = config.workload
    if workload.input is not None:
        return read_requests(Path(workload.input), config.sampling)
    if workload.trace is not None:
        lengths, seed = _trace_lengths(workload.trace), workload.trace.seed
    else:
        assert workload.synthetic is not None
        lengths, seed = _synthetic_lengths(workload.synthetic), workload.synthetic.seed
    return _random_requests(lengths, seed, vocab_size, config.sampling)


def _random_requests(
    lengths: NDArray[np.int64], seed: int, vocab_size: int, defaults: SamplingParams
) -> Iterator[ParsedRequest]:
    """One request a row of `lengths` [requests, 2]. A request's tokens depend on the seed and its number alone."""
    for number, (input_len, output_len) in enumerate(lengths.tolist(), start=1):
        generator = np.random.default_rng((seed, number))
        yield ParsedRequest(
            line=number,
            custom_id=f"request-{number}",
            kind="completion",
            params=defaults.replace(max_tokens=output_len, ignore_eos=True, stop=(), stop_token_ids=()),
            prompt=generator.integers(0, vocab_size, input_len, dtype=np.int32),
        )


def _synthetic_lengths(spec: SyntheticSection) -> NDArray[np.int64]:
    generator = np.random.default_rng(spec.seed)
    each = zip(spec.lengths, (spec.max_input, spec.max_output), strict=True)
    columns = [np.minimum(length.sample(generator, spec.requests), cap or LONGEST) for length, cap in each]
    return np.stack(columns, axis=1).astype(np.int64)


def _trace_lengths(spec: TraceSection) -> NDArray[np.int64]:
    """Lengths [requests, 2] of the CSV file, cut to the caps. A length of 0, which nothing can run, counts as 1."""
    path = Path(spec.path)
    rows: list[tuple[int, int]] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [column for column in TRACE_COLUMNS if column not in (reader.fieldnames or ())]
            if missing:
                found = ", ".join(reader.fieldnames or ()) or "none"
                raise InputError(f"workload.trace.path: {path} lacks the column {missing[0]} (it has: {found})")
            for row in reader:
                if spec.first is not None and len(rows) == spec.first:
                    break
                input_len, output_len = (_length(row, column, path, reader.line_num) for column in TRACE_COLUMNS)
                rows.append(
                    (min(input_len, spec.max_input or input_len), min(output_len, spec.max_output or output_len))
                )
    except OSError as error:
        raise InputError(f"workload.trace.path: {path} cannot be read: {error.strerror}; check the path") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"workload.trace.path: {path} is not a CSV file: {error}") from None
    if not rows:
        raise InputError(f"workload.trace.path: {path} has no rows; it needs one line a request below the header")
    return np.array(rows, dtype=np.int64)


def _length(row: dict[str, str | None], column: str, path: Path, line: int) -> int:
    text = (row[column] or "").strip()
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not (0 <= value < 2**31 and value.is_integer()):
        raise InputError(f"{path}: line {line}: {column}: {shorten(text)} is not a number of tokens")
    return max(1, int(value))
