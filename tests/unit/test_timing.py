"""Timing calls: on the CPU as they are, and what of it only a GPU does, with stand-ins for streams and graphs."""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanoflow.pipeline.partitions import PartitionError
from nanoflow.search import timing
from nanoflow.search.timing import capture, on_sms, time_interleaved

CUDA = torch.device("cuda")


@dataclass
class MadeUpGpu:
    """A GPU whose clock and energy go on with what is launched: every call takes as many milliseconds as it adds."""

    clock: float = 0.0
    """Milliseconds."""
    watts: float = 0.0
    used: float = 0.0
    captured: list[float] | None = None
    graphs: list[int] = field(default_factory=list)
    """Calls of each graph."""

    def call(self, milliseconds: float, watts: float) -> None:
        if self.captured is not None:
            self.captured.append(milliseconds)
        else:
            self.pass_by(milliseconds, watts)

    def pass_by(self, milliseconds: float, watts: float) -> None:
        self.watts = watts
        self.clock += milliseconds
        self.used += watts * milliseconds / 1e3

    def joules(self) -> float:
        """Moves in steps of a joule."""
        return float(int(self.used))

    def event(self) -> Any:
        made = SimpleNamespace(at=0.0, synchronize=lambda: None)
        made.record = lambda: setattr(made, "at", self.clock)
        made.elapsed_time = lambda other: other.at - made.at
        return made

    def graph(self) -> Any:
        made = SimpleNamespace(calls=[])

        def replay() -> None:
            for milliseconds in made.calls:
                self.pass_by(milliseconds, self.watts)

        made.replay = replay
        return made

    @contextmanager
    def capturing(self, graph: Any, stream: Any = None, capture_error_mode: str = "global") -> Any:
        self.captured = graph.calls
        yield
        self.captured = None
        self.graphs.append(len(graph.calls))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> MadeUpGpu:
    made = MadeUpGpu()
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(timing, "_event", made.event)
    # The host's clock is the device's: what is launched is over at once.
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: made.clock / 1e3))
    for name, stand_in in {
        "Stream": lambda device: stream,
        "current_stream": lambda device=None: stream,
        "stream": lambda stream: nullcontext(),
        "synchronize": lambda device=None: None,
        "CUDAGraph": made.graph,
        "graph": made.capturing,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return made


def test_calls_are_captured_until_a_graph_is_long_enough(gpu: MadeUpGpu) -> None:
    replays = capture(lambda: gpu.call(0.02, 300.0), CUDA)
    assert replays.calls == 50 and gpu.graphs == [50]
    assert capture([lambda: gpu.call(0.3, 300.0)] * 5, CUDA).calls == 50, "ten turns of five at least"
    assert capture(lambda: gpu.call(30.0, 300.0), CUDA).calls == 1
    assert capture(lambda: gpu.call(1e-4, 300.0), CUDA).calls == timing.MAX_CALLS


def test_candidates_take_turns_and_their_energy_is_told(gpu: MadeUpGpu) -> None:
    candidates = {"slow": lambda: gpu.call(2.0, 500.0), "fast": [lambda: gpu.call(0.5, 500.0)] * 4}
    found = time_interleaved(candidates, 0.5, device=CUDA, joules=gpu.joules)
    assert found["slow"].median_ms == pytest.approx(2.0) and found["fast"].median_ms == pytest.approx(0.5)
    for timing_of, milliseconds in ((found["slow"], 2.0), (found["fast"], 0.5)):
        assert timing_of.watts == pytest.approx(500.0, rel=0.05)
        assert timing_of.joules == pytest.approx(0.5 * milliseconds, rel=0.05)
        assert timing_of.calls * milliseconds == pytest.approx(500.0, rel=0.3)
        assert timing_of.p10_ms <= timing_of.median_ms <= timing_of.p90_ms
    untold = time_interleaved(candidates, 0.1, device=CUDA)
    assert untold["slow"].watts is None and untold["slow"].joules is None


def test_blocks_that_are_too_short_tell_no_energy(gpu: MadeUpGpu) -> None:
    """At 50 watts a step of the counter takes 20 ms; a turn has one at most."""
    found = time_interleaved(
        {"a": lambda: gpu.call(1.0, 50.0)}, 0.02, slice_seconds=0.01, device=CUDA, joules=gpu.joules
    )
    assert found["a"].joules is None and found["a"].median_ms == pytest.approx(1.0)


def test_on_a_cpu_calls_are_timed_one_by_one() -> None:
    seen: list[str] = []
    found = time_interleaved(
        {"a": lambda: seen.append("a"), "b": [lambda: seen.append("b")] * 2}, 0.0, warmup_seconds=0.0, device="cpu"
    )
    assert set(found) == {"a", "b"} and found["a"].calls >= 2 and found["b"].calls >= 4
    assert seen[:3] == ["a", "b", "b"] and found["a"].watts is None
    with on_sms(3, torch.device("cpu")) as stream:
        assert stream is None


def test_a_part_of_the_sms_is_the_current_stream_and_given(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    class MadeUpPartition:
        def __init__(self, sms: tuple[int, ...], device: torch.device) -> None:
            if min(sms) < 8:
                raise PartitionError("too few")
            seen.append(sms)
            self.streams = tuple(f"{count} SMs" for count in sms)

        def close(self) -> None:
            seen.append("closed")

    monkeypatch.setattr(timing, "Partition", MadeUpPartition)
    monkeypatch.setattr(timing, "device_sms", lambda device: 132)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(seen.append(stream)))
    for sms, parts in ((24, (108, 24)), (100, (100,)), (128, (128,))):
        seen.clear()
        with on_sms(sms, CUDA) as stream:
            assert stream == f"{sms} SMs"
        assert seen == [parts, f"{sms} SMs", "closed"], "the last part of two, or the first"
