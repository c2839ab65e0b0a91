"""HTML pages: what a stranger wrote is shown as text, wherever it stands."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pipeline.pages import axes, svg, write_page
from pipeline.progress import Reporter
from stages.train_student.guards import BAD_STEPS
from stages.train_student.report import REPORT, write_report
from stages.train_student.settings import TrainConfig

HOSTILE = "<img src=x onerror='alert(1)'>&lt;\"{{ 7 * 7 }}{% raw %}"


class Shown(HTMLParser):
    """The text of every element of a page by its tag, and the tags themselves."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.texts.setdefault(tag, [])
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts[self._open[-1]].append(data)


def test_text_is_text_and_only_figures_are_markup(tmp_path: Path) -> None:
    figure, plot = axes(HOSTILE, "x", HOSTILE)
    plot.plot([1, 2], label=HOSTILE)
    plot.legend()
    body = "<p>{{ text }}</p>{{ table(rows) }}{{ grid(figures) }}"
    rows = [["name", HOSTILE], [HOSTILE, "1"]]
    write_page(tmp_path / "page.html", HOSTILE, body, text=HOSTILE, rows=rows, figures=[svg(figure), HOSTILE])
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    shown = Shown(page)
    assert "img" not in shown.texts
    assert "49" not in shown.texts["p"][0]
    for tag, texts in {"title": [HOSTILE], "p": [HOSTILE], "th": ["name", HOSTILE], "td": [HOSTILE, "1"]}.items():
        assert shown.texts[tag] == texts
    assert page.count("<svg") == 1
    assert page.endswith("</html>\n")


def test_value_that_a_page_lacks_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="'absent' is undefined"):
        write_page(tmp_path / "page.html", "title", "{{ absent }}")
    assert list(tmp_path.iterdir()) == []


def test_report_of_a_training_shows_names_and_bad_steps_as_text(tmp_path: Path) -> None:
    config = TrainConfig(student=Path(HOSTILE), cache=tmp_path / "cache", out=tmp_path / HOSTILE)
    config.out.mkdir()
    step = {"step": 3, "problem": HOSTILE, "action": "skipped", "keys": ["k"]}
    (config.out / BAD_STEPS).write_text(json.dumps(step) + '\n{"torn')
    log = [{"step": 1, "loss": 2.0, f"eval_kl_{HOSTILE}": 1.0}]
    write_report(config, log, {"steps": 1, "tokens_seen": 5, HOSTILE: 0.25}, Reporter())
    shown = Shown((config.out / REPORT).read_text(encoding="utf-8"))
    assert "img" not in shown.texts
    assert shown.texts["h1"] == [HOSTILE]
    assert shown.texts["title"] == [f"train-student: {HOSTILE}"]
    cells = shown.texts["td"]
    assert cells[:4] == ["3", HOSTILE, "skipped", "1"]
    assert cells[cells.index(HOSTILE, 4) + 1] == "0.2500"
    assert cells[cells.index("student") + 1] == HOSTILE
