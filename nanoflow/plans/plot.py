"""``nanoflow plan plot``: one period of a plan as a picture, with what the device does at each moment below it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoflow.errors import InputError
from nanoflow.pictures import DPI, FORMATS, pyplot_here, save_picture
from nanoflow.pipeline.plan import Plan
from nanoflow.plans.case import PlanCase
from nanoflow.plans.chrome_trace import read_trace
from nanoflow.search.cost_model import Ceilings
from nanoflow.search.timeline import Span, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw", "plot_plan"]

RESOURCE_COLOURS = {"compute": "#4878a8", "memory": "#dd8f3d", "network": "#5d9e67"}
LANE_COLOURS = ("#35506b", "#e2b27a", "#8ab894", "#a58bc0")
PANEL_INCHES = 11.0
LETTER_INCHES = 0.062
"""Width of a letter of the names, which have `NAME_SIZE` points."""
NAME_SIZE = 7.5
SMALL_SIZE = 6.0
LANE_HEIGHT = 0.5


@dataclass(frozen=True)
class Panel:
    """One column of the picture: a period, its title, and the ceilings to draw, if they are known."""

    title: str
    below: str
    """What stands behind the name of the time axis."""
    timeline: Timeline
    ceilings: Ceilings | None = None


def plot_plan(case: PlanCase, out: Path | None, *, trace: Path | None = None, compare: bool = False) -> list[Path]:
    """Draw the plan and save the picture.

    Args:
        out: a .png or .svg file; None: both, in the working folder, named after the plan's file.
        trace: a measured timeline instead of the estimate.
        compare: put the sequential plan beside it, estimated.

    Raises InputError, ConfigError (without matplotlib), OutputError.
    """
    if out is not None and out.suffix.lower() not in FORMATS:
        raise InputError(f"--out {out}: pictures are {' or '.join(FORMATS)}; let the name end so")
    panels = [_panel(case, trace)]
    if compare:
        if trace is not None:
            raise InputError("--compare: a trace has no sequential iteration to stand beside; leave out one of the two")
        panels.append(_estimated(case.sequential(), "in sequence"))
    name = Path(case.file).stem
    targets = [out] if out is not None else [Path(f"{name}{suffix}") for suffix in FORMATS]
    with pyplot_here() as pyplot:
        figure = draw(panels, pyplot)
        for target in targets:
            save_picture(figure, target)
        pyplot.close(figure)
    return targets


def _panel(case: PlanCase, trace: Path | None) -> Panel:
    name = Path(case.file).name
    if trace is None:
        return _estimated(case, name)
    read = read_trace(trace)
    info = read.info
    if Plan.loads(info.plan, source=str(trace)) != case.plan:
        raise InputError(f"{trace}: otherData.plan: it is the trace of another plan than {case.file}; trace that one")
    if info.model != case.model or info.layers > case.graph.layers:
        raise InputError(
            f"{trace}: otherData.model: it was traced on {info.model} with {info.layers} layers, not on {case.model}: "
            f"give --model {info.model}"
        )
    timeline = read.timeline(case.with_layers(info.layers).program)
    about = f"{info.device}, one of {info.iterations} iterations of {info.seconds * 1e3:,.2f} ms"
    title = f"{name}: {_periods(timeline)}, measured\n{info.mix}"
    if info.device != case.device.name:
        return Panel(title, f"; {about}", timeline.period())
    below = f"; {about}; dashed: ceilings of {case.ceilings_text}"
    return Panel(title, below, timeline.period(), case.device.ceilings)


def _estimated(case: PlanCase, name: str) -> Panel:
    timeline = case.timeline
    title = f"{name}: {_periods(timeline)}, estimated\n{case.mix}"
    below = f"; dashed: ceilings of {case.ceilings_text}"
    return Panel(title, below, timeline.period(), case.device.ceilings)


def _periods(timeline: Timeline) -> str:
    """How long one is."""
    return f"one period, {timeline.period().seconds * 1e6:,.0f} us"


def draw(panels: Sequence[Panel], pyplot: Any) -> "Figure":
    """The picture of panels side by side, all on the same scale of time."""
    lanes = max(len(panel.timeline.lanes) for panel in panels)
    rates = 4 if any(panel.timeline.has_wire for panel in panels) else 3  # rows below the lanes
    figure: Figure = pyplot.figure(
        dpi=DPI, figsize=(PANEL_INCHES * len(panels), 0.1 + 1.4 * rates + 1.0 * lanes), layout="constrained"
    )
    grid = figure.add_gridspec(1 + rates, len(panels), height_ratios=[0.2 + 1.0 * lanes, *[1] * rates])
    end = max(panel.timeline.seconds for panel in panels) * 1e6 or 1.0
    rows: list[list[Axes]] = [[] for _ in range(1 + rates)]
    for column, panel in enumerate(panels):
        for row in range(1 + rates):
            axes = figure.add_subplot(
                grid[row, column],
                sharex=rows[0][column] if row else None,
                sharey=rows[row][0] if row and column else None,
            )
            rows[row].append(axes)
        _draw_lanes(rows[0][column], panel, end, lanes)
        timeline, sms = panel.timeline, panel.timeline.device_sms
        _draw_rate(rows[1][column], timeline, "sms", 1.0, "SMs in use" if sms > 1 else "in use", sms)
        ceilings = panel.ceilings
        flops, moved, sent = (
            (None, None, None)
            if ceilings is None
            else (ceilings.flops, ceilings.bytes_per_second, ceilings.link_bytes_per_second)
        )
        _draw_rate(rows[2][column], timeline, "flops_per_second", 1e12, "TFLOP/s", flops)
        _draw_rate(rows[3][column], timeline, "bytes_per_second", 1e9, "GB/s", moved)
        if rates == 4:
            _draw_rate(rows[4][column], timeline, "wire_bytes_per_second", 1e9, "wire GB/s", sent)
        for row in range(rates):
            rows[row][column].tick_params(labelbottom=False)
        rows[rates][column].set_xlabel(f"microseconds{panel.below}")
        rows[1][column].legend(loc="lower right", ncols=4, fontsize=7, framealpha=0.8)
    # The layout is found once: finding it again from where it stands would move it a little.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def _draw_lanes(axes: "Axes", panel: Panel, end: float, rows: int) -> None:
    """Nano-ops as bars, a row a lane of `rows` that have room, and arrows for what waits for another lane."""
    from matplotlib.patches import Patch

    timeline = panel.timeline
    used = [lane for lane in timeline.lanes if any(span.lane == lane for span in timeline.spans)] or [*timeline.lanes]
    height = {lane: len(used) - 1 - number for number, lane in enumerate(used)}
    letters = PANEL_INCHES * 0.92 / LETTER_INCHES / end  # a microsecond's width in letters
    small: dict[str, list[tuple[float, str]]] = {}
    for span in timeline.spans:
        start, stop = max(span.start, 0.0) * 1e6, min(span.end, timeline.seconds) * 1e6
        axes.barh(
            height[span.lane],
            stop - start,
            left=start,
            height=LANE_HEIGHT,
            color=RESOURCE_COLOURS.get(span.resource, "#888888"),
            edgecolor="white",
            linewidth=0.6,
        )
        label = span.label(timeline.layer)
        if len(label) <= (stop - start) * letters:
            axes.text((start + stop) / 2, height[span.lane], label, ha="center", va="center", size=NAME_SIZE, color="w")
        else:
            small.setdefault(span.lane, []).append(((start + stop) / 2, label))
    for lane, names in small.items():
        for line, at, text in _below(names, letters, end):
            low = height[lane] - LANE_HEIGHT / 2 - 0.04 - 0.13 * line
            side = "right" if at == end else "left"
            axes.text(at, low, text, ha=side, va="top", size=SMALL_SIZE, color="#333333")
    _draw_waits(axes, timeline, height)
    axes.set_ylim(len(used) - rows - 0.75, len(used) - 0.7)
    axes.set_xlim(0, end)
    axes.set_yticks(list(height.values()), [_heading(timeline, lane) for lane in height])
    axes.set_title(panel.title)
    resources = [name for name in RESOURCE_COLOURS if any(span.resource == name for span in timeline.spans)]
    patches = [Patch(color=RESOURCE_COLOURS[name], label=name) for name in resources]
    if patches:
        axes.legend(
            handles=patches,
            loc="lower right",
            ncols=3,
            fontsize=7,
            bbox_to_anchor=(1.0, 1.0),
            borderaxespad=0.0,
            frameon=False,
        )


def _heading(timeline: Timeline, lane: str) -> str:
    sms = sorted({span.sms for span in timeline.spans if span.lane == lane and span.sms is not None}, reverse=True)
    return f"{lane}\n{' or '.join(map(str, sms))} SMs" if sms else lane


def _below(names: Sequence[tuple[float, str]], letters: float, end: float) -> Iterator[tuple[int, float, str]]:
    """Names of bars that are too short for them: those close together as one text, the texts on as many lines as keep
    them apart. Gives line, place and text; one at `end` ends there."""
    groups: list[tuple[float, list[str]]] = []
    last = 0.0
    for place, name in sorted(names):
        if not groups or (place - last) * letters > 4:
            groups.append((place, []))
        groups[-1][1].append(name)
        last = place
    filled: list[float] = []
    for place, group in groups:
        text = ", ".join(group)
        width = len(text) * SMALL_SIZE / NAME_SIZE / letters
        left = min(place, end - width)
        line = next((number for number, until in enumerate(filled) if until < left), len(filled))
        filled[line : line + 1] = [left + width + 1 / letters]
        yield line, end if left < place else left, text


def _draw_waits(axes: "Axes", timeline: Timeline, height: dict[str, int]) -> None:
    by_step: dict[int, Span] = {span.step: span for span in timeline.spans}
    for span in timeline.spans:
        for wait in span.waits:
            before = by_step.get(wait)
            if before is None or span.start < 0 or before.end > timeline.seconds:
                continue
            way = 1 if height[span.lane] > height[before.lane] else -1
            axes.annotate(
                "",
                xy=(span.start * 1e6, height[span.lane] - way * LANE_HEIGHT / 2),
                xytext=(before.end * 1e6, height[before.lane] + way * LANE_HEIGHT / 2),
                arrowprops={"arrowstyle": "-|>", "color": "#555555", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 0},
            )


def _draw_rate(axes: "Axes", timeline: Timeline, attribute: str, unit: float, name: str, ceiling: float | None) -> None:
    """A quantity over time, the lanes' parts on top of each other, and its ceiling."""
    moments: list[float] = []
    values: dict[str, list[float]] = {lane: [] for lane in timeline.lanes}
    end = 0.0
    for segment in timeline.segments:
        if segment.start > end:
            moments.append(end * 1e6)
            for course in values.values():
                course.append(0.0)
        moments.append(segment.start * 1e6)
        loads = {load.lane: getattr(load, attribute) / unit for load in segment.loads}
        for lane, course in values.items():
            course.append(loads.get(lane, 0.0))
        end = segment.end
    moments.append(end * 1e6)
    below = [0.0] * len(moments)
    for number, (lane, course) in enumerate(values.items()):
        above = [low + value for low, value in zip(below, [*course, course[-1] if course else 0.0], strict=True)]
        colour = LANE_COLOURS[number % len(LANE_COLOURS)]
        axes.fill_between(moments, below, above, step="post", color=colour, linewidth=0, label=lane)
        below = above
    most = max([*below, 0.0])
    if ceiling is not None:
        axes.axhline(ceiling / unit, color="#b03030", linewidth=0.9, linestyle="--")
        text = f"{ceiling / unit:,.0f}"
        axes.annotate(text, (1.003, ceiling / unit), xycoords=("axes fraction", "data"), va="center", size=7)
        most = max(most, ceiling / unit)
    axes.set_ylim(0, max(most * 1.08, axes.get_ylim()[1] if axes.lines else 0.0))
    axes.set_ylabel(name)
