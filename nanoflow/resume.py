"""Going on with a run that was stopped: what it has done, and whether it is still the same run.

Beside ``out/x.jsonl``, ``out/x.state.json`` says what decides the content of its records: the model with its weights,
the dtype, the sampling defaults and the workload, but not the sizes of the engine, the plan or the device. It is on the
disk before the first record is. An output without records starts anew, whatever stands beside it.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nanoflow import __version__
from nanoflow.config_schema import RunConfig, WorkloadSection
from nanoflow.errors import CheckpointError, InputError, OutputError
from nanoflow.input_files import InputFiles, file_identity
from nanoflow.ledger import Ledger
from nanoflow.loading import Model
from nanoflow.search.files import replace_file
from nanoflow.writer import OutputWriter

__all__ = ["Fingerprint", "check_same_run", "fingerprint", "read_output", "save_state"]

MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "token*.json")
"""What decides a folder's outputs; chat templates may also be in files of their own."""
TEMPLATES = ("chat_template*",)

Fingerprint = dict[str, str]


def fingerprint(config: RunConfig, model: Model) -> Fingerprint:
    """What decides the records' content, by dotted key. Large files are known by size and samples of their content.

    Raises UserError if a file cannot be read.
    """
    found = {"model.name": model.checkpoint.name, "model.dtype": str(model.dtype).removeprefix("torch.")}
    found["model.weights"] = config.model.weights
    found |= {f"model.files.{name}": identity for name, identity in _model_files(config, model).items()}
    found |= _flat("sampling", config.sampling.model_dump(mode="json", exclude_defaults=True))
    found |= _workload(config.workload)
    return found


def _model_files(config: RunConfig, model: Model) -> dict[str, str]:
    path = Path(model.checkpoint.path)
    patterns = (*MODEL_FILES, *TEMPLATES) if config.model.weights == "load" else ("config.json", *TEMPLATES)
    files = [path] if path.is_file() else sorted({file for pattern in patterns for file in path.glob(pattern)})
    try:
        return {file.name: file_identity(file) for file in files if file.is_file()}
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}") from error


def _workload(workload: WorkloadSection) -> Fingerprint:
    """The workload's keys but for arrival times, which change no record, and the identity of its files, wherever."""
    if workload.input is not None:
        files = InputFiles(workload.input).identity()
        return {f"workload.input.{name}": identity for name, identity in files.items()} or {"workload.input": "-"}
    keys = workload.model_dump(mode="json", exclude_none=True, exclude_defaults=True, exclude={"arrival"})
    if workload.trace is not None:
        path = Path(keys["trace"].pop("path"))
        try:
            keys["trace"]["file"] = file_identity(path)
        except OSError as error:
            raise InputError(f"workload.trace.path: {path} cannot be read: {error.strerror}; check the path") from error
    return _flat("workload", keys)


def _flat(prefix: str, values: Mapping[str, Any]) -> Fingerprint:
    flat: Fingerprint = {}
    for name, value in values.items():
        key = f"{prefix}.{name}"
        if isinstance(value, Mapping) and value:
            flat |= _flat(key, value)
        else:
            flat[key] = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
    return flat


def read_output(writer: OutputWriter, *, retry_errors: bool = False) -> Ledger:
    """The records that are in the output.

    It is mended on the way: an unfinished last line goes, and so does what is no record, a second record with the same
    key and, with `retry_errors`, every error record. Raises OutputError.
    """
    ledger = Ledger()

    def judge() -> Callable[[bytes], bool]:
        nonlocal ledger
        ledger = Ledger()
        return lambda line: ledger.add_record(line, keep_errors=not retry_errors)

    dropped = writer.keep_lines(judge)
    ledger.dropped = dropped
    return ledger


def save_state(path: Path, found: Fingerprint) -> None:
    """Write the state file; raises OutputError."""
    state = {"version": 1, "nanoflow": __version__, "fingerprint": found}
    try:
        replace_file(path, json.dumps(state, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise OutputError(f"output.path: cannot write {path}: {error.strerror}; choose another folder") from error


def check_same_run(output: Path, state: Path, found: Fingerprint) -> None:
    """Refuse to go on with the records in `output` unless the run that `state` describes is this one.

    Raises:
        OutputError: naming each key that differs, with what it was and what it is.
    """
    ways = "--restart replaces the output, --continue-anyway goes on all the same, --set output.path=FILE begins anew"
    try:
        before = json.loads(state.read_text(encoding="utf-8"))["fingerprint"]
        if not isinstance(before, dict):
            raise TypeError
    except FileNotFoundError:
        raise OutputError(
            f"output.path: {output} has records, and there is no {state.name} beside it that says of which run; {ways}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise OutputError(
            f"output.path: {state} is damaged, so nothing says of which run the records in {output.name} are; {ways}"
        ) from None
    absent = "not there"
    changes = [
        f"  {key}: was {before.get(key, absent)}, is {found.get(key, absent)}"
        for key in sorted(before.keys() | found.keys())
        if before.get(key) != found.get(key)
    ]
    if changes:
        raise OutputError(
            f"output.path: the records in {output} are of a run that differed in\n"
            + "\n".join(changes)
            + f"\nset this back and the run goes on; or {ways}"
        )
