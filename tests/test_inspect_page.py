"""The page of `pipeline inspect --html`: everything on it, nothing from outside, and a stranger's text as text."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline import open_cache
from pipeline.inspection.charts import Series, chart, ticks
from stages.prepare.run import prepare
from stages.prepare.settings import PrepareConfig
from tests.support.browser import CHROMIUM, browser
from tests.support.helpers import run, tiny_tokenizer
from tests.support.small import make_cache
from tests.test_inspect import KINDS, refused
from tests.test_pages import Shown

HOSTILE = (
    "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"></span></div>"
    "<style>*{display:none}</style>{{ 7 * 7 }} &lt; &#65; \x1b[2J\u202e 中文 🙂\n\ttail"
)


def hostile_cache(folder: Path, **settings: object) -> Path:
    tiny_tokenizer(folder / "tokenizer")
    lines = [{"text": HOSTILE}, {"prompt": HOSTILE, "completion": "answer"}, {"text": "The keeper wrote down. " * 20}]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = folder / "corpus"
    prepare(
        PrepareConfig(inputs=(folder / "data.jsonl",), tokenizer=folder / "tokenizer", out=out, sequence_length=512)
    )
    return make_cache(folder / "cache", out, **settings)


def page_of(cache: Path, folder: Path, *arguments: object) -> str:
    code, out, err = run("inspect", cache, "--html", folder / "page.html", *arguments)
    assert code == 0, err
    assert f"{folder / 'page.html'}: figures of " in out
    return (folder / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("container", ["arrow", "zarr"])
@pytest.mark.parametrize("kind", KINDS)
def test_page_of_every_kind_of_cache_is_whole(tmp_path, corpus, kind, container):
    cache = make_cache(tmp_path / "cache", corpus, container=container, **KINDS[kind])
    page = page_of(cache, tmp_path, "--worst", 3, "--maps", 2, "--longest", 30, "--sample", "all")
    charts = re.findall("<figcaption>(.*?)</figcaption>", page)
    has_entries = kind != "draws alone"
    assert len(charts) == (6 if has_entries else 3)
    assert ("How many entries a mass takes" in page) == has_entries
    assert page.count("<div class=map>") == 2
    assert "nan" not in re.sub(r"<div class=map>.*?</div>", "", page, flags=re.DOTALL).lower()
    assert not re.search(r"<script|<link|https?://|url\(", page)
    entropy = np.concatenate([item.targets.entropy(1.0) for item in open_cache(cache)]).mean(dtype=np.float64)
    assert f"T = 1, mean {entropy:.3g}" in page


def test_maps_are_seeded_and_the_wanted_sequence_comes_first(tmp_path, corpus):
    cache = make_cache(tmp_path / "cache", corpus)
    page = page_of(cache, tmp_path, "--maps", 3, "--longest", 5)
    assert page == page_of(cache, tmp_path, "--maps", 3, "--longest", 5)
    titles = re.findall(r"<h3>Sequence (\d+) ", page_of(cache, tmp_path, "--maps", 3, "--sequence", 39))
    assert len(titles) == 4
    assert titles[0] == "39"
    assert re.findall(r"<h3>Sequence (\d+) ", page) == titles[1:]
    others = re.findall(r"<h3>Sequence (\d+) ", page_of(cache, tmp_path, "--maps", 3, "--seed", 5))
    assert others != titles[1:]


def test_text_of_documents_stays_text(tmp_path):
    cache = hostile_cache(tmp_path)
    page = page_of(cache, tmp_path, "--worst", 20, "--longest", 1000)
    shown = Shown(page)
    assert not {"script", "img"} & shown.texts.keys()
    assert len(shown.texts["style"]) == 1
    assert not re.search("[\x1b\u202e]", page)


def test_alternative_that_is_a_space_shows(tmp_path):
    cache = hostile_cache(tmp_path, top_k=370)  # nearly the whole vocabulary
    page = page_of(cache, tmp_path, "--entries", 370, "--longest", 5, "--maps", 1)
    assert "<span class=w>␣</span>" in page
    assert not re.search(r"<span class=w> *</span>", page)


def test_page_that_cannot_be_written_is_one_line(tmp_path, corpus):
    cache = make_cache(tmp_path / "cache", corpus)
    code, _, err = run("inspect", cache, "--html", tmp_path / "nowhere" / "page.html")
    assert (code, err.count("error: "), "Traceback" in err) == (2, 1, False)
    assert "must be a path on this machine" in refused(cache, "--html", "s3://bucket/page.html")


def test_ticks_are_round_and_reach_the_largest_value():
    random = np.random.default_rng(0)
    for highest in [1.0, 0.5, 3e-9, 7e9, *(10 ** random.uniform(-8, 8, 500))]:
        found = ticks(highest)
        assert found[0] == 0
        assert found[-1] >= highest * (1 - 1e-9)
        assert 3 <= len(found) <= 7
        steps = np.diff(found)
        np.testing.assert_allclose(steps, steps[0], rtol=1e-4)


def test_charts_are_drawn_of_little_and_their_labels_are_text():
    hostile = "<b>&"
    for xs, ys in (([], []), ([1], [0.0]), ([0, 1], [0.0]), ([1, 2, 3], [0.5, 0.2, 0.1])):
        svg = chart(hostile, hostile, [Series(name=hostile, xs=xs, ys=ys)] * 2, square=not xs)
        assert hostile not in svg
        numbers = [float(text) for text in re.findall(r" c[xy]=([\d.e-]+)", svg)]
        assert all(math.isfinite(number) and 0 <= number <= 460 for number in numbers)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed; Debian's package is `chromium`")
def test_browser_shows_the_page_and_the_alternatives_of_a_token(tmp_path):
    cache = hostile_cache(tmp_path, tail_samples=2)
    page_of(cache, tmp_path, "--worst", 3, "--longest", 1000)
    with browser(tmp_path / "profile") as page:
        for width in (1200, 390):
            for dark in (False, True):
                page.look(width, 900, dark)
                assert page.open(tmp_path / "page.html") == [(tmp_path / "page.html").absolute().as_uri()]
                assert page.value("document.title") == f"inspect: {cache}"
                assert page.value("document.documentElement.scrollWidth") <= width
                ground = page.value("getComputedStyle(document.body).backgroundColor")
                assert (sum(map(int, re.findall(r"\d+", ground))) < 300) == dark
        page.look(1200, 900)
        assert page.value("document.querySelectorAll('script, img').length") == 0
        assert page.value("document.querySelectorAll('style').length") == 1
        drawn = "[...document.querySelectorAll('svg')].every(svg => svg.getBoundingClientRect().height > 100)"
        assert page.value(drawn)
        assert page.value("document.querySelectorAll('svg').length") == 6
        text = page.value("[...document.querySelectorAll('.map')].map(map => map.innerText).join('')")
        for part in ("<script>document.title='owned'</script>", "{{ 7 * 7 }} &lt; &#65; \\x1b[2J\\u202e", "中文 🙂"):
            assert part in text
        cards = "[...document.querySelectorAll('.card')].filter(card => getComputedStyle(card).display != 'none')"
        assert page.value(f"{cards}.length") == 0
        page.point_at(".t[tabindex]")
        assert page.value(f"{cards}.length") == 1
        (card,) = [page.value(f"{cards}[0].innerText")]
        assert re.search(r"probability [\d.e-]+", card)
        assert len(re.findall(r"^0\.\d{4}$", card, re.MULTILINE)) == 5
        box = page.value(f"(box => [box.x, box.y, box.right, box.bottom])({cards}[0].getBoundingClientRect())")
        assert box[0] >= 0
        assert box[1] >= 0
        assert box[2] <= 1200
        assert box[3] <= 900
        page.leave()
        assert page.value(f"{cards}.length") == 0
        page.press_tab_to(".t[tabindex]")
        assert page.value(f"{cards}.length") == 1
        page.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 20_000
        assert page.problems() == []
    shutil.rmtree(tmp_path / "profile")
