"""Plans: their text form, what is refused and how the message helps."""

import dataclasses
import pickle
from fractions import Fraction

import pytest
from hypothesis import given, settings, strategies as st

from nanoflow.pipeline.plan import FINGERPRINT_KEYS, Entry, FrozenMapping, NanoBatch, Plan, PlanError
from nanoflow.pipeline.plan_mix import PlanMix
from nanoflow.pipeline.validate import validate
from tests.unit.plan_graphs import FakeOperation, llama_graph, read, write
from tests.unit.plan_strategies import plans

GRAPH = llama_graph(2)

TEXT = """\
model: llama-3-8b
gpu: NVIDIA H100 80GB HBM3
sms: 132
mix: {decode: 600, prefill: 680, context: 768}
capacity: 1280
nano_batches:
  a: {decode: 0.5, prefill: 1/3, rows: 640}
  b: {decode: 0.5, prefill: 2/3, rows: 640}
partitions:
  whole: [132]
  split: [92, 40]
period:
- split:
    compute: [o.a, gate_up.a, down.a, qkv.a@1, o.b, gate_up.b, down.b, qkv.b@1]
    memory: [decode_attention.b, decode_attention.a@1]
kernels: {o: reference}
measured: {iteration_ms: 44.1, sequential_ms: 45.4, joules_per_token: 0.025}
fingerprint: {shape: 32 layers, dtype: bfloat16, page_size: 128, cuda: '13.0'}
"""


def changed(old: str, new: str) -> str:
    assert old in TEXT
    return TEXT.replace(old, new)


def message(text: str) -> str:
    with pytest.raises(PlanError) as caught:
        Plan.loads(text, GRAPH, source="tuned.yaml")
    assert str(caught.value).startswith("tuned.yaml: ")
    return str(caught.value)


# Text form


def test_the_text_form_reads_back_and_writes_out_the_same():
    plan = Plan.loads(TEXT, GRAPH)
    assert plan.dumps() == TEXT
    assert plan.nano_batches[0] == NanoBatch("a", Fraction(1, 2), Fraction(1, 3), 640)
    assert plan.period[0].lanes["memory"][1] == Entry("decode_attention", "a", 1)
    assert plan.lane_sms(0, "memory") == 40
    assert plan.measured["iteration_ms"] == 44.1
    assert plan.mix == PlanMix(600, 680, 768)
    assert plan.fingerprint["page_size"] == 128 and plan.fingerprint["cuda"] == "13.0"


def test_sequential_reads_back_equal():
    plan = Plan.sequential(GRAPH, 256, model="m", gpu="g")
    validate(plan, GRAPH)
    again = Plan.loads(plan.dumps(), GRAPH)
    assert again == plan
    assert hash(again) == hash(plan)
    assert plan.lane_sms(0, "main") is None


def test_a_nano_batch_may_have_another_kernel():
    plan = Plan.loads(changed("kernels: {o: reference}", "kernels: {o: triton, o.b: reference, qkv.a: triton}"))
    assert [plan.kernel("o", n) for n in (0, 1, None)] == ["triton", "reference", "triton"]
    assert [plan.kernel("qkv", n) for n in (0, 1, None)] == ["triton", "", ""]
    assert Plan.loads(plan.dumps()) == plan


words = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)
finite = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=60, deadline=None)
@given(
    plans(GRAPH),
    words,
    words,
    st.dictionaries(words, st.one_of(finite, words, st.integers()), max_size=4),
    st.dictionaries(st.sampled_from([op.name for op in GRAPH.layer]), words, max_size=3),
    st.fractions(0, 1),
    st.none() | st.builds(PlanMix, st.integers(), st.integers(), st.integers()),
    st.dictionaries(st.sampled_from(FINGERPRINT_KEYS), st.one_of(words, st.integers()), max_size=4),
)
def test_any_plan_reads_back_equal(plan, model, gpu, measured, kernels, share, mix, fingerprint):
    first = dataclasses.replace(plan.nano_batches[0], decode=share)
    plan = dataclasses.replace(
        plan,
        nano_batches=(first, *plan.nano_batches[1:]),
        model=model,
        gpu=gpu,
        measured=FrozenMapping(measured),
        kernels=FrozenMapping(kernels),
        mix=mix,
        fingerprint=FrozenMapping(fingerprint),
        sms=132,
        partitions=FrozenMapping({"split": (100, 32), "on": (8,)}),
    )
    again = Plan.loads(plan.dumps())
    assert again == plan
    assert hash(again) == hash(plan)
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_names_that_yaml_would_read_as_something_else():
    plan = Plan.loads(TEXT.replace(" b:", " 'no':").replace(".b", ".no"), GRAPH)
    assert plan.nano_batches[1].name == "no"
    assert Plan.loads(plan.dumps(), GRAPH) == plan
    assert "key False is read as bool; put it in quotes" in message(TEXT.replace(" b:", " no:").replace(".b", ".no"))
    assert "sharding: expected a name; give one, or leave the key out" in message("sharding:\n" + TEXT)


