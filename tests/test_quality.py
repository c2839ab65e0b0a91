"""`prepare --quality`, `--near-duplicates` and `--rejected`: what is dropped, why, and that all of it is counted."""

import dataclasses
import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from pipeline.corpus import Corpus
from pipeline.errors import ConfigError
from pipeline.progress import KeptLines
from stages.prepare import near_duplicates, quality
from stages.prepare.near_duplicates import shingles
from stages.prepare.quality import KINDS, RULES, Reading, broken_rule, rules_of
from stages.prepare.run import prepare
from stages.prepare.settings import PrepareConfig
from stages.prepare.staging import FinishedTask
from tests.support.helpers import tiny_tokenizer

SAMPLES = Path(__file__).parent.parent / "data" / "samples"
ENGLISH = (SAMPLES / "english.txt").read_text(encoding="utf-8")
CHINESE = (SAMPLES / "chinese.txt").read_text(encoding="utf-8")
CODE = (SAMPLES / "code.py.txt").read_text(encoding="utf-8")
WORDS = [word for word in ENGLISH.split() if word.isalpha()]


def sentence(seed, count=40):
    return " ".join(random.Random(seed).choices(WORDS, k=count)) + "."


@pytest.mark.parametrize(("text", "kind"), [(ENGLISH, "latin"), (CHINESE, "chinese"), (CODE, "code"), ("", "latin")])
def test_kinds_are_told_apart(text, kind):
    assert Reading(text).kind == kind


def test_other_scripts_are_a_kind_of_their_own_and_no_rule_of_words_drops_them():
    greek = "καλημέρα κόσμε " * 3
    assert Reading(greek).kind == "other"
    assert broken_rule(Reading(greek), rules_of(["gopher-word-count", "gopher-stop-words", "c4-sentences"])) is None


@pytest.mark.parametrize("text", [ENGLISH, CHINESE, CODE], ids=["english", "chinese", "code"])
def test_good_text_of_every_kind_breaks_no_rule(text):
    assert [rule for rule in RULES if RULES[rule](Reading(text))] == []


BAD = {
    "gopher-word-count": ["Too short to be of use.", "短的文字没有用的。"],
    "gopher-word-length": [" ".join(["supercalifragilistic"] * 60), "a b c " * 40],
    "gopher-symbols": ["the # of and " * 30, "the end... of it " * 30],
    "gopher-bullets": ["\n".join(f"• {sentence(seed, 6)}" for seed in range(20))],
    "gopher-ellipses": ["\n".join(sentence(seed, 9) + ".." for seed in range(9))],
    "gopher-letters": ["1234 5678 the of and 99 " * 20],
    "gopher-stop-words": ["lorem dolor amet " * 30, "白日依山尽，黄河入海流，欲穷千里目，更上一层楼。" * 5],
    "gopher-repeated-lines": ["\n".join([sentence(1)] * 5 + [sentence(seed) for seed in range(2, 6)])],
    "gopher-repeated-words": [" ".join([sentence(1, 12)] * 6), "今天的潮水教明天的我，" * 12],
    "c4-sentences": [sentence(1) + "\nand a line without an end", "只有一句话，没有更多的了。"],
    "c4-lorem-ipsum": ["Lorem Ipsum dolor"],
    "c4-braces": [sentence(2) + " {"],
    "code-lines": [CODE + "x = '" + "a" * 1000 + "'\n"],
    "code-letters": ["x = (((((((((((((((((((((((((([[[[[[[[[[[[[])\n" * 5],
}


@pytest.mark.parametrize(("rule", "text"), [(rule, text) for rule, texts in BAD.items() for text in texts])
def test_each_rule_finds_what_it_is_about(rule, text):
    assert RULES[rule](Reading(text))
    assert rule in rules_of([rule.partition("-")[0]])


def test_every_rule_has_a_text_that_breaks_it():
    assert list(BAD) == list(RULES)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 7, 10])
def test_repetition_is_counted_as_by_hand(n):
    """Against every window compared with every earlier one."""
    chance = random.Random(n)
    for _ in range(50):
        words = chance.choices(["a", "bb", "ccc", "dddd"], weights=(8, 4, 2, 1), k=chance.randint(0, 60))
        grams = [tuple(words[at : at + n]) for at in range(len(words) - n + 1)]
        covered = {
            place
            for at, gram in enumerate(grams)
            if any(grams[before] == gram for before in range(at))
            for place in range(at, at + n)
        }
        assert quality._repeated_characters(words, n) == sum(len(words[place]) for place in covered)
        top = [Counter(grams)[gram] * len("".join(gram)) for gram in grams if Counter(grams)[gram] > 1]
        assert quality._top_characters(words, n) == max(top, default=0)


