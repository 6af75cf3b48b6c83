"""``nanoflow doctor``: what this machine can do for a run, what is missing, and the mend.

Every check stands alone: one that fails, or whose library is broken, becomes a line of the table and stops no other.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from nanoflow import __version__
from nanoflow.devices import driver_cuda_version, driver_version, gpu_problem, processor_cores
from nanoflow.memory import format_bytes, free_bytes

__all__ = ["Check", "as_json", "examine", "print_checks"]

State = Literal["ok", "missing", "optional", "broken"]
"""missing: a GPU run needs it; optional: not there and not needed, or needed by few; broken: there, and it fails."""

GREEN_CONTEXT_DRIVER = (12, 4)
NCCL_WORKS = "copy_engine, one_shot and two_shot need it; collectives by NCCL do not"
PEER_TRIAL = 2**21
"""Bytes."""
STYLES = {"ok": "green", "missing": "bold red", "optional": "yellow", "broken": "bold red"}


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, how it stands, what was found, and what to do if that is not enough."""

    name: str
    state: State
    found: str
    mend: str = ""


def examine() -> list[Check]:
    """Look at everything. Takes a few seconds on a GPU (one kernel is compiled and run); raises nothing."""
    checks: list[Check] = []
    looks: tuple[tuple[str, Callable[[], Check | list[Check]]], ...] = (
        ("NanoFlow", _nanoflow),
        ("CPU", _cpu),
        ("torch", _torch),
        ("NVIDIA driver", _driver),
        ("GPU", _gpus),
        ("Triton", _triton),
        ("green contexts", _green_contexts),
        ("NCCL", _nccl),
        ("peer access", _peer_access),
        ("symmetric memory", _symmetric_memory),
        ("CUDA compiler", _nvcc),
        ("DeepGEMM", _deep_gemm),
    )
    for name, look in looks:
        try:
            found = look()
        except Exception as error:  # a broken installation may raise anything, and that is what is to be reported
            first = (str(error).strip().splitlines() or [""])[0]
            found = Check(name, "broken", f"{type(error).__name__}: {first}", f"reinstall {name}")
        checks += found if isinstance(found, list) else [found]
    return checks


