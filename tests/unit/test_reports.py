"""Reports of runs: what `make_report` sums up, how it is found again, what page, Markdown and JSON say."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from nanoflow.cli import app
from nanoflow.config_schema import EngineSection, ModelSection, RunConfig
from nanoflow.errors import InputError
from nanoflow.loading import build_engine, open_model
from nanoflow.pipeline.plan_text import parse_plan
from nanoflow.power import Energy
from nanoflow.recording import Recorder
from nanoflow.replicas.figures import ReplicaFigures
from nanoflow.report import SCHEMA_VERSION, RunReport
from nanoflow.reports.charts import Line, Scale, chart, time_scale
from nanoflow.reports.figures import SUMMARY, difference, write_number
from nanoflow.reports.load import load_runs
from nanoflow.reports.page import as_html
from nanoflow.reports.text import as_json, as_markdown
from nanoflow.sampling_params import SamplingParams
from nanoflow.search.cost_model import Ceilings
from nanoflow.summing_up import make_report
from tests.unit.tiny_model import save_tiny_llama

cli = CliRunner()
ENERGY = Energy(joules=500.0, seconds=2.0, mean_watts=250.0, power_limit_watts=700.0)


def shown(report: RunReport) -> str:
    """The summary as the terminal shows it, on lines as long as they are."""
    console = Console(width=400, file=StringIO())
    report.print(console)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> RunReport:
    """Of a run of nine requests on the tiny model, two of which are error records."""
    folder = save_tiny_llama(tmp_path_factory.mktemp("tiny"))
    sizes = EngineSection(device="cpu", page_size=8, kv_memory="128KiB", max_batch_tokens=32)
    model = open_model(ModelSection(path=str(folder), dtype="float32"), sizes)
    engine = build_engine(model, sizes)
    recorder = Recorder()
    engine.observers.append(recorder.observe)
    for number in range(7):
        engine.submit([3 + number] * (5 + 3 * number), SamplingParams(max_tokens=10 + number, ignore_eos=True))
    recorder.error()
    recorder.error()
    for output in engine.run():
        recorder.add(output)
    engine.close()
    config = RunConfig.model_validate(
        {
            "model": {"path": str(folder)},
            "workload": {"synthetic": {"input_len": 4, "output_len": 4}},
            "report": {"slo": {"ttft_ms": 1e6, "tpot_ms": 1e-3}},
        }
    )
    return make_report(
        config=config,
        model=model,
        engine=engine,
        recorder=recorder,
        ceilings=Ceilings(flops=1e9, bytes_per_second=1e9),
        seconds=2.0,
        load_seconds=0.5,
        energy=ENERGY,
        earlier=3,
    )


def save(report: RunReport, folder: Path, name: str) -> Path:
    report.save(folder / f"{name}.report.json")
    (folder / f"{name}.jsonl").touch()
    return folder / f"{name}.jsonl"


def test_a_report_adds_up(report: RunReport) -> None:
    assert (report.requests, report.completed, report.errors, report.earlier) == (9, 7, 2, 3)
    assert report.input_tokens == sum(5 + 3 * n for n in range(7))
    assert report.output_tokens == sum(10 + n for n in range(7))
    assert report.output_tokens_per_second == report.output_tokens / 2
    for percentiles in (report.time_to_first_token_ms, report.end_to_end_ms, report.inter_token_ms):
        assert percentiles is not None and len(percentiles.curve) == 101
        assert percentiles.curve == sorted(percentiles.curve) and percentiles.curve[50] == float(
            f"{percentiles.p50:.6g}"
        )
    assert report.goodput is not None and (report.goodput.share, report.goodput.requests_per_second) == (0, 0)
    assert report.bound_seconds["power"] == 500 / 700 and report.bound_reached["power"] == 250 / 700
    assert report.energy is not None
    assert report.energy.joules_per_token == 500 / (report.input_tokens + report.output_tokens)
    assert parse_plan(report.plan_text).capacity == 32
    assert report.plan_share == 1 and "in sequence" not in shown(report)
    assert "75.0% of them by a plan, the others in sequence" in shown(replace(report, plan_share=0.75))
    width = report.timeline["interval_seconds"]
    assert len({len(values) for name, values in report.timeline.items() if name != "interval_seconds"}) == 1
    assert sum(report.timeline["completed"]) == 7 and sum(report.timeline["errors"]) == 2
    assert sum(report.timeline["iterations"]) == pytest.approx(report.iterations, rel=1e-3) and width > 0


def test_a_saved_report_is_read_back_equal_by_any_of_the_runs_files(report: RunReport, tmp_path: Path) -> None:
    save(report, tmp_path, "x")
    for ending in (".jsonl", ".report.json", ".series.jsonl", ".config.yaml", ".state.json"):
        (run,) = load_runs([tmp_path / f"x{ending}"])
        assert run.name == "x" and run.path == tmp_path / "x.report.json"
        assert run.report == report
    assert [run.name for run in load_runs([tmp_path, tmp_path / "x.jsonl"])] == ["x"]


def test_runs_are_told_apart_by_their_folders(report: RunReport, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        save(report, tmp_path / folder, "x")
    assert [run.name for run in load_runs([tmp_path / "b", tmp_path / "a"])] == ["b/x", "a/x"]


def test_a_report_of_another_version_is_refused_with_what_to_do(report: RunReport, tmp_path: Path) -> None:
    path = tmp_path / "x.report.json"
    data = json.loads(json.dumps(asdict(report)))
    older = {key: value for key, value in data.items() if key != "schema_version"}
    cases = [
        (json.dumps(older), rf"schema_version: 1 is older than the {SCHEMA_VERSION} .*; run the job again"),
        (json.dumps(data | {"schema_version": 99}), "99 is newer than .*; update NanoFlow"),
        (json.dumps(data | {"schema_version": "two"}), "schema_version: two is older"),
        ("[]", "is not the report of a run"),
        ('{"requests": 1', "is not JSON"),
        (json.dumps({k: v for k, v in data.items() if k != "timeline"}), "timeline: field required; run the job again"),
        (json.dumps(data | {"seconds": "long"}), "seconds: "),
    ]
    for text, message in cases:
        path.write_text(text)
        with pytest.raises(InputError, match=rf"x\.report\.json: .*{message}"):
            load_runs([path])


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    (tmp_path / "y.jsonl").touch()
    for path, message in (
        (tmp_path / "none.jsonl", "no such file; name a run's output"),
        (tmp_path / "y.jsonl", "y.report.json is missing: the run is not over"),
        (tmp_path, "no run's report"),
    ):
        with pytest.raises(InputError, match=message):
            load_runs([path])


class Page(HTMLParser):
    """The page's elements, and a failure where one is not closed as it was opened."""

    VOID = frozenset({"meta", "br", "path", "polyline", "polygon"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def numbers(points: str | None) -> np.ndarray:
    return np.array([[float(x) for x in pair.split(",")] for pair in (points or "").split()])


def runs_of(reports: Sequence[RunReport], folder: Path) -> list[Path]:
    return [save(report, folder, f"run-{number}") for number, report in enumerate(reports)]


def test_the_page_stands_alone_and_is_well_formed(report: RunReport, tmp_path: Path) -> None:
    text = as_html(load_runs(runs_of([report], tmp_path)))
    page = Page(text)
    assert not page.of("script") and not page.of("link") and not page.of("img")
    assert not re.search(r"""(src|href)=|url\(|@import|https?://""", text)
    charts = page.of("svg")
    assert len(charts) >= 9
    assert all(chart["role"] == "img" and len(chart["aria-label"] or "") > 20 for chart in charts)
    for line in page.of("polyline"):
        places = numbers(line["points"])
        assert ((places >= 0) & (places <= 100)).all() and (np.diff(places[:, 0]) >= 0).all()
    for word in (
        "Throughput over time",
        "Batch composition",
        "KV cache occupancy",
        "Bounds",
        "Energy",
        "Plan",
        "gate_up",
    ):
        assert word in text
    assert "500 J over 2 s, 250 W on average" in text and "prefers-color-scheme: dark" in text
    assert "@media (max-width" in text and "max_batch_tokens: 2048" in text


def test_several_runs_stand_side_by_side_with_their_differences(report: RunReport, tmp_path: Path) -> None:
    config = report.config | {"engine": {**report.config["engine"], "max_running": 7}}
    faster = replace(
        report, output_tokens_per_second=report.output_tokens_per_second * 1.25, seconds=1.6, config=config, energy=None
    )
    runs = load_runs(runs_of([report, faster], tmp_path))
    text = as_html(runs)
    Page(text)
    assert '<em class="better">+25.0%</em>' in text and '<em class="better">-20.0%</em>' in text
    assert re.search(r"engine\.max_running</td><td class=\"wrap\">1024</td><td class=\"wrap\">7<", text)
    markdown = as_markdown(runs)
    assert "(+25.0%)" in markdown and "(-20.0%)" in markdown and "| run-0 | run-1 |" in markdown
    data = json.loads(as_json(runs))
    assert data["differences"]["output_tokens_per_second"] == [pytest.approx(0.25)]
    assert data["differences"]["energy.joules"] == [None]
    assert [run["name"] for run in data["runs"]] == ["run-0", "run-1"]
    assert data["runs"][0]["report"] == json.loads(json.dumps(asdict(report)))
    worse = as_html(load_runs(runs_of([faster, report], tmp_path)))
    assert '<em class="worse">-20.0%</em>' in worse


def test_replicas_have_a_table_of_their_own(report: RunReport, tmp_path: Path) -> None:
    one = ReplicaFigures(0, 5, 1, 1234, 20, 300, 0.875, 2.5, {"total_tokens_per_second": 4321.0}, None)
    other = replace(one, replica=1, iterations=0, load_seconds=None, steady=None, lost="replica 1 <was> killed")
    several = replace(report, replicas=[one, other])
    (run,) = load_runs([save(several, tmp_path, "several")])
    assert run.report == several
    (alone,) = load_runs([save(report, tmp_path, "alone")])
    text = as_markdown([run])
    assert "## Replicas\n" in text and "| 0 | 5 | 1 | 1,234 | 20 | 15 | 87.5 | 2.5 | 4,321 | \N{EN DASH} |" in text
    assert "## Replicas of several" in as_markdown([alone, run]) and "Replicas" not in as_markdown([alone])
    page = as_html([run])
    assert "<h2>Replicas</h2>" in page and "replica 1 &lt;was&gt; killed" in page
    assert "<h2>Replicas</h2>" not in as_html([alone])
    assert "5 requests and 1 with errors, 1,234 output tokens in 20 iterations, 88% of the time busy" in shown(several)


def test_what_a_job_is_called_cannot_become_part_of_the_page(report: RunReport, tmp_path: Path) -> None:
    evil = "<script>alert('&')</script>"
    text = as_html(load_runs(runs_of([replace(report, model=evil, plan_text=evil, config={"a": evil})], tmp_path)))
    assert "<script" not in text and "&lt;script&gt;" in text
    markdown = as_markdown(load_runs([tmp_path]))
    assert Page(text) and evil in markdown  # Markdown's readers escape what they show


def test_a_run_without_a_completed_request_has_a_report(report: RunReport, tmp_path: Path) -> None:
    latencies = ("time_to_first_token_ms", "time_per_output_token_ms", "inter_token_ms", "end_to_end_ms")
    empty = replace(
        report,
        **dict.fromkeys((*latencies, "normalised_latency_ms", "iteration_ms", "energy", "goodput")),
        timeline={"interval_seconds": 0.125},
        plan_timeline=[],
        completed=0,
    )
    runs = load_runs(runs_of([empty, report, empty], tmp_path))
    Page(as_html(runs))
    text = as_html(runs[:1])
    Page(text)
    assert "No request was completed" in text and "Not measured" in text
    assert as_markdown(runs) and json.loads(as_json(runs))


def test_the_command_writes_the_page_beside_the_run(
    report: RunReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save(report, tmp_path, "x")
    done = cli.invoke(app, ["report", "x.jsonl"])
    assert (done.exit_code, done.output) == (0, "report x.report.html\n")
    assert (tmp_path / "x.report.html").read_text().startswith("<!doctype html>")
    assert cli.invoke(app, ["report", "x.jsonl", "--out", "y.md"]).exit_code == 0
    assert (tmp_path / "y.md").read_text().startswith("# x\n")
    shown = cli.invoke(app, ["report", ".", "--format", "json"])
    assert json.loads(shown.stdout)["runs"][0]["name"] == "x"
    assert cli.invoke(app, ["report", "x.jsonl", "--out", "-"]).stdout.startswith("<!doctype html>")
    for arguments, message in (
        (["none.jsonl"], "none.jsonl: no such file"),
        (["x.jsonl", "--out", "x.pdf"], "--out x.pdf: .pdf names no format"),
        (["x.jsonl", "--out", "no/x.html"], "--out no/x.html: cannot be written: No such file"),
        (["x.jsonl", "--out", "x.report.json"], "one of the runs' own reports"),
        (["x.jsonl", "--format", "pdf"], "pdf"),
        ([], "RUN"),
    ):
        failed = cli.invoke(app, ["report", *arguments])
        assert failed.exit_code == 2 and message in failed.stderr and "Traceback" not in failed.output


@pytest.mark.parametrize(
    ("end", "size", "expected"),
    [
        (1.0, 1.0, [0, 0.25, 0.5, 0.75, 1]),
        (87.9, 1.0, [0, 25, 50, 75]),
        (7.1, 1.0, [0, 2, 4, 6]),
        (480, 60, [0, 120, 240, 360, 480]),
    ],
)
def test_ticks_are_round_numbers(end: float, size: float, expected: list[float]) -> None:
    assert Scale("x", "", end, size).ticks == pytest.approx(expected)


def test_ticks_are_few_and_within_the_axis() -> None:
    for end in np.random.default_rng(0).lognormal(0, 6, 300).tolist():
        for scale in (Scale("x", "", end), time_scale("x", end)):
            assert 3 <= len(scale.ticks) <= 6 and 0 <= scale.ticks[-1] <= end * 1.001
            assert len({scale.text(tick) for tick in scale.ticks}) == len(scale.ticks), "two ticks read the same"


def test_a_chart_puts_values_where_they_belong() -> None:
    x, y = Scale("time", "s", 10.0), Scale("rate", "tokens/s", 4.0)
    lines = [Line("a", 1, [(0, 1), (5, 2), (10, 4)]), Line("b", 2, [(0, 1), (5, 0), (10, 0)])]
    page = Page(chart("Title", "About.", lines, x, y))
    assert numbers(page.of("polyline")[0]["points"]).tolist() == [[0, 75], [50, 50], [100, 0]]
    assert "a: 2.33 on average, at most 4 at 10 s" in (page.of("svg")[0]["aria-label"] or "")
    stacked = Page(chart("Title", "About.", lines, x, y, stacked=True))
    first, second = (numbers(shape["points"]) for shape in stacked.of("polygon"))
    assert first.tolist() == [[0, 75], [50, 50], [100, 0], [100, 100], [50, 100], [0, 100]]
    assert second[:3].tolist() == [[0, 50], [50, 50], [100, 0]] and second[3:].tolist() == first[:3][::-1].tolist()


def test_numbers_and_differences_are_written_short(report: RunReport) -> None:
    written = [write_number(value) for value in (0, 1234567, 123.4, 12.34, 1.234, 0.01234, 5.0)]
    assert written == ["0", "1,234,567", "123", "12.3", "1.23", "0.0123", "5"]
    figure = next(figure for figure in SUMMARY if figure.key == "errors")
    assert difference(figure, report, replace(report, errors=0)) is None
    assert difference(figure, report, replace(report, errors=4)) == -0.5
