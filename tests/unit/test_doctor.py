"""``nanoflow doctor``: every check becomes a line, whatever the machine has or lacks."""

import json

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from nanoflow import doctor
from nanoflow.cli import app

NAMES = {"NanoFlow", "CPU", "torch", "NVIDIA driver", "Triton", "green contexts", "NCCL", "CUDA compiler", "DeepGEMM"}


def test_every_check_has_its_line() -> None:
    checks = doctor.examine()
    assert {check.name for check in checks} >= NAMES | {"peer access", "symmetric memory"}
    assert any(check.name.startswith("GPU") for check in checks)
    assert all(check.found for check in checks)
    assert all(check.mend for check in checks if check.state in ("missing", "broken"))


def test_as_json() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    checks = json.loads(result.stdout)
    assert result.exit_code == (2 if any(check["state"] in ("missing", "broken") for check in checks) else 0)
    assert {check["name"] for check in checks} >= NAMES
    assert all(set(check) == {"name", "state", "found", "mend"} for check in checks)


def test_a_broken_installation_stops_no_other_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> doctor.Check:
        raise OSError("libsomething.so: undefined symbol\nmore")

    monkeypatch.setattr(doctor, "_triton", broken)
    checks = {check.name: check for check in doctor.examine()}
    assert checks["Triton"].state == "broken"
    assert checks["Triton"].found == "OSError: libsomething.so: undefined symbol"
    assert set(checks) >= NAMES
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 2


def test_an_old_driver_is_named_with_its_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr(doctor, "driver_cuda_version", lambda: (12, 2))
    monkeypatch.setattr("nanoflow.devices.driver_cuda_version", lambda: (12, 2))
    check = doctor._driver()
    assert check.state == "missing" and "CUDA up to 12.2" in check.found and "CUDA 13.0" in check.mend
    console = Console(record=True, width=200)
    doctor.print_checks([check], console)
    text = console.export_text()
    assert "Runs use the CPU: the NVIDIA driver is too old" in text and "update the driver" in text


@pytest.mark.parametrize(
    ("fails", "state", "found"),
    [((), "ok", "can be had on all 2 GPUs"), ((1,), "optional", "GPU 1: no handles"), ((0, 1), "optional", "GPU 0, 1")],
)
def test_how_gpus_reach_each_other(
    monkeypatch: pytest.MonkeyPatch, fails: tuple[int, ...], state: str, found: str
) -> None:
    """With two GPUs that are made up."""

    class Memory:
        @staticmethod
        def empty_strided_p2p(shape: object, stride: object, dtype: object, device: torch.device) -> torch.Tensor:
            if device.index in fails:
                raise RuntimeError("no handles\nmore")
            return torch.ones(1)

    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.synchronize", lambda index: None)
    monkeypatch.setattr("torch.cuda.can_device_access_peer", lambda a, b: (a, b) != (1, 0))
    monkeypatch.setattr("torch._C._distributed_c10d._SymmetricMemory", Memory)
    check = doctor._symmetric_memory()
    assert check.state == state and check.found.startswith(found) and bool(check.mend) == bool(fails)
    assert doctor._peer_access().found == "not 1 -> 0"
