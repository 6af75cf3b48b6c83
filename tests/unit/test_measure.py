"""Comparing plans by blocks in turn, and the plans that an ablation compares."""

import json
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from nanoflow.cli import app
from nanoflow.errors import InputError, OutputError
from nanoflow.ops.batch import StepOutput
from nanoflow.pipeline.plan import Plan
from nanoflow.pipeline.program import compile_program
from nanoflow.pipeline.split import BatchCutter
from nanoflow.pipeline.validate import validate
from nanoflow.plans.ablation import ablate, ablation_plans, print_ablation, save_ablation
from nanoflow.plans.case import MixOptions, open_case
from nanoflow.plans.running import mix_batch, mix_pages
from nanoflow.search import measure
from nanoflow.search.measure import Block, Comparison, compare, run_block
from nanoflow.search.mix import Mix
from tests.unit.plan_graphs import llama_graph
from tests.unit.tiny_model import save_tiny_llama

PLAN = """
capacity: 64
nano_batches:
  a: {decode: 0.5, prefill: 0.5, rows: 40}
  b: {decode: 0.5, prefill: 0.5, rows: 24}
period:
  - whole:
      compute: [qkv, o.a, gate_up.a, down.a, o.b, gate_up.b, down.b]
      memory: [decode_attention.b, decode_attention.a]
"""


