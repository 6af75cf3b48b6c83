"""The KV cache's bookkeeping: no page leaks, none has two owners, and the used part of the pool stays dense."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from nanoflow.kv_cache import KVCache
from nanoflow.ops.batch import RESERVED_PAGE


def check(kv: KVCache, owned: dict[int, list[int]]) -> None:
    held = [page for pages in owned.values() for page in pages]
    assert len(held) == len(set(held)), "a page has two owners"
    assert RESERVED_PAGE not in held
    assert kv.used_pages == len(held) and kv.free_pages == kv.usable_pages - len(held), "a page leaked"
    for slot in range(kv.max_running):
        pages = owned.get(slot, [])
        assert kv.page_count[slot] == len(pages)
        assert kv.page_table[slot, : len(pages)].tolist() == pages
        assert (kv.page_table[slot, len(pages) :] == RESERVED_PAGE).all()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_random_allocation_and_freeing(data):
    pages, slots, columns = (data.draw(st.integers(low, high)) for low, high in ((2, 60), (1, 6), (1, 12)))
    kv = KVCache(pages, 4, slots, columns)
    owned: dict[int, list[int]] = {}
    for _ in range(data.draw(st.integers(1, 30))):
        if data.draw(st.booleans()):
            chosen = data.draw(st.lists(st.integers(0, slots - 1), unique=True, max_size=slots))
            counts = data.draw(st.lists(st.integers(0, 5), min_size=len(chosen), max_size=len(chosen)))
            overflows = any(len(owned.get(s, [])) + c > columns for s, c in zip(chosen, counts, strict=True))
            free = sorted(set(range(1, pages)) - {p for held in owned.values() for p in held})
            arguments = (np.array(chosen, np.int32), np.array(counts, np.int32))
            if sum(counts) > len(free) or (overflows and sum(counts)):
                with pytest.raises(ValueError, match="KV pages"):
                    kv.allocate(*arguments)
            else:
                kv.allocate(*arguments)
                taken = free[: sum(counts)]  # the lowest free pages, in order
                for slot, count in zip(chosen, counts, strict=True):
                    owned.setdefault(slot, []).extend(taken[:count])
                    del taken[:count]
        else:
            slot = data.draw(st.integers(0, slots - 1))
            kv.free(slot)
            owned.pop(slot, None)
        check(kv, owned)


def test_a_pool_larger_than_the_search_window():
    kv = KVCache(10_001, 1, 3, 10_000)
    one, two = np.array([0]), np.array([1])
    kv.allocate(one, np.array([6000]))
    kv.allocate(two, np.array([3000]))
    kv.free(0)
    kv.allocate(np.array([2]), np.array([6500]))
    assert kv.page_table[2, :6500].tolist() == [*range(1, 6001), *range(9001, 9501)]
    assert kv.free_pages == 500


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_pages_for(tokens, pages):
    assert KVCache(4, 16, 1, 3).pages_for(tokens) == pages


def test_sizes_that_make_no_sense():
    with pytest.raises(ValueError, match="at least 2 pages"):
        KVCache(1, 16, 1, 1)
    with pytest.raises(ValueError, match="page_size"):
        KVCache(8, 0, 1, 1)
