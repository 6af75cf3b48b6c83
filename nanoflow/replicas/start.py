"""Starting the replicas of a run: which GPUs, threads and share of memory each gets."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from nanoflow.config_schema import EngineSection, ModelSection, ParallelSection, PipelineSection
from nanoflow.devices import choose_device, processor_cores
from nanoflow.errors import ConfigError
from nanoflow.loading import Model, shard_model
from nanoflow.memory import CPU_SHARE, parse_memory
from nanoflow.parallel.processes import Child, Watch, start
from nanoflow.parallel.torchrun import place
from nanoflow.replicas.messages import Begin
from nanoflow.replicas.pool import Pool

__all__ = ["Parts", "Place", "check_replicas", "places", "start_replicas"]

PROCESSES_A_CORE, LEAST_PROCESSES = 4, 16
"""Most processes of replicas on a CPU: more only take memory, some 250 MB each beside the model; so many on any
machine."""


class Parts(Protocol):
    """What replicas need to know of a run; a `RunConfig` has it."""

    @property
    def model(self) -> ModelSection: ...
    @property
    def engine(self) -> EngineSection: ...
    @property
    def pipeline(self) -> PipelineSection: ...
    @property
    def parallel(self) -> ParallelSection: ...


@dataclass(frozen=True)
class Place:
    """Where one replica runs."""

    environment: dict[str, str]
    """Variables of its process, beside the main process's."""
    engine: EngineSection
    """The run's, with the device and the memory that are this replica's."""


def check_replicas(engine: EngineSection, parallel: ParallelSection) -> None:
    """Raises ConfigError if `parallel` asks for more than this machine has, or torchrun has started this process.

    Nothing slow is done for it.
    """
    if parallel.data > 1:
        if place() is not None:
            raise ConfigError(
                f"parallel.data: {parallel.data} replicas under torchrun are not supported; use `nanoflow run`, "
                "which starts all processes itself"
            )
        places(engine, parallel, choose_device(engine.device, use=False))


def start_replicas(
    config: Parts,
    model: Model,
    job: Sequence[int] | None,
    *,
    more: bool,
    quiet: bool,
    then: str = "",
) -> Pool:
    """Start `parallel.data` replicas and wait until they are ready.

    Args:
        model: opened in this process; no weights are read here.
        job, more: as `build_engine` has them. Each replica is made for the whole job: none knows what it will get.
        then: what the user is told of the consequences when no replica is left, behind the cause.

    Raises:
        UserError: there are too few GPUs, the model cannot be split over `parallel.tensor`, or no replica could start.
    """
    where = places(config.engine, config.parallel, model.device)
    if config.parallel.tensor > 1:
        shard_model(model, 0, config.parallel.tensor)  # what cannot be split is refused here, and not in every replica
    lengths = None if job is None else np.array(job, np.int64)

    def begin(number: int) -> Child:
        mine = Begin(
            config.model,
            where[number].engine,
            config.pipeline,
            config.parallel.tensor,
            lengths,
            more,
            quiet=quiet or number > 0,  # all have the same to say of plans
        )
        name = f"replica {number}" if len(where) > 1 else "rank 0"
        return start("nanoflow.replicas.serve:main", mine, name=name, environment=where[number].environment)

    return Pool(
        begin,
        len(where),
        Watch,
        max_model_len=model.max_model_len,
        tokenizer=model.tokenizer,
        longest_first=config.engine.order == "longest-first",
        then=then,
    )


def places(engine: EngineSection, parallel: ParallelSection, device: torch.device) -> list[Place]:
    """Where each replica of a run on `device` runs. Raises ConfigError if there are too few GPUs, or cores."""
    count, each = parallel.data, parallel.tensor
    threads = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // count))}
    if device.type == "cuda":
        first = device.index or 0
        here = torch.cuda.device_count()
        if first + count * each > here:
            of = f" of {each} GPUs each" if each > 1 else ""
            begin = f" from cuda:{first} on" if first else ""
            raise ConfigError(
                f"parallel.data: {count} replicas{of} need {count * each} GPUs{begin}, and this machine has {here}; "
                f"set it to {max(1, (here - first) // each)} or less"
            )
        engine = engine.model_copy(update={"device": "cuda"})
        starts = range(first, first + count * each, each)
        return [Place(threads | _gpus(range(start, start + each)), engine) for start in starts]
    cores = processor_cores()
    most = max(LEAST_PROCESSES, PROCESSES_A_CORE * cores)
    if count * each > most:
        raise ConfigError(
            f"parallel.data: {count:,} replicas are {count * each:,} processes, and this machine has "
            f"{cores} core{'s' if cores > 1 else ''}; set it to {max(1, most // each)} or less"
        )
    # Each takes its part of what is free.
    memory = parse_memory(engine.kv_memory)
    share = CPU_SHARE if memory is None else memory
    update: dict[str, Any] = {"device": "cpu"}
    if isinstance(share, float) and count > 1:
        update["kv_memory"] = share / count
    return [Place(threads, engine.model_copy(update=update))] * count


def _gpus(numbers: range) -> dict[str, str]:
    """What shows a process these GPUs alone, of those that this process sees: it then cannot touch another's."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = (
        [name.strip() for name in shown.split(",")] if shown is not None else [str(n) for n in range(max(numbers) + 1)]
    )
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[number] for number in numbers)}
