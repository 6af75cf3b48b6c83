"""A rank other than 0: runs the batches that rank 0 publishes on its share of the model, and samples nothing.

Contract: it takes part in every collective of every batch, in order, and never waits for a rank that is gone: its line
to rank 0 ends with that one, and collectives have a timeout. It says nothing on the terminal; what it raises is told to
rank 0, which tells the user.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from multiprocessing.reduction import recv_handle

import torch

from nanoflow.loading import kv_layout, kv_pages, make_executor, open_model, shard_model
from nanoflow.memory import release
from nanoflow.ops.communicator import CommunicatorError, TorchCommunicator, have_peer_memory
from nanoflow.parallel.batches import BatchReader
from nanoflow.parallel.executor import BUILD_ERRORS, RankExecutor
from nanoflow.parallel.messages import HERE, LINK_DTYPE, READY, Build, CannotBuild, Load, Profiling, RankSettings
from nanoflow.parallel.processes import Line
from nanoflow.pipeline.plan import Plan
from nanoflow.pipeline.program import compile_program
from nanoflow.search.ceilings import measure_link
from nanoflow.weights import load_weights

__all__ = ["work"]

ORDER_SECONDS = 600.0
"""After plans that cannot run here, how long another order is waited for: rank 0 finds that it cannot run them either,
unless it waits for this rank."""
PATIENCE_SECONDS = 1.0
"""With an iteration in flight, how long the next batch is waited for before the one in flight is: where it has failed,
rank 0 may be waiting for this rank, and would send no other."""


def work(line: Line, settings: RankSettings) -> None:
    """Serve rank 0 until it closes `line`."""
    warnings.simplefilter("ignore")  # rank 0 warns of the same
    torch.set_num_threads(settings.threads)
    size, rank = settings.size, settings.rank
    if settings.engine.device.startswith("cuda"):
        torch.cuda.set_device(settings.engine.device)  # first: nothing is to take memory of another rank's
    model = open_model(settings.model, settings.engine)
    if settings.layers is not None:
        model = replace(model, graph=replace(model.graph, layers=settings.layers))
    line.send(HERE)
    order: Load | Profiling = line.recv()
    model = shard_model(model, rank, size, order.layout)
    model = replace(model, max_model_len=max(model.max_model_len, order.longest))
    store = _store(settings)

    def meet(number: int) -> TorchCommunicator:
        return TorchCommunicator(store, rank, size, model.device, timeout=settings.timeout, name=f"build {number}")

    communicator = meet(0)
    measure_link(communicator, model.device, LINK_DTYPE)
    have_peer_memory(communicator)
    if isinstance(order, Profiling):
        from nanoflow.profiling.ranks import serve_cases

        serve_cases(line, model, communicator)
        return
    weights = load_weights(model.graph, model.checkpoint, model.dtype, model.device, order.weights)
    needs = order.needs
    line.send(needs if isinstance(needs, int) else kv_pages(model, settings.engine, needs))
    layout = kv_layout(model, settings.engine, line.recv())
    reader = BatchReader(recv_handle(line), rank - 1, line, readers=size - 1)
    while True:
        build: Build = line.recv()
        if build.number:
            communicator = meet(build.number)
        programs = [compile_program(plan, model.graph) for plan in _plans(build.plans)]
        why = ""
        try:
            executor = make_executor(
                model, settings.engine, programs, weights, layout, communicator, row_buckets=build.row_buckets
            )
        except BUILD_ERRORS as error:
            if not build.measuring or isinstance(error, CommunicatorError):
                raise
            why = str(error).splitlines()[0]
        if why:  # out of the handler, whose traceback holds on to what was made
            communicator.close()
            release(model.device)
            line.send(CannotBuild(why))
            if not line.poll(ORDER_SECONDS):  # on a GPU nothing else would end what it waits for
                raise CommunicatorError(f"rank 0 has given no other order in {ORDER_SECONDS:.0f} s after: {why}")
            continue
        if build.measuring:
            for cache in executor.bound.kv:
                cache.normal_()
        line.send(READY)
        goes_on = serve(executor, reader, line)
        executor.close()
        communicator.close()
        if not goes_on:
            return
        del executor
        release(model.device)  # two sets of buffers might not fit


def serve(executor: RankExecutor, reader: BatchReader, line: Line) -> bool:
    """Run what `reader` takes, one iteration ahead; whether rank 0 has something else to say, or ends."""
    in_flight = 0
    while True:
        if in_flight and not line.poll(PATIENCE_SECONDS):
            executor.collect()
            in_flight -= 1
            continue
        try:
            batch = reader.take()
        except (EOFError, OSError):
            goes_on = False
            break
        if batch is None:
            goes_on = True
            break
        executor.launch(batch)
        in_flight += 1
        if in_flight == 2:
            executor.collect()
            in_flight -= 1
    for _ in range(in_flight):  # rank 0 may be in the middle of them
        executor.collect()
    return goes_on


def _plans(texts: Sequence[str]) -> list[Plan]:
    return [Plan.loads(text, source="rank 0's plan") for text in texts]


def _store(settings: RankSettings) -> object:
    from torch._C._distributed_c10d import TCPStore

    return TCPStore("127.0.0.1", settings.port, None, False, timedelta(seconds=settings.timeout), False)