def test_anchors_and_merges_are_yaml_as_usual():
    text = changed("a: {decode: 0.5, prefill: 1/3", "a: &half {decode: 0.5, prefill: 0.5")
    text = text.replace("b: {decode: 0.5, prefill: 2/3", "b: {<<: *half")
    assert Plan.loads(text, GRAPH).nano_batches[1] == NanoBatch("b", Fraction(1, 2), Fraction(1, 2), 640)


def test_plans_are_frozen():
    plan = Plan.loads(TEXT)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.capacity = 3
    with pytest.raises(TypeError):
        plan.kernels["o"] = "other"
    with pytest.raises(AttributeError):
        plan.kernels._items = {}


def test_the_order_of_lanes_counts_and_that_of_kernels_does_not():
    text = changed("{o: reference}", "{o: reference, qkv: reference}")
    assert Plan.loads(text) == Plan.loads(changed("{o: reference}", "{qkv: reference, o: reference}"))
    lines = TEXT.splitlines(keepends=True)
    index = next(i for i, line in enumerate(lines) if "compute:" in line)
    lines[index], lines[index + 1] = lines[index + 1], lines[index]
    assert Plan.loads("".join(lines)) != Plan.loads(TEXT)


def test_decimals_are_meant_exactly():
    text = changed("a: {decode: 0.5", "a: {decode: 0.1").replace("b: {decode: 0.5", "b: {decode: 0.9")
    plan = Plan.loads(text, GRAPH)
    assert plan.nano_batches[0].decode == Fraction(1, 10)
    assert plan.dumps() == text


@pytest.mark.parametrize(
    ("text", "entry"),
    [
        ("qkv", Entry("qkv")),
        ("qkv.a", Entry("qkv", "a")),
        ("qkv@1", Entry("qkv", None, 1)),
        ("o.b@2", Entry("o", "b", 2)),
    ],
)
def test_entries_print_and_parse(text, entry):
    assert Entry.parse(text) == entry
    assert str(entry) == text


# Files


