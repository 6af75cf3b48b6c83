"""Lines of a run's input, one at a time: files, folders, globs, compressed or not, and standard input.

Memory is bounded whatever the input's size: a line that is longer than `LONGEST_LINE` is passed over and reported.
"""

import glob
import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from threading import Event
from typing import Any, BinaryIO

import zstandard

from nanoflow.errors import InputError

__all__ = [
    "LONGEST_LINE",
    "STDIN",
    "InputFiles",
    "InputLine",
    "Source",
    "expand",
    "file_identity",
    "once_only",
    "reads",
]

STDIN = "-"
LONGEST_LINE = 2**26
"""Bytes. A prompt of a million tokens is a tenth of this; what is longer is no line of JSON."""
ENDINGS = tuple(kind + pack for kind in (".jsonl", ".ndjson") for pack in ("", ".gz", ".zst"))
"""What a folder's input files end in."""

_PIECE = 2**16
_SAMPLES = 64
"""Pieces of a large file that its identity is made of."""
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Source:
    """One of several input files."""

    name: str
    offset: int
    """Lines of the files before it."""

    def place(self, line: int) -> str:
        """How messages name line `line` of the whole input."""
        return f"{self.name}: line {line - self.offset}"


@dataclass(frozen=True, slots=True)
class InputLine:
    """A line as it is in the file."""

    raw: bytes | None
    """None if it is longer than `LONGEST_LINE`."""
    number: int
    """From 1, through all files of the input."""
    source: Source | None
    """None if the input is a single file."""


def expand(item: str) -> list[Path]:
    """The files that an entry of `workload.input` names, in order; raises InputError if there are none.

    A folder stands for the files in it with one of `ENDINGS`, a glob for the files that match; both in order of name.
    """
    path = Path(item)
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.name.endswith(ENDINGS) and file.is_file())
        if not found:
            raise InputError(f"workload.input: the folder {item} holds no file that ends in {', '.join(ENDINGS)}")
        return found
    if not path.exists() and glob.has_magic(item):
        found = sorted(Path(match) for match in glob.glob(item, recursive=True) if Path(match).is_file())
        if not found:
            raise InputError(f"workload.input: no file matches {item}; check the pattern")
        return found
    if not path.exists():
        raise InputError(f"workload.input: {item}: no such file or folder; check the path")
    return [path]


def reads(item: str, file: Path) -> bool:
    """Whether `file`, there or not, would be among the files that an entry of `workload.input` names."""
    if item == STDIN:
        return False
    path = Path(item)
    if path.is_dir():
        return file.parent == path and file.name.endswith(ENDINGS)
    return path == file or (not path.exists() and fnmatch(str(file), item))


def file_identity(path: Path) -> str:
    """What tells one file's content from another's: its size, and a hash of its first, last and some middle pieces.

    Up to 4 MiB the hash is of the whole file. Raises OSError.
    """
    size = path.stat().st_size
    digest = hashlib.blake2b(digest_size=8)
    with path.open("rb") as file:
        if size <= _SAMPLES * _PIECE:
            digest.update(file.read())
        else:
            for sample in range(_SAMPLES):
                file.seek(sample * (size - _PIECE) // (_SAMPLES - 1))
                digest.update(file.read(_PIECE))
    return f"{size} bytes, {digest.hexdigest()}"


def once_only(items: Sequence[str]) -> str | None:
    """The first of what entries of `workload.input` name that cannot be read twice (standard input, a pipe), or None.

    Raises InputError as `InputFiles` does.
    """
    if STDIN in items:
        return STDIN
    return next((str(path) for path in InputFiles(items).paths if not path.is_file()), None)


class InputFiles:
    """The lines of all files that `items` (entries of `workload.input`) name.

    Raises:
        InputError: an entry names no file; while iterating: a file cannot be read, or a compressed one is damaged.
    """

    def __init__(self, items: Sequence[str]) -> None:
        if STDIN in items and len(items) > 1:
            raise InputError("workload.input: - (standard input) cannot stand beside other inputs; give it alone")
        self.paths = [] if STDIN in items else [path for item in items for path in expand(item)]
        folders = {str(path.parent) for path in self.paths}
        self._common = Path(os.path.commonpath(folders)) if folders else Path()

    def __iter__(self) -> Iterator[InputLine]:
        if not self.paths:
            yield from _lines(_open_stdin, "standard input", None, 0)
            return
        number = 0
        for path in self.paths:
            source = Source(self._name(path), number) if len(self.paths) > 1 else None
            for line in _lines(path.open, str(path), source, number):
                number = line.number
                yield line

    def identity(self) -> dict[str, str]:
        """What tells this input from another, by file; raises InputError. Standard input has none."""
        try:
            return {self._name(path): file_identity(path) for path in self.paths}
        except OSError as error:
            raise InputError(f"workload.input: {error.filename} cannot be read: {error.strerror}") from error

    def count_lines(self, stop: Event) -> int | None:
        """Lines of all files, blank ones too; None if that is not quickly known, or `stop` was set meanwhile."""
        count = 0
        try:
            for path in self.paths:
                with path.open("rb") as file:
                    end = b"\n"
                    while piece := file.read(2**20):
                        if stop.is_set() or (file.tell() == len(piece) and _packed(piece)):
                            return None
                        count += piece.count(b"\n")
                        end = piece[-1:]
                    count += end != b"\n"
        except OSError:
            return None  # the reader will say so
        return count if self.paths else None

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self._common))


def _lines(opener: Any, name: str, source: Source | None, before: int) -> Iterator[InputLine]:
    """The lines of one file; the first has the number `before` + 1."""
    number = before
    try:
        with opener("rb") as file, _unpacked(file) as lines:
            while raw := lines.readline(LONGEST_LINE):
                number += 1
                if number == before + 1:
                    raw = raw.removeprefix(_BOM)
                if len(raw) == LONGEST_LINE and not raw.endswith(b"\n"):
                    while raw and not raw.endswith(b"\n"):
                        raw = lines.readline(LONGEST_LINE)
                    yield InputLine(None, number, source)
                else:
                    yield InputLine(raw, number, source)
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise InputError(
            f"workload.input: {name} is damaged after line {number - before} ({error}); compress it anew"
        ) from error
    except OSError as error:
        raise InputError(f"workload.input: {name} cannot be read: {error.strerror or error}; check the path") from error


def _open_stdin(mode: str) -> BinaryIO:
    # A file object of our own: the interpreter's would be locked by a thread that still reads when the process ends.
    return os.fdopen(os.dup(0), mode, 2**17)  # type: ignore[return-value]


def _packed(start: bytes) -> bool:
    return start.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd"))


def _unpacked(file: Any) -> Any:
    """The file, decompressed if its first bytes say that it is gzip or zstd, whatever its name."""
    start = file.peek(4)[:4]
    if start.startswith(b"\x1f\x8b"):
        return io.BufferedReader(gzip.GzipFile(fileobj=file), 2**17)
    if start == b"\x28\xb5\x2f\xfd":
        return io.BufferedReader(_Zstd(file), 2**17)
    return file


class _Zstd(io.RawIOBase):
    """Reads zstd frames one after another. The package's own reader takes a file that was cut off for a whole one."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        # `zstd --long` makes windows of up to 2 GiB.
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
        self._frame: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            piece = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            piece = piece or self._file.read(_PIECE)
            if not piece:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("it ends in the middle of a zstd frame")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._decompressor.decompressobj()
            self._ready = memoryview(self._frame.decompress(piece))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count
