"""What an operation declares: its resource, its accesses, its weights, its cost and its reference maths.

An operation knows no plan and no stream. It sees one nano-batch of one layer at a time through `NanoContext`.
Everything that planning needs (which nano-ops may run side by side) follows from the declared accesses; nothing is
written by hand.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal, TypeVar

import torch

from nanoflow.ops.batch import RowClass
from nanoflow.ops.communicator import Communicator
from nanoflow.ops.device_batch import BatchPart, DeviceBatch
from nanoflow.ops.peer_memory import PeerMemory

__all__ = [
    "KV",
    "SCRATCH",
    "Access",
    "Cost",
    "NanoContext",
    "Operation",
    "Resource",
    "RowClass",
    "TensorSlice",
    "Weight",
    "Work",
    "device_sms",
    "interpreting",
    "triton_on_cuda",
]

Kept = TypeVar("Kept")

Resource = Literal["compute", "memory", "network"]

KV = "kv"
"""Name of the buffer that stands for a layer's KV cache. It is one buffer a layer, indexed like the rows that wrote
it."""

SCRATCH = "scratch"
"""Name of the buffer that stands for scratch memory. It is one buffer a lane."""


@dataclass(frozen=True)
class Access:
    """One buffer that an operation reads or writes, and which rows of it.

    `prefix` widens the access from the nano-batch's own rows to those of all earlier nano-batches too: a piece of a
    prompt attends to the keys that earlier pieces of the same prompt appended in this very iteration.
    """

    buffer: str
    rows: RowClass = RowClass.ALL
    write: bool = False
    prefix: bool = False


@dataclass(frozen=True)
class TensorSlice:
    """What one rank holds of a tensor of `shape`: `ranges` (begin, end) of dimension `dim`, one behind the other."""

    shape: tuple[int, ...]
    dim: int
    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Weight:
    """A parameter: the checkpoint's tensors `parts`, concatenated along dimension 0, make one tensor of `shape`.

    Names are relative to the layer (``self_attn.q_proj.weight``) or, for operations outside the layers, absolute.
    """

    name: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]
    optional: bool = False
    slice: TensorSlice | None = None
    """With tensor parallelism, what `shape` has of the concatenated tensor; what the ranges leave of `shape`, at the
    end of the dimension, is zero. None: all of it."""

    @property
    def whole(self) -> tuple[int, ...]:
        """Shape of the concatenated tensor that it is, or is a slice of."""
        return self.shape if self.slice is None else self.slice.shape


@dataclass(frozen=True)
class Work:
    """How much an iteration (or one nano-batch of it) asks of an operation."""

    decode_rows: int = 0
    prefill_rows: int = 0
    decode_context: int = 0
    """KV tokens read by decode attention, summed over the decode rows."""
    prefill_context: int = 0
    """KV tokens read by prefill attention, summed over the prefill segments."""
    prefill_pairs: int = 0
    """(query, key) pairs of prefill attention, after the causal mask."""
    sampled_rows: int = 0

    @property
    def rows(self) -> int:
        return self.decode_rows + self.prefill_rows

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.decode_rows + other.decode_rows,
            self.prefill_rows + other.prefill_rows,
            self.decode_context + other.decode_context,
            self.prefill_context + other.prefill_context,
            self.prefill_pairs + other.prefill_pairs,
            self.sampled_rows + other.sampled_rows,
        )

    def over(self, count: int) -> "Work":
        """The mean of `count` iterations that add up to this."""
        count = max(1, count)
        return Work(
            round(self.decode_rows / count),
            round(self.prefill_rows / count),
            round(self.decode_context / count),
            round(self.prefill_context / count),
            round(self.prefill_pairs / count),
            round(self.sampled_rows / count),
        )


@dataclass(frozen=True)
class Cost:
    """What a piece of work takes: floating-point operations, bytes to and from memory, bytes on the wire."""

    flops: float = 0.0
    bytes: float = 0.0
    wire_bytes: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes, self.wire_bytes + other.wire_bytes)

    def __mul__(self, times: float) -> "Cost":
        return Cost(self.flops * times, self.bytes * times, self.wire_bytes * times)


@dataclass
class NanoContext:
    """What a kernel sees of one nano-op: its rows, its layer, its weights and the buffers that the plan assigned."""

    batch: DeviceBatch
    part: BatchPart
    """The nano-batch (or the whole batch, for an operation that is not split): its rows and its attention work."""
    layer: int
    buffers: Mapping[str, torch.Tensor]
    """Physical buffer of every value, [capacity, columns]."""
    weights: Mapping[str, torch.Tensor]
    """This operation's weights in this layer, by `Weight.name`."""
    kv: torch.Tensor
    """This layer's KV cache, [pages, 2, kv heads, page size, head size]."""
    sms: int | None = None
    """SMs that its lane has; None: the lane is not confined to a part of the device."""
    lane: str = ""
    communicator: Communicator | None = None
    """To the other ranks, for collectives; None where there is one rank."""
    peers: PeerMemory | None = None
    """What the ranks have in common of their memory, for forms of collectives that use it. It is the lane's own."""
    places: PeerMemory | None = None
    """All ranks' buffers of the value that a collective gathers, for forms that write into them: each begins its
    block's data."""

    def scratch(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        """Memory that outlives the iteration, one for each lane: a lane's nano-ops run one after the other."""
        return self.batch.arrays.kept(("lane", self.lane, self.sms, key), make)

    def rows(self, buffer: str) -> torch.Tensor:
        """The nano-batch's rows of a buffer, [rows, columns], padding included."""
        return self.buffers[buffer][self.part.rows]


Kernel = Callable[[NanoContext], None]

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def triton_on_cuda(device: torch.device, dtype: torch.dtype) -> str:
    """``triton`` where the Triton kernels run, else ``reference``: the choice of most operations."""
    return "triton" if device.type == "cuda" and dtype in TRITON_DTYPES else "reference"


def interpreting() -> bool:
    """Whether Triton's kernels run on a CPU, in its interpreter, as tests have it."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def device_sms(device: torch.device) -> int:
    """SMs of a GPU; of a CPU, where Triton's kernels run in its interpreter, a few."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


class Operation(ABC):
    """One step of a model's layer. Subclasses are plain objects, made by the graph builder and never changed after."""

    resource: ClassVar[Resource]

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    @abstractmethod
    def accesses(self) -> tuple[Access, ...]:
        """Every buffer read or written, `KV` and `SCRATCH` included."""

    @property
    def weights(self) -> tuple[Weight, ...]:
        return ()

    @property
    def weights_of(self) -> str:
        """The operation by whose name its weights are kept: itself, unless a sharding made it of another one."""
        return self.name

    @property
    def row_class(self) -> RowClass:
        """The rows that the operation works on; one without such rows in a nano-batch is skipped."""
        return RowClass.ALL

    def scratch_bytes(self, rows: int, sms: int) -> int:
        """Scratch memory in bytes for `rows` rows on `sms` SMs; non-zero exactly if `SCRATCH` is among the accesses."""
        return 0

    @abstractmethod
    def cost(self, work: Work, itemsize: int) -> Cost:
        """FLOPs and bytes of `work`, for weights and activations of `itemsize` bytes an element."""

    @abstractmethod
    def reference(self, context: NanoContext) -> None:
        """The operation in plain PyTorch: reads and writes exactly what `accesses` says. The standard for every
        kernel."""

    @property
    def kernels(self) -> Mapping[str, Kernel]:
        """The ways to run it, by name; `reference` is always one."""
        return {"reference": self.reference}

    @property
    def cpu_kernels(self) -> tuple[str, ...]:
        """Those of `kernels` that run on a CPU; all others need a GPU."""
        return ("reference",)

    def preferred_kernel(self, device: torch.device, dtype: torch.dtype, sms: int | None = None) -> str:
        """Name of the kernel to run on `device` for activations of `dtype`, when the plan names none.

        `sms` is for a lane that has so many of the device's SMs and no others.
        """
        return "reference"

    def prepare(self, context: NanoContext, kernel: str) -> None:  # noqa: B027 - most have nothing to prepare
        """Make what `kernel` needs once an iteration and is the same in every layer: work lists, cosines.

        It goes into the cache of `context.part`, and is made before all layers: lanes side by side must not depend on
        which of them asks first. `context.layer` is 0 and stands for all layers.
        """

    def pack(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Turn a loaded weight into the layout that the device's kernels want; by default it stays as it is."""
        return weight

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name})"
