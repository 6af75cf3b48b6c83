"""Which rows of a nano-batch are a rank's, where ranks divide the rows of a value among them.

A rank's share is contiguous, and of each nano-batch as the dense batch has it, padding included: equal shares, rounded
up, so the last ranks may have fewer rows, or none. Every operation on a nano-batch agrees on it, and so do all ranks.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nanoflow.ops.batch import NanoBatchRows

__all__ = ["own_rows", "row_share", "share_rows"]


def share_rows(rows: int, ranks: int) -> int:
    """Rows of a share of `rows` rows: the most that a rank has."""
    return -(-rows // ranks)


def row_share(rows: slice, rank: int, ranks: int) -> slice:
    """The rows of a rank among `rows`, a nano-batch's; empty if it has none."""
    share = share_rows(rows.stop - rows.start, ranks)
    start = min(rows.start + rank * share, rows.stop)
    return slice(start, min(start + share, rows.stop))


def own_rows(nano_batches: Sequence[NanoBatchRows], rank: int, ranks: int) -> NDArray[np.bool_]:
    """[T] whether a row of the dense batch is the rank's."""
    own = np.zeros(nano_batches[-1].end if nano_batches else 0, np.bool_)
    for each in nano_batches:
        own[row_share(slice(each.start, each.end), rank, ranks)] = True
    return own
