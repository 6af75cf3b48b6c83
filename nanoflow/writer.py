"""Writes a run's results, one JSON object a line, so that no finished work is lost.

Each line goes to the file in one call as soon as its request is finished. If the disk fills up, the file is cut back
to its last whole line and the run ends with a message. What an older run wrote is replaced only when there is a new
line to put in its place.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from nanoflow.errors import OutputError

__all__ = ["OutputWriter"]


class OutputWriter:
    """An output file, open for appending. Use as a context manager, or call `close`.

    Args:
        restart: replace what is there; without it an existing file is refused.

    Raises:
        OutputError: the file exists, is in use, or cannot be written.
    """

    def __init__(self, path: str | Path, *, restart: bool = False) -> None:
        self.path = Path(path)
        self.lines = 0
        """Lines written so far."""
        self._created = not os.path.lexists(self.path)
        if not self._created and not restart:
            raise OutputError(
                f"output.path: {self.path} exists already; --restart replaces it, "
                "or choose another with --set output.path=FILE"
            )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise OutputError(
                f"output.path: cannot write {self.path}: {_reason(error)}; choose another path"
            ) from error
        self._replacing = not self._created
        self._open = True
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._open = False
            os.close(self._file)
            raise OutputError(f"output.path: another run is writing {self.path}; choose another path") from None
        except OSError:
            pass  # a file system without locks

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line; when this returns, the operating system has all of it. Raises OutputError."""
        line = _encode(record)
        self._drop_older_run()
        start = os.fstat(self._file).st_size
        written = 0
        try:
            while written < len(line):
                written += os.write(self._file, line[written:])
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._file, start)
            raise OutputError(
                f"output.path: cannot write {self.path}: {_reason(error)}; the {self.lines} lines before are kept: "
                "make room, or choose another path, and run again"
            ) from error
        self.lines += 1

    def close(self, *, keep_empty: bool = True) -> None:
        """Close the file. Without `keep_empty`, a file that this run made and wrote nothing to is removed."""
        if not self._open:
            return
        self._open = False
        try:
            if keep_empty:
                self._drop_older_run()
            elif self._created and self.lines == 0:
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
        # A run that could not start must leave nothing behind that would stop the next one.
        self.close(keep_empty=kind is None)

    def _drop_older_run(self) -> None:
        if self._replacing:
            with suppress(OSError):  # a device has no length
                os.ftruncate(self._file, 0)
            self._replacing = False


def _encode(record: Mapping[str, Any]) -> bytes:
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
