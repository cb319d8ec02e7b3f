"""report.html: read as a browser reads it, as far as that goes without one."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bigtrain.config import UserError, save
from bigtrain.telemetry.report import thinned, write_report
from tools.report import main

from .records import config_of, record_steps, recorder_of


class Page(HTMLParser):
    """The page's table, headings, scripts, and everything that would be fetched."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.headings: list[str] = []
        self.paragraphs: list[str] = []
        self.scripts: list[str] = []
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self._open: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value for key, value in attrs if key in ("src", "href") and value]
        if tag != "meta":
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" in self._open:
            self.scripts[-1] += data
        elif "table" in self._open and data.strip():
            self.rows[-1][-1] += data
        elif self._open[-1:] == ["h1"]:
            self.headings.append(data)
        elif self._open[-1:] == ["p"]:
            self.paragraphs.append(data)

    def facts(self, column: int = 1) -> dict[str, str]:
        return {row[0]: row[column] for row in self.rows[1:]}

    def traces(self) -> list[dict[str, Any]]:
        """What plotly is given to draw."""
        (script,) = [
            text for text in self.scripts if "Plotly.newPlot(" in text[-2_000_000:] and "window.PLOTLYENV" in text
        ]
        start = script.index("[", script.index("Plotly.newPlot("))
        return json.JSONDecoder().raw_decode(script, start)[0]


def make_run(folder: Path, name: str, *, steps: int = 20, evaluate: bool = True) -> Path:
    save(config_of(name), folder)
    with recorder_of(folder, config=config_of(name)) as recorder:
        record_steps(recorder, range(1, steps + 1))
        if evaluate:
            recorder.evaluation(steps, loss=1.5, perplexity=math.exp(1.5), bits_per_byte=0.987)
    return folder


def test_one_run(tmp_path: Path) -> None:
    path = write_report([make_run(tmp_path / "a", "first")])
    assert path == tmp_path / "a" / "report.html"
    page = Page(path)
    assert page.headings == ["bigtrain: first"]
    assert page.fetched == []
    facts = page.facts()
    assert facts["Steps"] == "20"
    assert facts["Tokens"] == "81,920"
    assert facts["Held-out loss, last"] == "1.5000 at step 20"
    assert facts["Bits a byte, last"] == "0.987"
    assert facts["MFU, median"] == "33.3%"
    by_name = {trace["name"]: trace for trace in page.traces() if trace.get("showlegend")}
    assert set(by_name) == {"first", "first, held out"}
    assert by_name["first"]["x"] == list(range(1, 21))
    assert by_name["first"]["y"] == [8.0 / math.sqrt(step) for step in range(1, 21)]
    assert (by_name["first, held out"]["x"], by_name["first, held out"]["y"]) == ([20], [1.5])
    over_tokens = [trace for trace in page.traces() if trace["name"] == "first, held out"][1]
    assert over_tokens["x"] == [81920]
    assert [entry.name for entry in (tmp_path / "a").glob("report*")] == ["report.html"]


def test_several_runs_overlay_in_their_own_colours(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", "first"), make_run(tmp_path / "b", "second", evaluate=False)]
    page = Page(write_report(runs, tmp_path / "both.html"))
    assert page.rows[0] == ["", "first", "second"]
    assert page.facts(2)["Held-out loss, last"] == "not evaluated"
    colours = {trace["name"]: trace["line"]["color"] for trace in page.traces()}
    assert set(colours) == {"first", "first, held out", "second"}
    assert colours["first"] == colours["first, held out"] != colours["second"]


def test_evaluation_sets_and_epochs(tmp_path: Path) -> None:
    with recorder_of(tmp_path / "sets") as recorder:
        record_steps(recorder, range(1, 5))
        for step, loss in ((2, 2.5), (4, 3.5)):
            recorder.evaluation(step, set="code", loss=loss, perplexity=9.0, bits_per_byte=1.125)
            recorder.evaluation(step, set="books", loss=loss + 1, perplexity=20.0, bits_per_byte=None)
            recorder.epochs(step, {"data/web/train": step / 2, "data/code/train": 0.25})
    runs = [tmp_path / "sets", make_run(tmp_path / "plain", "plain")]
    page = Page(write_report(runs, tmp_path / "both.html"))
    facts, plain = page.facts(), page.facts(2)
    assert facts["Loss of code, last"] == "3.5000 at step 4" and facts["Loss of code, best"] == "2.5000"
    assert facts["Bits a byte of code, last"] == "1.125" and facts["Bits a byte of books, last"] == "-"
    assert facts["Loss of books, last"] == "4.5000 at step 4"
    assert facts["Epochs"] == "web 2.00, code 0.25"
    assert facts["Held-out loss, last"] == "-" == plain["Loss of code, last"]
    assert plain["Held-out loss, last"] == "1.5000 at step 20"
    assert [row[0] for row in page.rows].index("Loss of code, last") > [row[0] for row in page.rows].index("Tokens")
    curves = {trace["name"]: trace for trace in page.traces() if trace.get("showlegend")}
    assert curves["sets, books"]["y"] == [3.5, 4.5] and curves["sets, code"]["x"] == [2, 4]
    assert curves["sets, books"]["marker"]["symbol"] != curves["sets, code"]["marker"]["symbol"]
    over_tokens = [trace for trace in page.traces() if trace["name"] == "sets, books"][1]
    assert over_tokens["x"] == [2 * 4096, 4 * 4096]


def test_runs_of_one_name_go_by_their_folders(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / folder, "same", steps=2) for folder in ("a", "b")]
    page = Page(write_report(runs, tmp_path / "both.html"))
    assert page.rows[0] == ["", str(runs[0]), str(runs[1])]


