"""Sizes, free memory under control groups, and the rule of engine.kv_memory."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from nanoflow import memory
from nanoflow.errors import ConfigError, OutOfMemoryError
from nanoflow.memory import format_bytes, free_bytes, kv_bytes, parse_memory, parse_size

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 4 * GIB),
        ("512MB", 512_000_000),
        ("1.5 gib", 3 * GIB // 2),
        ("100", 100),
        (7, 7),
        ("2kb", 2000),
        ("3B", 3),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "4 GiX", "-1GiB", "0", "1e9", "4GiB2", True, 0])
def test_bad_sizes(text: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        parse_size(text)


@pytest.mark.parametrize(
    ("value", "meaning"),
    [("auto", None), (0.5, 0.5), ("0.5", 0.5), (1, 1.0), ("4GiB", 4 * GIB), (2**20, 2**20), ("1048576", 2**20)],
)
def test_settings_of_memory(value: str | float, meaning: float | int | None) -> None:
    found = parse_memory(value)
    assert found == meaning and type(found) is type(meaning)


@pytest.mark.parametrize("value", [0, -1, 1.5, "1.5", "lots", True, "nan", "inf", float("inf"), float("nan"), "50%"])
def test_bad_settings_of_memory(value: Any) -> None:
    with pytest.raises(ValueError, match=r"not an amount of memory|not a size"):
        parse_memory(value)
    with pytest.raises(ConfigError, match=r"engine\.kv_memory"):
        kv_bytes(value, device="cpu", job_bytes=1, free=GIB)


def test_format() -> None:
    assert [format_bytes(n) for n in (12, 1536, 3.4 * GIB, 5000 * 2**40)] == [
        "12 bytes",
        "1.5 KiB",
        "3.4 GiB",
        "5000.0 TiB",
    ]


def test_kv_memory_on_a_cpu() -> None:
    free = 8 * GIB
    assert kv_bytes("auto", device="cpu", job_bytes=GIB, free=free) == GIB
    assert kv_bytes("auto", device="cpu", job_bytes=100 * GIB, free=free) == 2 * GIB
    assert kv_bytes(0.5, device="cpu", job_bytes=1, free=free) == 4 * GIB
    assert kv_bytes("6GiB", device="cpu", job_bytes=1, free=free) == 6 * GIB
    with pytest.raises(OutOfMemoryError, match=r"9\.0 GiB asked for, 8\.0 GiB free"):
        kv_bytes("9GiB", device="cpu", job_bytes=1, free=free)


def test_kv_memory_on_a_gpu() -> None:
    """A share is of the whole GPU, and what is in use (weights, other programs) comes off it."""
    settings = {"device": torch.device("cuda"), "job_bytes": 1, "total": 100 * GIB}
    assert kv_bytes("auto", free=80 * GIB, **settings) == int(92 * GIB) - 20 * GIB
    assert kv_bytes(0.5, free=80 * GIB, **settings) == 30 * GIB
    with pytest.raises(OutOfMemoryError, match="leaves nothing of the 92%"):
        kv_bytes("auto", free=5 * GIB, **settings)


def test_free_memory_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 2**20 < free_bytes() < 2**50
    monkeypatch.setattr(memory, "_available", lambda: 10 * GIB)
    monkeypatch.setattr(memory, "_cgroup_free", lambda *_: [3 * GIB, 20 * GIB])
    assert free_bytes("cpu") == 3 * GIB
    monkeypatch.setattr(memory, "_cgroup_free", lambda *_: [-5])
    assert free_bytes() == 0


def test_free_memory_where_there_is_no_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(self: Path, **_: Any) -> str:
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", unreadable)
    assert free_bytes() > 2**20


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_cgroup_v2_limits_at_any_level(tmp_path: Path) -> None:
    membership, root = tmp_path / "cgroup", tmp_path / "fs"
    membership.write_text("0::/user/job\n")
    group(root / "user", memory__max=1000, memory__current=900, memory__stat="anon 1\ninactive_file 50")
    group(root / "user" / "job", memory__max="max", memory__current=700, memory__stat="inactive_file 0")
    assert memory._cgroup_free(membership, root) == [150]
    group(root / "user" / "job", memory__max=800)
    assert sorted(memory._cgroup_free(membership, root)) == [100, 150]


def test_cgroup_of_a_container_is_the_root(tmp_path: Path) -> None:
    membership, root = tmp_path / "cgroup", tmp_path / "fs"
    membership.write_text("0::/host/path/that/is/not/here\n")
    group(root, memory__max=4000, memory__current=1000, memory__stat="inactive_file 200")
    assert memory._cgroup_free(membership, root) == [3200]


def test_cgroup_v1(tmp_path: Path) -> None:
    membership, root = tmp_path / "cgroup", tmp_path / "fs"
    membership.write_text("5:cpu,cpuacct:/job\n4:memory:/job\n0::/\n")
    stat = "cache 5\ntotal_inactive_file 30"
    group(
        root / "memory" / "job",
        memory__limit_in_bytes=1000,
        memory__usage_in_bytes=600,
        memory__stat=stat,
    )
    group(
        root / "memory",
        memory__limit_in_bytes=9223372036854771712,
        memory__usage_in_bytes=600,
        memory__stat=stat,
    )
    assert memory._cgroup_free(membership, root) == [430]
    assert memory._cgroup_free(tmp_path / "absent", root) == []
