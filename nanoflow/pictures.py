"""Pictures that are the same on every machine: one style, and files without a date in them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoflow.errors import ConfigError, OutputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DPI", "FORMATS", "pyplot_here", "save_picture"]

FORMATS = (".png", ".svg")
DPI = 120
STYLE: dict[str, Any] = {
    "font.size": 9,
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture everywhere
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "svg.hashsalt": "nanoflow",
    "svg.fonttype": "path",
}


@contextmanager
def pyplot_here() -> Iterator[Any]:
    """pyplot without a display, in this module's style. Raises ConfigError if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError('pictures need matplotlib: pip install "nanoflow[plots]"') from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings: Any = matplotlib.rcParams
    with matplotlib.rc_context():
        settings.update(matplotlib.rcParamsDefault)
        settings.update(backend="Agg", **STYLE)
        yield pyplot


def save_picture(figure: "Figure", path: Path) -> None:
    """Write a figure, the same bytes for the same figure. Raises OutputError."""
    metadata = {"Date": None, "Creator": "NanoFlow"} if path.suffix.lower() == ".svg" else {"Software": "NanoFlow"}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI, metadata=metadata)
    except OSError as error:
        raise OutputError(f"{path}: the picture cannot be written: {error.strerror}; choose another place") from None
