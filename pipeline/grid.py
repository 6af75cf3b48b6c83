"""The schedule of a plan as a text grid: one row a lane, one cell a nano-op, time going to the right.

Contract: a grid is lines of (text, kind) pieces; the kind says what a piece stands for (a resource, ``marked``, or
nothing), so that a terminal may colour what plain text shows by its characters. Lanes of one stage share the axis: what
stands above each other runs at the same time. Without times, cells are as wide as their names and only their order in
the lane means something.

Pseudo-code of the axis::

    moments  = starts and ends of all cells
    position = for each moment, in order: the one before + scale * time between them,
               or as far behind a cell's start as its name is long, if that is more
    scale    = the largest with which the last position is within the width
    names    = abbreviated, the one that stretches the axis most first, until the scale is most of what it could be
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

__all__ = ["FILLS", "Block", "Cell", "Line", "Name", "plain", "render_grid", "render_order"]

Piece = tuple[str, str]
Line = list[Piece]

FILLS = {"compute": "=", "memory": "~", "network": "-"}
"""What fills a cell behind its name, by the operation's resource. Idle time is blank."""
CUT = "…"
"""Stands where a cell reaches over the edge of what is shown."""
PROPORTIONAL = 0.6
"""Names are abbreviated until this share of the width, or more, is given by time and not by the names."""


@dataclass(frozen=True)
class Name:
    """A nano-op's name in two parts, of which the operation's may be abbreviated: ``qkv`` and ``.a@1``."""

    op: str
    rest: str = ""


@dataclass(frozen=True)
class Cell:
    """One nano-op. `start` and `end` are on the block's axis and may reach over its edges."""

    name: Name
    resource: str = ""
    start: float = 0.0
    end: float = 0.0
    marked: bool = False
    waits: tuple[Name, ...] = ()
    """What of other lanes it waits for."""

    def text(self, short: Mapping[str, str]) -> str:
        """What stands in the cell."""
        name = _write(self.name, short)
        return f">>{name}<<" if self.marked else name


@dataclass(frozen=True)
class Block:
    """The rows of one stage, each lane with its heading, on an axis from 0 to `length`."""

    title: str
    lanes: Mapping[str, Sequence[Cell]]
    length: float = 0.0
    begin: float = 0.0
    """What the ruler says at the axis' 0."""


def plain(lines: Iterable[Line]) -> str:
    """The grid as plain text."""
    return "\n".join("".join(text for text, _ in line).rstrip() for line in lines)


def render_order(blocks: Sequence[Block], width: int) -> list[Line]:
    """The grid without times: each lane's cells in order, on as many lines as they need."""
    lines: list[Line] = []
    for block in blocks:
        lines.append([(f"  {block.title}:", "")])
        head = max((len(lane) for lane in block.lanes), default=0)
        for lane, cells in block.lanes.items():
            line: Line = [(f"    {lane:<{head}} ", "")]
            used = 0
            for cell in cells:
                text = cell.text({})
                if used and head + 5 + used + len(text) + 2 > width:
                    lines.append([*line, ("|", "")])
                    line, used = [(f"    {'':<{head}} ", "")], 0
                line += [("|", ""), (text, "marked" if cell.marked else cell.resource)]
                used += len(text) + 1
            lines.append([*line, ("|", "")] if used else line)
    return lines


def render_grid(blocks: Sequence[Block], width: int) -> list[Line]:
    """The grid with times, at most `width` columns wide (more only if a single name is wider)."""
    head = max((len(lane) for block in blocks for lane in block.lanes), default=0) + 3
    room = max(width - head - 1, 20)
    short = _abbreviate(blocks, room)
    lines: list[Line] = []
    for block in blocks:
        axis = _axis(block, short, room)
        lines.append([(block.title, "")])
        for first, last in _bands(axis, room):
            lines += _rows(block, axis, short, head, first, last)
    kinds = {cell.resource for block in blocks for cells in block.lanes.values() for cell in cells}
    legend = [f"{fill} {kind}" for kind, fill in FILLS.items() if kind in kinds]
    if any(cell.waits for block in blocks for cells in block.lanes.values() for cell in cells):
        legend.append("<- waits for")
    lines.append([("  ".join(["blank idle", *legend]), "")])
    if short:
        lines.append([("  ".join(f"{letters} {op}" for op, letters in sorted(short.items())), "")])
    return lines


