"""Targets that keep as many entries as reach a mass: which, what becomes of the others, and rows of any lengths."""

import dataclasses
import json
import shutil
import warnings

import numpy as np
import pytest
import torch

from pipeline import open_cache
from pipeline.cache.commits import SHARDS
from pipeline.cache.folder import CacheFolder
from pipeline.cache.manifest import CacheManifest
from pipeline.cache.verify import verify_cache
from pipeline.corpus import Corpus, TokenSequence
from pipeline.errors import CacheCorruptError, CacheMismatchError, ConfigError
from pipeline.formats.containers import CONTAINERS
from pipeline.formats.layout import ShardCounts, ShardLayout, checksum_of, decode, encode
from pipeline.stores.local_store import LocalStore
from pipeline.stores.places import store_of
from pipeline.stores.sealed import write_json
from pipeline.targets import TargetSpec, counts_to_mass, cut, kept, restricted
from stages.cache_logits.audit import audit_cache
from stages.cache_logits.comparison import difference_of_cuts, differences
from stages.cache_logits.settings import AuditConfig, TeacherConfig
from stages.train_student.dataset import Collate
from stages.train_student.loss import fused_distillation_loss
from stages.train_student.loss_settings import LossSettings
from stages.train_student.targets import real_entries
from tests.support.helpers import run
from tests.support.oracle import assert_within, softmax
from tests.support.rounding import prob_errors
from tests.support.small import make_cache, make_corpus, random_sequences, rounding_of_logits, true_logits
from tests.test_audit import captured, rewritten
from tests.test_codec import TOP_K, VOCAB_SIZE, random_targets
from tests.test_format import checksum, read_by_the_book
from tests.test_fuzz import fuzz, read

TEMPERATURES = (1.0, 2.0)


def spec_of(top_p, *, top_k=TOP_K, min_k=1, temperature=1.0, max_kl_error=0.0, temperatures=TEMPERATURES):
    return TargetSpec(
        top_k=top_k,
        temperatures=temperatures,
        max_kl_error=max_kl_error,
        top_p=top_p,
        top_p_temperature=temperature,
        min_k=min_k,
    )


