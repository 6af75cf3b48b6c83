"""How SMs are dealt to the parts of a partition, and what is said where they cannot be set apart."""

from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st

from nanoflow.pipeline import partitions
from nanoflow.pipeline.partitions import Partition, PartitionError, allot, unavailable


@pytest.mark.parametrize(
    ("parts", "device", "dealt"),
    [
        ((92, 40), (16, 4), [(11, True), (5, False)]),
        ((92, 40), (15, 12), [(10, True), (5, False)]),
        ((40, 92), (14, 20), [(5, False), (9, True)]),
        ((88, 40), (16, 4), [(11, False), (5, False)]),
        ((64, 36, 32), (16, 4), [(8, False), (4, True), (4, False)]),
        ((96, 32), (14, 16), [(10, True), (4, False)]),
        ((88, 24), (14, 16), [(11, False), (3, False)]),
        ((8,), (15, 12), [(1, False)]),
    ],
)
def test_parts_are_groups_and_one_may_have_the_rest(
    parts: tuple[int, ...], device: tuple[int, int], dealt: list[tuple[int, bool]]
) -> None:
    assert allot(parts, *device, 8) == dealt


@given(
    st.lists(st.integers(1, 16), min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from([(16, 4, 8), (15, 12, 8), (16, 0, 8), (14, 16, 8), (27, 0, 4), (25, 10, 4)]),
)
def test_what_is_dealt_adds_up(counts: list[int], rest: bool, device: tuple[int, int, int]) -> None:
    groups, over, granule = device
    parts = [count * granule for count in counts]
    parts[0] += over if rest else 0
    if sum(counts) > groups:
        try:
            dealt = allot(parts, *device)
        except PartitionError as error:
            assert "cannot be split into" in str(error)
            return
    else:
        dealt = allot(parts, *device)
    assert [count * granule + taken * over for count, taken in dealt] == parts
    assert sum(count for count, _ in dealt) <= groups and sum(taken for _, taken in dealt) <= 1


@pytest.mark.parametrize("parts", [(), (4, 128), (100, 40), (0,)])
def test_parts_that_do_not_fit_are_refused(parts: tuple[int, ...]) -> None:
    message = r"132 SMs cannot be split into .*; this device gives 16 groups of 8, and one part can have 4 more"
    with pytest.raises(PartitionError, match=message):
        allot(parts, 16, 4, 8)


@pytest.mark.parametrize(
    ("parts", "device"),
    [((90, 40), (16, 4)), ((92, 36), (16, 4)), ((12, 12), (16, 4)), ((96, 32), (15, 12)), ((12, 84), (14, 20))],
)
def test_parts_that_the_groups_do_not_make_are_refused(parts: tuple[int, ...], device: tuple[int, int]) -> None:
    with pytest.raises(PartitionError, match=r"cannot be split into \d+ \+ \d+: this device gives \d+ groups of 8"):
        allot(parts, *device, 8)


def test_a_cpu_has_no_sms_to_set_apart() -> None:
    assert unavailable(torch.device("cpu")) == "it takes an NVIDIA GPU"
    with pytest.raises(PartitionError, match="the SMs of cpu cannot be split"):
        Partition([92, 40], torch.device("cpu"))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partitions, "_driver", lambda: None)
    assert unavailable(torch.device("cuda")) == "cuda-bindings is not installed: pip install cuda-bindings"