@dataclass
class _Axis:
    """Columns of the moments of a block."""

    moments: list[float] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    scale: float = 0.0
    """Columns that a unit of time gets where no name needs more."""

    def at(self, moment: float) -> int:
        """The column of one of `moments`."""
        nearest = min(range(len(self.moments)), key=lambda place: abs(self.moments[place] - moment))
        return self.columns[nearest]


def _write(name: Name, short: Mapping[str, str]) -> str:
    return short.get(name.op, name.op) + name.rest


def _clipped(block: Block, cell: Cell) -> tuple[float, float]:
    return max(cell.start, 0.0), min(cell.end, block.length)


def _axis(block: Block, short: Mapping[str, str], room: int) -> _Axis:
    """The axis with the largest scale that fits `room`; if none does, that of the names alone."""
    cells = [cell for cells in block.lanes.values() for cell in cells]
    exact = sorted({moment for cell in cells for moment in _clipped(block, cell)} | {0.0, block.length})
    # Moments that only rounding tells apart are one.
    moments = [m for m, before in zip(exact, [-1.0, *exact], strict=False) if m - before > block.length * 1e-9]
    place = {moment: min(range(len(moments)), key=lambda i: abs(moments[i] - moment)) for moment in exact}
    ending: dict[int, list[tuple[int, int]]] = {}
    for cell in cells:
        start, end = (place[moment] for moment in _clipped(block, cell))
        cut = (cell.start < 0) + (cell.end > block.length)
        ending.setdefault(end, []).append((start, len(cell.text(short)) + 1 + cut))

    def positions(scale: float) -> list[float]:
        result = [0.0]
        for index, (before, moment) in enumerate(pairwise(moments), start=1):
            least = [result[start] + needed for start, needed in ending.get(index, ())]
            result.append(max([result[-1] + scale * (moment - before), *least]))
        return result

    low, high = 0.0, room / block.length if block.length else 0.0
    if positions(low)[-1] <= room:
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if positions(middle)[-1] <= room else (low, middle)
    return _Axis(moments, [int(position + 1e-6) for position in positions(low)], low)


def _abbreviate(blocks: Sequence[Block], room: int) -> dict[str, str]:
    """Short forms of as many operations as it takes; the same in all blocks."""
    ops = {cell.name.op for block in blocks for cells in block.lanes.values() for cell in cells}
    letters = _short_forms(ops)
    short: dict[str, str] = {}
    while len(short) < len(letters):
        poor = [
            block
            for block in blocks
            if block.length and _axis(block, short, room).scale < PROPORTIONAL * room / block.length
        ]
        if not poor:
            break
        surplus = dict.fromkeys(letters, 0.0)
        for block in poor:
            for cell in (cell for cells in block.lanes.values() for cell in cells):
                start, end = _clipped(block, cell)
                own = room * (end - start) / block.length
                if cell.name.op in letters and cell.name.op not in short:
                    saved = len(cell.name.op) - len(letters[cell.name.op])
                    surplus[cell.name.op] += min(saved, max(0.0, len(cell.text(short)) + 1 - own))
        worst = max(surplus, key=lambda op: (surplus[op], op))
        if not surplus[worst]:
            break
        short[worst] = letters[worst]
    return short


