"""The paged KV cache's bookkeeping: which pages of the pool belong to which request. No tensor lives here."""

import numpy as np
from numpy.typing import NDArray

from nanoflow.ops.batch import RESERVED_PAGE

__all__ = ["KVCache"]

_SEARCH_WINDOW = 2048


class KVCache:
    """Hands out the pages of a pool to slots (a slot is the place of one running request).

    The lowest free pages go first, so that the used part of the pool stays dense at its low end: attention on a CPU
    reads whole ranges of pages. Page `RESERVED_PAGE` takes the writes of padding rows and is never handed out.

    Args:
        pages: pages in the pool, the reserved one included.
        page_size: tokens a page.
        max_running: slots.
        max_pages_per_sequence: columns of the page table.
    """

    def __init__(self, pages: int, page_size: int, max_running: int, max_pages_per_sequence: int) -> None:
        if pages < 2:
            raise ValueError(f"a KV cache needs at least 2 pages, one of them reserved; it was given {pages}")
        if page_size < 1 or max_running < 1 or max_pages_per_sequence < 1:
            raise ValueError(
                "page_size, max_running and max_pages_per_sequence must be at least 1, "
                f"not {page_size}, {max_running} and {max_pages_per_sequence}"
            )
        self.pages = pages
        self.page_size = page_size
        self.max_running = max_running
        self.max_pages_per_sequence = max_pages_per_sequence
        self.page_table: NDArray[np.int32] = np.full((max_running, max_pages_per_sequence), RESERVED_PAGE, np.int32)
        """[max_running, max_pages_per_sequence]; entries that hold no page are `RESERVED_PAGE`."""
        self.page_count: NDArray[np.int32] = np.zeros(max_running, np.int32)
        """[max_running] pages that each slot holds."""
        self.free_pages = pages - 1
        self._is_free = np.ones(pages, np.bool_)
        self._is_free[RESERVED_PAGE] = False
        self._lowest_free = RESERVED_PAGE + 1  # no page below it is free

    @property
    def usable_pages(self) -> int:
        """Pages that requests can hold."""
        return self.pages - 1

    @property
    def used_pages(self) -> int:
        return self.usable_pages - self.free_pages

    def pages_for(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens of one request."""
        return -(-tokens // self.page_size)

    def allocate(self, slots: NDArray[np.integer], counts: NDArray[np.integer]) -> None:
        """Gives ``counts[i]`` more pages to ``slots[i]``; slots are distinct.

        Raises ValueError, and changes nothing, if too few pages are free or a slot would hold more than its row can.
        """
        total = int(counts.sum())
        if total > self.free_pages:
            raise ValueError(f"{total} KV pages were asked for, but only {self.free_pages} are free")
        if total == 0:
            return
        held = self.page_count[slots]
        if int((held + counts).max()) > self.max_pages_per_sequence:
            raise ValueError(f"a request cannot hold more than {self.max_pages_per_sequence} KV pages")
        ends = np.cumsum(counts)
        columns = np.arange(total) + np.repeat(held - (ends - counts), counts)
        self.page_table[np.repeat(slots, counts), columns] = self._take(total)
        self.page_count[slots] += counts.astype(np.int32)

    def free(self, slot: int) -> None:
        """Takes back all pages of a slot."""
        count = int(self.page_count[slot])
        pages = self.page_table[slot, :count]
        if count:
            self._is_free[pages] = True
            self._lowest_free = min(self._lowest_free, int(pages.min()))
            self.free_pages += count
        self.page_table[slot, :count] = RESERVED_PAGE
        self.page_count[slot] = 0

    def _take(self, total: int) -> NDArray[np.int64]:
        """Marks the `total` lowest free pages as used; [total], ascending."""
        found: list[NDArray[np.int64]] = []
        start, missing = self._lowest_free, total
        while missing:
            stop = start + max(_SEARCH_WINDOW, 2 * missing)
            pages = np.flatnonzero(self._is_free[start:stop])[:missing] + start
            found.append(pages)
            missing -= len(pages)
            start = stop
        taken = found[0] if len(found) == 1 else np.concatenate(found)
        self._is_free[taken] = False
        self._lowest_free = int(taken[-1]) + 1
        self.free_pages -= total
        return taken
