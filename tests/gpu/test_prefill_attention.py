"""Prefill attention on the GPU against float64, and a captured launch whose work changes between replays."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu


def cases() -> list:
    if not torch.cuda.is_available():
        return []
    from benchmarks.kernels.prefill_attention import check

    return check("cuda")


def test_against_float64() -> None:
    rows = cases()
    assert len(rows) > 30
    assert not [row for row in rows if not row["ok"]]


def test_one_captured_launch_serves_other_chunks() -> None:
    from benchmarks.kernels.prefill_attention import Problem
    from nanoflow.ops.prefill_attention_triton import default_tile, prefill_attention
    from nanoflow.ops.prefill_work import item_bound, prefill_work

    tile = default_tile(128, 2, 128, torch.cuda.get_device_capability())
    problem = Problem([300, 212], [700, 212], 32, 8, 128)
    capacity = item_bound(512, 4, tile, 32, 8)

    def work(lengths: list[int], context: list[int]) -> torch.Tensor:
        lengths_C = np.array(lengths, np.int32)
        rows_C = (np.cumsum(lengths_C) - lengths_C).astype(np.int32)
        return torch.from_numpy(
            prefill_work(
                rows_C,
                lengths_C,
                np.array(context, np.int32),
                tile,
                heads=32,
                kv_heads=8,
                kv_token_bytes=512,
                capacity=capacity,
            )
        )

    items = work([], []).cuda()

    def launch() -> None:
        prefill_attention(problem.q, problem.kv, problem.table, items, problem.out, tile=tile, scale=problem.scale)

    launch()
    assert problem.out.isnan().all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    for lengths, context in (([300, 212], [700, 212]), ([1, 50], [1, 180]), ([], []), ([512], [512])):
        items.copy_(work(lengths, context))
        problem.out.fill_(torch.nan)
        graph.replay()
        problem.lengths, problem.context = lengths, context
        expected = problem.expected()
        chosen = expected.isfinite()
        torch.testing.assert_close(problem.out[chosen].double(), expected[chosen], atol=2e-2, rtol=2e-2)
        written = sum(lengths)
        assert problem.out[:written].isfinite().all() and problem.out[written:].isnan().all()
