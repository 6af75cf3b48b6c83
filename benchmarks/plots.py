"""Draw the pictures of docs/performance.md from what is recorded.

    python -m benchmarks.plots      # docs/iteration.png and docs/runs.png

A picture carries the digest of the record that it was drawn from, so that a test can tell one that is out of date.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from benchmarks.timeline import KINDS, Span, iterations

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
COLOURS = dict(zip(KINDS, ("#3b6fb6", "#d1495b", "#ea8c3a", "#4f9d69", "#7a5ba6", "#777777"), strict=True))
COURSES = ("512-512", "sharegpt")
LATE_HOST_MS = 10.0
"""A host that takes this long for an iteration was stopped on the way."""


def draw_timeline(timeline: dict[str, Any], figure: Any) -> None:
    """Three iterations; one layer of the second; the border between the second and the third."""
    middle = iterations(timeline)
    whole, layer, border = figure.subplots(3, 1)
    began = middle[0][0].start
    spans = [span for iteration in middle for span in iteration]
    # An outline keeps the short ones from being thinner than a pixel.
    _lanes(whole, spans, began, 1e3, outline=0.5)
    for iteration in middle[1:]:
        whole.axvline((iteration[0].start - began) / 1e3, color="0.2", linewidth=0.8, linestyle="--")
    whole.set(title="three iterations (dashed: the next one begins)", xlabel="ms", xlim=(-0.5, 0.5 + _end(spans) / 1e3))

    second = middle[1]
    norms = [index for index, span in enumerate(second) if span.operation == "input_layernorm"]
    shown = second[norms[len(norms) // 2] : norms[len(norms) // 2 + 1]]
    _lanes(layer, shown, shown[0].start, 1.0, label=_in_layer)
    layer.set(title="one layer of the second", xlabel="us", xlim=(-8, 8 + _end(shown)))

    argmax = next(index for index, span in enumerate(second) if span.operation == "sampling")
    qkv = next(index for index, span in enumerate(middle[2]) if span.operation == "qkv")
    began = middle[2][0].start
    _lanes(border, [*second[argmax - 1 :], *middle[2][: qkv + 1]], began, 1.0, label=_at_border)
    border.axvline(0, color="0.2", linewidth=0.8, linestyle="--")
    border.set(title="from the second to the third", xlabel="us", xlim=(second[argmax].start - began - 15, 85))


def _end(spans: Sequence[Span]) -> float:
    return max(span.end for span in spans) - spans[0].start


def _in_layer(span: Span) -> str:
    if span.end - span.start > 50:
        return span.operation.replace("_attention", " attention")
    return {"prefill_attention": "prefill >", "rope_append": "rope >"}.get(span.operation, "") or (
        "silu * up >" if "silu" in span.kernel else "norm >" if "norm" in span.operation else ""
    )


def _at_border(span: Span) -> str:
    """A label ends with > where it stands right of its bar, and with < left of it."""
    named = {"DtoH": "< tokens to the host", "HtoD": "metadata >", "argmax": "argmax"}
    for part, label in named.items():
        if part in span.kernel:
            return label
    return {"qkv": "qkv", "input_layernorm": "embedding, norm >"}.get(span.operation, "")


def _lanes(
    axis: Any,
    spans: Sequence[Span],
    began: float,
    scale: float,
    *,
    label: Callable[[Span], str] = lambda span: "",
    outline: float = 0.0,
) -> None:
    """One lane a kind of kernel; time from `began`, in `scale` microseconds."""
    for lane, kind in enumerate(KINDS):
        own = [span for span in spans if span.kind == kind]
        bars = [((span.start - began) / scale, (span.end - span.start) / scale) for span in own]
        axis.broken_barh(
            bars, (lane - 0.4, 0.8), facecolors=COLOURS[kind], edgecolors=COLOURS[kind], linewidth=outline, snap=False
        )
        for span, (start, length) in zip(own, bars, strict=True):
            text = label(span)
            if text.endswith(">"):
                axis.annotate(
                    text.rstrip("> "),
                    (start + length, lane),
                    (4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=9,
                )
            elif text.startswith("<"):
                axis.annotate(
                    text.lstrip("< "), (start, lane), (-4, 0), textcoords="offset points", ha="right", va="center",
                    fontsize=9,
                )  # fmt: skip
            elif text and length < 100:
                axis.annotate(
                    text, (start, lane), (4, 0), textcoords="offset points", va="center", fontsize=9, color="white"
                )
            elif text:
                axis.annotate(text, (start + length / 2, lane), ha="center", va="center", fontsize=9, color="white")
    axis.set_yticks(range(len(KINDS)), KINDS)
    axis.set_ylim(len(KINDS) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)


def draw_courses(runs: dict[str, Any], figure: Any) -> None:
    """Tokens a second, rows and watts over the seconds of two runs."""
    axes = figure.subplots(3, len(COURSES), sharex="col", sharey="row", squeeze=False)
    for column, name in enumerate(COURSES):
        repetition = runs[name]["repetitions"][0]
        course = repetition["course"]
        ends = list(accumulate(stretch["seconds"] for stretch in course))
        edges = [0.0, *ends]
        speed, rows, watts = axes[:, column]

        def each(key: str, over: str, of: Any = course) -> list[float]:
            return [stretch[key] / stretch[over] for stretch in of]

        speed.stairs([value / 1e3 for value in each("rows", "seconds")], edges, color="#3b6fb6", linewidth=1.5)
        middles = [(first + last) / 2 for first, last in zip(edges, ends, strict=False)]
        late = [
            (at, stretch["rows"] / stretch["seconds"] / 1e3)
            for at, stretch in zip(middles, course, strict=True)
            if 1e3 * stretch.get("host_seconds", 0.0) / stretch["iterations"] > LATE_HOST_MS
        ]
        if late:
            speed.plot(*zip(*late, strict=True), "v", color="#d1495b", label="host stopped", markersize=6)
            speed.legend(loc="lower left")
        rows.stairs(each("rows", "iterations"), edges, color="#3b6fb6", linewidth=1.5, label="rows")
        rows.stairs(each("output_tokens", "iterations"), edges, color="#ea8c3a", linewidth=1.5, label="output tokens")
        rows.legend(loc="lower center")
        watts.stairs(each("joules", "seconds"), edges, color="#d1495b", linewidth=1.5)
        if repetition["steady"] is not None:
            steady = repetition["steady"]
            marks = (steady["first_iteration"], steady["first_iteration"] + steady["iterations"])
            for axis in axes[:, column]:
                axis.axvspan(*(_second(mark, course, edges) for mark in marks), color="0.9", zorder=0)
        speed.set_title(f"{name} (grey: steady state)")
        speed.set(xlim=(0, edges[-1]))
        watts.set(xlabel="seconds")
    for axis, label in zip(axes[:, 0], ("1,000 tokens/s", "rows an iteration", "watts"), strict=True):
        axis.set(ylabel=label, ylim=(0, None))
    for axis in axes.flat:
        axis.grid(alpha=0.3)


def _second(iteration: int, course: Sequence[dict[str, Any]], edges: Sequence[float]) -> float:
    """When a run came to an iteration."""
    for stretch, start, end in zip(course, edges, edges[1:], strict=False):
        past = (iteration - stretch["first_iteration"]) / stretch["iterations"]
        if past <= 1:
            return float(start + past * (end - start))
    return edges[-1]


def digest(record: Any) -> str:
    """Of what a picture is drawn from."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def sources() -> dict[str, tuple[Any, Callable[[Any, Any], None]]]:
    """Each picture's part of the records, and what draws it."""
    timeline = json.loads((RESULTS / "iteration.json").read_text())["timeline"]
    runs = json.loads((RESULTS / "offline_throughput.json").read_text())["runs"]
    courses = {name: {"repetitions": runs[name]["repetitions"]} for name in COURSES}
    return {"iteration.png": (timeline, draw_timeline), "runs.png": (courses, draw_courses)}


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False})
    for name, (record, draw) in sources().items():
        figure = plt.figure(figsize=(8.5, 8.0 if name == "iteration.png" else 6.5), layout="constrained")
        draw(record, figure)
        figure.savefig(ROOT / "docs" / name, dpi=120, metadata={"Source": digest(record)})
        plt.close(figure)


if __name__ == "__main__":
    main()
