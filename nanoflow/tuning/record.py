"""What a tuning run has measured as a file, and as a picture of how the search went.

The file has everything that the table at the end is made of, and every plan in the order in which they were told, so
that what is claimed of a search can be looked up, drawn again, and compared with what the simulator predicts.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoflow.errors import OutputError
from nanoflow.pictures import FORMATS, pyplot_here, save_picture
from nanoflow.search.files import replace_file
from nanoflow.tuning.tune import MixResult, TuneOutcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_search", "outcome_record", "plot_search", "save_record"]

FORMAT = 1
WORST = 0.85
"""Ratios below are drawn at the lower edge: how slow a plan is beyond it matters to nobody."""


def outcome_record(found: TuneOutcome) -> dict[str, Any]:
    """`found` as JSON has it. Ratios are to the sequential plan, times of an iteration, joules of the whole card."""
    return {
        "format": FORMAT,
        "here": {key: value for key, value in asdict(found.here).items() if value is not None},
        "job": {"part": found.mixes.part, "held": round(found.mixes.held, 4)},
        "gain": round(found.gain, 4),
        "mixes": [_mix(each) for each in found.results],
        "failures": list(found.failures),
    }


def save_record(record: Mapping[str, Any], path: Path) -> None:
    """Write a record. Raises OutputError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise OutputError(f"--record {path}: it cannot be written: {error.strerror}; give another place") from None


def plot_search(record: Mapping[str, Any], path: Path) -> list[Path]:
    """Draw the searches of a record, a row a mix, as ``path`` with .png and .svg in place of its ending.

    Raises ConfigError without matplotlib, OutputError. Without a plan that was measured there is nothing to draw.
    """
    searched = [mix for mix in record["mixes"] if mix["steps"]]
    if not searched:
        return []
    targets = [path.with_suffix(suffix) for suffix in FORMATS]
    with pyplot_here() as pyplot:
        figure = draw_search(searched, pyplot)
        for target in targets:
            save_picture(figure, target)
        pyplot.close(figure)
    return targets


def draw_search(mixes: Sequence[Mapping[str, Any]], pyplot: Any) -> "Figure":
    """Every plan in its order, the best so far, and the last comparison with the range of its pairs."""
    figure: Figure = pyplot.figure(figsize=(8.0, 0.4 + 2.2 * len(mixes)), layout="constrained")
    rows: Any = figure.subplots(len(mixes), 1, squeeze=False)
    for axes, mix in zip(rows[:, 0], mixes, strict=True):
        _draw_mix(axes, mix)
    rows[-1, 0].set_xlabel("plans, in the order in which they were measured")
    return figure


def _draw_mix(axes: "Axes", mix: Mapping[str, Any]) -> None:
    steps, final = mix["steps"], mix["final"]
    places = range(1, len(steps) + 1)
    ratios = [step["ratio"] for step in steps]
    best = [max([1.0, *(ratio for ratio in ratios[:place] if ratio)]) for place in places]
    ran = [(place, max(WORST, ratio)) for place, ratio in zip(places, ratios, strict=True) if ratio is not None]
    axes.axhline(1.0, color="#888888", linewidth=0.8)
    axes.step(list(places), best, where="post", color="#4878a8", label="the best so far")
    axes.plot(
        [place for place, _ in ran], [ratio for _, ratio in ran], "o", markersize=3.5, color="#c06048", label="a plan"
    )
    failed = [place for place, ratio in zip(places, ratios, strict=True) if ratio is None]
    if failed:
        axes.plot(failed, [WORST] * len(failed), "x", markersize=5, color="#888888", label="failed")
    if final is not None:
        low, high = min(final["ratios"]), max(final["ratios"])
        axes.errorbar(
            [len(steps) + 1], [final["ratio"]], [[final["ratio"] - low], [high - final["ratio"]]],
            fmt="s", markersize=4, capsize=3, color="#205030", label="last comparison, and its pairs",
        )  # fmt: skip
    own = mix["mix"]
    axes.set_title(
        f"{own['decode']:,} decode rows of context {own['context']:,} + {sum(own['prompts']):,} prompt rows, "
        f"{mix['weight']:.0%} of the job"
    )
    axes.set_ylabel("times as fast\nas in sequence")
    axes.set_ylim(bottom=WORST - 0.05)  # room for the legend
    axes.legend(loc="lower right", fontsize=7, frameon=False, ncols=4)


def _mix(found: MixResult) -> dict[str, Any]:
    final = found.final
    values = None
    if final is not None:
        values = {
            "plan": final.plan.dumps(),
            "ratio": final.ratio,
            "ratios": list(final.ratios),
            "seconds": final.seconds,
            "sequential_seconds": final.sequential_seconds,
            "joules": final.joules,
            "sequential_joules": final.sequential_joules,
        }
    return {
        "mix": asdict(found.mix.mix),
        "rows": found.mix.bucket,
        "weight": round(found.mix.weight, 4),
        "near": round(found.mix.near, 4),
        "stored": None if found.stored is None else "plan" if found.won else "sequential",
        "final": values,
        "steps": [asdict(step) for step in found.steps],
    }
