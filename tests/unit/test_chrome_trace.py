"""Traces of timelines: the form that Perfetto and Chrome read, and reading back what was written."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nanoflow.errors import InputError, OutputError
from nanoflow.pipeline.plan_text import parse_plan
from nanoflow.pipeline.program import Program, compile_program
from nanoflow.plans.chrome_trace import TraceInfo, read_trace, write_trace
from nanoflow.search.mix import shared_works
from nanoflow.search.timeline import Timeline, measured_timeline
from tests.unit.test_timeline import GRAPH, SPLIT, WORK, estimate

PLAN = parse_plan(SPLIT)
PROGRAM: Program = compile_program(PLAN, GRAPH)
INFO = TraceInfo(
    plan=SPLIT,
    model="tiny",
    layers=GRAPH.layers,
    device="a device",
    device_sms=100,
    itemsize=4,
    mix="a mix",
    works=list(shared_works(PLAN, WORK)),
    seconds=0.25,
    iterations=5,
    versions={"torch": "2.11"},
)


@pytest.fixture(scope="module")
def timeline() -> Timeline:
    """Made-up times with gaps between nano-ops."""
    times = [(span.start * 1.5 + 1e-6, span.end * 1.5 - 1e-6) for span in estimate(PLAN).spans]
    return measured_timeline(PROGRAM, [(a, max(a, b)) for a, b in times], INFO.works, 4, 100)


@pytest.fixture(scope="module")
def written(timeline: Timeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "folder" / "trace.json"
    write_trace(timeline, INFO, path)
    return path


def events(path: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == kind]


def test_every_event_has_what_viewers_ask_for(written: Path, timeline: Timeline) -> None:
    every = json.loads(written.read_text())["traceEvents"]
    assert Counter(event["ph"] for event in every).keys() == {"M", "X", "s", "f", "C"}
    for event in every:
        assert {"name", "ph", "pid", "tid", "ts"} <= event.keys() and event["ts"] >= 0
    lanes = {event["args"]["name"]: event["tid"] for event in events(written, "M") if event["name"] == "thread_name"}
    assert lanes == {"lane compute": 1, "lane memory": 2}
    spans = [span for span in timeline.spans if span.end > span.start]
    assert len(events(written, "X")) == len(spans)
    for event, span in zip(events(written, "X"), spans, strict=True):
        assert event["name"] == span.name and event["tid"] == lanes[f"lane {span.lane}"]
        assert event["ts"] == pytest.approx(span.start * 1e6) and event["dur"] == pytest.approx(span.seconds * 1e6)
        args = event["args"]
        assert (args["layer"], args["SMs"], args["FLOPs"], args["bytes"]) == (
            span.layer,
            span.sms,
            span.flops,
            span.bytes,
        )
        assert args["GB/s"] == pytest.approx(span.bytes / span.seconds / 1e9, abs=1e-3)


def test_arrows_lead_from_what_is_waited_for_to_what_waits(written: Path, timeline: Timeline) -> None:
    starts = {event["id"]: event for event in events(written, "s")}
    ends = {event["id"]: event for event in events(written, "f")}
    assert len(starts) == len(events(written, "s")) and starts.keys() == ends.keys()
    waits = [(wait, span.step) for span in timeline.spans for wait in span.waits]
    assert len(waits) == len(starts) > 10
    found = []
    slices = events(written, "X")
    for number, start in starts.items():
        end = ends[number]
        assert end["bp"] == "e" and (start["name"], start["cat"]) == (end["name"], end["cat"])
        inside = [e for e in slices if e["tid"] == start["tid"] and e["ts"] <= start["ts"] < e["ts"] + e["dur"]]
        at = [e for e in slices if e["tid"] == end["tid"] and e["ts"] == end["ts"]]
        found.append((inside[0]["args"]["step"], at[0]["args"]["step"]))
    assert found == waits


def test_counters_change_in_order_and_end_at_nothing(written: Path) -> None:
    counters: dict[str, list[dict[str, Any]]] = {}
    for event in events(written, "C"):
        counters.setdefault(event["name"], []).append(event)
    assert counters.keys() == {"SMs in use", "TFLOP/s", "GB/s"}
    for course in counters.values():
        moments = [event["ts"] for event in course]
        assert moments == sorted(moments)
        assert all(event["args"].keys() == {"compute", "memory"} for event in course)
        assert set(course[-1]["args"].values()) == {0.0}
    most = [sum(event["args"].values()) for event in counters["SMs in use"]]
    assert max(most) == 100 and 0.0 in most[:-1], "the gaps between nano-ops"


def test_a_trace_reads_back(written: Path, timeline: Timeline) -> None:
    trace = read_trace(written)
    assert trace.info == INFO
    again = trace.timeline(PROGRAM)
    assert again.source == "measured"
    for one, other in zip(again.spans, timeline.spans, strict=True):
        if other.end > other.start:
            assert (one.start, one.end) == (pytest.approx(other.start), pytest.approx(other.end))
            assert replace(one, start=0, end=0) == replace(other, start=0, end=0)
    assert again.period().seconds == pytest.approx(timeline.period().seconds)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[", "is not JSON"),
        ("[]", "is no trace of a plan"),
        ('{"otherData": {"format": 99}}', "otherData.format: 99 is not the 1 known here"),
        ('{"otherData": {"format": 1}}', "plan: field required"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"t\.json: ") as caught:
        read_trace(path)
    assert expected in str(caught.value)


def test_events_that_lack_something_or_are_of_another_plan(written: Path, tmp_path: Path) -> None:
    data = json.loads(written.read_text())
    path = tmp_path / "t.json"
    event = next(event for event in data["traceEvents"] if event["ph"] == "X")
    event["args"]["step"] = 10**6
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"event of step 1000000, but the plan has \d+ on 6 layers"):
        read_trace(path).timeline(PROGRAM)
    del event["args"]["step"]
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match="a nano-op's event lacks 'step'"):
        read_trace(path)


def test_a_trace_that_cannot_be_written(timeline: Timeline, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="the trace cannot be written"):
        write_trace(timeline, INFO, tmp_path / "file" / "t.json")
