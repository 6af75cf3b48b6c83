"""The search space: every choice makes a plan that can run, and the plans that people wrote by hand are in it."""

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import optuna
import pytest
from hypothesis import given, settings, strategies as st

from benchmarks.lanes import candidates
from nanoflow.ops.graph import Graph
from nanoflow.ops.sharding import shard_graph
from nanoflow.pipeline.checker import check_program
from nanoflow.pipeline.plan import WHOLE, Entry, FrozenMapping, NanoBatch, Plan, Stage
from nanoflow.pipeline.program import compile_program
from nanoflow.pipeline.validate import validate
from nanoflow.plans.case import H100, open_graph
from nanoflow.search.list_schedule import ATTENTION, COMPANIONS, PRODUCTS, chains_of
from nanoflow.search.mix import Mix, mix_works
from nanoflow.search.simulate import Simulation, simulate
from nanoflow.search.space import PlanChoice, build_plan, collective_forms, suggest
from tests.unit.plan_graphs import llama_graph
from tests.unit.plan_strategies import full_batch

LLAMA = replace(open_graph("llama-3-8b", Plan(1, (), ()), "test")[2], layers=4)
QWEN = replace(open_graph("qwen2-7b", Plan(1, (), ()), "test")[2], layers=2)
BARE = llama_graph(3, scratch=True)
RANK = shard_graph(LLAMA, 0, 2)
BARE_RANK = shard_graph(open_graph("qwen2-7b", Plan(1, (), ()), "test")[2], 1, 4)
BARE_RANK = replace(BARE_RANK, layers=3)
MIX = Mix(551, 768, (512, 89))
HALF = Fraction(1, 2)
SKEW = {
    "compute": "o.a gate_up.a down.a qkv.a@1 o.b gate_up.b down.b qkv.b@1",
    "memory": "decode_attention.b decode_attention.a@1",
}


def stage(partition: str, **lanes: str) -> Stage:
    return Stage(
        partition, FrozenMapping({lane: tuple(map(Entry.parse, text.split())) for lane, text in lanes.items()})
    )


FAMILIES = {
    "skew": (
        PlanChoice((8, 8), (8, 8), beside=(True, True), skew=4, memory_sms=40),
        (NanoBatch("a", HALF, HALF, 640), NanoBatch("b", HALF, HALF, 512)),
        [stage("split", **SKEW)],
    ),
    "skew with all attention": (
        PlanChoice(
            (8, 8),
            (8, 8),
            beside=(True, True),
            skew=4,
            memory_sms=40,
            with_attention=frozenset({"rope_append", "prefill_attention"}),
        ),
        (NanoBatch("a", HALF, HALF, 640), NanoBatch("b", HALF, HALF, 512)),
        [
            stage(
                "split",
                compute=SKEW["compute"],
                memory="rope_append.a@1 decode_attention.a@1 prefill_attention.a@1 "
                "rope_append.b@1 decode_attention.b@1 prefill_attention.b@1",
            )
        ],
    ),
    "streams": (
        PlanChoice((8, 8), (8, 8), 64, beside=(True, True), skew=4),
        (NanoBatch("a", HALF, HALF, 576), NanoBatch("b", HALF, HALF, 576)),
        [stage(WHOLE, **SKEW)],
    ),
    "half": (
        PlanChoice(
            (8, 8), (8, 8), whole=frozenset({"qkv"}), beside=(False, True), skew=3, stages="several", memory_sms=40
        ),
        (NanoBatch("a", HALF, HALF, 640), NanoBatch("b", HALF, HALF, 512)),
        [
            stage(WHOLE, compute="qkv decode_attention.a"),
            stage("split", compute="o.a gate_up.a down.a", memory="decode_attention.b"),
            stage(WHOLE, compute="o.b gate_up.b down.b"),
        ],
    ),
    "phase": (
        PlanChoice((0, 16), (16, 0), 64, beside=(False, True), skew=4, stages="several", memory_sms=40),
        (NanoBatch("a", Fraction(0), Fraction(1), 576), NanoBatch("b", Fraction(1), Fraction(0), 576)),
        [
            stage("split", compute="o.a gate_up.a down.a qkv.a@1", memory="decode_attention.b"),
            stage(WHOLE, compute="o.b gate_up.b down.b qkv.b@1 decode_attention.a@1"),
        ],
    ),
}


