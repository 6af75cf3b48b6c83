"""``nanoflow plan``: looking at plan files before and after they run, and measuring them."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nanoflow.config import load_config
from nanoflow.errors import InputError
from nanoflow.mistakes import DebugOption, mistakes_as_messages, short

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Look at plans, and measure them.")

PlanArgument = Annotated[Path, typer.Argument(metavar="FILE", help="A plan file.")]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="MODEL", help="A folder, a .gguf file or a shipped shape; by default the plan's."),
]
LayersOption = Annotated[
    int | None, typer.Option("--layers", metavar="N", help="Only so many layers; by default all of the model.")
]
TensorOption = Annotated[
    int | None,
    typer.Option(
        "--tensor", metavar="N", min=1, help="Ranks that share the model (parallel.tensor); by default the plan's."
    ),
]
DecodeOption = Annotated[int | None, typer.Option("--decode", metavar="N", help="Decode rows of the batch.")]
ContextOption = Annotated[int | None, typer.Option("--context", metavar="N", help="Tokens that each attends to.")]
PromptsOption = Annotated[
    str | None, typer.Option("--prompts", metavar="A,B,...", help="Tokens of each prompt in the batch.")
]


@app.command()
def show(
    file: PlanArgument,
    model: ModelOption = None,
    layers: LayersOption = None,
    tensor: TensorOption = None,
    decode: DecodeOption = None,
    context: ContextOption = None,
    prompts: PromptsOption = None,
    debug: DebugOption = False,
) -> None:
    """Print the plan, and one period of it in steady state as a grid: lanes as rows, time to the right, estimated."""
    with mistakes_as_messages(debug):
        from nanoflow.plans.case import MixOptions, open_case  # loads torch
        from nanoflow.plans.show import show as print_plan

        mix = MixOptions(decode, context, _numbers(prompts))
        print_plan(open_case(file, model, mix, layers=layers, tensor=tensor), Console())


@app.command()
def check(
    file: PlanArgument,
    model: ModelOption = None,
    layers: LayersOption = None,
    tensor: TensorOption = None,
    debug: DebugOption = False,
) -> None:
    """Check the plan against the model, and against this machine's GPU if there is one; nothing is run."""
    with mistakes_as_messages(debug):
        from nanoflow.plans.case import open_case  # loads torch
        from nanoflow.plans.check import check as check_plan

        findings = check_plan(open_case(file, model, layers=layers, tensor=tensor))
    for finding in findings:
        typer.echo(f"{finding.name:<10} {finding.text}")
    typer.echo(f"{file} can run")


@app.command("list")
def list_plans(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="A run's YAML: say which plans it would take.")
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Show the stored plans, those that tuning stored here and those of the package, and which of them serve."""
    with mistakes_as_messages(debug):
        loaded = None if config is None else load_config(config)
        from nanoflow.plans.stored import judge_stored, print_stored  # loads torch

        here, verdicts = judge_stored(loaded)
        print_stored(here, verdicts, Console())


@app.command()
def plot(
    file: PlanArgument,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="x.png or x.svg; by default both, named after the plan."),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", metavar="FILE", help="What `plan trace` measured, instead of an estimate.")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Beside it, the same in sequence.")] = False,
    model: ModelOption = None,
    layers: LayersOption = None,
    tensor: TensorOption = None,
    decode: DecodeOption = None,
    context: ContextOption = None,
    prompts: PromptsOption = None,
    debug: DebugOption = False,
) -> None:
    """Draw one period: lanes over time, and below it SMs in use, TFLOP/s and GB/s."""
    with mistakes_as_messages(debug):
        from nanoflow.plans.case import MixOptions, open_case  # loads torch
        from nanoflow.plans.plot import plot_plan

        mix = MixOptions(decode, context, _numbers(prompts))
        if trace is not None and (layers is not None or mix != MixOptions()):
            raise InputError("--trace has its own mix and layers: leave --layers, --decode, --context, --prompts out")
        case = open_case(file, model, mix, layers=layers, tensor=tensor)
        for path in plot_plan(case, out, trace=trace, compare=compare):
            typer.echo(f"saved {short(path.absolute())}")


@app.command()
def trace(
    file: PlanArgument,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="By default the plan's name, with .trace.json.")
    ] = None,
    device: Annotated[str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")] = "auto",
    iterations: Annotated[
        int | None, typer.Option("--iterations", metavar="N", min=1, help="How many are timed.")
    ] = None,
    model: ModelOption = None,
    layers: LayersOption = None,
    tensor: TensorOption = None,
    decode: DecodeOption = None,
    context: ContextOption = None,
    prompts: PromptsOption = None,
    debug: DebugOption = False,
) -> None:
    """Run the plan here with random weights, and write what was measured as a trace for Perfetto or Chrome."""
    with mistakes_as_messages(debug):
        from nanoflow.plans.case import MixOptions, open_case  # loads torch
        from nanoflow.plans.trace import trace_plan

        target = out or Path(f"{file.stem}.trace.json")
        case = open_case(file, model, MixOptions(decode, context, _numbers(prompts)), layers=layers, tensor=tensor)
        info = trace_plan(case, target, device=device, iterations=iterations)
    typer.echo(f"{info.mix} on {info.device}: {info.seconds * 1e3:,.2f} ms, the median of {info.iterations} iterations")
    typer.echo(f"saved {short(target.absolute())}; open it with ui.perfetto.dev, or draw it with plan plot --trace")


@app.command()
def ablate(
    file: PlanArgument,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Where to save all that was measured, as JSON.")
    ] = None,
    device: Annotated[str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")] = "auto",
    seconds: Annotated[
        float, typer.Option("--seconds", metavar="S", min=0.01, help="Of a block: one plan, again and again.")
    ] = 5.0,
    pairs: Annotated[int, typer.Option("--pairs", metavar="N", min=1, help="Blocks of each plan, in turn.")] = 8,
    model: ModelOption = None,
    layers: LayersOption = None,
    tensor: TensorOption = None,
    decode: DecodeOption = None,
    context: ContextOption = None,
    prompts: PromptsOption = None,
    debug: DebugOption = False,
) -> None:
    """Measure here what the plan is worth: sequential, its nano-batches without overlap, and with it."""
    with mistakes_as_messages(debug):
        from nanoflow.plans.ablation import ablate as measure, print_ablation, save_ablation  # loads torch
        from nanoflow.plans.case import MixOptions, open_case
        from nanoflow.report import versions

        case = open_case(file, model, MixOptions(decode, context, _numbers(prompts)), layers=layers, tensor=tensor)
        if out is not None:
            save_ablation(None, out)  # before minutes of measuring: whether it can be written

        def progress(name: str, milliseconds: float, watts: float | None) -> None:
            typer.echo(f"{name:<12} {milliseconds:9.3f} ms{'' if watts is None else f', {watts:.0f} W'}", err=True)

        found = measure(
            case,
            device=device,
            seconds=seconds,
            pairs=pairs,
            progress=lambda name, block: progress(name, block.seconds * 1e3, block.watts),
        )
        print_ablation(found, Console())
        if out is not None:
            save_ablation({"versions": versions(), **found.to_dict()}, out)
            typer.echo(f"saved {short(out.absolute())}")


def _numbers(text: str | None) -> tuple[int, ...] | None:
    """Whole numbers, separated by commas."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    for part in parts:
        if not part.isdecimal():
            raise InputError(f"--prompts {text}: {part!r} is no whole number; write tokens such as 512,512,168")
    return tuple(map(int, parts))
