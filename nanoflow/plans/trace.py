"""``nanoflow plan trace``: run a plan on this machine, and write when each nano-op started and ended.

Pseudo-code::

    an executor with random weights and a random KV cache, which marks the start and end of every step
    the mix as one dense batch, again and again: first until the device is hot, then those that count
    the marks of the iteration of median length
"""

import time
from collections.abc import Callable
from pathlib import Path

from nanoflow.devices import device_sms
from nanoflow.loading import device_name
from nanoflow.ops.batch import StepOutput
from nanoflow.plans.case import PlanCase
from nanoflow.plans.chrome_trace import TraceInfo, write_trace
from nanoflow.plans.running import executor_here, mix_batch, open_here
from nanoflow.report import versions
from nanoflow.search.cost_model import works_of
from nanoflow.search.timeline import measured_timeline

__all__ = ["trace_plan"]

WARM_UP_SECONDS = {"cuda": 2.0, "cpu": 0.0}
"""A cold card runs faster than it can sustain."""
ITERATIONS = {"cuda": 51, "cpu": 5}


def trace_plan(case: PlanCase, out: Path, *, device: str = "auto", iterations: int | None = None) -> TraceInfo:
    """Run `case.plan` on its mix and write the trace to `out`; where ranks share the model, rank 0's.

    Args:
        device: as `engine.device` of a run.
        iterations: how many are timed; the trace is of the one of median length.

    Raises UserError.
    """
    model, page_size, rows = open_here(case, device)
    with executor_here(case, model, page_size, rows, [case.plan], marks=True) as executor:
        batch = mix_batch(case.mix, executor.cut, page_size, case.graph.vocab_size)

        def run() -> StepOutput:
            executor.launch(batch)
            return executor.collect()

        _warm_up(run, WARM_UP_SECONDS[model.device.type])
        found = []
        for _ in range(iterations or ITERATIONS[model.device.type]):
            output = run()
            found.append((output.seconds, executor.step_times()))
    seconds, times = sorted(found, key=lambda one: one[0])[len(found) // 2]
    works = works_of(batch)
    sms = device_sms(model.device)
    timeline = measured_timeline(case.program, times, works, model.dtype.itemsize, sms)
    info = TraceInfo(
        plan=case.plan.dumps(),
        model=case.model,
        layers=case.graph.layers,
        device=device_name(model.device),
        device_sms=sms,
        itemsize=model.dtype.itemsize,
        mix=str(case.mix),
        works=list(works),
        seconds=seconds,
        iterations=len(found),
        versions=versions(),
    )
    write_trace(timeline, info, out)
    return info


def _warm_up(run: Callable[[], object], seconds: float) -> None:
    """At least one iteration, which compiles kernels."""
    until = time.perf_counter() + seconds
    run()
    while time.perf_counter() < until:
        run()
