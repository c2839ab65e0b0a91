"""`pipeline preview`: what a person sees of inputs and of a corpus; nothing is written."""

import json
import re
from pathlib import Path

import pytest

from stages.prepare.run import prepare
from stages.prepare.settings import PrepareConfig
from tests.support.chat_templates import STYLES, chat_tokenizer
from tests.support.helpers import run

SAMPLES = Path(__file__).parent.parent / "data" / "samples"
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    chat_tokenizer(folder, STYLES["chatml"])
    return folder


def written(folder: Path, *records: object) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_samples_are_shown_and_nothing_is_written(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("preview", SAMPLES, "--tokenizer", tokenizer, "--rows", 4, "--no-borders", "--longest", 5000)
    assert (code, err) == (0, "")
    assert out.count("== row ") == 4
    assert "<|im_start|>assistant\n«A small model, the student" in out
    assert "21 records" in out
    assert list(tmp_path.iterdir()) == []


def test_rows_of_the_inputs_are_those_of_the_corpus(tmp_path, tokenizer):
    prepare(PrepareConfig(inputs=(SAMPLES,), tokenizer=tokenizer, out=tmp_path / "corpus", sequence_length=512))
    _, inputs, _ = run("preview", SAMPLES, "--tokenizer", tokenizer, "--rows", 9, "--sequence-length", 512)
    code, corpus, _ = run("preview", tmp_path / "corpus", "--rows", 9)
    assert code == 0
    rows = [text.partition("== row 1")[2].rpartition("\n\n")[0] for text in (inputs, corpus)]
    assert rows[0] == rows[1] != ""
    assert f"{tmp_path / 'corpus'}: the first 9 of" in corpus


def test_labels_documents_and_borders_are_marked(tmp_path, tokenizer):
    path = written(tmp_path, {"prompt": "was ", "completion": "seen"}, {"text": "中🙂"})
    _, out, _ = run("preview", path, "--tokenizer", tokenizer)
    assert re.search(r"-- document 1: \d tokens, 2 labels\n[was·]+·« seen·<\|endoftext\|>»\n", out)
    assert "1 spanning tokens: begin in a prompt and end in an answer; they are labels" in out
    assert "🙂·<|endoftext|>»" in out


def test_colours_stand_for_brackets(tmp_path, tokenizer):
    path = written(tmp_path, {"prompt": "was ", "completion": "seen"})
    _, out, _ = run("preview", path, "--tokenizer", tokenizer, "--color")
    assert "«" not in out
    assert "42m seen" in out or "102m seen" in out
    assert "was seen<|endoftext|>" in ESCAPE.sub("", out)


def test_text_cannot_move_the_cursor(tmp_path, tokenizer):
    _, out, _ = run("preview", written(tmp_path, {"text": "a\x1b[2Jb\rc\nd"}), "--tokenizer", tokenizer, "--no-borders")
    assert "\\x1b[2Jb\\rc\nd" in out
    assert "\x1b" not in out


def test_what_was_dropped_is_said_with_the_reason(tmp_path, tokenizer):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "word " * 400}]
    path = written(
        tmp_path,
        {"title": 1},
        {"messages": chat},
        {"prompt": "p", "completion": "c", "label": False},
        {"text": "x y"},
        {"text": "x y"},
    )
    code, out, _ = run("preview", path, "--tokenizer", tokenizer, "--sequence-length", 64)
    assert code == 0
    for line in (
        "line 1: no field 'text'",
        "1 bad lines: records that would stop `prepare`",
        "1 overlong chats dropped: longer than a sequence; see --overlong",
        "1 undesirable completions",
        "1 duplicate documents",
    ):
        assert line in out


def test_many_tokens_and_many_rows_are_not_all_shown(tmp_path, tokenizer):
    path = written(tmp_path, *({"text": f"number {index} " * 50} for index in range(5000)))
    _, out, _ = run("preview", path, "--tokenizer", tokenizer, "--rows", 1, "--longest", 20)
    assert out.count("== row") == 1
    assert "more tokens" in out
    assert len(out) < 2000
    assert int(re.search(r"first ([\d,]+) records", out)[1].replace(",", "")) < 5000


def test_mistakes_are_named(tmp_path, tokenizer):
    code, _, err = run("preview", written(tmp_path, {"text": "x"}))
    assert (code, "name a --tokenizer" in err) == (2, True)
    code, _, err = run("preview", tmp_path / "nowhere", "--tokenizer", tokenizer)
    assert (code, "no such file or folder" in err) == (2, True)
