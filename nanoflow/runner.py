"""A run from configuration to report: read the workload, build the engine, write each result as it is finished.

Order matters for people: what can be wrong with the configuration, the output folder and the model is found before any
weights are read; what is wrong with one line becomes that line's error record.

    lock the output; open the model; is this the run whose records are there?   else refuse
    mend the output; enter its records into the ledger
    feed: read, skip what has a record, tokenise ahead                          nothing left: done
    build the engine, its KV cache sized by the requests that are ready    (and with it other ranks, or replicas)
    while requests are left:
        fill the engine's queue from the feed; step; write what is finished
    report; sort the output, if that is asked for
"""

import sys
import time
from dataclasses import dataclass, replace
from threading import Event, Thread

from nanoflow.config import RunConfig, save_config
from nanoflow.engine import Engine
from nanoflow.errors import InputError, OutputError
from nanoflow.feed import Feed, Prompt
from nanoflow.input_files import InputFiles
from nanoflow.interrupt import Interrupts
from nanoflow.ledger import Ledger
from nanoflow.loading import Model, build_engine, open_model
from nanoflow.monitoring import Monitoring
from nanoflow.parallel.group import TensorGroup, check_ranks, tensor_ranks
from nanoflow.progress import RunProgress
from nanoflow.recording import Recorder
from nanoflow.replicas.pool import Pool
from nanoflow.replicas.start import check_replicas, start_replicas
from nanoflow.report import RunReport
from nanoflow.resume import Fingerprint, check_same_run, fingerprint, read_output, save_state
from nanoflow.search.ceilings import measure_ceilings
from nanoflow.serving import Serving
from nanoflow.summing_up import make_report
from nanoflow.workload import read_workload
from nanoflow.writer import OutputWriter

__all__ = ["LOOK_AHEAD_SECONDS", "RunOutcome", "engine_for", "run"]

