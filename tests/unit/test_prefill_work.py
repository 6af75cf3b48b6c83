"""Prefill attention's work list: every row and head in one item, heavy ones first, in lists of fixed size."""

import numpy as np
import pytest

from nanoflow.ops.prefill_work import PrefillTile, item_bound, pack_heads, prefill_work

HEADS = {"heads": 12, "kv_heads": 4}


def items(lengths: list[int], context: list[int], tile: PrefillTile, **options) -> np.ndarray:
    lengths_C = np.array(lengths, np.int32)
    rows_C = (np.cumsum(lengths_C) - lengths_C + 5).astype(np.int32)
    options = {**HEADS, "kv_token_bytes": 512, **options}
    return prefill_work(rows_C, lengths_C, np.array(context, np.int32), tile, **options)


@pytest.mark.parametrize("pack", [0, 1, 2])
@pytest.mark.parametrize("window", [None, 40])
def test_every_row_and_head_once(pack: int, window: int | None) -> None:
    tile = PrefillTile(16, 16, warps=4, stages=2, pack=pack)
    assert pack_heads(tile, 12, 4) == (1 if pack == 2 else pack or 3)
    lengths, context = [1, 7, 70, 33], [300, 7, 200, 40]
    work = items(lengths, context, tile, window=window, first_segment=2)
    assert work[0, 0] == len(work) - 1 <= item_bound(sum(lengths), 4, tile, 12, 4)
    found = np.zeros((sum(lengths) + 5, 12), int)
    for row, rows, position, segment, head, *_ in work[1:].tolist():
        start = 5 + sum(lengths[: segment - 2])
        assert start <= row and row + rows <= start + lengths[segment - 2]
        assert position == context[segment - 2] - lengths[segment - 2] + row - start
        found[row : row + rows, head : head + pack_heads(tile, 12, 4)] += 1
    assert (found[5:] == 1).all() and not found[:5].any()


def test_heavy_items_come_first() -> None:
    tile = PrefillTile(128, 64, warps=4, stages=2)
    work = items([2048] * 8, [2048] * 8, tile, heads=32, kv_heads=8)[1:]
    assert len(work) == 8 * 64 * 8
    cost = (work[:, 2] + 31) // 64 + 1
    assert (np.diff(cost) > 0).sum() == 3  # four groups of 16 MiB each


def test_a_list_of_fixed_size() -> None:
    tile = PrefillTile(16, 16, warps=4, stages=2)
    work = items([9], [9], tile, capacity=20)
    assert work.shape == (21, 8) and work[0, 0] == 8 and not work[9:].any()
    assert items([], [], tile, capacity=3)[0, 0] == 0
    with pytest.raises(ValueError, match="8 items of prefill attention do not fit a list of 7"):
        items([9], [9], tile, capacity=7)
