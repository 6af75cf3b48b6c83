"""`nanoflow profile` with `parallel.tensor: 2` on two GPUs: forms of the collectives, alone and beside products."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from nanoflow.ops.collectives import CTAS
from nanoflow.ops.peer_all_reduce import PEER_FORMS
from nanoflow.search.profile import Profile
from tests.gpu.checkpoints import save_model
from tests.unit.tiny_model import VOCAB

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
MINUTES = 2.5
"""In which nothing but the whole device, and the beginning of the network lanes, may be measured."""


def test_forms_are_measured_alone_and_beside_products(tmp_path: Path) -> None:
    model, path = tmp_path / "model", tmp_path / "profile.json"
    model.mkdir()
    save_model(model, head_dim=64, num_key_value_heads=2, vocab_size=VOCAB + 1)
    config = {
        "model": {"path": str(model), "dtype": "float32", "weights": "random"},
        "workload": {"synthetic": {"input_len": 32, "output_len": 32, "requests": 100}},
        "engine": {"device": "cuda", "max_batch_tokens": 128, "max_running": 64},
        "parallel": {"tensor": 2},
        "output": {"path": str(tmp_path / "o.jsonl")},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "nanoflow", "profile", str(tmp_path / "job.yaml"), "--out", str(path)]
    done = subprocess.run(
        [*command, "--minutes", str(MINUTES)],
        capture_output=True,
        text=True,
        timeout=60 * MINUTES + 120,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    profile = Profile.load(path)
    measured = {solo.kernel for solo in profile.solos if solo.op == "down_all_reduce" and solo.sms is None}
    missing = {form for form in PEER_FORMS if f"collectives by {form}: " in done.stderr}
    assert measured == {"", *CTAS, *PEER_FORMS} - missing, done.stderr
    assert all(point.seconds > 0 for solo in profile.solos for point in solo.points)
    beside = [pair for pair in profile.pairs if pair.other == "down_all_reduce"]
    assert beside and all(0 < pair.kept <= 1 and 0 < pair.other_kept <= 1 for pair in beside), done.stderr
