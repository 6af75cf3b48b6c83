"""Runs the tests of `tests/unit/interpreter`, each file in a process that chose Triton's interpreter.

The processes are forks of one that has imported what takes seconds to import.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "tests/unit/interpreter").glob("test_*.py"))
SERVER = """
import json, os, sys
import hypothesis, pytest, torch, triton
import nanoflow.llm
for line in sys.stdin:
    arguments, output = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(1, 2)
        sys.exit(pytest.main(arguments))
    _, status = os.waitpid(pid, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    pytest.importorskip("triton")
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    ) as process:
        yield process


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_kernels_through_the_interpreter(file: Path, server: subprocess.Popen[str], tmp_path: Path) -> None:
    assert server.stdin is not None and server.stdout is not None
    output = tmp_path / "output"
    server.stdin.write(json.dumps([["-q", "-p", "no:cacheprovider", str(file)], str(output)]) + "\n")
    server.stdin.flush()
    status = int(server.stdout.readline())
    if status == pytest.ExitCode.NO_TESTS_COLLECTED:
        pytest.skip("these versions of triton and numpy cannot interpret")
    assert status == 0, output.read_text()
