"""A corpus that has grown is scored only where it is new; what was known is copied to the bit."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from pipeline import open_cache
from pipeline.cache.commits import SHARDS, commit_path
from pipeline.cache.folder import CacheFolder
from pipeline.cache.manifest import CacheManifest
from pipeline.cache.verify import verify_cache
from pipeline.corpus import Corpus
from pipeline.errors import CacheCorruptError, CacheMismatchError
from pipeline.formats.layout import encode_all
from pipeline.lifecycle.reuse import KnownTargets
from pipeline.progress import KeptLines
from stages.cache_logits.capture import capture
from stages.cache_logits.fake_engine import FakeEngine
from stages.cache_logits.run import cache_logits
from stages.cache_logits.scoring import documents_of
from stages.cache_logits.settings import CacheConfig
from stages.prepare.run import prepare
from stages.prepare.settings import PrepareConfig
from tests.support.helpers import run, tiny_tokenizer
from tests.support.small import (
    assert_equal_caches,
    contents_of,
    fake_manifest,
    make_cache,
    make_corpus,
    make_teacher,
    random_sequences,
)

SEQUENCES = random_sequences(40, 300, seed=9)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """25 sequences, and the same with 15 more between them, in another order."""
    folder = tmp_path_factory.mktemp("corpora")
    order = np.random.default_rng(0).permutation(40)
    make_corpus(folder / "old", SEQUENCES[:25])
    make_corpus(folder / "new", [SEQUENCES[index] for index in order], num_partitions=3)
    return folder


class CountingEngine(FakeEngine):
    """Counts what it is asked for."""

    def __init__(self, manifest: CacheManifest) -> None:
        super().__init__(manifest)
        self.tokens = 0

    def score(self, requests):
        def counted():
            for request in requests:
                self.tokens += len(request.token_ids)
                yield request

        return super().score(counted())


def grown(folder: Path, corpus_folder: Path, earlier: list[Path], **settings: object) -> CountingEngine:
    """A cache by CountingEngine that reuses others."""
    rows = Corpus(corpus_folder)
    manifest = fake_manifest(rows, **settings)
    cache = CacheFolder.begin(folder, manifest, corpus_folder / "tokenizer")
    engine = CountingEngine(manifest)
    known = KnownTargets(earlier, manifest)
    capture(engine, rows, cache, range(manifest.num_partitions), known, encoding_threads=3)
    return engine


def assert_same(folder: Path, wanted: Path) -> None:
    assert verify_cache(folder).problems == []
    assert_equal_caches(folder, wanted)


@pytest.mark.parametrize(
    ("old", "new", "max_kl_error"),
    [("arrow", "arrow", 0.0), ("zarr", "arrow", 1e-4), ("arrow", "zarr", 1e-4)],
)
def test_only_new_sequences_are_scored_and_the_cache_is_as_if_all_were(tmp_path, corpora, old, new, max_kl_error):
    settings = {"max_kl_error": max_kl_error, "tail_samples": 3}
    earlier = make_cache(tmp_path / "old", corpora / "old", container=old, **settings)
    engine = grown(tmp_path / "grown", corpora / "new", [earlier], container=new, **settings)
    documents = [document for sequence in SEQUENCES[25:] for document in documents_of(sequence)]
    assert engine.tokens == sum(len(token_ids) for token_ids, _, _ in documents)
    assert_same(tmp_path / "grown", make_cache(tmp_path / "scratch", corpora / "new", container=new, **settings))


def test_everything_known_scores_nothing(tmp_path, corpora):
    make_cache(tmp_path / "old", corpora / "new")
    engine = grown(tmp_path / "grown", corpora / "old", [tmp_path / "old"])
    assert engine.tokens == 0
    assert_same(tmp_path / "grown", make_cache(tmp_path / "scratch", corpora / "old"))


def test_several_and_unfinished_caches_can_be_reused(tmp_path, corpora):
    first = make_cache(tmp_path / "first", corpora / "old")
    commit_path(first, 1).unlink()
    second = make_cache(tmp_path / "second", make_corpus(tmp_path / "more", SEQUENCES[30:]))
    engine = grown(tmp_path / "grown", corpora / "new", [first, second])
    assert 0 < engine.tokens < sum(len(sequence.token_ids) for sequence in SEQUENCES[:30])
    assert_same(tmp_path / "grown", make_cache(tmp_path / "scratch", corpora / "new"))


def test_copies_of_rounded_targets_never_claim_a_smaller_error_than_they_have(tmp_path, corpora):
    """Every mean is at least that of the targets as they would be measured, and never above the bound."""
    earlier = make_cache(tmp_path / "old", corpora / "old")
    grown(tmp_path / "grown", corpora / "new", [earlier])
    scored = make_cache(tmp_path / "scratch", corpora / "new")
    for commits in zip(*(open_cache(folder).commits for folder in (tmp_path / "grown", scored)), strict=True):
        stated, measured = (np.array(commit.statistics["mean_kl_error"]) for commit in commits)
        assert (stated >= measured * (1 - 1e-6)).all()
        assert (stated <= 1e-4 * 1.001).all()
        stated, measured = (np.array(commit.statistics["max_probability_error"]) for commit in commits)
        assert (stated >= measured).all()


def test_known_sequences_are_not_rounded_again(tmp_path, corpora, monkeypatch):
    """Their stored columns are copied: rounding what was rounded before would change it."""
    earlier = make_cache(tmp_path / "old", corpora / "old")
    encoded = []

    def recorded(layout, captured):
        encoded.extend(sequence.key for sequence, _ in captured)
        return encode_all(layout, captured)

    monkeypatch.setattr("pipeline.cache.sequence.encode_all", recorded)
    grown(tmp_path / "grown", corpora / "new", [earlier])
    assert sorted(encoded) == sorted(sequence.key for sequence in SEQUENCES[25:])


def test_rows_of_other_masks_or_documents_are_not_known(tmp_path, corpora):
    sequence = next(row for row in SEQUENCES if len(row.document_lengths) > 1)
    one_document = dataclasses.replace(sequence, document_lengths=np.array([len(sequence.token_ids)], np.int32))
    masked = dataclasses.replace(sequence, loss_mask=sequence.loss_mask & (np.arange(len(sequence.token_ids)) > 5))
    corpus = make_corpus(tmp_path / "corpus", [sequence, one_document, masked], num_partitions=1)
    old = make_cache(tmp_path / "old", make_corpus(tmp_path / "one", [sequence], num_partitions=1))
    known = KnownTargets([old], fake_manifest(Corpus(corpus)))
    kinds = [known.find_one(row.key) is not None for row in Corpus(corpus).rows()]
    assert kinds == [True, False, False]


def test_damaged_shard_of_an_earlier_cache_is_an_error_that_names_it(tmp_path, corpora):
    old = make_cache(tmp_path / "old", corpora / "old")
    path = sorted((old / SHARDS).iterdir())[1]
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)
    with pytest.raises(CacheCorruptError, match=path.name):
        grown(tmp_path / "grown", corpora / "new", [old])


def settings(teacher: Path, corpus: Path, out: Path, **changes: object) -> CacheConfig:
    values = {"top_k": 8, "engine": "transformers", "shard_tokens": 500, "batch_tokens": 128}
    return CacheConfig(teacher=teacher, corpus=corpus, out=out, **values | changes)


@pytest.fixture(scope="module")
def old_cache(tmp_path_factory, teacher, corpora):
    folder = tmp_path_factory.mktemp("real") / "old"
    cache_logits(settings(teacher, corpora / "old", folder))
    return folder


def test_command_says_what_it_copies_and_copies_the_bits_of_a_real_teacher(tmp_path, teacher, corpora, old_cache):
    lines = KeptLines()
    config = settings(teacher, corpora / "new", tmp_path / "new", reuse=(old_cache,), format="zarr")
    cache_logits(config, lines)
    old_tokens = Corpus(corpora / "old").manifest.num_tokens
    new_tokens = Corpus(corpora / "new").manifest.num_tokens - old_tokens
    assert any(
        f"{old_tokens:,} tokens are in earlier caches and copied, {new_tokens:,} are scored" in line
        for line in lines.lines
    )
    assert verify_cache(tmp_path / "new").problems == []
    old, new = contents_of(old_cache), contents_of(tmp_path / "new")
    for key, arrays in old.items():
        for one, other in zip(arrays, new[key], strict=True):
            np.testing.assert_array_equal(one, other)
    assert len(new) == 40


def test_run_without_anything_new_loads_no_teacher(tmp_path, teacher, corpora, old_cache, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr("stages.cache_logits.transformers_engine.TransformersEngine", refuse)
    cache_logits(settings(teacher, corpora / "old", tmp_path / "new", reuse=(old_cache,), shard_tokens=900))
    assert contents_of(tmp_path / "new").keys() == contents_of(old_cache).keys()
    assert open_cache(tmp_path / "new").manifest.num_partitions < open_cache(old_cache).manifest.num_partitions


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 16}, r"top_k is 8, now 16 \(the tail's mass and draws belong to that k"),
        ({"temperatures": (1.0, 4.0)}, r"temperatures is .*now .*4\.0.*\(p_T needs the sum over the whole vocabulary"),
        ({"max_kl_error": 0.0}, r"max_kl_error is 0\.0001, now 0\.0 \(its values were rounded otherwise\)"),
        ({"tail_samples": 2}, r"tail_samples is 0, now 2 \(draws cannot be made from what is stored\); draw_temp"),
    ],
)
def test_other_targets_are_refused_with_the_reason_before_anything_starts(
    tmp_path, teacher, corpora, old_cache, changes, message
):
    with pytest.raises(CacheMismatchError, match=rf"old: nothing of it can be reused: .*{message}"):
        cache_logits(settings(teacher, corpora / "new", tmp_path / "new", reuse=(old_cache,), **changes))
    assert not (tmp_path / "new").exists()


def test_another_teacher_is_refused_by_the_command_in_one_line(tmp_path, corpora, old_cache):
    other = make_teacher(tmp_path / "other", seed=3)
    arguments = ["cache-logits", "--teacher", other, "--corpus", corpora / "new", "--out", tmp_path / "new"]
    arguments += ["--engine", "transformers", "--top-k", 8, "--reuse", old_cache]
    code, _, err = run(*arguments)
    assert code == 2
    assert err.count("\n") == 1
    assert "teacher.weights is" in err
    assert "says something else" in err


@pytest.mark.parametrize("packing", ["isolated", "crossing"])
def test_text_that_is_added_leaves_most_of_a_prepared_corpus_as_it_was(tmp_path, packing):
    """A file behind the others: only sequences that its documents share with earlier ones are new."""
    tiny_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "text").mkdir()
    words = np.random.default_rng(0).choice(["tide", "lamp", "keeper", "glass", "north", "\n"], (60, 80))
    texts = [" ".join(row) for row in words]
    (tmp_path / "text" / "a.txt").write_text("\n".join(texts[:40]))
    common = {"inputs": (tmp_path / "text",), "tokenizer": tmp_path / "tokenizer", "sequence_length": 64}
    prepare(PrepareConfig(**common, out=tmp_path / "old", packing=packing))
    (tmp_path / "text" / "b.txt").write_text("\n".join(texts[40:]))
    prepare(PrepareConfig(**common, out=tmp_path / "new", packing=packing))
    old, new = ({row.key for row in Corpus(tmp_path / name).rows()} for name in ("old", "new"))
    assert len(new) > len(old) > 20
    assert len(old - new) <= 2
