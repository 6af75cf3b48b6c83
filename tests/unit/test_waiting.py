"""The waiting queue against a plain sorted list, and what its order promises."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import nanoflow.waiting
from nanoflow.sampling_params import SamplingParams
from nanoflow.sequence import Sequence
from nanoflow.waiting import WaitingQueue

PARAMS = SamplingParams()


def sequence(index: int, prompt: int = 3, limit: int = 10) -> Sequence:
    made = Sequence(index, np.zeros(prompt, np.int32), PARAMS, seed=0)
    made.limit = limit
    return made


class Model:
    """What the queue promises, slowly: everything is sorted anew each time."""

    def __init__(self, longest_first: bool, block: int) -> None:
        self.longest_first, self.size = longest_first, block
        self.arrivals: list[tuple[int, Sequence]] = []
        self.preempted: list[Sequence] = []
        self.block = self.in_block = 0

    def add(self, new: Sequence) -> None:
        if (not self.arrivals and not self.preempted) or self.in_block == self.size:
            self.block, self.in_block = self.block + 1, 0
        self.in_block += 1
        self.arrivals.append((self.block, new))

    def order(self) -> list[Sequence]:
        def rank(s: Sequence) -> tuple[int, ...]:
            return (-s.limit, -len(s.prompt), s.index) if self.longest_first else (s.index,)

        blocks = [(block if self.longest_first else 0, rank(s), s) for block, s in self.arrivals]
        return sorted(self.preempted, key=rank) + [s for _, _, s in sorted(blocks, key=lambda entry: entry[:2])]

    def remove(self, gone: Sequence) -> None:
        self.preempted = [s for s in self.preempted if s is not gone]
        self.arrivals = [(b, s) for b, s in self.arrivals if s is not gone]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_queue_is_a_sorted_list(data: st.DataObject) -> None:
    longest_first = data.draw(st.booleans())
    block = data.draw(st.integers(1, 30))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nanoflow.waiting, "_FRONT", data.draw(st.integers(1, 6)))
        patch.setattr(nanoflow.waiting, "BLOCK", block)
        queue, model = WaitingQueue(), Model(longest_first, block)
        queue.longest_first = longest_first
        index, taken = 0, []
        for action in data.draw(st.lists(st.sampled_from("aaatpdsf"), max_size=60)):
            if action == "a":
                new = sequence(index, data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4)))
                index += 1
                queue.add(new)
                model.add(new)
            elif action == "t" and (first := queue.head()) is not None:
                assert first is model.order()[0]
                queue.take(first)
                model.remove(first)
                taken.append(first)
            elif action == "p" and taken:
                back = taken.pop(data.draw(st.integers(0, len(taken) - 1)))
                back.in_flight = data.draw(st.integers(0, 1))
                queue.put_back(back)
                model.preempted.append(back)
            elif action == "f":  # tokens in flight are seen
                for waiting in model.preempted:
                    waiting.in_flight = 0
            elif action == "d" and model.preempted:  # a stop string was found in a token that was in flight
                gone = model.preempted[0]
                gone.finish_reason = "stop"
                queue.discard(gone)
                model.remove(gone)
            elif action == "s":
                count = data.draw(st.integers(1, 8))
                sampled = [s.index for s in queue.sample(count)]
                preempted = {s.index for s in model.preempted}
                others = {s.index for s in model.order()} - preempted
                assert len(set(sampled)) == len(sampled) and preempted <= set(sampled) <= preempted | others
                assert min(count, len(others)) <= len(sampled) - len(preempted) < 2 * count
            order = model.order()
            assert len(queue) == len(order)
            assert queue.prompt_tokens == sum(len(s.prompt) for s in order)
            first = order[0] if order else None
            assert queue.head() is (first if first is None or first.in_flight == 0 else None)


def drain(queue: WaitingQueue) -> list[int]:
    order = []
    while (first := queue.head()) is not None:
        queue.take(first)
        order.append(first.index)
    return order


def test_longest_first_is_by_output_then_prompt_then_place() -> None:
    lengths = [(3, 5), (9, 5), (1, 8), (9, 5), (2, 8), (100, 4)]  # (prompt, limit)
    for longest_first, expected in ((False, [0, 1, 2, 3, 4, 5]), (True, [4, 2, 1, 3, 0, 5])):
        queue = WaitingQueue()
        queue.longest_first = longest_first
        for index, (prompt, limit) in enumerate(lengths):
            queue.add(sequence(index, prompt, limit))
        assert drain(queue) == expected


def test_nothing_waits_for_more_than_a_block_of_longer_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """An endless stream of long sequences behind a short one, and one is admitted for each that comes."""
    monkeypatch.setattr(nanoflow.waiting, "BLOCK", 50)
    queue = WaitingQueue()
    queue.longest_first = True
    queue.add(sequence(0, limit=1))
    queue.add(sequence(1, limit=9))
    for index in range(2, 1000):
        queue.add(sequence(index, limit=9))
        first = queue.head()
        assert first is not None
        queue.take(first)
        if first.index == 0:
            break
    assert index == 51  # it was overtaken by the 49 others of its block


def test_the_order_does_not_change_under_those_that_wait() -> None:
    queue = WaitingQueue()
    queue.add(sequence(0))
    with pytest.raises(ValueError, match="while 1 sequences wait"):
        queue.longest_first = True
    drain(queue)
    queue.longest_first = True


@pytest.mark.parametrize("longest_first", [False, True])
def test_a_full_block_costs_next_to_nothing_a_sequence(longest_first: bool) -> None:
    """Counted, not timed: how far entries are moved in the sorted list."""
    queue = WaitingQueue()
    queue.longest_first = longest_first
    limits = np.random.default_rng(0).integers(1, 1024, nanoflow.waiting.BLOCK)
    for index, limit in enumerate(limits.tolist()):
        queue.add(sequence(index, limit=limit))
        assert len(queue._front) <= 2 * nanoflow.waiting._FRONT
    order = drain(queue)
    assert order == (np.argsort(-limits, kind="stable").tolist() if longest_first else sorted(order))
