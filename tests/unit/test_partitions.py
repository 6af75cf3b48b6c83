"""How SMs are dealt to the parts of a partition, and what is said where they cannot be set apart."""

import pytest
import torch
from hypothesis import given, strategies as st

from nanoflow.pipeline import partitions
from nanoflow.pipeline.partitions import Partition, PartitionError, allot, unavailable


@pytest.mark.parametrize(
    ("parts", "dealt"),
    [
        ((92, 40), [(11, True), (5, False)]),
        ((40, 92), [(5, False), (11, True)]),
        ((88, 40), [(11, False), (5, False)]),
        ((64, 36, 32), [(8, False), (4, True), (4, False)]),
        ((8,), [(1, False)]),
    ],
)
def test_parts_are_granules_and_one_may_have_the_rest(parts: tuple[int, ...], dealt: list[tuple[int, bool]]) -> None:
    assert allot(parts, 132, 8) == dealt


@given(
    st.lists(st.integers(1, 16), min_size=1, max_size=4), st.booleans(), st.sampled_from([(132, 8), (128, 8), (108, 4)])
)
def test_what_is_dealt_adds_up(counts: list[int], rest: bool, device: tuple[int, int]) -> None:
    total, granule = device
    over = total % granule
    parts = [count * granule for count in counts]
    parts[0] += over if rest else 0
    if sum(counts) * granule > total - over:
        with pytest.raises(PartitionError, match="cannot be split into"):
            allot(parts, total, granule)
        return
    dealt = allot(parts, total, granule)
    assert [count * granule + taken * over for count, taken in dealt] == parts


@pytest.mark.parametrize("parts", [(), (4, 128), (100, 40), (0,)])
def test_parts_that_do_not_fit_are_refused(parts: tuple[int, ...]) -> None:
    with pytest.raises(PartitionError, match=r"132 SMs cannot be split into .*multiples of 8, and one part may have 4"):
        allot(parts, 132, 8)


@pytest.mark.parametrize("parts", [(90, 40), (92, 36), (12, 12)])
def test_parts_between_granules_are_refused(parts: tuple[int, ...]) -> None:
    with pytest.raises(PartitionError, match=r"a part of \d+ SMs, in .*, cannot be had; parts are multiples of 8"):
        allot(parts, 132, 8)


def test_a_cpu_has_no_sms_to_set_apart() -> None:
    assert unavailable(torch.device("cpu")) == "it takes an NVIDIA GPU"
    with pytest.raises(PartitionError, match="the SMs of cpu cannot be split"):
        Partition([92, 40], torch.device("cpu"))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partitions, "_driver", lambda: None)
    assert unavailable(torch.device("cuda")) == "cuda-bindings is not installed: pip install cuda-bindings"
