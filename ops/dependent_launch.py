"""Programmatic dependent launch: a kernel starts while the one before it on the stream still ends.

A kernel launched so calls `start_after_others` in each of its programs before it reads or writes anything: this
waits until all that ran before has ended and its memory is visible, then lets the next kernel come. What is saved is
the launch itself: about a microsecond, which a kernel of ten microseconds feels. The kernels before and after may be
anything. Hopper and later.
"""

from functools import cache
from typing import Any

import torch
import triton
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["dependent_launch", "start_after_others"]


@triton.jit
def start_after_others():
    """Wait for the kernels before this one, and let the next one's programs take what room there is."""
    gdc_wait()
    gdc_launch_dependents()


@cache
def dependent_launch(device: torch.device) -> dict[str, Any]:
    """Arguments for the launch of a kernel that has a constant `PDL` and calls `start_after_others` if it is true."""
    able = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
    return {"PDL": True, "launch_pdl": True} if able else {"PDL": False}
