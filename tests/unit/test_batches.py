"""Dense batches through shared memory: whole, in order, whatever their size; no end goes unnoticed."""

import os
import threading
import time
from dataclasses import fields
from multiprocessing import Pipe
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from nanoflow.ops.batch import DenseBatch, NanoBatchRows, SamplingBatch
from nanoflow.parallel import batches
from nanoflow.parallel.batches import BatchReader, BatchWriter, pack, unpack
from nanoflow.parallel.processes import Line, start

LIMIT = 30.0


def random_batch(rng: np.random.Generator, rows: int, samples: int | None, nano_batches: int = 2) -> DenseBatch:
    """Arrays of the right types and of shapes that do not go together: packing is not to care."""

    def array(kind: type[np.generic], dimensions: int) -> Any:
        shape = [int(size) for size in rng.integers(0, rows + 1, dimensions)]
        if issubclass(kind, np.floating):
            return rng.normal(size=shape).astype(kind)
        return rng.integers(0, np.iinfo(kind).max, shape, dtype=kind)

    sampling = None
    if samples is not None:
        sampling = SamplingBatch(**{name: array(*of) for name, of in batches._SAMPLING_ARRAYS.items()})
    return DenseBatch(
        tuple(NanoBatchRows(*(int(n) for n in rng.integers(0, 99, 4))) for _ in range(nano_batches)),
        sampling=sampling,
        program=int(rng.integers(9)),
        **{name: array(*of) for name, of in batches._BATCH_ARRAYS.items()},
    )


def assert_same(first: Any, second: Any) -> None:
    for field in fields(first):
        one, other = getattr(first, field.name), getattr(second, field.name)
        if isinstance(one, np.ndarray):
            assert one.dtype == other.dtype and one.shape == other.shape, field.name
            np.testing.assert_array_equal(one, other)
            assert other.flags.writeable and other.flags.aligned
        elif isinstance(one, SamplingBatch):
            assert_same(one, other)
        else:
            assert one == other, field.name


@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(0, 40),
    samples=st.none() | st.integers(0, 9),
    nano_batches=st.integers(0, 4),
)
def test_a_batch_comes_out_as_it_went_in(seed: int, rows: int, samples: int | None, nano_batches: int) -> None:
    batch = random_batch(np.random.default_rng(seed), rows, samples, nano_batches)
    assert_same(batch, unpack(bytearray(pack(batch))))


class Readers:
    """Threads that read all batches, as other processes do."""

    def __init__(self, count: int, **sizes: int) -> None:
        pairs = [Pipe() for _ in range(count)]
        self.near: list[Line] = [near for near, _ in pairs]
        self.far: list[Line] = [far for _, far in pairs]
        self.writer = BatchWriter(self.near, self._check, **sizes)
        self.got: list[list[DenseBatch | None]] = [[] for _ in range(count)]
        self.late = time.monotonic() + LIMIT
        self.readers = [
            BatchReader(os.dup(self.writer.descriptor), n, far, readers=count, **sizes)
            for n, far in enumerate(self.far)
        ]

    def _check(self) -> None:
        assert time.monotonic() < self.late, "a reader does not come"

    def read(self, number: int, until: int, pause: float = 0.0) -> threading.Thread:
        def go() -> None:
            for _ in range(until):
                self.got[number].append(self.readers[number].take())
                time.sleep(pause)

        thread = threading.Thread(target=go, daemon=True)
        thread.start()
        return thread


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32), slot_bytes=st.sampled_from([64, 1000, 4096]), slots=st.integers(1, 3))
def test_every_reader_takes_all_batches_whatever_their_size(seed: int, slot_bytes: int, slots: int) -> None:
    rng = np.random.default_rng(seed)
    sent = [random_batch(rng, int(rng.integers(30)), None) for _ in range(6)]
    assert slot_bytes > 64 or max(len(pack(batch)) for batch in sent) > 2 * slot_bytes  # some take several slots
    readers = Readers(2, slots=slots, slot_bytes=slot_bytes)
    threads = [readers.read(0, len(sent)), readers.read(1, len(sent), pause=0.001)]
    for batch in sent:
        readers.writer.publish(batch)
    for thread in threads:
        thread.join(LIMIT)
    for got in readers.got:
        assert len(got) == len(sent)
        for one, other in zip(sent, got, strict=True):
            assert other is not None
            assert_same(one, other)


def test_the_writer_waits_for_the_slowest_reader_and_asks_whether_it_will_come() -> None:
    rng = np.random.default_rng(1)
    readers = Readers(2, slots=2, slot_bytes=2**16)
    readers.read(0, 5)
    readers.writer.publish(random_batch(rng, 3, None))
    readers.writer.publish(random_batch(rng, 3, None))

    def gone() -> None:
        raise ChildProcessError("rank 2 was killed")

    readers.writer._check = gone
    with pytest.raises(ChildProcessError, match="rank 2"):
        readers.writer.publish(random_batch(rng, 3, None))


def test_a_pause_lets_other_messages_through() -> None:
    readers = Readers(1)
    batch = random_batch(np.random.default_rng(2), 5, 3)
    readers.writer.publish(batch)
    readers.writer.pause()
    readers.near[0].send({"plans": ["a"]})
    readers.writer.publish(batch)
    reader = readers.readers[0]
    assert reader.take() is not None
    assert reader.take() is None and readers.far[0].recv() == {"plans": ["a"]}
    again = reader.take()
    assert again is not None
    assert_same(batch, again)


def test_a_reader_notices_the_end_of_the_writer_in_the_middle_of_a_batch() -> None:
    readers = Readers(1, slots=2, slot_bytes=64)
    readers.near[0].send_bytes(batches._BELL.pack(0, 64, False))
    readers.near[0].close()
    with pytest.raises(EOFError):
        readers.readers[0].take()


def test_a_writer_notices_the_end_of_a_reader() -> None:
    readers = Readers(2)
    readers.far[1].close()
    with pytest.raises(OSError):
        readers.writer.publish(random_batch(np.random.default_rng(3), 5, None))


def test_through_another_process_and_without_a_name() -> None:
    """The memory is handed over by descriptor; a name in /dev/shm would outlive a kill."""
    child = start("tests.unit.process_targets:sums_of_batches", name="rank 1")
    try:
        from multiprocessing.reduction import send_handle

        writer = BatchWriter([child.link])
        send_handle(child.link, writer.descriptor, child.pid)
        rng = np.random.default_rng(4)
        for _ in range(20):
            batch = random_batch(rng, 300, 5)
            writer.publish(batch)
            assert child.link.poll(LIMIT)
            assert child.link.recv() == int(batch.kv_index.astype(object).sum())
        assert os.readlink(f"/proc/self/fd/{writer.descriptor}") == "/memfd:nanoflow-batches (deleted)"
    finally:
        child.kill()
