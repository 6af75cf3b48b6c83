"""Reads a run's YAML into a frozen `RunConfig`, and writes a resolved one back. Its keys are in `config_schema`."""

import os
import re
from collections.abc import Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from nanoflow.config_schema import (
    EngineSection,
    ModelSection,
    OutputSection,
    PipelineSection,
    RunConfig,
    WorkloadSection,
)
from nanoflow.errors import ConfigError, OutputError
from nanoflow.input_files import STDIN, reads
from nanoflow.pipeline.strict_yaml import StrictDumper, YamlError, load_yaml
from nanoflow.validation import explain, plain, shorten

__all__ = [
    "EngineSection",
    "ModelSection",
    "OutputSection",
    "PipelineSection",
    "RunConfig",
    "WorkloadSection",
    "dump_config",
    "load_config",
    "save_config",
    "shipped_configs",
]

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
MOST_PROBLEMS = 20
"""Told at once."""
FILE_ENDINGS = (".gguf", ".json", ".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run described by the YAML file `path`, or by the shipped configuration of that name.

    `overrides` are ``section.key=value`` with values in YAML; they win over the file. A relative input named by an
    override may also lie in the working folder. Raises `ConfigError`.
    """
    file = _find(Path(path))
    data = _read(file)
    overridden = {_apply(data, override) for override in overrides}
    # A section left empty (all of its keys commented out, say) is null in YAML; it means the defaults.
    data = {key: value for key, value in data.items() if value is not None or key not in RunConfig.model_fields}
    try:
        config = RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_message(file, error)) from None
    return _with_absolute_paths(config, file, overridden)


def dump_config(config: RunConfig) -> str:
    """`config` as YAML that loads to an equal one."""
    data = config.model_dump(mode="json", exclude_none=True)
    return yaml.dump(data, Dumper=StrictDumper, sort_keys=False, allow_unicode=True)


def save_config(config: RunConfig) -> Path:
    """Write the resolved configuration beside the run's output; raises `OutputError`."""
    path = config.output.config_path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dump_config(config), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"output.path: cannot write {path}: {error.strerror}; choose another folder") from error
    return path


def shipped_configs() -> dict[str, Path]:
    """The configurations that come with the package, by name."""
    folder = Path(__file__).parent / "configs"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def _find(path: Path) -> Path:
    if path.is_file():
        return path.absolute()
    shipped = shipped_configs()
    if path.parent == Path() and path.name in shipped:
        return shipped[path.name]
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; name the YAML file in it")
    raise ConfigError(f"{path}: no such file; write one, or name a shipped configuration: {', '.join(shipped)}")


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: byte {error.start} is not UTF-8; save the file as UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}; check its permissions") from None
    data = _parse(text, str(file))
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: holds {shorten(data)}; it must hold sections such as model: and workload:")
    return data


def _parse(text: str, where: str) -> Any:
    """What the YAML says; `where` stands at the head of messages."""
    try:
        return load_yaml(text)
    except YamlError as error:
        raise ConfigError(f"{where}: {error}") from None


def _apply(data: dict[str, Any], override: str) -> str:
    """Set one ``section.key=value`` in `data`; returns the key."""
    key, equals, text = override.partition("=")
    key = key.strip()
    names = key.split(".")
    where = f"--set {plain(override)}"
    if not equals or not all(names):
        raise ConfigError(f"{where}: it must be section.key=value, such as --set engine.max_running=64")
    value = "-" if text.strip() == "-" else _parse(text, where)  # in YAML a list of nothing
    section = data
    for name in names[:-1]:
        inner = section.get(name)
        if inner is None:
            inner = {}
        elif not isinstance(inner, dict):
            raise ConfigError(f"{where}: {name} is {shorten(inner)}, not a section; set {name} as a whole")
        section[name] = inner = dict(inner)
        section = inner
    section[names[-1]] = value
    return key


def _message(file: Path, error: ValidationError) -> str:
    problems = []
    for entry in error.errors():
        key, problem = explain(entry, RunConfig)
        problems.append(f"{key}: {problem}" if key else problem)
    if len(problems) == 1:
        return f"{file}: {problems[0]}"
    shown = problems[:MOST_PROBLEMS]
    if len(problems) > MOST_PROBLEMS:
        shown.append(f"and {len(problems) - MOST_PROBLEMS} more")
    return f"{file}: {len(problems)} problems\n" + "\n".join(f"  {problem}" for problem in shown)


def _with_absolute_paths(config: RunConfig, file: Path, overridden: set[str]) -> RunConfig:
    def resolve(key: str, value: str, pattern: bool = False) -> str:
        folders = [file.parent]
        if any(key == name or key.startswith(name + ".") for name in overridden):
            folders.append(Path.cwd())
        _check_path(file, key, value)
        places = list(dict.fromkeys(os.path.realpath(folder / value) for folder in folders))
        for place in places:
            # Also false for a name that is too long for the file system.
            if os.path.exists(place) or (pattern and has_magic(value) and glob(place, recursive=True)):
                return place
        raise ConfigError(
            f"{file}: {key}: {plain(value)} not found (looked for {' and '.join(plain(p, 500) for p in places)}); "
            "relative paths start at the folder of the YAML file"
        )

    changes: dict[str, Any] = {}
    path = config.model.path
    if not path.startswith("package:"):
        try:
            path = resolve("model.path", path)
        except ConfigError:
            # What names no file may still be a model of the Hub, unless it can only be meant as a file.
            if not HUB_ID.fullmatch(path) or path.startswith(".") or path.endswith(FILE_ENDINGS):
                raise
        changes["model"] = config.model.model_copy(update={"path": path})
    workload = config.workload
    if workload.input is not None:
        inputs = tuple(
            item if item == STDIN else resolve("workload.input", item, pattern=True) for item in workload.input
        )
        changes["workload"] = workload = workload.model_copy(update={"input": inputs})
    elif workload.trace is not None:
        trace = workload.trace.model_copy(update={"path": resolve("workload.trace.path", workload.trace.path)})
        changes["workload"] = workload.model_copy(update={"trace": trace})
    if config.pipeline.plan not in ("sequential", "auto"):
        plan = resolve("pipeline.plan", config.pipeline.plan)
        changes["pipeline"] = config.pipeline.model_copy(update={"plan": plan})
    _check_path(file, "output.path", config.output.path)
    output = Path(config.output.path).absolute()
    trace_path = changes["workload"].trace.path if workload.trace is not None else ""
    if output in (Path(trace_path), Path(file)) or any(reads(item, output) for item in workload.input or ()):
        raise ConfigError(f"{file}: output.path: {output} is an input of the run; choose another file")
    changes["output"] = config.output.model_copy(update={"path": str(output)})
    return config.model_copy(update=changes)


def _check_path(file: Path, key: str, path: str) -> None:
    if "\0" in path:
        raise ConfigError(f"{file}: {key}: {shorten(path)} holds a null character, which no path can; take it out")