def test_thresholds_are_the_published_ones():
    """At the edge of each: the last text that passes and the first that does not."""
    lines = [sentence(seed, 10) for seed in range(100)]

    def repeated(count):
        return "\n".join([*lines[count:], *["x"] * (count + 1)])

    assert not quality._repeated_lines(Reading(repeated(30)))  # 30 of 101 came before
    assert quality._repeated_lines(Reading(repeated(31)))
    for count, is_broken in ((49, True), (50, False), (100_000, False), (100_001, True)):
        assert quality._word_count(Reading(" ".join(["word"] * count))) == is_broken
    assert quality._word_count(Reading("的" * 99))
    assert not quality._word_count(Reading("的" * 100))


@pytest.mark.parametrize("name", ["goffer", "", "gopher-", "c5"])
def test_unknown_rules_are_refused_with_the_known_ones(name, tmp_path):
    with pytest.raises(ConfigError, match=r"choose gopher, c4, code, or one of: gopher-word-count"):
        PrepareConfig(inputs=(tmp_path,), tokenizer=tmp_path, out=tmp_path / "o", quality=(name,))


@pytest.fixture
def inputs(tmp_path):
    """Five files of good and bad texts, a conversation's place among them, in an order of chance."""
    tiny_tokenizer(tmp_path / "tokenizer")
    texts = [(None, ENGLISH), (None, CHINESE), (None, CODE)]
    texts += [(None, "\n".join(sentence(100 * seed + at) for at in range(8)) + " the and of.") for seed in range(20)]
    texts += [(rule, text) for rule, some in BAD.items() if rule.startswith("gopher") for text in some]
    random.Random(0).shuffle(texts)
    (tmp_path / "in").mkdir()
    for number in range(5):
        some = [{"text": text} for _, text in texts[number::5]] + [{"prompt": "short", "completion": "# # #"}]
        (tmp_path / "in" / f"{number}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in some))
    return tmp_path / "in"


def settings(inputs, name, **changes):
    values = {"inputs": (inputs,), "tokenizer": inputs.parent / "tokenizer", "sequence_length": 64, "packing": "none"}
    return PrepareConfig(out=inputs.parent / name, **values | changes)


def test_everything_dropped_is_counted_by_rule_and_listed(inputs):
    config = settings(inputs, "corpus", quality=("gopher",), rejected=inputs.parent / "rejected.jsonl")
    found = prepare(config).statistics
    listed = [json.loads(line) for line in config.rejected.read_text().splitlines()]
    texts = [
        (f"{path}: line {number}", json.loads(line)["text"])
        for path in sorted(inputs.iterdir())
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if "text" in json.loads(line)
    ]
    expected = [
        {"where": where, "rule": rule, "begins": text[:200]}
        for where, text in texts
        if (rule := broken_rule(Reading(text), rules_of(["gopher"])))
    ]
    assert listed == expected
    assert 0 < len(expected) < len(texts)
    counts = Counter(f"rejected_{entry['rule'].replace('-', '_')}" for entry in listed)
    assert {name: count for name, count in found.items() if name.startswith("rejected_")} == counts
    assert sum(found.get(f"{kind}_texts", 0) for kind in KINDS) == len(texts)
    assert sum(found.get(f"{kind}_characters", 0) for kind in KINDS) == sum(len(text) for _, text in texts)
    assert found["documents"] + found["duplicate_documents"] == found["records"] - len(expected)


def test_nothing_is_dropped_or_counted_unless_it_is_asked_for(inputs):
    manifest = prepare(settings(inputs, "corpus"))
    assert not any(re.match("rejected|.*_texts", name) for name in manifest.statistics)
    assert (
        manifest.statistics["documents"] + manifest.statistics["duplicate_documents"] == manifest.statistics["records"]
    )


def test_a_killed_run_lists_what_an_undisturbed_one_lists(inputs, monkeypatch):
    whole = settings(inputs, "whole", quality=("gopher",), rejected=inputs.parent / "whole.jsonl")
    prepare(whole, unit_bytes=10_000)
    again = settings(inputs, "again", quality=("gopher",), rejected=inputs.parent / "again.jsonl")
    commit, done = FinishedTask.commit, []

    def fail_at_third(*arguments):
        won = commit(*arguments)
        done.append(1)
        if len(done) == 3:
            raise KeyboardInterrupt
        return won

    monkeypatch.setattr(FinishedTask, "commit", fail_at_third)
    again = dataclasses.replace(again, workers=1)
    with pytest.raises(KeyboardInterrupt):
        prepare(again, unit_bytes=10_000)
    prepare(again, unit_bytes=10_000)
    assert again.rejected.read_bytes() == whole.rejected.read_bytes()
    with pytest.raises(ConfigError, match="quality"):
        prepare(settings(inputs, "again", quality=("c4",)))


def test_mistakes_are_one_line(inputs, monkeypatch):
    with pytest.raises(ConfigError, match="rejected is set, but nothing is"):
        settings(inputs, "corpus", rejected=Path("list"))
    with pytest.raises(ConfigError, match=r"near_duplicates is 0.3; it must lie in \[0.5, 1\]"):
        settings(inputs, "corpus", near_duplicates=0.3)
    monkeypatch.setattr(near_duplicates.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"datasketch is not installed; `pip install"):
        prepare(settings(inputs, "corpus", near_duplicates=0.8))
    assert not (inputs.parent / "corpus").exists()


def alike(text, share, seed):
    """The text with words changed at random places."""
    words, chance = text.split(), random.Random(seed)
    for place in chance.sample(range(len(words)), round(share * len(words))):
        words[place] = f"new{seed}x{place}"
    return " ".join(words)


def jaccard(one, other):
    first, second = (shingles(Reading(text)) for text in (one, other))
    return len(first & second) / len(first | second)


def test_shingles_are_runs_of_five_words_and_ten_characters():
    assert shingles(Reading("A b c d e f")) == {b"a b c d e", b"b c d e f"}
    assert shingles(Reading("a b")) == {b"a b"}
    assert len(shingles(Reading("一二三四五六七八九十百"))) == 2


def test_texts_nearly_like_one_before_them_are_dropped_and_listed(tmp_path):
    """Against the exact Jaccard index, for texts that lie well on either side of the threshold."""
    pytest.importorskip("datasketch", reason="pip install datasketch")
    tiny_tokenizer(tmp_path / "tokenizer")
    texts = []
    for seed in range(12):
        text = sentence(seed, 400)
        texts += [text, alike(text, 0.004, seed), alike(text, 0.2, seed), alike(text, 0.5, seed)]
    texts += [texts[0], CHINESE, CHINESE + "完了。", CODE]
    kept, expected = [], []
    for text in texts:
        near = max((jaccard(text, other) for other in kept), default=0.0)
        assert not 0.65 < near < 0.95, "too near the threshold for an estimate"
        if near >= 0.8 and text not in kept:
            expected.append(text)
        elif near < 0.8:
            kept.append(text)
    (tmp_path / "in").mkdir()
    for number, some in enumerate(itertools.batched(texts, 10) if hasattr(itertools, "batched") else [texts]):
        (tmp_path / "in" / f"{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
    config = PrepareConfig(
        inputs=(tmp_path / "in",),
        tokenizer=tmp_path / "tokenizer",
        out=tmp_path / "corpus",
        near_duplicates=0.8,
        rejected=tmp_path / "rejected.jsonl",
        packing="none",
        workers=1,
    )
    said = KeptLines()
    found = prepare(config, said, unit_bytes=10_000).statistics
    listed = [json.loads(line) for line in config.rejected.read_text().splitlines()]
    assert [entry["begins"] for entry in listed] == [text[:200] for text in expected]
    assert {entry["rule"] for entry in listed} == {"near-duplicate"}
    assert found["rejected_near_duplicate"] == len(expected) == 13
    assert found["duplicate_documents"] == 1
    assert found["documents"] == len(texts) - 14
    assert len(Corpus(config.out)) > 0
    several = dataclasses.replace(config, out=tmp_path / "several", rejected=tmp_path / "several.jsonl", workers=3)
    assert prepare(several, unit_bytes=10_000).statistics == found
    assert several.rejected.read_bytes() == config.rejected.read_bytes()
    assert Corpus(several.out).manifest.fingerprint == Corpus(config.out).manifest.fingerprint