def test_a_run_without_steps_says_so(tmp_path: Path) -> None:
    page = Page(write_report([make_run(tmp_path, "new", steps=0, evaluate=False)]))
    assert page.scripts == []
    assert page.paragraphs == ["No step is done yet: there is nothing to plot. Make the report again later."]
    assert page.facts()["Steps"] == "none yet"


def test_a_run_that_only_has_metrics(tmp_path: Path) -> None:
    with recorder_of(tmp_path / "bare") as recorder:
        record_steps(recorder, range(1, 3))
    page = Page(write_report([tmp_path / "bare"]))
    assert page.headings == ["bigtrain: bare"]
    assert page.facts()["Steps"] == "2"


def test_names_are_text_and_nothing_else(tmp_path: Path) -> None:
    name = '</script><script>alert(1)</script><b>&amp;"{table}{body}'
    page = Page(write_report([make_run(tmp_path, name, steps=3)]))
    assert page.headings == [f"bigtrain: {name}"]
    assert page.rows[0][1] == name
    assert not any("alert(1)" in script and "newPlot" not in script for script in page.scripts)
    assert "b" not in page.tags
    assert {trace["name"] for trace in page.traces()} == {
        '&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;&lt;b&gt;&amp;amp;"{table}{body}' + held_out
        for held_out in ("", ", held out")
    }


def test_a_diverged_run_has_a_gap(tmp_path: Path) -> None:
    with recorder_of(tmp_path) as recorder:
        record_steps(recorder, range(1, 3))
        record_steps(recorder, range(3, 4), offset=math.nan)
        record_steps(recorder, range(4, 5))
    page = Page(write_report([tmp_path]))
    loss = page.traces()[0]["y"]
    assert loss[2] is None and loss[3] == 4.0
    assert not re.search(r"\b(NaN|Infinity)\b", json.dumps(page.traces()))


def test_long_curves_keep_their_spikes() -> None:
    y: list[Any] = [1.0] * 100_000
    y[54_321], y[54_325], y[70_000] = 9.0, 0.1, math.nan
    x, thin = thinned(range(100_000), y, limit=1000)
    assert len(x) == len(thin) <= 1000
    assert x == sorted(x)
    assert (thin[x.index(54_321)], thin[x.index(54_325)]) == (9.0, 0.1)
    nothing = thinned(range(10_000), [math.nan] * 10_000, limit=100)[1]
    assert set(nothing) == {None}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [make_run(tmp_path / folder, folder, steps=2) for folder in ("a", "b")]
    monkeypatch.chdir(tmp_path)
    assert main([str(runs[0])]) == 0
    assert main([str(run) for run in runs]) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "a" / "report.html"), "report.html"]
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize("case", ["no folder", "no run", "config", "out"])
def test_mistakes_get_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    run = tmp_path / "run"
    options: list[str] = []
    if case != "no folder":
        run.mkdir()
    if case == "config":
        (run / "config.yaml").write_text("a: [1")
    if case == "out":
        make_run(run, "x", steps=1)
        options = ["--out", str(tmp_path / "nowhere" / "r.html")]
    assert main([str(run), *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert str(tmp_path) in err
    if case == "no folder":
        with pytest.raises(UserError):
            write_report([run])