class Machine:
    """An executor and a clock: an iteration takes what its batch says, the first ones after a change twice as long."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.launched: deque[float] = deque()
        self.order: list[float] = []
        self.settled = 0.0
        monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def launch(self, seconds: Any) -> None:
        if not self.order or self.order[-1] != seconds:
            self.order.append(seconds)
            self.settled = self.now + 0.15
        self.launched.append(seconds)

    def collect(self) -> StepOutput:
        seconds = self.launched.popleft()
        taken = seconds if self.now >= self.settled else 2 * seconds
        self.now += taken
        return StepOutput(np.zeros(0, np.int32), seconds=0.75 * taken, idle_seconds=0.25 * taken)

    def joules(self) -> float:
        return 700 * self.now


def test_a_block_counts_what_is_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    machine: Any = Machine(monkeypatch)
    block = run_block(machine, 0.01, 1.0, machine.joules)  # type: ignore[arg-type]
    assert block.seconds == pytest.approx(0.01)
    assert block.iterations == pytest.approx(80, abs=2) and block.wall_seconds == pytest.approx(0.8, abs=0.02)
    assert block.watts == pytest.approx(700) and not machine.launched
    unmetered = run_block(machine, 0.01, 0.001, lambda: None)  # type: ignore[arg-type]
    assert unmetered.joules is None and unmetered.watts is None and unmetered.iterations >= 3


def test_blocks_are_taken_in_turn_and_compared_with_their_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    machine: Any = Machine(monkeypatch)
    told: list[str] = []
    batches: Any = {"base": 0.02, "other": 0.01}
    found = compare(
        machine, batches, seconds=1.0, pairs=3, joules=machine.joules, progress=lambda name, _: told.append(name)
    )
    assert machine.order == [0.02, 0.01, 0.02, 0.01, 0.02, 0.01]  # the warm-up, then there and back
    assert told == ["base", "other", "other", "base", "base", "other"]
    assert found.ratios("base", "other") == pytest.approx([2, 2, 2])
    assert found.seconds("other") == pytest.approx(0.01) and found.watts("base") == pytest.approx(700)
    assert found.joules("base") == pytest.approx(14) and found.joules("other") == pytest.approx(7)


def test_what_no_device_tells_is_none() -> None:
    found = Comparison({"a": (Block(3, 0.1, 0.3, None),)})
    assert found.joules("a") is None and found.watts("a") is None and found.seconds("a") == 0.1


@pytest.mark.parametrize(("decode", "prompts"), [(20, (13, 20)), (0, (60,)), (64, ())])
def test_a_mix_is_laid_out_for_each_plan(decode: int, prompts: tuple[int, ...]) -> None:
    graph = llama_graph(1)
    cut = BatchCutter([Plan.loads(PLAN, graph), Plan.sequential(graph, 64)], [32, 64])
    mix = Mix(decode, 30, prompts)
    split, whole = (mix_batch(mix, cut, 8, 100, number) for number in (0, 1))
    assert (split.program, whole.program) == (0, 1)
    assert [n.end - n.start for n in split.nano_batches] == [40, 24] and whole.rows == 64
    assert split.tokens == whole.tokens == mix.rows
    np.testing.assert_array_equal(np.sort(split.decode_context), np.sort(whole.decode_context))
    assert split.sampling is not None and whole.sampling is not None
    for name in ("positions", "slots", "token_ids"):
        a, b = getattr(split, name), getattr(whole, name)
        np.testing.assert_array_equal(a[split.sampling.rows], b[whole.sampling.rows])
    if decode:
        assert 20 <= split.decode_context.min() < 22 and 38 < split.decode_context.max() <= 40
    used = np.unique(split.kv_index[split.kv_index >= 8])
    assert len(used) == mix.rows and used.max() < 8 * mix_pages(mix, 8)


def test_the_plans_of_an_ablation() -> None:
    graph = llama_graph(2)
    plan = Plan.loads(PLAN, graph)
    plans = ablation_plans(plan, graph, 48)
    assert list(plans) == ["sequential", "nano-batches", "overlapped"] and plans["overlapped"] is plan
    assert plans["sequential"].capacity == 48
    cut = plans["nano-batches"]
    validate(cut, graph)
    names = [str(entry) for entry in cut.period[0].lanes["main"]]
    assert names[:6] == ["input_layernorm.a", "input_layernorm.b", "qkv", "rope_append", "decode_attention.a",
                         "decode_attention.b"]  # fmt: skip
    assert len(compile_program(cut, graph).lanes) == 1 and cut.nano_batches == plan.nano_batches
    assert list(ablation_plans(Plan.sequential(graph, 64), graph, 48)) == ["sequential", "overlapped"]


def test_an_ablation_on_a_cpu(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "tiny")
    (tmp_path / "plan.yaml").write_text(PLAN)
    case = open_case(tmp_path / "plan.yaml", str(folder), MixOptions(20, 30, (13, 20)))
    told: list[str] = []
    found = ablate(case, device="cpu", seconds=0.02, pairs=2, progress=lambda name, _: told.append(name))
    assert len(told) == 6 and all(len(blocks) == 2 for blocks in found.comparison.blocks.values())
    assert found.errors["sequential"] == 0 and all(error < 1e-5 for error in found.errors.values())
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_ablation(found, console)
    assert "nano-batches" in console.export_text()
    save_ablation({"date": "today", **found.to_dict()}, tmp_path / "new" / "a.json")
    saved = json.loads((tmp_path / "new" / "a.json").read_text())
    assert saved["date"] == "today" and saved["mix"] == {"decode": 20, "context": 30, "prompts": [13, 20], "before": []}
    assert saved["plans"]["overlapped"]["ratio"]["median"] > 0
    assert Plan.loads(saved["plan"]) == case.plan
    options = ["--model", str(folder), "--decode", "9", "--context", "12", "--prompts", "5,4", "--device", "cpu"]
    options += ["--seconds", "0.02", "--pairs", "1", "--out", str(tmp_path / "b.json")]
    result = CliRunner().invoke(app, ["plan", "ablate", case.file, *options])
    assert result.exit_code == 0, result.output
    assert "9 decode rows of context 12" in result.output and "overlapped" in result.output
    saved = json.loads((tmp_path / "b.json").read_text())
    assert saved["mix"]["prompts"] == [5, 4] and "torch" in saved["versions"]
    save_ablation(None, tmp_path / "b.json")
    assert json.loads((tmp_path / "b.json").read_text()) == saved, "looking whether it can be written changes nothing"
    with pytest.raises(OutputError, match=r"--out .*cannot be written"):
        save_ablation({}, folder)
    with pytest.raises(InputError, match="--device gpu"):
        ablate(case, device="gpu")
    assert torch.is_inference_mode_enabled() is False