def random_logits(num_rows=300, seed=0):
    """float32 logits of flat, peaked and two-headed rows."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(num_rows, VOCAB_SIZE)) * random.uniform(0.2, 8, (num_rows, 1))
    logits[::3, 0] += random.uniform(0, 40, len(logits[::3]))
    return logits.astype(np.float32)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("top_p", "min_k"), [(0.5, 1), (0.9, 4), (0.95, 1), (0.99, 32), (1e-6, 1), (1.0, 1)])
def test_as_few_entries_as_reach_the_mass(top_p, min_k, temperature):
    """Against a sort and a sum of the whole vocabulary in float64."""
    exact, _, probs = random_targets(TEMPERATURES)
    held = np.cumsum(probs[TEMPERATURES.index(temperature)], axis=1)
    fewest = 1 + (held < top_p).sum(axis=1)
    expected = np.clip(fewest, min_k, TOP_K) if top_p < 1 else np.full(len(held), TOP_K)
    found = kept(exact, spec_of(top_p, min_k=min_k, temperature=temperature)).counts
    close = np.abs(held - top_p).min(axis=1) < 1e-5  # float32 decides there
    assert close.mean() < 0.2
    np.testing.assert_array_equal(found[~close], expected[~close])
    assert len(np.unique(found)) > 3 or top_p in (1.0, 1e-6) or min_k == TOP_K


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
def test_what_is_cut_adds_to_the_tail_exactly(top_p):
    exact, _, _ = random_targets(TEMPERATURES)
    found = kept(exact, spec_of(top_p))
    assert (found.counts < exact.counts).sum() > 60
    for index, temperature in enumerate(TEMPERATURES):
        logprobs = exact.logits.astype(np.float64) / temperature - exact.logsumexps[:, [index]].astype(np.float64)
        is_cut = np.arange(TOP_K) >= found.counts[:, None]
        mass = np.where(is_cut, np.exp(logprobs), 0).sum(axis=1) + np.exp(exact.tail_logprobs[:, index].astype(float))
        np.testing.assert_allclose(found.tail_logprobs[:, index], np.log(mass), rtol=2e-7, atol=1e-7)
        total = found.probs(temperature).sum(axis=1, dtype=np.float64) + found.tail_mass(temperature)
        np.testing.assert_allclose(total, 1, atol=5e-6)
    for name in ("logsumexps", "entropies", "label_logits", "draws"):
        assert getattr(found, name) is getattr(exact, name)


def test_tail_of_a_sure_teacher_is_kept_whatever_it_is_small_beside():
    """Mass of 1e-30 outside the first entry: 1 less the rest of it is nothing but rounding."""
    exact, _, _ = random_targets((1.0,), num_rows=4)
    logits = np.concatenate([np.zeros((4, 1)), np.linspace(-70, -90, TOP_K - 1)[None].repeat(4, 0)], axis=1)
    weights = np.exp(logits)
    tails = np.full((4, 1), -np.inf, np.float32)
    exact = dataclasses.replace(
        exact,
        logits=logits.astype(np.float32),
        logsumexps=np.log(weights.sum(axis=1, keepdims=True)).astype(np.float32),
        tail_logprobs=tails,
    )
    found = kept(exact, spec_of(0.9, temperatures=(1.0,)))
    assert (found.counts == 1).all()
    np.testing.assert_allclose(found.tail_logprobs[:, 0], np.log(weights[:, 1:].sum(axis=1)), rtol=1e-6)


def test_no_mass_cuts_a_row_whose_temperature_leaves_no_numbers():
    """Logits so deep that their exponentials are 0 even in float64: their mass is still a logarithm."""
    exact, _, _ = random_targets((0.01,), num_rows=3)
    logits = np.broadcast_to(np.arange(TOP_K) * -20.0, (3, TOP_K)).astype(np.float32)
    nothing = np.full((3, 1), -np.inf, np.float32)
    exact = dataclasses.replace(exact, logits=logits, logsumexps=np.zeros((3, 1), np.float32), tail_logprobs=nothing)
    np.testing.assert_allclose(cut(exact, np.array([1, 2, 5])).tail_logprobs[:, 0], [-2000, -4000, -10000], rtol=1e-6)


def test_entries_of_equal_logits_are_cut_from_the_largest_id_on():
    exact, _, _ = random_targets((1.0,), num_rows=1)
    ids = np.arange(TOP_K, dtype=np.int32)[None]
    equal = dataclasses.replace(
        exact,
        ids=ids,
        logits=np.zeros((1, TOP_K), np.float32),
        logsumexps=np.log(np.full((1, 1), TOP_K, np.float32)),
        tail_logprobs=np.full((1, 1), -np.inf, np.float32),
    )
    found = kept(equal, spec_of(0.49, temperatures=(1.0,)))
    assert found.ids.tolist() == [[*range(TOP_K // 2), *([0] * (TOP_K // 2))]]


def random_counts(num_rows, how, seed=0):
    random = np.random.default_rng(seed)
    return {
        "any": random.integers(1, TOP_K, num_rows, endpoint=True),
        "one": np.ones(num_rows, int),
        "two": np.full(num_rows, 2),
        "all": np.full(num_rows, TOP_K),
        "equal": np.full(num_rows, 7),
        "ends": random.choice([1, 2, TOP_K], num_rows),
    }[how]


def written(path, container, spec, captured):
    """An open shard of sequences with the given targets and labels."""
    sequences = []
    for targets, labels in captured:
        count = len(targets)
        token_ids = np.concatenate([[0], labels]).astype(np.int32)
        lengths = np.array([count + 1], np.int32)
        mask = np.arange(count + 1) > 0
        sequences.append(TokenSequence(token_ids=token_ids, loss_mask=mask, document_lengths=lengths))
    layout = ShardLayout(counts=ShardCounts.of(sequences), spec=spec)
    writer = CONTAINERS[container].create(path, layout)
    columns = [encode(layout, sequence, targets) for sequence, (targets, _) in zip(sequences, captured)]
    for each in columns:
        writer.append(each)
    writer.close()
    return CONTAINERS[container].open(path, layout), layout, columns


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("max_kl_error", [0.0, 1e-4, 1e-2])
@pytest.mark.parametrize("how", ["any", "one", "two", "all", "equal", "ends"])
def test_rows_of_any_lengths_come_back(tmp_path, container, max_kl_error, how):
    num_rows = 1300 if how == "any" else 90  # more than are decoded together
    exact, labels, _ = random_targets(TEMPERATURES, num_rows=num_rows)
    odd = np.arange(num_rows) % 2 == 1
    labels = np.where(odd, exact.ids[:, 5], labels)  # stored, cut, or none of the top k
    exact = dataclasses.replace(exact, label_logits=np.where(odd, exact.logits[:, 5], exact.label_logits))
    cutted = cut(exact, random_counts(num_rows, how))
    bounds = [slice(0, 1), slice(1, 40), slice(40, num_rows)]
    spec = spec_of(0.9, max_kl_error=max_kl_error)
    shard, layout, columns = written(
        tmp_path / "shard", container, spec, [(cutted[rows], labels[rows]) for rows in bounds]
    )
    together = shard.columns(0, 3)
    for name in layout.columns():
        np.testing.assert_array_equal(together[name], np.concatenate([each[name] for each in columns]), err_msg=name)
        assert together[name].dtype == columns[0][name].dtype
    np.testing.assert_array_equal(shard.heads()["num_entries"], [cutted[rows].counts.sum() for rows in bounds])
    for row in (2, 0, 1):
        stored = decode(shard.columns(row, row + 1), layout, "").targets
        wanted = cutted[bounds[row]]
        np.testing.assert_array_equal(stored.counts, wanted.counts)
        np.testing.assert_array_equal(np.sort(stored.ids), np.sort(wanted.ids)) if max_kl_error == 0 else None
        is_entry = np.arange(TOP_K) < wanted.counts[:, None]
        for ids, targets in ((stored.ids, wanted), (wanted.ids, stored)):
            assert all(set(a[e]) == set(b[e]) for a, b, e in zip(ids, targets.ids, is_entry))
        assert (stored.ids[~is_entry] == np.broadcast_to(stored.ids[:, :1], stored.ids.shape)[~is_entry]).all()
        assert (stored.logits[~is_entry] == -np.inf).all()
        for temperature in TEMPERATURES:
            apart = np.abs(np.sort(stored.probs(temperature)) - np.sort(wanted.probs(temperature)))
            assert apart.max() <= (1e-3 if max_kl_error else 1e-7)
            total = stored.probs(temperature).sum(axis=1) + stored.tail_mass(temperature)
            np.testing.assert_allclose(total, 1, atol=1e-5)
            label = np.exp(stored.label_logprobs(temperature)), np.exp(wanted.label_logprobs(temperature))
            np.testing.assert_allclose(*label, atol=1e-3 if max_kl_error else 1e-7)


def test_rounding_of_a_row_is_that_of_the_row_alone():
    """Padding decides nothing: rows with as many entries, in arrays without padding, become the same."""
    exact, labels, _ = random_targets(TEMPERATURES)
    counts = random_counts(len(exact), "any")
    spec = spec_of(0.9, max_kl_error=1e-4)
    for width in (1, 2, 9, 31):
        rows = np.flatnonzero(counts == width)
        wide = cut(exact, counts).take(rows)
        narrow = dataclasses.replace(wide, ids=wide.ids[:, :width], logits=wide.logits[:, :width])
        row = TokenSequence(
            token_ids=np.concatenate([[0], labels[rows]]).astype(np.int32),
            loss_mask=np.arange(len(rows) + 1) > 0,
            document_lengths=np.array([len(rows) + 1], np.int32),
        )
        flat = encode(ShardLayout(counts=ShardCounts.of([row]), spec=spec), row, wide)
        fixed = TargetSpec(top_k=width, temperatures=TEMPERATURES, max_kl_error=1e-4)
        even = encode(ShardLayout(counts=ShardCounts.of([row]), spec=fixed), row, narrow)
        for name in even.keys() - {"checksum"}:
            np.testing.assert_array_equal(flat[name], even[name].reshape(flat[name].shape), err_msg=name)


@pytest.fixture(scope="module")
def short_corpus(tmp_path_factory):
    """Ten sequences."""
    return make_corpus(tmp_path_factory.mktemp("corpus"), random_sequences(10, vocab_size=300))


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("max_kl_error", [0.0, 1e-4])
@pytest.mark.parametrize(
    ("top_p", "min_k", "temperature"), [(0.9, 1, 1.0), (0.8, 4, 2.0), (1.0, 1, 1.0), (1e-3, 1, 1.0)]
)
def test_reader_by_the_book_agrees(tmp_path, short_corpus, container, max_kl_error, top_p, min_k, temperature):
    settings = {"top_p": top_p, "min_k": min_k, "top_p_temperature": temperature, "max_kl_error": max_kl_error}
    folder = make_cache(tmp_path / "cache", short_corpus, container=container, **settings)
    assert verify_cache(folder).problems == []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr's, on numcodecs' codecs
        rows = list(read_by_the_book(folder))
    for row, ours in zip(rows, open_cache(folder), strict=True):
        assert checksum(row) == int(row["checksum"])
        targets = ours.targets
        is_entry = np.arange(8) < targets.counts[:, None]
        np.testing.assert_array_equal(row["counts"], targets.counts)
        for name in ("ids", "logits"):
            np.testing.assert_array_equal(row[name], getattr(targets, name)[is_entry], err_msg=name)
        for name in ("tail_logprobs", "entropies", "label_logits"):
            np.testing.assert_array_equal(row[name], getattr(targets, name), err_msg=name)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("max_kl_error", [0.0, 1e-4])
def test_mass_of_a_single_entry(tmp_path, short_corpus, container, max_kl_error):
    folder = make_cache(
        tmp_path / "cache", short_corpus, container=container, top_k=1, top_p=0.9, max_kl_error=max_kl_error
    )
    assert verify_cache(folder).problems == []
    assert all((item.targets.counts == 1).all() for item in open_cache(folder))


def test_without_top_p_nothing_says_so(tmp_path, corpus):
    """A cache that keeps K entries of all is what version 2 of the format holds, to the entry."""
    folder = make_cache(tmp_path / "cache", corpus)
    document = json.loads((folder / "manifest.json").read_bytes())
    assert document["format_version"] == 2
    assert not {"top_p", "top_p_temperature", "min_k"} & document.keys()
    assert CacheManifest.read(folder).top_p is None


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """One corpus in both containers, mass 0.9."""
    folder = tmp_path_factory.mktemp("caches")
    corpus = make_corpus(folder / "corpus", random_sequences(20, vocab_size=300))
    return {name: make_cache(folder / name, corpus, container=name, top_p=0.9, min_k=2) for name in CONTAINERS}


@pytest.mark.parametrize("container", CONTAINERS)
def test_no_padding_is_stored(tmp_path, caches, container):
    corpus = caches[container].parent / "corpus"
    whole = make_cache(tmp_path / "cache", corpus, container=container)
    cache = open_cache(caches[container])
    count = sum(int(item.targets.counts.sum()) for item in cache)
    assert sum(commit.statistics["num_entries"] for commit in cache.commits) == count
    for partition in range(len(cache.commits)):
        sizes, others = (open_cache(each).shard(partition).open().parts() for each in (caches[container], whole))
        if container == "arrow":
            entries, targets = cache.commits[partition].statistics["num_entries"], cache.commits[partition].num_targets
            assert sizes["ids"] <= 4 * (entries + targets + len(cache)) + 8
            assert sizes["ids"] < others["ids"]


@pytest.mark.parametrize("name", CONTAINERS)
def test_life_of_such_a_cache(tmp_path, caches, name):
    """It is converted there and back, merged with itself, exported and looked at."""
    other = "zarr" if name == "arrow" else "arrow"
    for source, form, out in ((caches[name], other, "there"), (tmp_path / "there", name, "back")):
        code, _, errors = run("convert", source, "--format", form, "--out", tmp_path / out, "--workers", 1)
        assert code == 0, errors
    code, _, errors = run("merge", caches[name], tmp_path / "there", "--out", tmp_path / "merged", "--workers", 1)
    assert code == 0, errors
    for folder in (tmp_path / "back", tmp_path / "there", tmp_path / "merged"):
        assert run("verify", folder)[0] == 0
        for ours, theirs in zip(open_cache(folder), open_cache(caches[name]), strict=True):
            assert checksum_of(vars(ours.targets)) == checksum_of(vars(theirs.targets))
    assert run("inspect", caches[name], "--sequence", 0)[0] == 0
    code, output, errors = run("inspect", caches[name])
    assert code == 0, errors
    count = np.concatenate([item.targets.counts for item in open_cache(caches[name])]).mean()
    assert f"top 8 as far as 0.9 at T = 1, 2 at least, {count:.1f} in the mean, exact at T = 1, 2; rounded" in output


def test_caches_of_another_mass_are_kept_apart(tmp_path, caches):
    corpus = caches["arrow"].parent / "corpus"
    other = make_cache(tmp_path / "other", corpus, top_p=0.8, min_k=2)
    code, _, errors = run("merge", caches["arrow"], other, "--out", tmp_path / "merged")
    assert (code, "top_p is 0.8, there 0.9" in errors) == (2, True), errors
    whole = make_cache(tmp_path / "whole", corpus)
    with pytest.raises(CacheMismatchError, match="top_p"):
        CacheFolder.begin(tmp_path / "other", CacheManifest.read(whole), corpus / "tokenizer")


@pytest.mark.parametrize("container", CONTAINERS)
def test_export_has_rows_of_their_own_lengths(tmp_path, caches, container):
    import pyarrow.parquet as pq

    for layout in ("plain", "axolotl"):
        out = tmp_path / layout
        more = ("--layout", layout, "--temperature", 2.0, "--workers", 1)
        code, _, errors = run("export", caches[container], "--out", out, *more)
        assert code == 0, errors
    cache = open_cache(caches[container])
    plain = [row for path in sorted((tmp_path / "plain").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    for row, item in zip(plain, cache, strict=True):
        counts = item.targets.counts
        assert (
            [len(ids) for ids in row["target_ids"]] == [len(each) for each in row["target_logprobs"]] == counts.tolist()
        )
        sums = [np.exp(each).sum() + tail for each, tail in zip(row["target_logprobs"], row["tail_mass"])]
        np.testing.assert_allclose(sums, 1, atol=1e-4)
    files = sorted((tmp_path / "axolotl").glob("*.parquet"))
    masks = np.concatenate([np.array(row["target_mask"]) for path in files for row in pq.read_table(path).to_pylist()])
    logprobs = np.concatenate([row["target_logprobs"] for path in files for row in pq.read_table(path).to_pylist()])
    assert masks.sum() == sum(int(item.targets.counts.sum()) for item in cache)
    assert (logprobs[masks == 0] == -1e9).all()
    assert np.isfinite(logprobs).all()


def test_batches_follow_the_convention_of_the_loss(caches):
    items = list(open_cache(caches["zarr"]))[:3]
    found = Collate(LossSettings(vocab_size=300, temperature=2.0)).targets(items).teacher
    counts = np.concatenate([item.targets.counts for item in items])
    assert real_entries(found.ids_MK).sum(1).tolist() == counts.tolist()
    assert (found.probs_MK[~real_entries(found.ids_MK)] == 0).all()
    totals = found.probs_MK.sum(1) + found.tail_mass_M
    torch.testing.assert_close(totals, torch.ones_like(totals), atol=1e-5, rtol=0)


def test_a_smaller_vocabulary_cuts_rows_of_any_lengths():
    exact, _, _ = random_targets(TEMPERATURES)
    ragged = cut(exact, random_counts(len(exact), "any"))
    found = restricted(ragged, VOCAB_SIZE // 2)
    for row, (ids, logits) in enumerate(zip(ragged.ids, ragged.logits)):
        stays = (logits > -np.inf) & (ids < VOCAB_SIZE // 2)
        assert set(ids[stays]) == set(found.ids[row][found.logits[row] > -np.inf])
        assert stays.sum() == found.counts[row]
    for temperature in TEMPERATURES:
        total = found.probs(temperature).sum(axis=1) + found.tail_mass(temperature)
        np.testing.assert_allclose(total, 1, atol=1e-5)


def test_audit_forgives_an_entry_at_the_border_and_nothing_else():
    exact, _, _ = random_targets(TEMPERATURES)
    counts, held = counts_to_mass(exact, 0.9, 1.0, 1), np.cumsum(exact.probs(1.0), axis=1)
    wanted = cut(exact, counts)
    assert difference_of_cuts(wanted, wanted, 0.9, 1.0).value == 0
    (rows,) = np.nonzero((counts > 3) & (counts < TOP_K - 2))
    for row in rows[:12]:
        for change in (-2, -1, 1, 2):
            found = cut(exact, np.where(np.arange(len(counts)) == row, counts + change, counts))
            shorter, longer = sorted((counts[row], counts[row] + change))
            far = max(abs(held[row, shorter - 1] - 0.9), abs(held[row, longer - 2] - 0.9))
            assert difference_of_cuts(found, wanted, 0.9, 1.0).value == pytest.approx(far, abs=1e-6)
            assert all(difference.value < 1e-6 for difference in differences(found, wanted, 1.0))


@pytest.mark.parametrize("change", [0, -1, 1])
def test_border_that_arithmetic_moves_is_near_the_mass(change):
    """A row of which the first entries hold 0.9 to the last bits: either number of entries is right."""
    exact, _, _ = random_targets((1.0,), num_rows=1)
    probs = np.array([[0.6, 0.3 + change * 1e-6, 0.05, 0.03]])
    exact = dataclasses.replace(
        exact,
        ids=exact.ids[:, :4],
        logits=np.log(probs / 0.6).astype(np.float32),
        logsumexps=np.log(np.full((1, 1), 1 / 0.6)).astype(np.float32),
        tail_logprobs=np.log(np.full((1, 1), 0.02)).astype(np.float32),
    )
    for counts in ([2], [3]):
        for others in ([2], [3]):
            found, wanted = cut(exact, np.array(counts)), cut(exact, np.array(others))
            assert difference_of_cuts(found, wanted, 0.9, 1.0).value < 1e-5


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"top_p": 0.0}, r"top_p is 0; it must lie in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p is 1.5; it must lie in \(0, 1\]"),
        ({"top_p": float("nan")}, "top_p is nan; it must lie in"),
        ({"top_p": 0.9, "min_k": 9, "top_k": 8}, "min_k is 9 and top_k 8"),
        ({"top_p": 0.9, "min_k": 0}, "min_k is 0"),
        ({"top_p": 0.9, "top_k": 0, "tail_samples": 4}, "top_p is 0.9 and tail_samples 4"),
        ({"top_p": 0.9, "tail_samples": 4}, "draws come from outside the top k"),
        ({"top_p": 0.9, "top_p_temperature": 3.0}, r"top_p_temperature is 3; choose one of: \[1.0, 2.0\]"),
        ({"min_k": 4}, "min_k is 4, but top_p is not given"),
        ({"top_p_temperature": 1.0}, "top_p_temperature is 1, but top_p is not given"),
    ],
)
def test_what_makes_no_sense_is_one_line(settings, said):
    with pytest.raises(ConfigError, match=said) as refusal:
        TeacherConfig(teacher="t", **settings)
    assert "\n" not in str(refusal.value)


def test_the_mass_counts_at_the_smallest_temperature_unless_told():
    assert TeacherConfig(teacher="t", temperatures=(2.0, 0.5), top_p=0.9).spec.top_p_temperature == 0.5
    assert TeacherConfig(teacher="t", top_p=0.9, top_p_temperature=2.0).spec.top_p_temperature == 2.0
    assert TeacherConfig(teacher="t").spec == TargetSpec(top_k=64, temperatures=(1.0, 2.0), max_kl_error=1e-4)


@pytest.mark.parametrize("max_kl_error", [0.0, 1e-4])
@pytest.mark.parametrize(
    "forged",
    [
        lambda counts: counts * 0,
        lambda counts: counts * 100,
        lambda counts: -counts,
        lambda counts: counts[::-1].copy(),
        lambda counts: counts + np.resize([1, -1], len(counts)).astype(np.int32),
    ],
)
def test_forged_counts_are_refused_and_not_misread(tmp_path, max_kl_error, forged):
    """An archive whose every checksum of chunks holds, with other counts in it than were written."""
    exact, labels, _ = random_targets(TEMPERATURES, num_rows=50)
    targets, spec = cut(exact, random_counts(50, "any")), spec_of(0.9, max_kl_error=max_kl_error)
    shard, layout, _ = written(tmp_path / "sound", "zarr", spec, [(targets, labels)])
    array = shard._arrays["counts"]
    true = array[0:50]
    array._kept.clear()
    array._block = lambda block: forged(true.copy())
    with pytest.raises(CacheCorruptError):
        decode(shard.columns(0, 1), layout, "shard")


@pytest.fixture(scope="module")
def captured_cache(tmp_path_factory, teacher, corpus):
    """By a tiny teacher: mass 0.15 at T=2, where it is flat, 3 entries at least, 16 at most."""
    folder = tmp_path_factory.mktemp("captured") / "cache"
    return captured(folder, teacher, corpus, top_p=0.15, min_k=3, top_p_temperature=2.0, tail_samples=0)


def test_capture_of_a_teacher_against_float64(captured_cache, teacher, corpus):
    cache = open_cache(captured_cache)
    vocab_size, off = cache.manifest.vocab_size, rounding_of_logits(teacher, corpus, cache.manifest.vocab_size)
    assert verify_cache(captured_cache).problems == []
    seen = set()
    for cached, sequence, logit_error in zip(cache, Corpus(corpus).rows(), off, strict=True):
        logits, targets = true_logits(teacher, sequence, vocab_size), cached.targets
        probs = softmax(logits, 2.0)
        held, near = np.cumsum(-np.sort(-probs, axis=1)[:, :16], axis=1), prob_errors(logits, 2.0, logit_error).sum(1)
        expected = np.clip(1 + (held < 0.15).sum(axis=1), 3, 16)
        is_clear = np.abs(held - 0.15).min(axis=1) > near
        np.testing.assert_array_equal(targets.counts[is_clear], expected[is_clear])
        assert is_clear.mean() > 0.9
        seen |= set(targets.counts.tolist())
        is_entry = np.arange(16) < targets.counts[:, None]
        for temperature in (1.0, 2.0):
            exact, errors = (
                of(logits, temperature, *more) for of, more in ((softmax, ()), (prob_errors, (logit_error,)))
            )
            ids = targets.ids.astype(np.int64)
            wanted, allowed = (np.take_along_axis(values, ids, 1) * is_entry for values in (exact, errors))
            assert_within(targets.probs(temperature), wanted, allowed + 1e-3)
            assert_within(targets.tail_mass(temperature), 1 - wanted.sum(1), errors.sum(1) + 1e-3)
    assert len(seen) > 3


def test_audit_of_such_a_cache(tmp_path, captured_cache, teacher):
    config = AuditConfig(cache=captured_cache, teacher=teacher, fraction=1.0)
    assert audit_cache(config).problems == []

    def shortened(index, targets):
        return cut(targets, np.maximum(targets.counts - 4 * (index == 0), 3))

    folder = rewritten(captured_cache, tmp_path / "cache", shortened)
    problems = audit_cache(dataclasses.replace(config, cache=LocalStore(folder))).problems
    assert problems
    assert all("mass at the end of the entries at T=2" in problem and "sequence 0 " in problem for problem in problems)


@pytest.mark.parametrize(
    ("tail", "divergence"),
    [(tail, "forward") for tail in ("ghost", "uniform", "zero", "renormalise")]
    + [("ghost", "reverse"), ("ghost", "js")],
)
def test_loss_of_such_targets_is_that_of_rows_without_places(tail, divergence):
    """One target at a time, with as many columns as it has entries, against all of them side by side."""
    exact, labels, _ = random_targets((2.0,), num_rows=24)
    ragged = cut(exact, random_counts(24, "any"))
    random = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(rows, 16, generator=random, dtype=torch.float64) for rows in (24, VOCAB_SIZE))
    options = {"alpha": 1.0, "temperature": 2.0, "tail": tail, "divergence": divergence, "ignore_index": -100}

    def loss(rows, width):
        some = ragged.take(rows)
        ids, probs = (torch.from_numpy(values[:, :width]) for values in (some.ids, some.probs(2.0)))
        inputs = hidden[rows].clone().requires_grad_()
        given = (torch.from_numpy(labels[rows]).long(), ids.long(), probs, torch.from_numpy(some.tail_mass(2.0)))
        out = fused_distillation_loss(inputs, head, *given, **options)
        out.loss.backward()
        return out.loss.detach(), inputs.grad

    every = np.arange(24)
    value, gradient = loss(every, TOP_K)
    parts = [loss(every[row : row + 1], int(ragged.counts[row])) for row in every]
    torch.testing.assert_close(value, torch.stack([part for part, _ in parts]).mean())
    torch.testing.assert_close(gradient * 24, torch.cat([part for _, part in parts]))


@pytest.mark.parametrize("container", CONTAINERS)
def test_damage_of_every_kind_is_found(caches, container):
    folder = caches[container]
    outcomes = fuzz((folder, read(folder)), 24, seed=1)
    assert outcomes["refused"] > 14


def test_estimate_and_announcement_say_that_they_are_bounds(tmp_path, teacher, corpus):
    settings = tmp_path / "cache.yaml"
    values = {"teacher": str(teacher), "corpus": str(corpus), "out": str(tmp_path / "cache"), "top_k": 16}
    settings.write_text(json.dumps(values | {"engine": "transformers", "top_p": 0.9}))
    code, output, errors = run("estimate", "--cache-logits", settings, "--device", "h100")
    assert code == 0, errors
    assert "if no target reached 0.9 before its top k: less" in output
    code, _, errors = run("cache-logits", "--config", settings)
    assert code == 0, errors
    assert "takes at most" in errors


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p_temperature": 7.0}, "top_p_temperature is none of the temperatures"),
        ({"min_k": 9}, "min_k must lie between 1 and top_k"),
        ({"min_k": None}, "min_k must lie between 1 and top_k"),
        ({"tail_samples": 2, "draw_temperature": 1.0}, "top_p leaves no draws"),
        ({"top_p": None}, "without top_p there is no min_k"),
        ({"format_version": 2}, "format_version is 2, but what it declares is of 3"),
    ],
)
def test_manifest_that_contradicts_itself_is_refused(tmp_path, caches, changes, said):
    document = {**json.loads((caches["zarr"] / "manifest.json").read_bytes()), **changes}
    del document["checksum"]
    write_json(store_of(tmp_path) / "manifest.json", document)
    with pytest.raises(CacheCorruptError, match=said):
        CacheManifest.read(tmp_path)


@pytest.mark.parametrize("container", CONTAINERS)
def test_threads_make_the_same_shards(tmp_path, caches, container):
    corpus, settings = caches[container].parent / "corpus", {"container": container, "top_p": 0.9, "min_k": 2}
    folder = make_cache(tmp_path / "cache", corpus, encoding_threads=3, **settings)
    ours, theirs = (open_cache(each).commits for each in (folder, caches[container]))
    assert [commit.xxh3_128 for commit in ours] == [commit.xxh3_128 for commit in theirs]


def test_reuse_copies_rows_as_they_are_and_only_of_the_same_cut(tmp_path, captured_cache, teacher, corpus):
    settings = {"tail_samples": 0, "top_p": 0.15, "min_k": 3, "top_p_temperature": 2.0, "format": "zarr"}
    reuse = (LocalStore(captured_cache),)
    folder = captured(tmp_path / "cache", teacher, corpus, reuse=reuse, **settings)
    for ours, theirs in zip(open_cache(folder), open_cache(captured_cache), strict=True):
        assert checksum_of(vars(ours.targets)) == checksum_of(vars(theirs.targets))
    for changes, reason in (
        ({"top_p": 0.2}, "top_p is 0.15, now 0.2"),
        ({"min_k": 1}, "min_k is 3, now 1"),
        ({"top_p_temperature": 1.0}, "top_p_temperature is 2.0, now 1.0"),
        ({"top_p": None, "min_k": None, "top_p_temperature": None}, "top_p is 0.15, now None"),
    ):
        with pytest.raises(CacheMismatchError, match=reason):
            captured(tmp_path / "other", teacher, corpus, reuse=reuse, **settings | changes)


def test_repair_drops_the_damaged_shard_alone(tmp_path, caches):
    folder = tmp_path / "cache"
    shutil.copytree(caches["zarr"], folder)
    path = sorted((folder / SHARDS).iterdir())[0]
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    assert run("verify", folder, "--repair")[0] == 0
    assert run("verify", folder)[0] == 1
    make_cache(folder, caches["zarr"].parent / "corpus", container="zarr", top_p=0.9, min_k=2)
    assert run("verify", folder)[0] == 0
    for ours, theirs in zip(open_cache(folder), open_cache(caches["zarr"]), strict=True):
        assert checksum_of(vars(ours.targets)) == checksum_of(vars(theirs.targets))
