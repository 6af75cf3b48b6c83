"""Tuning a model that two ranks share: rounds on both, plans that cannot run, what is stored, how it ends.

Each run is a process of its own with a time limit, and its ranks end with it: nothing can hang.
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


def python(*arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def finished(process: "subprocess.Popen[str]") -> tuple[str, str]:
    try:
        return process.communicate(timeout=LIMIT)
    finally:
        process.kill()


def test_ranks_are_tuned_and_the_plan_is_theirs(file: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    arguments = ["--minutes", "0.03", "--trials", "3", "--out", str(kept), "--record", str(tmp_path / "found.json")]
    process = python("-m", "nanoflow", "tune", str(file), *arguments)
    output, errors = finished(process)
    assert process.returncode == 0, errors
    assert "tuned: " in output and "plans measured" in errors
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
    process = python("-c", ROUND, str(file), str(tmp_path))
    output, errors = finished(process)
    assert process.returncode == 0, errors
    first, why = output.splitlines()[-2:]
    assert first == "[True, False, True] [True]"
    assert why.startswith("kernels.o_reduce_scatter: 'copy_engine' cannot run here")


@pytest.mark.slow
def test_ctrl_c_and_a_killed_rank_keep_what_was_measured(file: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"

    def started(number: int) -> tuple[int, str]:
        process = python("-m", "nanoflow", "tune", str(file), "--minutes", "2", "--out", str(kept))
        assert process.stderr is not None
        seen = ""
        try:
            for line in process.stderr:
                seen += line
                if "plans measured" in line:
                    break
            if number == signal.SIGINT:
                process.send_signal(signal.SIGINT)
            else:
                (rank,) = children(process.pid)
                os.kill(rank, number)
        except BaseException:
            process.kill()
            raise
        _, rest = finished(process)
        return process.returncode, seen + rest

    code, errors = started(signal.SIGINT)
    assert code == 128 + signal.SIGINT and "to go on: nanoflow tune" in errors and "Traceback" not in errors
    measured = max(len(Journal(path).trials) for path in kept.glob("*.journal"))
    assert measured > 1
    code, errors = started(signal.SIGKILL)
    assert code == 2 and "Traceback" not in errors
    assert "was killed by SIGKILL" in errors and "what was measured is kept, and the same command goes on" in errors
    assert max(len(Journal(path).trials) for path in kept.glob("*.journal")) > measured


def children(process: int) -> list[int]:
    """Its own processes: the other rank."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if parent == process:
            found.append(int(folder.name))
    return found