GOES_ON = "what was finished is in the output, and the same command goes on"
LOOK_AHEAD_SECONDS = 5.0
"""How long requests are gathered, at most, before the KV cache is sized by them."""


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended."""

    report: RunReport | None
    """Of what this execution did; None if nothing was left to do."""
    completed: int
    """Requests answered, those of earlier executions included."""
    errors: int
    """Error records, likewise."""
    earlier: int
    """Records that were there before."""
    signal: int | None = None
    """The signal that ended the run before all requests had their record; None if none did."""

    @property
    def records(self) -> int:
        """Lines of the output."""
        return self.completed + self.errors


def run(
    config: RunConfig,
    *,
    restart: bool = False,
    continue_anyway: bool = False,
    retry_errors: bool = False,
    quiet: bool = False,
) -> RunOutcome:
    """Run the job, or go on with it; results, report and the resolved configuration are in the output's folder then.

    Args:
        restart: replace the output of an earlier run instead of going on with it.
        continue_anyway: go on although the earlier run's model, sampling or workload differed.
        retry_errors: run the requests again that ended in an error record.
        quiet: show no progress.

    Raises:
        UserError: the run could not start, or not go on; what was finished is in the output.
        Interrupted: a signal came before requests ran.
    """
    started = time.perf_counter()
    with (
        Interrupts(quiet=quiet) as interrupts,
        OutputWriter(config.output.path, restart=restart) as writer,
        Monitoring(config, quiet=quiet) as monitoring,
    ):
        if config.output.sort and not writer.regular:
            raise OutputError(
                f"output.sort: {writer.path} is a device or a pipe, whose lines cannot be put in order afterwards; "
                "set it to false, or output.path to a file"
            )
        if config.parallel.data > 1:
            check_replicas(config.engine, config.parallel)
        else:
            check_ranks(config.engine, config.parallel.tensor, torchrun=True)
        model = open_model(config.model, config.engine, use=config.parallel.data == 1)
        identity = fingerprint(config, model)
        ledger = Ledger()
        if not restart and writer.size:
            if not continue_anyway:
                check_same_run(writer.path, config.output.state_path, identity)
            ledger = read_output(writer, retry_errors=retry_errors)
            if not quiet:
                print(ledger.summary(), file=sys.stderr, flush=True)
        # With the first record, and not before: until then, these describe the run whose records are there.
        writer.before_first_line = lambda: _describe(config, identity)
        items = read_workload(config, model.graph.vocab_size, model.tokenizer)
        with (
            Feed(items, ledger, model.tokenizer, model.checkpoint.path) as feed,
            tensor_ranks(config, model, GOES_ON) as ranks,
        ):
            ahead = feed.look_ahead(LOOK_AHEAD_SECONDS)
            if feed.exhausted:
                _sort(config, writer, ledger, quiet)
                return RunOutcome(None, ledger.completed, ledger.errors, ledger.records)
            engine: Engine | Pool
            if config.parallel.data > 1:
                job = _job(model, ahead)
                engine = start_replicas(config, model, job, more=not feed.ended, quiet=quiet, then=GOES_ON)
            else:
                engine = engine_for(config, model, ahead, more=not feed.ended, quiet=quiet, ranks=ranks)
                feed.prepare = engine.check
            try:
                began = time.perf_counter()
                recorder = Recorder(began)
                progress = RunProgress(feed.totals, earlier=ledger.records, quiet=quiet)
                monitoring.watch(model, engine, recorder, fresh=not ledger.records)
                engine.observers.append(progress.observe)
                serving = Serving(engine, feed, writer, recorder, progress, model.checkpoint.name, ledger.records > 0)
                with progress, _RequestCount(config) as count:
                    interrupts.drain()
                    while not serving.finished(interrupts):
                        serving.step()
                        progress.total = ledger.skipped + feed.totals.items if feed.ended else count.requests
                        progress.tick()
                ended = time.perf_counter()
                interrupts.drained()
            finally:
                # After a signal, an iteration in flight is not waited for: the process is about to end.
                if interrupts.signal is None:
                    engine.close()
                elif isinstance(engine, Pool):
                    engine.kill()
            feed.check()
            energy = monitoring.energy()
            monitoring.finish()
            report = make_report(
                config=config,
                model=model,
                engine=engine,
                recorder=recorder,
                ceilings=replace(
                    measure_ceilings(str(model.device), model.dtype),
                    link_bytes_per_second=None if ranks is None else ranks.link_bytes_per_second,
                ),
                seconds=ended - began,
                load_seconds=began - started,
                energy=energy,
                earlier=ledger.records,
                replicas=engine.figures(ended - began) if isinstance(engine, Pool) else (),
            )
            report.save(config.output.report_path)
            if serving.complete:
                _sort(config, writer, ledger, quiet)
            return RunOutcome(
                report,
                ledger.completed + recorder.completed,
                ledger.errors + recorder.errors,
                ledger.records,
                None if serving.complete else interrupts.signal,
            )


def _sort(config: RunConfig, writer: OutputWriter, ledger: Ledger, quiet: bool) -> None:
    """Put a complete output into the order of the input, if that is asked for. Raises OutputError."""
    if not config.output.sort:
        return
    order = writer.line_order(ledger.place)
    if order is None:
        return
    if not quiet:
        print(f"sorting {len(order):,} records into the order of the input", file=sys.stderr, flush=True)
    writer.reorder(order)


def _describe(config: RunConfig, identity: Fingerprint) -> None:
    save_state(config.output.state_path, identity)
    save_config(config)


def engine_for(
    config: RunConfig,
    model: Model,
    ahead: list[Prompt],
    more: bool,
    quiet: bool = False,
    ranks: TensorGroup | None = None,
) -> Engine:
    """The engine, its KV cache sized by the first prompts; `more` may follow. The rest as `build_engine` has it."""
    return build_engine(
        model,
        config.engine,
        config.pipeline,
        weights=config.model.weights,
        job=_job(model, ahead),
        more=more,
        quiet=quiet,
        ranks=ranks,
    )


def _job(model: Model, ahead: list[Prompt]) -> list[int]:
    """For each completion, the tokens of its prompt with its longest output; those that are too long become records."""
    fitting = (prompt for prompt in ahead if len(prompt.token_ids) < model.max_model_len)
    return [prompt.longest for prompt in fitting for _ in range(prompt.request.params.n)] or [1]


class _RequestCount:
    """How many requests the workload has, as far as that can be known before it was read; counted in the background."""

    def __init__(self, config: RunConfig) -> None:
        self.requests: int | None = None
        self._config = config
        self._stop = Event()
        self._thread = Thread(target=self._count, name="request-count", daemon=True)

    def _count(self) -> None:
        workload = self._config.workload
        if workload.synthetic is not None:
            self.requests = workload.synthetic.requests
        elif workload.input is not None:
            try:
                self.requests = InputFiles(workload.input).count_lines(self._stop)
            except InputError:
                return  # the feed says so

    def __enter__(self) -> "_RequestCount":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
