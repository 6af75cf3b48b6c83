"""Measured ceilings: medians, not lucky calls; a GPU's queue of events, with a stand-in for the GPU."""

import time
from typing import Any

import pytest
import torch

from nanoflow.search import ceilings


def test_a_ceiling_is_the_median_call_and_no_lucky_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "CPU_SECONDS", 0.1)
    calls = iter([0.0, 0.001, *[0.02] * 50])
    seconds = ceilings._median_seconds(lambda: time.sleep(next(calls)), torch.device("cpu"))
    assert seconds == pytest.approx(0.02, rel=0.2)


def test_a_gpu_is_timed_hot_with_launches_ahead_and_every_call_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    launched, collected, deepest = 0, 0, 0

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.at = 0

        def record(self) -> None:
            self.at = launched

        def synchronize(self) -> None:
            nonlocal collected
            collected += 1

        def elapsed_time(self, later: "Event") -> float:
            assert later.at == self.at + 1, "the pair is around one call"
            return 1000.0 if later.at == 1 else 2.0  # the very first is slow, in milliseconds

    def run() -> None:
        nonlocal launched, deepest
        launched += 1
        deepest = max(deepest, launched - collected)
        time.sleep(1e-4)

    class Device:
        def __init__(self, device: Any) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(ceilings, "SECONDS", 0.01)
    assert ceilings._median_seconds(run, torch.device("cuda")) == 0.002
    assert collected == launched and deepest == ceilings._QUEUED


def test_a_link_is_what_a_rank_sends_over_the_time_that_all_take(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        rank, size = 0, 4
        calls = 0

        def all_reduce(self, tensor: torch.Tensor) -> None:
            assert tensor.numel() * tensor.element_size() == ceilings.LINK_BYTES["cpu"]
            self.calls += 1
            time.sleep(0.5 if self.calls == 1 else 0.02)

    monkeypatch.setattr(ceilings, "LINK_BYTES", {"cpu": 4_000_000})
    slow: Any = Slow()
    found = ceilings.measure_link(slow, torch.device("cpu"), torch.float32)
    assert sum(ceilings.LINK_CALLS["cpu"]) == slow.calls, "as many on every rank"
    # Three halves of the buffer; the first call, for which ranks wait for each other, does not count.
    assert 0.1 * 6e6 / 0.02 < found <= 6e6 / 0.02


def test_this_machine_has_ceilings() -> None:
    found = ceilings.measure_ceilings("cpu", torch.float32)
    assert found.flops > 1e9 and found.bytes_per_second > 1e8
    assert ceilings.measure_ceilings("cpu", torch.float32) is found, "they are measured once"
