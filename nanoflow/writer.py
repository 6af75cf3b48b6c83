"""Writes a run's results, one JSON object a line, so that no finished work is lost.

Contract:

- When `write` returns, the operating system has the whole line: it survives the end of this process, whatever ended it.
- A background thread makes the disk sync at least every `SYNC_SECONDS` while lines come: a power cut loses the lines of
  that time at most, and the next run finds out which.
- If the disk fills up, the file is cut back to its last whole line and the run ends with a message.
- What an older run wrote is replaced only when there is a new line to put in its place.
- Lines that are taken out or put in order are copied into a new file, which then takes the old one's place: whatever
  ends the process meanwhile, all lines are there.
"""

import fcntl
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Event, Lock, Thread
from types import TracebackType
from typing import Any, BinaryIO, Self

from nanoflow.errors import OutputError
from nanoflow.search.files import sync_folder
from nanoflow.sorting import LineOrder, copy_in_order, find_order

__all__ = ["SYNC_SECONDS", "OutputWriter", "encode"]

SYNC_SECONDS = 5.0
_LONGEST_LINE = 2**30
"""Bytes; what is longer was not written by a run."""
_PIECE = 2**20


class OutputWriter:
    """An output file, open for appending. Use as a context manager, or call `close`.

    Args:
        restart: replace what is there; without it, new lines follow.

    Raises:
        OutputError: the file is in use, or cannot be written.
    """

    def __init__(self, path: str | Path, *, restart: bool = False) -> None:
        self.path = Path(path)
        self.lines = 0
        """Lines written so far."""
        self.before_first_line: Callable[[], None] = lambda: None
        """Called once, when an older run's lines are gone and the first new one is about to come."""
        self._created = not os.path.lexists(self.path)
        self._replacing = restart and not self._created
        self._started = False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._open_locked()
        except OSError as error:
            raise OutputError(
                f"output.path: cannot write {self.path}: {_reason(error)}; choose another path"
            ) from error
        self._open = True
        self._swap = Lock()  # held while `_file` is replaced, or synced
        self._unsynced = Event()
        self._closing = Event()
        self._sync_error: OSError | None = None
        self._syncer = Thread(target=self._sync, name="output-sync", daemon=True)
        self._syncer.start()

    @property
    def regular(self) -> bool:
        """Whether it is a file, and not a device or a pipe."""
        return stat.S_ISREG(os.fstat(self._file).st_mode)

    @property
    def size(self) -> int:
        """Bytes in the file; 0 of a device or a pipe."""
        return os.fstat(self._file).st_size if self.regular else 0

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line; when this returns, the operating system has all of it. Raises OutputError."""
        line = encode(record)
        self._start()
        start = os.fstat(self._file).st_size
        written = 0
        try:
            if self._sync_error is not None:
                raise self._sync_error
            while written < len(line):
                written += os.write(self._file, line[written:])
        except OSError as error:
            self._cut(start)
            raise OutputError(
                f"output.path: cannot write {self.path}: {_reason(error)}; what was written before is kept: make room, "
                "and the same command goes on"
            ) from error
        self.lines += 1
        self._unsynced.set()

    def keep_lines(self, judge: Callable[[], Callable[[bytes], bool]]) -> int:
        """Drop the lines of older runs that are not to be kept, and what follows the last whole line.

        The file is rewritten beside itself and renamed, unless cutting off its end does.

        Args:
            judge: gives a function that says of one line after another whether it is kept. It is asked for a new one if
                the lines must be gone through again.

        Returns:
            Whole lines that were dropped. Raises OutputError.
        """
        if not self.regular:
            return 0
        with suppress(OSError):  # of a run that was killed while it rewrote the file
            self._beside.unlink()
        dropped, gap, end = 0, False, 0
        keep = judge()
        try:
            with self.path.open("rb") as file:
                for line, whole in _lines(file):
                    if not whole or not keep(line):
                        dropped += whole
                        continue
                    gap = gap or end + len(line) != file.tell()
                    end = file.tell()
            if gap:
                self._rewrite(lambda copy: self._copy_kept(copy, judge()))
            elif end != os.fstat(self._file).st_size:
                os.ftruncate(self._file, end)
        except OSError as error:
            raise OutputError(
                f"output.path: cannot go on with {self.path}: {_reason(error)}; its lines are as they were: make room, "
                "or choose another path"
            ) from error
        return dropped

    def line_order(self, place: Callable[[bytes], int]) -> LineOrder | None:
        """The order of the lines by the places that `place` gives; None if they are in it. Raises OutputError."""
        if self._replacing and not self._started:
            return None  # an older run's, which are about to go
        try:
            with self.path.open("rb") as file:
                return find_order(file, place)
        except OSError as error:
            raise OutputError(f"output.sort: cannot read {self.path}: {_reason(error)}") from error

    def reorder(self, order: LineOrder) -> None:
        """Put the lines into an order that `line_order` gave. Raises OutputError; then they are as they were."""

        def copy_lines(copy: BinaryIO) -> None:
            with self.path.open("rb") as old:
                copy_in_order(old.fileno(), order, copy.write)

        try:
            self._rewrite(copy_lines)
        except OSError as error:
            raise OutputError(
                f"output.sort: cannot sort {self.path}: {_reason(error)}; all its records are there, in the order in "
                f"which they were finished: make room for {order.lengths.sum():,} bytes beside it, and the same "
                "command sorts them"
            ) from error

    def close(self, *, keep_empty: bool = True) -> None:
        """Close the file. Without `keep_empty`, a file that this run made and wrote nothing to is removed."""
        if not self._open:
            return
        self._open = False
        self._closing.set()
        self._unsynced.set()
        self._syncer.join()
        try:
            if keep_empty and self._replacing:
                self._start()
            elif not keep_empty and self._created and self.lines == 0:
                self.path.unlink(missing_ok=True)
            with suppress(OSError):  # a device or a pipe has nothing to flush
                os.fsync(self._file)
        finally:
            os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # A run that could not start must leave nothing behind.
        self.close(keep_empty=kind is None)

    def _open_locked(self) -> int:
        while True:
            file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                _lock(file, self.path)
                if os.fstat(file).st_ino == self.path.stat().st_ino:
                    return file
            except FileNotFoundError:
                pass
            except BaseException:
                os.close(file)
                raise
            os.close(file)  # another run put a file in its place before we had the lock

    def _start(self) -> None:
        if self._started:
            return
        if self._replacing:
            self._cut(0)
        self._started = True
        self.before_first_line()

    def _cut(self, length: int) -> None:
        with suppress(OSError):  # a device has no length
            os.ftruncate(self._file, length)

    @property
    def _beside(self) -> Path:
        target = self.path.resolve()  # a link stays a link
        return target.with_name(target.name + ".new")

    def _copy_kept(self, copy: BinaryIO, keep: Callable[[bytes], bool]) -> None:
        with self.path.open("rb") as old:
            copy.writelines(line for line, whole in _lines(old) if whole and keep(line))

    def _rewrite(self, fill: Callable[[BinaryIO], None]) -> None:
        """Put a file that `fill` writes in the place of this one; nobody finds anything but the old one or the new."""
        beside, target = self._beside, self.path.resolve()
        new = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            _lock(new, beside)
            with os.fdopen(new, "ab", _PIECE, closefd=False) as copy:
                fill(copy)
            os.fchmod(new, stat.S_IMODE(os.fstat(self._file).st_mode))
            os.fsync(new)
            os.rename(beside, target)
        except BaseException:
            os.close(new)
            with suppress(OSError):
                beside.unlink()
            raise
        sync_folder(target.parent)
        with self._swap:
            old_file, self._file = self._file, new
            os.close(old_file)

    def _sync(self) -> None:
        """Bring lines to the disk, away from the loop that writes them: the call waits for the disk."""
        while not self._closing.wait(SYNC_SECONDS):
            if not self._unsynced.is_set():
                continue
            self._unsynced.clear()
            with self._swap:
                try:
                    os.fsync(self._file)
                except OSError as error:
                    if self.regular:
                        self._sync_error = error
                    return


def _lines(file: BinaryIO) -> Iterator[tuple[bytes, bool]]:
    """Lines, and whether they are whole; what is longer than `_LONGEST_LINE` comes in pieces."""
    inside = False
    while line := file.readline(_LONGEST_LINE):
        ended = line.endswith(b"\n")
        yield line, ended and not inside
        inside = not ended


def _lock(file: int, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(f"output.path: another run is writing {path}; choose another path") from None
    except OSError:
        pass  # a file system without locks


def encode(record: Mapping[str, Any]) -> bytes:
    """A record as its line in the output."""
    text = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    try:
        return text.encode("utf-8") + b"\n"
    except UnicodeEncodeError:
        # Half a surrogate pair, from an escape in the input, has no UTF-8 form; JSON can only escape it again.
        return json.dumps(record, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n"


def _reason(error: OSError) -> str:
    if isinstance(error, FileExistsError):
        return f"{error.filename} is a file, not a folder"
    return error.strerror or str(error)
