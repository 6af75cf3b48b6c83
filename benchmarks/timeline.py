"""The kernels that benchmarks/iteration.py recorded, read: whose each is, and where the device had nothing to do.

Contract: an iteration begins with the copy of its metadata to the device and ends where the next one begins. The first
and the last one recorded are left out: before the first one's kernels the device waits for the profiler to start, and
what follows the last is not recorded.

A kernel's operation is told by its name and by the operation before it, since one cuBLAS kernel serves several linears.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

__all__ = ["KINDS", "Gap", "Span", "gaps", "iterations", "microseconds"]

KINDS = ("GEMM", "decode attention", "prefill attention", "element-wise", "head, sampling", "copies")
HEAD = "final_norm, lm_head"
SAMPLING = "sampling"
GEMM = re.compile(r"nvjet|gemm|cutlass")
AFTER = {
    "input_layernorm": "qkv",
    "decode_attention": "o",
    "prefill_attention": "o",
    "add_norm": "gate_up",
    "gate_up": "down",
}
"""The linear that follows an operation of the layer."""


@dataclass(frozen=True)
class Span:
    """A kernel or a copy. Times in microseconds from the start of the record."""

    start: float
    end: float
    kernel: str
    operation: str
    kind: str


@dataclass(frozen=True)
class Gap:
    """A time without kernel or copy, in microseconds."""

    length: float
    before: Span
    after: Span


def iterations(timeline: dict[str, Any]) -> list[list[Span]]:
    """The iterations in the middle of a recorded timeline."""
    spans = [(timeline["names"][number], start, length) for number, start, length in timeline["spans"]]
    starts = [index for index, (name, *_) in enumerate(spans) if name.startswith("Memcpy HtoD")]
    made = []
    for first, end in pairwise(starts):
        part = spans[first:end]
        told = _operations([name for name, *_ in part])
        made.append(
            [
                Span(start, start + length, name, operation, kind)
                for (name, start, length), (operation, kind) in zip(part, told, strict=True)
            ]
        )
    return made[1:]


def gaps(middle: Sequence[Sequence[Span]]) -> Iterator[Gap]:
    """Where nothing ran in iterations one behind the other."""
    spans = [span for iteration in middle for span in iteration]
    last = spans[0]  # what ends last of all so far
    for span in spans[1:]:
        if span.start > last.end:
            yield Gap(span.start - last.end, last, span)
        if span.end > last.end:
            last = span


def microseconds(middle: Sequence[Sequence[Span]]) -> dict[str, float]:
    """What each operation's kernels take in an iteration, all layers together."""
    sums: dict[str, float] = {}
    for iteration in middle:
        for span in iteration:
            sums[span.operation] = sums.get(span.operation, 0.0) + (span.end - span.start) / len(middle)
    return sums


def _operations(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Operation and kind of each kernel of an iteration."""
    before, in_head = "", False
    for name in names:
        if name.startswith("Memcpy"):
            in_head |= "DtoD" in name  # the rows to sample
            yield "copies", "copies"
        elif in_head:
            in_sampling = before == SAMPLING or not (GEMM.search(name) or "norm" in name or "gather" in name)
            before = SAMPLING if in_sampling else HEAD
            yield before, "head, sampling"
        elif name.startswith("Memset"):  # of the product behind it
            yield AFTER[before], "copies"
        else:
            operation, kind = _layer_operation(name, before)
            if operation != "tables":
                before = operation
            yield operation, kind


def _layer_operation(name: str, before: str) -> tuple[str, str]:
    if GEMM.search(name):
        return AFTER[before], "GEMM"
    if "decode" in name or "list" in name:
        return "decode_attention", "decode attention"
    if "prefill" in name:
        return "prefill_attention", "prefill attention"
    if "norm" in name:
        return "add_norm" if before == "o" else "input_layernorm", "element-wise"
    known = {"qkv_kernel": "rope_append", "silu_mul_kernel": "gate_up", "add_kernel": "add", "gather_kernel": "embed"}
    # What is left runs once an iteration: tokens from the device, rope's sines and cosines.
    return known.get(name, "tables"), "element-wise"