def by_hand(name: str) -> Plan:
    _, nano_batches, period = FAMILIES[name]
    confined = any(each.partition != WHOLE for each in period)
    partitions = FrozenMapping({"split": (92, 40)} if confined else {})
    return Plan(1152, nano_batches, tuple(period), partitions=partitions, sms=132 if confined else None)


def lanes(plan: Plan, graph: Graph) -> dict[str, list[tuple[object, int | None]]]:
    """All nano-ops of every lane in their order, with the SMs that they run on."""
    program = compile_program(plan, graph)
    return {
        lane: [(program.steps[step].nano_op, plan.lane_sms(program.steps[step].stage, lane)) for step in steps]
        for lane, steps in program.lanes.items()
    }


def simulated(plan: Plan, mix: Mix = MIX) -> Simulation:
    return simulate(compile_program(plan, LLAMA), mix_works(plan, mix), H100.rates)


@st.composite
def shares(draw: st.DrawFn, count: int) -> list[int]:
    cuts = sorted(draw(st.lists(st.integers(0, 16), min_size=count - 1, max_size=count - 1)))
    return [last - first for first, last in pairwise((0, *cuts, 16))]


@st.composite
def choices(draw: st.DrawFn) -> PlanChoice:
    count = draw(st.integers(1, 4))
    decode, prefill = draw(shares(count)), draw(shares(count))
    kept = [n for n in range(count) if decode[n] or prefill[n]]
    beside = tuple(draw(st.booleans()) for _ in kept)
    stages = draw(st.sampled_from(("one", "several")))
    companions = all(beside) and stages == "one"
    memory_sms = draw(st.none() | st.integers(2, 24).map(lambda n: 4 * n))
    network = stages == "one" and len(kept) > 1 and draw(st.booleans())
    confined = memory_sms is not None if any(beside) else draw(st.booleans())
    return PlanChoice(
        decode=tuple(decode[n] for n in kept),
        prefill=tuple(prefill[n] for n in kept),
        row_unit=draw(st.sampled_from((128, 64))),
        whole=frozenset(draw(st.sets(st.sampled_from(PRODUCTS)))),
        beside=beside,
        with_attention=frozenset(draw(st.sets(st.sampled_from(COMPANIONS))) if companions else ()),
        skew=draw(st.integers(0, 5)),
        stages=stages,
        memory_sms=memory_sms,
        network=network,
        network_sms=8 * draw(st.integers(1, 4)) if network and confined else None,
        kernels=FrozenMapping({"o": "reference"} if draw(st.booleans()) else {}),
    )


def check(choice: PlanChoice, graph: Graph, mix: Mix, rows: int) -> Plan:
    plan = build_plan(choice, graph, mix, rows, H100.rates)
    validate(plan, graph, sms=132)
    assert not check_program(compile_program(plan, graph), full_batch(len(plan.nano_batches)), 2)
    assert plan == build_plan(choice, graph, mix, rows, H100.rates) == Plan.loads(plan.dumps(), graph)
    assert plan.capacity == plan.rows == rows and min(nano_batch.rows for nano_batch in plan.nano_batches) > 0
    if len(choice.decode) > 1:
        # Nothing is lost on the way: who is left whole, and how attention is spread, is what was chosen.
        entries = [entry for each in plan.period for lane in each.lanes.values() for entry in lane]
        whole = {entry.op for entry in entries if entry.nano_batch is None}
        assert whole & set(PRODUCTS) == choice.whole
        in_memory = sum(len(each.lanes.get("memory", ())) for each in plan.period) // (1 + len(choice.with_attention))
        assert in_memory == sum(choice.beside) or (choice.stages == "several" and in_memory < sum(choice.beside))
        sums = [entry for each in plan.period for entry in each.lanes.get("network", ())]
        there = {"o_all_reduce", "down_all_reduce"}
        if choice.sharding == "reduce_scatter":
            there = {name for chain in chains_of(plan.graph(graph)).values() for name, _ in chain}
        assert {entry.op for entry in sums} == (there if choice.network else set())
        assert {plan.lane_sms(0, "network") for _ in sums} <= {choice.network_sms}
        split = [each for each in plan.period if "memory" in each.lanes]
        assert {plan.lane_sms(plan.period.index(each), "memory") for each in split} <= {choice.memory_sms}
        ends = [nano_batch.prefill > 0 for nano_batch in plan.nano_batches]
        assert ends == sorted(ends, reverse=True), "nano-batches without prompts come last"
    return plan


