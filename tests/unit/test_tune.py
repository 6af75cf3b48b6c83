"""``nanoflow tune``: rounds on a CPU, what is stored of them, and how the command ends."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner, Result

from nanoflow import plan_recheck as recheck_module
from nanoflow.cli import app
from nanoflow.config import RunConfig, load_config
from nanoflow.config_schema import PipelineSection
from nanoflow.errors import OutOfMemoryError
from nanoflow.loading import build_engine, open_model
from nanoflow.pipeline.cuda_executor import CudaExecutor
from nanoflow.pipeline.partitions import PartitionError
from nanoflow.pipeline.plan import FrozenMapping, Plan
from nanoflow.plans import running as running_module
from nanoflow.plans.job_mixes import JobMixes, WeightedMix
from nanoflow.plans.stored import judge_stored
from nanoflow.search.fingerprint import Fingerprint
from nanoflow.search.journal import Journal
from nanoflow.search.measure import compare
from nanoflow.search.mix import Mix
from nanoflow.search.store import StoredPlan, plan_folders, store_plan, stored_plans
from nanoflow.search.tuner import Outcome, PlanSearch
from nanoflow.tuning import rounds as rounds_module, tune as tune_module
from nanoflow.tuning.job import TuningJob, deal, open_job, plan_mix
from nanoflow.tuning.progress import TuneProgress
from nanoflow.tuning.report import print_outcome
from nanoflow.tuning.rounds import Blocks, Final, MixRounds, Stopped
from nanoflow.tuning.tune import TuneOutcome, tune, winner
from nanoflow.weights import ModelWeights, load_weights
from tests.unit.tiny_model import save_tiny_llama

SHORT = Blocks(0.002, 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def file(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job whose batches are cut: 160 rows of decoding and prompts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "job.yaml"
    path.write_text(
        f"model: {{path: {model}, weights: random}}\n"
        "workload: {synthetic: {input_len: 24, output_len: 12, requests: 120, seed: 0}}\n"
        "engine: {device: cpu, max_batch_tokens: 160, max_running: 64}\n"
        "output: {path: out.jsonl}\n"
    )
    return path


@pytest.fixture
def config(file: Path) -> RunConfig:
    return load_config(file)


@pytest.fixture
def job(config: RunConfig, tmp_path: Path) -> TuningJob:
    return open_job(config, None, tmp_path)


def rounds_of(job: TuningJob, **changes: Any) -> MixRounds:
    model, mix = job.model, job.mixes.mixes[0]
    weights = load_weights(model.graph, model.checkpoint, model.dtype, model.device, "random")
    return MixRounds(model, weights, mix.mix, job.rows(mix)[1], job.here.page_size or 64, **changes)


def candidates(job: TuningJob, count: int = 3) -> list[Plan]:
    plans = PlanSearch(job.target(job.mixes.mixes[0]))
    return [candidate.plan for candidate in plans.propose(count)]


def own_plans() -> list[StoredPlan]:
    """Those that were stored here, without what the package ships."""
    return [each for each in stored_plans() if not each.shipped]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["tune", *arguments])


# Rounds


def test_a_round_measures_every_plan_beside_the_sequential_one(job: TuningJob) -> None:
    plans = candidates(job)
    with rounds_of(job) as rounds:
        outcomes = rounds.measure(plans, SHORT)
        finals = rounds.compare(plans[:2], SHORT)
    assert len(plans) == len(outcomes) == 3
    for outcome in outcomes:
        assert outcome.ratio is not None and outcome.ratio > 0
        assert set(outcome.figures) == {"iteration_ms", "sequential_ms"}
    assert [final.plan for final in finals] == plans[:2]
    assert all(len(final.ratios) == SHORT.pairs and final.joules is None for final in finals)


def test_a_plan_with_wrong_outputs_fails_and_is_not_timed(job: TuningJob, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[set[str]] = []

    def wrong(executor: Any, base: Any, other: Any) -> float:
        return {0: 0.0, 1: 0.001, 2: float("nan"), 3: 0.2}[other.program]

    def noted(executor: Any, batches: dict[str, Any], **options: Any) -> Any:
        timed.append(set(batches))
        return compare(executor, batches, **options)

    monkeypatch.setattr(rounds_module, "output_error", wrong)
    monkeypatch.setattr(rounds_module, "compare", noted)
    with rounds_of(job) as rounds:
        right, nan, far = rounds.measure(candidates(job), SHORT)
        finals = rounds.compare(candidates(job), SHORT)
    assert right.ratio and not right.why
    assert nan.ratio is None and far.ratio is None and far.why == "its outputs are 2e-01 from the sequential plan's"
    assert timed[0] == {"sequential", "0"} and len(finals) == 1


def test_a_plan_that_does_not_fit_fails_alone(job: TuningJob, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = candidates(job, 4)
    made: list[int] = []
    make = rounds_module.measuring_executor

    def full(model: Any, asked: Sequence[Plan], *arguments: Any, **options: Any) -> Any:
        made.append(len(asked) - 1)
        if plans[2] in asked:
            raise OutOfMemoryError("does not fit\nand more")
        assert options["caches"] and options["weights"] is not None, "they are loaded once"
        return make(model, asked, *arguments, **options)

    monkeypatch.setattr(rounds_module, "measuring_executor", full)
    with rounds_of(job) as rounds:
        outcomes = rounds.measure(plans, SHORT)
        finals = rounds.compare(plans[1:3], SHORT)
    assert [outcome.ratio is not None for outcome in outcomes] == [True, True, False, True]
    assert outcomes[2].why == "does not fit" and made[:5] == [4, 2, 2, 1, 1]
    assert [final.plan for final in finals] == [plans[1]]


def test_a_mix_that_does_not_fit_says_so(job: TuningJob, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(rounds_module, "random_caches", full)
    with pytest.raises(OutOfMemoryError, match=r"the KV cache of .* does not fit the device"), rounds_of(job):
        pass


def test_a_stop_is_seen_between_two_blocks(job: TuningJob) -> None:
    asked = 0

    def stopping() -> bool:
        nonlocal asked
        asked += 1
        return asked == 6

    with pytest.raises(Stopped), rounds_of(job, stopping=stopping) as rounds:
        rounds.measure(candidates(job), SHORT)
    assert asked == 6, "before the round, its outputs and its blocks, then after each block"


# What is decided


def final(*ratios: float) -> Final:
    return Final(Plan(1, (), ()), ratios, 1.0, 1.0, None, None)


def test_a_plan_wins_by_one_per_cent_and_in_every_pair() -> None:
    best, slower = final(1.02, 1.03, 1.04), final(1.01, 1.015, 1.02)
    assert winner([slower, best]) is best
    assert winner([slower, final(0.99, 1.05, 1.06)]) is slower, "a pair was lost"
    assert winner([final(1.009, 1.009, 1.02), final(0.9, 1.0, 1.0)]) is None
    assert winner([]) is None


def weighted(*weights: float, near: float = 0.0) -> list[WeightedMix]:
    return [WeightedMix(Mix(10, 20, (30,)), weight, 40.0, 40, near) for weight in weights]


def test_minutes_are_dealt_by_weight_and_light_mixes_get_none() -> None:
    assert deal(600, weighted(0.6, 0.3, 0.1), 45) == pytest.approx([360, 180, 60])
    assert deal(600, weighted(0.6, 0.35, 0.05), 45) == pytest.approx([600 * 0.6 / 0.95, 600 * 0.35 / 0.95, 0])
    assert deal(10, weighted(0.6, 0.4), 45) == [10, 0], "the heaviest always gets some"


def test_what_it_is_worth_counts_the_batches_that_run_the_plan() -> None:
    mixes = weighted(0.8, 0.2, near=0.5)
    results = (
        tune_module.MixResult(mixes[0], 9, final(1.25), Path("a.yaml"), won=True),
        tune_module.MixResult(mixes[1], 4, final(1.5, 0.9), Path("b.yaml"), won=False),
    )
    here = Fingerprint(model="tiny", gpu="cpu")
    found = TuneOutcome(here, JobMixes(tuple(mixes), 1, 1.0, 1.0, "whole"), results, Path(), ("broken",))
    assert found.gain == pytest.approx(1 / (0.5 + 0.5 / 1.25))
    console = Console(width=120)
    with console.capture() as capture:
        print_outcome(found, console)
    text = capture.get()
    assert "the whole job: 1.111 times as fast as in sequence; plans serve 50% of its time" in text
    assert re.search(r"1 +80% +9 .* 1\.250 +1\.250 +1\.250 +plan", text), text
    assert "1  10 decode rows of context 20 + 30 prompt rows: a.yaml" in text
    assert re.search(r"2 .* 20% +4 .* 1\.200 +0\.900 +1\.500 +sequential", text) and "given up: broken" in text


# Whole runs on a CPU


def measured_as(monkeypatch: pytest.MonkeyPatch, ratio: float) -> None:
    """A device on which every plan is `ratio` times as fast as the sequential one."""

    def fake(executor: Any, batches: dict[str, Any], *, pairs: int, **options: Any) -> Any:
        return SimpleNamespace(
            ratios=lambda base, name: [ratio] * pairs,
            seconds=lambda name: 0.01 if name == "sequential" else 0.01 / ratio,
            joules=lambda name: 2.0,
        )

    monkeypatch.setattr(rounds_module, "compare", fake)


def test_what_wins_is_stored_with_what_was_measured(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    measured_as(monkeypatch, 1.05)
    outcome = tune(config, minutes=0.02, trials=6, seed=3)
    result = outcome.results[0]
    assert result.won and result.measured == 6 and result.ratio == pytest.approx(1.05)
    (stored,) = [each for each in own_plans() if each.file == result.stored]
    plan = stored.plan
    assert plan is not None and len(plan.nano_batches) > 1 and plan.mix == plan_mix(result.mix.mix)
    assert plan.measured["ratio"] == 1.05 and plan.measured["iteration_ms"] == pytest.approx(10 / 1.05, abs=1e-3)
    assert plan.measured["joules_per_token"] == pytest.approx(2.0 / result.mix.mix.rows, abs=1e-6)
    assert plan.least_rows <= result.mix.mix.rows <= plan.capacity and plan.gpu == "cpu"
    assert plan.fingerprint["torch"] == torch.__version__.split("+")[0]
    # The next search has to beat it, also with other plans.
    compared: list[int] = []
    monkeypatch.setattr(MixRounds, "compare", lambda self, plans, blocks: compared.append(len(plans)) or [])
    tune(config, minutes=0.02, trials=6, seed=4)
    assert compared[0] in (2, 3)


def test_sequential_is_stored_where_nothing_wins(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    measured_as(monkeypatch, 1.005)
    outcome = tune(config, minutes=0.02, trials=4)
    result = outcome.results[0]
    assert not result.won and result.ratio == 1.0 and result.final is not None
    (stored,) = [each for each in own_plans() if each.file == result.stored]
    assert stored.plan is not None and len(stored.plan.nano_batches) == 1
    assert stored.ratio == 1.0 and stored.plan.mix == plan_mix(result.mix.mix)
    assert outcome.gain == 1.0


def test_wrong_outputs_are_never_stored(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    measured_as(monkeypatch, 2.0)
    monkeypatch.setattr(rounds_module, "output_error", lambda executor, base, other: float(other.program > 0))
    outcome = tune(config, minutes=0.02, trials=4)
    assert not any(result.won for result in outcome.results)
    assert outcome.failures == ("its outputs are 1e+00 from the sequential plan's",)


def test_tuning_on_a_cpu_from_the_command_line(file: Path) -> None:
    result = run(str(file), "--minutes", "0.03", "--trials", "3", "--out", "kept")
    assert result.exit_code == 0, result.output
    assert re.search(r"mix 1 of \d, \d+% of the job: \d+ decode rows", result.output)
    assert "tuned: " in result.output and "plans measured" in result.output
    assert "the whole job" in result.output and "\x1b" not in result.output
    journals = [*Path("kept").glob("*.journal")]
    assert journals and own_plans()
    assert json.loads(next(iter(Path("kept").glob("*.json"))).read_text())["flops"] > 0
    # The next start measures no plan again, and can say all that earlier ones have measured.
    again = run(str(file), "--minutes", "0.03", "--trials", "3", "--out", "kept", "--record", "found/it.json")
    assert again.exit_code == 0 and sorted(Path("kept").glob("*.journal")) == sorted(journals)
    record = json.loads(Path("found/it.json").read_text())
    first = record["mixes"][0]
    assert len(first["steps"]) == 3 and first["rows"] >= sum(first["mix"]["prompts"]) + first["mix"]["decode"]
    told = [trial for trial in Journal(journals[0]).trials if trial.value != 1.0 or "iteration_ms" in trial.user_attrs]
    assert {step["plan"] for mix in record["mixes"] for step in mix["steps"]} >= {t.user_attrs["plan"] for t in told}
    assert all(step["figures"]["iteration_ms"] > 0 for step in first["steps"] if step["ratio"])
    assert "saved found/it.json" in again.output and Path("found/it.png").stat().st_size > 10_000
    assert Path("found/it.svg").read_text().startswith("<?xml")


def test_ctrl_c_keeps_what_was_measured_and_says_how_to_go_on(file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nanoflow", "tune", str(file), "--minutes", "1", "--out", str(tmp_path / "kept")]
    process = subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A terminal's program takes SIGINT; what a script starts in the background would ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if "plans measured" in line:
                break
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGINT, errors
    assert f"to go on: nanoflow tune {file} --minutes 1" in errors and "Traceback" not in errors
    assert "tuned: " in output
    assert any(len(Journal(path).trials) > 1 for path in (tmp_path / "kept").glob("*.journal"))
    assert not own_plans(), "no last comparison was made"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "--device tpu: it must be auto, cpu, cuda or cuda:N"),
        (["--gpu", "x"], "--gpu x: it is what --simulate estimates; use --device"),
        (["--simulate", "--gpu", "x"], "--gpu x: nothing is known of it; give NVIDIA H100"),
        (["--simulate", "--gpu", "nvidia"], "--gpu nvidia: nothing is known of it; give NVIDIA H100"),
        (["--simulate", "--device", "cpu"], "--device cpu: --simulate runs on no device; use --gpu"),
        (["--out", "job.yaml"], "job.yaml"),
        (["--record", "found.txt"], "--record found.txt: give a name that ends in .json"),
        (["--record", "found.json", "--simulate"], "--record found.json: --simulate measures nothing; use --out"),
    ],
)
def test_mistakes_are_one_message(file: Path, arguments: list[str], message: str) -> None:
    result = run(str(file), *arguments)
    assert result.exit_code == 2 and result.output.startswith("error: "), result.output
    assert message in result.output and "Traceback" not in result.output


def test_simulating_saves_and_draws_the_best_and_stores_nothing(file: Path, tmp_path: Path) -> None:
    file.write_text(file.read_text().replace("device: cpu", "device: cuda, page_size: 64"))
    result = run(str(file), "--simulate", "--trials", "4", "--out", "best")
    assert result.exit_code == 0, result.output
    assert "plans estimated for NVIDIA H100 80GB HBM3; nothing was measured" in result.output
    plan = Plan.load(Path("best/mix-1-plan-01.yaml"))
    assert plan.gpu == "NVIDIA H100 80GB HBM3" and plan.mix is not None and not plan.measured
    assert Path("best/mix-1-best.png").stat().st_size > 10_000
    assert not own_plans() and not (tmp_path / "cache" / "nanoflow" / "tuning").exists()


# A plan that was tuned with other versions


@pytest.fixture
def doubtful(job: TuningJob, config: RunConfig) -> RunConfig:
    """The job, with a plan stored for its mix under an older torch."""
    mix = job.mixes.mixes[0]
    (plan,) = candidates(job, 1)
    plan = replace(plan, mix=plan_mix(mix.mix), least_rows=1, measured=FrozenMapping({"ratio": 1.04}))
    store_plan(plan, replace(job.here, torch="1.0"))
    return config.model_copy(update={"pipeline": PipelineSection(plan="auto")})


def engine_of(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """How many plans the job's engine has, and what was said."""
    model = open_model(config.model, config.engine)
    engine = build_engine(model, config.engine, config.pipeline, weights="random")
    try:
        return len(engine.executor.programs), capsys.readouterr().err
    finally:
        engine.close()


