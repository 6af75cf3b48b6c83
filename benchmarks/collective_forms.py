"""What `benchmarks.collectives` measures: collectives in all forms that run on the machine, each group of them with
memory of its own. `run(name, buffer)` runs one on the current stream."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from nanoflow.ops.collectives import CTAS, AllReduce, Collective, LayerAllGather
from nanoflow.ops.communicator import Communicator
from nanoflow.ops.fused_rows import FusedRows
from nanoflow.ops.norm import AddNorm, Norm
from nanoflow.ops.operation import NanoContext, Operation
from nanoflow.ops.own_rows import OwnRows
from nanoflow.ops.peer_all_reduce import PEER_FORMS
from nanoflow.ops.peer_memory import PeerMemory, PeerMemoryError
from nanoflow.ops.peer_rows import ROW_FORMS
from nanoflow.ops.row_collectives import ReduceScatter, RowsAllGather

NCCL = ("nccl", *CTAS)


class Forms:
    """All forms that run here, on one buffer of `rows` rows at the most."""

    def __init__(self, communicator: Communicator, device: torch.device, columns: int, rows: int) -> None:
        self.device = device
        self.op = AllReduce("sum", "x", columns, communicator.size)
        self.dtype = torch.bfloat16
        self.missing: dict[str, str] = {}
        self._communicators: dict[str, Communicator] = {}
        self._peers: dict[str, PeerMemory] = {}
        for name in NCCL if device.type == "cuda" else ("nccl", "reference"):
            self._communicators[name] = communicator.twin(name, CTAS.get(name))
        for name in PEER_FORMS:
            try:
                room = self.op.peer_room(name, rows, self.dtype.itemsize)
                self._peers[name] = communicator.peer_memory(name, room)
            except PeerMemoryError as error:
                self.missing[name] = str(error)
        self.names = (*self._communicators, *self._peers)

    def run(self, name: str, buffer: torch.Tensor, sms: int | None = None) -> None:
        """The all-reduce of `buffer` [rows, columns] on the current stream, which has so many SMs."""
        part: Any = SimpleNamespace(rows=slice(0, len(buffer)))
        nothing: Any = None
        communicator, peers = self._communicators.get(name), self._peers.get(name)
        context = NanoContext(nothing, part, 0, {"x": buffer}, {}, nothing, sms, communicator=communicator, peers=peers)
        self.op.kernels[name](context)


class Halves:
    """All forms of reduce-scatter and all-gather, of rows or of columns, that run here, on `rows` rows at the most, by
    names such as ``scatter push``."""

    def __init__(self, communicator: Communicator, device: torch.device, columns: int, rows: int) -> None:
        self.device, self.rank = device, communicator.rank
        ranks, share = communicator.size, columns // communicator.size
        self.ops: dict[str, Collective] = {
            "scatter": ReduceScatter("scatter", "x", columns, ranks),
            "gather": RowsAllGather("gather", "x", columns, ranks),
            "columns": LayerAllGather("columns", "source", "gathered", "target", share, ranks),
        }
        self.op = self.ops["scatter"]
        self._source = torch.randn(rows, share, device=device, dtype=torch.bfloat16)
        self._gathered = self._source.new_zeros(rows, ranks * share)
        self.missing: dict[str, str] = {}
        self._communicators: dict[str, Communicator] = {}
        self._peers: dict[str, PeerMemory] = {}
        self._places: PeerMemory | None = None
        for form in NCCL if device.type == "cuda" else ("nccl", "reference"):
            twin = communicator.twin(f"halves {form}", CTAS.get(form))
            self._communicators |= {f"{kind} {form}": twin for kind in self.ops}
        itemsize = torch.bfloat16.itemsize
        for name, (kind, form) in {f"{kind} {form}": (kind, form) for form in ROW_FORMS for kind in self.ops}.items():
            try:
                self._peers[name] = communicator.peer_memory(name, self.ops[kind].peer_room(form, rows, itemsize) or 0)
                self._places = self._places or communicator.peer_memory("places", rows * columns * itemsize)
            except PeerMemoryError as error:
                self.missing[name] = str(error)
        self.names = (*self._communicators, *self._peers)

    def run(self, name: str, buffer: torch.Tensor) -> None:
        """The collective on [rows, columns]: on `buffer`, or as many rows in memory that all ranks reach; of columns,
        on as many as divide by the ranks."""
        kind, form = name.split()
        rows, op = slice(0, len(buffer)), self.ops[kind]
        gathered = self._gathered[rows]
        target = buffer.view(-1)[: gathered.numel()].view(gathered.shape)
        buffers = {"x": buffer, "source": self._source[rows], "gathered": gathered, "target": target}
        places, reached = None, op.peer_buffer(form)
        if reached is not None:
            places, own = self._places, buffers[reached]
            buffers[reached] = places.data(self.rank, 0, own.numel(), own.dtype).view(own.shape)
        part: Any = SimpleNamespace(rows=rows, nano_batch_rows=(rows,))
        nothing: Any = None
        ranks: Any = {"communicator": self._communicators.get(name), "peers": self._peers.get(name), "places": places}
        op.kernels[form](NanoContext(nothing, part, 0, buffers, {}, nothing, **ranks))


class Between:
    """All forms of all-reduce, sum and norm that run here, on `rows` rows at the most, by names such as ``fused push``.

    Products and the library's collectives read and write `buffer`, so that it is what `alone` fills.
    """

    def __init__(self, communicator: Communicator, device: torch.device, columns: int, rows: int) -> None:
        self.device, self.rank = device, communicator.rank
        rank, ranks, itemsize = communicator.rank, communicator.size, torch.bfloat16.itemsize
        add = AddNorm("add_norm", "x", "o", Norm("norm", "x", "normed", columns, 1e-5, "norm"))
        self.op = AllReduce("o_all_reduce", "o", columns, ranks)
        scatter, own = ReduceScatter("o_reduce_scatter", "o", columns, ranks), OwnRows(add, rank, ranks)
        gather = RowsAllGather("add_norm_all_gather", "normed", columns, ranks)
        self._chains: dict[str, tuple[tuple[Operation, ...], Sequence[str]]] = {
            "all_reduce": ((self.op, add), PEER_FORMS),
            "apart": ((scatter, own, gather), ROW_FORMS),
            "fused": ((FusedRows("o_add_norm", scatter, own, gather),), ROW_FORMS),
        }
        self._kernel = add.preferred_kernel(device, torch.bfloat16)
        self._weight = torch.ones(columns, device=device, dtype=torch.bfloat16)
        self._residual, self._normed = (torch.zeros(rows, columns, device=device).bfloat16() for _ in range(2))
        self.missing: dict[str, str] = {}
        self._communicators: dict[str, Communicator] = {}
        self._peers: dict[tuple[str, str], PeerMemory] = {}
        self._places: PeerMemory | None = None
        for form in NCCL if device.type == "cuda" else ("nccl", "reference"):
            twin = communicator.twin(f"between {form}", CTAS.get(form))
            self._communicators |= {f"{kind} {form}": twin for kind in self._chains}
        names = list(self._communicators)
        for kind, (chain, forms) in self._chains.items():
            for form in forms:
                try:
                    for op in chain:
                        room = op.peer_room(form, rows, itemsize) if isinstance(op, Collective) else None
                        if room is not None:
                            memory = communicator.peer_memory(f"between {kind} {form} {op.name}", room)
                            self._peers[f"{kind} {form}", op.name] = memory
                    if self._places is None:
                        self._places = communicator.peer_memory("normed", rows * columns * itemsize)
                    names.append(f"{kind} {form}")
                except PeerMemoryError as error:
                    self.missing[f"{kind} {form}"] = str(error)
        self.names = tuple(names)

    def run(self, name: str, buffer: torch.Tensor) -> None:
        """All that stands between the products, for the partial sums in `buffer`."""
        kind, form = name.split()
        rows = slice(0, len(buffer))
        part: Any = SimpleNamespace(rows=rows, nano_batch_rows=(rows,))
        nothing: Any = None
        normed, places = self._normed, None
        if self._places is not None and name not in self._communicators:
            places = self._places
            normed = places.data(self.rank, 0, normed.numel(), normed.dtype).view(normed.shape)
        buffers = {"x": self._residual, "o": buffer, "normed": normed}
        for op in self._chains[kind][0]:
            ranks: Any = {
                "communicator": self._communicators.get(name), "peers": self._peers.get((name, op.name)),
                "places": places,
            }  # fmt: skip
            kernel = form if isinstance(op, Collective) else self._kernel
            op.kernels[kernel](NanoContext(nothing, part, 0, buffers, {"weight": self._weight}, nothing, **ranks))