def _short_forms(ops: Iterable[str]) -> dict[str, str]:
    """Short forms of names, no two alike and none another's name: the first letter of every word, or of one word two,
    and more where it takes more to tell them apart."""
    names = sorted(ops)
    result: dict[str, str] = {}
    for op in names:
        words = [word for word in op.split("_") if word]
        for more in range(1, len(op)):
            letters = "".join(word[:more] for word in words) if len(words) > 1 else op[: more + 1]
            if len(letters) > len(op) - 2:
                break  # not worth a line in the legend
            if letters not in result.values() and letters not in names:
                result[op] = letters
                break
    return result


def _bands(axis: _Axis, room: int) -> list[tuple[int, int]]:
    """Stretches of at most `room` columns, which end where a cell does if they can."""
    last = axis.columns[-1]
    bands = []
    first = 0
    while first < last:
        end = max((column for column in axis.columns if first < column <= first + room), default=first + room)
        bands.append((first, min(end, last)))
        first = end
    return bands


def _rows(block: Block, axis: _Axis, short: Mapping[str, str], head: int, first: int, last: int) -> list[Line]:
    """The lanes of a block between two columns, each with what it waits for below it, and the ruler."""
    lines: list[Line] = []
    for lane, cells in block.lanes.items():
        row = _Row(last - first + 1)
        notes: list[tuple[int, str]] = []
        for cell in cells:
            start, end = (axis.at(moment) for moment in _clipped(block, cell))
            if max(start, first) >= min(end, last):
                continue
            row.draw(
                cell,
                cell.text(short),
                (max(start, first) - first, min(end, last) - first),
                (cell.start < 0 or start < first, cell.end > block.length or end > last),
            )
            if cell.waits and start >= first and cell.start >= 0:
                notes.append((start - first, "<- " + ", ".join(_write(name, short) for name in cell.waits)))
        lines.append([(f"  {lane:<{head - 2}}", ""), *row.line()])
        lines += [[(" " * head + note, "")] for note in _pack(notes)]
    lines.append([(f"  {'us':<{head - 2}}{_ruler(block, axis, first, last)}", "")])
    return lines


class _Row:
    """The characters of a lane, and what each stands for."""

    def __init__(self, width: int) -> None:
        self.characters = [" "] * width
        self.kinds = [""] * width

    def draw(self, cell: Cell, text: str, columns: tuple[int, int], cut: tuple[bool, bool]) -> None:
        """A cell between two borders, which it shares with its neighbours."""
        left, right = columns
        inside = text[: right - left - 1].ljust(right - left - 1, FILLS.get(cell.resource, " "))
        self.characters[left : right + 1] = [CUT if cut[0] else "|", *inside, CUT if cut[1] else "|"]
        self.kinds[left + 1 : right] = ["marked" if cell.marked else cell.resource] * len(inside)

    def line(self) -> Line:
        together = groupby(zip(self.characters, self.kinds, strict=True), key=lambda pair: pair[1])
        return [("".join(character for character, _ in group), kind) for kind, group in together]


def _ruler(block: Block, axis: _Axis, first: int, last: int) -> str:
    """Microseconds at as many of the moments between two columns as have room; the last one has."""
    digits = next((count for count, least in ((0, 50e-6), (1, 5e-6)) if block.length >= least), 2)
    marks = [
        (column - first, f"{(moment + block.begin) * 1e6:,.{digits}f}")
        for moment, column in zip(axis.moments, axis.columns, strict=True)
        if first <= column <= last
    ]
    column, text = marks[-1]
    end = min(column, last - first + 1 - len(text)), text  # within the width
    inner = [(column, text) for column, text in marks[:-1] if column + len(text) + 2 <= end[0]]
    return _pack([*inner, end])[0]


def _pack(notes: Sequence[tuple[int, str]]) -> list[str]:
    """Texts at columns, in as few lines as hold them side by side, two blanks apart; what cannot stand in the first
    line goes to the next."""
    lines: list[str] = []
    for column, note in notes:
        for index, line in enumerate(lines):
            if not line or len(line) + 2 <= column:
                lines[index] = line.ljust(column) + note
                break
        else:
            lines.append(" " * column + note)
    return lines
