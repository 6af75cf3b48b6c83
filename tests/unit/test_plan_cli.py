"""``nanoflow plan``: what each command shows and saves, and how it ends on a mistake."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from nanoflow.cli import app
from nanoflow.ops.graph import Graph
from nanoflow.pipeline.plan import FrozenMapping, Plan
from nanoflow.pipeline.plan_mix import PlanMix
from nanoflow.pipeline.program import Program, compile_program
from nanoflow.plans import case as case_module, check as check_module
from nanoflow.plans.case import open_case
from nanoflow.plans.check import derived_waits, random_mixes
from nanoflow.plans.chrome_trace import TraceInfo, read_trace, write_trace
from nanoflow.search.fingerprint import Fingerprint
from nanoflow.search.mix import Mix, mix_works
from nanoflow.search.store import store_plan

SHAPES = Path(__file__).parents[2] / "configs" / "models"
PLANS = Path(__file__).parents[1] / "models" / "plans"
EXAMPLE = """\
model: llama-3-8b
gpu: NVIDIA H100 80GB HBM3
sms: 132
capacity: 1280
nano_batches:
  a: {decode: 0.5, prefill: 0.5, rows: 640}
  b: {decode: 0.5, prefill: 0.5, rows: 640}
partitions:
  split: [92, 40]
period:
- split:
    compute: [o.a, gate_up.a, down.a, qkv.a@1, o.b, gate_up.b, down.b, qkv.b@1]
    memory: [decode_attention.b, decode_attention.a@1]
mix: {decode: 600, prefill: 500, context: 700}
measured: {ratio: 1.02}
"""
SHOWN = """\
tuned.yaml for llama-3-8b on NVIDIA H100 80GB HBM3: at most 1,280 rows

nano-batch  decode  prompts  rows  here
a           1/2     1/2      640   300 decode + 250 prompt rows
b           1/2     1/2      640   300 decode + 250 prompt rows

stages     split: compute 92, memory 40 of 132 SMs
mix        600 decode rows of context 700 and 500 prefill rows
measured   ratio: 1.02

split, layer 1
  compute 92 SMs |o.a|an.a|gate_up.a|down.a|add.a|il.a@1|qkv.a@1|ra.a@1|pa.a@1|o.b|an.b|gate_up.b|down.b|add.b|il.b@1|
                 <- da.a                                                      <- da.b
  memory 40 SMs  …da.b~~~~~~~~~~~~~~|                                  |da.a@1~~~~~~~~~~~~~~~~~~~|
                                                                       <- ra.a@1
