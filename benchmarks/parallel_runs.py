"""Whole offline runs on two GPUs, ramp and tail included: one model on both, and a replica on each.

    python -m benchmarks.parallel_runs                                # all runs, on two GPUs of 141 GB
    python -m benchmarks.parallel_runs 8b-data2 --set workload.synthetic.requests=400
    python -m benchmarks.parallel_runs 8b-tensor2 --set model.path=configs/models/tiny-llama --set engine.device=cpu ...

Each run is `nanoflow run` of a shipped job in a process of its own, once, with random weights, greedy. What its report
says goes to benchmarks/results/parallel_runs.json under the run's name, merged after every run.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from nanoflow.search.files import replace_file

RESULTS = Path(__file__).parent / "results" / "parallel_runs.json"
RUNS = {
    "70b-tensor2": ("synthetic-70b", {}),
    "8b-tensor2": ("synthetic-8b", {"parallel.tensor": 2}),
    "8b-data2": ("synthetic-8b", {"parallel.data": 2}),
}
TARGETS = {"70b-tensor2": 7200}
"""Total tokens a second on two H200s."""
CURVES = ("timeline", "plan_timeline", "plan_text", "goodput")
"""What of a report is left out: long, or about what is not measured here."""


def run(name: str, overrides: list[str]) -> dict[str, Any]:
    """The run's report; SystemExit if it failed."""
    job, own = RUNS[name]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out.jsonl"
        given = [*(f"{key}={value}" for key, value in own.items()), *overrides, f"output.path={output}"]
        command = [sys.executable, "-m", "nanoflow", "run", job, "--quiet"]
        done = subprocess.run([*command, *(part for each in given for part in ("--set", each))])
        if done.returncode:
            raise SystemExit(f"{name}: nanoflow run ended with {done.returncode}")
        report: dict[str, Any] = json.loads(output.with_name("out.report.json").read_text())
    for value in report.values():
        if isinstance(value, dict):
            value.pop("curve", None)
    for section in ("output", "report", "metrics"):
        del report["config"][section]
    report["config"]["model"]["path"] = Path(report["config"]["model"]["path"]).name
    return {key: value for key, value in report.items() if key not in CURVES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"of {', '.join(RUNS)}; default: all")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if unknown := [name for name in args.runs if name not in RUNS]:
        parser.error(f"{unknown[0]!r} is no run; there are {', '.join(RUNS)}")
    for name in args.runs or RUNS:
        report = run(name, args.overrides)
        known = json.loads(args.out.read_text()) if args.out.exists() else {}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(args.out, json.dumps({**known, name: report}, indent=1) + "\n")
        target = f", target {TARGETS[name]:,}" if name in TARGETS else ""
        watts = f", {report['energy']['mean_watts']:,.0f} W" if report["energy"] else ""
        print(f"{name}: {report['total_tokens_per_second']:,.0f} total tokens/s{target}{watts}", flush=True)


if __name__ == "__main__":
    main()
