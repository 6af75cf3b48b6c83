"""GEMM behind one interface: ``out = x @ w.T + bias`` by cuBLAS, by the Triton kernels, or by DeepGEMM.

Which one is fastest depends on the shape, the SMs it may use and the GPU, so it is measured and looked up here (see
`nanoflow.ops.gemm_choice`). Nothing of Triton or DeepGEMM is imported before it is used.

Shape legend: M rows, N output columns, K input columns.
"""

import importlib
from functools import cache
from types import ModuleType
from typing import Literal

import torch
from torch.nn import functional

from nanoflow.ops.gemm_choice import stored_choices
from nanoflow.ops.gemm_config import GemmConfig, Workspace, default_config
from nanoflow.ops.operation import triton_on_cuda

__all__ = ["GEMM_KERNELS", "GemmKernel", "matmul", "unavailable"]

GemmKernel = Literal["measured", "cublas", "triton", "deep_gemm"]

GEMM_KERNELS: tuple[GemmKernel, ...] = ("cublas", "triton", "deep_gemm")

_workspaces: dict[tuple[int | None, int], list[Workspace]] = {}
"""By device and stream. A smaller one that was outgrown stays: a captured graph may still write to it."""


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
    workspace: Workspace | None = None,
    intermediate: torch.Tensor | None = None,
) -> torch.Tensor:
    """``out = x @ w.T + bias`` for x [M, K], w [N, K], bias [N], out [M, N], all of one dtype, sums in float32.

    Args:
        silu: w is ``[gate | up]`` and ``out = silu(x @ gate.T) * (x @ up.T)``, [M, N // 2], rounded once at the end.
        sms: SMs to use; all if None. cuBLAS takes what it likes.
        kernel: "measured" is the one that was measured to be the fastest for this shape and SM budget, or cuBLAS.
        config: of the Triton kernels; by default the measured one or a guess.
        workspace: of Triton's split configs, one for each stream that runs GEMMs. By default one is kept for the
            current stream. In the capture of a CUDA graph, pass one, or run once on the capturing stream before: one
            that is made in a capture is cleared by every launch.
        intermediate: [M, N], where kernels that cannot activate put the product on its way to `out` (with `silu`; the
            Triton kernels can). Allocated if None.

    Raises:
        ValueError: the kernel cannot do this; see `unavailable`.
    """
    if not out.numel():
        return out
    if kernel == "measured":
        kernel, config = _chosen(x, w, sms, silu, config)
        if unavailable(kernel, x, w, out):  # measured with an extra that is not installed here
            kernel, config = "triton" if sms and _has_triton() else "cublas", None
    problem = unavailable(kernel, x, w, out)
    if problem:
        raise ValueError(f"GEMM kernel {kernel!r}: {problem}")
    if kernel == "triton":
        _triton(x, w, out, bias, silu, sms, config, workspace)
    elif silu:
        if intermediate is None:
            intermediate = x.new_empty(x.shape[0], w.shape[0])
        _silu_mul(matmul(x, w, intermediate, bias=bias, sms=sms, kernel=kernel), out)
    elif kernel == "deep_gemm":
        module = _deep_gemm()
        assert module is not None
        module.set_num_sms(sms or device_sms(x.device))
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


@cache
def device_sms(device: torch.device) -> int:
    """SMs of a GPU; of a CPU, where the kernels run in Triton's interpreter, a few."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def _chosen(
    x: torch.Tensor, w: torch.Tensor, sms: int | None, silu: bool, config: GemmConfig | None
) -> tuple[GemmKernel, GemmConfig | None]:
    if config is not None:
        return "triton", config
    if x.device.type != "cuda":
        return "cublas", None
    columns, inputs = w.shape
    budget = sms or device_sms(x.device)
    found = stored_choices(x.device).find(x.shape[0], columns, inputs, budget, x.dtype, silu=silu)
    return (found.kernel, found.config) if found else ("cublas", None)


def _triton(
    x: torch.Tensor,
    w: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    silu: bool,
    sms: int | None,
    config: GemmConfig | None,
    workspace: Workspace | None,
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
    if workspace is None and config.split:
        workspace = _stream_workspace(config, budget, x.device, silu)
    launch(x, w, out, bias, config, sms=budget, silu=silu, tma=tma, workspace=workspace)


def _silu_mul(both: torch.Tensor, out: torch.Tensor) -> None:
    """``out = silu(gate) * up`` where ``both = [gate | up]``."""
    if triton_on_cuda(out.device, out.dtype) == "triton":
        from nanoflow.ops.elementwise_triton import silu_mul

        silu_mul(both, out)
    else:
        columns = out.shape[1]
        torch.mul(functional.silu(both[:, :columns]), both[:, columns:], out=out)


def _stream_workspace(config: GemmConfig, sms: int, device: torch.device, silu: bool) -> Workspace:
    """The current stream's own workspace."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    kept = _workspaces.setdefault((device.index, stream), [])
    for workspace in kept:
        if workspace.holds(config, sms, silu=silu):
            return workspace
    workspace = Workspace(config, sms, device, silu=silu)
    # What a capture allocates belongs to its graph's pool and must not serve others.
    if not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        kept.append(workspace)
    return workspace


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
