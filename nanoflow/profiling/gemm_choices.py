"""Before products are profiled on parts of the SMs: which kernel each of them runs there.

A lane's products take the kernel that was measured for their rows and SMs, and where none was, a guess. So these are
measured first and stored where runs look (`nanoflow.ops.gemm_choice`), and what is profiled then is what runs take.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from nanoflow.ops.gemm_choice import Choices, choice_file, choice_folders, forget_choices
from nanoflow.ops.graph import Graph
from nanoflow.pipeline.partitions import PartitionError
from nanoflow.search.gemm_measure import (
    CANDIDATES,
    GemmBench,
    GemmCase,
    linears_of,
    machine,
    measure_choice,
    stored_here,
)
from nanoflow.search.timing import on_sms

__all__ = ["ChoiceRun", "measure_choices", "missing_choices"]

SECONDS = 0.1
"""Of each finalist."""
COMPILERS = 8
"""Kernels that are compiled at a time: each number of SMs has its own."""


@dataclass(frozen=True)
class ChoiceRun:
    """What came of it."""

    left: int
    """Choices that the time was too short for."""
    unfinished: frozenset[int]
    """Numbers of SMs on which some are left: what products take there is still to change."""
    notes: tuple[str, ...]
    """What could not be measured, and why."""


def missing_choices(
    graph: Graph, rows: Sequence[int], budgets: Sequence[int], choices: Choices, dtype: torch.dtype
) -> list[GemmCase]:
    """What was not measured yet of a layer's products at these rows, on these parts of the SMs."""
    layer = {op.name for op in graph.layer}
    name = str(dtype).removeprefix("torch.")
    return [
        GemmCase(product, columns, inputs, count, sms, False, silu, dtype)
        for sms in budgets
        for product, columns, inputs, silu in linears_of(graph)
        if product in layer
        for count in sorted(rows, reverse=True)
        if count not in choices.by_key.get((columns, inputs, sms, name, silu), {})
    ]


def measure_choices(
    graph: Graph,
    rows: Sequence[int],
    budgets: Sequence[int],
    *,
    device: torch.device,
    dtype: torch.dtype,
    until: float,
    progress: Callable[[GemmCase, int], None],
) -> ChoiceRun:
    """Measure and store the choices that are missing, one after the other, until the time is up.

    Args:
        budgets: numbers of SMs, the most wanted first.
        until: on `time.monotonic`.
        progress: told of every case before it is measured, and how many are still to come, itself included.
    """
    here = machine(device)
    files = [choice_file(folder, str(here["gpu"])) for folder in choice_folders()]
    choices = stored_here(here, files)
    missing = missing_choices(graph, rows, budgets, choices, dtype)
    left, notes = len(missing), []
    unfinished = {case.sms for case in missing}
    for sms in dict.fromkeys(case.sms for case in missing):
        cases = [case for case in missing if case.sms == sms]
        if time.monotonic() >= until:
            break
        try:
            if device.type == "cuda":
                _compile(cases, device)
            with on_sms(sms, device) as stream:
                bench = GemmBench(device, SECONDS, stream=stream)
                for case in cases:
                    if time.monotonic() >= until:
                        break
                    progress(case, left)
                    choice, _ = measure_choice(case, bench)
                    choices.add(case.rows, case.columns, case.inputs, case.sms, dtype, choice, silu=case.silu)
                    choices.save(files[0])
                    left -= 1
                else:
                    unfinished.discard(sms)
        except PartitionError as error:
            notes.append(f"kernels of products on {sms} SMs: {error}")
            left -= len(cases)
            unfinished.discard(sms)
    forget_choices()
    return ChoiceRun(left, frozenset(unfinished), tuple(notes))


def _compile(cases: Sequence[GemmCase], device: torch.device) -> None:
    """Every candidate once, several at a time: compilation runs in threads of C++."""

    def first(case: GemmCase) -> None:
        with torch.cuda.device(device):
            x, weights = case.inputs_and_weights(str(device))
            for _, calls in case.runs(x, weights[:1], deep_gemm=False, most=CANDIDATES).values():
                calls[0]()

    with ThreadPoolExecutor(COMPILERS) as pool:
        for done in [pool.submit(first, case) for case in cases]:
            done.result()
    torch.cuda.synchronize(device)
