"""Few clusters for many weighted points.

Contract: every point is in one cluster, and the same points give the same clusters. A point has a group; clusters keep
to one group as long as that leaves few enough. Pseudo-code::

    one cluster for each group and each small cell of the space, cells so large that there are at most some hundred
    while the nearest two of a group are nearer than CLOSE:              join them
    while the heaviest `most` clusters hold less than `held` of the weight:
        join the two by which the weighted squares within clusters grow least (Ward's criterion), whatever their group

The first loop makes one of what is alike, however heavy; the second gives up detail where there is least weight.

Legend: P points, D dimensions, C clusters.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["CLOSE", "cluster"]

CLOSE = 0.1
_CELL = 0.05
_MOST_CELLS = 256
"""Joining takes time with the cube of them."""

Float = NDArray[np.float64]


def cluster(points: Float, weights: Float, groups: NDArray[np.int64], most: int, held: float) -> list[list[int]]:
    """The points of each cluster, ascending.

    Args:
        points: [P, D], of which distances are made.
        weights: [P] above 0.
        groups: [P].
        most: clusters that hold `held` of the weight, at most.
        held: from 0 to 1.
    """
    members, own = _cells(points, groups)
    sums = np.array([weights[m].sum() for m in members])
    centres = np.array([np.average(points[m], axis=0, weights=weights[m]) for m in members])

    def join(a: int, b: int) -> None:
        nonlocal sums, centres, own
        a, b = min(a, b), max(a, b)
        members[a] = sorted(members[a] + members.pop(b))
        centres[a] = (centres[a] * sums[a] + centres[b] * sums[b]) / (sums[a] + sums[b])
        sums[a] += sums[b]
        sums, own, centres = np.delete(sums, b), np.delete(own, b), np.delete(centres, b, axis=0)

    while len(sums) > 1:
        a, b, least = _nearest(np.where(own[:, None] == own, _squares(centres), np.inf))
        if least >= CLOSE**2:
            break
        join(a, b)
    while len(sums) > most and np.sort(sums)[-most:].sum() < held * weights.sum():
        a, b, _ = _nearest(_squares(centres) * (sums[:, None] * sums / (sums[:, None] + sums)))
        join(a, b)
    return members


def _cells(points: Float, groups: NDArray[np.int64]) -> tuple[list[list[int]], NDArray[np.int64]]:
    """The points of each cell that has some, and the cell's group [C]."""
    size = _CELL
    while True:
        keys = np.column_stack([groups, np.floor(points / size).astype(np.int64)])
        cells, own = np.unique(keys, axis=0, return_inverse=True)
        if len(cells) <= _MOST_CELLS or size > np.abs(points).max():  # then there is next to nothing but groups
            break
        size *= 1.5
    own = own.reshape(-1)
    return [np.flatnonzero(own == n).tolist() for n in range(len(cells))], cells[:, 0]


def _squares(centres: Float) -> Float:
    """[C, C] squared distances."""
    return np.asarray(((centres[:, None] - centres) ** 2).sum(axis=2))


def _nearest(costs: Float) -> tuple[int, int, float]:
    """The two clusters with the least cost, the first of equal ones."""
    costs = costs.copy()
    np.fill_diagonal(costs, np.inf)
    a, b = divmod(int(costs.argmin()), len(costs))
    return a, b, float(costs[a, b])
