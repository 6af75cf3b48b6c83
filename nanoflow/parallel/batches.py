"""The way of dense batches from rank 0 to the other ranks: written once into shared memory, read by all.

Contract: every reader takes all batches, in the order published, each as it was (but for what only the rank that
samples needs: masks and the prompts of penalty counts). A batch of any size gets through. The memory has no name: it is
gone with the last process that has it open, however those end.

    publish   pack the batch; for each piece of it that fits a slot:
                  wait until every reader has taken what was in the slot before
                  copy the piece; ring every reader's bell
    take      wait for the bell; copy the piece out; say that it is taken; the last piece of a batch: unpack it

A bell is a message of some bytes on the line between the two processes. So a reader sleeps without polling and wakes
within microseconds, sees at once when the writer has ended, and finds the piece complete: the system calls order the
two processes' memory, on processors that would not do so by themselves too.
"""

import mmap
import os
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import fields

import numpy as np
from numpy.typing import NDArray

from nanoflow.ops.batch import DenseBatch, NanoBatchRows, SamplingBatch
from nanoflow.parallel.processes import Line

__all__ = ["BatchReader", "BatchWriter", "pack", "unpack"]

SLOTS = 4
"""Two iterations are in flight at most, so the writer hardly ever waits."""
SLOT_BYTES = 2**20
"""A batch of 1,024 decode rows with a context of 128k tokens has 4 MiB, one of usual length less than 256 KiB."""
WAIT_SECONDS = 50e-6
"""Between the writer's looks at a reader that lags behind."""
_BELL = struct.Struct("<qq?")
"""Number of the piece, its bytes, whether it is the batch's last."""
_OTHER = _BELL.pack(-1, 0, True)
"""Instead of a bell: what comes next on the line is no batch."""

_NANO_FIELDS = ("start", "decode", "prefill", "padding")
_BATCH_ARRAYS: dict[str, tuple[type[np.generic], int]] = {
    "token_ids": (np.int32, 1),
    "positions": (np.int32, 1),
    "slots": (np.int32, 1),
    "kv_index": (np.int64, 1),
    "decode_rows": (np.int32, 1),
    "decode_context": (np.int32, 1),
    "decode_pages": (np.int32, 2),
    "decode_splits": (np.int32, 1),
    "prefill_rows": (np.int32, 1),
    "prefill_lengths": (np.int32, 1),
    "prefill_context": (np.int32, 1),
    "prefill_pages": (np.int32, 2),
    "prefill_splits": (np.int32, 1),
}
"""Type and dimensions of each array of a `DenseBatch`."""
_SAMPLING_ARRAYS: dict[str, tuple[type[np.generic], int]] = {
    "rows": (np.int32, 1),
    "slots": (np.int32, 1),
    "positions": (np.int32, 1),
    "seeds": (np.uint64, 1),
    "temperature": (np.float32, 1),
    "top_k": (np.int32, 1),
    "top_p": (np.float32, 1),
    "min_p": (np.float32, 1),
    "repetition_penalty": (np.float32, 1),
    "presence_penalty": (np.float32, 1),
    "frequency_penalty": (np.float32, 1),
    "logprobs": (np.int32, 1),
    "bias_entries": (np.int32, 1),
    "bias_tokens": (np.int32, 1),
    "bias_values": (np.float32, 1),
}
"""Likewise of a `SamplingBatch`."""
_NOT_SENT = {"penalty_resets", "masks"}

assert {field.name for field in fields(DenseBatch)} == {*_BATCH_ARRAYS, "nano_batches", "sampling", "program"}
assert {field.name for field in fields(SamplingBatch)} == {*_SAMPLING_ARRAYS, *_NOT_SENT}


def pack(batch: DenseBatch) -> bytes:
    """`batch` as one piece of memory: numbers and shapes as int64, then every array, each begun at a multiple of 8."""
    nano_batches = [getattr(n, name) for n in batch.nano_batches for name in _NANO_FIELDS]
    numbers = [batch.program, len(batch.nano_batches), batch.sampling is not None, *nano_batches]
    arrays = [np.asarray(getattr(batch, name), kind) for name, (kind, _) in _BATCH_ARRAYS.items()]
    if batch.sampling is not None:
        arrays += [np.asarray(getattr(batch.sampling, name), kind) for name, (kind, _) in _SAMPLING_ARRAYS.items()]
    numbers += [size for array in arrays for size in array.shape]
    pieces = [np.asarray(numbers, np.int64).tobytes()]
    for array in arrays:
        pieces += [array.tobytes(), bytes(-array.nbytes % 8)]
    return b"".join(pieces)


