"""Checkpoints in folders, packages and the Hub's cache, and every way in which they can be broken."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nanoflow.checkpoints import Checkpoint, open_checkpoint
from nanoflow.errors import CheckpointError

CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 8, "eos_token_id": [3, 4]}


def read(checkpoint: Checkpoint, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    out = torch.full(checkpoint.tensors[name], float("nan"), dtype=dtype)
    checkpoint.read(name, out)
    return out


def write_folder(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_shards(folder: Path, shards: dict[str, dict[str, torch.Tensor]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    weight_map = {}
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
        weight_map.update(dict.fromkeys(tensors, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


# Hugging Face folders


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16, torch.float16])
def test_safetensors_of_all_float_types(tmp_path: Path, out: torch.dtype) -> None:
    torch.manual_seed(0)
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    tensors = {str(kind): torch.randn(5, 7).to(kind) for kind in kinds} | {"scalar": torch.tensor(2.0)}
    checkpoint = open_checkpoint(str(write_folder(tmp_path / "model", tensors)))
    assert checkpoint.tensors == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        assert torch.equal(read(checkpoint, name, out), tensor.to(out))
    assert checkpoint.name == "model"
    assert checkpoint.eos_token_ids == (3, 4)
    assert checkpoint.tokenizer() is None


def test_large_tensors_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanoflow.checkpoints.safetensors_file._PIECE", 100)
    tensor = torch.randn(37, 11)
    checkpoint = open_checkpoint(str(write_folder(tmp_path / "model", {"w": tensor})))
    weight = torch.zeros(50, 11)
    checkpoint.read("w", weight[3:40])
    assert torch.equal(weight[3:40], tensor)
    assert not weight[:3].any() and not weight[40:].any()


def test_shards(tmp_path: Path) -> None:
    shards = {
        "model-00001-of-00002.safetensors": {"a": torch.randn(3, 2)},
        "model-00002-of-00002.safetensors": {"b": torch.randn(4)},
    }
    checkpoint = open_checkpoint(str(write_shards(tmp_path / "model", shards)))
    assert torch.equal(read(checkpoint, "a"), shards["model-00001-of-00002.safetensors"]["a"])
    assert torch.equal(read(checkpoint, "b"), shards["model-00002-of-00002.safetensors"]["b"])


def test_end_tokens_in_order_of_authority(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", {"w": torch.ones(1)}, eos_token_id=9)
    assert open_checkpoint(str(folder)).eos_token_ids == (9,)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6, 5]}))
    assert open_checkpoint(str(folder)).eos_token_ids == (5, 6)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": "x"}))
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id is 'x'"):
        open_checkpoint(str(folder))


def test_config_alone_is_enough_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for path in (tmp_path, tmp_path / "config.json"):
        checkpoint = open_checkpoint(str(path), need_weights=False)
        assert checkpoint.config == CONFIG
        assert not checkpoint.tensors
        with pytest.raises(CheckpointError, match=r"no \*\.safetensors file.*weights: random"):
            open_checkpoint(str(path))


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: cut(p, p.stat().st_size - 1), "tensor 'w' ends at byte .* and the file has .* truncated"),
        (lambda p: cut(p, 30), "truncated"),
        (lambda p: cut(p, 5), "5 bytes"),
        (lambda p: cut(p, 0), "0 bytes"),
        (lambda p: p.write_bytes(b"PK\x03\x04" * 100), "no safetensors file"),
        (lambda p: p.write_bytes(struct.pack("<Q", 4) + b"nope"), "not JSON"),
        (lambda p: p.write_bytes(struct.pack("<Q", 2) + b"[]"), "not JSON"),
        (lambda p: rewrite_header(p, lambda h: h["w"].update(shape=[4, 4])), "should take 64 bytes.* says 24"),
        (lambda p: rewrite_header(p, lambda h: h["w"].update(shape=[-2, -3])), "shape"),
        (lambda p: rewrite_header(p, lambda h: h["w"].update(dtype="Q9")), "describes tensor 'w'"),
        (lambda p: rewrite_header(p, lambda h: h.update(w=3)), "describes tensor 'w'"),
        (lambda p: rewrite_header(p, lambda h: h["w"].update(data_offsets=[2**40, 2**40 + 24])), "truncated"),
    ],
)
def test_damaged_safetensors(tmp_path: Path, damage: Callable[[Path], object], words: str) -> None:
    folder = write_folder(tmp_path / "model", {"w": torch.ones(2, 3)})
    damage(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=words) as caught:
        open_checkpoint(str(folder))
    assert "model.safetensors" in str(caught.value)


def test_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", {"w": torch.ones(20, 30)})
    checkpoint = open_checkpoint(str(folder))
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(500)
    with pytest.raises(CheckpointError, match="ends inside tensor 'w'"):
        read(checkpoint, "w")


def test_wrong_tensor(tmp_path: Path) -> None:
    tensors = {"w": torch.ones(2, 3), "q": torch.ones(2, 3, dtype=torch.int8)}
    checkpoint = open_checkpoint(str(write_folder(tmp_path / "model", tensors)))
    with pytest.raises(CheckpointError, match="tensor 'v' is missing"):
        checkpoint.read("v", torch.empty(2, 3))
    with pytest.raises(CheckpointError, match=r"tensor 'w' has shape \[2, 3\], expected \[3, 2\]"):
        checkpoint.read("w", torch.empty(3, 2))
    with pytest.raises(CheckpointError, match="tensor 'q' is of type I8"):
        checkpoint.read("q", torch.empty(2, 3))


def test_broken_shards(tmp_path: Path) -> None:
    shards = {"model-1.safetensors": {"a": torch.ones(1)}, "model-2.safetensors": {"b": torch.ones(1)}}
    folder = write_shards(tmp_path / "model", shards)
    index = folder / "model.safetensors.index.json"

    save_file({"c": torch.ones(1)}, folder / "model-2.safetensors")
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors: tensor 'b' is missing"):
        open_checkpoint(str(folder))
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors: missing"):
        open_checkpoint(str(folder))
    index.write_text(json.dumps({"weight_map": {"a": "../model-1.safetensors"}}))
    with pytest.raises(CheckpointError, match="not a file of this folder"):
        open_checkpoint(str(folder))
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="weight_map"):
        open_checkpoint(str(folder))
    index.unlink()
    save_file({"b": torch.ones(1)}, folder / "model-2.safetensors")
    with pytest.raises(CheckpointError, match=r"no model\.safetensors\.index\.json"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("ending", [".bin", ".pt", ".pth", ".ckpt"])
def test_pickles_are_refused(tmp_path: Path, ending: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    pickle = tmp_path / f"pytorch_model{ending}"
    torch.save({"w": torch.ones(1)}, pickle)
    for path in (tmp_path, pickle):
        with pytest.raises(CheckpointError, match=r"pickle.*safetensors"):
            open_checkpoint(str(path))
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    assert "w" in open_checkpoint(str(tmp_path)).tensors, "safetensors beside a pickle are used"


def test_quantised_safetensors_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", {"w": torch.ones(1)}, quantization_config={"quant_method": "gptq"})
    with pytest.raises(CheckpointError, match=r"config\.json.*'gptq'"):
        open_checkpoint(str(folder))


def test_paths_that_are_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("{,")
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[]")
    for path, words in {
        "nosuch.gguf": "no such file",
        "notes.txt": "not a model",
        "empty": r"no config\.json",
        "bad": "not valid JSON",
        "list": "expected a JSON object",
    }.items():
        with pytest.raises(CheckpointError, match=words) as caught:
            open_checkpoint(str(tmp_path / path))
        assert path in str(caught.value)


# Packages and the Hub


def test_files_of_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "some_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    write_folder(package / "weights", {"w": torch.ones(2)})
    monkeypatch.syspath_prepend(str(tmp_path))
    assert open_checkpoint("package:some_model/weights/config.json").tensors == {"w": (2,)}
    for path, words in {
        "package:some_model/none.gguf": "holds no file 'none.gguf'",
        "package:no_such_package/x.gguf": "pip install no-such-package",
        "package:some_model": "expected package:",
        "package:../x/y": "no Python package",
    }.items():
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(path)


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME"])
def test_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    cache = tmp_path if variable == "HF_HUB_CACHE" else tmp_path / "hub"
    home = cache / "models--some-org--Some.Model"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("abc123")
    (home / "snapshots").mkdir()
    write_folder(home / "snapshots" / "abc123", {"w": torch.ones(2)})
    checkpoint = open_checkpoint("some-org/Some.Model")
    assert checkpoint.tensors == {"w": (2,)}
    assert checkpoint.name == "some-org/Some.Model"


def test_hub_id_that_is_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"'some/model': no such file or folder.*huggingface_hub"):
        open_checkpoint("some/model")


def test_hub_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of huggingface_hub, and what becomes of its errors, without a network."""
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    folder = write_folder(tmp_path / "model", {"w": torch.ones(2)})
    asked: list[list[str]] = []

    def download(name: str, *, allow_patterns: list[str], cache_dir: Path) -> str:
        assert (name, cache_dir) == ("some/model", tmp_path / "cache")
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert open_checkpoint("some/model").tensors == {"w": (2,)}
    open_checkpoint("some/model", need_weights=False)
    assert "*.safetensors" in asked[0] and "*.safetensors" not in asked[1]

    def fail(name: str, **_: Any) -> str:
        raise OSError("no network\nand more")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"downloading it failed: no network$"):
        open_checkpoint("some/model")
