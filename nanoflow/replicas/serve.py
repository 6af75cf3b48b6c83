"""A replica's process: an engine of its own, fed from messages.

Contract: what is finished is told before the next iteration is launched; what is not worth a message of its own is told
every `TELL_SECONDS`. The loop never waits for the main process while something runs, and never polls while nothing
does. Grammars are compiled by the thread that listens, away from the loop.

    build the engine; say so
    until the link ends or the end is asked for:
        take in what has come: requests, whether to admit, what to expect
        something may run:  one iteration; tell what it finished
        nothing may:        tell how things stand; wait for a message
"""

import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from nanoflow.engine import Engine
from nanoflow.errors import InputError
from nanoflow.loading import build_engine, open_model
from nanoflow.parallel.group import TensorGroup
from nanoflow.parallel.processes import Line, leave
from nanoflow.power import EnergyMeter
from nanoflow.recording import IterationRecord
from nanoflow.replicas.messages import Begin, Done, End, Ended, Give, Given, Ready, Told
from nanoflow.steady_state import EngineLog

__all__ = ["Loop", "listen", "main", "watch_steps"]

HANG_SECONDS = 300.0
"""How long an iteration on a GPU may take: the first may compile kernels, and launched work never takes minutes."""
TICK_SECONDS = 1.0
TELL_SECONDS = 0.05
"""Between two messages, at most, while something runs and nothing is finished."""

Message = Give | End | None
"""None: the link has ended."""


class Loop:
    """Runs what comes through an engine.

    Args:
        engine: has run nothing yet.
        tell: sends a message to the main process.
        meter: of the energy of the engine's devices.
    """

    def __init__(self, engine: Engine, tell: Callable[[Told | Ended], None], meter: EnergyMeter) -> None:
        self.steps = 0
        """Iterations begun."""
        self.stepping = False
        """Whether one is going on."""
        self.inbox: SimpleQueue[Message] = SimpleQueue()
        """What has come; requests in it were checked."""
        self._engine = engine
        self._tell_main = tell
        self._log = EngineLog(engine, meter)
        self._taken = 0
        self._done: list[Done] = []
        self._iterations: list[IterationRecord] = []
        self._told = 0.0
        engine.observers += [self._log.observe, self._iterations.append]

    def run(self) -> None:
        """Until the end is asked for. Raises EOFError if the main process has gone."""
        engine = self._engine
        while True:
            works = engine.active or (engine.unfinished > 0 and engine.scheduler.admitting)
            if not works:
                self._tell()
            if not self._take_in(wait=not works):
                break
            if engine.active or (engine.unfinished and engine.scheduler.admitting):
                self.steps += 1
                self.stepping = True
                self._done += map(Done.of, engine.step())
                self.stepping = False
            if self._done or time.perf_counter() - self._told >= TELL_SECONDS:
                self._tell()
        steady = self._log.steady()
        self._tell_main(Ended(steady.figures if steady is not None else None))

    def _take_in(self, wait: bool) -> bool:
        """Take in what has come, waiting for the first if asked to; whether to go on."""
        with suppress(Empty):
            while True:
                message = self.inbox.get(wait)
                wait = False
                if message is None:
                    raise EOFError
                if isinstance(message, End):
                    return False
                # First the requests: what they are told to expect counts from then on.
                for request in message.requests:
                    self._submit(request)
                scheduler = self._engine.scheduler
                scheduler.expected, scheduler.admitting = message.expected, message.admitting
        return True

    def _submit(self, request: Given) -> None:
        self._taken += 1
        try:
            self._engine.submit(
                request.token_ids, request.params, key=request.id, place=request.place, arrived=request.arrived
            )
        except InputError as error:
            self._done.append(Done(request.id, error=str(error)))

    def _tell(self) -> None:
        engine, scheduler = self._engine, self._engine.scheduler
        self._told = time.perf_counter()
        self._tell_main(
            Told(
                taken=self._taken,
                waiting=scheduler.waiting,
                waiting_tokens=scheduler.waiting_tokens,
                active=engine.active,
                admitting=scheduler.admitting,
                stats=engine.stats,
                preemptions=scheduler.preemptions,
                done=tuple(self._done),
                iterations=tuple(self._iterations),
            )
        )
        self._taken = 0
        self._done.clear()
        self._iterations.clear()


def main(link: Line, begin: Begin) -> None:
    """What a replica's process runs. What it raises is told by whoever started it (`nanoflow.parallel.processes`)."""
    if begin.quiet:
        warnings.simplefilter("ignore")  # the first one warns of the same
    started = time.perf_counter()
    model = open_model(begin.model, begin.engine)
    with ExitStack() as stack:
        ranks = None
        if begin.tensor > 1:
            ranks = stack.enter_context(TensorGroup(begin.model, begin.engine, begin.tensor))
        engine = build_engine(
            model,
            begin.engine,
            begin.pipeline,
            weights=begin.model.weights,
            job=None if begin.job is None else begin.job.tolist(),
            more=begin.more,
            quiet=begin.quiet,
            ranks=ranks,
        )
        link.send(
            Ready(
                max_running=engine.scheduler.max_running,
                sizes=engine.sizes,
                kv_capacity=engine.kv_capacity,
                programs=engine.programs,
                load_seconds=time.perf_counter() - started,
            )
        )

        def tell(message: Told | Ended) -> None:
            try:
                link.send(message)
            except OSError:
                raise EOFError from None  # the main process has gone

        loop = Loop(engine, tell, EnergyMeter(model.device, begin.tensor))
        Thread(target=listen, args=(link, engine, loop.inbox), name="listen", daemon=True).start()
        if model.device.type == "cuda":
            Thread(target=watch_steps, args=(loop, leave), name="watch-steps", daemon=True).start()
        loop.run()
        engine.close()


def watch_steps(loop: Loop, end: Callable[[str], Any], *, seconds: float = HANG_SECONDS) -> None:
    """Call `end` with the reason when an iteration takes longer than `seconds`: nothing else sees that a GPU hangs."""
    seen, waited = 0, 0.0
    while waited <= seconds:
        time.sleep(TICK_SECONDS)
        # By own ticks: time in which this process is stopped does not count.
        waited = waited + TICK_SECONDS if loop.stepping and loop.steps == seen else 0.0
        seen = loop.steps
    end(f"an iteration has not come to its end in {seconds:.0f} s: its GPU hangs")


def listen(link: Line, engine: Engine, inbox: "SimpleQueue[Message]") -> None:
    """Put what comes by `link` into `inbox` until it ends, grammars compiled."""
    with suppress(EOFError, OSError):
        while True:
            message = link.recv()
            if isinstance(message, Give):
                for request in message.requests:
                    if request.params.structured_outputs is not None:
                        with suppress(InputError):  # said again, and told, when it is submitted
                            engine.check(request.token_ids, request.params)
            inbox.put(message)
    inbox.put(None)
