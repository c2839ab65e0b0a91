"""stages.prepare: text survives byte for byte, and only what the model is to write is a label."""

import gzip
import json
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pipeline.corpus import Corpus
from pipeline.errors import ConfigError, CorpusError, PipelineError
from pipeline.tokenizer import load_tokenizer
from stages.prepare.run import prepare
from stages.prepare.settings import PrepareConfig
from tests.support.helpers import BOS, CHAT_TEMPLATE, EOS, MARKED_CHAT_TEMPLATE, tiny_tokenizer

SAMPLES = Path(__file__).parent.parent / "data" / "samples"
TEXTS = [
    "line\r\nends\rof\nevery\tkind  and  spaces \n\n",
    "中文，繁體，𠮷。",
    "def f(x):\n\treturn x ** 2  # naïve 🙂\n",
    "\x00\u200b\ufeff ",
]


def corpus_of(tmp_path: Path, *inputs: Path, tokenizer: dict[str, Any] | None = None, **settings: Any) -> Corpus:
    """The corpus that `prepare` makes, by default with one document a row."""
    tiny_tokenizer(tmp_path / "tokenizer", **(tokenizer or {}))
    settings = {"packing": "none", "sequence_length": 4096, **settings}
    config = PrepareConfig(inputs=inputs, tokenizer=tmp_path / "tokenizer", out=tmp_path / "corpus", **settings)
    prepare(config)
    return Corpus(tmp_path / "corpus")


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    if path.suffix == ".gz":
        content = gzip.compress(content[:50]) + gzip.compress(content[50:])  # two members
    elif path.suffix == ".zst":
        content = zstandard.compress(content[:50]) + zstandard.compress(content[50:])  # two frames
    path.write_bytes(content)
    return path


def texts_and_labels(corpus: Corpus) -> list[tuple[str, str]]:
    """Of every row, the decoded text and the decoded labels."""
    tokenizer = load_tokenizer(corpus.folder / "tokenizer")
    return [(tokenizer.decode(row.token_ids), tokenizer.decode(row.token_ids[row.loss_mask])) for row in corpus.rows()]


