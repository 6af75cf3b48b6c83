"""Ranks that share one GPU, for a machine with no more: Python imports this at its start from a folder in PYTHONPATH.

Every process then takes this machine for one of eight GPUs that reach each other, and computes on the first. Kernels,
plans, graphs and the memory in common are what they are between GPUs; times are not. Without NVIDIA's Multi-Process
Service processes have the GPU in turn, a few milliseconds each, and nothing of two ranks runs at once. NCCL refuses a
GPU that another rank has: copies do what is asked of it.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch

from nanoflow import power
from nanoflow.ops import communicator, peer_memory
from nanoflow.ops.collectives import add_in_order
from nanoflow.parallel.messages import RankSettings
from nanoflow.search import ceilings

GPUS = 8
PIECE = 2**22
"""Bytes that are copied between two meetings."""


class Library:
    """What NanoFlow asks of NCCL's backend: every rank gets all ranks' parts, and adds in rank order."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta, max_ctas: int | None) -> None:
        self.rank, self.size = rank, size
        store = torch.distributed.PrefixStore("library", store)
        device = torch.device("cuda", 0)
        self.memory = peer_memory.symmetric_memory(store, rank, size, device, size * PIECE, timeout.total_seconds())

    def allreduce(self, tensors: list[torch.Tensor], options: Any = None) -> "Library":
        flat = tensors[0].view(-1)
        for here, parts in self._exchanged(flat):
            flat[here] = add_in_order(torch.stack(parts))
        return self

    def broadcast(self, tensors: list[torch.Tensor], options: Any) -> "Library":
        flat = tensors[0].view(-1)
        for here, parts in self._exchanged(flat):
            flat[here] = parts[options.rootRank]
        return self

    def _allgather_base(self, out: torch.Tensor, tensor: torch.Tensor, options: Any) -> "Library":
        for here, parts in self._exchanged(tensor):
            for part, rows in zip(parts, out.view(self.size, -1), strict=True):
                rows[here] = part
        return self

    def _reduce_scatter_base(self, out: torch.Tensor, tensor: torch.Tensor, options: Any) -> "Library":
        own = self.rank * len(out)
        for here, parts in self._exchanged(tensor):
            first, last = max(here.start, own), min(here.stop, own + len(out))
            if first < last:  # which may be where `tensor` has it, sent by now
                total = add_in_order(torch.stack(parts))
                out[first - own : last - own] = total[first - here.start : last - here.start]
        return self

    def wait(self) -> None:
        """All is queued on the current stream."""

    def abort(self) -> None:
        """Nothing waits outside of kernels."""

    def _exchanged(self, flat: torch.Tensor) -> Iterator[tuple[slice, list[torch.Tensor]]]:
        """Pieces of `flat`, and every rank's: until the next one is asked for."""
        from nanoflow.ops.all_reduce_triton import meet

        each = PIECE // flat.element_size()
        for first in range(0, len(flat), each):
            here = slice(first, min(first + each, len(flat)))
            count = here.stop - first
            for rank in range(self.size):
                self.memory.data(rank, self.rank * PIECE, count, flat.dtype).copy_(flat[here])
            meet(self.memory)
            yield here, [self.memory.data(self.rank, rank * PIECE, count, flat.dtype) for rank in range(self.size)]
            meet(self.memory)


def gpus(found: Callable[[], int] = torch.cuda.device_count) -> int:
    """As many as are there while torch begins, which looks at each of them."""
    return found() if hasattr(torch.cuda._tls, "is_initializing") else GPUS


for owner, name, value in (
    (communicator, "_nccl", Library),
    (peer_memory, "_out_of_reach", lambda *_: ""),
    (RankSettings, "of_rank", lambda self, rank: replace(self, rank=rank)),
    (torch.cuda, "device_count", gpus),
    (torch.cuda, "can_device_access_peer", lambda *_: True),
    (torch.cuda, "set_device", lambda _, really=torch.cuda.set_device: really(0)),
    (power, "_open_nvml", lambda _: None),  # one card's energy is not two cards'
    (ceilings, "LINK_CALLS", {**ceilings.LINK_CALLS, "cuda": (1, 2)}),
):
    getattr(owner, name)  # or it has another name by now
    setattr(owner, name, value)
os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
