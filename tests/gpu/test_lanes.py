"""Lanes on a GPU: SMs that are really apart, launches where the plan says, and results that no delay changes."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from nanoflow.config_schema import EngineSection, ModelSection
from nanoflow.loading import open_model
from nanoflow.ops.graph import RESIDUAL
from nanoflow.pipeline.cuda_executor import CudaExecutor
from nanoflow.pipeline.executor import KVLayout
from nanoflow.pipeline.partitions import Partition, PartitionError
from nanoflow.pipeline.plan import Plan
from nanoflow.pipeline.program import compile_program
from nanoflow.plans.running import mix_batch, mix_pages
from nanoflow.search.measure import output_error
from nanoflow.search.mix import Mix
from nanoflow.weights import load_weights
from tests.gpu.checkpoints import save_model

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
smid = pytest.importorskip("triton.language.extra.cuda").smid

pytestmark = pytest.mark.gpu

CAPACITY = 256
PAGE_SIZE = 16
HEAD = """
capacity: 256
sms: {sms}
partitions: {{split: [{large}, 40], third: [{rest}, 32, 24]}}
nano_batches:
"""
HALVES = """
  a: {decode: 0.5, prefill: 0.5, rows: 128}
  b: {decode: 0.5, prefill: 0.5, rows: 128}
"""
PLANS = {
    "skewed": HALVES
    + """
period:
  - split:
      compute: [o.a, gate_up.a, down.a, qkv.a@1, o.b, gate_up.b, down.b, qkv.b@1]
      memory: [decode_attention.b, decode_attention.a@1]
""",
    "plain streams, qkv whole": HALVES
    + """
period:
  - whole:
      compute: [qkv, prefill_attention.a, o.a, gate_up.a, down.a, prefill_attention.b, o.b, gate_up.b, down.b]
      memory: [decode_attention.b, decode_attention.a]
""",
    "stages": HALVES
    + """
period:
  - whole:
      compute: [qkv.a, qkv.b]
  - split:
      compute: [prefill_attention.a, prefill_attention.b]
      memory: [decode_attention.a, decode_attention.b]
  - third:
      compute: [o.a, gate_up.a]
      memory: [o.b]
      network: [gate_up.b]
  - whole:
      compute: [down.a, down.b]
""",
    "phases": """
  a: {decode: 1, prefill: 0, rows: 96}
  b: {decode: 0, prefill: 1, rows: 160}
period:
  - split:
      compute: [qkv.b, decode_attention.b, o.b, gate_up.b, down.b]
      memory: [qkv.a, decode_attention.a, o.a, gate_up.a, down.a]
""",
    "three": """
  a: {decode: 0.25, prefill: 0.5, rows: 96}
  b: {decode: 0.5, prefill: 0.25, rows: 96}
  c: {decode: 0.25, prefill: 0.25, rows: 64}
period:
  - split:
      compute: [qkv.a, qkv.b, qkv.c, o.a, gate_up.a, down.a, o.b, gate_up.b, down.b, o.c, gate_up.c, down.c]
      memory: [decode_attention.a, decode_attention.b, decode_attention.c]
""",
    "all attention": HALVES
    + """
period:
  - split:
      compute: [o.a, gate_up.a, down.a, qkv.a@1, o.b, gate_up.b, down.b, qkv.b@1]
      memory: [rope_append.a@1, decode_attention.a@1, prefill_attention.a@1, rope_append.b@1, decode_attention.b@1,
               prefill_attention.b@1]