def conversation(*turns: str) -> dict[str, Any]:
    roles = ["user", "assistant"] * len(turns)
    return {"messages": [{"role": role, "content": turn} for role, turn in zip(roles, turns)]}


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("name", ["chinese.txt", "english.txt", "code.py.txt"])
def test_text_file_comes_back_byte_for_byte(tmp_path: Path, name: str, bos: bool) -> None:
    corpus = corpus_of(tmp_path, SAMPLES / name, tokenizer={"bos": bos})
    (row,) = corpus.rows()
    text = load_tokenizer(corpus.folder / "tokenizer").decode(row.token_ids)
    assert text.encode() == (BOS if bos else "").encode() + (SAMPLES / name).read_bytes() + EOS.encode()
    assert not row.loss_mask[0]
    assert row.loss_mask[1:].all()


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_every_format_gives_the_same_texts(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"input{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"id": [1, 2, 3, 4], "content": TEXTS}), path, row_group_size=2)
    else:
        write_lines(path, [{"content": text, "id": 7} for text in TEXTS])
    corpus = corpus_of(tmp_path, path, text_field="content")
    assert [text for text, _ in texts_and_labels(corpus)] == [text + EOS for text in TEXTS]


def test_text_files_keep_line_ends_and_lose_only_the_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "bom.txt"
    path.write_bytes(b"\xef\xbb\xbfa\r\nb\rc\n")
    assert texts_and_labels(corpus_of(tmp_path, path))[0][0] == f"a\r\nb\rc\n{EOS}"


def test_json_lines_may_have_a_byte_order_mark_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "bom.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "first"}\r\n\r\n \n{"text": "second"}')
    assert [text for text, _ in texts_and_labels(corpus_of(tmp_path, path))] == [f"first{EOS}", f"second{EOS}"]


def test_end_token_is_not_doubled(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": f"one{EOS}"}, {"text": "two"}])
    assert [text for text, _ in texts_and_labels(corpus_of(tmp_path, path))] == [f"one{EOS}", f"two{EOS}"]


@pytest.mark.parametrize("bos", [False, True])
def test_only_completions_are_labels(tmp_path: Path, bos: bool) -> None:
    records = [{"prompt": "Q: 一 + 1?\nA:", "completion": " 两"}, {"prompt": "", "completion": "alone"}]
    corpus = corpus_of(tmp_path, write_lines(tmp_path / "a.jsonl", records), tokenizer={"bos": bos})
    (first, first_labels), (second, second_labels) = texts_and_labels(corpus)
    start = BOS if bos else ""
    assert (first, first_labels) == (f"{start}Q: 一 + 1?\nA: 两{EOS}", f" 两{EOS}")
    assert second == f"{start}alone{EOS}"
    assert second_labels == f"alone{EOS}" if bos else second_labels and f"alone{EOS}".endswith(second_labels)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(("template", "line_end"), [(CHAT_TEMPLATE, "\n"), (MARKED_CHAT_TEMPLATE, "")])
def test_only_assistant_turns_are_labels(tmp_path: Path, suffix: str, template: str, line_end: str) -> None:
    record = conversation("你好?", " 你好！ ", "and now?", "\n\nfin")
    path = tmp_path / f"chat{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([record]), path)
    else:
        write_lines(path, [record])
    ((text, labels),) = texts_and_labels(corpus_of(tmp_path, path, tokenizer={"chat_template": template, "bos": True}))
    assert text == (
        "<user>你好?</user>\n<assistant> 你好！ </assistant>\n"
        f"<user>and now?</user>\n<assistant>\n\nfin</assistant>\n{EOS}"
    )
    assert labels == f" 你好！ </assistant>{line_end}\n\nfin</assistant>{line_end}{EOS}"


def test_end_token_of_a_chat_template_is_not_doubled(tmp_path: Path) -> None:
    template = CHAT_TEMPLATE.replace("</{{ message.role }}>", EOS)
    path = write_lines(tmp_path / "chat.jsonl", [conversation("a", "b"), conversation("a", "b", "c")])
    (text, labels), (longer, longer_labels) = texts_and_labels(
        corpus_of(tmp_path, path, tokenizer={"chat_template": template})
    )
    assert (text, labels) == (f"<user>a{EOS}\n<assistant>b{EOS}\n", f"b{EOS}\n")
    assert longer.endswith(f"<user>c{EOS}\n")
    assert longer_labels == f"b{EOS}\n"


def test_template_that_rewrites_earlier_turns_says_what_to_do(tmp_path: Path) -> None:
    template = (
        "{% for message in messages %}<{{ message.role }}>{% if loop.last %}thought{% endif %}{{ message.content }}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    path = write_lines(tmp_path / "chat.jsonl", [conversation("a", "b", "c", "d")])
    with pytest.raises(CorpusError, match="line 1: the chat template writes assistant message 2 in another way"):
        corpus_of(tmp_path, path, tokenizer={"chat_template": template})


def test_missing_chat_template_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"chat\.jsonl: line 1: holds `messages`, but .* has no chat template"):
        corpus_of(tmp_path, SAMPLES / "chat.jsonl")


def test_all_samples_together_make_a_corpus(tmp_path: Path) -> None:
    corpus = corpus_of(
        tmp_path, SAMPLES, tokenizer={"chat_template": CHAT_TEMPLATE}, packing="isolated", sequence_length=256
    )
    assert corpus.manifest.statistics["documents"] == 21
    for row in corpus.rows():
        assert not row.loss_mask[np.cumsum([0, *row.document_lengths[:-1]])].any()


def test_long_document_makes_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "long.txt"
    path.write_text("word " * 1000, encoding="utf-8")
    corpus_of(tmp_path, path)
    assert not caplog.records


TEMPLATES = {
    "a million millions of steps": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a range that the sandbox refuses": "{% for i in range(10**9) %}{% endfor %}",
    "a division by zero": "{{ 1 / 0 }}",
    "a recursion": "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "a way out of the sandbox": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "a type that does not fit": "{{ messages + 1 }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_template_of_a_stranger_ends_with_a_line(tmp_path, monkeypatch, name):
    monkeypatch.setattr("stages.prepare.chat.RENDER_S", 0.2)
    text = write_lines(tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": "hello"}]}])
    started = time.monotonic()
    with pytest.raises(PipelineError) as refused:
        corpus_of(tmp_path, text, tokenizer={"chat_template": TEMPLATES[name]})
    assert "template" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert time.monotonic() - started < 5
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
