"""``nanoflow profile`` from a job to its pictures, on a CPU; and what of it only a GPU does, with stand-ins."""

import json
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from typer.testing import CliRunner, Result

from nanoflow.cli import app
from nanoflow.config_schema import EngineSection, ModelSection
from nanoflow.loading import open_model
from nanoflow.ops import gemm_choice
from nanoflow.ops.gemm_choice import Choice, Choices
from nanoflow.pipeline.partitions import PartitionError
from nanoflow.pipeline.plan import Plan
from nanoflow.plans.case import open_case, open_graph
from nanoflow.plans.job_mixes import WeightedMix
from nanoflow.profiling import device_bench, gemm_choices, run as profiling_run
from nanoflow.profiling.cases import job_cases, part_rows
from nanoflow.profiling.device_bench import DeviceBench, Seconds, few_layers
from nanoflow.profiling.gemm_choices import ChoiceRun
from nanoflow.profiling.plot import plot_profile
from nanoflow.search import timing
from nanoflow.search.mix import Mix
from nanoflow.search.profile import Point, Profile, axes_of
from nanoflow.search.profiler import PairCase, SoloCase, Unmeasurable
from tests.unit.test_profile import MadeUpBench, filled, pair_cases, solo_cases

LLAMA = open_graph("llama-3-8b", Plan(1, (), ()), "test")[2]
QUICK = Seconds(whole=0.004, part=0.004, warm=0.0, pair=0.0)
JOB = """\
model: {path: tiny-llama-shape, weights: random, dtype: float32}
workload:
  synthetic:
    input_len: {constant: 24}
    output_len: {constant: 12}
    requests: 24
engine: {device: cpu, max_batch_tokens: 64, max_running: 16}
output: {path: out/x.jsonl}
"""


def mix(decode: int, context: int, prompts: tuple[int, ...], bucket: int) -> WeightedMix:
    return WeightedMix(Mix(decode, context, prompts), 1.0, float(bucket), bucket, 1.0)


MIXES = [mix(551, 768, (512, 89), 1152), mix(551, 768, (473,), 1024)]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("nanoflow.profiling.device_bench.CPU_SECONDS", QUICK)
    monkeypatch.setattr("nanoflow.search.ceilings.CPU_SECONDS", 0.01)
    shape = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": False, "eos_token_id": 1,
    }  # fmt: skip
    (tmp_path / "tiny-llama-shape").mkdir()
    (tmp_path / "tiny-llama-shape" / "config.json").write_text(json.dumps(shape))
    (tmp_path / "job.yaml").write_text(JOB)
    return tmp_path / "job.yaml"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["profile", *map(str, arguments)])


def test_a_job_is_profiled_shown_drawn_and_used_by_the_simulator(job: Path) -> None:
    done = run(job, "--plot", "pictures")
    assert done.exit_code == 0, done.output
    (path,) = (job.parent / "cache" / "nanoflow" / "profiles").iterdir()
    profile = Profile.load(path)
    assert {solo.op for solo in profile.solos} == {
        "embed", "input_layernorm", "qkv", "rope_append", "decode_attention", "prefill_attention", "o", "add_norm",
        "gate_up", "down", "add", "final_norm", "lm_head",
    }  # fmt: skip
    assert all(solo.sms is None and point.joules is None for solo in profile.solos for point in solo.points)
    assert profile.fingerprint.gpu == "cpu" and profile.fingerprint.dtype == "float32" and not profile.pairs
    assert "gate_up" in done.stdout and "13 to go" in done.stderr
    assert {picture.name for picture in Path("pictures").iterdir()} == {f"{path.stem}.sms{s}" for s in (".png", ".svg")}

    again = run(job)
    assert again.exit_code == 0 and "0 cases measured" in again.stdout and Profile.load(path) == profile
    shown = run(path)
    assert shown.exit_code == 0 and "gate_up" in shown.stdout and "measured, saved" not in shown.stdout

    graph = open_model(ModelSection(path="tiny-llama-shape", weights="random"), EngineSection(device="cpu")).graph
    stamp = Plan.sequential(graph, 64)
    stamp = replace(stamp, gpu="cpu", fingerprint=type(stamp.fingerprint)({"dtype": "float32"}))
    Path("plan.yaml").write_text(stamp.dumps())
    case = open_case("plan.yaml", "tiny-llama-shape")
    assert case.device.profile == profile and case.device.profile_file == path
    assert case.simulation.seconds > 0 and case.simulation.joules is None
    printed = CliRunner().invoke(app, ["plan", "show", "plan.yaml", "--model", "tiny-llama-shape"])
    assert printed.exit_code == 0 and f"profile: {path}" in printed.stdout


