"""All-gather of columns, by ranks that reach each other's memory, in the forms of `nanoflow.ops.peer_rows`.

- ``push`` and the like: an own kernel, in which every rank writes its share to its columns in the other ranks' targets.
  Those are in memory that all ranks reach, so no one copies twice. A rank begins to write when all have come to the
  all-gather: what they had to read of the old rows they have read then, since it writes those rows by its accesses.
- ``copy_engine``: the bytes are moved by contiguous copies between devices, which the copy engines do without an SM.
  So shares arrive one rank's behind the other, and it is there that all ranks reach. A kernel on the own GPU then puts
  them side by side. The copies stand between two meetings: before the first, all have read what arrived there last.

`nanoflow.ops.columns_triton` has the kernels; flags, order and timeouts are those of `nanoflow.ops.all_reduce_triton`.
Any of them may be captured in a CUDA graph.

Shape legend: N ranks, T rows, C columns of a rank's share.
"""

import torch

from nanoflow.ops.peer_memory import PeerMemory
from nanoflow.ops.peer_rows import PUSH, ROW_FORMS, programs_of, send_rows

__all__ = ["COLUMN_FORMS", "gather_columns"]

COLUMN_FORMS = ROW_FORMS


def gather_columns(
    form: str,
    source_TC: torch.Tensor,
    gathered: torch.Tensor,
    target: torch.Tensor,
    first: int,
    peers: PeerMemory,
    places: PeerMemory,
    sms: int | None,
) -> None:
    """Put all ranks' `source_TC` side by side in `target`.

    All ranks call it with the same form, shapes, type and SMs (None: the lane is not confined); a `peers` serves one
    form of all-gathers of columns.

    Args:
        gathered: [T, N * C], where shares arrive with ``copy_engine``, which then is of a buffer that is this rank's
            data of `places`.
        target: [T, N * C], of such a buffer with the other forms.
        first: of the rows, in their buffers, the same on all ranks.
    """
    from nanoflow.ops import columns_triton
    from nanoflow.ops.all_reduce_triton import meet

    if not source_TC.numel():
        return
    if form in PUSH:
        columns_triton.all_gather(source_TC, first, peers, places, programs_of(form, sms))
        return
    # In rows of C columns, of which one of the buffer has N.
    begin = first * peers.size + peers.rank * len(source_TC)
    meet(peers)
    send_rows(source_TC, begin, peers, places)
    meet(peers)
    columns_triton.side_by_side(source_TC, gathered.view(peers.size, *source_TC.shape), target, peers.rank)