@pytest.mark.parametrize("ratio", [1.02, 0.98])
def test_a_plan_in_doubt_is_measured_again_once(
    doubtful: RunConfig, ratio: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compared: list[set[str]] = []

    def fake(executor: Any, batches: dict[str, Any], **options: Any) -> Any:
        compared.append(set(batches))
        return SimpleNamespace(ratios=lambda base, own: [ratio] * 3)

    monkeypatch.setattr(recheck_module, "compare", fake)
    used = ratio >= 1
    count, said = engine_of(doubtful, capsys)
    assert count == 1 + used and len(compared) == 1
    assert "measured with torch 1.0, here" in said
    assert f"measured again, {ratio:.3f} times as fast as in sequence; it is {'' if used else 'not '}used" in said
    count, said = engine_of(doubtful, capsys)
    assert count == 1 + used and len(compared) == 1, "the answer is kept"
    assert "measured with torch 1.0" not in said
    assert (f"measured again here, it was {ratio:g} times" in said) is not used
    assert own_plans()[0].ratio == 1.04, "with the versions of old it is as good as it was"
    (verdict,) = [each for each in judge_stored(doubtful)[1] if not each.stored.shipped]
    assert not verdict.doubts and bool(verdict.against) is not used


def test_a_plan_in_doubt_whose_outputs_are_wrong_does_not_run(
    doubtful: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recheck_module, "output_error", lambda executor, base, own: 1.0)
    count, said = engine_of(doubtful, capsys)
    assert count == 1 and "its outputs are wrong; it is not used" in said


def test_a_plan_in_doubt_is_measured_on_the_engines_own_executor(
    doubtful: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recheck_module, "SECONDS", 0.01)
    _, said = engine_of(doubtful, capsys)
    assert re.search(r"measured again, \d\.\d{3} times as fast as in sequence", said)
    small = doubtful.model_copy(update={"engine": doubtful.engine.model_copy(update={"max_running": 2})})
    Path(plan_folders()[0] / "measured-again.json").write_text("damaged")
    count, said = engine_of(small, capsys)
    assert count == 2 and "does not fit this run, so it is not measured again; it is used" in said


def test_a_run_takes_no_plan_where_sequence_was_the_fastest(
    job: TuningJob, config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    mix, rows = job.mixes.mixes[0], job.rows(job.mixes.mixes[0])[1]
    plan = Plan.sequential(job.model.graph, rows)
    store_plan(replace(plan, mix=plan_mix(mix.mix), measured=FrozenMapping({"ratio": 1.0})), job.here)
    count, said = engine_of(config.model_copy(update={"pipeline": PipelineSection(plan="auto")}), capsys)
    assert count == 1 and "plan: sequential, which was measured to be the fastest for" in said


def test_only_who_names_auto_is_told_that_nothing_is_stored(
    config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert config.pipeline.plan == "auto" and engine_of(config, capsys) == (1, "")
    named = config.model_copy(update={"pipeline": PipelineSection(plan="auto")})
    count, said = engine_of(named, capsys)
    assert count == 1 and re.fullmatch(r"plan: sequential, since none is stored for \S+ on cpu\n", said)


# What only a GPU has, with stand-ins


def test_rounds_run_on_the_executor_of_a_gpu(job: TuningJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its launches and padding, on a CPU, whose kernels cannot be captured: the mix's rows are padded to the plans'
    capacity."""
    made: list[CudaExecutor] = []
    rows = job.rows(job.mixes.mixes[0])[1]

    def on_cuda(programs: Any, weights: Any, kv: Any, **sizes: Any) -> CudaExecutor:
        made.append(CudaExecutor(programs, weights, kv, row_buckets=[rows], graphs=False, **sizes))
        return made[-1]

    monkeypatch.setattr(running_module, "ReferenceExecutor", on_cuda)
    with rounds_of(job) as rounds:
        outcomes = rounds.measure(candidates(job), SHORT) + rounds.measure(candidates(job, 1), SHORT)
    assert all(outcome.ratio is not None for outcome in outcomes), outcomes
    assert len(made) == 2 and made[0].cut.buckets(0) == (rows,)
    assert all(first is second for first, second in zip(made[0].bound.kv, made[1].bound.kv, strict=True))


def test_a_split_that_the_gpu_refuses_is_tried_once_and_fails_its_plans(
    job: TuningJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[int, ...]] = []
    measured: list[int] = []

    class Refusing:
        def __init__(self, parts: tuple[int, ...], device: torch.device) -> None:
            tried.append(parts)
            if parts == (100, 32):
                raise PartitionError("100 + 32 SMs cannot be had")

        def close(self) -> None:
            pass

    def round_of(self: MixRounds, plans: Sequence[Plan], blocks: Blocks) -> list[Outcome]:
        measured.append(len(plans))
        return [Outcome(1.0) for _ in plans]

    monkeypatch.setattr(rounds_module, "unavailable", lambda device: None)
    monkeypatch.setattr(rounds_module, "Partition", Refusing)
    monkeypatch.setattr(MixRounds, "_round", round_of)
    monkeypatch.setattr(rounds_module, "EnergyMeter", lambda device, count: SimpleNamespace(joules=lambda: None))
    (plan,) = candidates(job, 1)
    plans = [replace(plan, sms=132, partitions=FrozenMapping({"split": parts})) for parts in ((100, 32), (104, 28))]
    model = replace(job.model, device=torch.device("cuda"))
    mix = job.mixes.mixes[0].mix
    rounds = MixRounds(model, ModelWeights([], {}), mix, mix.rows, 128)
    for _ in range(2):
        refused, right = rounds.measure(plans, SHORT)
        assert refused == Outcome(None, "100 + 32 SMs cannot be had") and right.ratio == 1.0
    assert tried == [(100, 32), (104, 28)] and measured == [1, 1]


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere() -> None:
    shown = {}
    for terminal in (True, False):
        console = Console(force_terminal=terminal, width=100)
        with console.capture() as capture, TuneProgress(console) as progress:
            progress.begin("mix 1 of 2", 60)
            progress.show(0, None)
            progress.show(12, 1.0437)
            progress.show(12, 1.0437, "last comparison")
        shown[terminal] = capture.get()
    assert "12 plans measured, best 1.044, last comparison" in shown[True] and "\x1b" in shown[True]
    lines = shown[False].splitlines()
    assert lines[0] == "mix 1 of 2" and re.fullmatch(r"  0 plans measured, (1 min 00|\d+) s left", lines[1])
    assert lines[3] == "  12 plans measured, best 1.044, last comparison" and "\x1b" not in shown[False]
    with Console().capture() as capture, TuneProgress(quiet=True) as progress:
        progress.begin("mix", 1)
        progress.show(1, 1.0)