"""


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tuned.yaml").write_text(EXAMPLE)
    return "tuned.yaml"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments])


def mistake(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.output.startswith("error: ") and "Traceback" not in result.output
    return result.output


def test_show_prints_the_plan_and_a_period(plan: str) -> None:
    result = run("show", plan, "--layers", "4")
    assert result.exit_code == 0, result.output
    assert result.output.startswith(SHOWN), f"\n{result.output}"
    assert max(map(len, result.output.splitlines())) <= 120
    assert "llama-3-8b, 4 layers: " in result.output and "in sequence: " in result.output
    assert re.search(
        r"under 700 W: [\d.]+ ms and [\d.]+ J; in sequence [\d.]+ ms and [\d.]+ J, [\d.]+ times", result.output
    )
    assert "600 decode rows of context 700 and prompts of 500 tokens" in result.output
    assert re.search(r"profile: \S+/llama-3-8b--nvidia-h100\S+\.json", result.output), "one ships for this model"
    assert "\x1b" not in result.output
    other = run("show", plan, "--layers", "4", "--model", "llama-2-7b").output
    assert "NVIDIA H100 80GB HBM3: 717 TFLOP/s, 3,081 GB/s, 132 SMs" in other and "profile" not in other


def test_the_documentation_shows_what_its_plan_gives(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "plans.md").read_text(encoding="utf-8")
    path = tmp_path / "tuned.yaml"
    path.write_text(page.partition("```yaml\n")[2].partition("```")[0], encoding="utf-8")
    grid = next(block for block in page.split("```") if block.startswith("\nsplit, layer "))
    assert grid in run("show", str(path)).output


@pytest.mark.parametrize("name", ["skewed.yaml", "three.yaml"])
def test_show_takes_any_model_and_mix(name: str) -> None:
    result = run(
        "show", str(PLANS / name), "--model", "tiny-llama", "--decode", "7", "--context", "9", "--prompts", "5,6"
    )
    assert result.exit_code == 0, result.output
    assert "mix: 7 decode rows of context 9 and prompts of 5, 6 tokens" in result.output
    again = run("show", str(PLANS / name), "--model", str(SHAPES / "tiny-llama"), "--decode", "0", "--prompts", "5")
    assert again.exit_code == 0 and "decode_attention" not in again.output, "it has no rows to work on"


def test_stages_have_grids_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "staged.yaml"
    period = "- split: {compute: [qkv.a, o.a], memory: [qkv.b, o.b]}\n- whole: {compute: [gate_up], memory: [down]}\n"
    path.write_text(EXAMPLE[: EXAMPLE.index("period:")] + f"period:\n{period}")
    result = run("show", str(path), "--layers", "5")
    assert result.exit_code == 0, result.output
    assert "split: compute 92, memory 40 of 132 SMs" in result.output
    assert "whole: compute, memory share the whole device" in result.output
    titles = [line for line in result.output.splitlines() if line.endswith(", layer 1")]
    assert titles == ["split, layer 1", "whole, layer 1"]
    compute = [line for line in result.output.splitlines() if line.startswith("  compute")]
    assert "qkv.a" in compute[0] and "gate_up" in compute[1] and "gate_up" not in compute[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["show", "gone.yaml"], "gone.yaml: cannot read the plan: No such file or directory"),
        (
            ["show", "tuned.yaml", "--model", "nowhere"],
            "--model nowhere: there is no such folder or file; give a folder",
        ),
        (["show", "tuned.yaml", "--layers", "33"], "--layers 33: llama-3-8b has 32; give a number from 1 to 32"),
        (["show", "tuned.yaml", "--decode", "900"], "900 decode rows and 380 prompt tokens are 1,280 rows"),
        (["show", "tuned.yaml", "--decode", "9", "--prompts", "2000"], "2,009 rows, more than the plan's capacity of"),
        (["show", "tuned.yaml", "--prompts", "5,x"], "--prompts 5,x: 'x' is no whole number"),
        (["show", "tuned.yaml", "--context", "0"], "--context 0: must be 1 or more"),
        (["show", "tuned.yaml", "--decode", "0", "--prompts", ""], "is an empty batch"),
        (["plot", "tuned.yaml", "--out", "x.pdf"], "--out x.pdf: pictures are .png or .svg"),
        (["plot", "tuned.yaml", "--trace", "t.json", "--layers", "2"], "--trace has its own mix and layers"),
        (["plot", "tuned.yaml", "--trace", "t.json"], "t.json: cannot be read: No such file"),
    ],
)
def test_a_mistake_ends_in_one_message(plan: str, arguments: list[str], expected: str) -> None:
    if "900" in arguments:  # fills what is left with prompts, which is no mistake
        assert run(*arguments, "--prompts", "380").exit_code == 0
        arguments, expected = [*arguments, "--prompts", "381"], "900 decode rows and 381 prompt tokens are 1,281 rows"
    assert expected in mistake(*arguments)


def test_a_plan_must_name_its_model_or_be_given_one(plan: str, tmp_path: Path) -> None:
    path = tmp_path / "unnamed.yaml"
    path.write_text(EXAMPLE.replace("model: llama-3-8b\n", ""))
    text = mistake("show", str(path))
    assert "unnamed.yaml: model: the plan names none; give one with --model" in text and "llama-3-8b" in text
    path.write_text(EXAMPLE.replace("model: llama-3-8b\n", "model: my-own\n"))
    assert "no shape of 'my-own' comes with NanoFlow; give --model" in mistake("show", str(path))


def test_a_plan_that_cannot_run_is_shown_with_the_fault_marked(tmp_path: Path) -> None:
    path = tmp_path / "late.yaml"
    path.write_text(EXAMPLE.replace("qkv.a@1, ", "qkv.a, "))
    text = mistake("show", str(path))
    assert "late.yaml: the period deadlocks" in text
    assert "    compute |" in text and ">>qkv.a<<" in text


def test_check_says_what_was_checked(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("check", plan)
    assert result.exit_code == 0, result.output
    found = dict(line.split(None, 1) for line in result.output.splitlines())
    assert found["SMs"] == "split: compute 92, memory 40 of 132 SMs"
    assert "5 named in the period, 5 follow" in found["coverage"]
    assert found["deadlock"] == "none: 640 nano-ops in 2 lanes have an order"
    program = open_case(plan).program
    kept = sum(len(step.waits) for step in program.steps)
    derived = derived_waits(program)
    assert (
        derived > kept > 31 and f"{derived} derived between lanes, {kept} kept; {derived - kept} rem" in found["waits"]
    )
    assert "none on 8 random mixes of 1 to 1,280 rows" in found["races"]
    assert result.output.endswith("tuned.yaml can run\n")


def test_check_takes_plans_of_several_ranks(tmp_path: Path) -> None:
    """The one of the documentation, which has its sums in a lane of their own."""
    text = (Path(__file__).parents[2] / "docs" / "plans.md").read_text(encoding="utf-8")
    period = text[: text.index("    network: [o_all_reduce.a")].rindex("```yaml\n") + len("```yaml\n")
    period_text = text[period : text.index("```", period)]
    head = EXAMPLE[: EXAMPLE.index("partitions:")].replace("sms: 132\n", "")
    path = tmp_path / "ranks.yaml"
    path.write_text(f"{head}kernels: {{o_all_reduce: nccl_8}}\n{period_text}")
    result = run("check", str(path), "--tensor", "2", "--layers", "3")
    assert result.exit_code == 0, result.output
    assert "in 2 lanes have an order" in result.output and "none on 8 random mixes" in result.output
    assert "3 layers of 12 operations" in result.output
    told = "unknown operation 'o_all_reduce'; it is there where ranks share the model: set parallel.tensor"
    assert f"kernels.o_all_reduce: {told}" in mistake("check", str(path))
    path.write_text(f"{head}{period_text}")
    assert f"network[0]: o_all_reduce.a: {told}" in mistake("check", str(path))
    text = mistake("check", str(path), "--tensor", "3")
    assert "--tensor 3: parallel.tensor: 3 ranks cannot share this model: there are 32 query heads" in text


def test_check_compares_the_plan_with_this_machine(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module, "gpu_problem", lambda index: None)

    def device(gpu: str, sms: int) -> None:
        here = Fingerprint(gpu=gpu, sms=sms, torch="9.9")
        monkeypatch.setattr(check_module, "machine_fingerprint", lambda device: here)

    device("NVIDIA H100 80GB HBM3", 132)
    assert "NVIDIA H100 80GB HBM3 with 132 SMs, as the plan says\n" in run("check", plan).output
    Path("older.yaml").write_text(EXAMPLE + "fingerprint: {torch: '1.0'}\n")
    assert "as the plan says; measured with torch 1.0, here 9.9\n" in run("check", "older.yaml").output
    device("another", 114)
    refused = mistake("check", plan, "--model", "llama-2-7b")
    assert (
        "tuned.yaml: the plan was tuned for something else than this run\n  model: tuned for llama-3-8b, here"
        in refused
    )
    assert "\n  gpu: tuned for NVIDIA H100 80GB HBM3, here another\n  sms: tuned for 132, here 114\n" in refused


def test_check_marks_a_race_in_the_grid(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(plan: Plan, graph: Graph) -> Program:
        """Compiles, and leaves out what o waits for."""
        program = compile_program(plan, graph)
        steps = [replace(step, waits=()) if step.nano_op.op == "o" else step for step in program.steps]
        return replace(program, steps=tuple(steps))

    monkeypatch.setattr(case_module, "compile_program", forgetful)
    text = mistake("check", plan)
    assert "tuned.yaml: period: a race on 1,280 decode rows of context 10: " in text
    # What waited for decode attention through o does so no longer either.
    assert "decode_attention.a layer 0 is not ordered with qkv.a layer 1, and both touch qkv (and" in text
    marked = re.findall(r">>([\w.@]+)", text)  # one that goes on past the end of the period is there at both ends
    assert set(marked) - {"da.a"} == {"qkv.a@1", "da.a@1"} and len(marked) <= 4


def test_random_mixes_are_those_that_the_plan_takes(plan: str) -> None:
    read = replace(Plan.load(plan), least_rows=700)
    mixes = random_mixes(read, 40)
    assert len(mixes) == 40 and mixes == random_mixes(read, 40) and mixes != random_mixes(read, 40, seed=1)
    assert {mix.rows for mix in mixes} <= set(range(700, 1281)) and len({mix.rows for mix in mixes}) > 20
    assert all(tokens > 0 for mix in mixes for tokens in mix.prompts)
    assert any(not mix.decode for mix in mixes) and any(mix.decode and len(mix.prompts) > 1 for mix in mixes)


def test_trace_runs_the_plan_here_and_plot_draws_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file, options = str(PLANS / "skewed.yaml"), ["--model", "tiny-llama"]
    mix = ["--decode", "9", "--context", "30", "--prompts", "7,8"]
    result = run("trace", file, *options, *mix, "--layers", "3", "--device", "cpu", "--iterations", "3")
    assert result.exit_code == 0, result.output
    assert "9 decode rows of context 30 and prompts of 7, 8 tokens on cpu: " in result.output
    assert "saved skewed.trace.json; open it with ui.perfetto.dev" in result.output
    trace = read_trace(tmp_path / "skewed.trace.json")
    case = open_case(file, "tiny-llama", layers=3)
    timeline = trace.timeline(case.program)
    assert (trace.info.layers, trace.info.iterations, trace.info.device) == (3, 3, "cpu")
    assert sum(work.decode_rows for work in trace.info.works) == 9
    assert sum(work.prefill_rows for work in trace.info.works) == 15
    assert 0 < timeline.seconds <= trace.info.seconds
    for span, before in zip(timeline.spans, case.program.predecessors, strict=True):
        assert span.end > span.start >= max((timeline.spans[index].end for index in before), default=0.0) - 1e-9
    drawn = run("plot", file, *options, "--trace", "skewed.trace.json", "--out", "measured.svg")
    assert drawn.exit_code == 0, drawn.output
    assert "more than the 4,096 of tiny-llama" in mistake("trace", file, *options, "--context", "9000")
    assert "--device gpu: it must be auto" in mistake("trace", file, *options, "--device", "gpu")


def test_list_shows_every_stored_plan_and_what_is_against_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("nanoflow.loading.device_name", lambda device: "a-device")
    with_shipped = run("list")
    assert with_shipped.exit_code == 0 and "package" in with_shipped.output
    assert "gpu: tuned for NVIDIA H100 80GB HBM3, here a-device" in with_shipped.output
    folders = tmp_path / "nanoflow" / "plans", tmp_path / "shipped"
    for module in ("search.store", "plans.stored"):
        monkeypatch.setattr(f"nanoflow.{module}.plan_folders", lambda: folders)
    job = tmp_path / "job.yaml"
    job.write_text(
        f"model: {{path: {SHAPES / 'tiny-llama'}, weights: random}}\n"
        "workload: {synthetic: {input_len: 8, output_len: 4, requests: 1}}\n"
        "engine: {device: cpu, max_batch_tokens: 64}\n"
    )
    nothing = run("list")
    assert nothing.exit_code == 0 and f"no plan is stored in {tmp_path / 'nanoflow' / 'plans'}" in nothing.output
    skewed = replace(
        Plan.load(PLANS / "skewed.yaml"), mix=PlanMix(20, 20, 128), measured=FrozenMapping({"ratio": 1.043})
    )
    here = Fingerprint(model="tiny-llama", gpu="a-device")
    fits = store_plan(skewed, replace(here, torch="0.1"))
    other = store_plan(skewed, replace(here, gpu="another", dtype="float16"))
    store_plan(replace(skewed, measured=FrozenMapping({"ratio": 1.02})), replace(here, model="another"))
    (fits.parent / "broken.yaml").write_text("capacity: [")
    for arguments, state in (([], "a-device"), ([str(job)], "tiny-llama on a-device")):
        result = run("list", *arguments)
        assert result.exit_code == 0, result.output
        title, files = result.output.partition("─")[0], result.output[result.output.index("1  /") :]
        table = result.output.removesuffix(files)
        assert f"stored plans, for {state}" in title
        assert (
            table.count("1.043") == 2
            and "1.020" in table
            and table.count("in doubt") == 1
            and table.count("damaged") == 1
        )
        assert files.startswith(f"1  {fits}\n   measured with torch 0.1, here ")
        assert f"{other}\n   gpu: tuned for another, here a-device\n" in files
        assert "broken.yaml\n   line 1, column 12: " in files
        assert ("   dtype: tuned for float16, here float32" in files) == bool(arguments)
        assert ("   model: tuned for another, here tiny-llama" in files) == bool(arguments)


def test_the_mix_of_each_nano_batch(plan: str) -> None:
    case = open_case(plan, layers=2)
    a, b = mix_works(case.plan, Mix(600, 700, (300, 380)))
    assert (a.decode_rows, a.decode_context, a.prefill_rows) == (300, 210_000, 340)
    # The second prompt is cut after 40 tokens: what is left attends to them too.
    assert a.prefill_context == 300 + 40 and b.prefill_context == 380
    assert a.prefill_pairs == 300 * 301 // 2 + 40 * 41 // 2
    assert a.prefill_pairs + b.prefill_pairs == 300 * 301 // 2 + 380 * 381 // 2


def test_plot_saves_both_pictures_and_the_same_ones_again(plan: str, tmp_path: Path) -> None:
    result = run("plot", plan, "--layers", "3")
    assert result.exit_code == 0, result.output
    assert result.output == "saved tuned.png\nsaved tuned.svg\n"
    assert (tmp_path / "tuned.png").read_bytes().startswith(b"\x89PNG")
    first = (tmp_path / "tuned.svg").read_bytes()
    assert run("plot", plan, "--layers", "3", "--out", "again/x.svg").exit_code == 0
    assert (tmp_path / "again" / "x.svg").read_bytes() == first
    assert run("plot", plan, "--layers", "3", "--out", "both.svg", "--compare").exit_code == 0
    both = (tmp_path / "both.svg").read_bytes()
    assert both != first and b"<dc:date>" not in both


def test_plot_takes_a_trace_of_the_same_plan_only(plan: str, tmp_path: Path) -> None:
    case = open_case(plan, layers=3)

    def trace(**changes: object) -> str:
        about = {
            "plan": Plan.load(plan).dumps(),
            "model": "llama-3-8b",
            "layers": 3,
            "device": case.device.name,
            "device_sms": 132,
            "itemsize": 2,
            "mix": str(case.mix),
            "works": list(case.works),
            "seconds": 0.05,
            "iterations": 9,
        }
        write_trace(case.timeline, TraceInfo(**(about | changes)), tmp_path / "t.json")  # type: ignore[arg-type]
        return "t.json"

    result = run("plot", plan, "--trace", trace(), "--out", "x.svg")
    assert result.exit_code == 0, result.output
    assert "--compare: a trace has no sequential" in mistake("plot", plan, "--trace", trace(), "--compare")
    other = Plan.load(plan).dumps().replace("[92, 40]", "[84, 48]")
    assert "it is the trace of another plan" in mistake("plot", plan, "--trace", trace(plan=other))
    assert "give --model my-own" in mistake("plot", plan, "--trace", trace(model="my-own"))
    assert "but the plan has" in mistake("plot", plan, "--trace", trace(layers=1))


def test_pictures_say_what_they_need(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert 'pip install "nanoflow[plots]"' in mistake("plot", plan, "--layers", "2")
