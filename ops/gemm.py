"""GEMM behind one interface: ``out = x @ w.T + bias`` by cuBLAS, by the Triton kernels, or by DeepGEMM.

Which one is fastest depends on the shape, the SMs it may use and the GPU, so it is measured and looked up here (see
`nanoflow.ops.gemm_choice`). Nothing of Triton or DeepGEMM is imported before it is used.

Shape legend: M rows, N output columns, K input columns.
"""

import importlib
from collections.abc import Callable, Hashable
from functools import cache
from types import ModuleType
from typing import Literal

import torch
from torch.nn import functional

from nanoflow.ops.gemm_choice import stored_choices
from nanoflow.ops.gemm_config import GemmConfig, Workspace, default_config
from nanoflow.ops.operation import device_sms, triton_on_cuda

__all__ = ["GEMM_KERNELS", "GemmKernel", "matmul", "unavailable"]

GemmKernel = Literal["measured", "cublas", "triton", "deep_gemm"]

GEMM_KERNELS: tuple[GemmKernel, ...] = ("cublas", "triton", "deep_gemm")

Scratch = Callable[[Hashable, Callable[[], Workspace]], Workspace]
"""What `NanoContext.scratch` and `DeviceArrays.kept` are."""


def matmul(
    x: torch.Tensor,
    w: torch.Tensor,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    silu: bool = False,
    sms: int | None = None,
    kernel: GemmKernel = "measured",
    config: GemmConfig | None = None,
    scratch: Scratch | None = None,
    intermediate: torch.Tensor | None = None,
) -> torch.Tensor:
    """``out = x @ w.T + bias`` for x [M, K], w [N, K], bias [N], out [M, N], all of one dtype, sums in float32.

    Args:
        silu: w is ``[gate | up]`` and ``out = silu(x @ gate.T) * (x @ up.T)``, [M, N // 2], rounded once at the end.
        sms: SMs to use, for a stream that has so many; all if None. cuBLAS takes what it likes.
        kernel: "measured" is the one that was measured to be the fastest for this shape and SM budget (see
            `Choices.find`). Where none was, it is cuBLAS on all SMs, and our own kernel on a part of them.
        config: of the Triton kernels; by default the measured one or a guess.
        scratch: keeps the memory of Triton's split configs, by key; launches that may overlap need one each. Without,
            it is made for every call.
        intermediate: [M, N], where kernels that cannot activate put the product on its way to `out` (with `silu`; the
            Triton kernels can). Allocated if None.

    Raises:
        ValueError: the kernel cannot do this; see `unavailable`.
    """
    if not out.numel():
        return out
    if kernel == "measured":
        kernel, config = _chosen(x, w, out, sms, silu, config)
    problem = unavailable(kernel, x, w, out)
    if problem:
        raise ValueError(f"GEMM kernel {kernel!r}: {problem}")
    if kernel == "triton":
        _triton(x, w, out, bias, silu, sms, config, scratch)
    elif silu:
        if intermediate is None:
            intermediate = x.new_empty(x.shape[0], w.shape[0])
        _silu_mul(matmul(x, w, intermediate, bias=bias, sms=sms, kernel=kernel), out)
    elif kernel == "deep_gemm":
        module = _deep_gemm()
        assert module is not None
        module.set_num_sms(sms or device_sms(x.device))  # of this launch: a captured one keeps its grid
        module.bf16_gemm_nt(x, w, out)
        if bias is not None:
            out.add_(bias)
    elif bias is not None:
        torch.addmm(bias, x, w.t(), out=out)
    else:
        torch.mm(x, w.t(), out=out)
    return out


def unavailable(kernel: str, x: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> str | None:
    """Why `kernel` cannot multiply these, or None."""
    if kernel == "cublas":
        return None
    if kernel == "triton":
        if not _has_triton():
            return "triton is not installed; pip install triton"
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"{x.dtype} is not supported; use float32, bfloat16 or float16"
        if any(tensor.stride(1) != 1 for tensor in (x, w, out)):
            return "rows must be contiguous"
        return None
    if kernel == "deep_gemm":
        if _deep_gemm() is None:
            return "DeepGEMM is not installed or does not load here; pip install 'nanoflow[deep-gemm]' (it needs nvcc)"
        if x.dtype != torch.bfloat16:
            return f"{x.dtype} is not supported; use bfloat16"
        if torch.cuda.get_device_capability(x.device)[0] < 9:
            return "it needs a Hopper GPU or a later one"
        return None
    return f"unknown; there are {', '.join(GEMM_KERNELS)}"


def _chosen(
    x: torch.Tensor, w: torch.Tensor, out: torch.Tensor, sms: int | None, silu: bool, config: GemmConfig | None
) -> tuple[GemmKernel, GemmConfig | None]:
    """The kernel to run for "measured". On a part of the SMs that is cuBLAS only where our own cannot run."""
    if config is not None:
        return "triton", config
    columns, inputs = w.shape
    budget = sms or device_sms(x.device)
    found = stored_choices(x.device).find(x.shape[0], columns, inputs, budget, x.dtype, silu=silu)
    if found and not unavailable(found.kernel, x, w, out):  # it may be an extra that is not installed here
        return found.kernel, found.config
    own = sms is not None and x.device.type == "cuda" and not unavailable("triton", x, w, out)
    return "triton" if own else "cublas", None


def _triton(
    x: torch.Tensor,
    w: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    silu: bool,
    sms: int | None,
    config: GemmConfig | None,
    scratch: Scratch | None,
) -> None:
    from nanoflow.ops.gemm_triton import launch

    rows, inputs = x.shape
    columns = w.shape[0]
    budget = sms or device_sms(x.device)
    tma = _has_tma(x.device) and all(_aligned(tensor) for tensor in (x, w, out))
    if config is None:
        found = stored_choices(x.device).find(rows, columns, inputs, budget, x.dtype, silu=silu)
        config = found.config if found else None
    if config is None:
        config = default_config(rows, columns, inputs, budget, x.dtype, tma=tma, silu=silu)
    workspace = None
    if config.split:

        def make() -> Workspace:
            return Workspace(config, budget, x.device, silu=silu)

        key = ("split_k", config.tile_bytes(silu), budget * config.ctas_per_sm)
        workspace = scratch(key, make) if scratch else make()
    launch(x, w, out, bias, config, sms=budget, silu=silu, tma=tma, workspace=workspace)


def _silu_mul(both: torch.Tensor, out: torch.Tensor) -> None:
    """``out = silu(gate) * up`` where ``both = [gate | up]``."""
    if triton_on_cuda(out.device, out.dtype) == "triton":
        from nanoflow.ops.elementwise_triton import silu_mul

        silu_mul(both, out)
    else:
        columns = out.shape[1]
        torch.mul(functional.silu(both[:, :columns]), both[:, columns:], out=out)


def _aligned(tensor: torch.Tensor) -> bool:
    """Whether TMA can read it: address and rows in multiples of 16 bytes."""
    return tensor.data_ptr() % 16 == 0 and tensor.stride(0) * tensor.element_size() % 16 == 0


def _has_tma(device: torch.device) -> bool:
    """The interpreter reads descriptors on a CPU too."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9


@cache
def _has_triton() -> bool:
    try:
        importlib.import_module("triton")
    except ImportError:
        return False
    return True


@cache
def _deep_gemm() -> ModuleType | None:
    """The package, or None where it is missing or fails to load (it compiles with nvcc and checks for it)."""
    try:
        module = importlib.import_module("deep_gemm")
    except (ImportError, OSError, RuntimeError, AssertionError):
        return None
    return module if hasattr(module, "bf16_gemm_nt") else None
