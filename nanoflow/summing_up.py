"""Sums a run up: its report, of what the engine counted and the recorder measured."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from math import prod
from typing import Protocol

from nanoflow.config_schema import RunConfig
from nanoflow.devices import device_sms
from nanoflow.engine import EngineStats, planned_programs
from nanoflow.loading import Model, device_name
from nanoflow.pipeline.plan_text import format_plan
from nanoflow.pipeline.program import Program
from nanoflow.plan_choice import plan_label
from nanoflow.power import Energy
from nanoflow.recording import Recorder
from nanoflow.replicas.figures import ReplicaFigures
from nanoflow.report import SCHEMA_VERSION, Goodput, Percentiles, RunReport, TimelineEntry, ceilings_of, versions
from nanoflow.search.cost_model import Bounds, Ceilings, bounds
from nanoflow.search.mix import shared_works
from nanoflow.search.rates import CeilingRates
from nanoflow.search.simulate import simulate
from nanoflow.search.timeline import Timeline

__all__ = ["Ran", "idle_share", "make_report"]


class Ran(Protocol):
    """What has run: an engine, or several that are one to the run."""

    @property
    def stats(self) -> EngineStats: ...

    @property
    def programs(self) -> tuple[Program, ...]: ...

    @property
    def preemptions(self) -> int: ...

    @property
    def sizes(self) -> dict[str, int]:
        """The limits in force."""
        ...


def make_report(
    *,
    config: RunConfig,
    model: Model,
    engine: Ran,
    recorder: Recorder,
    ceilings: Ceilings,
    seconds: float,
    load_seconds: float,
    energy: Energy | None = None,
    earlier: int = 0,
    replicas: Sequence[ReplicaFigures] = (),
) -> RunReport:
    """Sum up a run. Error records count as requests and add no tokens.

    Args:
        ceilings: what the machine sustains, measured: of one device, and where ranks share the model of the link that
            each of them sends over.
        seconds: from the first submission to the last end.
        load_seconds: of loading before that.
        energy: what the device used in those seconds, if it was measured.
        earlier: records that earlier executions of the run had written.
        replicas: of a run with several.
    """
    tokens_in = int(recorder.column("prompt_tokens").sum())
    tokens_out = int(recorder.column("output_tokens").sum())
    stats, programs = engine.stats, engine.programs
    planned = planned_programs(programs)
    program = max(enumerate(planned), key=lambda found: stats.program_iterations[found[0]])[1]
    if energy is not None:
        ceilings = replace(ceilings, power_limit_watts=energy.power_limit_watts)
        energy = replace(energy, joules_per_token=_rate(energy.joules, tokens_in + tokens_out))
    # What one device sustains is measured; each rank of each replica has its own.
    parallel = {"tensor": config.parallel.tensor, "data": max(1, len(replicas))}
    together = ceilings_of(ceilings, prod(parallel.values()))
    reach: Bounds = bounds(stats.cost, together, energy.joules if energy is not None else None)
    return RunReport(
        schema_version=SCHEMA_VERSION,
        finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
        requests=recorder.completed + recorder.errors,
        completed=recorder.completed,
        errors=recorder.errors,
        earlier=earlier,
        input_tokens=tokens_in,
        output_tokens=tokens_out,
        seconds=seconds,
        load_seconds=load_seconds,
        total_tokens_per_second=_rate(tokens_in + tokens_out, seconds),
        output_tokens_per_second=_rate(tokens_out, seconds),
        requests_per_second=_rate(recorder.completed, seconds),
        time_to_first_token_ms=Percentiles.of_seconds(recorder.column("first_token")),
        time_per_output_token_ms=Percentiles.of_seconds(recorder.per_token()),
        inter_token_ms=Percentiles.of_histogram(recorder.token_gaps),
        end_to_end_ms=Percentiles.of_seconds(recorder.column("duration")),
        normalised_latency_ms=Percentiles.of_seconds(recorder.normalised()),
        goodput=_goodput(config, recorder, seconds),
        iterations=stats.iterations,
        iteration_ms=Percentiles.of_histogram(recorder.iteration_seconds),
        mean_batch_tokens=_rate(stats.rows, stats.iterations),
        largest_batch_tokens=stats.largest_batch,
        padding_share=_rate(stats.padding_rows, stats.rows + stats.padding_rows),
        executor_busy_share=_rate(stats.busy_seconds, seconds * max(1, len(replicas))),
        device_idle_share=idle_share(stats.busy_seconds, stats.idle_seconds),
        preemptions=engine.preemptions,
        bound_by=reach.bound,
        bound_seconds=dict(reach.seconds),
        bound_reached=reach.reached(seconds),
        ceilings=ceilings,
        energy=energy,
        timeline=recorder.timeline.as_dict(),
        model=model.checkpoint.name,
        device=device_name(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        plan=plan_label(config.pipeline.plan, programs),
        plan_text=format_plan(program.plan),
        plan_timeline=_layer(
            simulate(
                program,
                shared_works(program.plan, stats.work.over(stats.iterations)),
                CeilingRates(ceilings, device_sms(model.device), model.dtype.itemsize),
            ).timeline
        ),
        sizes=engine.sizes,
        config=config.model_dump(mode="json", exclude_none=True),
        versions=versions(),
        plan_share=_rate(stats.planned_iterations, stats.iterations) if stats.iterations else 1.0,
        parallel=parallel,
        replicas=list(replicas),
    )


def idle_share(busy_seconds: float, idle_seconds: float) -> float | None:
    """Share of the device's time between iterations; None if the executor tells of none, as one does that cannot."""
    return idle_seconds / (busy_seconds + idle_seconds) if idle_seconds else None


def _layer(timeline: Timeline) -> list[TimelineEntry]:
    """What runs while the middle layer does; nothing if nothing ran."""
    if not timeline.seconds:
        return []
    middle = (max(span.layer for span in timeline.spans) + 1) // 2
    shown = timeline.layers(middle, middle)
    return [
        TimelineEntry(
            span.label(middle),
            span.lane,
            span.resource,
            round(max(span.start, 0.0) * 1e6, 3),
            round(min(span.end, shown.seconds) * 1e6, 3),
        )
        for span in shown.spans
    ]


def _goodput(config: RunConfig, recorder: Recorder, seconds: float) -> Goodput | None:
    slo = config.report.slo
    if slo is None:
        return None
    met = recorder.within(slo.ttft_ms / 1e3, slo.tpot_ms / 1e3)
    return Goodput(slo.ttft_ms, slo.tpot_ms, _rate(met, recorder.completed), _rate(met, seconds))


def _rate(amount: float, per: float) -> float:
    return amount / per if per else 0.0
