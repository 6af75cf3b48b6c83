"""Draw the pictures of lanes in docs/architecture.md.

    python -m benchmarks.lane_pictures      # docs/lanes.svg and docs/stages.svg

Streams, order and events are those that the executor uses (`nanoflow.pipeline.lanes.launch_order`); widths are those of
the names. A nano-op stands as far left as its stream and its events allow.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nanoflow.pipeline.lanes import BEGIN, Launch, LaunchOrder, launch_order
from nanoflow.pipeline.partitions import allot
from nanoflow.pipeline.plan import Plan
from nanoflow.pipeline.program import Program, compile_program
from nanoflow.plans.case import open_graph

DOCS = Path(__file__).parent.parent / "docs"
HEAD = """
model: llama-3-8b
sms: 132
capacity: 1280
nano_batches:
  a: {decode: 0.5, prefill: 0.5, rows: 640}
  b: {decode: 0.5, prefill: 0.5, rows: 640}
partitions: {split: [92, 40]}
period:
"""
PLANS = {
    "lanes.svg": """
- split:
    compute: [o.a, gate_up.a, down.a, qkv.a@1, o.b, gate_up.b, down.b, qkv.b@1]
    memory: [decode_attention.b, decode_attention.a@1]
""",
    "stages.svg": """
- whole:
    compute: [qkv, decode_attention.a]
- split:
    compute: [o.a, gate_up.a, down.a]
    memory: [decode_attention.b]
- whole:
    compute: [o.b, gate_up.b, down.b]
