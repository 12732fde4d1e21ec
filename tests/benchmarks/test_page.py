"""The page of all results: it is what the records give, and its charts show these records."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks import charts, page, record

pytest.importorskip("matplotlib")


def test_the_page_is_what_the_records_give():
    """After a new record: python -m benchmarks.page."""
    assert (page.record.ROOT / page.PAGE).read_text() == page.page(page.record.ROOT / page.RESULTS)


def test_charts_show_the_records_and_links_lead_somewhere():
    folder = (page.record.ROOT / page.PAGE).parent
    for name, (part, _) in page.CHARTS.items():
        path = folder / "results" / f"{name}.json"
        if path.exists():
            assert charts.shows(path.with_suffix(".png"), json.loads(path.read_text())[part]), name
    links = re.findall(r"\]\(([^)]+)\)", (folder / "README.md").read_text())
    assert links and all((folder / link).exists() for link in links)


@pytest.fixture
def results(tmp_path):
    """One record, drawn and on the page."""
    where = {
        "command": "python -W ignore -m some --out /tmp/x --quick",
        "date": "2026-01-02T03:04:05",
        "commit": "abc+",
    }
    where |= {"device": {"name": "a processor", "threads": 2, "driver": None}, "versions": {"torch": "2", "cuda": None}}
    variants = {
        "eager": {
            "graphs": 0,
            "compile_s": 0.0,
            "tokens_per_second_without_compiling": 2350.4,
            "speed_without_compiling": 1.0,
            "steps_until_it_pays": None,
        }
    }
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "compiled.json").write_text(json.dumps(where | {"variants": variants}))
    return tmp_path / "results"


def test_a_section_has_command_machine_versions_and_commit(results):
    text = page.page(results)
    # Of a question that is closed.
    assert "```\ngit checkout abc && python -m some --quick\n```" in text
    assert "a processor, 2 threads; commit abc+, 2026-01-02; torch 2." in text
    assert "| eager | 0 | 0 | 2,350 | 1.00 |  |" in text
    assert "`make gpu STAGE=e2e`" in text


def test_commands_have_the_names_of_now(results):
    content = json.loads((results / "compiled.json").read_text())
    content |= {"command": "python -m benchmarks.e2e --caps", "shapes": []}
    (results / "caps.json").write_text(json.dumps(content))
    assert "```\npython -m benchmarks.train e2e --caps\n```" in page.page(results)


def test_what_ran_on_a_gpu_has_its_own_section_and_is_not_missing(results):
    (results / "gpu").mkdir()
    (results / "gpu" / "e2e.json").write_text(
        (results / "compiled.json").read_text().replace('"variants"', '"shapes": [], "variants"')
    )
    text = page.page(results)
    assert "## Tokens per second, on a GPU" in text and "`make gpu STAGE=e2e`" not in text


def test_ends_of_rounds_are_on_the_page_with_what_was_left_out(results):
    where = json.loads((results / "compiled.json").read_text())
    ends = {"operators": 20.0, "extra_bytes": 3_200_000}
    case = {"case": "bf16 master, fp32 states", "active": 8, "elements": 2**20, "backend": "cpu"}
    measured = {"ms": {kind: {"median": 1.26} for kind in page.round_end.KINDS}, "ratio": {"median": 3.5}}
    larger = {"elements": 2**22, "operators": 22.0, "extra_bytes": 4_100_000}
    cases = [case | measured | ends | {"larger": larger}, case | {"case": "another", "left_out": "time limit"}]
    content = where | {"cases": cases, "goals": page.round_end.goals(cases)}
    assert "## The end of a round" not in page.page(results)
    assert "benchmarks.step round_end --device cpu" in page.page(results)
    (results / "round_end.json").write_text(json.dumps(content))
    text = page.page(results)
    assert "| bf16 master, fp32 states | 1.3 | 1.3 | 1.3 | 3.5 | 20 | 22 | 3.2 | 4.1 |" in text
    assert "| another | left out: time limit |" in text and "8 x 1M elements leave" in text
    assert "| transient MB | bf16 master, fp32 states, 8 x 4M | 4 | 4.1 | **not met** |" in text
    assert "benchmarks.step round_end --device cpu" not in text
    # That of a GPU is made by a stage of another name.
    assert "`make gpu STAGE=growth` | the step that ends a round" in text and "STAGE=round_end" not in text


def test_a_record_without_a_section_is_refused(results):
    (results / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="other must have a section"):
        page.page(results)


def test_a_chart_knows_what_it_shows(tmp_path):
    panels = {"one": {"a": {"forward_ms": 1.5, "backward_ms": 2.0}, "b": {"forward_ms": 1.0}}}
    path = charts.bars(tmp_path / "chart.png", panels, "ms", source=panels)
    # Through JSON, as the record comes back.
    assert charts.shows(path, json.loads(json.dumps(panels)))
    panels["one"]["b"]["forward_ms"] = 1.1
    assert not charts.shows(path, panels)
    assert not charts.shows(tmp_path / "none.png", panels)


def test_a_record_has_a_line_for_each_entry(tmp_path) -> None:
    content = {"device": {"type": "cpu"}, "rows": [{"a": 1.5}, {"a": [2, 3]}], "goals": [], "missing": 0}
    path = record.write(tmp_path, "some", content)
    assert json.loads(path.read_text()) == content and not list(tmp_path.glob("*.new"))
    assert path.read_text().splitlines()[2:5] == ['"rows": [', '{"a": 1.5},', '{"a": [2, 3]}']
