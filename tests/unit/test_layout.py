"""The layout: parts linked into one package, imports that point one way, no module twice, a wheel that holds it all."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("ops", "pipeline", "search", "models")
LINKS = (*PARTS, "configs")
MAY_IMPORT = {
    "ops": {"ops"},
    "models": {"models", "ops"},
    "pipeline": {"pipeline", "ops"},
    "search": {"search", "pipeline", "ops"},
}
DATA = (".yaml", ".json", ".jsonl", ".csv", ".typed")


def sources(folder: str) -> Iterator[Path]:
    """Python files of a top-level folder; those of `nanoflow` without the linked parts."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        if folder != "nanoflow" or path.relative_to(ROOT).parts[1] not in LINKS:
            yield path


def imported(path: Path) -> Iterator[str]:
    """Dotted names of the modules that a file imports, wherever in the file; `from a import b` counts as ``a.b``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write nanoflow.{path.parent.name}..."
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def run_python(code: str, *arguments: str, cwd: Path, path: Path) -> str:
    """Standard output of a fresh interpreter that finds packages in `path` first."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", LINKS)
def test_a_relative_link_ties_the_part_to_the_package(name: str) -> None:
    link = ROOT / "nanoflow" / name
    assert link.is_symlink() and os.readlink(link) == f"../{name}"
    assert (ROOT / name).is_dir() and not (ROOT / name).is_symlink()


@pytest.mark.parametrize("part", PARTS)
def test_imports_of_a_part_point_one_way(part: str) -> None:
    checked = 0
    for path in sources(part):
        for name in imported(path):
            first, *rest = name.split(".")
            if first == "nanoflow":
                checked += 1
                assert rest and rest[0] in MAY_IMPORT[part], f"{path.relative_to(ROOT)} imports {name}"
    assert checked or part == "ops"


def test_nobody_imports_a_part_by_its_top_level_name() -> None:
    for folder in (*PARTS, "nanoflow", "tests", "benchmarks"):
        for path in sources(folder):
            wrong = [name for name in imported(path) if name.split(".")[0] in PARTS]
            assert not wrong, f"{path.relative_to(ROOT)} imports {wrong[0]}; write nanoflow.{wrong[0]}"


def test_heavy_packages_stay_where_they_belong() -> None:
    for folder in (*PARTS, "nanoflow"):
        for path in sources(folder):
            first = {name.split(".")[0] for name in imported(path)}
            assert "transformers" not in first, f"{path}: transformers is for tests alone"
            assert "optuna" not in first or folder == "search", f"{path}: only search imports Optuna"


IMPORT_EVERYTHING = """
import importlib, json, os, pkgutil, sys
import nanoflow
for found in pkgutil.walk_packages(nanoflow.__path__, "nanoflow."):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)
top = os.path.join(sys.argv[1], "nanoflow")
folders = tuple(os.path.realpath(folder) + os.sep for folder in [top, *(entry.path for entry in os.scandir(top))])
files = {}
for name, module in sorted(sys.modules.items()):
    file = getattr(module, "__file__", None)
    if file and (name.split(".")[0] == "nanoflow" or os.path.realpath(file).startswith(folders)):
        files[name] = os.path.realpath(file)
print(json.dumps(files))
"""


def loaded_modules(site: Path, cwd: Path) -> dict[str, str]:
    files: dict[str, str] = json.loads(run_python(IMPORT_EVERYTHING, str(site), cwd=cwd, path=site))
    return files


def test_no_module_is_loaded_twice(tmp_path: Path) -> None:
    files = loaded_modules(ROOT, tmp_path)
    assert all(name.split(".")[0] == "nanoflow" for name in files), files
    twice = [name for name in files if list(files.values()).count(files[name]) > 1]
    assert not twice
    known = {str(path) for folder in (*PARTS, "nanoflow") for path in sources(folder) if path.name != "__main__.py"}
    assert set(files.values()) == known


@pytest.mark.parametrize("module", ["nanoflow", "nanoflow.ops.batch", "nanoflow.sampling_params"])
def test_importing_a_light_module_drags_in_nothing_heavy(module: str, tmp_path: Path) -> None:
    heavy = "{'torch', 'optuna', 'typer', 'rich', 'transformers', 'tokenizers'}"
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    assert run_python(code, cwd=tmp_path, path=ROOT).strip() == "[]"


