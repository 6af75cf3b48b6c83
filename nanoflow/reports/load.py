"""Finds the reports of runs: by the run's output, by the report itself, or by a folder with several."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from nanoflow.errors import InputError
from nanoflow.report import SCHEMA_VERSION, RunReport

__all__ = ["Run", "load_runs"]

REPORT = ".report.json"
BESIDE = (REPORT, ".series.jsonl", ".config.yaml", ".state.json", ".jsonl")
"""Endings of a run's files; any of them names the run."""


@dataclass(frozen=True)
class Run:
    """A run's report and what to call it."""

    name: str
    path: Path
    report: RunReport


def load_runs(paths: Sequence[str | Path]) -> list[Run]:
    """The runs that `paths` name, in that order, each once.

    Args:
        paths: outputs (.jsonl) or reports (.report.json) of runs, or folders, which stand for every report in them.

    Raises:
        InputError: nothing is there, the run is not over, or the report has another version.
    """
    files = list(dict.fromkeys(file for path in paths for file in _report_files(Path(path))))
    return [Run(name, file, _read(file)) for name, file in zip(_names(files), files, strict=True)]


def _report_files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(path.glob(f"*{REPORT}"))
        if not found:
            raise InputError(
                f"{path}: no run's report ({REPORT}) lies in this folder; name the folder of a run's output"
            )
        return found
    ending = next((ending for ending in BESIDE if path.name.endswith(ending)), None)
    report = path if ending is None or ending == REPORT else path.with_name(path.name.removesuffix(ending) + REPORT)
    if report.is_file():
        return [report]
    if report != path and path.is_file():
        raise InputError(
            f"{path}: {report} is missing: the run is not over, or was stopped; start it again, and it goes on"
        )
    raise InputError(f"{path}: no such file; name a run's output (.jsonl), its {REPORT}, or the folder with them")


def _read(file: Path) -> RunReport:
    try:
        data: Any = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}; check its permissions") from None
    except ValueError as error:
        raise InputError(f"{file}: is not JSON ({error}); run the job again to get a report") from None
    version = data.get("schema_version", 1) if isinstance(data, dict) and "requests" in data else None
    if version is None:
        raise InputError(f"{file}: is not the report of a run; name a {REPORT} that a run wrote")
    if version != SCHEMA_VERSION:
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        mend = "update NanoFlow" if newer else "run the job again"
        raise InputError(
            f"{file}: schema_version: {version} is {'newer' if newer else 'older'} than the {SCHEMA_VERSION} that this "
            f"NanoFlow reads; {mend}"
        )
    try:
        return TypeAdapter(RunReport).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise InputError(f"{file}: {key}: {first['msg'].lower()}; run the job again to get a whole report") from None


def _names(files: Sequence[Path]) -> list[str]:
    """What to call each run: the file's name, with its folder where two would share it, else a number."""
    names = [file.name.removesuffix(REPORT) for file in files]
    if len(set(names)) < len(names):
        names = [f"{file.absolute().parent.name}/{name}" for file, name in zip(files, names, strict=True)]
    if len(set(names)) < len(names):
        names = [f"{number} {name}" for number, name in enumerate(names, start=1)]
    return names
