"""The plan store: what is kept through a crash and a full disk, which plans serve a run, and why the others do not."""

import os
import resource
import signal
import subprocess
import sys
from dataclasses import fields, replace
from fractions import Fraction
from pathlib import Path

import pytest

from nanoflow.errors import ConfigError
from nanoflow.pipeline.plan import FINGERPRINT_KEYS, PLAN_FORMAT, FrozenMapping, NanoBatch, Plan, PlanError
from nanoflow.pipeline.plan_mix import PlanMix
from nanoflow.pipeline.program import compile_program
from nanoflow.plan_choice import choose_plans, plan_label
from nanoflow.search import store
from nanoflow.search.files import replace_file
from nanoflow.search.fingerprint import Fingerprint, graph_shape
from nanoflow.search.store import Verdict, judge, plan_folders, store_plan, stored_plans
from tests.unit.plan_graphs import llama_graph

GRAPH = llama_graph(2)
HERE = Fingerprint(
    model="tiny", gpu="NVIDIA H100 80GB HBM3", sms=132, shape=graph_shape(GRAPH), dtype="bfloat16", page_size=128,
    torch="2.13.0", triton="3.6.0", cuda="13.0", driver="580.65.06",
)  # fmt: skip
MIX = PlanMix(60, 40, 700)


def split(mix: PlanMix | None = MIX, *, least_rows: int = 0, capacity: int = 128, **measured: float) -> Plan:
    """A plan of two nano-batches in one lane."""
    half = Fraction(1, 2)
    entries = [name + part for name in (op.name for op in GRAPH.layer) for part in (".a", ".b")]
    text = f"capacity: 1\nnano_batches: {{}}\nperiod: [{{whole: {{main: [{', '.join(entries)}]}}}}]\n"
    return replace(
        Plan.loads(text),
        capacity=capacity,
        nano_batches=(NanoBatch("a", half, half, capacity), NanoBatch("b", half, half, capacity)),
        least_rows=least_rows,
        mix=mix,
        measured=FrozenMapping(measured),
    )


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The user's store and, in the place of what the package ships, an empty one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = plan_folders()[0], tmp_path / "shipped"
    assert found[0].is_relative_to(tmp_path)
    monkeypatch.setattr(store, "plan_folders", lambda: found)
    return found


def verdicts(here: Fingerprint = HERE, capacity: int = 256) -> list[Verdict]:
    return judge(stored_plans(), here, GRAPH, capacity)


def used(here: Fingerprint = HERE, capacity: int = 256) -> list[Path]:
    return [verdict.stored.file for verdict in verdicts(here, capacity) if not verdict.against]


# Writing


def test_a_stored_plan_reads_back_with_its_fingerprint(folders: tuple[Path, Path]) -> None:
    path = store_plan(split(ratio=1.04), HERE)
    assert path.parent == folders[0]
    assert path.name.startswith("tiny--nvidia-h100-80gb-hbm3--60-decode-40-prefill-700-context--")
    (found,) = stored_plans()
    plan = found.plan
    assert plan is not None and found.file == path and not found.shipped and found.ratio == 1.04
    assert (plan.model, plan.gpu, plan.sms, plan.mix) == ("tiny", HERE.gpu, 132, MIX)
    assert plan.fingerprint["format"] == PLAN_FORMAT and plan.fingerprint["driver"] == "580.65.06"
    assert HERE.refusals(plan) == [] and HERE.doubts(plan) == []
    assert HERE.stamp(split(ratio=1.04)) == plan


def test_what_is_stored_for_the_same_replaces_it_and_for_something_else_does_not(folders: tuple[Path, Path]) -> None:
    first = store_plan(split(ratio=1.02), HERE)
    assert store_plan(split(ratio=1.05), HERE) == first
    assert [found.ratio for found in stored_plans()] == [1.05]
    others = [replace(HERE, dtype="float16"), replace(HERE, sms=114), replace(HERE, gpu="x"), replace(HERE, model="y")]
    files = {store_plan(split(), here) for here in others} | {store_plan(split(PlanMix(9, 9, 9)), HERE)}
    files |= {store_plan(split(None), HERE), store_plan(split(), replace(HERE, shape="another"))}
    assert len(files | {first}) == 8 == len(stored_plans())
    # Other versions measure the same plan anew.
    assert store_plan(split(ratio=1.03), replace(HERE, torch="3.0")) == first
    with pytest.raises(ValueError, match="neither may be empty"):
        store_plan(split(), replace(HERE, model=None))


