"""Who gets which request: fake replicas of different speeds, deaths, orders."""

import heapq
import math
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, strategies as st

from nanoflow.replicas.dispatch import LEAST_WAITING, Dispatcher, Pending
from nanoflow.sampling_params import SamplingParams


def pending(id: int, *, prompt: int = 4, max_tokens: int = 8, n: int = 1) -> Pending:
    params = SamplingParams(max_tokens=max_tokens, n=n)
    return Pending(id, np.zeros(prompt, np.int32), params, place=id, arrived=0.0)


class FakeReplica:
    """Runs requests of one time unit each, divided by its speed, in so many slots."""

    def __init__(self, speed: float, slots: int) -> None:
        self.speed, self.slots = speed, slots
        self.waiting: list[Pending] = []
        self.running: list[tuple[float, int]] = []  # heap of (end, id)
        self.taken = 0
        self.ended = 0.0
        self.idle_since = 0.0
        self.starved = 0.0  # time with free slots after its first request

    def advance(self, now: float) -> list[int]:
        done = []
        while self.running and self.running[0][0] <= now:
            end, id = heapq.heappop(self.running)
            done.append(id)
            self.ended = end
            if self.waiting:
                heapq.heappush(self.running, (end + 1 / self.speed, self.waiting.pop(0).id))
        while self.waiting and len(self.running) < self.slots:
            heapq.heappush(self.running, (now + 1 / self.speed, self.waiting.pop(0).id))
        return done


class Machine:
    """A dispatcher with fake replicas, in steps of time."""

    def __init__(self, replicas: list[FakeReplica], *, full: int = 64, longest_first: bool = False) -> None:
        self.dispatcher = Dispatcher(len(replicas), 1000, longest_first=longest_first)
        self.replicas = dict(enumerate(replicas))
        self.finished: list[int] = []
        self.ran_on: dict[int, int] = {}
        self.now = 0.0
        for number, replica in self.replicas.items():
            self.dispatcher.join(number, full=full, most_tokens=10**6, max_running=replica.slots)

    def step(self, seconds: float = 0.01) -> None:
        self.now += seconds
        for number, replica in self.replicas.items():
            for id in replica.advance(self.now):
                assert self.dispatcher.finished(number, id).id == id
                self.finished.append(id)
            waiting = sum(each.params.n for each in replica.waiting)
            tokens = sum(len(each.token_ids) * each.params.n for each in replica.waiting)
            self.dispatcher.told(number, taken=replica.taken, waiting=waiting, waiting_tokens=tokens)
            replica.taken = 0
        while (assigned := self.dispatcher.assign()) is not None:
            number, request = assigned
            self.replicas[number].waiting.append(request)
            self.replicas[number].taken += 1
            self.ran_on[request.id] = number

    def kill(self, number: int) -> int:
        del self.replicas[number]
        return self.dispatcher.leave(number)

    def run(self, limit: int = 100_000) -> None:
        for _ in range(limit):
            if not self.dispatcher.unfinished:
                return
            self.step()
        raise AssertionError(f"{self.dispatcher.unfinished} requests are unfinished")


@pytest.mark.parametrize("speeds", [(1.0, 1.0), (1.0, 3.0), (0.5, 1.0, 4.0)])
def test_replicas_of_different_speed_end_together(speeds: tuple[float, ...]) -> None:
    machine = Machine([FakeReplica(speed, slots=8) for speed in speeds])
    for id in range(2000):
        machine.dispatcher.add(pending(id))
    machine.run()
    ends = [replica.ended for replica in machine.replicas.values()]
    # The last requests of the slowest take 1 / its speed; a queue of `LEAST_WAITING` may be left in front of them.
    assert max(ends) - min(ends) <= (1 + LEAST_WAITING / 8) / min(speeds) + 0.1
    counts = Counter(machine.ran_on.values())
    for number, speed in enumerate(speeds):
        assert counts[number] / 2000 == pytest.approx(speed / sum(speeds), rel=0.15)
    # Nobody could have been much faster: the slots of all of them were full nearly all the time.
    assert max(ends) <= 1.1 * 2000 / (8 * sum(speeds)) + 2 / min(speeds)