""",
}
TITLES = {
    "lanes.svg": "One iteration of a model with two layers: one stage, b half a layer behind a",
    "stages.svg": "One iteration of a model with two layers: b's attention beside a's products, the rest on all SMs",
}
LAYERS = 2
GROUPS, OVER, GROUP = 15, 12, 8
"""SMs of the H100 that plans were measured on."""
FILL = {"compute": "#cfe0f2", "memory": "#f6dcb4", "network": "#cfe8d2"}
SHORT = {"input_layernorm", "rope_append", "prefill_attention", "add_norm", "add"}
"""Drawn without a name."""
LEFT, TOP, ROW, BOX, LETTER = 132, 56, 74, 36, 6.0
SIDE = 96
"""Width of what comes before and after the layers."""
LEGEND = (
    "narrow: norms, rope with the KV append, prefill attention, additions; below a name: its layer; arrows: an event "
    "is recorded, and another stream waits for it; widths mean nothing"
)


@dataclass(frozen=True)
class Box:
    """One nano-op on the picture."""

    launch: Launch
    start: float
    end: float


def program_of(name: str) -> Program:
    """The program that a picture shows."""
    plan = Plan.loads(HEAD.lstrip("\n") + PLANS[name].lstrip("\n"))
    graph = open_graph(None, plan, name)[2]
    return compile_program(plan, replace(graph, layers=LAYERS))


def boxes(program: Program, order: LaunchOrder, begin: float) -> list[Box]:
    """Every step, as far left as it can be."""
    ends = {BEGIN: begin}
    streams: dict[int, float] = {}
    found = []
    for launch in order.launches:
        after = [streams.get(launch.stream, begin), *(ends[step] for step in launch.waits)]
        start = max(after) + (4 if launch.waits else 0)
        name = _name(program, launch.step)
        end = start + (LETTER * len(name) + 8 if name else 6)
        ends[launch.step] = streams[launch.stream] = end
        found.append(Box(launch, start, end))
    return found


def draw(name: str) -> str:
    """The picture, as SVG."""
    program = program_of(name)
    order = launch_order(program)
    # The main stream is in the middle: what goes from or to it crosses no other.
    rows = [1, 0, *range(2, len(order.places))]
    strip = 70 if name == "lanes.svg" else 0
    height = {stream: TOP + strip + ROW * row for row, stream in enumerate(rows)}
    placed = boxes(program, order, LEFT + SIDE)
    after = max(box.end for box in placed) + 14
    width, depth = after + SIDE + 16, TOP + strip + ROW * len(rows) + 10
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {depth}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="11">',
        '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="6" markerHeight="6" orient="auto">'
        '<path d="M 0 0 L 10 5 L 0 10 z" fill="#a5533b"/></marker></defs>',
        f'<rect width="{width:.0f}" height="{depth}" fill="white"/>',
        _text(16, 26, TITLES[name], size=15, bold=True),
    ]
    if strip:
        lines += _sms(program.plan, next(parts for parts, _ in order.places if parts))
    for stream, (parts, part) in enumerate(order.places):
        y = height[stream]
        sms = f"{parts[part]} SMs" if parts else f"all {program.plan.sms} SMs"
        label = _lane(program, order, stream) if parts else "main stream"
        lines.append(_text(16, y + 16, label, size=13, bold=True))
        lines.append(_text(16, y + 31, sms))
        lines.append(f'<path d="M {LEFT} {y + BOX / 2} H {width - 16:.0f}" stroke="#ccc"/>')
    lines += _side(LEFT, height[0], ("metadata,", "embedding,", "prepare"))
    lines += _side(after, height[0], ("head,", "sampling"))
    for box in placed:
        step = program.steps[box.launch.step]
        fill = FILL[program.graph.operation(step.nano_op.op).resource]
        y, text = height[box.launch.stream], _name(program, box.launch.step)
        lines.append(_rect(box.start, y, box.end - box.start, fill))
        if text:
            middle = (box.start + box.end) / 2
            lines.append(_text(middle, y + 16, text, middle=True))
            lines.append(_text(middle, y + 30, str(step.nano_op.layer), middle=True, colour="#777"))
    lines += _events(placed, order, height, after)
    x = 16.0
    for resource in ("compute", "memory"):
        lines.append(
            f'<rect x="{x:.0f}" y="{depth - 23}" width="10" height="10" fill="{FILL[resource]}" stroke="#555"/>'
        )
        lines.append(_text(x + 14, depth - 14, resource))
        x += 68
    lines.append(_text(x, depth - 14, LEGEND))
    return "\n".join([*lines, "</svg>", ""])


def _events(placed: Sequence[Box], order: LaunchOrder, height: dict[int, int], after: float) -> Iterator[str]:
    """An arrow from where each event is recorded to where it is waited for."""
    ends = {BEGIN: (LEFT + SIDE, 0)} | {box.launch.step: (box.end, box.launch.stream) for box in placed}
    waits = [(ends[step], (box.start, box.launch.stream)) for box in placed for step in box.launch.waits]
    waits += [(ends[step], (after, 0)) for step in order.ends]
    for (x, stream), (to, other) in waits:
        down = height[other] > height[stream]
        y, until = height[stream] + (BOX if down else 0), height[other] + (0 if down else BOX)
        yield f'<path d="M {x:.0f} {y} L {to:.0f} {until}" stroke="#a5533b" marker-end="url(#tip)"/>'
        yield f'<circle cx="{x:.0f}" cy="{y}" r="2.5" fill="#a5533b"/>'


def _sms(plan: Plan, parts: tuple[int, ...]) -> Iterator[str]:
    """The device's SMs, dealt to the parts of a partition."""
    assert plan.sms is not None
    x = float(LEFT)
    yield _text(16, TOP + 16, f"{plan.sms} SMs", size=13, bold=True)
    yield _text(16, TOP + 31, "in one split")
    for (count, rest), sms, fill in zip(allot(parts, GROUPS, OVER, GROUP), parts, FILL.values(), strict=False):
        begin = x
        for size in [GROUP] * count + [OVER] * rest:
            for number in range(size):
                left, top = x + 9 * (number // 2), TOP + 4 + 9 * (number % 2)
                yield f'<rect x="{left:.0f}" y="{top}" width="8" height="8" fill="{fill}" stroke="#777"/>'
            x += 9 * (size // 2) + 5
        made = f"{count} groups of {GROUP}{f' and the {OVER} in none' if rest else ''}"
        yield _text(begin, TOP + 36, f"{sms} SMs: {made}")
        x += 20


def _side(x: float, y: int, words: Sequence[str]) -> Iterator[str]:
    yield _rect(x, y, SIDE, "#eeeeee")
    for number, line in enumerate(words):
        yield _text(x + SIDE / 2, y + 21 + 11 * (number - (len(words) - 1) / 2), line, middle=True, size=10)


def _lane(program: Program, order: LaunchOrder, stream: int) -> str:
    """The lane that a stream is for."""
    first = next(launch for launch in order.launches if launch.stream == stream)
    return program.steps[first.step].lane


def _name(program: Program, step: int) -> str:
    """A nano-op's name without its layer; nothing for those that are too short to be named."""
    return "" if program.steps[step].nano_op.op in SHORT else program.name(step).partition(" ")[0]


def _rect(x: float, y: int, width: float, fill: str) -> str:
    return f'<rect x="{x:.0f}" y="{y}" width="{width:.0f}" height="{BOX}" fill="{fill}" stroke="#555"/>'


def _text(
    x: float, y: float, text: str, *, size: float = 11, bold: bool = False, middle: bool = False, colour: str = "#222"
) -> str:
    anchor = ' text-anchor="middle"' if middle else ""
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}" fill="{colour}"{anchor}{weight}>{text}</text>'


def main() -> None:
    for name in PLANS:
        (DOCS / name).write_text(draw(name), encoding="utf-8")


if __name__ == "__main__":
    main()
