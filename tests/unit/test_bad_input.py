"""What users get wrong, through the command line: one message and status 2, or an error record and status 1."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from nanoflow.cli import app
from tests.unit.tiny_model import save_tiny_llama

GOOD_LINES = [{"custom_id": "a", "prompt": "abc"}, {"custom_id": "b", "prompt": [5, 6, 7], "max_tokens": 3}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path / "model")


def run(tmp_path: Path, *arguments: str, lines: list[Any] = GOOD_LINES, **sections: Any) -> Result:
    """`nanoflow run` on a job of these lines (objects, or strings as they are) in `tmp_path`."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (tmp_path / "prompts.jsonl").write_text("\n".join(texts) + "\n")
    config = {
        "model": {"path": str(tmp_path / "model")},
        "workload": {"input": "prompts.jsonl"},
        "sampling": {"max_tokens": 4},
        "engine": {"device": "cpu", "kv_memory": "1MiB"},
        "output": {"path": str(tmp_path / "out" / "result.jsonl")},
    }
    for name, section in sections.items():
        config[name] = {**config.get(name, {}), **section}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(config))
    return CliRunner().invoke(app, ["run", str(tmp_path / "job.yaml"), "--quiet", *arguments])


def records(tmp_path: Path) -> dict[str | None, dict[str, Any]]:
    lines = (tmp_path / "out" / "result.jsonl").read_text().splitlines()
    return {record["custom_id"]: record for record in map(json.loads, lines)}


def assert_refused(result: Result, *words: str) -> None:
    """Status 2 and a single message with these words."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.output.count("error:") == 1
    for word in words:
        assert word in result.output


def test_a_good_job(tmp_path: Path, folder: Path) -> None:
    result = run(tmp_path)
    assert result.exit_code == 0, result.output
    answers = records(tmp_path)
    assert set(answers) == {"a", "b"}
    assert all(answer["error"] is None for answer in answers.values())
    assert answers["b"]["response"]["body"]["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 3,
        "total_tokens": 6,
    }
    report = json.loads((tmp_path / "out" / "result.report.json").read_text())
    assert (report["requests"], report["completed"], report["errors"]) == (2, 2, 0)
    assert (tmp_path / "out" / "result.config.yaml").exists()


def test_another_run_s_output_is_kept_unless_restart(tmp_path: Path, folder: Path) -> None:
    assert run(tmp_path).exit_code == 0
    before = (tmp_path / "out" / "result.jsonl").read_text()
    changed = run(tmp_path, sampling={"max_tokens": 5})
    assert_refused(changed, "result.jsonl", "sampling.max_tokens: was 4, is 5", "--restart", "--continue-anyway")
    assert (tmp_path / "out" / "result.jsonl").read_text() == before
    assert run(tmp_path, "--restart").exit_code == 0
    assert len(records(tmp_path)) == 2


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"engine": {"max_runing": 8}}, ["job.yaml", "engine.max_runing", "max_running"]),
        ({"sampling": {"temperature": "hot"}}, ["job.yaml", "sampling.temperature", "hot"]),
        ({"engine": {"kv_memory": "lots"}}, ["engine.kv_memory", "lots", "4GiB"]),
        ({"engine": {"max_model_len": 5000}}, ["engine.max_model_len", "5000", "160"]),
        ({"engine": {"kv_memory": 5000}}, ["engine.kv_memory", "KV cache"]),
        ({"workload": {"input": "nowhere.jsonl"}}, ["workload.input", "nowhere.jsonl"]),
        ({"model": {"path": "nowhere"}}, ["model.path", "nowhere"]),
        ({"pipeline": {"plan": "nowhere.yaml"}}, ["nowhere.yaml"]),
    ],
)
def test_a_run_that_cannot_start(tmp_path: Path, folder: Path, sections: dict[str, Any], words: list[str]) -> None:
    assert_refused(run(tmp_path, **sections), *words)
    assert not (tmp_path / "out" / "result.jsonl").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(tmp_path: Path, folder: Path) -> None:
    assert_refused(run(tmp_path, engine={"device": "cuda"}), "engine.device", "cuda", "cpu")


def test_an_output_folder_that_cannot_be_written(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert_refused(run(tmp_path, output={"path": str(tmp_path / "file" / "x.jsonl")}), "output.path", "file")
    if os.geteuid() != 0:  # root writes anywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        assert_refused(run(tmp_path, output={"path": str(tmp_path / "closed" / "x.jsonl")}), "output.path", "closed")


def test_a_truncated_checkpoint(tmp_path: Path, folder: Path) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    assert_refused(run(tmp_path), "model.safetensors")


def test_a_tensor_of_another_shape(tmp_path: Path, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert_refused(run(tmp_path), name, "[64, 95]", "[64, 96]")


def test_a_missing_tensor(tmp_path: Path, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert_refused(run(tmp_path), "model.norm.weight")


def test_a_pickled_checkpoint(tmp_path: Path, folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert_refused(run(tmp_path), "pickle", "safetensors")


def test_an_unsupported_architecture(tmp_path: Path, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["BloomForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    assert_refused(run(tmp_path), "BloomForCausalLM", "LlamaForCausalLM", "Qwen3ForCausalLM")


def test_weights_that_do_not_fit_in_memory(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanoflow.weights.free_bytes", lambda device: 1000)
    assert_refused(run(tmp_path), "391.2 KiB", "1000 bytes", "smaller")


def test_a_safetensors_header_that_lies(tmp_path: Path, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**40) + b"{}")
    assert_refused(run(tmp_path), "model.safetensors")


def test_bad_lines_become_error_records(tmp_path: Path, folder: Path) -> None:
    lines = [
        GOOD_LINES[0],
        "{not json",
        {"custom_id": "no prompt"},
        {"custom_id": "option", "prompt": "a", "best_of": 4},
        {"custom_id": "negative", "prompt": "a", "max_tokens": -1},
        {"custom_id": "long", "prompt": [5] * 400},
        {"custom_id": "a", "prompt": "again"},
        {"custom_id": "unknown id", "prompt": [5, 300]},
        {"custom_id": "chat", "messages": [{"role": "user", "content": "hi"}]},  # the model has no chat template
        {"custom_id": "bias", "prompt": "a", "logit_bias": {"300": 1}},
        GOOD_LINES[1],
    ]
    result = run(tmp_path, lines=lines)
    assert result.exit_code == 1, result.output
    written = [json.loads(line) for line in (tmp_path / "out" / "result.jsonl").read_text().splitlines()]
    assert len(written) == len(lines)
    answered = {record["custom_id"] for record in written if record["error"] is None}
    assert answered == {"a", "b"}
    messages = [record["error"]["message"] for record in written if record["error"] is not None]
    for line, words in {
        2: ["JSON"],
        3: ["prompt"],
        4: ["best_of", "4"],
        5: ["max_tokens", "-1"],
        6: ["400", "160"],
        7: ["custom_id", "line 1"],
        8: ["300"],
        9: ["chat template"],
        10: ["logit_bias", "300"],
    }.items():
        (message,) = [message for message in messages if message.startswith(f"line {line}:")]
        assert all(word in message for word in words), message
