"""Runs of two ranks on a machine with two GPUs, or with one that both share."""

import os
from pathlib import Path

import torch

__all__ = ["ROOT", "environment"]

ROOT = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    """Of a process that starts ranks: with one GPU, `one_gpu/sitecustomize.py` is in force in it and in theirs."""
    if torch.cuda.device_count() > 1:
        return dict(os.environ)
    path = [str(Path(__file__).parent / "one_gpu"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
