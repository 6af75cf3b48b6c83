"""Runs of several ranks on a machine with as many GPUs, or with one that all share."""

import os
from pathlib import Path

import torch

__all__ = ["ROOT", "environment", "why_not", "widest"]

ROOT = Path(__file__).parents[2]
MPS = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"), "control")
"""There while NVIDIA's Multi-Process Service runs, with which kernels of several processes run at once on one GPU."""
GPUS = torch.cuda.device_count()


def why_not(ranks: int) -> str | None:
    """Why kernels of so many ranks cannot run at once, if so: without MPS they have one GPU in turn, some milliseconds
    each."""
    if ranks <= GPUS or (GPUS == 1 and MPS.exists()):
        return None
    return f"needs {ranks} GPUs, or one and MPS (nvidia-cuda-mps-control -d)"


def widest(ranks: int) -> str:
    """The own kernel on most thread blocks that a test may use: those of all ranks that share a GPU must fit on it, or
    they would wait for some that cannot begin."""
    return "push_128" if ranks <= GPUS or ranks == 2 else "push_32"


def environment(*, mps: bool = True) -> dict[str, str]:
    """Of a process that starts ranks: with one GPU, `one_gpu/sitecustomize.py` is in force in it and in theirs. Not
    `mps` where processes are killed, or kernels fail, which other processes there would share."""
    if GPUS > 1:
        return dict(os.environ)
    path = [str(Path(__file__).parent / "one_gpu"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    own = {} if mps else {"CUDA_MPS_PIPE_DIRECTORY": os.devnull}
    return {**os.environ, **own, "PYTHONPATH": os.pathsep.join(filter(None, path))}
