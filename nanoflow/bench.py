"""Measures a job: a warm-up, then the whole workload again and again through one engine. No completion is kept.

    open the model; load the weights; build the engine, its KV cache sized as a run's is
    the first requests of the workload, as a warm-up; the machine's ceilings, while it is hot
    for each repetition:
        a new scheduler on the same executor; the workload from its first line on, as a run goes through it
        save and show what was measured so far

All that a run does for a request is done (tokenising, detokenising, a record as JSON); the record is thrown away.
"""

import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from math import ceil
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from nanoflow.batch_file import ErrorRecord, ParsedRequest
from nanoflow.bench_report import BenchReport, Repetition, WarmUp, make_bench_report
from nanoflow.config_schema import RunConfig
from nanoflow.engine import Engine
from nanoflow.errors import ConfigError, InputError, OutputError
from nanoflow.feed import Feed
from nanoflow.input_files import once_only
from nanoflow.interrupt import Interrupts
from nanoflow.ledger import Ledger
from nanoflow.loading import Model, open_model
from nanoflow.parallel.group import TensorGroup, check_ranks, tensor_ranks
from nanoflow.power import EnergyMeter
from nanoflow.progress import RunProgress
from nanoflow.recording import Recorder
from nanoflow.runner import LOOK_AHEAD_SECONDS, engine_for
from nanoflow.search.ceilings import measure_ceilings
from nanoflow.search.files import check_writable
from nanoflow.serving import Serving
from nanoflow.steady_state import EngineLog
from nanoflow.summing_up import make_report
from nanoflow.workload import read_workload
from nanoflow.writer import encode

__all__ = ["Bench", "BenchOutcome", "bench", "parse_warm_up"]


@dataclass(frozen=True)
class BenchOutcome:
    """How a bench ended."""

    report: BenchReport | None
    """Over the repetitions that came to their end; None if none did."""
    path: Path
    """Where it is saved."""
    signal: int | None = None
    """The signal that ended it before all repetitions; None if none did."""


class Bench:
    """An engine that runs workloads one after another. Use as a context manager: it closes the engine.

    Args:
        engine: of `model`; has run nothing yet.
        load_seconds: what loading took, for the reports.
        link_bytes_per_second: that a rank sends to the others, as measured; None: there is one.
        interrupts: a signal ends a workload at once.
        quiet: show no progress.
    """

    def __init__(
        self,
        model: Model,
        engine: Engine,
        *,
        load_seconds: float,
        interrupts: Interrupts,
        link_bytes_per_second: float | None = None,
        quiet: bool = False,
    ) -> None:
        self.model = model
        self._link = link_bytes_per_second
        self._engine = engine
        self._load_seconds = load_seconds
        self._interrupts = interrupts
        self._quiet = quiet

    def repeat(self, config: RunConfig, requests: int | None = None) -> Repetition | None:
        """Run the workload of `config`, or its first `requests`, from its beginning; None if a signal ended it.

        Of what `config` says of the engine, only the order counts: its sizes are what they are.
        Raises UserError if the workload cannot be read.
        """
        model, engine = self.model, self._engine.renewed()
        self._engine = engine
        engine.scheduler.longest_first = config.engine.order == "longest-first"
        items = islice(read_workload(config, model.graph.vocab_size, model.tokenizer), requests)
        with Feed(items, Ledger(), model.tokenizer, model.checkpoint.path) as feed:
            feed.prepare = engine.check
            feed.look_ahead(LOOK_AHEAD_SECONDS)
            began = time.perf_counter()
            meter, recorder = EnergyMeter(model.device, config.parallel.tensor), Recorder(began)
            log = EngineLog(engine, meter, began)
            progress = RunProgress(feed.totals, quiet=self._quiet)
            engine.observers += [recorder.observe, log.observe, progress.observe]
            serving = Serving(engine, feed, _Discard(), recorder, progress, model.checkpoint.name)
            with progress:
                while not serving.complete:
                    if self._interrupts.signal is not None:
                        return None
                    serving.step()
                    progress.total = feed.totals.items if feed.ended else None
                    progress.tick()
            seconds, energy = time.perf_counter() - began, meter.since_start()
            feed.check()
        if not recorder.completed and not recorder.errors:
            raise InputError("workload: it has no request; there is nothing to measure")
        report = make_report(
            config=config,
            model=model,
            engine=engine,
            recorder=recorder,
            ceilings=replace(measure_ceilings(str(model.device), model.dtype), link_bytes_per_second=self._link),
            seconds=seconds,
            load_seconds=self._load_seconds,
            energy=energy,
        )
        return Repetition(report, log.whole(), log.steady(), log.course())

    def warm_up(self, config: RunConfig, requests: int) -> WarmUp:
        """Run the first `requests` of the workload, and measure the ceilings: they are to be those of a hot machine."""
        began = time.perf_counter()
        if requests:
            self.repeat(config, requests)
        if self._interrupts.signal is None:
            measure_ceilings(str(self.model.device), self.model.dtype)
        return WarmUp(requests, time.perf_counter() - began)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # After a signal, an iteration in flight is not waited for: the process is about to end.
        if self._interrupts.signal is None:
            self._engine.close()