kernels: {decode_attention: triton_3}
""",
}


def plan_of(name: str) -> Plan:
    sms = torch.cuda.get_device_properties(0).multi_processor_count if torch.cuda.is_available() else 132
    return Plan.loads(HEAD.format(sms=sms, large=sms - 40, rest=sms - 56) + PLANS[name].lstrip("\n"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("small"), num_hidden_layers=4, hidden_size=256, intermediate_size=512,
                      num_attention_heads=8, head_dim=32, max_position_embeddings=2048)  # fmt: skip


def make_executor(folder: Path, plans: list[Plan], dtype: str = "float32", **options: Any) -> CudaExecutor:
    model = open_model(ModelSection(path=str(folder), dtype=dtype), EngineSection(device="auto"))  # type: ignore[arg-type]
    weights = load_weights(model.graph, model.checkpoint, model.dtype, model.device, "load")
    programs = [compile_program(plan, model.graph) for plan in (*plans, Plan.sequential(model.graph, CAPACITY))]
    executor = CudaExecutor(
        programs,
        weights,
        KVLayout(4000, PAGE_SIZE, 128),
        slots=CAPACITY,
        dtype=model.dtype,
        device=model.device,
        **{"row_buckets": [128], **options},
    )
    for kv in executor.bound.kv:
        kv.normal_()
    return executor


def random_mix(rng: random.Random) -> Mix:
    decode = rng.choice([0, rng.randrange(1, 96), rng.randrange(64, 97)])
    left = rng.randrange(CAPACITY - decode + 1)
    prompts = []
    while left > 0:
        prompts.append(min(left, rng.choice([1, 7, 40, 100, 200])))
        left -= prompts[-1]
    if not decode and not prompts:
        decode = 1
    return Mix(decode, rng.choice([1, 30, 300, 400]), tuple(prompts[:10]))


def delays(rng: random.Random) -> Any:
    """Around a step: now and then, a kernel that spins for up to 100 microseconds before it or after it."""

    def spin() -> None:
        if torch.cuda.is_available() and rng.random() < 0.15:
            torch.cuda._sleep(rng.randrange(1000, 180_000))

    @contextmanager
    def around(step: int) -> Iterator[None]:
        spin()
        yield
        spin()

    return around


def run(executor: CudaExecutor, batch: Any, tokens: torch.Tensor) -> list[torch.Tensor]:
    """One iteration from given last tokens: the last layer's outputs, what was sampled, and all of the KV cache but
    the reserved page."""
    executor.sampler.last_tokens.copy_(tokens)
    _wait()
    executor.launch(batch)
    sampled = executor.collect()
    rows = torch.from_numpy(batch.sampling.rows).to(tokens.device)
    return [
        executor.bound.buffers[RESIDUAL][rows].clone(),
        torch.from_numpy(sampled.tokens.copy()),
        *(kv[1:].clone() for kv in executor.bound.kv),
    ]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_random_mixes_under_random_delays(folder: Path, name: str, dtype: str) -> None:
    """Fifty mixes each of ten kinds: with lanes side by side and delayed as without lanes, bit by bit, and as the
    sequential plan within rounding."""
    rng = random.Random(f"{name} {dtype}")
    executor = make_executor(folder, [plan_of(name)], dtype, graphs=False, around_step=delays(rng))
    tokens = torch.randint(2, 200, (CAPACITY,), device=executor.bound.device, dtype=executor.sampler.last_tokens.dtype)
    errors = []
    for _ in range(50):
        mix = random_mix(rng)
        assert mix_pages(mix, PAGE_SIZE) < 4000
        lanes, sequential = (mix_batch(mix, executor.cut, PAGE_SIZE, 200, number) for number in (0, 1))
        side_by_side = run(executor, lanes, tokens)
        streams, executor.lanes._streams = executor.lanes._streams, {}
        one_by_one = run(executor, lanes, tokens)
        executor.lanes._streams = streams
        assert equal(side_by_side, one_by_one), mix
        executor.sampler.last_tokens.copy_(tokens)
        errors.append(output_error(executor, sequential, lanes))
    executor.close()
    print(f"{name} {dtype}: largest error {max(errors):.2e}")
    assert max(errors) < {"float32": 1e-4, "bfloat16": 6e-2}[dtype]


@pytest.mark.parametrize("name", PLANS)
def test_replayed_lanes_equal_launched_ones(folder: Path, name: str) -> None:
    """The spinning kernels are captured too: other places in every graph."""
    rng = random.Random(name)
    launched = make_executor(folder, [plan_of(name)], graphs=False)
    tokens = torch.randint(2, 200, (CAPACITY,), device=launched.bound.device, dtype=launched.sampler.last_tokens.dtype)
    kept = [kv.clone() for kv in launched.bound.kv]
    for _ in range(3):
        replayed = make_executor(folder, [plan_of(name)], around_step=delays(rng))
        assert len(replayed._layers) == 4
        replays = 0
        for _ in range(10):
            mix = random_mix(rng)
            batch = mix_batch(mix, launched.cut, PAGE_SIZE, 200)
            found = []
            for executor in (launched, replayed):
                for kv, start in zip(executor.bound.kv, kept, strict=True):
                    kv.copy_(start)
                found.append(run(executor, batch, tokens))
            assert equal(*found), mix
            captured = replayed._layers.get((0, tuple(n.end - n.start for n in batch.nano_batches)))
            replays += captured is not None and captured.serves(batch)
        assert replays > 2
        replayed.close()
    launched.close()


@triton.jit
def note(out, turns):
    program = tl.program_id(0)
    x = program.to(tl.float32)
    for _ in range(turns):  # long enough that one SM cannot run them all
        x = tl.exp2(x * 1e-3)
    tl.store(out + program, smid() + (x < -1).to(tl.int32))


def test_parts_have_their_own_sms_and_no_others() -> None:
    device = torch.device("cuda", 0)
    total = torch.cuda.get_device_properties(device).multi_processor_count
    for sizes in (
        [total - 40, 40],
        [total - 32, 32],
        [40, total - 40],
        [total - 56, 32, 24],
        [64, 40],
        [total - 16, 16],
    ):
        partition = Partition(sizes, device)
        assert partition.sms == tuple(sizes)
        seen = []
        for stream in partition.streams:
            out = torch.full((total * 64,), -1, dtype=torch.int32, device=device)
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                note[(len(out),)](out, 2000)
            torch.cuda.synchronize()
            seen.append(set(out.tolist()))
        print(sizes, [len(sms) for sms in seen])
        assert [len(sms) for sms in seen] == sizes
        assert len(set().union(*seen)) == sum(sizes), "parts share SMs"
        partition.close()
        assert partition.streams == ()


def test_a_device_that_cannot_be_split_so_says_how_it_can() -> None:
    with pytest.raises(PartitionError, match="groups of 8"):
        Partition([90, 42], torch.device("cuda", 0))


@pytest.mark.parametrize("name", PLANS)
def test_every_node_of_a_graph_is_where_the_plan_says(folder: Path, name: str) -> None:
    """The graph that is being captured is looked at after each step: its new kernels belong to the lane's part."""
    from cuda.bindings import driver

    def call(answer: Any) -> Any:
        assert answer[0] == driver.CUresult.CUDA_SUCCESS, answer[0]
        return answer[1:]

    def nodes() -> dict[int, Any]:
        stream = driver.CUstream(torch.cuda.current_stream().cuda_stream)
        graph = call(driver.cuStreamGetCaptureInfo(stream))[2]
        count = call(driver.cuGraphGetNodes(graph, 0))[-1]
        found = call(driver.cuGraphGetNodes(graph, int(count)))[0]
        return {int(node): node for node in found}

    seen: list[tuple[int, set[int]]] = []
    executor: Any = None

    @contextmanager
    def around(step: int) -> Iterator[None]:
        capturing = torch.cuda.is_current_stream_capturing()
        before = set(nodes()) if capturing else set()
        yield
        if capturing:
            contexts = set()
            for key, node in nodes().items():
                if (
                    key in before
                    or call(driver.cuGraphNodeGetType(node))[0] != driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL
                ):
                    continue
                contexts.add(int(call(driver.cuGraphKernelNodeGetParams(node))[0].ctx))
            seen.append((step, contexts))

    plan = plan_of(name)
    executor = make_executor(folder, [plan], around_step=around, row_buckets=[CAPACITY])
    program = executor.programs[0]
    primary = int(call(driver.cuCtxGetCurrent())[0])
    checked = 0
    for step, contexts in seen[-len(program.steps) :]:  # after the sequential plan's graph
        parts, part = plan.place(program.steps[step].stage, program.steps[step].lane)
        expected = int(executor.lanes.partitions[parts].contexts[part]) if parts else primary
        if contexts:  # a step has no kernel if it only copies, or if the batch has no rows of its class
            assert contexts <= ({expected, 0} if expected == primary else {expected}), program.name(step)
            checked += 1
    assert checked > 0.8 * len(program.steps)
    executor.close()
