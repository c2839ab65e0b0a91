"""stages.prepare: labels at borders and ends, what neither text nor template wrote, and records that are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from pipeline.corpus import Corpus
from pipeline.errors import ConfigError, CorpusError
from pipeline.progress import KeptLines
from pipeline.tokenizer import load_tokenizer
from stages.prepare.run import prepare
from stages.prepare.settings import PrepareConfig
from tests.support.chat_templates import STYLES, SYSTEM_FIRST, Style, chat_tokenizer
from tests.support.helpers import BOS, EOS, tiny_tokenizer


def corpus_of(tmp_path: Path, records: list[dict[str, Any]], reporter: Any = None, **settings: Any) -> Corpus:
    """The corpus of records, one document a row, with the tokenizer in `tmp_path`."""
    path = tmp_path / "input.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    settings = {"packing": "none", "sequence_length": 4096, **settings}
    config = PrepareConfig(inputs=(path,), tokenizer=tmp_path / "tokenizer", out=tmp_path / "corpus", **settings)
    prepare(config, reporter)
    return Corpus(tmp_path / "corpus")


def rows_of(corpus: Corpus) -> list[tuple[str, str]]:
    """Of every row, the decoded text and the decoded labels."""
    tokenizer = load_tokenizer(corpus.folder / "tokenizer")
    return [(tokenizer.decode(row.token_ids), tokenizer.decode(row.token_ids[row.loss_mask])) for row in corpus.rows()]


def chat(*turns: str, first: str = "user") -> dict[str, Any]:
    roles = ["user", "assistant"] * len(turns)
    return {"messages": [{"role": role, "content": turn} for role, turn in zip(roles[roles.index(first) :], turns)]}


def counted(corpus: Corpus) -> dict[str, int]:
    return {name: count for name, count in corpus.manifest.statistics.items() if count}


@pytest.mark.parametrize(
    ("prompt", "completion"), [("a = f(", "int x)"), ("the t", "ide turns"), ("潮", "水"), ("x:  ", "ok")]
)
def test_token_that_spans_prompt_and_completion_is_the_completion_s(tmp_path, prompt, completion):
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    tokenizer.backend_tokenizer.pre_tokenizer = None
    corpus = corpus_of(tmp_path, [{"prompt": prompt, "completion": completion}])
    ((text, labels),) = rows_of(corpus)
    assert text == f"{prompt}{completion}{EOS}"
    assert labels.endswith(f"{completion}{EOS}")


def test_spanning_tokens_are_counted(tmp_path):
    tiny_tokenizer(tmp_path / "tokenizer")
    corpus = corpus_of(
        tmp_path, [{"prompt": "what was ", "completion": "missing"}, {"prompt": "was", "completion": " seen"}]
    )
    (_, spanning), (_, whole) = rows_of(corpus)
    assert (spanning, whole) == (f" missing{EOS}", f" seen{EOS}")
    assert counted(corpus)["spanning_tokens"] == 1


def test_token_that_would_span_two_messages_is_split(tmp_path):
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tiny_tokenizer(tmp_path / "tokenizer", chat_template=template)
    corpus = corpus_of(tmp_path, [chat("x", " miss", "ing", " seen")])
    assert rows_of(corpus) == [(f"x missing seen{EOS}", f" miss seen{EOS}")]
    assert counted(corpus)["split_borders"] == 1


@pytest.mark.parametrize("text", [f"{BOS}once", "once"])
def test_start_that_the_text_has_is_not_doubled(tmp_path, text):
    tiny_tokenizer(tmp_path / "tokenizer", bos=True)
    corpus = corpus_of(tmp_path, [{"text": text}, {"prompt": f"{text} A", "completion": " B"}])
    assert [row for row, _ in rows_of(corpus)] == [f"{BOS}once{EOS}", f"{BOS}once A B{EOS}"]
    assert counted(corpus).get("doubled_starts", 0) == 2 * text.startswith(BOS)


def test_end_that_the_tokenizer_adds_is_not_doubled(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    ends = [(EOS, tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=ends)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    records = [{"text": "one"}, {"text": f"two{EOS}"}, {"prompt": "was", "completion": " seen"}]
    corpus = corpus_of(tmp_path, records)
    assert rows_of(corpus) == [(f"one{EOS}", f"ne{EOS}"), (f"two{EOS}", f"wo{EOS}"), (f"was seen{EOS}", f" seen{EOS}")]
    assert counted(corpus)["doubled_ends"] == 1


@pytest.mark.parametrize("name", [name for name, style in STYLES.items() if style.end])
def test_nothing_stands_behind_the_template_s_own_end(tmp_path, name):
    style = STYLES[name]
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", style)
    corpus = corpus_of(tmp_path, [chat("one", "Yes"), chat("one", "Yes", "two", "No")])
    for row in rows_of(corpus):
        assert row[1].rstrip().endswith(style.end)
        assert not row[1].rstrip().endswith(f"{style.end}{style.end}")
    statistics = counted(corpus)
    assert statistics[f"ended_by_{style.end}"] == 2
    assert "appended_chat_ends" not in statistics
    assert corpus.manifest.settings["end_token_ids"] == [tokenizer.convert_tokens_to_ids(style.end)]


def test_end_of_turn_may_be_the_padding(tmp_path):
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", STYLES["llama3"])
    tokenizer.pad_token = "<|eot_id|>"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    ((text, _),) = rows_of(corpus_of(tmp_path, [chat("one", "Yes")]))
    assert text.endswith("Yes<|eot_id|>")


def test_end_is_appended_and_counted_where_the_template_writes_none(tmp_path):
    style = STYLES["plain"]
    chat_tokenizer(tmp_path / "tokenizer", style)
    corpus = corpus_of(tmp_path, [chat("one", "Yes")])
    assert rows_of(corpus) == [(f"### User: one\n\n### Assistant: Yes{style.eos}", f"Yes{style.eos}")]
    assert counted(corpus)["appended_chat_ends"] == counted(corpus)[f"ended_by_{style.eos}"] == 1


def test_conversation_that_is_text_already_ends_as_it_does(tmp_path):
    chat_tokenizer(tmp_path / "tokenizer", STYLES["chatml"])
    asked, told = "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n", "Yes<|im_end|>\n"
    corpus = corpus_of(tmp_path, [{"prompt": asked, "completion": told}, {"text": asked + told}])
    (text, labels), _ = rows_of(corpus)
    assert (text, labels) == (asked + told, told)


def test_tokenizer_without_an_end_is_said(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer", chat_template=STYLES["plain"].template)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    reporter = KeptLines()
    corpus = corpus_of(tmp_path, [{"text": "once"}, chat("one", "Yes")], reporter)
    assert counted(corpus)["documents_without_end"] == 2
    assert any("has no end-of-sequence token" in line for line in reporter.lines)
    assert corpus.manifest.settings["end_token_ids"] == []


FAILS = "{% for m in messages %}{{ m.content }}{% if m.content == 'boom' %}{{ m.is.nothing }}{% endif %}{% endfor %}"
REWRITES = (
    "{% for message in messages %}<{{ message.role }}>{% if loop.last %}thought{% endif %}{{ message.content }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "bad", "reason"),
    [
        (REWRITES, chat("a", "b", "c", "d"), "the chat template writes assistant message 2 in another way"),
        (
            STYLES["gemma"].template,
            chat("a", "b", first="assistant"),
            "refuses these messages: Conversation roles must",
        ),
        (STYLES["gemma"].template, {"messages": [{"role": "system", "content": "s"}]}, "System role not supported"),
        (
            SYSTEM_FIRST,
            {"messages": [{"role": "user", "content": "a", "tool_calls": [{"name": "f"}]}]},
            "`tool_calls` of",
        ),
        (FAILS, chat("boom"), "cannot write these messages: UndefinedError"),
    ],
)
def test_one_bad_record_is_rejected_and_a_thousand_good_ones_stay(tmp_path, template, bad, reason):
    tiny_tokenizer(tmp_path / "tokenizer", chat_template=template)
    records = [chat(f"question {number}", f"answer {number}") for number in range(1000)]
    records.insert(500, bad)
    with pytest.raises(CorpusError, match=f"input.jsonl: line 501: .*{reason}.*--skip-bad-lines"):
        corpus_of(tmp_path, records)
    reporter = KeptLines()
    corpus = corpus_of(tmp_path, records, reporter, skip_bad_lines=True)
    assert (counted(corpus)["bad_lines"], counted(corpus)["documents"]) == (1, 1000)
    assert any(line.startswith("skipped: ") and "line 501" in line for line in reporter.lines)


def test_conversation_that_the_assistant_begins_is_trained(tmp_path):
    chat_tokenizer(tmp_path / "tokenizer", Style(SYSTEM_FIRST, "<|im_end|>", ("<|im_start|>",)))
    ((text, labels),) = rows_of(corpus_of(tmp_path, [chat("Hello!", "Hi.", "So?", first="assistant")]))
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n")
    assert labels == "Hello!<|im_end|>\nSo?<|im_end|>\n"


@pytest.mark.parametrize(
    "template",
    [
        "{% for message in messages %}{{ message.content }",
        "{{ nothing.at_all }}",
        "{% for message in messages %}{% if message.role == 'assistant' %}{{ 1 // 0 }}{% endif %}"
        "{{ message.content }}{% endfor %}",
    ],
)
def test_fault_of_the_template_is_its_own_even_if_bad_lines_are_skipped(tmp_path, template):
    tiny_tokenizer(tmp_path / "tokenizer", chat_template=template)
    with pytest.raises(ConfigError, match=r"tokenizer: its chat template fails .*mend the template"):
        corpus_of(tmp_path, [chat("a", "b")], skip_bad_lines=True)


def test_last_turn_only_is_a_setting(tmp_path):
    chat_tokenizer(tmp_path / "tokenizer", STYLES["qwen3"])
    thought = "<think>\n\nhm\n</think>\n\n"
    corpus = corpus_of(tmp_path, [chat("a", f"{thought}b", "c", f"{thought}d")], last_turn_only=True)
    assert rows_of(corpus)[0][1] == "<think>\nhm\n</think>\n\nd<|im_end|>\n"
