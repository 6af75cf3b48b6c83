"""Check and time the kernels, print the tables and record them.

    python -m benchmarks.kernels                          # all sections, benchmarks/results/kernels.json
    python -m benchmarks.kernels gemm prefill_attention   # some of them; what is recorded of the others is kept
    python -m benchmarks.kernels --list

A section is a module of this package with ``check(device) -> rows`` and ``time(device, quick) -> rows`` (see
`common.check_row` and `common.time_row`). A section that fails is reported and the others run. The exit status is 1 if
a check failed, a section raised, or, without --quick, a target was missed.
"""

import argparse
import datetime
import importlib
import json
import pkgutil
import platform
import re
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import benchmarks.kernels
from benchmarks.kernels.common import device_ceilings, power_limit_watts

RESULTS = Path(__file__).parent.parent / "results" / "kernels.json"


def sections() -> list[str]:
    """Names of the sections there are."""
    names = (module.name for module in pkgutil.iter_modules(benchmarks.kernels.__path__))
    return sorted(name for name in names if not name.startswith("_") and name != "common")


def machine(device: str) -> dict[str, Any]:
    """Hardware and versions, as the record names them."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        pass
    if torch.device(device).type != "cuda":
        return {"hardware": f"CPU, {platform.machine()}", "versions": versions}
    properties = torch.cuda.get_device_properties(device)
    versions["cuda"] = str(torch.version.cuda)
    hardware = f"{properties.name}, {properties.multi_processor_count} SMs"
    return {"hardware": hardware, "power_limit_watts": power_limit_watts(), "versions": versions}


def run_section(name: str, device: str, args: argparse.Namespace) -> dict[str, Any]:
    """One section's rows, whatever goes wrong in it."""
    result: dict[str, Any] = {"checks": [], "times": [], "errors": []}
    begun = time.perf_counter()
    try:
        module = importlib.import_module(f"benchmarks.kernels.{name}")
    except Exception:
        result["errors"].append(traceback.format_exc())
        return result
    for wanted, part, call in (
        (not args.no_check, "checks", lambda: module.check(device)),
        (not args.no_time, "times", lambda: module.time(device, args.quick)),
    ):
        if not wanted:
            continue
        try:
            result[part] = call()
        except Exception:
            result["errors"].append(traceback.format_exc())
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()
    result["seconds"] = round(time.perf_counter() - begun, 1)
    result["recorded"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return result


def record(path: Path, device: str, name: str, result: dict[str, Any]) -> None:
    """Put a section into the file at once. Sections recorded on other hardware or with other versions are dropped."""
    here = machine(device)
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        content = {}
    if {key: content.get(key) for key in here} != here:
        content = {**here, "sections": {}}
    if torch.device(device).type == "cuda":
        content["ceilings"] = vars(device_ceilings(device))
    content["sections"][name] = result
    content["sections"] = dict(sorted(content["sections"].items()))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(one_row_a_line(content))


def one_row_a_line(content: dict[str, Any]) -> str:
    """The record as JSON in which each row of a table is a line."""
    rows: list[str] = []

    def aside(table: list[dict[str, Any]]) -> list[str]:
        rows.extend(json.dumps(row, default=float) for row in table)
        return [f"row {index}" for index in range(len(rows) - len(table), len(rows))]

    sections = {
        name: {**section, "checks": aside(section["checks"]), "times": aside(section["times"])}
        for name, section in content["sections"].items()
    }
    text = json.dumps({**content, "sections": sections}, indent=1, default=float)
    return re.sub(r'"row (\d+)"', lambda found: rows[int(found[1])], text) + "\n"


def label(row: dict[str, Any]) -> str:
    """What a row is of."""
    return " ".join(str(row[key]) for key in ("name", "shape", "config") if row.get(key))


def number(value: float | None, digits: int = 3) -> str:
    """`value` to so many significant digits."""
    if not isinstance(value, int | float):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def tables(results: dict[str, dict[str, Any]]) -> str:
    """All rows as text: failed checks and the times, with the share of the floor that was reached."""
    lines = []
    for section, result in results.items():
        checks, bad = result["checks"], [row for row in result["checks"] if not row.get("ok")]
        worst = max((row["error"] / row["limit"] for row in checks if row.get("limit")), default=0.0)
        state = f"{len(bad)} FAILED" if bad else f"all right (largest error {worst:.0%} of its limit)"
        lines.append(f"== {section}: {len(checks)} checks, {state}, {result.get('seconds', 0)} s")
        for row in bad:
            lines.append(f"  WRONG {label(row)}: {number(row.get('error'))} > {number(row.get('limit'))}")
        for row in result["times"]:
            took, floor = row["milliseconds"], row.get("floor_ms")
            reached = f"{floor / took:5.0%} of floor" if floor and took else ""
            verdict = {True: "met", False: "MISSED", None: ""}[row.get("met")]
            lines.append(
                f"  {label(row)}: {number(took, 4)} ms "
                f"[{number(row.get('p10'))} {number(row.get('p90'))}] {number(row.get('tflops'))} TFLOP/s "
                f"{number(row.get('gbytes_per_second'))} GB/s {reached} {number(row.get('watts'))} W "
                f"{row.get('target') or ''} {verdict}".rstrip()
            )
        lines += [f"  ERROR {error.strip()}" for error in result["errors"]]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="SECTION", help="sections to run; all if none is named")
    parser.add_argument("--out", type=Path, default=None, help=f"record here instead of {RESULTS.name}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and shorter; recorded only with --out")
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--no-time", action="store_true")
    parser.add_argument("--list", action="store_true", help="print the sections")
    args = parser.parse_args(arguments)
    known = sections()
    if args.list:
        print("\n".join(known))
        return 0
    unknown = [name for name in args.names if name not in known]
    if unknown:
        parser.error(f"no section {unknown[0]!r}; there are {', '.join(known)}")
    on_gpu = torch.device(args.device).type == "cuda"
    path = args.out or (RESULTS if on_gpu and not (args.quick or args.no_check or args.no_time) else None)
    results = {}
    for name in args.names or known:
        print(f"{name} ...", file=sys.stderr, flush=True)
        results[name] = run_section(name, args.device, args)
        if path is not None:
            record(path, args.device, name, results[name])
    print(tables(results))
    rows = [row for result in results.values() for row in result["times"]]
    checks = [row for result in results.values() for row in result["checks"]]
    missed = not args.quick and any(row.get("met") is False for row in rows)
    failed = any(result["errors"] for result in results.values()) or not all(row.get("ok") for row in checks)
    return int(failed or missed)


if __name__ == "__main__":
    sys.exit(main())
