"""Timelines as traces that Perfetto (ui.perfetto.dev) and Chrome (about:tracing) open, and traces read back.

The form is Chrome's Trace Event Format, as a JSON object: one process for the device, a thread for each lane, a
complete event (``X``) for each nano-op, flow arrows (``s`` to ``f``) for the waits across lanes, and counters (``C``).
Times are microseconds. What NanoFlow needs to read a trace back stands in ``otherData``.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from nanoflow.errors import InputError, OutputError
from nanoflow.ops.operation import Work
from nanoflow.pipeline.program import Program
from nanoflow.search.timeline import Span, Timeline, measured_timeline

__all__ = ["Trace", "TraceInfo", "read_trace", "trace_events", "write_trace"]

PID = 1
FORMAT = 1
"""Of ``otherData``; it grows when a key is added, renamed or given another meaning."""
RESOLUTION = 1e-3
"""Microseconds that viewers tell apart. An arrow that left a nano-op at its very end would hang on the next one."""


@dataclass(frozen=True)
class TraceInfo:
    """What a trace is of."""

    plan: str
    """Its text form."""
    model: str
    layers: int
    device: str
    device_sms: int
    itemsize: int
    """Bytes of an element of weights and activations."""
    mix: str
    works: list[Work]
    """Of each nano-batch."""
    seconds: float
    """Of the whole iteration: layers, and what stands before and after them."""
    iterations: int
    """How many were timed; the trace is of one of them, the one of median length."""
    source: Literal["measured", "estimated"] = "measured"
    versions: Mapping[str, str] = field(default_factory=dict)
    format: int = FORMAT


@dataclass(frozen=True)
class Trace:
    """A trace that was read: when each step started and ended, in seconds, by its number in the program."""

    path: Path
    info: TraceInfo
    times: Mapping[int, tuple[float, float]]

    def timeline(self, program: Program) -> Timeline:
        """The timeline of `program`, which must be the one that was traced. Raises InputError."""
        beyond = max(self.times, default=0)
        if beyond >= len(program.steps):
            raise InputError(
                f"{self.path}: event of step {beyond}, but the plan has {len(program.steps)} on {self.info.layers} "
                "layers: it is the trace of another plan or model; trace this one"
            )
        times = [self.times.get(step, (0.0, 0.0)) for step in range(len(program.steps))]
        return measured_timeline(program, times, self.info.works, self.info.itemsize, self.info.device_sms)


def write_trace(timeline: Timeline, info: TraceInfo, path: Path) -> None:
    """Write `timeline` of a whole iteration; raises OutputError."""
    events = ",\n".join(json.dumps(event) for event in trace_events(timeline, info.device))
    about = json.dumps(asdict(info))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            f'{{"displayTimeUnit": "ns", "otherData": {about},\n"traceEvents": [\n{events}\n]}}\n', encoding="utf-8"
        )
    except OSError as error:
        raise OutputError(f"{path}: the trace cannot be written: {error.strerror}; choose another --out") from None


def trace_events(timeline: Timeline, device: str) -> Iterator[dict[str, Any]]:
    """All events. Nano-ops without rows have none."""
    threads = {lane: number for number, lane in enumerate(timeline.lanes, start=1)}
    yield _meta("process_name", 0, name=device)
    for lane, thread in threads.items():
        yield _meta("thread_name", thread, name=f"lane {lane}")
        yield _meta("thread_sort_index", thread, sort_index=thread)
    by_step = {span.step: span for span in timeline.spans if span.end > span.start}
    for span in by_step.values():
        yield _nano_op(span, threads[span.lane])
    arrows = ((by_step[wait], span) for span in by_step.values() for wait in span.waits if wait in by_step)
    for number, (first, second) in enumerate(arrows, start=1):
        about = {"name": "wait", "cat": "wait", "id": number, "pid": PID}
        begin = max(first.start * 1e6, first.end * 1e6 - RESOLUTION)
        yield {"ph": "s", "tid": threads[first.lane], "ts": _time(begin), **about}
        yield {"ph": "f", "bp": "e", "tid": threads[second.lane], "ts": _time(second.start * 1e6), **about}
    yield from _counters(timeline)


def read_trace(path: Path) -> Trace:
    """Read what `write_trace` wrote. Raises InputError."""
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; name a file that `plan trace` wrote") from None
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error}); name a file that `plan trace` wrote") from None
    about = data.get("otherData") if isinstance(data, dict) else None
    if not isinstance(about, dict) or "format" not in about:
        raise InputError(f"{path}: is no trace of a plan; name a file that `plan trace` wrote")
    if about["format"] != FORMAT:
        raise InputError(f"{path}: otherData.format: {about['format']} is not the {FORMAT} known here; trace it again")
    try:
        info = TypeAdapter(TraceInfo).validate_python(about)
        events = TypeAdapter(list[dict[str, Any]]).validate_python(data.get("traceEvents"))
        times = {
            int(event["args"]["step"]): (event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6)
            for event in events
            if event.get("ph") == "X"
        }
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise InputError(f"{path}: {key}: {first['msg'].lower()}; trace the plan again") from None
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: a nano-op's event lacks {error}; trace the plan again") from None
    return Trace(path, info, times)


def _nano_op(span: Span, thread: int) -> dict[str, Any]:
    return {
        "name": span.name,
        "cat": span.resource,
        "ph": "X",
        "pid": PID,
        "tid": thread,
        "ts": _time(span.start * 1e6),
        "dur": _time((span.end - span.start) * 1e6),
        "args": {
            "step": span.step,
            "layer": span.layer,
            "nano-batch": span.nano_batch or "all",
            "partition": span.partition,
            "SMs": span.sms if span.sms is not None else "not confined",
            "FLOPs": span.flops,
            "bytes": span.bytes,
            "TFLOP/s": round(span.flops / span.seconds / 1e12, 3),
            "GB/s": round(span.bytes / span.seconds / 1e9, 3),
            **_wire(span),
        },
    }


def _wire(span: Span) -> dict[str, float]:
    """Of a collective: what a rank sends."""
    if not span.wire_bytes:
        return {}
    return {"wire bytes": span.wire_bytes, "wire GB/s": round(span.wire_bytes / span.seconds / 1e9, 3)}


def _counters(timeline: Timeline) -> Iterator[dict[str, Any]]:
    """Each counter at every moment at which it changes, a value a lane; viewers stack them."""
    quantities = [("SMs in use", "sms", 1.0), ("TFLOP/s", "flops_per_second", 1e12), ("GB/s", "bytes_per_second", 1e9)]
    if timeline.has_wire:
        quantities.append(("wire GB/s", "wire_bytes_per_second", 1e9))
    nothing = dict.fromkeys(timeline.lanes, 0.0)
    for name, attribute, unit in quantities:
        end = None
        for segment in timeline.segments:
            if end is not None and segment.start > end:
                yield _counter(name, end, nothing)
            values = {load.lane: round(getattr(load, attribute) / unit, 3) for load in segment.loads}
            yield _counter(name, segment.start, nothing | values)
            end = segment.end
        if end is not None:
            yield _counter(name, end, nothing)


def _counter(name: str, seconds: float, values: Mapping[str, float]) -> dict[str, Any]:
    return {"name": name, "ph": "C", "pid": PID, "tid": 0, "ts": _time(seconds * 1e6), "args": dict(values)}


def _meta(name: str, thread: int, /, **args: Any) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": PID, "tid": thread, "ts": 0, "args": args}


def _time(microseconds: float) -> float:
    """Picoseconds are more than any clock gives, and keep the ends of neighbours in order."""
    return round(microseconds, 6)
