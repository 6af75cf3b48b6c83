"""A profile: what the operations of one model take on one device, alone and beside each other, as measured.

Contract: a `Profile` is frozen data; one written out and read back is equal. A file is there as a whole or as it was
before, whatever ends the process. A file that is damaged is refused with the place of the damage, one that was measured
for something else with a line for every difference.

Points of an operation lie at coordinates, by its kind (`axes_of`)::

    decode attention    requests, and the KV tokens that each attends to, on average
    prefill attention   rows of one prompt's piece, and the tokens before it
    all others          rows
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from nanoflow.ops.attention import DecodeAttention, PrefillAttention
from nanoflow.ops.graph import Graph
from nanoflow.ops.operation import Operation, Work
from nanoflow.search.cost_model import Ceilings
from nanoflow.search.files import replace_file, slug
from nanoflow.search.fingerprint import Fingerprint, graph_shape

__all__ = [
    "Pair",
    "Point",
    "Profile",
    "ProfileError",
    "Solo",
    "axes_of",
    "find_profile",
    "layer_shape",
    "profile_file",
    "profile_folders",
    "work_at",
]

FORMAT = 1
AXES = {
    "rows": ("rows",),
    "decode": ("requests", "context"),
    "prefill": ("rows", "start"),
}
"""Names of the coordinates, by an operation's kind."""

_OF_COLLECTIVES = ("kernel", "wire_bytes", "other_kernel")

At = tuple[int, ...]
Found = TypeVar("Found")


class ProfileError(ValueError):
    """A profile cannot be read or written, or is for something else. The message names the file and the mend."""


@dataclass(frozen=True)
class Point:
    """One measurement."""

    at: At
    """Coordinates; see the module's text."""
    seconds: float
    """Of one call, hot: the median."""
    joules: float | None = None
    """Of the whole card, in one call; None where the device does not tell, or the calls were too short."""


@dataclass(frozen=True)
class Solo:
    """An operation with nothing beside it."""

    op: str
    kind: str
    """``rows``, ``decode`` or ``prefill``."""
    sms: int | None
    """That it had, the others idle; None: the whole device."""
    points: tuple[Point, ...]
    """By coordinates, ascending."""
    kernel: str = ""
    """Of a collective, which form of it; empty: the preferred one, and of all other operations."""
    wire_bytes: float = 0.0
    """Of a collective, the bytes that a rank sends for each row."""


@dataclass(frozen=True)
class Pair:
    """Two operations at once, each again and again."""

    op: str
    at: At
    sms: int | None
    """None: the two were on plain streams, and shared all SMs."""
    kept: float
    """The share of its solo speed, on as many SMs, that the first one kept."""
    other: str
    other_at: At
    other_sms: int | None
    other_kept: float
    other_kernel: str = ""
    """As `Solo.kernel`, of the second one."""

    @property
    def what(self) -> tuple[object, ...]:
        """All but what was measured."""
        return self.op, self.at, self.sms, self.other, self.other_at, self.other_sms, self.other_kernel

    @property
    def other_name(self) -> str:
        """Of the second one, with its form."""
        return f"{self.other}, {self.other_kernel}" if self.other_kernel else self.other


