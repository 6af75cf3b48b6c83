"""Measuring plans on one mix, round after round, on a model that is loaded once.

Contract: nothing of a round is left on the device when it is over, whatever became of it: graphs, buffers and
partitions go, weights and KV cache stay. A plan that does not fit, cannot be captured or gives wrong outputs fails
alone. Anything else, a device or a rank that is lost above all, is raised.

Pseudo-code of a round::

    leave out the plans whose partitions the device refuses
    executor of the sequential plan and the round's; compare every plan's outputs with the sequential plan's
    blocks in turn of all that are right
    if the executor could not be made: each half of the round alone, down to a single plan, which is the one that fails
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch

from nanoflow.errors import OutOfMemoryError
from nanoflow.loading import Model
from nanoflow.memory import release
from nanoflow.ops.batch import DenseBatch
from nanoflow.ops.communicator import Communicator
from nanoflow.parallel.executor import RankExecutor, RunExecutor, TensorParallelExecutor
from nanoflow.parallel.group import TensorGroup
from nanoflow.pipeline.executor import Weights
from nanoflow.pipeline.partitions import Partition, PartitionError, unavailable
from nanoflow.pipeline.plan import Plan, PlanError
from nanoflow.plans.running import longest_request, measuring_executor, mix_batch, random_caches
from nanoflow.power import EnergyMeter
from nanoflow.search.measure import Block, Comparison, compare, largest_error, output_error
from nanoflow.search.mix import Mix
from nanoflow.search.tuner import Outcome

__all__ = ["Blocks", "Final", "MixRounds", "Stopped"]

SEQUENTIAL = "sequential"


class Stopped(Exception):
    """The user asked for an end; raised between two blocks."""


@dataclass(frozen=True)
class Blocks:
    """How long plans are measured: blocks of each, in turn."""

    seconds: float
    pairs: int


@dataclass(frozen=True)
class Final:
    """The last comparison of one plan with the sequential one."""

    plan: Plan
    ratios: tuple[float, ...]
    """How many times as fast as in sequence, pair by pair."""
    seconds: float
    """Of an iteration."""
    sequential_seconds: float
    joules: float | None
    """Of an iteration; None if the device does not tell."""
    sequential_joules: float | None

    @property
    def ratio(self) -> float:
        """The median of all pairs."""
        return median(self.ratios)


class MixRounds:
    """Rounds on one mix. Use as a context manager: it holds a KV cache of what the mix takes.

    Args:
        model: its graph and device.
        weights: of the model, loaded.
        rows: that the mix is padded to.
        page_size: tokens of a KV page.
        stopping: asked between two blocks whether to end, by `Stopped`.
        group: the other ranks, where some share the model, loaded and with enough pages for the mix.
        slots: of requests, on all ranks; None: as many as the mix has.

    Raises OutOfMemoryError if the mix does not fit the device even in sequence.
    """

    def __init__(
        self,
        model: Model,
        weights: Weights,
        mix: Mix,
        rows: int,
        page_size: int,
        stopping: Callable[[], bool] = lambda: False,
        *,
        group: TensorGroup | None = None,
        slots: int | None = None,
    ) -> None:
        self.mix, self.rows = mix, rows
        # Contexts are spread around their mean, and where all of the job's are long, beyond what the model would allow:
        # that changes nothing of the time, but page tables must have room.
        self._model = replace(model, max_model_len=max(model.max_model_len, longest_request(mix)))
        self._weights, self._stopping = weights, stopping
        self._group, self._slots = group, slots
        self._page_size = page_size
        self._joules = EnergyMeter(model.device, model.graph.ranks).joules
        self._caches: list[torch.Tensor] = []
        self._sequential = Plan.sequential(model.graph, rows)
        self._refused: dict[tuple[int, ...], str] = {}
        """Of partitions that were tried: why the device refuses them, or nothing."""

    def __enter__(self) -> "MixRounds":
        try:
            self._caches = random_caches(self._model, self.mix, self._page_size)
        except torch.OutOfMemoryError:
            release(self._model.device)
            raise OutOfMemoryError(
                f"the KV cache of {self.mix} does not fit the device beside the weights; lower engine.kv_memory, as a "
                "run would have to, or end what else uses the device"
            ) from None
        return self

    def __exit__(self, *exception: object) -> None:
        self._caches = []
        release(self._model.device)

    def measure(self, plans: Sequence[Plan], blocks: Blocks) -> list[Outcome]:
        """What comes of each plan, compared with the sequential one. Raises Stopped, and what ends the device."""
        outcomes: dict[int, Outcome] = {}
        for number, plan in enumerate(plans):
            if why := self._refuses(plan):
                outcomes[number] = Outcome(None, why)
        left = [number for number in range(len(plans)) if number not in outcomes]
        outcomes |= zip(left, self._round([plans[number] for number in left], blocks), strict=True)
        return [outcomes[number] for number in range(len(plans))]

    def compare(self, plans: Sequence[Plan], blocks: Blocks) -> list[Final]:
        """A last comparison of plans that were measured before; those that are wrong now, or fail, are left out.

        Outputs are compared before and after: a race may show only when the device is hot. Raises Stopped.
        """
        found: list[Final] = []
        together = self._together(plans, blocks, twice=True)
        if isinstance(together, str):
            return found if len(plans) == 1 else [each for plan in plans for each in self.compare([plan], blocks)]
        comparison, wrong = together
        for number, plan in enumerate(plans):
            name = str(number)
            if name not in wrong:
                found.append(
                    Final(
                        plan,
                        tuple(comparison.ratios(SEQUENTIAL, name)),
                        comparison.seconds(name),
                        comparison.seconds(SEQUENTIAL),
                        comparison.joules(name),
                        comparison.joules(SEQUENTIAL),
                    )
                )
        return found

    def _round(self, plans: Sequence[Plan], blocks: Blocks) -> list[Outcome]:
        if not plans:
            return []
        together = self._together(plans, blocks)
        if isinstance(together, str):
            if len(plans) == 1:
                return [Outcome(None, together)]
            half = len(plans) // 2
            return self._round(plans[:half], blocks) + self._round(plans[half:], blocks)
        comparison, wrong = together
        return [
            Outcome(None, wrong[name]) if name in wrong else _outcome(comparison, name)
            for name in map(str, range(len(plans)))
        ]

    def _together(
        self, plans: Sequence[Plan], blocks: Blocks, twice: bool = False
    ) -> tuple[Comparison, dict[str, str]] | str:
        """The plans, by their number, beside the sequential one, and what is wrong with some of them; or why no
        executor of all of them can be made."""
        self._check_stop()
        executor: RunExecutor | None = None
        problem = ""
        try:
            executor = self._executor([self._sequential, *plans])
        except (OutOfMemoryError, PlanError) as error:
            problem = str(error).splitlines()[0]
        except RuntimeError as error:  # a kernel that cannot be launched so
            problem = str(error).splitlines()[0]
            if self._model.device.type != "cuda":
                raise
            torch.cuda.synchronize(self._model.device)  # raises if the device itself is lost
        if executor is None:
            release(self._model.device)  # out of the handlers, whose tracebacks hold on to what was made
            return problem
        try:
            batches = {
                name: mix_batch(self.mix, executor.cut, self._page_size, self._model.graph.vocab_size, number)
                for number, name in enumerate([SEQUENTIAL, *map(str, range(len(plans)))])
            }
            self._check_stop()
            wrong = _wrong(executor, batches)
            self._check_stop()
            right = {name: batch for name, batch in batches.items() if name not in wrong}
            comparison = Comparison({})
            if len(right) > 1:
                comparison = compare(
                    executor,
                    right,
                    seconds=blocks.seconds,
                    pairs=blocks.pairs,
                    joules=self._joules,
                    progress=self._told,
                )
            if twice:
                wrong |= _wrong(executor, right)
        except torch.OutOfMemoryError as error:  # of what is not captured
            problem = str(error).splitlines()[0]
        finally:
            if not isinstance(executor, TensorParallelExecutor):
                executor.close()
            elif self._group is not None and not self._group.lost:
                executor.release()  # the other ranks go on to the next round's
            del executor
        release(self._model.device)
        return problem or (comparison, wrong)

    def _executor(self, plans: Sequence[Plan]) -> RunExecutor:
        """Of `plans`, on all ranks; raises what `measuring_executor` does."""

        def make(communicator: Communicator | None = None) -> RankExecutor:
            return measuring_executor(
                self._model,
                plans,
                self.mix,
                self._page_size,
                row_buckets=[self.rows],
                weights=self._weights,
                caches=self._caches,
                communicator=communicator,
                slots=self._slots,
            )

        if self._group is None:
            return make()
        texts = tuple(plan.dumps() for plan in plans)
        return self._group.executor(texts, make, row_buckets=(self.rows,), measuring=True)

    def _refuses(self, plan: Plan) -> str:
        """Why the device cannot be split as the plan says, or nothing."""
        device = self._model.device
        if device.type != "cuda" or unavailable(device):
            return ""
        for parts in plan.partitions.values():
            if parts not in self._refused:
                try:
                    Partition(parts, device).close()
                    self._refused[parts] = ""
                except PartitionError as error:
                    self._refused[parts] = str(error)
            if self._refused[parts]:
                return self._refused[parts]
        return ""

    def _told(self, name: str, block: Block) -> None:
        self._check_stop()

    def _check_stop(self) -> None:
        if self._stopping():
            raise Stopped


def _outcome(comparison: Comparison, name: str) -> Outcome:
    figures = {
        "iteration_ms": comparison.seconds(name) * 1e3,
        "sequential_ms": comparison.seconds(SEQUENTIAL) * 1e3,
    }
    return Outcome(median(comparison.ratios(SEQUENTIAL, name)), figures=figures)


def _wrong(executor: RunExecutor, batches: Mapping[str, DenseBatch]) -> dict[str, str]:
    """Of the plans whose outputs are not those of the sequential one: what is wrong."""
    errors = {name: output_error(executor, batches[SEQUENTIAL], batch) for name, batch in batches.items()}
    return {
        name: f"its outputs are {error:.0e} from the sequential plan's"
        for name, error in errors.items()
        if not error < largest_error(executor)  # neither is a NaN
    }
