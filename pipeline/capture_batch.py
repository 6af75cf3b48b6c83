"""The dense batch that an executor captures a graph on."""

import numpy as np
from numpy.typing import NDArray

from nanoflow.ops.batch import RESERVED_PAGE, DenseBatch, NanoBatchRows
from nanoflow.pipeline.plan import Plan
from nanoflow.pipeline.split import nano_batch_rows

__all__ = ["capture_batch"]


def capture_batch(plan: Plan, program: int, rows: int) -> DenseBatch:
    """A batch of `rows` rows that makes every operation run on every nano-batch: a decode row, a prompt of one token,
    padding.

    A nano-batch has them whatever its shares: what does not fit the others is dealt to it all the same, and a graph
    that was captured without decode attention, or without prefill attention, could not be replayed for it then.
    """
    parts = []
    for count in nano_batch_rows(plan, rows):
        decode = min(count, 1)
        prefill = min(count - decode, 1)
        parts.append((decode, prefill, count - decode - prefill))
    starts = np.cumsum([0, *(sum(part) for part in parts)])
    nano_batches = tuple(NanoBatchRows(int(start), *part) for start, part in zip(starts[:-1], parts, strict=True))
    decode_rows = np.array([n.start for n in nano_batches if n.decode], np.int32)
    prefill_rows = np.array([n.start + n.decode for n in nano_batches if n.prefill], np.int32)
    total = int(starts[-1])

    def splits(counts: list[int]) -> NDArray[np.int32]:
        return np.cumsum([0, *counts]).astype(np.int32)

    def pages(count: int) -> NDArray[np.int32]:
        return np.full((count, 1), RESERVED_PAGE, np.int32)

    return DenseBatch(
        nano_batches=nano_batches,
        token_ids=np.zeros(total, np.int32),
        positions=np.zeros(total, np.int32),
        slots=np.zeros(total, np.int32),
        kv_index=np.zeros(total, np.int64),
        decode_rows=decode_rows,
        decode_context=np.ones(len(decode_rows), np.int32),
        decode_pages=pages(len(decode_rows)),
        decode_splits=splits([n.decode for n in nano_batches]),
        prefill_rows=prefill_rows,
        prefill_lengths=np.ones(len(prefill_rows), np.int32),
        prefill_context=np.ones(len(prefill_rows), np.int32),
        prefill_pages=pages(len(prefill_rows)),
        prefill_splits=splits([n.prefill for n in nano_batches]),
        program=program,
    )