class FakeDriver:
    """The calls of the CUDA driver that set SMs apart, for a device of 132 SMs in granules of 8."""

    CUresult = SimpleNamespace(CUDA_SUCCESS=0)
    CUdevResourceType = SimpleNamespace(CU_DEV_RESOURCE_TYPE_SM="sm")
    CUgreenCtxCreate_flags = SimpleNamespace(CU_GREEN_CTX_DEFAULT_STREAM=1)
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)

    def __init__(self, version: int = 13000, groups: int = 16, refuses: int | None = None) -> None:
        self.version, self.groups, self.refuses = version, groups, refuses
        self.splits = 0
        self.contexts: dict[int, set[int]] = {}
        self.streams: dict[int, int] = {}

    def cuDriverGetVersion(self) -> tuple[int, int]:
        return 0, self.version

    def cuDeviceGet(self, index: int) -> tuple[int, str]:
        return 0, f"device {index}"

    def cuDeviceGetDevResource(self, device: str, kind: str) -> tuple[int, Any]:
        assert (device, kind) == ("device 0", "sm")
        return 0, resource(range(132))

    def cuDevSmResourceSplitByCount(self, count: int, whole: Any, flags: int, least: int) -> tuple[Any, ...]:
        assert (count, whole.sm.smCount, flags, least) == (16, 132, 0, 8)
        self.splits += 1
        made = [resource(range(n * 8, n * 8 + 8)) for n in range(self.groups)]
        return 0, made, self.groups, resource(range(self.groups * 8, 132))

    def cuDevResourceGenerateDesc(self, resources: list[Any], count: int) -> tuple[int, set[int]]:
        assert count == len(resources)
        return 0, set().union(*(one.ids for one in resources))

    def cuGreenCtxCreate(self, description: set[int], device: str, flags: int) -> tuple[Any, ...]:
        if self.refuses is not None and len(self.contexts) == self.refuses:
            return SimpleNamespace(name="CUDA_ERROR_OUT_OF_MEMORY"), None
        self.contexts[key := len(self.contexts) + 1] = description
        return 0, key

    def cuGreenCtxGetDevResource(self, green: int, kind: str) -> tuple[int, Any]:
        return 0, resource(self.contexts[green])

    def cuGreenCtxStreamCreate(self, green: int, flags: int, priority: int) -> tuple[int, int]:
        self.streams[100 + green] = green
        return 0, 100 + green

    def cuCtxFromGreenCtx(self, green: int) -> tuple[int, str]:
        return 0, f"context {green}"

    def cuStreamDestroy(self, stream: int) -> tuple[int]:
        assert self.streams.pop(stream) in self.contexts, "a stream goes before its context"
        return (0,)

    def cuGreenCtxDestroy(self, green: int) -> tuple[int]:
        del self.contexts[green]
        return (0,)


def resource(ids: Iterable[int]) -> Any:
    ids = set(ids)
    return SimpleNamespace(sm=SimpleNamespace(smCount=len(ids)), ids=ids)


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda stream, device: (stream, device))
    yield


@pytest.mark.usefixtures("on_a_gpu")
def test_all_parts_come_from_one_split_and_go_back(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver()
    monkeypatch.setattr(partitions, "_driver", lambda: driver)
    device = torch.device("cuda", 0)
    partition = Partition([64, 36, 24], device)
    assert driver.splits == 1 and partition.sms == (64, 36, 24)
    assert partition.streams == ((101, device), (102, device), (103, device))
    assert partition.contexts == ("context 1", "context 2", "context 3")
    parts = list(driver.contexts.values())
    assert len(set().union(*parts)) == 124 and parts[1] >= {128, 129, 130, 131}
    partition.close()
    assert not driver.streams and not driver.contexts and partition.streams == partition.contexts == ()
    partition.close()


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize(
    ("driver", "message"),
    [
        (FakeDriver(version=12030), "the driver supports CUDA 12.3, and green contexts need 12.4"),
        (FakeDriver(groups=9), "132 SMs cannot be split into 88 \\+ 40: this device gives 9 groups of 8, and one part"),
        (FakeDriver(refuses=1), "the CUDA driver refused to set SMs apart: CUDA_ERROR_OUT_OF_MEMORY"),
    ],
)
def test_what_the_driver_cannot_do_is_said_and_undone(
    driver: FakeDriver, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partitions, "_driver", lambda: driver)
    with pytest.raises(PartitionError, match=message):
        Partition([88, 40], torch.device("cuda", 0))
    assert not driver.streams and not driver.contexts