def test_time_that_is_up_says_how_to_go_on(job: Path) -> None:
    done = run(job, "--minutes", 1e-9, "--out", "my profile.json")
    assert done.exit_code == 0, done.output
    assert "0 cases measured, saved my profile.json; 13 are left" in done.stdout
    assert "to go on: nanoflow profile" in done.stdout and "--out 'my profile.json'" in done.stdout
    assert run(job, "--out", "my profile.json").exit_code == 0
    assert len(Profile.load(Path("my profile.json")).solos) == 13


def test_products_wait_for_the_kernels_of_their_part(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a CPU that says it can be split into 24 + 8."""
    found = ChoiceRun(5, frozenset({24}), ("kernels of products on 9 SMs: no",))
    asked: list[dict[str, Any]] = []

    def measure_choices(graph: Any, rows: list[int], budgets: list[int], **options: Any) -> ChoiceRun:
        asked.append({"rows": rows, "budgets": budgets, **options})
        return found

    monkeypatch.setattr(profiling_run, "lane_sms", lambda device: 32)
    monkeypatch.setattr(profiling_run, "measure_choices", measure_choices)
    arguments = (job, "--set", "model.dtype=bfloat16", "--out", "p.json")
    first = run(*arguments)
    assert first.exit_code == 0, first.output
    assert asked[0]["budgets"] == [24] and asked[0]["dtype"] == torch.bfloat16 and asked[0]["rows"]
    profile = Profile.load(Path("p.json"))
    assert {solo.op for solo in profile.solos if solo.sms == 8} == {
        "decode_attention", "rope_append", "prefill_attention"
    }  # fmt: skip
    assert not [solo for solo in profile.solos if solo.sms == 24]
    assert "not measured: kernels of products on 9 SMs: no" in first.stderr
    assert "14 are left, to go on: nanoflow profile" in first.stdout, "five kernels, nine operations"

    found = ChoiceRun(0, frozenset(), ())
    second = run(*arguments)
    assert second.exit_code == 0 and "9 cases measured" in second.stdout and "are left" not in second.stdout
    profile = Profile.load(Path("p.json"))
    assert {solo.op for solo in profile.solos if solo.sms == 24} == {
        "input_layernorm", "qkv", "rope_append", "prefill_attention", "o", "add_norm", "gate_up", "down", "add"
    }  # fmt: skip


def test_ctrl_c_keeps_what_was_measured(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure, seen = DeviceBench.solo, []

    def solo(self: DeviceBench, case: SoloCase) -> list[Point]:
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(case.op)
        return measure(self, case)

    monkeypatch.setattr(DeviceBench, "solo", solo)
    stopped = run(job, "--out", "p.json")
    assert stopped.exit_code == 130 and "10 are left, to go on: nanoflow profile" in stopped.stderr
    assert {solo.op for solo in Profile.load(Path("p.json")).solos} == set(seen)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none.yaml",), "none.yaml"),
        (("job.yaml", "--minutes", "0"), "--minutes 0: give more than 0"),
        (("job.yaml", "--device", "gpu"), "--device gpu: it must be auto, cpu, cuda or cuda:N"),
        (("job.yaml", "--out", "job.yaml/below"), "job.yaml/below: the profile cannot be"),
        (("job.yaml", "--out", "foreign.json"), "gpu: measured with Made Up, here cpu"),
        (("foreign.json", "--minutes", "3"), "--minutes: foreign.json is a profile, which is only shown"),
        (("damaged.json",), "damaged.json: not a profile, or damaged"),
        (("job.yaml", "--out", "damaged.json"), "damaged.json: not a profile, or damaged"),
        (("empty.json", "--plot", "x"), "has no measurement yet"),
    ],
)
def test_a_mistake_is_one_message(job: Path, arguments: tuple[str, ...], message: str) -> None:
    made = filled(job.parent, solo_cases())
    made.save(Path("foreign.json"))
    replace(made, solos=()).save(Path("empty.json"))
    Path("damaged.json").write_text("{}")
    done = run(*arguments)
    assert done.exit_code == 2 and message in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("error:") == 1


def test_pairs_and_parts_are_shown_and_drawn(tmp_path: Path) -> None:
    profile = filled(tmp_path, [*solo_cases((None, 116, 100, 32)), *pair_cases()], MadeUpBench())
    profile.save(tmp_path / "made.json")
    shown = run(tmp_path / "made.json")
    assert shown.exit_code == 0 and "100 + 32" in shown.stdout and "80% / 90%" in shown.stdout
    saved = plot_profile(profile, "made", tmp_path / "pictures")
    assert [path.name for path in saved] == ["made.sms.png", "made.sms.svg", "made.beside.png", "made.beside.svg"]
    again = plot_profile(profile, "made", tmp_path / "again")
    assert [path.read_bytes() for path in saved] == [path.read_bytes() for path in again]


def test_the_cases_of_a_job_are_the_sizes_of_its_batches() -> None:
    cases = job_cases(LLAMA, MIXES, max_model_len=8192, kv_tokens=450_000, sms=132, streams=True)
    assert len(cases) == len(set(cases))
    solos = {(case.op, case.sms): case.at for case in cases if isinstance(case, SoloCase)}
    assert set(solos["down", 100]) >= {(512,), (640,), (1024,), (1152,)} and len(solos["down", 100]) <= 10
    assert set(solos["down", None]) >= {*solos["down", 100], (8,), (64,)}
    assert (551, 768) in solos["decode_attention", 32] and (551, 1536) not in solos["decode_attention", 32]
    assert ("decode_attention", 100) not in solos and ("down", 32) not in solos and ("lm_head", 100) not in solos
    assert max(solos["prefill_attention", 100]) == (512, 0) and ("rope_append", 32) in solos
    assert max(solos["lm_head", None]) == (553,)
    pairs = {(case.op, case.sms, case.other_sms) for case in cases if isinstance(case, PairCase)}
    assert {op for op, _, _ in pairs} == {"qkv", "o", "gate_up", "down", "prefill_attention"}
    assert {("down", 100, 32), ("down", None, None)} <= pairs
    whole = job_cases(LLAMA, MIXES, max_model_len=8192, kv_tokens=450_000, sms=None, streams=False)
    assert whole == [case for case in cases if isinstance(case, SoloCase) and case.sms is None]
    shared = job_cases(LLAMA, MIXES, max_model_len=8192, kv_tokens=450_000, sms=None, streams=True)
    assert shared == [*whole, *(case for case in cases if isinstance(case, PairCase) and case.sms is None)]
    # The whole device comes first: what every plan needs.
    assert cases[: len(whole)] == whole


def test_a_job_of_one_kind_of_rows_has_no_cases_of_the_other() -> None:
    decoding = job_cases(LLAMA, [mix(100, 500, (), 128)], max_model_len=8192, kv_tokens=10**6, sms=132, streams=True)
    assert not {case.op for case in decoding} & {"prefill_attention"}
    reading = job_cases(LLAMA, [mix(0, 1, (512,), 512)], max_model_len=600, kv_tokens=10**6, sms=132, streams=True)
    assert not {case.op for case in reading} & {"decode_attention"}
    tiny = part_rows([mix(1, 5, (), 1), mix(3, 5, (), 3)])
    assert tiny and min(tiny) >= 1 and max(tiny) == 3


@pytest.fixture
def bench() -> Any:
    path = str(Path(__file__).parents[2] / "configs" / "models" / "tiny-llama")
    model = few_layers(open_model(ModelSection(path=path, weights="random"), EngineSection(device="cpu")))
    assert model.graph.layers == 2
    sizes = {"rows": ((9,), (40,)), "decode": ((3, 20), (6, 90)), "prefill": ((30, 0), (16, 50))}
    ops = (*model.graph.prologue, *model.graph.layer, *model.graph.epilogue)
    cases = [SoloCase(op.name, axes_of(op), None, sizes[axes_of(op)]) for op in ops]
    made = DeviceBench(model, cases, 16, lambda: None, QUICK)
    yield made, cases
    made.close()


def test_every_operation_is_measured_as_a_run_launches_it(bench: tuple[DeviceBench, list[SoloCase]]) -> None:
    measuring, cases = bench
    for case in cases:
        points = measuring.solo(case)
        assert [point.at for point in points] == list(case.at)
        assert all(point.seconds > 0 and point.joules is None for point in points)
    with pytest.raises(Unmeasurable, match="on a GPU alone"):
        measuring.pair(PairCase("qkv", (9,), None, "decode_attention", (3, 20), None))


def test_sizes_that_do_not_fit_the_memory_are_left_out(bench: tuple[DeviceBench, list[SoloCase]]) -> None:
    measuring, _ = bench
    points = measuring.solo(SoloCase("decode_attention", "decode", None, ((4, 30), (400, 300))))
    assert [point.at for point in points] == [(4, 30)]
    with pytest.raises(Unmeasurable, match="KV tokens, and"):
        measuring.solo(SoloCase("decode_attention", "decode", None, ((400, 300),)))


def test_what_is_launched_is_the_operation_on_its_rows(bench: tuple[DeviceBench, list[SoloCase]]) -> None:
    measuring, _ = bench
    buffers = measuring._bound.buffers
    with torch.inference_mode():
        first, second = measuring._calls("down", (9,), None)
        before = buffers["down"].clone()
        first()
        one = buffers["down"].clone()
        second()
    assert not torch.equal(one[:9], before[:9]) and torch.equal(one[9:], before[9:])
    assert not torch.equal(one[:9], buffers["down"][:9]), "the layers have weights of their own"
    other = measuring._calls("down", (9,), None, lane=1)
    kept = buffers["down"].clone()
    with torch.inference_mode():
        other[0]()
    assert torch.equal(buffers["down"], kept), "two lanes have buffers of their own"


class MadePartition:
    """Two parts whose streams are their names."""

    made: ClassVar[list["MadePartition"]] = []

    def __init__(self, sms: list[int], device: torch.device) -> None:
        if min(sms) < 2:
            raise PartitionError("4 SMs cannot be split into 3 + 1")
        self.sms, self.streams, self.open = sms, ("first", "second"), True
        MadePartition.made.append(self)

    def close(self) -> None:
        self.open = False


def test_a_pair_runs_on_its_parts_and_gives_them_back(
    bench: tuple[DeviceBench, list[SoloCase]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stand-ins for all that takes a GPU."""
    measuring, _ = bench
    captured: list[tuple[Any, ...]] = []

    def capture(calls: list[Any], device: torch.device, stream: Any) -> Any:
        contexts = [call.args[0] for call in calls]
        captured.append((stream, contexts[0].sms, contexts[0].lane, len(contexts), contexts[0].buffers))
        return SimpleNamespace(run_for=lambda seconds, record: None, timing=lambda: SimpleNamespace(median_ms=2.0))

    def together(first: Any, second: Any, seconds: float) -> tuple[float, float]:
        assert MadePartition.made[-1].open
        return 2.5, 1.9

    MadePartition.made.clear()
    monkeypatch.setattr(measuring, "_model", replace(measuring._model, device=torch.device("cuda")))
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(device_bench, "Partition", MadePartition)
    monkeypatch.setattr(device_bench, "capture", capture)
    monkeypatch.setattr(device_bench, "time_together", together)
    kept = measuring.pair(PairCase("qkv", (9,), 3, "down", (40,), 2))
    assert kept == (pytest.approx(0.8), 1.0), "nothing is faster beside something than alone"
    assert [each[:4] for each in captured] == [("first", 3, "first", 2), ("second", 2, "second", 2)]
    assert captured[0][4] is not captured[1][4]
    assert [(made.sms, made.open) for made in MadePartition.made] == [([3, 2], False)]
    with pytest.raises(Unmeasurable, match=r"cannot be split into 3 \+ 1"):
        measuring.pair(PairCase("qkv", (9,), 3, "down", (40,), 1))

    def fails(first: Any, second: Any, seconds: float) -> tuple[float, float]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(device_bench, "time_together", fails)
    with pytest.raises(Unmeasurable, match="out of memory"):
        measuring.pair(PairCase("qkv", (9,), 3, "down", (40,), 2))
    assert not any(made.open for made in MadePartition.made)


def test_kernels_are_chosen_for_what_was_not_measured_until_the_time_is_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = {"gpu": "CPU", "sms": 4}
    monkeypatch.setattr(gemm_choices, "machine", lambda device: here)
    monkeypatch.setattr(gemm_choices, "measure_choice", lambda case, bench: (Choice("triton", None, 1.0, 2.0), ""))
    told: list[tuple[str, int]] = []
    arguments: dict[str, Any] = {
        "device": torch.device("cpu"), "dtype": torch.bfloat16,
        "progress": lambda case, left: told.append((str(case), left)),
    }  # fmt: skip
    none = gemm_choices.measure_choices(LLAMA, [512, 640], [3, 2], until=0.0, **arguments)
    assert none == ChoiceRun(16, frozenset({3, 2}), ()) and not told
    all_of_it = ChoiceRun(0, frozenset(), ())
    assert gemm_choices.measure_choices(LLAMA, [512], [3], until=float("inf"), **arguments) == all_of_it
    assert [number for _, number in told] == [4, 3, 2, 1]
    assert {name.split()[0] for name, _ in told} == {"qkv", "o", "gate_up", "down"}
    # The time is up after six more: one part is finished, the other is not.
    ticks = count()
    monkeypatch.setattr(gemm_choices, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    some = gemm_choices.measure_choices(LLAMA, [512, 640], [3, 2], until=8, **arguments)
    assert some == ChoiceRun(6, frozenset({2}), ()) and len(told) == 10
    assert gemm_choices.measure_choices(LLAMA, [512, 640], [3, 2], until=float("inf"), **arguments) == all_of_it
    assert len(told) == 16
    stored = Choices.load(gemm_choice.choice_file(gemm_choice.choice_folders()[0], "CPU"), here)
    assert set(stored.by_key[6144, 4096, 3, "bfloat16", False]) == {512, 640}


@dataclass
class Event:
    """A moment of a device's clock that the test sets, in milliseconds."""

    at: float = 0.0

    def record(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: "Event") -> float:
        return other.at - self.at


class Stream:
    def wait_event(self, event: Event) -> None: ...


@dataclass
class Made:
    """Replays of `calls` calls that take `alone` milliseconds outside of the other's time and `beside` in it."""

    begin: float
    alone: float
    beside: float
    calls: int
    busy: tuple[float, float]
    stream: Stream

    def wait(self) -> None: ...

    def freshen(self, done: int) -> None: ...

    def launch(self) -> tuple[Event, Event]:
        start = self.begin
        inside = self.busy[0] <= start < self.busy[1]
        self.begin += self.beside if inside else self.alone
        return Event(start), Event(self.begin)


def test_what_runs_while_the_other_does_is_what_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = count()
    monkeypatch.setattr(timing, "_event", Event)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    # Each is launched 400 times. The first runs from 0 to 1,000 ms, the second from 300 to 700: there, the first takes
    # 4 ms in place of 2.
    first = Made(0.0, 2.0, 4.0, 2, (300.0, 700.0), Stream())
    second = Made(300.0, 1.0, 1.0, 5, (0.0, 2000.0), Stream())
    found = timing.time_together(first, second, 50.5)  # type: ignore[arg-type]
    assert (first.begin, second.begin) == (1000.0, 700.0)
    assert found == (pytest.approx(2.0), pytest.approx(0.2))
    # So often, whatever the time: what other processes take part in.
    first, second = Made(0.0, 2.0, 4.0, 2, (0.0, 90.0), Stream()), Made(0.0, 9.0, 9.0, 1, (0.0, 1e9), Stream())
    found = timing.time_together(first, second, 0.0, 10)  # type: ignore[arg-type]
    assert second.begin == 90.0 and first.begin >= 90.0
    assert found == (pytest.approx(2.0), pytest.approx(9.0))
