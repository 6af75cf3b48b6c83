"""Runs of the command line in processes of their own that start fast: torch is imported once, each run is a fork.

A test can send such a run any signal at any moment, as it could a run started from a shell.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

FAST = "from tests.unit.rank_zygote import install; install({sabotage!r}); "
"""What a run does first whose ranks and replicas are to be forks, each of which runs `sabotage` first."""
SLOW = "import nanoflow.pipeline.reference_executor as e, time; run = e.ReferenceExecutor._run; "
SLOW += "e.ReferenceExecutor._run = lambda *a: (time.sleep({}), run(*a))[1]; "
"""What a run does first whose iterations are to take so many seconds more."""

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

    def __init__(self, server: "ForkServer", pid: int, folder: Path) -> None:
        self._server = server
        self.pid = pid
        self.folder = folder

    def wait(self) -> int:
        """Wait for its end; the exit status, or minus the signal that killed it."""
        return self._server.ask({"wait": self.pid})

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
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
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

    def start(self, folder: Path, *argv: object, before: str = "", stdin: Path | None = None) -> Run:
        """Start ``nanoflow ARGV``, its output in files in `folder`; `before` is Python that its process runs first."""
        request = {
            "folder": str(folder),
            "argv": [str(argument) for argument in argv],
            "before": before,
            "stdin": str(stdin) if stdin else None,
        }
        return Run(self, self.ask(request), folder)


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

    def start(self, *arguments: str, before: str = "", stdin: Path | None = None) -> Run:
        """Start a run; `before` is Python that its process runs first."""
        return self.server.start(self.folder, "run", self.folder / "job.yaml", *arguments, before=before, stdin=stdin)

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


def wait_for_lines(path: Path, count: int, seconds: float = 60.0) -> None:
    """Wait until the file has at least `count` lines."""
    end = time.monotonic() + seconds
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < end, f"{path} has not got {count} lines in {seconds} s"
        time.sleep(0.005)
