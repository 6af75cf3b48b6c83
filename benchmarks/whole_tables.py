"""Tables of one iteration, of its timeline and of whole runs, for docs/performance.md and README.md."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from benchmarks.timeline import Gap, Span, gaps, iterations, microseconds

__all__ = ["claims", "iteration", "runs", "timeline"]

Record = dict[str, Any] | None
NO_ITERATION = "Nothing is recorded yet: run `python -m benchmarks.iteration --profile` on a GPU."
OTHERS = {"tables": "tokens from the device, tables of rope", "copies": "copies of tokens and metadata"}
NO_RUNS = "Nothing is recorded yet: run `python -m benchmarks.offline_throughput` on a GPU."


def iteration(record: Record) -> Iterator[str]:
    """Every operation of an iteration: what it has to do, alone, and between the others; then the whole."""
    if record is None:
        yield NO_ITERATION
        return
    ceilings, whole = record["ceilings"], record["whole"]
    limit = record.get("power_limit_watts")
    yield (
        f"Recorded on {record['hardware']}{f', power limit {limit:,.0f} W' if limit else ''}, with ceilings of "
        f"{ceilings['tflops']:,.0f} TFLOP/s and {ceilings['read_gbytes_per_second']:,.0f} GB/s (read)."
    )
    yield ""
    timed = iterations(record["timeline"]) if "timeline" in record else []
    inside = microseconds(timed)
    yield (
        "| operation | runs | GFLOP | MB | floor, us | alone, us | of floor | W | in the iteration, us | of floor | "
        "alone, all, ms | in the iteration, all, ms |"
    )
    yield "|---" * 12 + "|"
    floors = alone = 0.0
    for row in record["operations"]:
        calls, floor, took = row["calls"], 1e3 * row["floor_ms"], 1e3 * row["milliseconds"]
        there = inside.pop(row["name"], 0.0)
        floors += floor * calls
        alone += took * calls
        each = there / calls
        yield (
            f"| {row['name']} | {calls} | {row['flops'] / 1e9:,.2f} | {row['bytes'] / 1e6:,.1f} | {floor:,.1f} | "
            f"{took:,.1f} | {floor / took:.0%} | {_number(row['watts'])} | {_number(each, 1)} | "
            f"{f'{floor / each:.0%}' if each else '-'} | {took * calls / 1e3:.2f} | {_number(there / 1e3, 2)} |"
        )
    for name, there in inside.items():
        yield f"| {OTHERS.get(name, name)} | | | | | | | | | | | {there / 1e3:.2f} |"
    together = sum(microseconds(timed).values())
    reached = f"{floors / together:.0%}" if together else "-"
    yield (
        f"| together | | | | {floors:,.0f} | {alone:,.0f} | {floors / alone:.0%} | | {_number(together)} | {reached} | "
        f"{alone / 1e3:.2f} | {_number(together / 1e3, 2)} |"
    )
    yield ""
    yield f"The whole iteration, each launched before the one before is collected: {_whole(record, whole)}."
    if "whole_again" in record:
        yield f"After the operations were timed, again: {_whole(record, record['whole_again'])}."
    took = 1e3 * whole["milliseconds"]
    yield (
        f"The first is {took / alone:.0%} of what the operations take alone; the floors together are "
        f"{floors / took:.0%} of it."
    )


def _whole(record: dict[str, Any], whole: dict[str, Any]) -> str:
    said = (
        f"{whole['milliseconds']:.1f} ms (p10 to p90: {whole['p10']:.1f} to {whole['p90']:.1f}), "
        f"{whole['rows_per_second']:,.0f} rows/s over {whole['iterations']} iterations"
    )
    if whole.get("joules") is not None:
        each = 1e3 * whole["joules"] / record["rows"]
        said += f", {whole['watts']:,.0f} W, {whole['joules']:.1f} J, {each:.1f} mJ a row"
    return f"{said}; the host takes {whole['launch_milliseconds']:.1f} ms to describe and launch it"


def timeline(record: Record) -> Iterator[str]:
    """Where the device idled in the iterations in the middle of the record."""
    if record is None or "timeline" not in record:
        yield NO_ITERATION
        return
    middle = iterations(record["timeline"])
    found = list(gaps(middle))
    begun, ended = middle[0][0].start, max(span.end for span in middle[-1])
    idle, count = sum(gap.length for gap in found), len(middle)
    seconds = ", ".join(f"{(_end(part) - part[0].start) / 1e3:.2f}" for part in middle)
    yield (
        f"{count} iterations of {seconds} ms, {len(middle[0])} kernels and copies each. The device idles "
        f"**{idle / (ended - begun):.2%}** of the time, {idle / count:,.0f} us an iteration:"
    )
    yield ""
    yield "| gaps | an iteration | us an iteration | share of the time | longest, us |"
    yield "|---|---|---|---|---|"
    kinds: dict[str, list[Gap]] = {
        "before and behind a memset": [],
        "other, between kernels": [],
        "around copies, and between iterations": [],
    }
    for gap in found:
        ends = (gap.before.kernel, gap.after.kernel)
        copied = any(name.startswith("Memcpy") for name in ends)
        memset = any(name.startswith("Memset") for name in ends)
        kinds[list(kinds)[2 if copied else 0 if memset else 1]].append(gap)
    for name, those in kinds.items():
        if those:
            total = sum(gap.length for gap in those)
            yield (
                f"| {name} | {len(those) / count:.0f} | {total / count:,.0f} | {total / (ended - begun):.2%} | "
                f"{max(gap.length for gap in those):.1f} |"
            )
    yield ""
    borders = [_border(first, second) for first, second in pairwise(middle)]
    whole, without = ([f"{border[at]:.0f}" for border in borders] for at in (0, 1))
    yield (
        f"From an iteration's last kernel to the first one of the next it takes {' and '.join(whole)} us, in which "
        "the tokens are copied to the host and the metadata to the device; for "
        f"{' and '.join(without)} us of it nothing runs."
    )


def _end(spans: list[Span]) -> float:
    return max(span.end for span in spans)


def _border(first: list[Span], second: list[Span]) -> tuple[float, float]:
    """Microseconds from the last kernel of an iteration to the next one's first, and without the copies between."""
    ended = max(span.end for span in first if span.operation != "copies")
    began = min(span.start for span in second if span.operation != "copies")
    copies = [span for span in (*first, *second) if span.operation == "copies" and ended <= span.start < began]
    return began - ended, began - ended - sum(span.end - span.start for span in copies)


