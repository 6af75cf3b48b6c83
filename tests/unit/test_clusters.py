"""Clusters of weighted points: what is alike is one, groups stay apart while they can, few hold nearly all."""

import numpy as np
from hypothesis import given, settings, strategies as st

from nanoflow.plans.clusters import CLOSE, cluster


def clusters_of(points, weights=None, groups=None, most=6, held=0.95) -> list[list[int]]:
    points = np.array(points, float).reshape(len(points), -1)
    weights = np.ones(len(points)) if weights is None else np.array(weights, float)
    groups = np.zeros(len(points), np.int64) if groups is None else np.array(groups, np.int64)
    return sorted(cluster(points, weights, groups, most, held))


def test_what_is_close_is_one_and_what_is_not_stays_apart():
    near = CLOSE * 0.8
    assert clusters_of([0.0, 1.0, near, 2.0, 1.0 + near]) == [[0, 2], [1, 4], [3]]
    assert clusters_of([0.0, near], groups=[1, 2]) == [[0], [1]], "another bucket of rows"


def test_light_clusters_are_joined_before_heavy_ones():
    points, weights = [0.0, 1.0, 2.0, 2.5], [40.0, 40.0, 10.0, 10.0]
    assert clusters_of(points, weights, most=3) == [[0], [1], [2, 3]]
    assert clusters_of(points, weights, most=3, groups=[1, 2, 3, 4]) == [[0], [1], [2, 3]]
    assert clusters_of(points, weights, most=3, held=0.9) == [[0], [1], [2], [3]], "three of them hold enough"


def test_many_points_far_apart_are_clustered_in_coarser_cells():
    points = np.random.default_rng(0).uniform(0, 40, (3000, 3))
    found = clusters_of(points, most=4)
    assert sorted(n for members in found for n in members) == list(range(3000))
    assert sum(sorted(map(len, found))[-4:]) >= 0.95 * 3000


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_point_is_in_one_cluster_and_few_hold_nearly_all(data):
    count, most = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 6))
    number = st.floats(0, 8, allow_nan=False)
    points = data.draw(st.lists(st.tuples(number, number), min_size=count, max_size=count))
    weights = np.array(data.draw(st.lists(st.floats(0.01, 9), min_size=count, max_size=count)))
    groups = data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    found = clusters_of(points, weights, groups, most)
    assert sorted(n for members in found for n in members) == list(range(count))
    assert all(members == sorted(members) for members in found)
    heaviest = sorted((weights[members].sum() for members in found), reverse=True)[:most]
    assert sum(heaviest) >= 0.95 * weights.sum() * (1 - 1e-9)
    assert found == clusters_of(points, weights, groups, most)
