"""A small Llama-like operation graph and dense batches, for tests of plans. The operations compute nothing."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nanoflow.ops.batch import RESERVED_PAGE, DenseBatch, NanoBatchRows, RowClass
from nanoflow.ops.graph import Graph
from nanoflow.ops.operation import KV, SCRATCH, Access, Cost, NanoContext, Operation, Work

ALL, DECODE, PREFILL = RowClass.ALL, RowClass.DECODE, RowClass.PREFILL


class FakeOperation(Operation):
    """An operation that only declares its accesses."""

    resource = "compute"

    def __init__(self, name: str, accesses: tuple[Access, ...], scratch: int = 0) -> None:
        super().__init__(name)
        self._accesses = accesses
        self._scratch = scratch

    @property
    def accesses(self) -> tuple[Access, ...]:
        return self._accesses

    def scratch_bytes(self, rows: int, sms: int) -> int:
        return self._scratch * rows * max(sms, 1)

    def cost(self, work: Work, itemsize: int) -> Cost:
        return Cost()

    def reference(self, context: NanoContext) -> None:
        raise NotImplementedError


def read(buffer: str, rows: RowClass = ALL, prefix: bool = False) -> Access:
    return Access(buffer, rows, prefix=prefix)


def write(buffer: str, rows: RowClass = ALL) -> Access:
    return Access(buffer, rows, write=True)


def llama_graph(layers: int = 3, scratch: bool = False) -> Graph:
    """Llama's layer after fusion, in program order; with `scratch`, decode attention and `down` use scratch memory."""
    extra = (Access(SCRATCH, write=True),) if scratch else ()
    ops = (
        FakeOperation("input_layernorm", (read("x"), write("h"))),
        FakeOperation("qkv", (read("h"), write("qkv"))),
        FakeOperation("rope_append", (read("qkv"), write("qkv"), write(KV))),
        FakeOperation(
            "decode_attention",
            (read("qkv", DECODE), read(KV, DECODE), write("attention", DECODE), *extra),
            scratch=4 if scratch else 0,
        ),
        FakeOperation(
            "prefill_attention",
            (read("qkv", PREFILL), read(KV, PREFILL, prefix=True), write("attention", PREFILL)),
        ),
        FakeOperation("o", (read("attention"), write("o"))),
        FakeOperation("add_norm", (read("x"), read("o"), write("x"), write("h"))),
        FakeOperation("gate_up", (read("h"), write("gate_up"), write("mlp"))),
        FakeOperation("down", (read("mlp"), write("down"), *extra), scratch=6 if scratch else 0),
        FakeOperation("add", (read("x"), read("down"), write("x"))),
    )
    columns = {"x": 8, "h": 8, "qkv": 16, "attention": 8, "o": 8, "gate_up": 32, "mlp": 16, "down": 8}
    prologue = (FakeOperation("embed", (write("x"),)),)
    epilogue = (FakeOperation("final_norm", (read("sampled"), write("sampled_norm"))),)
    return Graph({**columns, "sampled": 8, "sampled_norm": 8}, ops, layers, prologue, epilogue)


def dense_batch(
    nano_batches: Sequence[tuple[int, Sequence[int], int]],
    page_size: int = 2,
    contexts: Sequence[int] = (0, 3, 5),
) -> DenseBatch:
    """A dense batch: for each nano-batch its decode rows, the lengths of its prefill segments, and its padding rows.

    The first segment of a nano-batch goes on with the prompt of the last segment of the one before; the other segments
    start a prompt. Earlier contexts are drawn from `contexts` in turn.
    """
    page_count = 1
    rows: list[NanoBatchRows] = []
    kv_index: list[int] = []
    decode: list[tuple[int, int]] = []
    decode_tables: list[list[int]] = []
    prefill: list[tuple[int, int, int]] = []
    prefill_tables: list[list[int]] = []
    decode_splits, prefill_splits = [0], [0]
    turn = 0
    pages: list[int] = []
    context = 0

    def new_request(room: int) -> tuple[list[int], int]:
        nonlocal page_count, turn
        earlier = contexts[turn % len(contexts)]
        turn += 1
        needed = -(-(earlier + room) // page_size)
        taken = list(range(page_count, page_count + needed))
        page_count += needed
        return taken, earlier

    total_prefill = sum(sum(lengths) for _, lengths, _ in nano_batches)
    for decode_rows, lengths, padding in nano_batches:
        start = len(kv_index)
        for _ in range(decode_rows):
            own, earlier = new_request(1)
            decode.append((len(kv_index), earlier + 1))
            decode_tables.append(own)
            kv_index.append(own[earlier // page_size] * page_size + earlier % page_size)
        for number, length in enumerate(lengths):
            if number or not pages:
                pages, context = new_request(total_prefill)
            first = len(kv_index)
            for position in range(context, context + length):
                kv_index.append(pages[position // page_size] * page_size + position % page_size)
            context += length
            prefill.append((first, length, context))
            prefill_tables.append(pages)
        kv_index.extend([RESERVED_PAGE * page_size] * padding)
        rows.append(NanoBatchRows(start, decode_rows, sum(lengths), padding))
        decode_splits.append(len(decode))
        prefill_splits.append(len(prefill))

    width = max((len(pages) for pages in [*decode_tables, *prefill_tables]), default=1)

    def table(tables: Sequence[list[int]]) -> NDArray[np.int32]:
        padded = [[*pages, *[RESERVED_PAGE] * (width - len(pages))] for pages in tables]
        return np.array(padded, dtype=np.int32).reshape(len(tables), width)

    zeros = np.zeros(len(kv_index), dtype=np.int32)
    return DenseBatch(
        nano_batches=tuple(rows),
        token_ids=zeros,
        positions=zeros,
        slots=zeros,
        kv_index=np.array(kv_index, dtype=np.int64),
        decode_rows=np.array([row for row, _ in decode], dtype=np.int32),
        decode_context=np.array([tokens for _, tokens in decode], dtype=np.int32),
        decode_pages=table(decode_tables),
        decode_splits=np.array(decode_splits, dtype=np.int32),
        prefill_rows=np.array([first for first, _, _ in prefill], dtype=np.int32),
        prefill_lengths=np.array([length for _, length, _ in prefill], dtype=np.int32),
        prefill_context=np.array([tokens for _, _, tokens in prefill], dtype=np.int32),
        prefill_pages=table(prefill_tables),
        prefill_splits=np.array(prefill_splits, dtype=np.int32),
    )