def test_importing_an_operation_drags_in_neither_optuna_nor_the_command_line(tmp_path: Path) -> None:
    code = "import sys, nanoflow.ops.graph; print(sorted({'optuna', 'typer', 'pydantic', 'rich'} & set(sys.modules)))"
    assert run_python(code, cwd=tmp_path, path=ROOT).strip() == "[]"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the working tree, so that no build folder is left behind, nor an old one used."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    skipped = shutil.ignore_patterns(".*", "out", "build", "dist", "*.egg-info", "__pycache__", "tests", "benchmarks")
    shutil.copytree(ROOT, source, symlinks=True, ignore=skipped)
    for required in ("README.md", "LICENSE"):
        assert (source / required).is_file(), f"{required} is missing"
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--quiet"]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "--wheel-dir", str(folder)],
        cwd=source,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return next(folder.glob("nanoflow-*.whl"))


def test_the_wheel_holds_every_module_and_every_shipped_file(wheel: Path) -> None:
    expected = {str(Path("nanoflow") / path.relative_to(ROOT)) for part in PARTS for path in sources(part)} | {
        str(path.relative_to(ROOT)) for path in sources("nanoflow")
    }
    expected |= {
        str(Path("nanoflow") / path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*") if path.suffix in DATA
    }
    expected |= {"nanoflow/py.typed", "nanoflow/reports/page.html.j2"}
    unknown = [p for p in (ROOT / "configs").rglob("*") if p.is_file() and p.suffix not in DATA]
    assert not unknown, f"{unknown[0]} would not be in the wheel; see package-data in pyproject.toml"
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == expected
    metadata = {name.partition(".dist-info/")[2] for name in names if ".dist-info/" in name}
    assert {"entry_points.txt", "licenses/LICENSE", "METADATA"} <= metadata


def test_the_wheel_runs_from_an_unrelated_folder(wheel: Path, tmp_path: Path) -> None:
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    files = loaded_modules(site, work)
    assert all(file.startswith(str(site.resolve())) for file in files.values()), files
    code = "import sys; sys.argv = ['nanoflow', 'validate', 'quickstart']; from nanoflow.cli import main; main()"
    shown = run_python(code, cwd=work, path=site)
    assert str(site / "nanoflow/configs/prompts/quickstart.jsonl") in shown
    assert f"path: {work}/out/quickstart.jsonl" in shown


@pytest.mark.slow
def test_the_wheel_completes_requests(wheel: Path, tmp_path: Path) -> None:
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    code = "import sys; sys.argv[0] = 'nanoflow'; from nanoflow.cli import main; main()"
    overrides = ["workload.synthetic.requests=3", "workload.synthetic.output_len=4"]
    arguments = [part for override in overrides for part in ("--set", override)]
    run_python(code, "run", "synthetic", "--quiet", *arguments, cwd=work, path=site)
    lines = [json.loads(line) for line in (work / "out/synthetic.jsonl").read_text().splitlines()]
    assert {line["custom_id"] for line in lines} == {"request-1", "request-2", "request-3"}
    assert all(line["response"]["body"]["usage"]["completion_tokens"] == 4 for line in lines)
    assert {path.name for path in (work / "out").iterdir()} == {
        "synthetic.jsonl",
        "synthetic.config.yaml",
        "synthetic.report.json",
        "synthetic.series.jsonl",
        "synthetic.state.json",
    }


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [requirement for extra in project["optional-dependencies"].values() for requirement in extra]
    names = {re.split(r"[\[<>=]", requirement)[0].lower() for requirement in (*project["dependencies"], *extras)}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").lower().splitlines()
    pinned = {line.partition("==")[0].replace("_", "-") for line in lines if "==" in line}
    assert {name.replace("_", "-") for name in names} - {"nanoflow"} <= pinned
    assert {"torch==2.13.0", "triton==3.7.1"} <= set(lines)


def test_every_package_that_is_imported_is_a_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.split(r"[\[<>=]", requirement)[0].lower().replace("-", "_") for requirement in project["dependencies"]}
    known = names - {"pyyaml"} | {"yaml", "nanoflow"} | set(sys.stdlib_module_names)
    optional = {"huggingface_hub", "matplotlib", "triton"}  # triton comes with torch where there can be a GPU
    for folder in (*PARTS, "nanoflow"):
        for path in sources(folder):
            unknown = {name.split(".")[0] for name in imported(path)} - known - optional
            assert not unknown, f"{path.relative_to(ROOT)} imports {unknown}: not among pyproject's dependencies"