@dataclass(frozen=True)
class Profile:
    """What was measured of one model's operations on one device."""

    fingerprint: Fingerprint
    """With `layer_shape` as its shape: how many layers there are changes nothing."""
    ceilings: Ceilings
    idle_watts: float | None = None
    """What the card draws with nothing to do between pieces of work; None if it does not tell."""
    solos: tuple[Solo, ...] = ()
    pairs: tuple[Pair, ...] = ()

    def solo(self, op: str, sms: int | None, kernel: str = "") -> Solo | None:
        return next((solo for solo in self.solos if (solo.op, solo.sms, solo.kernel) == (op, sms, kernel)), None)

    def with_solo(self, found: Solo) -> "Profile":
        """With these points, which replace others at the same coordinates."""
        known = self.solo(found.op, found.sms, found.kernel)
        points = {point.at: point for point in (*(known.points if known else ()), *found.points)}
        merged = replace(found, points=tuple(points[at] for at in sorted(points)))
        solos = [solo for solo in self.solos if solo is not known]
        ordered = sorted([*solos, merged], key=lambda s: (s.op, s.kernel, s.sms or math.inf))
        return replace(self, solos=tuple(ordered))

    def with_pair(self, found: Pair) -> "Profile":
        """With this pair, which replaces one of the same."""
        return replace(self, pairs=(*(pair for pair in self.pairs if pair.what != found.what), found))

    def dumps(self) -> str:
        """As JSON, an operation on so many SMs, or a pair, a line."""
        head = {
            "format": FORMAT,
            "fingerprint": _known(self.fingerprint),
            "ceilings": asdict(self.ceilings),
            "idle_watts": self.idle_watts,
        }
        solos = [
            {**_said(solo), "points": [[*point.at, point.seconds, point.joules] for point in solo.points]}
            for solo in self.solos
        ]
        parts = [json.dumps(head, indent=1)[:-2]]
        for name, rows in (("solos", solos), ("pairs", [_said(pair) for pair in self.pairs])):
            lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
            parts.append(f' "{name}": [\n{lines}\n ]' if rows else f' "{name}": []')
        return ",\n".join(parts) + "\n}\n"

    def save(self, path: Path) -> None:
        """Put it in the place of what is at `path`. Raises ProfileError."""
        try:
            replace_file(path, self.dumps())
        except OSError as error:
            raise ProfileError(
                f"{path}: the profile cannot be written: {error.strerror}; what was there before is kept"
            ) from None

    @classmethod
    def load(cls, path: Path) -> "Profile":
        """Read a file. Raises ProfileError if it cannot be read, or is no profile."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ProfileError(f"{path}: the profile cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise _damaged(path, f"it is no JSON ({error})") from None
        if not isinstance(content, dict) or "solos" not in content:
            raise _damaged(path, "it has no `solos`")
        if content.get("format") != FORMAT:
            raise ProfileError(
                f"{path}: format: it is {content.get('format')!r}, this version reads {FORMAT}; measure again"
            )
        names = {field.name for field in fields(Fingerprint)} - {"format"}

        def fingerprint(raw: Mapping[str, Any]) -> Fingerprint:
            if unknown := set(raw) - names:
                raise ValueError(f"{sorted(unknown)[0]!r} is no part of a fingerprint")
            return Fingerprint(**raw)

        def ceilings(raw: Mapping[str, Any]) -> Ceilings:
            link, watts = raw.get("link_bytes_per_second"), raw.get("power_limit_watts")
            return Ceilings(
                _positive(raw["flops"]), _positive(raw["bytes_per_second"]), _or_none(link), _or_none(watts)
            )

        return cls(
            _part(path, "fingerprint", lambda: fingerprint(content["fingerprint"])),
            _part(path, "ceilings", lambda: ceilings(content["ceilings"])),
            _part(path, "idle_watts", lambda: _or_none(content.get("idle_watts"))),
            tuple(_part(path, f"solos[{n}]", lambda raw=raw: _solo(raw)) for n, raw in enumerate(content["solos"])),  # type: ignore[misc]
            tuple(
                _part(path, f"pairs[{n}]", lambda raw=raw: _pair(raw))  # type: ignore[misc]
                for n, raw in enumerate(content.get("pairs", ()))
            ),
        )

    def refuse(self, path: Path, here: Fingerprint) -> None:
        """Raise ProfileError, with every difference on a line, if it was not measured as `here` says."""
        own, now = _known(self.fingerprint), _known(here)
        lines = [
            f"{key}: measured with {own.get(key)}, here {now.get(key)}"
            for key in dict.fromkeys((*own, *now))
            if own.get(key) != now.get(key)
        ]
        if lines:
            raise ProfileError(
                "\n  ".join([f"{path}: the profile was measured for something else", *lines])
                + "\ngive another file with --out, or move this one away to measure anew"
            )


def axes_of(op: Operation) -> str:
    """Kind of an operation: which coordinates its points have."""
    if isinstance(op, DecodeAttention):
        return "decode"
    return "prefill" if isinstance(op, PrefillAttention) else "rows"


def work_at(kind: str, at: Sequence[float]) -> Work:
    """What a point stands for."""
    if kind == "decode":
        return Work(decode_rows=round(at[0]), decode_context=round(at[0] * at[1]))
    if kind == "prefill":
        rows, start = at
        pairs = rows * start + rows * (rows + 1) / 2
        return Work(prefill_rows=round(rows), prefill_context=round(rows + start), prefill_pairs=round(pairs))
    return Work(prefill_rows=round(at[0]))


def layer_shape(graph: Graph) -> str:
    """See `graph_shape`; the same for any number of layers."""
    return graph_shape(replace(graph, layers=1))


def profile_folders() -> tuple[Path, Path]:
    """The user's (``$XDG_CACHE_HOME/nanoflow/profiles``, by default under ``~/.cache``), then those shipped."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "nanoflow" / "profiles", Path(__file__).parent.parent / "configs" / "profiles"