def test_a_full_disk_keeps_the_plan_that_was_there(folders: tuple[Path, Path]) -> None:
    path = store_plan(split(), HERE)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        with pytest.raises(PlanError, match=rf"{path.name}: the plan cannot be stored: File too large; what was there"):
            store_plan(split(ratio=1.5), HERE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_bytes() == before and [*path.parent.iterdir()] == [path]


@pytest.mark.parametrize(
    ("step", "content"),
    [("Path.open", "old"), ("os.fsync", "old"), ("Path.rename", "old"), ("sync_folder", "new"), ("", "new")],
)
def test_a_kill_between_two_steps_leaves_the_old_or_the_new(tmp_path: Path, step: str, content: str) -> None:
    """The process kills itself where it would take the step; without one, it ends."""
    target = tmp_path / "plan.yaml"
    replace_file(target, "old" * 1000)
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nsys.path.insert(0, sys.argv[1])\nimport files\n"
        "def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)\n"
        f"{'files.' if step else '#'}{step} = die\n"
        "files.replace_file(Path(sys.argv[2]), 'new' * 1000)\n"
    )
    folder = Path(store.__file__).resolve().parent
    done = subprocess.run([sys.executable, "-c", code, str(folder), str(target)], timeout=60)
    assert done.returncode == (-signal.SIGKILL if step else 0)
    assert target.read_text() == content * 1000
    # What a killed process leaves beside it is no plan.
    assert [found.file for found in stored_plans((tmp_path, tmp_path / "none"))] == [target]


# Which plans serve


def test_plans_of_several_mixes_serve_and_the_users_wins_over_a_shipped_one_of_the_same(
    folders: tuple[Path, Path],
) -> None:
    own = store_plan(split(ratio=1.02), HERE)
    store_plan(split(PlanMix(62, 38, 700), ratio=1.09), HERE, folders[1])
    other = store_plan(split(PlanMix(10, 100, 700), ratio=1.04), HERE, folders[1])
    assert used() == [own, other]
    (left,) = [verdict for verdict in verdicts() if verdict.against]
    assert left.stored.shipped and f"{own.name} is for the same mix and comes first" in left.against[0]
    own.unlink()
    assert len(used()) == 2


def test_two_plans_for_one_mix_and_other_rows_serve_both(folders: tuple[Path, Path]) -> None:
    small = store_plan(split(None, capacity=64), HERE)
    large = small.with_name("large.yaml")
    large.write_text(HERE.stamp(split(None, least_rows=65)).dumps())
    assert set(used()) == {small, large}
    large.write_text(HERE.stamp(split(None, least_rows=64)).dumps())
    assert used() == [large], "the larger one, where nothing else tells"


def test_a_run_takes_a_few_plans_at_most_those_that_gain_most(folders: tuple[Path, Path]) -> None:
    for count in range(store.MOST_PLANS + 3):
        store_plan(split(PlanMix(10 * count, 110 - 10 * count, 700), ratio=1 + count / 100), HERE)
    found = verdicts()
    ratios = [verdict.stored.ratio for verdict in found if not verdict.against]
    assert ratios == [1.1, 1.09, 1.08, 1.07, 1.06, 1.05, 1.04, 1.03]
    assert all("8 plans at most" in verdict.against[0] for verdict in found[8:])


@pytest.mark.parametrize(
    ("here", "line"),
    [
        ({"model": "other", "shape": None}, "model: tuned for tiny, here other"),
        ({"gpu": "NVIDIA H200"}, "gpu: tuned for NVIDIA H100 80GB HBM3, here NVIDIA H200"),
        ({"sms": 114}, "sms: tuned for 132, here 114"),
        ({"shape": graph_shape(llama_graph(3))}, f"shape: tuned for {graph_shape(GRAPH)}, here 3 layers"),
        ({"dtype": "float16"}, "dtype: tuned for bfloat16, here float16"),
    ],
)  # fmt: skip
def test_a_foreign_fingerprint_is_refused_with_the_difference(
    folders: tuple[Path, Path], here: dict[str, object], line: str
) -> None:
    path = store_plan(split(), HERE)
    foreign = replace(HERE, **here)  # type: ignore[arg-type]
    (verdict,) = verdicts(foreign)
    assert len(verdict.against) == 1 and verdict.against[0].startswith(line) and not verdict.damaged
    with pytest.raises(PlanError, match="tuned for something else than this run") as caught:
        choose_plans(str(path), GRAPH, foreign, 256)
    assert str(caught.value).startswith(f"{path}: ") and f"\n  {line}" in str(caught.value)
    assert choose_plans("auto", GRAPH, foreign, 256).plans == (Plan.sequential(GRAPH, 256),)


