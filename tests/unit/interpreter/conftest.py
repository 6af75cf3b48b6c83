"""Tests of Triton kernels on the CPU, through Triton's interpreter.

The interpreter must be chosen before the first import of triton, so these files are collected only where
``TRITON_INTERPRET=1`` is set; `tests/unit/test_interpreter.py` runs them so, each in a process of its own. By hand:
``TRITON_INTERPRET=1 pytest tests/unit/interpreter``. Use float16 or float32: its bfloat16 is wrong.
"""

import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any


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


def patch_once(interpreter: ModuleType) -> None:
    """Have a launch prepare `triton.language` once, not again for every call of a function in its kernel.

    The others change nothing, and took up to half of the time of these tests. A launch still begins with it and ends
    with taking it back.
    """
    patch: Callable[[Any], Any] = interpreter._patch_lang
    modules: dict[Any, tuple[str, ...]] = {}
    patched: set[tuple[str, ...]] = set()

    class Scope(interpreter._LangPatchScope):  # type: ignore[misc, name-defined]
        def restore(self) -> None:
            patched.clear()
            super().restore()

    def patch_lang(function: Any) -> Any:
        if function not in modules:
            seen = [value for value in function.__globals__.values() if isinstance(value, ModuleType)]
            modules[function] = tuple(sorted({module.__name__ for module in seen}))
        scope = Scope()
        if modules[function] not in patched:
            scope._changes = patch(function)._changes
            patched.add(modules[function])
        return scope

    interpreter._patch_lang = patch_lang  # type: ignore[attr-defined]


if missing() is None:
    from triton.runtime import interpreter

    if hasattr(interpreter, "_LangPatchScope"):  # from 3.7 on
        patch_once(interpreter)

collect_ignore_glob = [] if missing() is None else ["test_*.py"]
