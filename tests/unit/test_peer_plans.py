"""Plans that name forms of all-reduces which meet in peer memory: who gets which memory, and where they cannot run."""

from typing import Any

import pytest
import torch

from nanoflow.ops.graph import RESIDUAL
from nanoflow.ops.peer_all_reduce import PEER_FORMS, peer_room
from nanoflow.ops.peer_memory import PeerMemory, PeerMemoryError, data_begin
from nanoflow.ops.sharding import shard_graph
from nanoflow.pipeline.bound_programs import BoundPrograms
from nanoflow.pipeline.checker import check_program
from nanoflow.pipeline.executor import KVLayout
from nanoflow.pipeline.plan import Plan, PlanError
from nanoflow.pipeline.program import compile_program
from nanoflow.pipeline.validate import validate
from tests.unit.plan_strategies import full_batch
from tests.unit.rank_models import graph_of
from tests.unit.rank_threads import CPU, connect, on_all

WHOLE = graph_of()
GRAPHS = [shard_graph(WHOLE, rank, 2) for rank in range(2)]
LANES = """
capacity: 48
nano_batches: {a: {decode: 1/2, prefill: 1/2, rows: 16}, b: {decode: 1/2, prefill: 1/2, rows: 32}}
kernels: KERNELS
period:
- whole:
    compute: [qkv.a, decode_attention.a, prefill_attention.a, o.a, qkv.b, decode_attention.b, prefill_attention.b, o.b,
      add_norm.a, gate_up.a, down.a, add_norm.b, gate_up.b, down.b]
    one: [o_all_reduce.a, o_all_reduce.b, down_all_reduce.a]
    two: [down_all_reduce.b]
"""


class Recording:
    """A communicator that can do no more than make others, and memory."""

    rank = 0
    size = 2

    def __init__(self) -> None:
        self.twins: list[str] = []
        self.made: dict[str, PeerMemory] = {}

    def twin(self, name: str, max_ctas: int | None = None) -> "Recording":
        self.twins.append(name)
        return self

    def peer_memory(self, name: str, room: int) -> PeerMemory:
        assert name not in self.made
        blocks = [torch.zeros(data_begin(2) + room, dtype=torch.uint8) for _ in range(2)]
        self.made[name] = PeerMemory(0, blocks, 1.0)
        return self.made[name]


def bind(kernels: str, communicator: Any, rank: int = 0) -> BoundPrograms:
    graph = GRAPHS[rank]
    plan = Plan.loads(LANES.replace("KERNELS", kernels), graph)
    validate(plan, graph)
    program = compile_program(plan, graph)
    assert not check_program(program, full_batch(2), page_size=2)
    nothing: Any = None
    return BoundPrograms(
        [program], nothing, KVLayout(2, 8), dtype=torch.float16, device=CPU, sampled_rows=8, communicator=communicator
    )


def test_each_lane_and_form_has_memory_of_its_own() -> None:
    """Enough for the largest nano-batch that uses it; and NCCL's communicators are not made for them."""
    communicator = Recording()
    bound = bind("{o_all_reduce: one_shot, down_all_reduce: two_shot}", communicator)
    columns = WHOLE.values[RESIDUAL]
    rooms = {name: memory.room for name, memory in communicator.made.items()}
    assert rooms == {
        "one-one_shot": peer_room("one_shot", 32 * columns, 2, 2),
        "one-two_shot": peer_room("two_shot", 16 * columns, 2, 2),
        "two-two_shot": peer_room("two_shot", 32 * columns, 2, 2),
    }
    assert communicator.twins == []
    assert bound._peers[0, "down_all_reduce", 1, "two"] is communicator.made["two-two_shot"]
    assert bound._peers[0, "down_all_reduce", 0, "one"] is communicator.made["one-two_shot"]
    bound.close()
    assert not any(memory.blocks for memory in communicator.made.values())


def test_each_nano_batch_may_have_a_form_of_its_own() -> None:
    communicator = Recording()
    bound = bind("{o_all_reduce: two_shot, o_all_reduce.a: one_shot, down_all_reduce.b: nccl_4}", communicator)
    columns = WHOLE.values[RESIDUAL]
    rooms = {name: memory.room for name, memory in communicator.made.items()}
    assert rooms == {
        "one-one_shot": peer_room("one_shot", 16 * columns, 2, 2),
        "one-two_shot": peer_room("two_shot", 32 * columns, 2, 2),
    }
    assert bound._peers[0, "o_all_reduce", 0, "one"] is communicator.made["one-one_shot"]
    assert bound._peers[0, "o_all_reduce", 1, "one"] is communicator.made["one-two_shot"]
    assert set(bound._communicators) == {(0, "down_all_reduce", 0, "one"), (0, "down_all_reduce", 1, "two")}
    assert communicator.twins == ["two-4"]


def test_the_nano_batch_whose_form_cannot_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(communicator: Recording, name: str, room: int) -> PeerMemory:
        raise PeerMemoryError("far apart")

    monkeypatch.setattr(Recording, "peer_memory", refuse)
    with pytest.raises(PlanError, match=r"^kernels\.o_all_reduce\.b: 'two_shot' cannot run here: far apart; what can"):
        bind("{o_all_reduce.b: two_shot}", Recording())


def test_other_forms_have_none() -> None:
    communicator = Recording()
    assert not bind("{o_all_reduce: copy_engine, down_all_reduce: nccl_4}", communicator)._peers.keys() - {
        (0, "o_all_reduce", 0, "one"),
        (0, "o_all_reduce", 1, "one"),
    }
    assert list(communicator.made) == ["one-copy_engine"]
    assert communicator.twins == ["one-4", "two-4"]


@pytest.mark.parametrize("form", PEER_FORMS)
def test_a_form_that_cannot_run_here_is_refused_on_all_ranks(form: str) -> None:
    group = connect(2)

    def refused(rank: int) -> str:
        with pytest.raises(PlanError) as error:
            bind(f"{{down_all_reduce: {form}}}", group[rank], rank)
        return str(error.value)

    messages = on_all(refused, 2)
    assert (
        messages
        == [
            f"kernels.down_all_reduce: '{form}' cannot run here: ranks on a CPU have no memory in common; "
            "what can: reference, nccl, nccl_2, nccl_4, nccl_8, nccl_16"
        ]
        * 2
    )
    for communicator in group:
        communicator.close()


def test_one_rank_has_no_all_reduce() -> None:
    plan = """
capacity: 8
nano_batches: {a: {decode: 1, prefill: 1, rows: 8}}
kernels: {o_all_reduce: two_shot}
period: [whole: {main: [qkv]}]
"""
    with pytest.raises(PlanError, match=r"kernels\.o_all_reduce: unknown operation.*parallel\.tensor"):
        validate(Plan.loads(plan, WHOLE), WHOLE)


def test_rooms() -> None:
    """In elements of 2 bytes: slots for all ranks, twice for one-shot; two-shot's, and its sums."""
    assert peer_room("one_shot", 1000, 4, 2) == 2 * 4 * 1024 * 2
    assert peer_room("two_shot", 1000, 4, 2) == peer_room("copy_engine", 1000, 4, 2) == 2 * 4 * 256 * 2
    assert peer_room("copy_engine", 1000, 2, 2) == 2 * 1024 * 2