def print_checks(checks: list[Check], console: Console) -> None:
    """The table, then in one sentence what runs will use."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for check in checks:
        text = check.found + (f"\n-> {check.mend}" if check.mend else "")
        table.add_row(check.name, f"[{STYLES[check.state]}]{check.state}[/]", text)
    console.print(table)
    needed = [check.name for check in checks if check.state in ("missing", "broken")]
    problem = gpu_problem(0)
    if problem is not None:
        console.print(f"\nRuns use the CPU: {problem}.", highlight=False)
    elif needed:
        console.print(f"\nRuns use the GPU, but see {', '.join(needed)}.", highlight=False)
    else:
        console.print("\nRuns use the GPU; nothing that they need is missing.", highlight=False)


def as_json(checks: list[Check]) -> list[dict[str, str]]:
    """The checks as plain data."""
    return [asdict(check) for check in checks]


def _on_gpu() -> bool:
    return gpu_problem(0) is None


def _nanoflow() -> Check:
    return Check(
        "NanoFlow",
        "ok",
        f"{__version__}, Python {platform.python_version()}, {platform.system()} on {platform.machine()}",
    )


def _cpu() -> Check:
    threads = torch.get_num_threads()
    return Check("CPU", "ok", f"{processor_cores()} cores, {threads} threads, {format_bytes(free_bytes())} free")


def _torch() -> Check:
    if torch.version.cuda is None:
        return Check("torch", "optional", f"{torch.__version__}, built without CUDA", "a GPU needs a CUDA build")
    return Check("torch", "ok", f"{torch.__version__}, built for CUDA {torch.version.cuda}")


def _driver() -> Check:
    version = driver_cuda_version()
    if version is None:
        return Check("NVIDIA driver", "optional", "none", "a GPU needs the NVIDIA driver (in a container: its GPUs)")
    found = f"{driver_version() or 'version unknown'}, CUDA up to {version[0]}.{version[1]}"
    built = torch.version.cuda
    if built is not None and version[0] < int(built.split(".")[0]):
        return Check("NVIDIA driver", "missing", found, f"torch is built for CUDA {built}: update the driver")
    return Check("NVIDIA driver", "ok", found)


def _gpus() -> list[Check]:
    count = torch.cuda.device_count() if torch.version.cuda is not None else 0
    if count == 0:
        return [Check("GPU", "optional", "none", gpu_problem(0) or "")]
    checks = []
    for index in range(count):
        name, problem = f"GPU {index}", gpu_problem(index)
        if problem is not None:
            checks.append(Check(name, "missing", torch.cuda.get_device_name(index), problem))
            continue
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        checks.append(
            Check(
                name,
                "ok",
                f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
                f"{properties.multi_processor_count} SMs, {format_bytes(free)} of {format_bytes(total)} free",
            )
        )
    return checks


def _triton() -> Check:
    version = _version("triton")
    if version is None:
        state: State = "missing" if _on_gpu() else "optional"
        return Check("Triton", state, "not installed", "pip install triton, in the version that torch asks for")
    if not _on_gpu():
        return Check("Triton", "ok", version)
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return Check("Triton", "missing", f"{version}, no C compiler", "install gcc: Triton builds launchers with it")
    from nanoflow.ops import elementwise_triton

    x, y = torch.randn(8, 64, device="cuda"), torch.randn(8, 64, device="cuda")
    expected = x + y
    elementwise_triton.add(x, y)
    if not torch.equal(x, expected):
        return Check("Triton", "broken", f"{version}: a kernel gave a wrong result", "reinstall torch and triton")
    tma = importlib.util.find_spec("triton.tools.tensor_descriptor") is not None
    on_chip = torch.cuda.get_device_capability()[0] >= 9
    how = "TMA descriptors" if tma and on_chip else "no TMA descriptors: pointer loads"
    return Check("Triton", "ok", f"{version}; a kernel was compiled and gave the right result; {how}")


def _green_contexts() -> Check:
    name = "green contexts"
    if not _on_gpu():
        return Check(name, "optional", "no GPU")
    driver = driver_cuda_version() or (0, 0)
    if driver < GREEN_CONTEXT_DRIVER:
        return Check(
            name,
            "optional",
            f"the driver has none (CUDA {driver[0]}.{driver[1]})",
            "update it to split SMs among lanes",
        )
    if _version("cuda-bindings") is None:
        major = str(torch.version.cuda).split(".")[0]
        return Check(
            name, "optional", "cuda-bindings is not installed", f'pip install "cuda-bindings=={major}.*" to split SMs'
        )
    cuda: Any = importlib.import_module("cuda.bindings.driver")
    torch.cuda.current_stream()  # makes the context
    kind = cuda.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
    status, whole = cuda.cuDeviceGetDevResource(torch.cuda.current_device(), kind)
    if int(status) != 0:
        return Check(name, "broken", f"cuDeviceGetDevResource: {status.name}", "update the driver and cuda-bindings")
    status, _, _, rest = cuda.cuDevSmResourceSplitByCount(1, whole, 0, 32)
    if int(status) != 0:
        return Check(name, "broken", f"cuDevSmResourceSplitByCount: {status.name}", "update the driver")
    sms = whole.sm.smCount
    return Check(name, "ok", f"cuda-bindings {_version('cuda-bindings')}; {sms} SMs, such as 32 + {rest.sm.smCount}")


def _nccl() -> Check:
    if not torch.distributed.is_available() or not torch.distributed.is_nccl_available():
        several = torch.version.cuda is not None and torch.cuda.device_count() > 1
        return Check(
            "NCCL", "missing" if several else "optional", "not in this build of torch", "for several GPUs only"
        )
    return Check("NCCL", "ok", ".".join(map(str, torch.cuda.nccl.version())))  # type: ignore[no-untyped-call]


def _peer_access() -> Check:
    count = torch.cuda.device_count() if torch.version.cuda is not None else 0
    if count < 2:
        return Check("peer access", "optional", f"{count} GPU{'s' if count != 1 else ''}: nothing to reach")
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    without = [(a, b) for a, b in pairs if not torch.cuda.can_device_access_peer(a, b)]
    if not without:
        return Check("peer access", "ok", f"among all {count} GPUs")
    listed = ", ".join(f"{a} -> {b}" for a, b in without[:6]) + (" ..." if len(without) > 6 else "")
    return Check("peer access", "optional", f"not {listed}", NCCL_WORKS)


def _symmetric_memory() -> Check:
    """Whether memory can be had that other GPUs' processes map, as `nanoflow.ops.peer_memory` does."""
    name, count = "symmetric memory", torch.cuda.device_count() if torch.version.cuda is not None else 0
    if count < 2:
        return Check(name, "optional", f"{count} GPU{'s' if count != 1 else ''}: nobody to share it with")
    failed: dict[str, list[int]] = {}
    for index in range(count):
        try:
            from torch._C._distributed_c10d import _SymmetricMemory

            _SymmetricMemory.empty_strided_p2p((PEER_TRIAL,), (1,), torch.uint8, torch.device("cuda", index)).zero_()
            torch.cuda.synchronize(index)
        except (ImportError, AttributeError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            failed.setdefault(reason, []).append(index)
    if not failed:
        return Check(name, "ok", f"can be had on all {count} GPUs")
    reasons = "; ".join(f"GPU {', '.join(map(str, indices))}: {reason}" for reason, indices in failed.items())
    return Check(name, "optional", reasons, NCCL_WORKS)


def _nvcc() -> Check:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    path = shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home) / "bin"))
    if path is None:
        return Check("CUDA compiler", "optional", "no nvcc", "only DeepGEMM needs it: install CUDA, set CUDA_HOME")
    said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20).stdout
    release = re.search(r"release (\S+),", said)
    return Check("CUDA compiler", "ok", f"nvcc {release[1] if release else 'of unknown version'}, {path}")


def _deep_gemm() -> Check:
    version = _version("sgl-deep-gemm") or _version("deep-gemm")
    if version is None:
        return Check(
            "DeepGEMM", "optional", "not installed", "one more GEMM for sm_90: pip install sgl-deep-gemm==0.1.4"
        )
    if not _on_gpu():
        return Check("DeepGEMM", "optional", f"{version}, no GPU to run on")
    try:
        module: Any = importlib.import_module("deep_gemm")
    except Exception as error:  # runs do without it
        return Check("DeepGEMM", "optional", f"{version} does not load: {error}", "pip install sgl-deep-gemm==0.1.4")
    if not hasattr(module, "bf16_gemm_nt"):
        return Check("DeepGEMM", "optional", f"{version} has no bf16_gemm_nt", "pip install sgl-deep-gemm==0.1.4")
    return Check("DeepGEMM", "ok", version)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