def test_all_differences_are_shown_each_on_a_line(folders: tuple[Path, Path]) -> None:
    path = store_plan(split(), HERE)
    with pytest.raises(PlanError) as caught:
        here = replace(HERE, model="other", shape="other", sms=114, dtype="float16", torch="9")
        choose_plans(str(path), GRAPH, here, 256)
    lines = str(caught.value).splitlines()
    assert lines[1:5] == [
        "  model: tuned for tiny, here other",
        "  sms: tuned for 132, here 114",
        f"  shape: tuned for {graph_shape(GRAPH)}, here other",
        "  dtype: tuned for bfloat16, here float16",
    ]
    assert len(lines) == 6 and lines[5].startswith("use `plan: sequential`")


def test_a_model_of_the_same_shape_takes_the_plan_whatever_its_name(folders: tuple[Path, Path]) -> None:
    """A checkpoint that was fine-tuned, or lies in a folder of its own, takes as long as the one that was tuned."""
    path = store_plan(split(ratio=1.04), HERE)
    tuned = replace(HERE, model="tiny-instruct")
    (verdict,) = verdicts(tuned)
    assert not verdict.against and not verdict.doubts
    assert choose_plans("auto", GRAPH, tuned, 256).plans[0] == choose_plans(str(path), GRAPH, tuned, 256).plans[0]
    # What was tuned under either name is for the same; the better one comes first.
    other = store_plan(split(ratio=1.05), tuned)
    assert other != path
    assert [(each.stored.file, bool(each.against)) for each in verdicts(tuned)] == [(other, False), (path, True)]


def test_reports_call_a_run_without_lanes_sequential() -> None:
    in_sequence, lanes = (compile_program(plan, GRAPH) for plan in (Plan.sequential(GRAPH, 256), split()))
    assert plan_label("auto", [in_sequence]) == plan_label("sequential", [in_sequence]) == "sequential"
    assert plan_label("auto", [lanes, in_sequence]) == "auto"
    assert plan_label("mine.yaml", [lanes]) == "mine.yaml"


def test_other_versions_are_doubts_and_the_plan_serves(folders: tuple[Path, Path]) -> None:
    path = store_plan(split(ratio=1.04), HERE)
    later = replace(HERE, torch="2.14.0", driver="590.1", page_size=64, format=PLAN_FORMAT + 1)
    (verdict,) = verdicts(later)
    assert not verdict.against
    assert verdict.doubts == (
        "page_size 128, here 64",
        f"format {PLAN_FORMAT}, here {PLAN_FORMAT + 1}",
        "torch 2.13.0, here 2.14.0",
        "driver 580.65.06, here 590.1",
    )
    for asked in ("auto", str(path)):
        chosen = choose_plans(asked, GRAPH, later, 256)
        assert chosen.plans[0].mix == MIX
        assert chosen.notes[0].startswith(f"warning: {path}: measured with page_size 128, here 64; format")
    # What is not known on this side, or was not noted on that, is not compared.
    assert verdicts(Fingerprint(torch="2.13.0"))[0].doubts == ()
    path.write_text(replace(HERE.stamp(split()), fingerprint=FrozenMapping()).dumps())
    assert verdicts()[0] == Verdict(stored_plans()[0])


def test_plans_that_cannot_serve_and_why(folders: tuple[Path, Path]) -> None:
    path = store_plan(split(ratio=0.99), HERE)
    assert verdicts()[0].against == ("measured.ratio: it was 0.99 times as fast as in sequence",)
    store_plan(split(ratio=1.0), HERE)
    assert used() == [path], "sequence itself, stored where nothing won"
    assert verdicts(capacity=100)[0].against == ("capacity: it is for 128 rows, engine.max_batch_tokens is 100",)
    path.write_text(split().dumps())
    assert verdicts()[0].against == ("model: it names none", "gpu: it names none")
    path.write_text(HERE.stamp(split()).dumps().replace("down.b", "up.b"))
    assert verdicts()[0].damaged and "unknown operation 'up'" in verdicts()[0].against[0]