def test_load_names_the_file(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(TEXT)
    assert Plan.load(path, GRAPH) == Plan.loads(TEXT)
    path.write_text(changed("capacity: 1280", "capacity: many"))
    with pytest.raises(PlanError, match=r"plan\.yaml: capacity: expected a whole number, not 'many'"):
        Plan.load(path, GRAPH)
    with pytest.raises(PlanError, match=r"absent\.yaml: cannot read the plan: No such file"):
        Plan.load(tmp_path / "absent.yaml")
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(PlanError, match="not UTF-8"):
        Plan.load(path)


# Form


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("capacity: 1280", "capcity: 1280", "capcity: unknown key; did you mean 'capacity'?"),
        ("capacity: 1280\n", "", "capacity: missing"),
        ("capacity: 1280", "capacity: 1280\ncapacity: 640", "line 6, column 1: the key capacity is given twice"),
        ("capacity: 1280", "capacity: true", "capacity: expected a whole number, not True"),
        ("sms: 132", "sms: [132", "line 4, column"),
        ("a: {decode: 0.5", "a: {decode: half", "nano_batches.a.decode: 'half' is no share"),
        ("a: {decode: 0.5", "a: {decode: .inf", "nano_batches.a.decode: inf is no share"),
        ("a: {decode: 0.5", "a: {decode: 1/0", "nano_batches.a.decode: '1/0' is no share"),
        ("a: {decode: 0.5", "a: {decode: '1e99999999'", "nano_batches.a.decode: '1e99999999' is no share"),
        ("qkv.a@1", "qkv.a@" + "9" * 5000, "looks 99999999999999999999 layers ahead"),
        ("rows: 640}\n  b", "row: 640}\n  b", "nano_batches.a.row: unknown key; did you mean 'rows'?"),
        (", rows: 640}\n  b", "}\n  b", "nano_batches.a.rows: missing"),
        ("  a: {", "  a.b: {", "nano_batches.a.b: 'a.b' cannot name a nano-batch"),
        ("[132]", "132", "partitions.whole: expected a list, not 132"),
        ("[92, 40]", "[92, x]", "partitions.split[1]: expected a whole number, not 'x'"),
        ("- split:", "- split: {}\n  other:", "period[0]: a stage has one key, its partition's name, not split, other"),
        ("qkv.a@1", "qkv.a@-1", "period[0].split.compute[3]: 'qkv.a@-1' looks -1 layers ahead"),
        ("qkv.a@1", "qkv.a@x", "period[0].split.compute[3]: 'qkv.a@x' looks x layers ahead"),
        ("qkv.a@1", "5", "period[0].split.compute[3]: 5 is no nano-op"),
        ("qkv.a@1", "qkv.a.b", "period[0].split.compute[3]: 'qkv.a.b' is no nano-op"),
        ("{o: reference}", "{o: 3}", "kernels.o: expected a name, not 3"),
        ("decode: 600, ", "", "mix.decode: missing"),
        ("decode: 600, ", "decode: 600, prompts: 2, ", "mix.prompts: unknown key"),
        ("decode: 600, ", "decode: 0.5, ", "mix.decode: expected a whole number, not 0.5"),
        ("mix: {decode: 600, prefill: 680, context: 768}", "mix: 3", "mix: expected keys and values, not 3"),
        ("page_size: 128", "pagesize: 128", "fingerprint.pagesize: unknown key; did you mean 'page_size'?"),
        ("'13.0'", "13.0", "fingerprint.cuda: expected a whole number or a word, not 13.0; put a version in quotes"),
        ("44.1", "[44.1]", "measured.iteration_ms: expected a finite number or a word, not [44.1]"),
    ],
)
def test_form_errors_name_the_key_and_the_mend(old, new, expected):
    assert expected in message(changed(old, new))


@pytest.mark.parametrize("text", ["", "- a\n", "just words", "a: b: c", "\t", "!!python/object:os.system {}"])
def test_text_that_is_no_plan(text):
    message(text)


# Meaning


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("capacity: 1280", "capacity: 0", "capacity: 0 rows hold no batch"),
        ("capacity: 1280", "capacity: 1281", "add up to 1280, which does not cover the capacity of 1281"),
        ("b: {decode: 0.5", "b: {decode: 0.25", "the decode shares add up to 3/4, not to 1"),
        ("prefill: 2/3", "prefill: 0.667", "the prefill shares add up to"),
        ("a: {decode: 0.5", "a: {decode: -0.5", "nano_batches.a.decode: a share is between 0 and 1, not -1/2"),
        ("rows: 640}\n  b", "rows: 0}\n  b", "nano_batches.a.rows: 0 rows hold nothing"),
        ("[92, 40]", "[100, 40]", "partitions.split: [100, 40] takes 140 SMs, but `sms` is 132"),
        ("[92, 40]", "[132, 0]", "partitions.split: every part needs at least 1 SM"),
        ("[92, 40]", "[92]", "period[0].split: 2 lanes (compute, memory) cannot share the 1 parts"),
        ("sms: 132\n", "", "partitions.whole: give the device's number of SMs as `sms`"),
        ("- split:", "- spilt:", "period[0].spilt: unknown partition 'spilt'; did you mean 'split'?"),
        ("decode: 600, ", "decode: -1, ", "mix.decode: -1 is less than nothing"),
        ("decode: 600, ", "decode: 601, ", "mix: 601 decode and 680 prefill rows are no batch of 1 to 1280 rows"),
        (
            "prefill: 680, context: 768",
            "prefill: 680, context: 0",
            "mix.context: decode rows attend to 1 token or more",
        ),
        ("kernels: {o: reference}", "kernels: {oo: reference}", "kernels.oo: unknown operation 'oo'"),
        ("kernels: {o: reference}", "kernels: {o: refrence}", "kernels.o: unknown kernel 'refrence'; known: reference"),
        ("kernels: {o: reference}", "kernels: {o.c: reference}", "kernels.o.c: unknown nano-batch 'c'; known: a, b"),
        (
            "kernels: {o: reference}",
            "kernels: {o.a: refrence}",
            "kernels.o.a: unknown kernel 'refrence'; known: reference",
        ),
        (
            "kernels: {o: reference}",
            "kernels: {final_norm.a: reference}",
            "kernels.final_norm.a: final_norm runs on all rows at once here: write kernels.final_norm",
        ),
    ],
)
def test_numbers_that_cannot_be(old, new, expected):
    assert expected in message(changed(old, new))


