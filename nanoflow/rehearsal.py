"""A scheduler at work without a model: what batches it forms, against an executor that answers at once.

Contract: one iteration is in flight, as in `Engine.step`. Every token is 0, so a sequence ends at its limit, or, where
that is asked for, one that may stop ends after the mean length of outputs. Batches are padded as the sequential plan's.
"""

import time
from collections.abc import Iterable, Sequence as Many
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from nanoflow.kv_cache import KVCache
from nanoflow.ops.batch import DenseBatch, StepOutput
from nanoflow.pipeline.plan import NanoBatch, Plan
from nanoflow.pipeline.split import BatchCutter
from nanoflow.scheduler import Iteration, Scheduler

__all__ = ["Rehearsal", "Rehearsed", "least_iterations", "rehearsal_scheduler"]


def rehearsal_scheduler(
    *,
    kv_tokens: int,
    page_size: int,
    max_batch_tokens: int,
    max_running: int,
    max_model_len: int,
    row_buckets: Many[int] = (),
) -> Scheduler:
    """A scheduler with an engine's limits (see `Scheduler.sizes`) that needs no model.

    Args:
        kv_tokens: of the KV cache, without the reserved page.
        page_size: tokens of a page.
        row_buckets: as `Scheduler` takes them; empty: batches are not padded.
    """
    whole = Fraction(1)
    return Scheduler(
        kv=KVCache(kv_tokens // page_size + 1, page_size, max_running, -(-max_model_len // page_size)),
        cut=BatchCutter([Plan(max_batch_tokens, (NanoBatch("a", whole, whole, max_batch_tokens),), ())], row_buckets),
        max_batch_tokens=max_batch_tokens,
        max_running=max_running,
        max_model_len=max_model_len,
        row_buckets=row_buckets,
    )


@dataclass(frozen=True, eq=False)
class Rehearsed:
    """One iteration that was formed."""

    batch: DenseBatch
    kv_pages: int
    """Pages in use after the iteration before was seen, as an engine's observers are told."""
    waiting: int
    """Sequences that wait for their admission then."""
    slots_full: bool
    """Whether every slot has a sequence then."""
    form_seconds: float
    update_seconds: float
    """Of recording the tokens of the iteration before."""


class Rehearsal:
    """Runs what is added to `scheduler`, an iteration a step.

    Args:
        scheduler: knows no end-of-sequence token, since every token is 0.
        mean_output: tokens after which a sequence that may stop (`certain` is false) does; None: at its limit.
    """

    def __init__(self, scheduler: Scheduler, mean_output: float | None = None) -> None:
        self.scheduler = scheduler
        self._mean_output = mean_output
        self._flying: Iteration | None = None

    def step(self) -> Rehearsed | None:
        """Form one iteration and record the one before; None if none can run before that is seen.

        Raises RuntimeError if there is neither.
        """
        scheduler, before = self.scheduler, self._flying
        began = time.perf_counter()
        self._flying = formed = scheduler.form()
        ended = time.perf_counter()
        if before is not None:
            self._update(before)
        if formed is None:
            if before is None:
                raise RuntimeError(f"{scheduler.unfinished} sequences are unfinished and none can run")
            return None
        return Rehearsed(
            formed.batch,
            scheduler.kv.used_pages,
            scheduler.waiting,
            scheduler.running >= scheduler.max_running,
            ended - began,
            time.perf_counter() - ended,
        )

    def _update(self, iteration: Iteration) -> None:
        output = StepOutput(np.zeros(len(iteration.sampled), np.int32)) if iteration.sampled else None
        received = self.scheduler.update(iteration, output)
        if self._mean_output is None:
            return
        for sequence in received:
            if not sequence.certain and not sequence.finished and len(sequence.output) >= self._mean_output:
                self.scheduler.finish(sequence, "stop")


def least_iterations(
    lengths: Iterable[tuple[float, float]], kv: KVCache, max_batch_tokens: int, max_running: int
) -> float:
    """Iterations that requests of (prompt, output) tokens need at least: with the KV cache, the rows of the batches or
    the slots in full use from the first to the last, whichever is scarcest.

    A sequence of a prompt of A and B output tokens holds A + B / 2 KV tokens in the mean over B iterations, and half a
    page more for its last one; it takes A + B - 1 rows.
    """
    pairs = np.array([*lengths], np.float64).reshape(-1, 2)
    prompt, output = pairs.T
    held = (kv.page_size - 1) / 2
    area = float((output * (prompt + output / 2 + held)).sum()) / (kv.usable_pages * kv.page_size)
    return max(area, float((prompt + output - 1).sum()) / max_batch_tokens, float(output.sum()) / max_running)
