"""Runs of two ranks on a machine with two GPUs, or with one that both share."""

import os
from pathlib import Path

import torch

__all__ = ["AT_ONCE", "ROOT", "WHY_NOT", "environment"]

ROOT = Path(__file__).parents[2]
MPS = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"), "control")
"""There while NVIDIA's Multi-Process Service runs, with which kernels of several processes run at once on one GPU."""
GPUS = torch.cuda.device_count()
AT_ONCE = GPUS > 1 or (GPUS == 1 and MPS.exists())
"""Whether kernels of two ranks run at once: otherwise they have the GPU in turn, some milliseconds each."""
WHY_NOT = "needs two GPUs, or one and MPS (nvidia-cuda-mps-control -d)"


def environment(*, mps: bool = True) -> dict[str, str]:
    """Of a process that starts ranks: with one GPU, `one_gpu/sitecustomize.py` is in force in it and in theirs. Not
    `mps` where processes are killed, or kernels fail, which other processes there would share."""
    if GPUS > 1:
        return dict(os.environ)
    path = [str(Path(__file__).parent / "one_gpu"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    own = {} if mps else {"CUDA_MPS_PIPE_DIRECTORY": os.devnull}
    return {**os.environ, **own, "PYTHONPATH": os.pathsep.join(filter(None, path))}
