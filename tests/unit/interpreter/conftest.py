"""Tests of Triton kernels on the CPU, through Triton's interpreter.

The interpreter must be chosen before the first import of triton, so these files are collected only where
``TRITON_INTERPRET=1`` is set; `tests/unit/test_interpreter.py` runs them so, each in a process of its own. By hand:
``TRITON_INTERPRET=1 pytest tests/unit/interpreter``. Use float16 or float32: its bfloat16 is wrong.
"""

import os
from importlib.metadata import PackageNotFoundError, version


def missing() -> str | None:
    """Why these tests cannot run here, or None."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "TRITON_INTERPRET=1 is not set"
    try:
        triton = tuple(int(part) for part in version("triton").split(".")[:2])
    except PackageNotFoundError:
        return "triton is not installed"
    numpy = tuple(int(part) for part in version("numpy").split(".")[:2])
    if triton < (3, 7) and numpy >= (2, 4):
        return "triton before 3.7 cannot interpret loops with numpy 2.4 or later"
    return None


collect_ignore_glob = [] if missing() is None else ["test_*.py"]
