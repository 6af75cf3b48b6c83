"""Files that are replaced in one step: whatever ends the process, readers find the old content or the new."""

import os
import re
import tempfile
from contextlib import suppress
from pathlib import Path

__all__ = ["check_writable", "replace_file", "slug", "sync_folder"]


def check_writable(path: Path) -> None:
    """Raise OSError if `replace_file` could not write `path` now; what is there stays as it is."""
    if path.is_dir():
        raise IsADirectoryError(None, "it is a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def replace_file(path: Path, text: str) -> None:
    """Put a file with this text in the place of `path`, whose readers find the old text or the new. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two processes that write the same file must not write into one another's.
    beside = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.rename(path)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring a folder's entries to the disk, where that can be asked for."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def slug(name: str) -> str:
    """`name` as a part of a file's name: ``NVIDIA H100 80GB HBM3`` -> ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
