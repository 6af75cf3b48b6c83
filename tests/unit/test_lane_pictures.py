"""The pictures of lanes show the streams and events that the executor uses."""

from xml.etree import ElementTree

import pytest

from benchmarks import lane_pictures
from nanoflow.pipeline.lanes import launch_order

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("name", lane_pictures.PLANS)
def test_pictures_are_up_to_date(name: str) -> None:
    shown = (lane_pictures.DOCS / name).read_text(encoding="utf-8")
    assert shown == lane_pictures.draw(name), "run python -m benchmarks.lane_pictures"
    assert f"({name})" in (lane_pictures.DOCS / "architecture.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", lane_pictures.PLANS)
def test_every_event_and_every_long_nano_op_is_there(name: str) -> None:
    program = lane_pictures.program_of(name)
    order = launch_order(program)
    picture = ElementTree.fromstring(lane_pictures.draw(name))
    waits = sum(len(launch.waits) for launch in order.launches) + len(order.ends)
    assert len([path for path in picture.iter(f"{SVG}path") if "marker-end" in path.attrib]) == waits
    texts = [text.text for text in picture.iter(f"{SVG}text")]
    for step in program.steps:
        if step.nano_op.op not in lane_pictures.SHORT:
            assert any(text and text.startswith(step.nano_op.op) for text in texts)
    placed = lane_pictures.boxes(program, order, 0.0)
    ends = {box.launch.step: box.end for box in placed}
    for box in placed:
        assert all(ends[before] <= box.start for before in program.predecessors[box.launch.step])
