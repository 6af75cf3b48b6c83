"""A Hugging Face folder as a checkpoint: config.json, safetensors files, tokenizer.json and what goes with them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nanoflow.checkpoints.base import Checkpoint, Region, check_shape
from nanoflow.checkpoints.safetensors_file import SafetensorsFile
from nanoflow.errors import CheckpointError
from nanoflow.tokenizer import Tokenizer

__all__ = ["PICKLES", "HuggingFaceCheckpoint"]

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Endings of files that may hold a pickle, which can run any program when it is read."""

_INDEX = "model.safetensors.index.json"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class HuggingFaceCheckpoint(Checkpoint):
    """A model in a folder. Without `need_weights`, the configuration is enough and no tensor is looked for."""

    def __init__(self, folder: Path, need_weights: bool, name: str | None = None) -> None:
        self.path = str(folder)
        self.name = name or folder.resolve().name
        self._folder = folder
        self.config = read_object(folder / "config.json")
        self._files: dict[str, SafetensorsFile] = {}
        if need_weights:
            if self.config.get("quantization_config"):
                method = dict(self.config["quantization_config"]).get("quant_method", "unknown")
                raise CheckpointError(
                    f"{folder / 'config.json'}: quantization_config names method {method!r}; quantised safetensors are "
                    "not supported. Use the unquantised checkpoint, or a GGUF file."
                )
            self._files = self._open_weights()
        self.tensors: Mapping[str, tuple[int, ...]] = {
            tensor: file.shapes[tensor] for tensor, file in self._files.items()
        }
        self._tokenizer_config = self._optional("tokenizer_config.json")
        self._special_tokens = self._find_special_tokens()
        self.eos_token_ids = self._find_eos()

    def read(self, name: str, out: torch.Tensor, region: Region | None = None) -> None:
        check_shape(self, name, out, region)
        self._files[name].read(name, out, region)

    def tokenizer(self) -> Tokenizer | None:
        path = self._folder / "tokenizer.json"
        if not path.is_file():
            return None
        return Tokenizer.from_file(
            path,
            chat_template=self._find_chat_template(),
            special_tokens=self._special_tokens,
            eos_token_ids=self.eos_token_ids,
        )

    def _open_weights(self) -> dict[str, SafetensorsFile]:
        """The file that holds each tensor."""
        folder = self._folder
        if (folder / _INDEX).is_file():
            return self._open_shards()
        found = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("consolidated"))
        single = folder / "model.safetensors"
        if single.is_file():
            found = [single]
        if len(found) == 1:
            file = SafetensorsFile(found[0])
            return dict.fromkeys(file.shapes, file)
        if found:
            raise CheckpointError(
                f"{folder}: {len(found)} safetensors files but no {_INDEX}, which says what is in them. Fetch it too."
            )
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        if pickles:
            raise CheckpointError(
                f"{folder}: the weights are pickled ({pickles[0]}), and reading a pickle can run any program. Convert "
                "them to safetensors (transformers: save_pretrained with safe_serialization)."
            )
        raise CheckpointError(f"{folder}: no *.safetensors file. Give a complete folder, or set model.weights: random.")

    def _open_shards(self) -> dict[str, SafetensorsFile]:
        folder, index = self._folder, self._folder / _INDEX
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: weight_map, which names each tensor's file, is missing. Fetch it again.")
        files: dict[str, SafetensorsFile] = {}
        for shard in sorted({str(name) for name in weight_map.values()}):
            if Path(shard).name != shard:
                raise CheckpointError(f"{index}: weight_map names {shard!r}, which is not a file of this folder.")
            if not (folder / shard).is_file():
                raise CheckpointError(f"{folder / shard}: missing, but {_INDEX} names it. Fetch the file.")
            files[shard] = SafetensorsFile(folder / shard)
        for tensor, shard in weight_map.items():
            if tensor not in files[shard].shapes:
                raise CheckpointError(f"{folder / shard}: tensor {tensor!r} is missing, but {_INDEX} says it is here.")
        return {tensor: files[shard] for tensor, shard in weight_map.items()}

    def _optional(self, name: str) -> dict[str, Any]:
        path = self._folder / name
        return read_object(path) if path.is_file() else {}

    def _find_special_tokens(self) -> dict[str, str]:
        """Special tokens by name; a token is written as a string or as an object with its `content`."""
        found = {}
        for source in (self._optional("special_tokens_map.json"), self._tokenizer_config):
            for name in _SPECIAL:
                token = source.get(name)
                token = token.get("content") if isinstance(token, dict) else token
                if isinstance(token, str):
                    found[name] = token
        return found

    def _find_chat_template(self) -> str | None:
        """The default template: a file of its own goes before the one inside tokenizer_config.json."""
        path = self._folder / "chat_template.jinja"
        if path.is_file():
            try:
                return path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise CheckpointError(f"{path}: cannot be read ({error}). Fetch it again.") from None
        for source in (self._optional("chat_template.json"), self._tokenizer_config):
            template = source.get("chat_template")
            if isinstance(template, list):
                named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
                template = named.get("default")
            if isinstance(template, str):
                return template
        return None

    def _find_eos(self) -> tuple[int, ...]:
        """The generation config's end tokens, else the config's, else the tokenizer's."""
        for name, source in (("generation_config.json", self._optional("generation_config.json")), ("", self.config)):
            value = source.get("eos_token_id")
            ids = value if isinstance(value, list) else [value]
            if value is None or not ids:
                continue
            if not all(isinstance(id, int) and not isinstance(id, bool) for id in ids):
                path = self._folder / (name or "config.json")
                raise CheckpointError(f"{path}: eos_token_id is {value!r}, expected a token id or a list of them.")
            return tuple(dict.fromkeys(ids))
        path = self._folder / "tokenizer.json"
        if "eos_token" in self._special_tokens and path.is_file():
            id = Tokenizer.from_file(path).backend.token_to_id(self._special_tokens["eos_token"])
            return () if id is None else (id,)
        return ()


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises CheckpointError if it is missing or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}). Fetch it again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}. Fetch it again.")
    return value
