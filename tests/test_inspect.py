"""`pipeline inspect` on a terminal: what is said is what the cache holds, whatever is in it and wherever it lies."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline import open_cache
from pipeline.cache.commits import SHARDS, commit_path, read_commit
from pipeline.cache.folder import CacheFolder
from pipeline.cache.manifest import TOKENIZER
from pipeline.cache.reader import PartialCache
from pipeline.corpus import TokenSequence
from pipeline.formats.containers import CONTAINERS
from pipeline.inspection.sample import Sample
from pipeline.inspection.summary import bytes_by_part
from pipeline.progress import Reporter
from pipeline.spelling import Speller
from pipeline.stores.sealed import read_json, write_json
from pipeline.tokenizer import load_tokenizer
from stages.prepare.run import prepare
from stages.prepare.settings import PrepareConfig
from tests.support.chat_templates import STYLES, chat_tokenizer
from tests.support.helpers import run, tiny_tokenizer
from tests.support.object_store import put_cache
from tests.support.small import make_cache, make_corpus

KINDS = {
    "top-k": {},
    "top-k and draws": {"tail_samples": 4},
    "draws alone": {"top_k": 0, "tail_samples": 4},
    "lossless": {"max_kl_error": 0.0},
    "one entry": {"top_k": 1},
}
SAMPLES = Path(__file__).parent.parent / "data" / "samples"


@pytest.fixture(scope="module", params=[(kind, container) for kind in KINDS for container in CONTAINERS], ids=str)
def cache(request, tmp_path_factory, corpus):
    kind, container = request.param
    return make_cache(tmp_path_factory.mktemp("cache") / "cache", corpus, container=container, **KINDS[kind])


@pytest.fixture(scope="module")
def plain(tmp_path_factory, corpus):
    return make_cache(tmp_path_factory.mktemp("plain") / "cache", corpus)


def inspected(*arguments: object) -> str:
    code, out, err = run("inspect", *arguments)
    assert code == 0, err
    return out


def refused(*arguments: object) -> str:
    code, out, err = run("inspect", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    return err


def test_summary_has_the_means_of_all_targets_and_all_bytes(cache):
    out = inspected(cache)
    sequences = list(open_cache(cache))
    manifest = open_cache(cache).manifest
    assert f"{manifest.num_targets:,} targets of {manifest.num_tokens:,} tokens: 40 sequences" in out
    assert f"complete ({manifest.num_partitions} of {manifest.num_partitions} shards)" in out
    for temperature in manifest.temperatures:
        entropy = np.concatenate([item.targets.entropy(temperature) for item in sequences]).mean(dtype=np.float64)
        (said,) = re.findall(rf"T = {temperature:g} +entropy ([\d.]+) nats", out)
        assert float(said) == pytest.approx(entropy, abs=1 / 64 + 5e-4)  # a record has the values before rounding
    parts = bytes_by_part(PartialCache(cache), list(range(manifest.num_partitions)))
    size = sum((cache / SHARDS / name).read_bytes().__len__() for name in (cache / SHARDS).names())
    assert sum(parts.values()) * manifest.num_targets == pytest.approx(size)
    assert min(parts.values()) > 0
    assert ("ids" in parts) == (manifest.top_k > 0)
    assert ("draws" in parts) == (manifest.tail_samples > 0)


def test_sequence_shows_every_token_once_and_what_was_said_of_it(cache):
    number = 7
    item = open_cache(cache)[number]
    out = inspected(cache, "--sequence", number, "--entries", 3, "--temperature", 2)
    assert out == inspected(cache, "--sequence", item.key.hex(), "--entries", 3, "--temperature", 2)
    lines = out.splitlines()
    assert sum(line.startswith("-- document") for line in lines) == len(item.document_lengths)
    said = {int(match[1]): match[2] for line in lines if (match := re.match(r" *(\d+)  '.*'  +([\d.e-]+) ", line))}
    assert list(said) == (item.target_positions + 1).tolist()
    probs = np.exp(item.targets.label_logprobs(2.0))
    for prob, text in zip(probs.tolist(), said.values()):
        assert float(text) == pytest.approx(prob, rel=0.06, abs=5e-4)
    covered = list(said)
    for line in lines:
        if match := re.match(r" *(\d+)(?:-(\d+))?  masked: ", line):
            covered += range(int(match[1]), int(match[2] or match[1]) + 1)
    assert sorted(covered) == list(range(len(item.token_ids)))
    choices = [line for line in lines if " drawn " in line]
    assert bool(choices) == (item.targets.top_k == 0)


def test_worst_are_those_of_a_sort_of_all_targets(cache):
    out = inspected(cache, "--worst", 5, "--sample", "all")
    found, documents = [], []
    for number, item in enumerate(open_cache(cache)):
        values = item.targets.entropy(1.0).astype(np.float64)
        found += [(value, number, place + 1) for value, place in zip(values, item.target_positions.tolist())]
        ends = np.cumsum(item.document_lengths).tolist()
        for start, stop in zip([0, *ends], ends):
            inside = values[(item.target_positions + 1 >= start) & (item.target_positions + 1 < stop)]
            if len(inside) >= 8:
                documents.append((float(inside.mean()), number, start))
    for what, expected in (("positions: least sure", found), ("documents of 8 targets or more: least sure", documents)):
        lines = out[out.index(what) :].splitlines()[1:6]
        top = sorted(expected, key=lambda one: -one[0])[:5]
        assert [line.split()[0] for line in lines] == [f"{value:.4f}" for value, *_ in top]
        places = {f"{n}:{p}" for value, n, p in expected if f"{value:.4f}" >= f"{top[-1][0]:.4f}"}
        assert {re.search(r" (\d+:\d+)  ", line)[1] for line in lines} <= places
    assert f"the worst of all 40 sequences, in {open_cache(cache).manifest.num_partitions} of" in out


def test_unfinished_cache_is_shown_as_far_as_it_is(tmp_path, plain):
    folder = tmp_path / "cache"
    shutil.copytree(plain, folder)
    (folder / "index.arrow").unlink(missing_ok=True)
    manifest = CacheFolder(folder).manifest
    commit_path(folder, 1).unlink()
    assert manifest.num_partitions > 2
    out = inspected(folder, "--worst", 2, "--sample", "all")
    done = manifest.num_partitions - 1
    assert f"% done ({done} of {manifest.num_partitions} shards)" in out
    first, stop = manifest.partitions[1:3]
    assert f"the worst of {40 - (stop - first)} of 40 sequences, in {done} of {manifest.num_partitions}" in out
    inspected(folder, "--sequence", 0)
    assert "partition 1 is not captured yet" in refused(folder, "--sequence", first)
    key = open_cache(plain)[first].key.hex()
    assert "no sequence with the key" in refused(folder, "--sequence", key)
    assert not (folder / "index.arrow").exists()
    for partition in range(manifest.num_partitions):
        commit_path(folder, partition).unlink(missing_ok=True)
    assert "0.0% done (0 of" in inspected(folder)
    code, out, err = run("inspect", folder, "--worst", 3)
    assert (code, "no partition is captured yet" in err, "0.0% done" in out) == (2, True, True)


def test_only_the_shards_that_are_shown_are_fetched(url, plain, tmp_path):
    put_cache(plain, url)
    copies = tmp_path / "copies"

    def fetched() -> int:
        return len([path for path in copies.iterdir() if len(path.name) == 32]) if copies.is_dir() else 0

    assert "40 sequences" in inspected(url)
    assert fetched() == 0
    here, there = (inspected(place, "--sequence", 0) for place in (plain, url))
    assert here == there
    assert fetched() == 1
    inspected(url, "--worst", 1, "--sample", 3, "--shards", 2)
    assert fetched() <= 3
    for name in (url / TOKENIZER).names():
        (url / TOKENIZER / name).unlink()
    code, _, err = run("inspect", url, "--sequence", 0)
    assert (code, "tokens are shown as ids" in err) == (0, True)


def test_sample_is_seeded_and_of_as_many_shards_as_asked_for(plain):
    cache = PartialCache(plain)
    sizes = np.diff(cache.manifest.partitions)
    draws = [Sample.draw(cache, 5, 2, seed) for seed in range(60)]
    assert all(len(draw.numbers) == 5 == len(set(draw.numbers)) for draw in draws)
    assert {len(draw.partitions) for draw in draws} <= {1, 2}
    assert {part for draw in draws for part in draw.partitions} == set(range(cache.manifest.num_partitions))
    assert Sample.draw(cache, 5, 2, 3).numbers == draws[3].numbers
    many = Sample.draw(cache, int(sizes.sum()) - 1, 1, 0)
    assert len(many.partitions) == len(sizes)
    assert Sample.draw(cache, 0, 1, 0).numbers == Sample.draw(cache, 10**9, 1, 0).numbers == list(range(40))
    assert [number for number, _ in draws[0].read(Reporter())] == draws[0].numbers


def test_labels_of_a_chat_are_what_is_not_masked(tmp_path):
    chat_tokenizer(tmp_path / "tokenizer", STYLES["chatml"])
    prepare(PrepareConfig(inputs=(SAMPLES,), tokenizer=tmp_path / "tokenizer", out=tmp_path / "corpus"))
    cache = make_cache(tmp_path / "cache", tmp_path / "corpus")
    numbers = [n for n, item in enumerate(open_cache(cache)) if not item.loss_mask.all()]
    shown = "".join(inspected(cache, "--sequence", number, "--longest", 5000) for number in numbers)
    assert re.search(r"masked: '<\|im_start\|>user", shown)
    assert not re.search(r"masked: '[^']*<\|im_start\|>assistant\\nA small model, the student", shown)


def test_tokens_that_make_one_character_are_shown_as_it(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    ids = tokenizer.encode("a 🙂中文 b", add_special_tokens=False)
    texts = Speller(tokenizer).row(ids)
    assert "".join(texts) == "a 🙂中文 b"
    assert "🙂" in texts
    assert "" in texts
    assert Speller(tokenizer).token(ids[texts.index("")]).startswith("#")
    assert Speller(None).row([3, 4]) == ["#3", "#4"]


def test_bytes_that_are_no_character_do_not_take_other_tokens_with_them(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    ids = tokenizer.encode("🙂", add_special_tokens=False)[1:] + tokenizer.encode("the end", add_special_tokens=False)
    texts = Speller(tokenizer).row(ids)
    assert "".join(texts).lstrip("\ufffd") == "the end"
    assert [text for text in texts if "\ufffd" not in text and text] == Speller(tokenizer).row(ids[3:])


def test_spaces_of_a_decoder_that_drops_the_first_one_are_kept():
    backend = Tokenizer(models.WordLevel({"▁the": 0, "▁end": 1, "▁a": 2, "s": 3, "?": 4}, unk_token="?"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    speller = Speller(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert speller.row([0, 1, 3, 0]) == ["the", " end", "s", " the"]
    assert [speller.token(index) for index in (0, 3)] == [" the", "s"]


def test_text_cannot_move_the_cursor(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    ids = np.array(tokenizer.encode("a\x1b[2J\r\u202eb 中", add_special_tokens=False), np.int32)
    rows = [
        TokenSequence(token_ids=ids, loss_mask=mask, document_lengths=np.array([len(ids)], np.int32))
        for mask in (np.ones(len(ids), bool), np.arange(len(ids)) == len(ids) - 1)
    ]
    cache = make_cache(tmp_path / "cache", make_corpus(tmp_path / "corpus", rows, num_partitions=1))
    for number in (0, 1):
        out = inspected(cache, "--sequence", number, "--worst", 4)
        assert "\\x1b" in out
        assert not re.search("[\x1b\r\u202e]", out)
        assert ("'a' begins the sequence: nothing predicts it" in out) == (number == 0)


def test_ids_are_shown_where_the_tokenizer_cannot_be_read(tmp_path, plain):
    folder = tmp_path / "cache"
    shutil.copytree(plain, folder)
    shutil.rmtree(folder / TOKENIZER)
    code, out, err = run("inspect", folder, "--sequence", 0)
    assert code == 0
    assert "tokens are shown as ids" in err
    ids = open_cache(plain)[0].token_ids
    assert f"'#{ids[-1]}'" in out
    assert inspected(folder, "--sequence", 0, "--tokenizer", plain / TOKENIZER) == inspected(plain, "--sequence", 0)
    tiny_tokenizer(tmp_path / "other", vocab_size=300)
    assert "is not the tokenizer of the cache's ids" in refused(
        plain, "--sequence", 0, "--tokenizer", tmp_path / "other"
    )
    shutil.copytree(tmp_path / "other", folder / TOKENIZER)
    _, out, err = run("inspect", folder, "--sequence", 0)
    assert "is not the tokenizer of the cache's ids" in err
    assert f"'#{ids[-1]}'" in out


def test_records_without_statistics_are_no_error(tmp_path, plain):
    folder = tmp_path / "cache"
    shutil.copytree(plain, folder)
    for statistics in ({}, {"sum_entropy": [1.0]}, {"sum_entropy": float("nan")}):
        commit = read_json(commit_path(folder, 0), ValueError)
        write_json(commit_path(folder, 0), commit | {"statistics": statistics})
        assert read_commit(folder, 0).statistics.keys() == statistics.keys()
        out = inspected(folder)
        assert "entropy" not in out.replace("entropies", "")
        assert "measured" not in out


def test_mistakes_are_one_line(tmp_path, plain):
    for wanted in ("40", "-1", "one", "", "7" * 31, "²"):
        assert "give a number from 0 to 39" in refused(plain, f"--sequence={wanted}")
    assert "no sequence with the key" in refused(plain, "--sequence", "0" * 32)
    assert "was not captured; the cache is exact at: 1, 2" in refused(plain, "--temperature", 3)
    assert "no cache there" in refused(tmp_path)
    assert "no tokenizer there" in refused(plain, "--worst", 1, "--tokenizer", tmp_path)
    for name in ("worst", "sample", "maps", "longest"):
        assert f"{name} is -1" in refused(plain, f"--{name}", -1)
    assert "sample is 'some'" in refused(plain, "--sample", "some")


def test_damaged_shard_is_one_line_that_names_it(tmp_path, plain):
    folder = tmp_path / "cache"
    shutil.copytree(plain, folder)
    shard = sorted((folder / SHARDS).iterdir())[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert shard.name in refused(folder, "--sequence", 0)
    code, out, err = run("inspect", folder)
    assert code == 2
    assert "40 sequences" in out  # which the records say
    assert shard.name in err


def test_own_tokenizer_is_that_of_the_corpus(plain, corpus):
    tokenizer = load_tokenizer(corpus / TOKENIZER)
    item = open_cache(plain)[3]
    before = tokenizer.decode(item.token_ids[:1])
    assert f"'{before}'" in inspected(plain, "--sequence", 3) or not before.isprintable()
