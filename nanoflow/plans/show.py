"""``nanoflow plan show``: what a plan says, and one period of it as a text grid."""

from collections.abc import Collection

from rich.console import Console
from rich.text import Text

from nanoflow.pipeline.grid import Block, Cell, Line, Name, render_grid
from nanoflow.pipeline.plan import Plan
from nanoflow.pipeline.split import split_rows
from nanoflow.plans.case import PlanCase
from nanoflow.search.simulate import Simulation
from nanoflow.search.timeline import Span, Timeline

__all__ = ["period_grid", "plan_lines", "print_grid", "show"]

STYLES = {"compute": "blue", "memory": "yellow", "network": "green", "marked": "bold reverse red"}
NARROWEST, WIDEST, WITHOUT_TERMINAL = 100, 160, 120


def show(case: PlanCase, console: Console) -> None:
    """Print the plan, its numbers and one period."""
    for line in plan_lines(case):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print()
    print_grid(period_grid(case.timeline, grid_width(console)), console)
    console.print()
    for line in summary_lines(case):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def grid_width(console: Console) -> int:
    """Columns for a grid on this console."""
    return min(max(console.width, NARROWEST), WIDEST) if console.is_terminal else WITHOUT_TERMINAL


def print_grid(lines: list[Line], console: Console) -> None:
    """Print a grid, coloured by resource where the console has colours."""
    for line in lines:
        text = Text.assemble(*((piece, STYLES.get(kind, "")) for piece, kind in line))
        text.rstrip()
        console.print(text, soft_wrap=True)


def plan_lines(case: PlanCase) -> list[str]:
    """The plan's own numbers."""
    plan = case.plan
    for_whom = f" for {plan.model}" if plan.model else ""
    where = f" on {plan.gpu}" if plan.gpu else ""
    least = f", for batches of {plan.least_rows:,} rows or more" if plan.least_rows else ""
    lines = [f"{case.file}{for_whom}{where}: at most {plan.capacity:,} rows{least}", ""]
    decode, prefill = split_rows(plan, case.mix.decode, sum(case.mix.prompts))
    table = [("nano-batch", "decode", "prompts", "rows", "here")]
    for nano_batch, rows, tokens in zip(plan.nano_batches, decode, prefill, strict=True):
        here = f"{rows:,} decode + {tokens:,} prompt rows"
        shares = (str(nano_batch.decode), str(nano_batch.prefill))
        table.append((nano_batch.name, *shares, f"{nano_batch.rows:,}", here))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    lines.append("")
    for index, stage in enumerate(plan.period):
        lines.append(f"{'stages' if not index else '':<10} {stage_text(plan, index, stage.partition)}")
    if case.graph.ranks > 1:
        lines.append(f"{'sharding':<10} {plan.sharding}")
    if plan.kernels:
        lines.append(f"{'kernels':<10} {', '.join(f'{op}: {kernel}' for op, kernel in plan.kernels.items())}")
    if plan.mix is not None:
        lines.append(f"{'mix':<10} {plan.mix}")
    if plan.measured:
        lines.append(f"{'measured':<10} {', '.join(f'{key}: {value}' for key, value in plan.measured.items())}")
    return lines


def stage_text(plan: Plan, stage: int, partition: str) -> str:
    """A stage's partition and its lanes' SMs."""
    parts = [(lane, plan.lane_sms(stage, lane)) for lane in plan.period[stage].lanes]
    if any(sms is None for _, sms in parts):
        shared = "has" if len(parts) == 1 else "share"
        return f"{partition}: {', '.join(lane for lane, _ in parts)} {shared} the whole device"
    whole = "" if plan.sms is None else f" of {plan.sms}"
    return f"{partition}: {', '.join(f'{lane} {sms}' for lane, sms in parts)}{whole} SMs"


def summary_lines(case: PlanCase) -> list[str]:
    """What the estimate comes to, what it stands on, and the same in sequence."""
    found = case.simulation
    busy = ", ".join(f"{lane} {share:.0%}" for lane, share in found.timeline.busy().items())
    layers = f"{case.graph.layers} layer{'s' if case.graph.layers > 1 else ''}"
    if case.graph.ranks > 1:
        layers += f" on {case.graph.ranks} ranks"
    lines = [f"{case.model}, {layers}: {found.seconds * 1e3:,.2f} ms estimated, lanes busy: {busy}"]
    limit = case.device.ceilings.power_limit_watts
    under = "with no power limit known" if limit is None else f"under {limit:g} W"
    limited = f"{under}: {_limited(found)}"
    if len(case.program.lanes) > 1 or len(case.plan.nano_batches) > 1:
        sequential = case.sequential().simulation
        ratio = _times(sequential.seconds, found.seconds)
        lines.append(f"in sequence: {sequential.seconds * 1e3:,.2f} ms estimated, {ratio}")
        ratio = _times(sequential.limited_seconds, found.limited_seconds)
        limited += f"; in sequence {_limited(sequential)}, {ratio}"
    lines.append(limited)
    lines.append(f"mix: {case.mix}")
    if case.graph.ranks > 1 and case.device.rates_ceilings.link_bytes_per_second is None:
        lines.append("the link between ranks is not known: collectives take what their bytes take in memory")
    if case.device.profile_file is not None:
        lines.append(f"profile: {case.device.profile_file}")
        lines.append("(what operations take was measured; that lanes wait for each other costs nothing here)")
    else:
        lines.append(f"ceilings: {case.ceilings_text}")
        lines.append("(at best: launches cost nothing here, and tiles are all that keeps kernels from scaling)")
    return lines


def _limited(found: Simulation) -> str:
    joules = "" if found.joules is None else f" and {found.joules:,.2f} J"
    return f"{found.limited_seconds * 1e3:,.2f} ms{joules}"


def _times(one: float, other: float) -> str:
    return f"{one / other if other else 1.0:.2f} times as long"


def period_grid(timeline: Timeline, width: int, marked: Collection[int] = ()) -> list[Line]:
    """One period in steady state as a grid, with the steps in `marked` standing out."""
    period = timeline.period()
    names = {span.step: _name(span, period.layer) for span in timeline.spans}
    # What fails may lie outside of the period shown: the same nano-op of that period stands for it.
    same = {(span.op, span.nano_batch) for span in timeline.spans if span.step in marked}
    blocks = []
    for stage in sorted({span.stage for span in period.spans}):
        spans = [span for span in period.spans if span.stage == stage]
        several = len({span.stage for span in period.spans}) > 1
        begin = max(0.0, min(span.start for span in spans)) if several else 0.0
        end = min(period.seconds, max(span.end for span in spans)) if several else period.seconds
        lanes: dict[str, list[Cell]] = {}
        for lane in timeline.lanes:
            own = [span for span in spans if span.lane == lane]
            if own:
                cells = [
                    Cell(
                        names[span.step],
                        span.resource,
                        span.start - begin,
                        span.end - begin,
                        (span.op, span.nano_batch) in same,
                        tuple(names[wait] for wait in span.waits),
                    )
                    for span in own
                ]
                sms = f" {own[0].sms} SMs" if own[0].sms is not None else ""
                lanes[f"{lane}{sms}"] = cells
        blocks.append(Block(f"{spans[0].partition}, layer {period.layer}", lanes, end - begin, begin))
    return render_grid(blocks, width)


def _name(span: Span, layer: int) -> Name:
    return Name(span.op, span.label(layer).removeprefix(span.op))
