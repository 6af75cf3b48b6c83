"""Tuning a model that two ranks share: rounds on both, plans that cannot run, what is stored, how it ends.

Each run is a process of its own with a time limit, and its ranks end with it: nothing can hang. See `forks`.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nanoflow.pipeline.plan import Plan
from nanoflow.search.fingerprint import ranks_of
from nanoflow.search.journal import Journal
from tests.unit.forks import ForkServer, Run, started_by, wait_for_text
from tests.unit.rank_models import write_job_of_ranks
from tests.unit.tiny_model import save_tiny_llama

LIMIT = 150.0
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def file(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return write_job_of_ranks(model, tmp_path)


def test_ranks_are_tuned_and_the_plan_is_theirs(file: Path, tmp_path: Path, server: ForkServer) -> None:
    kept = tmp_path / "kept"
    arguments = ["--minutes", "0.03", "--trials", "3", "--out", str(kept), "--record", str(tmp_path / "found.json")]
    run = server.start(tmp_path, "tune", file, *arguments, fast=True)
    assert run.wait() == 0, run.stderr
    assert "tuned: " in run.stdout and "plans measured" in run.stderr
    stored = [Plan.load(path) for path in (tmp_path / "cache").glob("nanoflow/plans/*.yaml")]
    assert stored and all(ranks_of(str(plan.fingerprint["shape"])) == 2 for plan in stored)
    steps = json.loads((tmp_path / "found.json").read_text())["mixes"][0]["steps"]
    assert len(steps) == 3 and all(step["ratio"] and step["figures"]["iteration_ms"] > 0 for step in steps)
    assert any("all_reduce" in step["plan"] for step in steps), "a network lane"


ROUND = """
import sys
from dataclasses import replace
from pathlib import Path
from nanoflow.config import load_config
from nanoflow.parallel.messages import Load
from nanoflow.pipeline.plan import FrozenMapping
from nanoflow.plans.running import longest_request, mix_pages
from nanoflow.search.tuner import PlanSearch
from nanoflow.tuning.job import open_job
from nanoflow.tuning.rounds import Blocks, MixRounds
from nanoflow.tuning.tune import _ranks
from nanoflow.weights import load_weights

job = open_job(load_config(sys.argv[1]), None, Path(sys.argv[2]))
mix, model = job.mixes.mixes[0], job.model
good = [candidate.plan for candidate in PlanSearch(job.target(mix)).propose(2)]
bad = replace(good[0], kernels=FrozenMapping({"o_reduce_scatter": "copy_engine"}))
slots = mix.mix.decode + len(mix.mix.prompts)
with _ranks(job, slots) as group:
    pages = mix_pages(mix.mix, job.here.page_size)
    group.load(Load("random", pages, longest_request(mix.mix)))
    weights = load_weights(model.graph, model.checkpoint, model.dtype, model.device, "random")
    group.least(pages)
    rounds = MixRounds(model, weights, mix.mix, job.rows(mix)[1], job.here.page_size, group=group, slots=slots)
    with rounds:
        found = rounds.measure([good[0], bad, good[1]], Blocks(0.002, 2))
        finals = rounds.compare([good[1], bad], Blocks(0.002, 2))
print([outcome.ratio is not None for outcome in found], [final.plan == good[1] for final in finals])
print(found[1].why)
"""


def test_a_plan_that_cannot_run_on_the_ranks_fails_alone(file: Path, tmp_path: Path) -> None:
    """Copy engines need a GPU. All ranks say so, and go on to the next plans."""
    command = [sys.executable, "-c", ROUND, str(file), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    first, why = done.stdout.splitlines()[-2:]
    assert first == "[True, False, True] [True]"
    assert why.startswith("kernels.o_reduce_scatter: 'copy_engine' cannot run here")


@pytest.mark.slow
def test_ctrl_c_and_a_killed_rank_keep_what_was_measured(file: Path, tmp_path: Path, server: ForkServer) -> None:
    kept = tmp_path / "kept"

    def started() -> Run:
        run = server.start(tmp_path, "tune", file, "--minutes", "1", "--out", kept, fast=True)
        wait_for_text(run, "plans measured")
        return run

    run = started()
    run.kill(signal.SIGINT)
    assert run.wait() == 128 + signal.SIGINT, run.stderr
    assert "to go on: nanoflow tune" in run.stderr and "Traceback" not in run.stderr
    measured = max(len(Journal(path).trials) for path in kept.glob("*.journal"))
    assert measured > 1
    run = started()
    (rank,) = started_by(run, 1)
    os.kill(rank, signal.SIGKILL)
    assert run.wait() == 2 and "Traceback" not in run.stderr, run.stderr
    assert "was killed by SIGKILL" in run.stderr
    assert "what was measured is kept, and the same command goes on" in run.stderr
    assert max(len(Journal(path).trials) for path in kept.glob("*.journal")) > measured
