"""Profiles: files, filling them, and rates read from them, against made-up devices."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from nanoflow.ops.operation import Operation, Work
from nanoflow.pipeline.plan import Plan
from nanoflow.pipeline.program import compile_program
from nanoflow.plans.case import open_graph
from nanoflow.search.cost_model import Ceilings
from nanoflow.search.fingerprint import Fingerprint
from nanoflow.search.mix import Mix, mix_works
from nanoflow.search.profile import (
    At,
    Pair,
    Point,
    Profile,
    ProfileError,
    Solo,
    axes_of,
    find_profile,
    layer_shape,
    profile_file,
    work_at,
)
from nanoflow.search.profile_rates import ProfileRates, profile_rates
from nanoflow.search.profiler import Case, PairCase, SoloCase, Unmeasurable, fill_profile, splits
from nanoflow.search.rates import Energy, Running
from nanoflow.search.simulate import simulate
from nanoflow.search.space import PlanChoice, build_plan

GRAPH = replace(open_graph("llama-3-8b", Plan(1, (), ()), "test")[2], layers=4)
OPS = {op.name: op for op in GRAPH.layer}
HERE = Fingerprint(
    model="llama-3-8b", gpu="Made Up", sms=132, shape=layer_shape(GRAPH), dtype="bfloat16", page_size=128, torch="2.0"
)
CEILINGS = Ceilings(flops=700e12, bytes_per_second=12e12, power_limit_watts=700.0)
"""Bytes enough that nothing made up is limited by them."""
EMPTY = Profile(HERE, CEILINGS, idle_watts=100.0)


@dataclass(frozen=True)
class Device:
    """A made-up device: seconds are its own formula, and what runs beside something keeps a fixed share."""

    overhead: float = 3e-6
    share: float = 0.8
    other_share: float = 0.9
    device_sms: int = 132
    itemsize: int = 2
    idle_watts: float | None = 100.0
    limit_watts: float | None = 700.0

    def seconds(self, op: Operation, work: Work, sms: int | None, kernel: str = "") -> float:
        cost, part = op.cost(work, 2), (sms or self.device_sms) / self.device_sms
        return self.overhead + cost.flops / (450e12 * part) + cost.bytes / (2.5e12 * min(1.0, 2.6 * part))

    def kept(self, running: Running, beside: Sequence[Running]) -> float:
        if not beside:
            return 1.0
        return self.other_share if running.op.name == "decode_attention" else self.share

    def joules(self, op: Operation, work: Work, sms: int | None) -> float:
        return 300.0 * self.seconds(op, work, None)


@dataclass
class MadeUpBench:
    """Measures a made-up device; `fails` names operations that cannot be measured."""

    device: Device = field(default_factory=Device)
    fails: tuple[str, ...] = ()
    seen: list[Case] = field(default_factory=list)
    stops_at: int = 10**6

    def _look(self, case: Case) -> None:
        if len(self.seen) == self.stops_at:
            raise KeyboardInterrupt
        self.seen.append(case)
        if case.op in self.fails:
            raise Unmeasurable("it is made up so")

    def solo(self, case: SoloCase) -> list[Point]:
        self._look(case)
        points = []
        for at in case.at:
            work, op = work_at(case.kind, at), OPS[case.op]
            seconds = self.device.seconds(op, work, case.sms)
            points.append(Point(at, seconds, self.device.joules(op, work, None) + 100.0 * seconds))
        return points

    def pair(self, case: PairCase) -> tuple[float, float]:
        self._look(case)
        return self.device.share, self.device.other_share


ROWS = (128, 256, 512, 640, 1152)
SIZES = {
    "rows": tuple((rows,) for rows in ROWS),
    "decode": tuple((requests, context) for requests in (64, 137, 275, 551) for context in (384, 768, 1536)),
    "prefill": tuple((rows, start) for rows in (64, 150, 300, 601) for start in (0, 300, 600)),
}


def solo_cases(budgets: Sequence[int | None] = (None,)) -> list[Case]:
    return [SoloCase(op.name, axes_of(op), sms, SIZES[axes_of(op)]) for sms in budgets for op in GRAPH.layer]


def pair_cases() -> list[Case]:
    found: list[Case] = []
    for op in GRAPH.layer:
        if op.name != "decode_attention":
            at = SIZES[axes_of(op)][0]
            found += [PairCase(op.name, at, a, "decode_attention", (275, 768), b) for a, b in ((100, 32), (None, None))]
    return found


def filled(folder: Path, cases: Sequence[Case], bench: MadeUpBench | None = None) -> Profile:
    return fill_profile(EMPTY, cases, bench or MadeUpBench(), folder / "profile.json").profile


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return filled(tmp_path_factory.mktemp("profile"), [*solo_cases((None, 116, 100, 32, 16)), *pair_cases()])


@pytest.fixture(scope="module")
def rates(profile: Profile) -> ProfileRates:
    return profile_rates(profile, 2)


@pytest.mark.parametrize("memory", [32, 24, None])
def test_a_simulation_on_the_profile_of_a_device_is_one_on_the_device(rates: ProfileRates, memory: int | None) -> None:
    """Sizes and numbers of SMs are not those that were measured."""
    mix, device = Mix(500, 700, (560,)), Device()
    sequential = PlanChoice()
    skew = PlanChoice((8, 8), (8, 8), beside=(True, True), skew=4, memory_sms=memory)
    for choice in (sequential, skew):
        plan = build_plan(choice, GRAPH, mix, 1100, device)
        program, works = compile_program(plan, GRAPH), mix_works(plan, mix)
        expected, found = simulate(program, works, device), simulate(program, works, rates)
        assert found.seconds == pytest.approx(expected.seconds, rel=0.01)
        assert found.joules is not None and expected.joules is not None
        assert found.joules == pytest.approx(expected.joules, rel=0.02)


def test_rates_are_exact_where_it_was_measured(rates: ProfileRates) -> None:
    for op in GRAPH.layer:
        for sms in (None, 116, 100, 32, 16):
            for at in SIZES[axes_of(op)]:
                work = work_at(axes_of(op), at)
                assert rates.seconds(op, work, sms) == pytest.approx(Device().seconds(op, work, sms), rel=1e-9)
        work = work_at(axes_of(op), SIZES[axes_of(op)][1])
        assert rates.joules(op, work, 100) == pytest.approx(Device().joules(op, work, 100), rel=1e-9)


@settings(max_examples=60)
@given(
    op=st.sampled_from([op.name for op in GRAPH.layer]),
    rows=st.lists(st.integers(1, 5000), min_size=2, max_size=2).map(sorted),
    context=st.integers(1, 9000),
    sms=st.none() | st.integers(8, 132),
)
def test_more_rows_take_longer_and_everything_takes_time(
    rates: ProfileRates, op: str, rows: list[int], context: int, sms: int | None
) -> None:
    kind = axes_of(OPS[op])
    works = [work_at(kind, (count,) if kind == "rows" else (count, context)) for count in rows]
    fewer, more = (rates.seconds(OPS[op], work, sms) for work in works)
    assert 0 < fewer <= more * (1 + 1e-9)
    assert rates.joules(OPS[op], works[0], sms) >= 0


@settings(max_examples=60)
@given(op=st.sampled_from([op.name for op in GRAPH.layer]), sms=st.integers(8, 131), more=st.integers(1, 100))
def test_more_sms_take_no_longer(rates: ProfileRates, op: str, sms: int, more: int) -> None:
    kind = axes_of(OPS[op])
    work = work_at(kind, (300,) if kind == "rows" else (300, 500))
    least, most = rates.seconds(OPS[op], work, sms), rates.seconds(OPS[op], work, min(132, sms + more))
    assert most <= least * (1 + 1e-9)


@settings(max_examples=40)
@given(points=st.dictionaries(st.integers(1, 3000), st.floats(1e-6, 1e-2), min_size=1, max_size=6), rows=st.data())
def test_between_two_points_is_what_lies_between_them(points: dict[int, float], rows: st.DataObject) -> None:
    """Whatever was measured: a larger size that is faster stays so."""
    solo = Solo("qkv", "rows", None, tuple(Point((count,), seconds) for count, seconds in sorted(points.items())))
    rates = profile_rates(EMPTY.with_solo(solo), 2)
    known = sorted(points)
    for count in known:
        assert rates.seconds(OPS["qkv"], Work(prefill_rows=count), None) == pytest.approx(points[count])
    asked = rows.draw(st.integers(known[0], known[-1]))
    low = max(count for count in known if count <= asked)
    high = min(count for count in known if count >= asked)
    least, most = sorted((points[low], points[high]))
    assert least * (1 - 1e-9) <= rates.seconds(OPS["qkv"], Work(decode_rows=asked), None) <= most * (1 + 1e-9)


def test_beyond_what_was_measured_the_ceilings_say_how_it_goes_on(rates: ProfileRates) -> None:
    down, base = OPS["down"], rates.base
    last = Work(prefill_rows=ROWS[-1])
    for rows in (1500, 4000, 20_000):
        work = Work(prefill_rows=rows)
        grown = base.seconds(down, work, None) / base.seconds(down, last, None)
        assert rates.seconds(down, work, None) == pytest.approx(rates.seconds(down, last, None) * grown)
    few = base.seconds(down, last, 8) / base.seconds(down, last, 16)
    assert rates.seconds(down, last, 8) == pytest.approx(rates.seconds(down, last, 16) * few)
    # Two prompts side by side attend to less than one that is as long as both.
    one, two = work_at("prefill", (600, 0)), work_at("prefill", (300, 0)) + work_at("prefill", (300, 0))
    assert rates.seconds(OPS["prefill_attention"], two, None) < rates.seconds(OPS["prefill_attention"], one, None)


def test_what_is_kept_is_what_was_measured_for_the_pair(rates: ProfileRates) -> None:
    down = Running(OPS["down"], Work(prefill_rows=640), 100)
    attention = Running(OPS["decode_attention"], Work(decode_rows=275, decode_context=200_000), 32)
    assert rates.kept(down, []) == 1.0
    assert rates.kept(down, [attention]) == pytest.approx(0.8)
    assert rates.kept(attention, [down]) == pytest.approx(0.9)
    free = replace(down, sms=None), replace(attention, sms=None)
    assert rates.kept(*[free[0], [free[1]]]) == pytest.approx(0.8)
    # Two products were never measured beside each other: the ceilings' answer.
    other = Running(OPS["o"], Work(prefill_rows=640), 32)
    assert rates.kept(down, [other]) == rates.base.kept(down, [other])


def test_side_by_side_nothing_reads_more_than_the_ceilings_allow() -> None:
    """Fewer rows than were measured read as many weights in less time."""
    at = (275, 768)
    pair = Pair("down", (1152,), 100, 0.8, "decode_attention", at, 32, 0.9)
    profile = replace(EMPTY, ceilings=replace(CEILINGS, bytes_per_second=3e12)).with_pair(pair)
    free = replace(pair, sms=None, other_sms=None)
    rates = profile_rates(profile.with_pair(free), 2)
    attention = Running(OPS["decode_attention"], work_at("decode", at), 32)

    def running(rows: int) -> Running:
        return Running(OPS["down"], Work(prefill_rows=rows), 100)

    assert rates.kept(running(1152), [attention]) == pytest.approx(0.8)
    assert rates.base.kept(running(1152), [attention]) > 0.8
    assert rates.kept(running(64), [attention]) == rates.base.kept(running(64), [attention]) < 0.7
    # What shares all SMs was measured as it shares them; the ceilings would count that again.
    few, beside = replace(running(64), sms=None), replace(attention, sms=None)
    assert rates.kept(few, [beside]) == pytest.approx(0.8)


def test_a_lower_clock_is_not_counted_twice(profile: Profile) -> None:
    """What two kept beside each other under the power limit is what they would at the full clock, stretched."""
    energy = Energy(0.85e-12, 1.75e-10, 200.0)
    rates = profile_rates(profile, 2, energy)
    down = Running(OPS["down"], Work(prefill_rows=640), 100)
    attention = Running(OPS["decode_attention"], Work(decode_rows=275, decode_context=200_000), 32)
    (pair,) = (each for each in profile.pairs if each.op == "down" and each.sms == 100)
    drawn = sum(
        kept * rates.joules(OPS[op], work, sms) / rates.seconds(OPS[op], work, sms)
        for op, work, sms, kept in (
            ("down", work_at("rows", pair.at), 100, 0.8),
            ("decode_attention", work_at("decode", pair.other_at), 32, 0.9),
        )
    )
    assert 500 < drawn < 600, "above what the limit leaves, but not by so much that nothing was lost to the other"
    assert rates.kept(down, [attention]) == pytest.approx(0.8 * (drawn / 500) ** 2)
    unlimited = replace(profile, ceilings=replace(CEILINGS, power_limit_watts=None))
    assert profile_rates(unlimited, 2, energy).kept(down, [attention]) == pytest.approx(0.8)


def test_energy_that_was_fitted_to_whole_runs_counts_for_all_operations(profile: Profile) -> None:
    work = Work(prefill_rows=640)
    known = profile_rates(profile, 2, Energy(1e-12, 1e-10, 200.0))
    assert known.joules(OPS["down"], work, 100) == known.base.joules(OPS["down"], work, 100)
    own = profile_rates(profile, 2)
    assert own.joules(OPS["down"], work, 100) == pytest.approx(Device().joules(OPS["down"], work, None))


def test_what_was_not_measured_is_by_the_ceilings() -> None:
    rates = profile_rates(replace(EMPTY, idle_watts=None), 2)
    work = Work(prefill_rows=640)
    assert rates.seconds(OPS["down"], work, 100) == rates.base.seconds(OPS["down"], work, 100)
    assert rates.idle_watts is None and rates.joules(OPS["down"], work, 100) == 0.0
    known = profile_rates(EMPTY, 2, Energy(1e-12, 1e-10, 200.0))
    assert known.idle_watts == 200.0 and known.joules(OPS["down"], work, 100) > 0


def test_a_profile_read_back_is_equal(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "here" / "profile.json"
    profile.save(path)
    assert Profile.load(path) == profile
    EMPTY.save(path)
    assert Profile.load(path) == EMPTY
    assert [file.name for file in path.parent.iterdir()] == ["profile.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format=9), "format: it is 9, this version reads 1"),
        (lambda c: c["solos"][0].update(kind="columns"), "solos[0]: kind: 'columns' is none of rows"),
        (lambda c: c["solos"][1]["points"][0].__setitem__(-2, -1.0), "solos[1]: -1.0 is no number above 0"),
        (lambda c: c["solos"][1]["points"][0].insert(0, 5), "does not give"),
        (lambda c: c["solos"][0].update(points=[]), "solos[0]: points: there is none"),
        (lambda c: c["pairs"][2].pop("kept"), "pairs[2]: 'kept' is missing"),
        (lambda c: c["pairs"][0].update(sms=0), "pairs[0]: sms: 0"),
        (lambda c: c["ceilings"].update(flops=None), "ceilings: None is no number"),
        (lambda c: c["fingerprint"].update(colour="red"), "fingerprint: 'colour'"),
        (lambda c: c.pop("solos"), "it has no `solos`"),
    ],
)
def test_a_damaged_file_is_refused_with_the_place(profile: Profile, tmp_path: Path, change, message: str) -> None:
    path = tmp_path / "profile.json"
    content = json.loads(profile.dumps())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ProfileError) as caught:
        Profile.load(path)
    assert str(caught.value).startswith(str(path)) and message in str(caught.value)


def test_a_file_that_was_cut_off_or_is_not_there_is_refused(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(profile.dumps()[:-200])
    with pytest.raises(ProfileError, match="it is no JSON"):
        Profile.load(path)
    with pytest.raises(ProfileError, match="cannot be read: No such file"):
        Profile.load(tmp_path / "none.json")
    with pytest.raises(ProfileError, match="cannot be written"):
        profile.save(path / "below.json")


def test_a_foreign_profile_is_refused_with_a_line_for_each_difference(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    EMPTY.refuse(path, HERE)
    with pytest.raises(ProfileError) as caught:
        EMPTY.refuse(path, replace(HERE, gpu="Other", torch="2.1", triton="3.7"))
    lines = str(caught.value).splitlines()
    assert lines[1:4] == [
        "  gpu: measured with Made Up, here Other",
        "  torch: measured with 2.0, here 2.1",
        "  triton: measured with None, here 3.7",
    ]


def test_the_profile_of_a_plans_gpu_and_model_is_found(profile: Profile, tmp_path: Path) -> None:
    users, shipped = tmp_path / "users", tmp_path / "shipped"
    wanted = {"gpu": "Made Up", "shape": layer_shape(GRAPH), "dtype": "bfloat16", "folders": (users, shipped)}
    assert find_profile(**wanted) is None
    profile.save(profile_file(HERE, shipped))
    (shipped / "damaged.json").write_text("{")
    found = find_profile(**wanted)
    assert found is not None and found[1] == profile and found[0].parent == shipped
    assert found[0].name.startswith("llama-3-8b--made-up--")
    EMPTY.save(profile_file(HERE, users))
    assert find_profile(**wanted) == found, "one that was only begun tells nothing"
    profile.save(profile_file(HERE, users))
    again = find_profile(**wanted, sms=132)
    assert again is not None and again[0].parent == users
    assert find_profile(**wanted, sms=100) is None
    assert find_profile(**{**wanted, "dtype": "float32"}) is None
    assert layer_shape(replace(GRAPH, layers=32)) == layer_shape(GRAPH)
    assert profile_file(replace(HERE, torch="2.1"), users) != profile_file(HERE, users)


def test_profiling_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    cases, path = [*solo_cases((None, 100)), *pair_cases()], tmp_path / "profile.json"
    first = MadeUpBench(stops_at=5)
    stopped = fill_profile(EMPTY, cases, first, path)
    assert stopped.stopped and (stopped.measured, stopped.left) == (5, len(cases) - 5)
    assert Profile.load(path) == stopped.profile and len(stopped.profile.solos) == 5
    second, told = MadeUpBench(), []
    done = fill_profile(Profile.load(path), cases, second, path, progress=lambda case, left: told.append(left))
    assert (done.measured, done.left, done.stopped) == (len(cases) - 5, 0, False)
    assert first.seen + second.seen == cases and told == list(range(len(cases) - 5, 0, -1))
    assert Profile.load(path) == done.profile == filled(tmp_path, cases)
    third = MadeUpBench()
    assert fill_profile(done.profile, cases, third, path).measured == 0 and not third.seen


def test_only_the_sizes_that_are_missing_are_measured(tmp_path: Path) -> None:
    known = filled(tmp_path, [SoloCase("qkv", "rows", None, ((128,), (512,)))])
    bench = MadeUpBench()
    found = filled(tmp_path, [], bench)
    assert found == EMPTY
    done = fill_profile(known, [SoloCase("qkv", "rows", None, ((256,), (512,), (64,)))], bench, tmp_path / "p.json")
    assert bench.seen == [SoloCase("qkv", "rows", None, ((256,), (64,)))]
    solo = done.profile.solo("qkv", None)
    assert solo is not None and [point.at for point in solo.points] == [(64,), (128,), (256,), (512,)]


def test_time_that_is_up_and_what_cannot_be_measured_are_told(tmp_path: Path) -> None:
    cases, ticks = solo_cases(), iter(range(100))
    bench = MadeUpBench(fails=("rope_append",))
    done = fill_profile(EMPTY, cases, bench, tmp_path / "p.json", until=4, clock=lambda: next(ticks))
    assert (done.measured, done.left, done.stopped) == (3, len(cases) - 4, False)
    assert done.notes == ("rope_append on all SMs, 5 sizes: it is made up so",)
    assert len(Profile.load(tmp_path / "p.json").solos) == 3


def test_splits_leave_the_products_most_of_the_sms() -> None:
    found = splits(132)
    assert {(116, 16), (108, 24), (104, 28), (100, 32), (96, 36), (92, 40)} <= set(found)
    assert all(compute + memory == 132 and memory % 4 == 0 and compute > memory for compute, memory in found)


def test_a_point_stands_for_the_work_of_its_coordinates() -> None:
    assert work_at("decode", (10, 300)) == Work(decode_rows=10, decode_context=3000)
    by_mix = mix_works(Plan.sequential(GRAPH, 64), Mix(0, 1, (50,), (30,)))[0]
    assert work_at("prefill", (50, 30)) == by_mix
    at: At = (7,)
    assert work_at("rows", at).rows == 7
    pair = Pair("a", at, None, 1.0, "b", at, None, 1.0)
    assert EMPTY.with_pair(pair).with_pair(replace(pair, kept=0.5)).pairs == (replace(pair, kept=0.5),)