def unpack(data: bytearray) -> DenseBatch:
    """What `pack` had been given; the arrays lie in `data`, which is the batch's from now on."""
    numbers = np.frombuffer(data, np.int64, 3)
    program, count, samples = (int(number) for number in numbers)
    place = 3
    tables = [_BATCH_ARRAYS, _SAMPLING_ARRAYS] if samples else [_BATCH_ARRAYS]
    sizes = len(_NANO_FIELDS) * count + sum(dimensions for table in tables for _, dimensions in table.values())
    rest = np.frombuffer(data, np.int64, sizes, 8 * place).tolist()
    nano_batches = tuple(NanoBatchRows(*rest[4 * n : 4 * n + 4]) for n in range(count))
    shapes = iter(rest[4 * count :])
    offset = 8 * (place + sizes)
    found: list[dict[str, NDArray[np.generic]]] = []
    for table in tables:
        arrays: dict[str, NDArray[np.generic]] = {}
        for name, (kind, dimensions) in table.items():
            shape = [next(shapes) for _ in range(dimensions)]
            array = np.frombuffer(data, kind, int(np.prod(shape)), offset).reshape(shape)
            arrays[name] = array
            offset += array.nbytes + -array.nbytes % 8
        found.append(arrays)
    sampling = SamplingBatch(**found[1]) if samples else None  # type: ignore[arg-type]
    return DenseBatch(nano_batches=nano_batches, sampling=sampling, program=program, **found[0])  # type: ignore[arg-type]


class _Memory:
    """The shared memory: how many pieces each reader has taken, then the slots."""

    def __init__(self, descriptor: int, readers: int, slots: int, slot_bytes: int) -> None:
        self.slots, self.slot_bytes = slots, slot_bytes
        self._begin = mmap.PAGESIZE
        assert 8 * readers <= self._begin
        size = self._begin + slots * slot_bytes
        if os.fstat(descriptor).st_size < size:
            os.ftruncate(descriptor, size)
        self._map = mmap.mmap(descriptor, size)
        self.taken = np.frombuffer(self._map, np.int64, readers)

    def slot(self, number: int, size: int) -> memoryview:
        """The first `size` bytes of piece `number`'s slot."""
        begin = self._begin + number % self.slots * self.slot_bytes
        return memoryview(self._map)[begin : begin + size]


class BatchWriter:
    """Rank 0's end.

    Args:
        lines: to each reader, which may carry other messages too; this one only sends.
        check: called while a reader lags behind; raises if it will not come.
    """

    def __init__(
        self,
        lines: Sequence[Line],
        check: Callable[[], None] = lambda: None,
        *,
        slots: int = SLOTS,
        slot_bytes: int = SLOT_BYTES,
    ) -> None:
        self.descriptor = os.memfd_create("nanoflow-batches", os.MFD_CLOEXEC)
        """The memory's, to be sent to readers."""
        self._lines = list(lines)
        self._check = check
        self._memory = _Memory(self.descriptor, len(self._lines), slots, slot_bytes)
        self._published = 0

    def publish(self, batch: DenseBatch) -> None:
        """Hand `batch` to all readers; waits only for one that lags some batches behind. Raises OSError if a reader
        has ended, or what `check` raises."""
        data = memoryview(pack(batch))
        room = self._memory.slot_bytes
        for begin in range(0, len(data), room):
            piece = data[begin : begin + room]
            while self._published - int(self._memory.taken.min()) >= self._memory.slots:
                self._check()
                time.sleep(WAIT_SECONDS)
            self._memory.slot(self._published, len(piece))[:] = piece
            bell = _BELL.pack(self._published, len(piece), begin + len(piece) == len(data))
            for line in self._lines:
                line.send_bytes(bell)
            self._published += 1

    def pause(self) -> None:
        """Tell the readers that what comes next on their lines is something else, up to the next batch."""
        for line in self._lines:
            line.send_bytes(_OTHER)

    def close(self) -> None:
        """Let go of the memory; readers keep theirs until they end."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class BatchReader:
    """Another rank's end.

    Args:
        descriptor: the memory's, as this process has it; closed here.
        number: of this reader among all, from 0 on.
        line: to the writer.
    """

    def __init__(
        self,
        descriptor: int,
        number: int,
        line: Line,
        *,
        readers: int,
        slots: int = SLOTS,
        slot_bytes: int = SLOT_BYTES,
    ) -> None:
        self._memory = _Memory(descriptor, readers, slots, slot_bytes)
        os.close(descriptor)
        self._number = number
        self._line = line

    def take(self) -> DenseBatch | None:
        """Wait for the next batch; None: the line has other messages now (`BatchWriter.pause`).

        Raises EOFError, or OSError, when the writer has ended or closed the line.
        """
        data = bytearray()
        while True:
            number, size, last = _BELL.unpack(self._line.recv_bytes())
            if number < 0:
                return None
            data += self._memory.slot(number, size)
            self._memory.taken[self._number] = number + 1
            if last:
                return unpack(data)
