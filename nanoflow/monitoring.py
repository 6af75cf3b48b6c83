"""What watches a run while it goes on: the time series beside the output, the Prometheus endpoint, the energy meter.

with Monitoring(config) as monitoring:         # opens the port, before anything slow
    ...load...
    recorder = Recorder()
    monitoring.watch(model, engine, recorder)  # from the first iteration on
    ...run, calling recorder.add and recorder.error...
    energy = monitoring.energy()
"""

import sys
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

import nanoflow
from nanoflow.config_schema import RunConfig
from nanoflow.loading import Model, device_name
from nanoflow.pipeline.program import Program
from nanoflow.plan_choice import plan_label
from nanoflow.power import Energy, EnergyMeter
from nanoflow.recording import IterationRecord, Recorder
from nanoflow.series import SeriesWriter

if TYPE_CHECKING:
    from nanoflow.metrics import MetricsServer, RunMetrics

__all__ = ["Monitoring"]


class Watched(Protocol):
    """An engine, or several that are one to the run."""

    @property
    def observers(self) -> list[Callable[[IterationRecord], None]]: ...

    @property
    def kv_capacity(self) -> int:
        """KV pages that can be in use."""
        ...

    @property
    def programs(self) -> tuple[Program, ...]:
        """The compiled plans that it runs."""
        ...

    def record_to(self, recorder: Recorder) -> None:
        """Tell `recorder` of every iteration."""
        ...


class Monitoring:
    """Watches one run; use as a context manager.

    Args:
        config: the run's; `report` and `metrics` say what is wanted.
        quiet: do not say where the endpoint is.

    Raises:
        ConfigError: the endpoint's port cannot be had.
    """

    def __init__(self, config: RunConfig, *, quiet: bool = False) -> None:
        self._config = config
        self._metrics: RunMetrics | None = None
        self._server: MetricsServer | None = None
        self._series: SeriesWriter | None = None
        self._meter: EnergyMeter | None = None
        if config.metrics.port is not None:
            self._metrics, self._server = _open_endpoint(config.metrics.host, config.metrics.port)
            if not quiet:
                print(f"metrics at {self._server.url}", file=sys.stderr, flush=True)

    @property
    def url(self) -> str | None:
        """Where the endpoint is; None if none was asked for."""
        return self._server.url if self._server is not None else None

    def watch(self, model: Model, engine: Watched, recorder: Recorder, *, fresh: bool = False) -> None:
        """Watch the engine's iterations and what the recorder is told.

        Args:
            recorder: is told of the engine's iterations.
            fresh: replace an earlier run's time series; otherwise its lines stay, and this run's follow them.
        """
        parallel = self._config.parallel
        self._meter = EnergyMeter(model.device, parallel.data * parallel.tensor)
        engine.record_to(recorder)
        self._series = SeriesWriter(
            self._config.output.series_path,
            recorder,
            width=self._config.report.series_seconds,
            kv_capacity=engine.kv_capacity,
            meter=self._meter,
            fresh=fresh,
        )
        if self._metrics is not None:
            self._metrics.describe(
                model=model.checkpoint.name,
                device=device_name(model.device),
                dtype=str(model.dtype).removeprefix("torch."),
                plan=plan_label(self._config.pipeline.plan, engine.programs),
                version=nanoflow.__version__,
            )
            engine.observers.append(self._metrics.observe)
            recorder.request_sinks.append(self._metrics.request)
            recorder.error_sinks.append(self._metrics.error)

    def energy(self) -> Energy | None:
        """What the devices have used since `watch`; None where it cannot be measured."""
        return self._meter.since_start() if self._meter is not None else None

    def finish(self) -> None:
        """Write what is left of the series. `make_report` comes after it, so that the timeline has all energy."""
        if self._series is None:
            return
        self._series.close()
        if self._series.problem is not None:
            print(f"warning: {self._series.problem}", file=sys.stderr)
        self._series = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.finish()
        if self._server is not None:
            self._server.close()
            self._server = None


def _open_endpoint(host: str, port: int) -> "tuple[RunMetrics, MetricsServer]":
    from nanoflow.metrics import MetricsServer, RunMetrics  # few runs need Prometheus' client

    metrics = RunMetrics()
    return metrics, MetricsServer(metrics, host, port)
