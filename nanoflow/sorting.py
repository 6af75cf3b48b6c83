"""Lines of a file in the order of their places, in memory that does not grow with the length of the lines.

find:  read the file once; keep the place and the start of every line           16 bytes a line
       sort by place, lines of one place as they stand                          40 bytes more, for a moment
copy:  cut the new file into pieces of at most `PIECE` bytes; for each of them
       read its lines in the order of the old file, where neighbours are still neighbours; write the piece
"""

import errno
import os
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

__all__ = ["PIECE", "LineOrder", "copy_in_order", "find_order"]

PIECE = 2**26
"""Bytes; a longer line is a piece of its own."""

_Int64 = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class LineOrder:
    """Where the lines of a new file stand in the old one, in the order of the new one; in bytes."""

    starts: _Int64
    lengths: _Int64

    def __len__(self) -> int:
        return len(self.starts)


def find_order(file: BinaryIO, place: Callable[[bytes], int]) -> LineOrder | None:
    """The order of the file's lines by their places; None if they are in order. Raises OSError."""
    places, starts = array("q"), array("q")
    end, latest, in_order = 0, 0, True
    for line in iter(file.readline, b""):
        at = place(line)
        in_order = in_order and at >= latest
        latest = at
        places.append(at)
        starts.append(end)
        end += len(line)
    if in_order:
        return None
    old = np.frombuffer(starts, np.int64)
    order = np.argsort(np.frombuffer(places, np.int64), kind="stable")
    return LineOrder(old[order], (np.append(old[1:], end) - old)[order])


def copy_in_order(source: int, order: LineOrder, write: Callable[[memoryview], object]) -> None:
    """Hand the lines of the file `source` (a descriptor) to `write`, in order. Raises OSError."""
    for first, last in _pieces(order.lengths):
        starts, lengths = order.starts[first:last], order.lengths[first:last]
        ends = np.cumsum(lengths)
        piece = memoryview(bytearray(int(ends[-1])))
        for entry in np.argsort(starts).tolist():
            end, length = int(ends[entry]), int(lengths[entry])
            _read(source, piece[end - length : end], int(starts[entry]))
        write(piece)


def _pieces(lengths: _Int64) -> Iterator[tuple[int, int]]:
    """First line, and the one after the last, of each piece."""
    ends = np.cumsum(lengths)
    first, done = 0, 0
    while first < len(lengths):
        last = max(first + 1, int(np.searchsorted(ends, done + PIECE, side="right")))
        yield first, last
        first, done = last, int(ends[last - 1])


def _read(file: int, target: memoryview, start: int) -> None:
    while len(target):
        count = os.preadv(file, [target], start)
        if not count:
            raise OSError(errno.EIO, "it became shorter while it was read")
        target, start = target[count:], start + count
