"""The command line: exit status, one message for a mistake, a traceback for a bug."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

import nanoflow
from nanoflow.cli import app
from nanoflow.config import RunConfig, load_config
from nanoflow.errors import OutOfMemoryError
from nanoflow.models.config import UnsupportedModel
from nanoflow.pipeline.plan import PlanError
from nanoflow.runner import RunOutcome

cli = CliRunner()


@pytest.fixture
def run_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text("model: {path: org/name}\nworkload: {synthetic: {input_len: 8, output_len: 4}}\n")
    return path


class FakeRunner(ModuleType):
    """Stands for `nanoflow.runner`: keeps what it was called with and reports, or raises, what it was told to."""

    def __init__(
        self, errors: int = 0, raises: BaseException | None = None, signal: int | None = None, left: bool = True
    ) -> None:
        super().__init__("nanoflow.runner")
        self._signal, self._left = signal, left
        self.calls: list[tuple[RunConfig, dict[str, Any]]] = []
        self._errors, self._raises = errors, raises

    def run(self, config: RunConfig, **options: Any) -> Any:
        self.calls.append((config, options))
        if self._raises is not None:
            raise self._raises
        report = SimpleNamespace(print=lambda console: console.print("the summary"))
        return RunOutcome(report if self._left else None, 9 - self._errors, self._errors, 4, self._signal)  # type: ignore[arg-type]


def use(monkeypatch: pytest.MonkeyPatch, **behaviour: Any) -> FakeRunner:
    runner = FakeRunner(**behaviour)
    monkeypatch.setitem(sys.modules, "nanoflow.runner", runner)
    return runner


def test_a_run_without_errors_ends_with_0_and_a_summary(run_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = use(monkeypatch)
    result = cli.invoke(app, ["run", str(run_yaml), "--set", "engine.max_running=5", "--restart"])
    assert result.exit_code == 0, result.output
    assert "the summary" in result.stdout and "out/completions.report.json" in result.stdout
    options = {"restart": True, "continue_anyway": False, "retry_errors": False, "quiet": False}
    assert runner.calls == [(load_config(run_yaml, ["engine.max_running=5"]), options)]
    assert "4 more requests had their record before" in result.stdout


def test_going_on_has_its_flags(run_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = use(monkeypatch)
    assert cli.invoke(app, ["run", str(run_yaml), "--continue-anyway", "--retry-errors"]).exit_code == 0
    assert runner.calls[0][1] == {
        "restart": False,
        "continue_anyway": True,
        "retry_errors": True,
        "quiet": False,
    }
    for flag in ("--continue-anyway", "--retry-errors"):
        result = cli.invoke(app, ["run", str(run_yaml), "--restart", flag])
        assert result.exit_code == 2 and f"--restart begins anew and {flag} goes on" in result.stderr


def test_a_run_that_has_nothing_left_to_do_says_so(run_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, left=False)
    result = cli.invoke(app, ["run", str(run_yaml)])
    assert result.exit_code == 0
    assert result.stdout == "nothing left to do: all 9 requests have their record in out/completions.jsonl\n"
    use(monkeypatch, left=False, errors=1)
    assert cli.invoke(app, ["run", str(run_yaml)]).exit_code == 1


@pytest.mark.parametrize("number", [2, 15])
def test_a_stopped_run_says_how_to_go_on(run_yaml: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    use(monkeypatch, signal=number, errors=1)
    result = cli.invoke(app, ["run", str(run_yaml), "--set", "sampling.stop=[a b]", "--restart"])
    assert result.exit_code == 128 + number
    assert result.stderr.endswith(
        "stopped: 9 requests have their record in out/completions.jsonl; "
        f"to go on: nanoflow run {run_yaml} --set 'sampling.stop=[a b]'\n"
    )


def test_quiet_prints_nothing(run_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = use(monkeypatch)
    result = cli.invoke(app, ["run", str(run_yaml), "--quiet"])
    assert (result.exit_code, result.output) == (0, "")
    assert runner.calls[0][1]["quiet"] is True


def test_the_endpoint_is_set_by_flags(run_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = use(monkeypatch)
    cli.invoke(app, ["run", str(run_yaml), "--metrics-port", "0", "--metrics-host", "::1"])
    assert runner.calls[0][0].metrics.model_dump() == {"port": 0, "host": "::1"}
    refused = cli.invoke(app, ["run", str(run_yaml), "--metrics-port", "70000"])
    assert refused.exit_code == 2 and "metrics.port: 70000" in refused.stderr


def test_error_records_end_with_1(run_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, errors=2)
    result = cli.invoke(app, ["run", str(run_yaml)])
    assert result.exit_code == 1
    assert "2 of 9 requests ended in an error record" in result.stderr


@pytest.mark.parametrize(
    "mistake",
    [OutOfMemoryError("no room"), PlanError("no room"), UnsupportedModel("no room")],
    ids=lambda error: type(error).__name__,
)
def test_a_mistake_ends_with_2_and_its_message_alone(
    run_yaml: Path, monkeypatch: pytest.MonkeyPatch, mistake: Exception
) -> None:
    use(monkeypatch, raises=mistake)
    result = cli.invoke(app, ["run", str(run_yaml)])
    assert (result.exit_code, result.stderr, result.stdout) == (2, "error: no room\n", "")
    with_traceback = cli.invoke(app, ["run", str(run_yaml), "--debug"])
    assert with_traceback.exit_code == 2
    assert "Traceback" in with_traceback.stderr and with_traceback.stderr.endswith("error: no room\n")


def test_a_bug_shows_its_traceback_and_ends_with_2(run_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, raises=ValueError("a bug"))
    result = cli.invoke(app, ["run", str(run_yaml)])
    assert result.exit_code == 2
    assert "Traceback" in result.stderr and "ValueError: a bug" in result.stderr


def test_an_interrupted_run_says_where_its_results_are(run_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, raises=KeyboardInterrupt())
    result = cli.invoke(app, ["run", str(run_yaml)])
    assert result.exit_code == 130
    assert result.stderr == "stopped before any request ran; the output is as it was\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "none.yaml"], "none.yaml: no such file"),
        (["run", "run.yaml", "--set", "engine.max_runing=5"], "did you mean engine.max_running?"),
        (["validate", "run.yaml", "--set", "model.path=x.gguf"], "x.gguf not found"),
        (["run"], "CONFIG"),
        (["run", "run.yaml", "--restrat"], "--restrat"),
    ],
)
def test_a_wrong_call_ends_with_2(run_yaml: Path, arguments: list[str], expected: str) -> None:
    result = cli.invoke(app, arguments)
    assert result.exit_code == 2
    assert expected in result.stderr and "Traceback" not in result.output


def test_schema_prints_a_json_schema_with_every_section() -> None:
    schema = json.loads(cli.invoke(app, ["schema"]).stdout)
    assert list(schema["properties"]) == [
        *("model", "workload", "sampling", "engine", "pipeline", "parallel", "output", "report", "metrics")
    ]
    assert schema["required"] == ["model", "workload"]
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["Length"]["anyOf"][0] == {"type": "integer", "minimum": 1}
    assert {"type": "string"} in schema["$defs"]["SamplingParams"]["properties"]["stop"]["anyOf"]
    for section in schema["$defs"].values():
        for body in section.get("anyOf", [section])[-1:]:
            assert all("description" in field or "$ref" in field for field in body["properties"].values())


def test_validate_prints_the_resolved_config(run_yaml: Path, tmp_path: Path) -> None:
    result = cli.invoke(app, ["validate", str(run_yaml), "--set", "sampling.max_tokens=3"])
    assert result.exit_code == 0
    saved = tmp_path / "again.yaml"
    saved.write_text(result.stdout)
    assert load_config(saved) == load_config(run_yaml, ["sampling.max_tokens=3"])


def test_version() -> None:
    result = cli.invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"nanoflow {nanoflow.__version__}\n")


def test_python_m_and_a_checked_mistake_do_not_load_torch(run_yaml: Path) -> None:
    code = (
        "import sys, runpy; sys.argv = ['nanoflow', 'validate', 'run.yaml']\n"
        "try: runpy.run_module('nanoflow', run_name='__main__')\n"
        "except SystemExit as end: print('status', end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(Path(nanoflow.__file__).parents[1])},
        timeout=60,
    )
    assert done.stdout.splitlines()[-1] == "status 0 False", done.stderr