def runs(record: Record) -> Iterator[str]:
    """Whole runs, in the order in which they were made."""
    if record is None:
        yield NO_RUNS
        return
    version = _version(record)
    yield (
        f"| run | made (UTC) | requests | total tokens/s | target | vLLM {version} | ratio | steady state, tokens/s | "
        "padding | idle, steady | W | mJ a token | host, ms |"
    )
    yield "|---" * 13 + "|"
    for name, run in sorted(record.items(), key=lambda item: str(item[1]["finished_at"])):
        figures, steady = run["figures"], run["steady_figures"]

        def of(key: str, group: dict[str, Any] = figures) -> float | None:
            return group[key]["median"] if key in group else None

        held = f"{_number(of('total_tokens_per_second', steady))} ({of('seconds', steady):.0f} s)" if steady else "-"
        joules, idle = of("joules_per_token"), of("device_idle_share", steady)
        yield (
            f"| {name} | {run['finished_at'][5:16].replace('T', ' ')} | {run['requests']:,} | "
            f"{run['total_tokens_per_second']:,.0f} | {run['target']:,} {_met(run)} | {_peer(run)} | "
            f"{_ratio(run)} | {held} | "
            f"{of('padding_share'):.1%} | {'-' if idle is None else f'{idle:.3%}'} | {_number(of('watts'))} | "
            f"{_number(joules and 1e3 * joules, 1)} | {_number(of('host_ms'), 1)} |"
        )


def claims(record: Record) -> Iterator[str]:
    """The same in short: what a run comes to, and what the other engine does."""
    if record is None:
        yield NO_RUNS
        return
    yield f"| requests | total tokens/s | vLLM {_version(record)} | | own target |"
    yield "|---|---|---|---|---|"
    for run in record.values():
        yield (
            f"| {_described(run)} | **{run['total_tokens_per_second']:,.0f}** | {_peer(run)} | {_ratio(run)} times | "
            f"{run['target']:,} {_met(run)} |"
        )


def _described(run: dict[str, Any]) -> str:
    workload, order = run["config"]["workload"], run["config"]["engine"]["order"]
    if "synthetic" in workload:
        tokens = (workload["synthetic"][key]["constant"] for key in ("input_len", "output_len"))
        return f"{run['requests']:,}: {' tokens in, '.join(f'{count:,}' for count in tokens)} out"
    return f"{run['requests']:,} of ShareGPT, {'in its order' if order == 'input' else 'longest first'}"


def _version(record: dict[str, Any]) -> str:
    return str(next(iter(record.values()))["vllm"]["version"])


def _peer(run: dict[str, Any]) -> str:
    vllm = run["vllm"]
    said = f"{vllm['total_tokens_per_second']:,}"
    return f"about {said}" if vllm["note"] == "about" else f"{said} ({vllm['note']})" if vllm["note"] else said


def _ratio(run: dict[str, Any]) -> str:
    return "-" if run["ratio_to_vllm"] is None else f"{run['ratio_to_vllm']:.2f}"


def _met(run: dict[str, Any]) -> str:
    return {True: "(met)", False: "(missed)", None: ""}[run["target_met"]]


def _number(value: float | None, digits: int = 0) -> str:
    return f"{value:,.{digits}f}" if value else "-"