def profile_file(here: Fingerprint, folder: Path | None = None) -> Path:
    """Where the profile of `here` is kept: a file for each model, GPU, data type, page size and versions."""
    digest = hashlib.sha256(json.dumps(_known(here), sort_keys=True).encode()).hexdigest()[:6]
    name = f"{slug(here.model or 'model')}--{slug(here.gpu or 'cpu')}--{digest}.json"
    return (profile_folders()[0] if folder is None else folder) / name


def find_profile(
    gpu: str, shape: str, dtype: str, *, sms: int | None = None, folders: Iterable[Path] | None = None
) -> tuple[Path, Profile] | None:
    """The profile of a GPU and a model's layer, and its file: the user's newest one, else one that is shipped.

    Args:
        shape: of `layer_shape`.
        sms: of the GPU; None: any.

    Files that cannot be read are passed over.
    """
    for folder in profile_folders() if folders is None else folders:
        for file in sorted(folder.glob("*.json"), key=lambda path: (-path.stat().st_mtime, path.name)):
            try:
                found = Profile.load(file)
            except ProfileError:
                continue
            own = found.fingerprint
            if found.solos and (own.gpu, own.shape, own.dtype) == (gpu, shape, dtype) and sms in (None, own.sms):
                return file, found
    return None


def _known(fingerprint: Fingerprint) -> dict[str, Any]:
    """What it says; the plans' format is none of a profile's."""
    return {key: value for key, value in asdict(fingerprint).items() if value is not None and key != "format"}


def _said(row: Solo | Pair) -> dict[str, Any]:
    """Its keys, but for those that only collectives have."""
    return {key: value for key, value in asdict(row).items() if value or key not in _OF_COLLECTIVES}


def _part(path: Path, key: str, read: Callable[[], Found]) -> Found:
    try:
        return read()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise _damaged(path, f"{key}: {what}") from None


def _solo(raw: Mapping[str, Any]) -> Solo:
    axes = AXES.get(raw["kind"])
    if axes is None:
        raise ValueError(f"kind: {raw['kind']!r} is none of {', '.join(AXES)}")
    points = []
    for *at, seconds, joules in raw["points"]:
        if len(at) != len(axes):
            raise ValueError(f"points: {at} does not give {', '.join(axes)}")
        points.append(Point(_at(at), _positive(seconds), _or_none(joules)))
    if not points:
        raise ValueError("points: there is none")
    ordered = tuple(sorted(points, key=lambda point: point.at))
    wire = _or_none(raw.get("wire_bytes")) or 0.0
    return Solo(str(raw["op"]), raw["kind"], _sms(raw["sms"]), ordered, str(raw.get("kernel", "")), wire)


def _pair(raw: Mapping[str, Any]) -> Pair:
    return Pair(
        str(raw["op"]), _at(raw["at"]), _sms(raw["sms"]), _positive(raw["kept"]),
        str(raw["other"]), _at(raw["other_at"]), _sms(raw["other_sms"]), _positive(raw["other_kept"]),
        str(raw.get("other_kernel", "")),
    )  # fmt: skip


def _positive(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{value!r} is no number above 0")
    return float(value)


def _or_none(value: Any) -> float | None:
    return None if value is None else _positive(value)


def _at(values: Iterable[Any]) -> At:
    found = tuple(values)
    if any(not isinstance(value, int) or value < 0 for value in found):
        raise ValueError(f"{list(found)} are no coordinates")
    return found


def _sms(value: Any) -> int | None:
    if value is not None and (not isinstance(value, int) or value < 1):
        raise ValueError(f"sms: {value!r} is no number of SMs")
    return value


def _damaged(path: Path, what: str) -> ProfileError:
    return ProfileError(f"{path}: not a profile, or damaged: {what}; move it away and measure again")
