"""Charts as HTML: an SVG that stretches with the page, and labels beside it that do not.

Text inside an SVG shrinks with it until a phone shows specks. So the SVG holds lines and areas only, in a box of
100 x 100 units that fills whatever width there is; its lines keep their thickness, and axes are HTML. Every chart has a
description for those who cannot see it and its values as a table.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from nanoflow.reports.figures import write_number

__all__ = ["Line", "Scale", "bar", "chart", "time_scale"]

TABLE_ROWS = 20
TICKS = 4


@dataclass(frozen=True)
class Line:
    """One line, or one layer of a stack. `colour` is a number from 1 to 8, or 0 for what is no more than background."""

    name: str
    colour: int
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Scale:
    """An axis from 0 to `end`. Values are divided by `unit_size` to be shown in `unit`."""

    name: str
    unit: str
    end: float
    unit_size: float = 1.0

    @property
    def ticks(self) -> list[float]:
        """Round numbers from 0 on, about `TICKS` of them, in the values' own unit."""
        span = self.end / self.unit_size
        rough = span / TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(size * power for size in (1, 2, 2.5, 5, 10) if size * power >= rough * 0.999)
        return [count * step * self.unit_size for count in range(int(span / step * 1.0001) + 1)]

    def text(self, value: float) -> str:
        """A value in the axis' unit."""
        shown = value / self.unit_size
        return f"{shown * 100:.0f}%" if self.unit == "%" else write_number(shown)

    def place(self, value: float) -> float:
        """Where a value is, from 0 to 100."""
        return 100 * min(max(value / self.end, 0.0), 1.0)

    @property
    def title(self) -> str:
        return self.name if self.unit in ("", "%") else f"{self.name}, {self.unit}"


def time_scale(name: str, seconds: float) -> Scale:
    """An axis of time in whatever unit suits its length."""
    for unit, size, most in (("ms", 1e-3, 1.0), ("s", 1.0, 600.0), ("min", 60.0, 4 * 3600.0)):
        if seconds <= most:
            return Scale(name, unit, seconds, size)
    return Scale(name, "h", seconds, 3600.0)


def chart(title: str, about: str, lines: Sequence[Line], x: Scale, y: Scale, *, stacked: bool = False) -> Markup:
    """Lines over a common axis, or layers that add up if `stacked`; these must then share their x values."""
    shapes = _layers(lines, x, y) if stacked else [_line(line, x, y) for line in lines]
    grid = "".join(f'<path class="grid" d="M0 {100 - y.place(tick):.3f}H100"/>' for tick in y.ticks)
    y_labels = "".join(f'<span style="bottom:{y.place(tick):.2f}%">{escape(y.text(tick))}</span>' for tick in y.ticks)
    x_labels = "".join(f'<span style="left:{x.place(tick):.2f}%">{escape(x.text(tick))}</span>' for tick in x.ticks)
    legend = "".join(f'<li><i class="c{line.colour}"></i>{escape(line.name)}</li>' for line in lines)
    spoken = f"{title}. {about} {y.title} over {x.title}: " + "; ".join(_spoken(line, x, y) for line in lines)
    return Markup(
        f'<figure class="chart"><figcaption><strong>{escape(title)}</strong> <span>{escape(about)}</span></figcaption>'
        f"{f'<ul class=legend>{legend}</ul>' if len(lines) > 1 else ''}"
        f'<div class="axis-name">{escape(y.title)}</div>'
        f'<div class="plot"><div class="y" aria-hidden="true">{y_labels}</div>'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{escape(spoken)}">'
        f"{grid}{''.join(shapes)}</svg>"
        f'<div class="x" aria-hidden="true">{x_labels}</div></div>'
        f'<div class="axis-name right">{escape(x.title)}</div>{_table(lines, x, y)}</figure>'
    )


def bar(name: str, share: float, text: str, colour: int) -> Markup:
    """A bar of `share` of the full width, with a name before it and a text behind."""
    width = 100 * min(max(share, 0.0), 1.0)
    return Markup(
        f'<div class="bar"><span class="name">{escape(name)}</span><span class="track">'
        f'<i class="c{colour}" style="width:{width:.2f}%"></i></span><span class="text">{escape(text)}</span></div>'
    )


def _line(line: Line, x: Scale, y: Scale) -> str:
    if not line.points:
        return ""
    places = " ".join(f"{x.place(across):.3f},{100 - y.place(up):.3f}" for across, up in line.points)
    return f'<polyline class="line c{line.colour}" points="{places}"/>'


def _layers(lines: Sequence[Line], x: Scale, y: Scale) -> list[str]:
    below = [0.0] * len(lines[0].points)
    shapes = []
    for line in lines:
        above = [low + up for low, (_, up) in zip(below, line.points, strict=True)]
        across = [x.place(at) for at, _ in line.points]
        edge = [f"{at:.3f},{100 - y.place(up):.3f}" for at, up in zip(across, above, strict=True)]
        back = [f"{at:.3f},{100 - y.place(up):.3f}" for at, up in zip(across, below, strict=True)]
        if any(up for _, up in line.points):
            shapes.append(f'<polygon class="area c{line.colour}" points="{" ".join(edge + back[::-1])}"/>')
        below = above
    return shapes


def _spoken(line: Line, x: Scale, y: Scale) -> str:
    if not line.points:
        return f"{line.name}: no values"
    at, most = max(line.points, key=lambda point: point[1])
    mean = sum(up for _, up in line.points) / len(line.points)
    unit = f" {x.unit}" if x.unit else ""
    return f"{line.name}: {y.text(mean)} on average, at most {y.text(most)} at {x.text(at)}{unit}"


def _table(lines: Sequence[Line], x: Scale, y: Scale) -> str:
    """Some of the values, the same places of every line."""
    longest = max(lines, key=lambda line: len(line.points))
    count = len(longest.points)
    if not count:
        return ""
    picked = sorted({round(row * (count - 1) / max(1, TABLE_ROWS - 1)) for row in range(min(TABLE_ROWS, count))})
    header = "".join(f"<th scope=col>{escape(name)}</th>" for name in (x.title, *(line.name for line in lines)))
    rows = []
    for place in picked:
        cells = [x.text(longest.points[place][0])]
        cells += [y.text(line.points[place][1]) if place < len(line.points) else "" for line in lines]
        rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    return (
        f"<details><summary>Values</summary><div class=scroll><table><tr>{header}</tr>{''.join(rows)}"
        "</table></div></details>"
    )