@settings(max_examples=300, deadline=None)
@given(choices(), st.integers(0, 700), st.integers(0, 700), st.integers(0, 300), st.integers(0, 2), st.booleans())
def test_every_choice_makes_a_plan_that_can_run(
    choice: PlanChoice, decode: int, prompt: int, room: int, graph: int, rows: bool
) -> None:
    mix = Mix(decode, 500, (prompt,) if prompt else ())
    chosen = (RANK, BARE_RANK, RANK) if choice.network else (BARE, LLAMA, QWEN)
    if rows:
        choice, chosen = replace(choice, sharding="reduce_scatter"), (RANK, BARE_RANK, RANK)
    check(choice, chosen[graph], mix, mix.rows + room + len(choice.decode))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([4, 100, 640, 2048]),
    st.sampled_from([4, 16, 20, 132]),
    st.sampled_from([LLAMA, RANK]),
)
def test_every_suggestion_is_a_choice(seed: int, rows: int, sms: int, graph: Graph) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed))
    rates = replace(H100.rates, device_sms=sms)
    for _ in range(3):
        choice = suggest(study.ask(), graph, rows, sms, ("triton", "deep_gemm", "nothing", "nccl_8", "push"))
        known = {"triton", "deep_gemm", "nccl_8", "push"} if graph is RANK else {"triton", "deep_gemm"}
        assert set(choice.kernels.values()) <= known and (graph is RANK) == (choice.sharding is not None)
        assert graph is RANK or not choice.network
        plan = build_plan(choice, graph, Mix(rows // 2, 100, (rows // 3,) if rows // 3 else ()), rows, rates)
        validate(plan, graph, sms=sms)


def test_sums_of_one_nano_batch_run_beside_products_of_the_other() -> None:
    """What reads them stays with the products, and the products that wait for them come as late as they can."""
    choice = PlanChoice((8, 8), (8, 8), skew=1, network=True, network_sms=8)
    plan = check(choice, RANK, MIX, 1152)
    (built,) = plan.period
    assert plan.partitions == {"split": (124, 8)} and list(built.lanes) == ["compute", "network"]
    order = [str(entry) for entry in built.lanes["compute"]]
    assert order.index("o.b") < order.index("add_norm.a") == order.index("gate_up.a") - 1
    assert order.index("add.a") == order.index("qkv.a@1") - 1
    assert [str(entry) for entry in built.lanes["network"]] == [
        f"{product}_all_reduce.{name}"
        for product, name in (entry.split(".") for entry in order)
        if product in ("o", "down")
    ]
    follows = check(replace(choice, network=False, network_sms=None), RANK, MIX, 1152)
    assert follows.lanes == ("compute",) and follows.sms is None
    three = replace(choice, beside=(True, True), memory_sms=32)
    assert check(three, RANK, MIX, 1152).partitions == {"split": (92, 32, 8)}


def test_what_works_on_a_ranks_rows_runs_with_the_collectives() -> None:
    choice = PlanChoice((8, 8), (8, 8), skew=1, network=True, network_sms=8, sharding="reduce_scatter")
    (built,) = check(choice, RANK, MIX, 1152).period
    network = [str(entry) for entry in built.lanes["network"]]
    for chain in (
        ["o_reduce_scatter.a", "add_norm.a", "add_norm_all_gather.a"],
        ["down_reduce_scatter.b", "add.b", "input_layernorm.b@1", "input_layernorm_all_gather.b@1"],
    ):
        assert network[network.index(chain[0]) :][: len(chain)] == chain
    assert not {"add_norm.a", "add.a", "input_layernorm.a@1"} & {str(entry) for entry in built.lanes["compute"]}
    sequential = build_plan(replace(PlanChoice(), sharding="reduce_scatter"), RANK, MIX, 1152, H100.rates)
    assert sequential == Plan.sequential(RANK, 1152, sharding="reduce_scatter") and len(sequential.lanes) == 1
    assert not sequential.is_sequential(RANK) and Plan.sequential(RANK, 64).is_sequential(RANK)


def test_nano_batches_may_have_forms_of_their_own() -> None:
    """By number in a choice: those without prompts come last in the plan."""
    choice = PlanChoice((12, 4), (0, 16), kernels=FrozenMapping({"o_all_reduce": "nccl_8", "o_all_reduce.1": "nccl_2"}))
    plan = check(choice, RANK, MIX, 1152)
    assert [nano_batch.prefill for nano_batch in plan.nano_batches] == [1, 0]
    assert plan.kernels == {"o_all_reduce": "nccl_8", "o_all_reduce.a": "nccl_2"}
    found = set()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(1))
    for _ in range(60):
        study.enqueue_trial({"nano_batches": 2, "forms_apart": True, "any_whole": False, "sharding": "all_reduce"})
        chosen = suggest(study.ask(), RANK, 1152, 132, ("nccl_8", "two_shot"))
        found |= {(key, kernel) for key, kernel in chosen.kernels.items() if "." in key}
        validate(build_plan(chosen, RANK, MIX, 1152, H100.rates), RANK, sms=132)
    assert found == {
        (f"{op}.{n}", kernel)
        for op in ("o_all_reduce", "down_all_reduce")
        for n in range(2)
        for kernel in ("nccl_8", "two_shot")
    }


def test_forms_of_collectives_are_for_ranks() -> None:
    assert {"nccl_8", "two_shot", "push"} <= set(collective_forms(RANK))
    assert "nccl_8" in collective_forms(RANK) and not {"nccl", "reference"} & set(collective_forms(RANK))
    assert collective_forms(LLAMA) == ()


def test_the_sequential_plan_is_a_choice() -> None:
    for graph in (LLAMA, replace(RANK, peers=True)):
        assert build_plan(PlanChoice(), graph, MIX, 1152, H100.rates) == Plan.sequential(graph, 1152)
    study = optuna.create_study()
    study.enqueue_trial({"nano_batches": 1})
    assert suggest(study.ask(), LLAMA, 1152, 132) == PlanChoice()
    kernels = {f"kernel_{op}": "triton" if op == "o" else "" for op in (*PRODUCTS, ATTENTION)}
    study.enqueue_trial({"nano_batches": 1, **kernels})
    choice = suggest(study.ask(), LLAMA, 1152, 132, ("triton",))
    assert choice == PlanChoice(kernels=FrozenMapping({"o": "triton"}))
    assert build_plan(choice, LLAMA, MIX, 1152, H100.rates).kernels == {"o": "triton"}


@pytest.mark.parametrize("name", FAMILIES)
def test_plans_by_hand_are_in_the_space(name: str) -> None:
    wanted = by_hand(name)
    built = build_plan(FAMILIES[name][0], LLAMA, MIX, 1152, H100.rates)
    assert built.nano_batches == wanted.nano_batches
    assert (built.partitions, built.sms) == (wanted.partitions, wanted.sms)
    assert lanes(built, LLAMA) == lanes(wanted, LLAMA)
    assert simulated(built).seconds == pytest.approx(simulated(wanted).seconds)


def test_a_nano_batch_is_as_far_behind_as_the_skew_says() -> None:
    for skew in range(5):
        choice = PlanChoice((8, 8), (8, 8), beside=(True, True), skew=skew, memory_sms=40)
        (built,) = build_plan(choice, LLAMA, MIX, 1152, H100.rates).period
        order = [str(entry) for entry in built.lanes["compute"]]
        assert order.index("o.b") >= skew
        assert order.index("qkv.b@1") > order.index("qkv.a@1"), "keys are appended in the nano-batches' order"


def test_the_longest_path_goes_first() -> None:
    """With `b`'s attention done, its four products are a longer path than `a`'s last one; until then `a` goes on."""
    short = PlanChoice((15, 1), (8, 8), beside=(False, True), memory_sms=40)
    (built,) = build_plan(short, LLAMA, Mix(320, 100, (320,)), 640, H100.rates).period
    order = [str(entry) for entry in built.lanes["compute"]]
    assert order[0] == "o.a" and order.index("o.b") < order.index("qkv.a@1")
    long = replace(short, decode=(1, 15))
    (built,) = build_plan(long, LLAMA, Mix(320, 9000, (320,)), 640, H100.rates).period
    order = [str(entry) for entry in built.lanes["compute"]]
    assert order.index("o.b") > order.index("qkv.a@1")


def test_each_attention_of_several_stages_has_a_stretch_for_itself() -> None:
    choice = PlanChoice((6, 5, 5), (6, 5, 5), beside=(True,) * 3, skew=4, stages="several", memory_sms=32)
    plan = check(choice, LLAMA, MIX, 1152)
    assert [(each.partition, [str(entry) for entry in each.lanes["memory"]]) for each in plan.period] == [
        ("split", ["decode_attention.b"]),
        ("split", ["decode_attention.c"]),
        ("split", ["decode_attention.a@1"]),
    ]
    # With `qkv` and `o` whole nothing lies between the queries and what reads the output, so nothing can run beside.
    barred = check(replace(choice, whole=frozenset({"qkv", "o"})), LLAMA, MIX, 1152)
    assert [each.partition for each in barred.period] == [WHOLE] and barred.sms is None


@pytest.mark.parametrize(
    ("shares", "memory"),
    [
        ((10, 3, 3), [["decode_attention.b"], []]),
        ((3, 3, 10), [[], ["decode_attention.b@1"], []]),  # and then that of `a`, alone
        ((6, 4, 6), [["decode_attention.b"], []]),  # of equals, the one just before it is needed
    ],
)
def test_an_attention_has_the_longest_stretch(shares: tuple[int, ...], memory: list[list[str]]) -> None:
    """`b`'s may run beside the products of `c`, which come before it, or of `a`, in the repetition after."""
    choice = PlanChoice(shares, shares, 64, beside=(False, True, False), skew=4, stages="several", memory_sms=32)
    plan = check(choice, LLAMA, Mix(1024, 768), 1024)
    there = [[str(entry) for entry in each.lanes.get("memory", ())] for each in plan.period]
    assert there == memory


@pytest.mark.parametrize(
    ("choice", "mix", "rows", "expected"),
    [
        (PlanChoice((8, 8), (8, 8)), MIX, 1152, [640, 512]),
        (PlanChoice((8, 8), (8, 8), 64), MIX, 1152, [576, 576]),
        (PlanChoice((8, 8), (8, 8)), Mix(100, 9, (50,)), 192, [128, 64]),
        (PlanChoice((12, 4), (12, 4)), MIX, 1152, [896, 256]),
        # Decode rows alone are held whole: 341 by 384 rows. So the prompts' nano-batch holds none of them.
        (PlanChoice((0, 16), (16, 0), 64), Mix(341, 1280, (683,)), 1024, [640, 384]),
        (PlanChoice((16, 0), (0, 16), 64), Mix(341, 1280, (683,)), 1024, [640, 384]),
        (PlanChoice((0, 16), (16, 0), 64), Mix(421, 1024, (219,)), 640, [192, 448]),
        (PlanChoice((4, 4, 4, 4), (16, 0, 0, 0)), Mix(4, 9), 4, [1, 1, 1, 1]),
        (PlanChoice((8, 8), (8, 8)), Mix(100, 9), 1155, [640, 515]),
    ],
)
def test_rows_of_nano_batches(choice: PlanChoice, mix: Mix, rows: int, expected: list[int]) -> None:
    plan = build_plan(choice, LLAMA, mix, rows, H100.rates)
    assert [nano_batch.rows for nano_batch in plan.nano_batches] == expected


TWO: dict[str, object] = {"decode": (8, 8), "prefill": (8, 8)}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"decode": ()}, r"decode: \(\) is of 0 nano-batches; give 1 to 4"),
        ({"decode": (4, 4, 4, 2, 2)}, "of 5 nano-batches"),
        ({"decode": (8, 8)}, r"prefill: \(16,\) is not of 2 nano-batches"),
        ({"beside": (True, False)}, "beside: .* is not of 1 nano-batches"),
        ({"decode": (15,)}, "decode: .* add up to 16"),
        ({"decode": (16, 0), "prefill": (16, 0), "beside": (True, True)}, "has no share of"),
        ({"row_unit": 96}, "row_unit: 96 is not 128 or 64"),
        ({"whole": frozenset({"norm"})}, "whole: 'norm' is none of qkv, o, gate_up, down"),
        ({"with_attention": frozenset({"o"})}, "with_attention: 'o' is none of rope_append, prefill_attention"),
        ({"with_attention": frozenset({"rope_append"})}, "with_attention: is for one stage with all decode attention"),
        ({"skew": -1}, "skew: -1 must be 0 or more"),
        ({"stages": "two"}, "stages: 'two' is neither"),
        ({"memory_sms": 18}, "memory_sms: 18 is no multiple of 4 from 8 on"),
        ({"memory_sms": 0}, "memory_sms: 0 is no multiple of 4 from 8 on"),
        ({"network": True}, "network: is for one stage of several nano-batches"),
        ({**TWO, "network": True, "stages": "several"}, "network: is for one stage of several nano-batches"),
        ({**TWO, "network_sms": 8}, "network_sms: 8 SMs are for a lane that network: True makes"),
        ({**TWO, "network": True, "network_sms": 12}, "network_sms: 12 is no multiple of 8 from 8 on"),
        ({**TWO, "network": True, "memory_sms": 8, "beside": (True, True)}, "network_sms: the memory lane has SMs"),
        ({**TWO, "network": True, "network_sms": 8, "beside": (True, True)}, "memory_sms: the network lane has SMs"),
    ],
)
def test_what_is_no_choice_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlanChoice(**wrong)  # type: ignore[arg-type]


