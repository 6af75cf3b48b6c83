"""The command line.

Exit status: 0 all requests answered, 1 some error records, 2 the run could not start or go on, 130 stopped by Ctrl-C,
143 by SIGTERM.
"""

import json
import shlex
import signal
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import nanoflow
from nanoflow.config import RunConfig, dump_config, load_config
from nanoflow.errors import ConfigError
from nanoflow.mistakes import EXIT_FAILED, DebugOption, exit_at_once, mistakes_as_messages, short
from nanoflow.parallel.torchrun import place, serve_as_rank
from nanoflow.plan_cli import app as plan_app
from nanoflow.profile_cli import profile
from nanoflow.tune_cli import tune

__all__ = ["app", "main"]

EXIT_ERROR_RECORDS = 1
EXITS_AT_ONCE = (128 + signal.SIGINT, 128 + signal.SIGTERM)

app = typer.Typer(
    name="nanoflow",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(plan_app, name="plan")
app.command()(profile)
app.command()(tune)


class ReportFormat(StrEnum):
    """What `nanoflow report` writes."""

    HTML = "html"
    MARKDOWN = "markdown"
    JSON = "json"


ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="A run's YAML, or the name of a shipped one.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a key, as in --set engine.max_running=64. May be repeated."
    ),
]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nanoflow {nanoflow.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Offline inference for large language models, built for throughput."""


@app.command()
def run(
    config: ConfigArgument,
    overrides: SetOption = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Replace the output of an earlier run instead of going on with it.")
    ] = False,
    continue_anyway: Annotated[
        bool, typer.Option("--continue-anyway", help="Go on although model, sampling or workload have changed.")
    ] = False,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Run the requests again that ended in an error record.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show neither progress nor summary.")] = False,
    metrics_port: Annotated[
        int | None, typer.Option("--metrics-port", metavar="PORT", help="Answer Prometheus there; 0: a free port.")
    ] = None,
    metrics_host: Annotated[
        str | None, typer.Option("--metrics-host", metavar="ADDRESS", help="Where to answer it; default: 127.0.0.1.")
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Run the job that CONFIG describes, or go on with it where it was stopped."""
    endpoint = {"metrics.port": metrics_port, "metrics.host": metrics_host}
    flags = [f"{key}={json.dumps(value)}" for key, value in endpoint.items() if value is not None]
    _serve_if_rank()
    with mistakes_as_messages(debug):
        if restart and (continue_anyway or retry_errors):
            other = "--continue-anyway" if continue_anyway else "--retry-errors"
            raise ConfigError(f"--restart begins anew and {other} goes on with what is there; give one of them")
        loaded = load_config(config, [*(overrides or ()), *flags])
        from nanoflow.runner import run as run_job  # loads torch: not before the configuration is known to be good

        outcome = run_job(
            loaded, restart=restart, continue_anyway=continue_anyway, retry_errors=retry_errors, quiet=quiet
        )
    output = short(Path(loaded.output.path))
    if not quiet:
        if outcome.report is not None:
            outcome.report.print(Console())
            if outcome.earlier:
                typer.echo(f"{outcome.earlier:,} more requests had their record before")
            typer.echo(f"results {output}, report {short(loaded.output.report_path)}")
        else:
            typer.echo(f"nothing left to do: all {outcome.records:,} requests have their record in {output}")
    if outcome.errors:
        typer.echo(
            f"{outcome.errors} of {outcome.records} requests ended in an error record; --retry-errors runs them again",
            err=True,
        )
    if outcome.signal is not None:
        again = ["nanoflow", "run", str(config), *(part for key in overrides or () for part in ("--set", key))]
        typer.echo(
            f"stopped: {outcome.records:,} requests have their record in {output}; to go on: {shlex.join(again)}",
            err=True,
        )
        raise typer.Exit(128 + outcome.signal)
    if outcome.errors:
        raise typer.Exit(EXIT_ERROR_RECORDS)


@app.command()
def bench(
    config: ConfigArgument,
    overrides: SetOption = None,
    repetitions: Annotated[
        int, typer.Option("--repetitions", metavar="N", min=1, help="How often the whole workload is run.")
    ] = 3,
    warm_up: Annotated[
        str,
        typer.Option("--warm-up", metavar="REQUESTS|SHARE", help="What runs before: 64 requests, or 10% of them."),
    ] = "10%",
    requests: Annotated[
        int | None, typer.Option("--requests", metavar="N", min=1, help="Only the first N requests of the workload.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Where to save it; default: beside output.path.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show neither progress nor the table.")] = False,
    debug: DebugOption = False,
) -> None:
    """Measure the job that CONFIG describes: a warm-up, then repetitions; no completion is written."""
    _serve_if_rank()
    with mistakes_as_messages(debug):
        loaded = load_config(config, overrides or ())
        from nanoflow.bench import bench as measure, parse_warm_up  # loads torch

        outcome = measure(
            loaded,
            repetitions=repetitions,
            warm_up=parse_warm_up(warm_up),
            requests=requests,
            out=out,
            quiet=quiet,
        )
    if outcome.report is not None and not quiet:
        outcome.report.print(Console())
        typer.echo(f"saved {short(outcome.path.absolute())}")
    if outcome.signal is not None:
        if outcome.report is None:
            typer.echo("stopped before a repetition had come to its end; nothing was saved", err=True)
        else:
            done = len(outcome.report.repetitions)
            typer.echo(f"stopped after {done} of {repetitions} repetitions, which are saved", err=True)
        raise typer.Exit(128 + outcome.signal)


def _serve_if_rank() -> None:
    """Of the processes that torchrun has started, all but the first serve that one, and end with it."""
    with mistakes_as_messages(debug=False):
        found = place()
    if found is not None and found.rank > 0:
        serve_as_rank(found.rank)


@app.command()
def validate(config: ConfigArgument, overrides: SetOption = None, debug: DebugOption = False) -> None:
    """Check CONFIG and print it with all defaults and overrides filled in; nothing is run."""
    with mistakes_as_messages(debug):
        typer.echo(dump_config(load_config(config, overrides or ())), nl=False)


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="A run's output (.jsonl), its .report.json, or a folder.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Where to write it; - is standard output.")
    ] = None,
    form: Annotated[
        ReportFormat | None, typer.Option("--format", help="By default what FILE's ending says, else a web page.")
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Show finished runs, one or several side by side: as a web page beside the first one, as Markdown or as JSON."""
    with mistakes_as_messages(debug):
        from nanoflow.reports.write import write_report  # loads torch

        written = write_report(runs, out, form)
    if written is not None:
        typer.echo(f"report {short(written.absolute())}")


@app.command()
def schema() -> None:
    """Print the JSON schema of a run's YAML."""
    typer.echo(json.dumps(RunConfig.model_json_schema(), indent=2))


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False,
    debug: DebugOption = False,
) -> None:
    """Say what this machine can do for a run and what is missing; ends with 2 if something that runs need is."""
    with mistakes_as_messages(debug):
        from nanoflow import doctor as looks  # loads torch

        checks = looks.examine()
        if as_json:
            typer.echo(json.dumps(looks.as_json(checks), indent=2))
        else:
            looks.print_checks(checks, Console())
        failed = any(check.state in ("missing", "broken") for check in checks)
    if failed:
        raise typer.Exit(EXIT_FAILED)


def main() -> None:
    """Entry point of the `nanoflow` command."""
    try:
        app()
    except SystemExit as end:
        if end.code not in EXITS_AT_ONCE:
            raise
        # Threads may still compute an iteration that nobody waits for; the interpreter would wait for them.
        exit_at_once(int(end.code))
