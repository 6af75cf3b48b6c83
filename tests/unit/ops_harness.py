"""A harness for tests of operations: dense batches made by hand, and a plain loop that runs a graph in program
order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from nanoflow.ops.batch import RESERVED_PAGE, DenseBatch, NanoBatchRows
from nanoflow.ops.device_batch import DeviceBatch
from nanoflow.ops.elementwise import SiluMul
from nanoflow.ops.graph import RESIDUAL, Graph
from nanoflow.ops.linear import Linear, LinearSilu
from nanoflow.ops.operation import NanoContext, Operation

CPU = torch.device("cpu")


def gate_up_silu(inputs: int, columns: int, bias: bool) -> LinearSilu:
    """Reads ``h``, writes ``product``; ``gate_up`` lies between."""
    linear = Linear("gate_up", "h", "gate_up", inputs, (columns, columns), ["gate", "up"], bias=bias)
    return LinearSilu(linear, SiluMul("silu_mul", "gate_up", "product", columns))


@dataclass(frozen=True)
class Piece:
    """Some consecutive tokens of one request in one nano-batch: one token with `decode`, else a prefill segment."""

    request: int
    start: int
    tokens: Sequence[int]
    decode: bool = False


@dataclass
class Pages:
    """Page tables of some requests, scattered over a pool by a seeded shuffle."""

    page_size: int
    requests: int
    columns: int
    spare: int = 5
    scattered: bool = True
    seed: int = 0
    table: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        order = np.arange(1, self.pool)
        if self.scattered:
            np.random.default_rng(self.seed).shuffle(order)
        self.table = order[: self.requests * self.columns].reshape(self.requests, self.columns).astype(np.int32)

    @property
    def pool(self) -> int:
        return 1 + self.requests * self.columns + self.spare

    def row(self, request: int, length: int) -> np.ndarray:
        row = self.table[request].copy()
        row[-(-length // self.page_size) :] = RESERVED_PAGE
        return row


def dense_batch(nano_batches: Sequence[Sequence[Piece]], pages: Pages, padding: int = 0) -> DenseBatch:
    """Lays pieces out as the scheduler would; each nano-batch ends in `padding` rows."""
    rows: list[NanoBatchRows] = []
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    kv_index: list[int] = []
    decode: list[tuple[int, int, np.ndarray]] = []
    prefill: list[tuple[int, int, int, np.ndarray]] = []
    decode_splits, prefill_splits = [0], [0]
    for pieces in nano_batches:
        start = len(tokens)
        counts = {True: 0, False: 0}
        for piece in sorted(pieces, key=lambda piece: not piece.decode):
            length = piece.start + len(piece.tokens)
            if piece.decode:
                decode.append((len(tokens), length, pages.row(piece.request, length)))
            else:
                prefill.append((len(tokens), len(piece.tokens), length, pages.row(piece.request, length)))
            for offset, token in enumerate(piece.tokens):
                position = piece.start + offset
                tokens.append(token)
                positions.append(position)
                slots.append(piece.request)
                page = int(pages.table[piece.request, position // pages.page_size])
                kv_index.append(page * pages.page_size + position % pages.page_size)
            counts[piece.decode] += len(piece.tokens)
        for row in range(padding):
            tokens.append(0)
            positions.append(0)
            slots.append(0)
            kv_index.append(RESERVED_PAGE * pages.page_size + row % pages.page_size)
        rows.append(NanoBatchRows(start, counts[True], counts[False], padding))
        decode_splits.append(len(decode))
        prefill_splits.append(len(prefill))

    def column(items: Sequence[Sequence], index: int) -> np.ndarray:
        return np.array([item[index] for item in items], np.int32)

    def table(items: Sequence[Sequence]) -> np.ndarray:
        return np.array([item[-1] for item in items], np.int32).reshape(len(items), pages.columns)

    return DenseBatch(
        nano_batches=tuple(rows),
        token_ids=np.array(tokens, np.int32),
        positions=np.array(positions, np.int32),
        slots=np.array(slots, np.int32),
        kv_index=np.array(kv_index, np.int64),
        decode_rows=column(decode, 0),
        decode_context=column(decode, 1),
        decode_pages=table(decode),
        decode_splits=np.array(decode_splits, np.int32),
        prefill_rows=column(prefill, 0),
        prefill_lengths=column(prefill, 1),
        prefill_context=column(prefill, 2),
        prefill_pages=table(prefill),
        prefill_splits=np.array(prefill_splits, np.int32),
    )


class GraphRunner:
    """Runs a graph in program order on hand-made batches, with each operation's preferred kernel or its reference."""

    def __init__(
        self, graph: Graph, state: Mapping[str, torch.Tensor], pages: Pages, *, reference: bool, pack: bool = True
    ) -> None:
        self.graph = graph
        self.pages = pages
        self.reference = reference
        dtype = next(iter(state.values())).dtype
        self.buffers = {name: torch.zeros(1024, columns, dtype=dtype) for name, columns in graph.values.items()}
        shape = (pages.pool, 2, graph.kv_heads, pages.page_size, graph.head_dim)
        self.kv = [torch.zeros(shape, dtype=dtype) for _ in range(graph.layers)]

        def load(op: Operation, prefix: str) -> dict[str, torch.Tensor]:
            loaded = {}
            for weight in op.weights:
                whole = torch.cat([state[prefix + part] for part in weight.parts])
                assert whole.shape == weight.shape, (op, weight, whole.shape)
                loaded[weight.name] = op.pack(weight.name, whole) if pack else whole
            return loaded

        self.layers = [
            {op.name: load(op, f"model.layers.{layer}.") for op in graph.layer} for layer in range(graph.layers)
        ]
        self.outer = {op.name: load(op, "") for op in graph.prologue + graph.epilogue}

    def run_op(self, op: Operation, batch: DeviceBatch, part, layer: int, weights: Mapping) -> None:
        name = "reference" if self.reference else op.preferred_kernel(CPU, self.buffers[RESIDUAL].dtype)
        op.kernels[name](NanoContext(batch, part, layer, self.buffers, weights, self.kv[layer]))

    @torch.inference_mode()
    def step(self, host: DenseBatch, split: bool = True, poison: bool = False) -> torch.Tensor:
        """Runs one iteration; returns the logits of every row, padding included. `poison` fills padding rows with
        NaN."""
        batch = DeviceBatch(host, CPU, self.pages.page_size)
        for op in self.graph.prologue:
            self.run_op(op, batch, batch.whole, 0, self.outer[op.name])
        if poison:
            for rows in host.nano_batches:
                for buffer in self.buffers.values():
                    buffer[rows.end - rows.padding : rows.end] = torch.nan
        parts = batch.parts if split else (batch.whole,)
        for layer in range(self.graph.layers):
            for op in self.graph.layer:
                for part in parts:
                    if part.has_rows(op.row_class):
                        self.run_op(op, batch, part, layer, self.layers[layer][op.name])
        self.buffers["sampled"][: host.rows] = self.buffers[RESIDUAL][: host.rows]
        for op in self.graph.epilogue:
            self.run_op(op, batch, batch.whole, 0, self.outer[op.name])
        return self.buffers["logits"][: host.rows].clone()