def test_what_cannot_be_built_is_refused() -> None:
    two = PlanChoice((8, 8), (8, 8), beside=(True, True), memory_sms=136)
    with pytest.raises(ValueError, match="memory_sms: 136 of 132 SMs leave none for the products"):
        build_plan(two, LLAMA, MIX, 1152, H100.rates)
    three = replace(two, memory_sms=64, network=True, network_sms=72)
    with pytest.raises(ValueError, match="memory_sms, network_sms: 136 of 132 SMs leave none for the products"):
        build_plan(three, RANK, MIX, 1152, H100.rates)
    with pytest.raises(ValueError, match="network: there are no collectives on one rank"):
        build_plan(PlanChoice((8, 8), (8, 8), network=True), LLAMA, MIX, 1152, H100.rates)
    with pytest.raises(ValueError, match="rows: the mix has 1,152, more than 1,000"):
        build_plan(two, LLAMA, MIX, 1000, H100.rates)
    with pytest.raises(ValueError, match="rows: 1 cannot be cut into 2 nano-batches"):
        build_plan(two, LLAMA, Mix(1, 1), 1, H100.rates)
    with pytest.raises(ValueError, match="plans with several nano-batches need decode_attention"):
        build_plan(replace(two, memory_sms=8), replace(LLAMA, layer=LLAMA.layer[4:]), MIX, 1152, H100.rates)


@pytest.mark.parametrize(("goal", "within"), [("limited_seconds", 1.01), ("seconds", 1.001)])
def test_a_search_finds_what_people_found(goal: str, within: float) -> None:
    """On the simulator, and without the sequential plan. Under the power limit many plans are nearly as good. The best
    overlap without it is in few of the choices, and so short a search needs some luck; hence the seed."""
    wanted = min(getattr(simulated(plan), goal) for plan in candidates(LLAMA, MIX, 1152, 132, ("measured",)).values())
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=6))
    found = []
    for _ in range(250):
        trial = study.ask()
        choice = suggest(trial, LLAMA, 1152, 132)
        if len(choice.decode) == 1:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            continue
        found.append(float(getattr(simulated(build_plan(choice, LLAMA, MIX, 1152, H100.rates)), goal)))
        study.tell(trial, found[-1])
    assert min(found) <= wanted * within
