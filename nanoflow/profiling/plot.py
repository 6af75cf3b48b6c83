"""A profile as pictures: what operations leave of each other's speed, and what they take on a part of the SMs."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoflow.errors import InputError
from nanoflow.pictures import FORMATS, pyplot_here, save_picture
from nanoflow.profiling.show import lane_sizes, size_text, split_name, splits_of
from nanoflow.search.profile import Profile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_beside", "draw_sms", "plot_profile"]


def plot_profile(profile: Profile, name: str, folder: Path) -> list[Path]:
    """Save the pictures into `folder`, each as .png and .svg: ``NAME.sms`` and, where pairs were measured,
    ``NAME.beside``.

    Raises InputError if the profile has nothing to draw, ConfigError without matplotlib, OutputError.
    """
    if not profile.solos:
        raise InputError(f"--plot: the profile {name} has no measurement yet; give it more --minutes")
    targets = []
    with pyplot_here() as pyplot:
        figures = {"sms": draw_sms(profile, pyplot)}
        if profile.pairs:
            figures["beside"] = draw_beside(profile, pyplot)
        for what, figure in figures.items():
            for suffix in FORMATS:
                targets.append(folder / f"{name}.{what}{suffix}")
                save_picture(figure, targets[-1])
            pyplot.close(figure)
    return targets


def draw_sms(profile: Profile, pyplot: Any) -> "Figure":
    """Speed of each operation over the SMs that it has, of what it reaches on the whole device; without parts, bars of
    its time."""
    sizes = lane_sizes(profile)
    parts = {op: own for op, own in sizes.items() if len(own.seconds) > 1}
    height = 4.6 if parts else 1.0 + 0.3 * len(sizes)
    figure: Figure = pyplot.figure(figsize=(8.0, height), layout="constrained")
    axes: Axes = figure.add_subplot()
    device = profile.fingerprint.gpu or ""
    if not parts:
        names = [f"{op}, {size_text(own)}" for op, own in sizes.items()]
        axes.barh(names, [own.whole * 1e6 for own in sizes.values()], color="#4878a8")
        axes.invert_yaxis()
        axes.set_xlabel("microseconds")
        axes.set_title(f"Operations of {profile.fingerprint.model} on {device}")
        return figure
    whole = profile.fingerprint.sms or 1
    for number, (op, own) in enumerate(parts.items()):
        budgets = sorted((sms or whole, seconds) for sms, seconds in own.seconds.items())
        axes.plot(
            [sms for sms, _ in budgets],
            [own.whole / seconds * 100 for _, seconds in budgets],
            marker="os^Dv<>p*"[number % 9],
            markersize=4,
            linewidth=1.2,
            label=f"{op}, {size_text(own)}",
        )
    axes.plot([0, whole], [0, 100], color="#999999", linewidth=0.8, linestyle="--", label="in proportion to SMs")
    axes.set_xlim(0, whole * 1.02)
    axes.set_ylim(0, None)
    axes.set_xlabel("SMs of its lane, the others idle")
    axes.set_ylabel("% of its speed on all SMs")
    axes.set_title(f"Operations of {profile.fingerprint.model} on parts of the SMs: {device}")
    axes.legend(fontsize=7, frameon=False)
    return figure


def draw_beside(profile: Profile, pyplot: Any) -> "Figure":
    """Two heat maps: what each operation keeps of its speed beside the other, and what the other keeps, by split."""
    splits, pairs = splits_of(profile), profile.pairs
    rows = list(dict.fromkeys((pair.op, pair.other_name) for pair in pairs))
    by_place = {(pair.op, pair.other_name, pair.sms, pair.other_sms): pair for pair in pairs}
    figure: Figure = pyplot.figure(figsize=(1.6 + 1.9 * max(3, len(splits)), 1.8 + 0.45 * len(rows)))
    figure.set_layout_engine("constrained")
    for place, (side, title) in enumerate((("kept", "The first keeps,"), ("other_kept", "The second keeps,"))):
        values = [
            [
                getattr(by_place[*row, *split], side) * 100 if (*row, *split) in by_place else float("nan")
                for split in splits
            ]
            for row in rows
        ]
        axes: Axes = figure.add_subplot(1, 2, place + 1)
        image = axes.imshow(values, vmin=0, vmax=100, cmap="viridis", aspect="auto")
        axes.set_xticks(range(len(splits)), [split_name(split) for split in splits], rotation=30, ha="right")
        axes.set_yticks(
            range(len(rows)), [f"{op} beside {other}" for op, other in rows] if not place else [""] * len(rows)
        )
        _write(axes, values)
        axes.set_title(f"{title}\n% of its speed alone")
    figure.colorbar(image, ax=figure.axes, shrink=0.9)
    figure.suptitle(f"{profile.fingerprint.model} on {profile.fingerprint.gpu}: SMs of the two lanes", fontsize=10)
    return figure


def _write(axes: "Axes", values: Sequence[Sequence[float]]) -> None:
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if value == value:  # what was not measured is NaN
                axes.text(x, y, f"{value:.0f}", ha="center", va="center", size=8, color="w" if value < 70 else "k")
