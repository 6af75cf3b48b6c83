"""Runs of the command line in processes of their own that start fast: torch is imported once, each run is a fork.

A test can send such a run any signal at any moment, as it could a run started from a shell.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

FAST = "from tests.unit.rank_zygote import install; install({sabotage!r}); "
SLOW = "import nanoflow.pipeline.reference_executor as e, time; run = e.ReferenceExecutor._run; "
SLOW += "e.ReferenceExecutor._run = lambda *a: (time.sleep({}), run(*a))[1]; "
"""What a run does first whose iterations are to take so many seconds more."""

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
LIMIT = 300.0
"""Seconds after which a run that is waited for is killed, on any machine."""

SERVER = """
import json, os, signal, sys
import nanoflow.runner
from nanoflow.cli import main
from nanoflow.search.cost_model import Ceilings
# Measuring takes seconds, and has nothing to do with what is tested.
nanoflow.runner.measure_ceilings = lambda *arguments: Ceilings(1e9, 1e9)
for line in sys.stdin:
    request = json.loads(line)
    if "wait" in request:
        _, status = os.waitpid(request["wait"], 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        folder = request["folder"]
        for descriptor, name, flags in (
            (0, request["stdin"] or os.devnull, os.O_RDONLY),
            (1, folder + "/stdout", os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
            (2, folder + "/stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        ):
            os.dup2(os.open(name, flags, 0o666), descriptor)
        os.environ.update(request["environment"])
        exec(request["before"])
        sys.argv = ["nanoflow", *request["argv"]]
        try:
            main()
        except SystemExit as end:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(end.code or 0)
        os._exit(0)
    print(pid, flush=True)
"""


class Run:
    """One run, which may be going on."""

    def __init__(self, server: "ForkServer", pid: int, folder: Path, fast: bool) -> None:
        self._server = server
        self.pid = pid
        self.folder = folder
        self.fast = fast
        """Whether its ranks and replicas are forks."""

    def wait(self) -> int:
        """Wait for its end; the exit status, or minus the signal that killed it."""
        limit = threading.Timer(LIMIT, self.kill, (signal.SIGKILL,))
        limit.start()
        try:
            return self._server.ask({"wait": self.pid})
        finally:
            limit.cancel()

    def kill(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text(encoding="utf-8")

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text(encoding="utf-8")


class ForkServer:
    """Starts runs; use as a context manager."""

    def __enter__(self) -> "ForkServer":
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, **ENVIRONMENT},
            # A terminal's program takes SIGINT; what a script starts in the background would ignore it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def ask(self, request: object) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def start(
        self,
        folder: Path,
        *argv: object,
        before: str = "",
        stdin: Path | None = None,
        fast: bool = False,
        sabotage: str = "",
    ) -> Run:
        """Start ``nanoflow ARGV`` in this process's environment, its output in files in `folder`.

        Args:
            before: Python that its process runs first.
            fast: its ranks and replicas are forks too, each of which runs the Python `sabotage` first.
        """
        request = {
            "folder": str(folder),
            "argv": [str(argument) for argument in argv],
            "before": (FAST.format(sabotage=sabotage) if fast else "") + before,
            "stdin": str(stdin) if stdin else None,
            "environment": {**os.environ, **ENVIRONMENT},
        }
        for name in ("stdout", "stderr"):
            (folder / name).write_text("")
        return Run(self, self.ask(request), folder, fast)


class Job:
    """A job in a folder of its own, on a CPU, and the output of the runs that share its work.

    Args:
        lines: of the input.
        sections: of the configuration, for what it has beside.
    """

    def __init__(
        self, server: ForkServer, folder: Path, model: Path, lines: Sequence[str], **sections: dict[str, Any]
    ) -> None:
        self.folder, self.server = folder, server
        (folder / "in.jsonl").write_text("".join(line + "\n" for line in lines))
        config: dict[str, dict[str, Any]] = {
            "model": {"path": str(model)},
            "workload": {"input": "in.jsonl"},
            "engine": {"device": "cpu", "kv_memory": "1MiB"},
            "output": {"path": str(folder / "o.jsonl")},
        }
        for name, section in sections.items():
            config[name] = config.get(name, {}) | section
        self.output = Path(config["output"]["path"])
        (folder / "job.yaml").write_text(yaml.safe_dump(config))

    def start(self, *arguments: str, **options: Any) -> Run:
        """Start a run; `options` are those of `ForkServer.start`."""
        return self.server.start(self.folder, "run", self.folder / "job.yaml", *arguments, **options)

    def records(self) -> dict[str | None, Any]:
        """By custom_id, without times; every line must be whole and of a request of its own."""
        lines = self.output.read_bytes().splitlines() if self.output.exists() else []
        records = {record["custom_id"]: record for record in map(json.loads, lines)}
        assert len(records) == len(lines)
        for record in records.values():
            if record["response"]:
                del record["response"]["body"]["created"]
        return records

    @property
    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(self.output.with_name("o.report.json").read_text())
        return report


def children(pid: int) -> list[int]:
    """The processes that it has started and that have not been waited for, in order."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if parent == pid:
            found.append(int(folder.name))
    return sorted(found)


def started_by(run: Run, count: int, seconds: float = 60.0) -> list[int]:
    """The ranks or replicas of a run, once they are `count`, in order."""
    end = time.monotonic() + seconds
    while True:
        found = children(run.pid)
        if run.fast:
            found = [child for parent in found for child in children(parent)]
        if len(found) >= count:
            return found
        assert time.monotonic() < end, f"it has not started {count} processes in {seconds} s"
        time.sleep(0.005)


def wait_for_text(run: Run, text: str, seconds: float = LIMIT) -> None:
    """Wait until its standard error has the text; it fails once the run has ended without."""
    end = time.monotonic() + seconds
    while text not in run.stderr:
        state = Path(f"/proc/{run.pid}/stat").read_text().rpartition(")")[2].split()[0]
        assert time.monotonic() < end and (state != "Z" or text in run.stderr), run.stderr
        time.sleep(0.01)


def wait_for_lines(path: Path, count: int, seconds: float = 60.0) -> None:
    """Wait until the file has at least `count` lines."""
    end = time.monotonic() + seconds
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < end, f"{path} has not got {count} lines in {seconds} s"
        time.sleep(0.005)
