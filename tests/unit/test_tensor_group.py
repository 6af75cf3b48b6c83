"""Ranks as rank 0 has them: what is refused before any starts, how they are built, and built again."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanoflow import loading, plan_recheck
from nanoflow.config import load_config
from nanoflow.config_schema import EngineSection, ModelSection, PipelineSection
from nanoflow.errors import ConfigError
from nanoflow.loading import build_engine, open_model
from nanoflow.parallel import group
from nanoflow.parallel.executor import TensorParallelExecutor
from nanoflow.parallel.group import TensorGroup, check_ranks
from nanoflow.parallel.messages import RankSettings
from nanoflow.pipeline.plan import FrozenMapping, NanoBatch, Plan, PlanMix
from nanoflow.plan_choice import ChosenPlans
from nanoflow.sampling_params import SamplingParams
from tests.unit.tiny_model import save_tiny_llama


@pytest.mark.parametrize(("device", "first", "mend"), [("cuda", "", 2), ("cuda:1", " from cuda:1 on", 1)])
def test_too_few_gpus_are_told(monkeypatch: pytest.MonkeyPatch, device: str, first: str, mend: int) -> None:
    monkeypatch.setattr(group, "choose_device", lambda name, use: torch.device(name))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_ranks(EngineSection(device="cuda"), 2)
    with pytest.raises(ConfigError) as caught:
        check_ranks(EngineSection(device=device), 3)
    message = f"parallel.tensor: 3 GPUs are asked for{first}, and this machine has 2; set it to {mend} or less"
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("first", "others"), [("cpu", ["cpu", "cpu"]), ("cuda:0", ["cuda:1", "cuda:2"]), ("cuda:4", ["cuda:5", "cuda:6"])]
)
def test_ranks_take_devices_in_a_row(first: str, others: list[str]) -> None:
    settings = RankSettings(ModelSection(path="m"), EngineSection(device=first), 0, 3, 1, 1, 1.0)
    of_ranks = [settings.of_rank(rank) for rank in (1, 2)]
    assert [each.engine.device for each in of_ranks] == others
    assert [each.rank for each in of_ranks] == [1, 2]


@pytest.mark.parametrize("tensor", ["0", "-1", "1.5", "two", "true"])
def test_what_is_no_number_of_gpus_is_refused(tmp_path: Path, tensor: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {path: a/b}\nworkload: {synthetic: {requests: 1, input_len: 1, output_len: 1}}\n")
    with pytest.raises(ConfigError, match=r"parallel\.tensor"):
        load_config(file, [f"parallel.tensor={tensor}"])


def test_ranks_are_built_again_without_a_plan_that_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stored plan in doubt is measured on all ranks, loses, and the engine goes on with the rest."""
    model = open_model(ModelSection(path=str(save_tiny_llama(tmp_path / "model"))), EngineSection(device="cpu"))
    engine = EngineSection(device="cpu", kv_memory="1MiB", max_running=8, max_batch_tokens=64)

    def choose(asked: str, graph: Any, here: Any, capacity: int) -> ChosenPlans:
        sequential = Plan.sequential(graph, capacity)
        halves = tuple(NanoBatch(name, Fraction(1, 2), Fraction(1, 2), capacity // 2) for name in "ab")
        (stage,) = sequential.period
        (lane,) = stage.lanes.values()
        # All-reduces on both lanes: each has a communicator of its own.
        lanes = {name: tuple(replace(entry, nano_batch=name) for entry in lane) for name in "ab"}
        period = (replace(stage, lanes=FrozenMapping(lanes)),)
        mix = PlanMix(decode=4, prefill=12, context=20)
        cut = replace(sequential, nano_batches=halves, period=period, mix=mix)
        return ChosenPlans((cut, sequential), doubtful=(0,))

    ratios: list[float] = []

    def ratio(*arguments: Any) -> float:
        ratios.append(measured(*arguments))
        return 0.5

    measured = plan_recheck._ratio
    monkeypatch.setattr(loading, "choose_plans", choose)
    monkeypatch.setattr(plan_recheck, "_ratio", ratio)
    monkeypatch.setattr(plan_recheck, "SECONDS", 0.01)
    monkeypatch.setattr(plan_recheck, "keep_recheck", lambda *arguments: None)
    threads = torch.get_num_threads()
    prompts = [np.arange(2, 9), np.arange(5, 30)]
    with TensorGroup(ModelSection(path=str(tmp_path / "model")), engine, 2) as ranks:
        built = build_engine(model, engine, PipelineSection(plan="auto"), ranks=ranks)
        assert isinstance(built.executor, TensorParallelExecutor)
        assert len(built.executor.programs) == 1 and "not used" in capsys.readouterr().err
        assert ratios and ratios[0] > 0, "its outputs were right"
        for prompt in prompts:
            built.submit(prompt, SamplingParams(max_tokens=5, ignore_eos=True))
        tokens = [output.outputs[0].token_ids for output in built.run()]
        built.close()
    assert torch.get_num_threads() == threads
    alone = build_engine(open_model(ModelSection(path=str(tmp_path / "model")), engine), engine)
    for prompt in prompts:
        alone.submit(prompt, SamplingParams(max_tokens=5, ignore_eos=True))
    assert [output.outputs[0].token_ids for output in alone.run()] == tokens
    alone.close()