@pytest.mark.parametrize(
    ("old", "new", "expected", "mark"),
    [
        ("gate_up.a", "gate_pu.a", "unknown operation 'gate_pu'; did you mean 'gate_up'?", ">>gate_pu.a<<"),
        ("gate_up.a", "gate_up.a, silu_mul.a", "unknown operation 'silu_mul'", ">>silu_mul.a<<"),
        ("gate_up.a", "gate_up.c", "unknown nano-batch 'c'; known: a, b", ">>gate_up.c<<"),
        ("gate_up.a, ", "", "misses gate_up on the rows of nano-batch a: add gate_up.a", ">>gate_up.b<<"),
        ("gate_up.a", "gate_up.b", "runs gate_up twice on the rows of gate_up.b", ">>gate_up.b<<"),
        ("gate_up.a", "gate_up", "runs gate_up twice on the rows of gate_up.b", ">>gate_up<<"),
        ("qkv.a@1", "qkv.a", "deadlocks", ">>qkv.a<<"),
        ("[o.a, gate_up.a", "[gate_up.a, o.a", "deadlocks", ">>gate_up.a<<"),
    ],
)
def test_schedules_that_cannot_be_show_where(old, new, expected, mark):
    text = message(changed(old, new))
    assert expected in text
    assert mark in text
    assert "compute |" in text


def test_a_deadlock_across_lanes_tells_who_waits_for_whom():
    text = TEXT[: TEXT.index("partitions")] + (
        "period:\n"
        "- whole:\n"
        "    one: [input_layernorm, qkv, rope_append, o, decode_attention]\n"
        "    two: [prefill_attention, gate_up, down, add_norm]\n"
    )
    error = message(text)
    assert "o layer 0 waits for decode_attention layer 0, which must be done with the same rows first" in error
    assert "decode_attention layer 0 waits for o layer 0, which stands before it in lane one" in error


def test_an_operation_that_follows_nothing_must_be_named():
    text = message(TEXT[: TEXT.index("period:")] + "period: [{split: {compute: [], memory: []}}]\n")
    assert "the period does not name input_layernorm" in text
    graph = dataclasses.replace(GRAPH, layer=(*GRAPH.layer, FakeOperation("alone", (write("alone"),))))
    with pytest.raises(PlanError, match="does not name alone"):
        Plan.loads(TEXT, graph)


def test_an_empty_period_or_stage_is_refused():
    assert "period: a plan needs at least one stage" in message(TEXT[: TEXT.index("period:")] + "period: []\n")
    assert "period[0].split: a stage needs" in message(TEXT[: TEXT.index("period:")] + "period: [{split: {}}]\n")


def test_two_nano_batches_of_one_name_and_none_at_all():
    plan = Plan.sequential(GRAPH, 8)
    twice = dataclasses.replace(plan, nano_batches=plan.nano_batches * 2)
    with pytest.raises(PlanError, match="two are named 'a'"):
        validate(twice, GRAPH)
    with pytest.raises(PlanError, match="at least one"):
        validate(dataclasses.replace(plan, nano_batches=()), GRAPH)


def test_another_number_of_sms():
    plan = Plan.loads(TEXT)
    validate(plan, GRAPH, sms=132)
    with pytest.raises(PlanError, match="tuned for 132 SMs, but this device has 114"):
        validate(plan, GRAPH, sms=114)
    validate(Plan.sequential(GRAPH, 8), GRAPH, sms=114)


def test_a_plan_of_another_graph_is_refused():
    graph = dataclasses.replace(GRAPH, layer=(FakeOperation("moe", (read("x"), write("x"))),))
    with pytest.raises(PlanError, match=r"period\[0\]\.split\.compute\[0\]: o\.a: unknown operation 'o'"):
        validate(dataclasses.replace(Plan.loads(TEXT), kernels=FrozenMapping()), graph)
