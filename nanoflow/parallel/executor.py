"""The executor of a tensor-parallel run, as the engine sees it on rank 0: hands each batch to all ranks."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from nanoflow.errors import OutOfMemoryError
from nanoflow.ops.batch import DenseBatch, StepOutput
from nanoflow.ops.sampling import Sampler
from nanoflow.pipeline.bound_programs import BoundPrograms
from nanoflow.pipeline.cuda_executor import CudaExecutor
from nanoflow.pipeline.plan import PlanError
from nanoflow.pipeline.program import Program
from nanoflow.pipeline.reference_executor import ReferenceExecutor
from nanoflow.pipeline.split import BatchCutter

__all__ = ["BUILD_ERRORS", "OtherRanks", "RankExecutor", "RunExecutor", "TensorParallelExecutor"]

BUILD_ERRORS = (OutOfMemoryError, PlanError, RuntimeError)
"""What an executor of plans that cannot run here raises: kernels that cannot be launched so raise RuntimeError."""

RankExecutor = CudaExecutor | ReferenceExecutor
"""What runs one rank's share."""


class OtherRanks(Protocol):
    """What the executor needs of the other ranks."""

    @property
    def lost(self) -> bool:
        """Whether one has ended, or hangs."""
        ...

    def publish(self, batch: DenseBatch) -> None:
        """Hand a batch to all of them."""
        ...

    def blamed(self) -> AbstractContextManager[None]:
        """Turns an error that follows from another rank's end into one that says so."""
        ...

    def awaited(self) -> AbstractContextManager[None]:
        """Marks the time in which an iteration of all ranks is waited for."""
        ...

    def end(self) -> None:
        """Ask them to end, and wait until they have."""
        ...


class TensorParallelExecutor:
    """Runs every iteration on all ranks; an `Executor`.

    Args:
        own: runs rank 0's share, and samples.
        ranks: the others, whose executors run the same programs.
        close_communicator: called once `own` is closed.
    """

    def __init__(self, own: RankExecutor, ranks: OtherRanks, close_communicator: Callable[[], None]) -> None:
        self.own = own
        self._ranks = ranks
        self._close_communicator = close_communicator

    @property
    def programs(self) -> tuple[Program, ...]:
        return self.own.programs

    @property
    def cut(self) -> BatchCutter:
        return self.own.cut

    @property
    def bound(self) -> BoundPrograms:
        """Rank 0's share."""
        return self.own.bound

    @property
    def sampler(self) -> Sampler:
        return self.own.sampler

    def step_times(self) -> list[tuple[float, float]]:
        """Of rank 0; see `Executor.step_times`."""
        return self.own.step_times()

    def launch(self, batch: DenseBatch) -> None:
        """See `Executor.launch`. Raises ParallelError if a rank was lost."""
        with self._ranks.blamed():
            self._ranks.publish(batch)
            self.own.launch(batch)

    def collect(self) -> StepOutput:
        """See `Executor.collect`. Raises ParallelError if a rank was lost."""
        with self._ranks.blamed(), self._ranks.awaited():
            return self.own.collect()

    def release(self) -> None:
        """Close rank 0's executor; the other ranks go on to another one."""
        self.own.close()
        self._close_communicator()

    def close(self) -> None:
        """See `Executor.close`; the other ranks end."""
        # What still runs may wait for a rank that is gone, on a GPU for ever: the process ends without it.
        if not self._ranks.lost:
            self.release()
        self._ranks.end()


RunExecutor = RankExecutor | TensorParallelExecutor
"""What an engine may run on: its own device, or ranks that share the model."""
