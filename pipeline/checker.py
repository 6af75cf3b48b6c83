"""An independent check that a program's lanes, joins and waits are enough for a given dense batch.

Contract: nothing here uses the derivation of dependencies. What a step touches comes from the batch itself: rows of the
nano-batches and of the decode and prefill segments, and the very KV entries that rows are written to and that segments
attend to through their page tables. What is ordered comes from a closure over steps, computed here.

Pseudo-code::

    done_before[step] = closure of: previous step of the lane, every step of the stages before, waits
    for every buffer, for every two steps that touch the same element of it, one of them writing:
        the one that the sequential program runs first must be in done_before of the other
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nanoflow.ops.batch import RESERVED_PAGE, DenseBatch, RowClass
from nanoflow.ops.operation import KV, SCRATCH
from nanoflow.pipeline.program import Program

__all__ = ["Violation", "check_program"]

Place = tuple[str, int | str | None]
"""A buffer that exists once: an activation (name, None), a layer's KV cache (KV, layer), a lane's scratch memory."""


@dataclass(frozen=True)
class Violation:
    """Something that makes a program wrong. `first` and `second` are steps, in sequential order where it is a race."""

    kind: str
    """``unordered``, ``reversed``, ``wait`` (for a step that is not issued before), ``missing`` or ``repeated``."""
    message: str
    first: int | None = None
    second: int | None = None


def check_program(program: Program, batch: DenseBatch, page_size: int) -> list[Violation]:
    """All that is wrong with running `program` on `batch`, whose KV pages hold `page_size` tokens; empty if nothing is.

    A race that this batch cannot show (a nano-batch without prefill rows, say) is not reported.
    """
    violations = [*_check_coverage(program), *_check_waits(program)]
    done_before = _closure(program)
    rank = _sequential_rank(program)
    for (buffer, owner), users in _accesses(program, batch, page_size).items():
        writers = [(step, written) for step, _, written in users if written]
        for writer, written in writers:
            for user, read, other_written in users:
                if user == writer or not written & (read | other_written):
                    continue
                if other_written and user < writer and written & other_written:
                    continue  # two writers: reported when the roles are exchanged
                first, second = sorted((writer, user), key=rank.__getitem__)
                if done_before[second] >> first & 1:
                    continue
                reverse = bool(done_before[first] >> second & 1)
                if reverse and buffer == SCRATCH:
                    continue  # nothing is handed on in scratch memory: any order will do
                kind = "reversed" if reverse else "unordered"
                where = buffer if owner is None else f"{buffer} of {'layer' if buffer == KV else 'lane'} {owner}"
                what = "runs after" if reverse else "is not ordered with"
                message = f"{program.name(first)} {what} {program.name(second)}, and both touch {where}"
                violations.append(Violation(kind, message, first, second))
    return violations


def _check_coverage(program: Program) -> Iterator[Violation]:
    """Every operation of every layer runs once on every nano-batch."""
    count = len(program.plan.nano_batches)
    runs: dict[tuple[int, str, int], int] = {}
    for step in program.steps:
        nano_op = step.nano_op
        for n in range(count) if nano_op.nano_batch is None else (nano_op.nano_batch,):
            key = nano_op.layer, nano_op.op, n
            runs[key] = runs.get(key, 0) + 1
    for layer in range(program.graph.layers):
        for op in program.graph.layer:
            for n in range(count):
                times = runs.pop((layer, op.name, n), 0)
                if times != 1:
                    kind = "repeated" if times else "missing"
                    yield Violation(kind, f"{op.name} of layer {layer} runs {times} times on nano-batch {n}")
    for layer, name, n in runs:
        yield Violation(
            "repeated", f"{name} of layer {layer} runs on nano-batch {n}, but the graph has no such nano-op"
        )


def _check_waits(program: Program) -> Iterator[Violation]:
    for index, step in enumerate(program.steps):
        for other in step.waits:
            if not 0 <= other < index:
                message = f"{program.name(index)} waits for step {other}, which is not issued before it"
                yield Violation("wait", message, other, index)


def _closure(program: Program) -> list[int]:
    """For every step, the steps that are done before it starts, as the bits of an integer."""
    done_before: list[int] = []
    lane_end: dict[str, int] = {}
    stage_start = 0  # every step before this one belongs to an earlier stage
    for index, step in enumerate(program.steps):
        if index and program.steps[index - 1].stage != step.stage:
            stage_start = index
        mask = (1 << stage_start) - 1
        before = [wait for wait in step.waits if 0 <= wait < index]
        if step.lane in lane_end:
            before.append(lane_end[step.lane])
        for other in before:
            mask |= done_before[other] | 1 << other
        done_before.append(mask)
        lane_end[step.lane] = index
    return done_before


def _sequential_rank(program: Program) -> list[tuple[int, int, int]]:
    position = {op.name: index for index, op in enumerate(program.graph.layer)}
    return [(s.nano_op.layer, position[s.nano_op.op], s.nano_op.nano_batch or 0) for s in program.steps]


def _accesses(program: Program, batch: DenseBatch, page_size: int) -> dict[Place, list[tuple[int, int, int]]]:
    """For every buffer, the steps that touch it with the elements that they read and write, as bits of integers.

    An element is a row of an activation, or a KV entry that this batch writes (others cannot conflict).
    """
    elements = _Elements(batch, page_size, len(program.plan.nano_batches))
    kept: dict[tuple[str, int | None], dict[str, tuple[int, int]]] = {}
    result: dict[Place, list[tuple[int, int, int]]] = {}
    for index, step in enumerate(program.steps):
        nano_op = step.nano_op
        key = nano_op.op, nano_op.nano_batch
        if key not in kept:
            touched: dict[str, tuple[int, int]] = {}
            for access in program.graph.operation(nano_op.op).accesses:
                read, written = touched.get(access.buffer, (0, 0))
                if access.buffer == SCRATCH:
                    bits = 1
                elif access.buffer == KV:
                    bits = elements.kv(nano_op.nano_batch, access.rows, access.write)
                else:
                    bits = elements.rows(nano_op.nano_batch, access.rows, access.prefix)
                # Scratch memory is written by whoever uses it, whatever the access says.
                if access.write or access.buffer == SCRATCH:
                    written |= bits
                else:
                    read |= bits
                touched[access.buffer] = read, written
            kept[key] = touched
        for buffer, (read, written) in kept[key].items():
            owner: int | str | None = None
            if buffer in (KV, SCRATCH):
                owner = nano_op.layer if buffer == KV else step.lane
            if read or written:
                result.setdefault((buffer, owner), []).append((index, read, written))
    return result


class _Elements:
    """Rows and KV entries of a batch, by nano-batch and row class."""

    def __init__(self, batch: DenseBatch, page_size: int, nano_batches: int) -> None:
        if len(batch.nano_batches) != nano_batches:
            raise ValueError(f"the batch has {len(batch.nano_batches)} nano-batches, the plan has {nano_batches}")
        self.batch = batch
        self.page_size = page_size
        stored = {int(index) for index in batch.kv_index if index // page_size != RESERVED_PAGE}
        self.entry = {index: number for number, index in enumerate(sorted(stored))}

    def rows(self, nano_batch: int | None, rows: RowClass, prefix: bool) -> int:
        """Bits of the rows that an access covers."""
        first, last = self._range(nano_batch)
        return _bits(self._rows(0 if prefix else first, last, rows))

    def kv(self, nano_batch: int | None, rows: RowClass, write: bool) -> int:
        """Bits of the KV entries that rows are written to, or that their segments attend to."""
        batch = self.batch
        first, last = self._range(nano_batch)
        if write:
            indices = batch.kv_index[self._rows(first, last, rows)].tolist()
        else:
            indices = []
            if rows is not RowClass.PREFILL:
                segments = range(batch.decode_splits[first], batch.decode_splits[last])
                indices += [i for d in segments for i in self._context(batch.decode_pages[d], batch.decode_context[d])]
            if rows is not RowClass.DECODE:
                segments = range(batch.prefill_splits[first], batch.prefill_splits[last])
                indices += [
                    i for c in segments for i in self._context(batch.prefill_pages[c], batch.prefill_context[c])
                ]
        return _bits(np.array([self.entry[i] for i in indices if i in self.entry], dtype=np.int64))

    def _range(self, nano_batch: int | None) -> tuple[int, int]:
        return (0, len(self.batch.nano_batches)) if nano_batch is None else (nano_batch, nano_batch + 1)

    def _rows(self, first: int, last: int, rows: RowClass) -> NDArray[np.int64]:
        batch = self.batch
        if rows is RowClass.ALL:
            return np.arange(batch.nano_batches[first].start, batch.nano_batches[last - 1].end, dtype=np.int64)
        if rows is RowClass.DECODE:
            return batch.decode_rows[batch.decode_splits[first] : batch.decode_splits[last]].astype(np.int64)
        segments = range(batch.prefill_splits[first], batch.prefill_splits[last])
        starts, lengths = batch.prefill_rows, batch.prefill_lengths
        pieces = [np.arange(starts[c], starts[c] + lengths[c], dtype=np.int64) for c in segments]
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)

    def _context(self, pages: NDArray[np.int32], tokens: int) -> list[int]:
        positions = np.arange(tokens, dtype=np.int64)
        indices: list[int] = (
            pages[positions // self.page_size].astype(np.int64) * self.page_size + positions % self.page_size
        ).tolist()
        return indices


def _bits(numbers: NDArray[np.int64]) -> int:
    bits = 0
    for number in numbers.tolist():
        bits |= 1 << number
    return bits
