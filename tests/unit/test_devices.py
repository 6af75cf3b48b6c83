"""Which device is chosen, and the messages where a GPU or its memory is not there. The GPUs here are made up."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanoflow import devices
from nanoflow.devices import check_head_size, choose_device, gpu_problem, memory_shortage
from nanoflow.errors import ConfigError

GIB = 2**30


def fake_gpus(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """One H100, unless `changes` say otherwise: built, driver, count, capability, free."""
    values = {"built": "13.0", "driver": (13, 0), "count": 1, "capability": (9, 0), "free": 79 * GIB, **changes}
    monkeypatch.setattr(torch.version, "cuda", values["built"])
    monkeypatch.setattr(devices, "driver_cuda_version", lambda: values["driver"])
    monkeypatch.setattr(
        torch,
        "cuda",
        SimpleNamespace(
            device_count=lambda: values["count"],
            get_device_capability=lambda index: values["capability"],
            get_device_name=lambda index: "NVIDIA Something",
            mem_get_info=lambda index: (values["free"], 79 * GIB),
        ),
    )


def test_auto_takes_the_gpu_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch)
    assert choose_device("auto") == torch.device("cuda")
    assert choose_device("cuda:0") == torch.device("cuda:0")
    fake_gpus(monkeypatch, capability=(7, 5))
    assert choose_device("auto") == torch.device("cpu")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"built": None}, ["built without CUDA", "install a CUDA build"]),
        ({"driver": None}, ["no NVIDIA driver", "install it"]),
        ({"driver": (12, 4)}, ["too old", "up to 12.4", "needs CUDA 13.0", "update the driver", "for CUDA 12"]),
        ({"count": 0}, ["shows no GPU", "nvidia-smi"]),
        ({"count": 2}, ["has 2 GPUs", "cuda:0 to cuda:1"]),
        ({"count": 4, "capability": (7, 5)}, ["NVIDIA Something", "7.5", "8.0"]),
    ],
)
def test_a_gpu_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: list[str]) -> None:
    fake_gpus(monkeypatch, **changes)
    with pytest.raises(ConfigError) as caught:
        choose_device("cuda:3")
    for word in ["engine.device: cuda:3 was asked for", "use cpu", *words]:
        assert word in str(caught.value)
    assert choose_device("cpu") == torch.device("cpu")


def test_a_newer_driver_and_a_newer_minor_version_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for driver in ((14, 0), (13, 3)):
        fake_gpus(monkeypatch, driver=driver)
        assert gpu_problem(0) is None
    fake_gpus(monkeypatch, built="12.8", driver=(12, 4))  # CUDA's minor versions are compatible
    assert gpu_problem(0) is None


def test_a_context_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch)

    def fail(index: int) -> None:
        raise RuntimeError("CUDA error: out of memory\nmore lines")

    torch.cuda.mem_get_info = fail
    assert gpu_problem(0) == "CUDA cannot start on it (CUDA error: out of memory): see what nvidia-smi says"
    # Whoever only looks starts none.
    assert gpu_problem(0, use=False) is None and choose_device("auto", use=False) == torch.device("cuda")


def test_head_sizes() -> None:
    for head_dim in (16, 64, 80, 96, 128, 256):
        check_head_size(head_dim, torch.device("cuda"))
    for head_dim in (8, 72, 100, 272):
        check_head_size(head_dim, torch.device("cpu"))
        with pytest.raises(ConfigError, match=rf"head size is {head_dim}; on a GPU .* 16 from 16 to 256"):
            check_head_size(head_dim, torch.device("cuda"))


def test_what_would_fit_on_a_cpu() -> None:
    message = str(memory_shortage(6 * GIB, 4 * GIB, torch.float32, "cpu"))
    assert "need 6.0 GiB as float32 and 4.0 GiB are free on cpu: 2.0 GiB are missing" in message
    assert "bfloat16 (3.0 GiB); a smaller model" in message
    message = str(memory_shortage(12 * GIB, 4 * GIB, torch.float32, "cpu"))
    assert "bfloat16 (6.0 GiB, still too much)" in message
    assert "bfloat16" not in str(memory_shortage(6 * GIB, 4 * GIB, torch.float16, "cpu"))


@pytest.mark.parametrize(
    ("need", "dtype", "free", "words", "gpus"),
    [
        (131, torch.bfloat16, 78, ["131.0 GiB as bfloat16", "53.0 GiB are missing"], 4),
        (100, torch.bfloat16, 78, ["22.0 GiB are missing"], 2),
        (120, torch.float32, 78, ["bfloat16 (60.0 GiB)"], 2),
        (60, torch.bfloat16, 40, ["39.0 GiB of 79.0 GiB in use"], 2),
        (500, torch.bfloat16, 78, [], 8),
    ],
)
def test_what_would_fit_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, need: int, dtype: torch.dtype, free: int, words: list[str], gpus: int
) -> None:
    fake_gpus(monkeypatch, free=free * GIB)
    message = str(memory_shortage(need * GIB, free * GIB, dtype, "cuda:0"))
    for word in [*words, f"parallel.tensor: {gpus} with so many GPUs", "a smaller model"]:
        assert word in message
    assert ("in use" in message) == (free < 70)
    of_two = str(memory_shortage(need * GIB, free * GIB, dtype, "cuda:0", 2))
    assert "weights on one rank need" in of_two and f"parallel.tensor: {2 * gpus} with" in of_two
