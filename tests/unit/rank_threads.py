"""Several ranks in the threads of one process, joined by gloo: what takes processes to run takes none to test."""

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch.distributed import HashStore

from nanoflow.ops.batch import DenseBatch, StepOutput
from nanoflow.ops.communicator import TorchCommunicator
from nanoflow.pipeline.executor import KVLayout, Weights
from nanoflow.pipeline.program import Program

CPU = torch.device("cpu")
LIMIT = 120.0
"""Seconds after which nothing is waited for any more, on any machine."""
Result = TypeVar("Result")


def on_all(function: Callable[[int], Result], size: int) -> list[Result]:
    """`function` of every rank, each in a thread of its own; raises what the first that failed raised."""
    with ThreadPoolExecutor(max_workers=size) as pool:
        futures = [pool.submit(function, rank) for rank in range(size)]
        done, _ = wait(futures, LIMIT, FIRST_EXCEPTION)
        for future in done:  # what the others raise then is that it does not answer
            future.result()
        return [future.result(timeout=0) for future in futures]


def connect(size: int, timeout: float = 60.0) -> list[TorchCommunicator]:
    store = HashStore()
    return on_all(lambda rank: TorchCommunicator(store, rank, size, CPU, timeout=timeout), size)


class ThreadRanks:
    """An `Executor` that runs every batch on all ranks and gives what rank 0 sampled.

    Args:
        make: ReferenceExecutor or CudaExecutor.
        programs: of every rank.
        options: of the executors; `seed` is another one for each rank.
    """

    def __init__(
        self, make: Any, programs: Sequence[Sequence[Program]], weights: Sequence[Weights], kv: KVLayout, **options: Any
    ) -> None:
        size = len(programs)
        self.communicators = connect(size)

        def made(rank: int) -> Any:
            own = {**options, "communicator": self.communicators[rank]}
            if "seed" in own:
                own["seed"] += 1000 * rank
            return make(programs[rank], weights[rank], kv, **own)

        self.ranks: list[Any] = on_all(made, size)
        # One thread a rank: on a CPU a launch of CudaExecutor ends only when the other ranks have launched too.
        self._threads = [ThreadPoolExecutor(max_workers=1) for _ in range(size)]
        self._collected: list[list[Future[StepOutput]]] = []
        self.programs = self.ranks[0].programs
        self.cut = self.ranks[0].cut

    def step_times(self) -> list[tuple[float, float]]:
        times: list[tuple[float, float]] = self.ranks[0].step_times()
        return times

    def launch(self, batch: DenseBatch) -> None:
        bare = batch
        if batch.sampling is not None and batch.sampling.masks is not None:
            bare = replace(batch, sampling=replace(batch.sampling, masks=None))  # as other processes get it
        for rank, (executor, thread) in enumerate(zip(self.ranks, self._threads, strict=True)):
            thread.submit(executor.launch, bare if rank else batch)

    def collect(self) -> StepOutput:
        collecting = [thread.submit(e.collect) for e, thread in zip(self.ranks, self._threads, strict=True)]
        # Rank 0 waits for no other: their masked iterations end only once it has gone on.
        self._collected.append(collecting)
        first: StepOutput = collecting[0].result(timeout=LIMIT)
        return first

    def close(self) -> None:
        for collecting in self._collected:
            first, *others = [future.result(timeout=LIMIT) for future in collecting]
            for other in others:
                assert other.logprobs is None and other.tokens.tolist() == first.tokens.tolist()
        for executor, thread in zip(self.ranks, self._threads, strict=True):
            thread.submit(executor.close).result(timeout=LIMIT)
            thread.shutdown()
        for communicator in self.communicators:
            communicator.close()