def bench(
    config: RunConfig,
    *,
    repetitions: int = 3,
    warm_up: int | float = 0.1,
    requests: int | None = None,
    out: Path | None = None,
    quiet: bool = False,
) -> BenchOutcome:
    """Measure the job; what was measured is saved after each repetition.

    Args:
        warm_up: requests to run before anything is measured, or, as a float, the share of the workload's.
        requests: measure only the first so many of the workload; None: all.
        out: where to save it; None: beside the output that a run would have.
        quiet: show no progress.

    Raises:
        UserError: the job could not be measured, or the result not be saved.
        Interrupted: a signal came before requests ran.
    """
    path = out if out is not None else config.output.bench_path
    _check_workload(config)
    if config.parallel.data > 1:
        raise ConfigError(
            f"parallel.data: {config.parallel.data} replicas are not for a bench, which measures one engine: use "
            "--set parallel.data=1; what several reach together is in the report of a run"
        )
    _check_out(path, config)
    done: list[Repetition] = []
    report = None
    with interrupts_of_a_bench(quiet=quiet) as interrupts:
        started = time.perf_counter()
        check_ranks(config.engine, config.parallel.tensor, torchrun=True)
        model = open_model(config.model, config.engine)
        total = _count(config, model, requests)
        with (
            tensor_ranks(config, model, "the repetitions that came to their end are saved") as ranks,
            Bench(
                model,
                _engine(config, model, requests, quiet, ranks),
                load_seconds=time.perf_counter() - started,
                interrupts=interrupts,
                link_bytes_per_second=None if ranks is None else ranks.link_bytes_per_second,
                quiet=quiet,
            ) as running,
        ):
            interrupts.drain()
            first = ceil(warm_up * total) if isinstance(warm_up, float) else warm_up
            warmed = running.warm_up(config, min(total, first))
            while len(done) < repetitions and interrupts.signal is None:
                repetition = running.repeat(config, requests)
                if repetition is None:
                    break
                done.append(repetition)
                report = make_bench_report(done, asked=repetitions, warm_up=warmed, device=model.device)
                report.save(path)
                if not quiet:
                    of_it = repetition.report
                    print(
                        f"repetition {len(done)} of {repetitions}: {of_it.seconds:.1f} s, "
                        f"{of_it.total_tokens_per_second:,.0f} total tokens/s",
                        file=sys.stderr,
                        flush=True,
                    )
            interrupts.drained()
        return BenchOutcome(report, path, interrupts.signal if len(done) < repetitions else None)


def interrupts_of_a_bench(*, quiet: bool = False) -> Interrupts:
    """Ctrl-C and SIGTERM end the repetition that runs; what was measured before it stays."""
    return Interrupts(
        quiet=quiet,
        stopping="stopping: this repetition does not count; again to stop at once",
        stopped="stopped; the repetitions that came to their end are saved",
    )


def parse_warm_up(text: str) -> int | float:
    """A number of requests (``64``), or a share of them as a float (``10%``, ``0.1``). Raises ConfigError."""
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = -1.0
    share = value / 100 if text.endswith("%") else value
    if text.isdecimal():
        return int(text)
    if not 0 <= share <= 1:
        raise ConfigError(
            f"--warm-up: {text!r} is neither a number of requests, such as 64, nor a share of them, such as 10% or 0.1"
        )
    return share


class _Discard:
    """Takes records as an output file does, and keeps none."""

    def write(self, record: Mapping[str, Any]) -> None:
        encode(record)


def _engine(config: RunConfig, model: Model, requests: int | None, quiet: bool, ranks: TensorGroup | None) -> Engine:
    """The engine, its KV cache sized by the first requests as that of a run is."""
    items = islice(read_workload(config, model.graph.vocab_size, model.tokenizer), requests)
    with Feed(items, Ledger(), model.tokenizer, model.checkpoint.path) as feed:
        ahead = feed.look_ahead(LOOK_AHEAD_SECONDS)
        return engine_for(config, model, ahead, more=not feed.ended, quiet=quiet, ranks=ranks)


def _count(config: RunConfig, model: Model, requests: int | None) -> int:
    """Requests of the workload, at most `requests`; error records count."""
    items: Iterator[ParsedRequest | ErrorRecord] = read_workload(config, model.graph.vocab_size, model.tokenizer)
    return sum(1 for _ in islice(items, requests))


def _check_workload(config: RunConfig) -> None:
    """Raises ConfigError for an input that can be read only once."""
    if once := once_only(config.workload.input or ()):
        raise ConfigError(f"workload.input: {once} can be read only once, and a bench repeats it; save it to a file")


def _check_out(path: Path, config: RunConfig) -> None:
    """Raises ConfigError or OutputError if the result cannot be saved there: better now than after the run."""
    trace = config.workload.trace
    if path.suffix != ".json" or (trace is not None and path.absolute() == Path(trace.path)):
        raise ConfigError(f"--out: {path} is not for results; name a file that ends in .json and is no input")
    try:
        check_writable(path)
    except OSError as error:
        raise OutputError(f"--out: cannot write {path}: {error.strerror}; choose another file") from None