@pytest.mark.parametrize("content", [b"", b"capacity: [", b"\xff\xfe", b"capacity: 5\n", b"x" * 10_000])
def test_a_damaged_file_is_skipped_with_one_warning_and_an_error_by_name(
    folders: tuple[Path, Path], content: bytes
) -> None:
    whole = store_plan(split(ratio=1.04), HERE)
    damaged = whole.with_name("a-damaged.yaml")
    damaged.write_bytes(content)
    chosen = choose_plans("auto", GRAPH, HERE, 256)
    assert [plan.mix for plan in chosen.plans] == [MIX, None]
    warning, note = chosen.notes
    assert warning.startswith(f"warning: {damaged}: ") and warning.endswith("; it is skipped")
    assert note.startswith("plan: 1 stored for tiny on NVIDIA H100")
    with pytest.raises(PlanError, match=r"a-damaged\.yaml: "):
        choose_plans(str(damaged), GRAPH, HERE, 256)


def test_what_is_no_file_is_skipped_too(folders: tuple[Path, Path]) -> None:
    (folders[0] / "folder.yaml").mkdir(parents=True)
    os.symlink(folders[0] / "gone", folders[0] / "link.yaml")
    assert [verdict.damaged for verdict in verdicts()] == [True, True]
    assert len(choose_plans("auto", GRAPH, HERE, 256).notes) == 3


# What a run is told


def test_auto_says_what_it_chose_and_why(folders: tuple[Path, Path]) -> None:
    assert choose_plans("auto", GRAPH, HERE, 256).notes == (
        "plan: sequential, since none is stored for tiny on NVIDIA H100 80GB HBM3",
    )
    path = store_plan(split(), replace(HERE, dtype="float16"))
    (note,) = choose_plans("auto", GRAPH, HERE, 256).notes
    assert note == (
        f"plan: sequential, since no plan stored for tiny on NVIDIA H100 80GB HBM3 fits ({path.name}: dtype: tuned for "
        "float16, here bfloat16; see `nanoflow plan list`)"
    )
    first, second = store_plan(split(ratio=1.043), HERE), store_plan(split(None), HERE)
    chosen = choose_plans("auto", GRAPH, HERE, 256)
    assert chosen.notes == (
        "plan: 2 stored for tiny on NVIDIA H100 80GB HBM3: 60 decode rows of context 700 and 40 prefill rows (1.043 "
        f"times as fast as in sequence, {first.name}); any mix (not measured, {second.name}); the rest in sequence",
    )
    assert len(chosen.plans) == 3 and chosen.plans[2] == Plan.sequential(GRAPH, 256)


def test_a_file_runs_for_its_mix_and_beside_it_the_sequential_plan(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(split().dumps())
    assert [plan.mix for plan in choose_plans(str(file), GRAPH, HERE, 128).plans] == [MIX, None]
    file.write_text(split(None).dumps())
    assert len(choose_plans(str(file), GRAPH, HERE, 128).plans) == 1
    assert len(choose_plans(str(file), GRAPH, HERE, 129).plans) == 2
    with pytest.raises(ConfigError, match=r"capacity of 128 rows, more than engine\.max_batch_tokens = 127"):
        choose_plans(str(file), GRAPH, HERE, 127)
    assert choose_plans("sequential", GRAPH, HERE, 128).plans == (Plan.sequential(GRAPH, 128),)


def test_a_fingerprint_is_what_a_plan_file_may_say() -> None:
    assert tuple(field.name for field in fields(Fingerprint)) == ("model", "gpu", "sms", *FINGERPRINT_KEYS)


def test_the_shape_tells_graphs_apart(tmp_path: Path) -> None:
    assert graph_shape(llama_graph(2)) == graph_shape(llama_graph(2)) != graph_shape(llama_graph(3))
    wider = replace(GRAPH, values={**GRAPH.values, "h": 9})
    longer = replace(GRAPH, vocab_size=7)
    assert len({graph_shape(graph) for graph in (GRAPH, wider, longer, llama_graph(2, scratch=True))}) == 4
