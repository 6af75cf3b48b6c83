"""Fusion: passes over a traced layer that join two neighbours into one operation, before anything is planned.

Each pass joins operations that follow each other directly in program order, so it never changes what any other
operation reads.
"""

from collections.abc import Sequence
from typing import cast

from nanoflow.ops.elementwise import Add, SiluMul
from nanoflow.ops.linear import Linear, LinearSilu
from nanoflow.ops.norm import AddNorm, Norm, QKNorm
from nanoflow.ops.operation import Operation
from nanoflow.ops.rope import Append, Rope, RopeAppend

__all__ = ["fuse", "fuse_add_norm", "fuse_rope_append", "fuse_silu"]


def fuse(operations: Sequence[Operation]) -> tuple[Operation, ...]:
    """Every pass, in turn."""
    return fuse_silu(fuse_add_norm(fuse_rope_append(operations)))


def fuse_rope_append(operations: Sequence[Operation]) -> tuple[Operation, ...]:
    """``[qk_norm;] rope; append`` of one value -> ``rope_append``: finished keys go straight to the cache."""
    fused: list[Operation] = []
    for op in operations:
        before = fused[-1] if fused else None
        if isinstance(op, Append) and isinstance(before, Rope) and op.qkv == before.qkv:
            fused.pop()
            norm = fused.pop() if fused and isinstance(fused[-1], QKNorm) and fused[-1].qkv == op.qkv else None
            fused.append(RopeAppend(f"{before.name}_{op.name}", before, cast(QKNorm | None, norm)))
        else:
            fused.append(op)
    return tuple(fused)


def fuse_add_norm(operations: Sequence[Operation]) -> tuple[Operation, ...]:
    """``residual += branch; norm(residual)`` -> ``add_norm`` (with the norm's name behind it from the second on)."""
    fused: list[Operation] = []
    names = {op.name for op in operations}
    for op in operations:
        before = fused[-1] if fused else None
        if isinstance(op, Norm) and isinstance(before, Add) and op.source == before.residual:
            name = "add_norm" if "add_norm" not in names else f"add_norm_{op.name}"
            names.add(name)
            fused[-1] = AddNorm(name, before.residual, before.branch, op)
        else:
            fused.append(op)
    return tuple(fused)


def fuse_silu(operations: Sequence[Operation]) -> tuple[Operation, ...]:
    """``linear; silu_mul`` of its value, which nothing else reads -> one operation of the linear's name."""
    fused: list[Operation] = []
    for op in operations:
        before = fused[-1] if fused else None
        if isinstance(op, SiluMul) and isinstance(before, Linear) and op.source == before.target:
            users = [other for other in operations if any(a.buffer == op.source for a in other.accesses)]
            if len(users) == 2:
                fused[-1] = LinearSilu(before, op)
                continue
        fused.append(op)
    return tuple(fused)