def test_hands_are_full_in_the_middle_of_a_run_and_small_at_its_end() -> None:
    dispatcher = Dispatcher(2, 100)
    for number in range(2):
        dispatcher.join(number, full=50, most_tokens=10**6, max_running=10)
    dispatcher.expects_more = True
    for id in range(300):
        dispatcher.add(pending(id))
    given = Counter(assigned[0] for assigned in iter(dispatcher.assign, None))
    assert given == {0: 50, 1: 50} and dispatcher.expected(0) == math.inf
    for number in range(2):  # what waits has been begun, down to just above half: no refill yet
        dispatcher.told(number, taken=50, waiting=26, waiting_tokens=0)
    assert dispatcher.assign() is None
    dispatcher.told(0, taken=0, waiting=25, waiting_tokens=0)
    assert Counter(assigned[0] for assigned in iter(dispatcher.assign, None)) == {0: 25}
    # All are known now: 175 in the queue and 76 waiting in hands; a quarter of that is more than a full hand ...
    dispatcher.expects_more = False
    assert dispatcher.assign() is None
    assert dispatcher.expected(0) == 251 / 2 - 50 and dispatcher.expected(1) == 251 / 2 - 26
    # ... until there are fewer.
    dispatcher.told(0, taken=25, waiting=0, waiting_tokens=0)
    dispatcher.told(1, taken=0, waiting=0, waiting_tokens=0)
    given = Counter(assigned[0] for assigned in iter(dispatcher.assign, None))
    assert given == {0: 44, 1: 44}
    assert dispatcher.waiting == 87 and dispatcher.expected(0) == 175 / 2 - 44
    for _ in range(20):
        for number in range(2):
            dispatcher.told(number, taken=given[number], waiting=0, waiting_tokens=0)
        given = Counter(assigned[0] for assigned in iter(dispatcher.assign, None))
    assert dispatcher.waiting == 0 and dispatcher.expected(0) == dispatcher.expected(1) == 0


def test_a_few_requests_are_spread() -> None:
    dispatcher = Dispatcher(3, 100)
    for number in range(3):
        dispatcher.join(number, full=1024, most_tokens=10**6, max_running=512)
    dispatcher.expects_more = True
    for id in range(9):  # they come one at a time, as with arrivals
        dispatcher.add(pending(id))
        assigned = dispatcher.assign()
        assert assigned is not None and dispatcher.assign() is None
        dispatcher.told(assigned[0], taken=1, waiting=0, waiting_tokens=0)
    assert [dispatcher.holds(number) for number in range(3)] == [3, 3, 3]


def test_long_prompts_fill_a_hand_by_their_tokens() -> None:
    dispatcher = Dispatcher(1, 10_000)
    dispatcher.join(0, full=1000, most_tokens=900, max_running=8)
    dispatcher.expects_more = True
    for id in range(10):
        dispatcher.add(pending(id, prompt=200, n=2))
    assert len([*iter(dispatcher.assign, None)]) == 3
    assert dispatcher.waiting == 14 and dispatcher.waiting_tokens == 7 * 200


def test_longest_first_goes_through_the_shared_queue() -> None:
    machine = Machine([FakeReplica(1.0, 2), FakeReplica(1.0, 2)], longest_first=True)
    lengths = random.Random(1).sample(range(1, 500), 60)
    for id, length in enumerate(lengths):
        machine.dispatcher.add(pending(id, max_tokens=length))
    given = [assigned[1].params.max_tokens for assigned in iter(machine.dispatcher.assign, None)]
    assert given == sorted(lengths, reverse=True)[: len(given)] and given


def test_what_a_dead_replica_held_comes_first_again() -> None:
    machine = Machine([FakeReplica(1.0, 2), FakeReplica(1.0, 2)])
    for id in range(400):
        machine.dispatcher.add(pending(id))
    machine.step()
    held = [id for id, number in machine.ran_on.items() if number == 0]
    assert machine.kill(0) == len(held) > 2
    machine.dispatcher.told(1, taken=machine.replicas[1].taken, waiting=0, waiting_tokens=0)
    machine.replicas[1].taken = 0
    again = [assigned[1].id for assigned in iter(machine.dispatcher.assign, None)]
    assert again[: len(held)] == sorted(held)


def test_nothing_goes_out_when_nothing_is_to_begin() -> None:
    dispatcher = Dispatcher(1, 100)
    dispatcher.join(0, full=10, most_tokens=1000, max_running=4)
    dispatcher.add(pending(0))
    dispatcher.admitting = False
    assert dispatcher.assign() is None
    dispatcher.admitting = True
    assert dispatcher.assign() is not None and dispatcher.unfinished == 1


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=120),
    st.lists(st.tuples(st.floats(0.2, 5), st.integers(1, 5)), min_size=1, max_size=4),
    st.lists(st.integers(0, 300), max_size=3),
    st.booleans(),
)
def test_every_request_is_finished_once_whoever_dies(
    each: list[int], replicas: list[tuple[float, int]], deaths: list[int], longest_first: bool
) -> None:
    machine = Machine([FakeReplica(speed, slots) for speed, slots in replicas], full=16, longest_first=longest_first)
    for id, n in enumerate(each):
        machine.dispatcher.add(pending(id, n=n, max_tokens=1 + id * 7 % 13))
    for steps in sorted(deaths):
        for _ in range(steps):
            if machine.dispatcher.unfinished:
                machine.step()
        if len(machine.replicas) > 1:
            machine.kill(min(machine.replicas))
    machine.run()
    assert sorted(machine.finished) == list(range(len(each)))
    assert machine.dispatcher.waiting == machine.dispatcher.waiting_tokens == 0
