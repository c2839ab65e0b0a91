"""`pipeline select`: measures against a float64 oracle, exact counts, and views in the place of caches."""

import dataclasses
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline import open_cache
from pipeline.cache.manifest import TOKENIZER
from pipeline.cache.reader import PartialCache
from pipeline.cache.verify import verify_cache
from pipeline.cache.view import read_view, write_view
from pipeline.corpus import Corpus
from pipeline.errors import CacheCorruptError, CacheMismatchError, ConfigError, PipelineError
from pipeline.lifecycle.convert import convert_cache
from pipeline.lifecycle.export import export_cache
from pipeline.lifecycle.merge import merge_caches
from pipeline.lifecycle.settings import ConvertConfig, ExportConfig, MergeConfig
from pipeline.selection.run import select
from pipeline.selection.settings import MEASURES, Band, SelectConfig
from pipeline.stores.places import store_of
from stages.train_student.losses import student_losses
from stages.train_student.run import train_student
from stages.train_student.settings import TrainConfig
from tests.support.helpers import run
from tests.support.small import llama_config, make_cache, make_corpus, random_sequences

SURE = 0.3


SETTINGS = {
    "": {},
    "lossless": {"max_kl_error": 0.0},
    "top_p": {"top_p": 0.6, "top_p_temperature": 1.0, "min_k": 2},
    "lossless_top_p": {"max_kl_error": 0.0, "top_p": 0.6, "top_p_temperature": 1.0, "min_k": 1},
}


@pytest.fixture(scope="module", params=[f"{c}-{kind}" for c in ("arrow", "zarr") for kind in [*SETTINGS, "sketched"]])
def folder(request, tmp_path_factory, corpus):
    container, _, kind = request.param.partition("-")
    if kind == "sketched":
        return request.getfixturevalue("sketched")[container].out
    return make_cache(tmp_path_factory.mktemp("cache"), corpus, container=container, **SETTINGS[kind])


@pytest.fixture(scope="module")
def arrow(tmp_path_factory, corpus):
    return make_cache(tmp_path_factory.mktemp("cache"), corpus)


@pytest.fixture(scope="module")
def student(tmp_path_factory, arrow):
    folder = tmp_path_factory.mktemp("student")
    torch.manual_seed(1)
    vocab_size = open_cache(arrow).manifest.vocab_size
    AutoModelForCausalLM.from_config(llama_config(vocab_size, num_hidden_layers=1)).save_pretrained(folder)
    shutil.copytree(arrow / TOKENIZER, folder, dirs_exist_ok=True)
    return folder


def config(cache, out, **changes):
    return SelectConfig(cache=cache, out=out, **changes)


def oracle(cache, by, temperature):
    """(sequence, document) of every unit, the number of its targets and its measures, in plain float64."""
    found = []
    for index, sequence in enumerate(cache):
        targets = sequence.targets
        top = np.exp(targets.logprobs(temperature)[:, 0])
        rows = {
            "label-logprob": targets.label_logprobs(temperature).astype(np.float64),
            "entropy": targets.entropy(temperature).astype(np.float64),
            "tail-mass": targets.tail_mass(temperature).astype(np.float64),
            "sure": (top >= np.float32(SURE)).astype(np.float64),
        }
        documents = np.repeat(np.arange(len(sequence.document_lengths)), sequence.document_lengths)
        of_label = documents[sequence.target_positions + 1]
        for document in range(len(sequence.document_lengths)) if by == "document" else [None]:
            inside = np.ones(len(targets), bool) if document is None else of_label == document
            means = {name: values[inside].mean() if inside.any() else np.nan for name, values in rows.items()}
            means["perplexity"] = np.exp(-means["label-logprob"])
            means["targets"] = inside.sum() if inside.any() else np.nan
            found.append(((index, document), int(inside.sum()), means))
    return found


def selected(view, by):
    """The units of a view, as the oracle names them."""
    units = []
    for at, row in enumerate(view.selected.rows.tolist()):
        kept = view.selected.documents_of(at)
        if by == "sequence":
            units.append((row, None))
        else:
            count = len(view.base[row].document_lengths)
            units += [(row, document) for document in range(count) if kept is None or kept[document]]
    return units


@pytest.mark.parametrize("by", ["sequence", "document"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("measure", sorted(set(MEASURES) - {"learnability"}))
def test_measures_are_those_of_a_float64_oracle(folder, tmp_path, by, temperature, measure):
    """Between two units of the oracle's order, and in its quantiles: the same units, the same targets."""
    cache, out = open_cache(folder), tmp_path / "view.json"
    units = oracle(cache, by, temperature)
    values = np.array([means[measure] for _, _, means in units])
    known = np.sort(values[~np.isnan(values)])
    low, high = known[len(known) // 5] - 1e-7, known[4 * len(known) // 5] + 1e-7
    how = {"by": by, "temperature": temperature, "sure": SURE}
    select(config(folder, out, where=(f"{measure}={low:.17g}:{high:.17g}",), **how))
    wanted = {name: count for (name, count, _), value in zip(units, values) if low <= value <= high}
    view, counts = open_cache(out), {name: count for name, count, _ in units}
    found = [unit for unit in selected(view, by) if counts[unit]]
    assert found == list(wanted)
    assert view.manifest.num_targets == sum(wanted.values()) == sum(len(sequence.targets) for sequence in view)
    assert view.manifest.num_tokens == sum(len(sequence.token_ids) for sequence in view)
    assert 0 < len(found) < len(known) or measure in ("sure", "targets")


@pytest.mark.parametrize("by", ["sequence", "document"])
def test_counts_of_shares_numbers_and_quantiles_are_exact(arrow, tmp_path, by):
    cache, out = open_cache(arrow), tmp_path / "view.json"
    units = [(name, means["entropy"]) for name, count, means in oracle(cache, by, 1.0) if count]
    order = [name for name, _ in sorted(units, key=lambda unit: unit[1])]
    for share in (0.2, 0.333, 1e-9, 0.999):
        select(config(arrow, out, by=by, keep=share, order="largest:entropy"))
        count = max(1, round(share * len(units)))
        assert set(order[-count:]) <= set(selected(open_cache(out), by))
        assert read_view(store_of(out)).num_targets == sum(len(sequence.targets) for sequence in open_cache(out))
    select(config(arrow, out, by=by, keep=7, order="smallest:entropy", where=("entropy=50%:",)))
    expected = order[round(0.5 * len(units)) :][:7]
    assert [unit for unit in selected(open_cache(out), by) if unit in dict(units)] == sorted(expected)
    with pytest.raises(ConfigError, match=r"keep is 9,999; only \d+ "):
        select(config(arrow, out, by=by, keep=9999))


@pytest.mark.parametrize("by", ["sequence", "document"])
def test_a_random_share_depends_on_the_seed_and_not_on_the_shards(arrow, tmp_path, by):
    """Another container and other partitions hold the same sequences: the same are drawn."""
    merged, zarr = tmp_path / "merged", tmp_path / "zarr"
    convert_cache(ConvertConfig(cache=arrow, format="zarr", out=zarr, workers=1))
    outs = []
    for cache, seed in ((arrow, 0), (zarr, 0), (arrow, 1)):
        out = tmp_path / f"{len(outs)}.json"
        select(config(cache, out, by=by, keep=0.25, seed=seed))
        outs.append([(sequence.key, len(sequence.targets)) for sequence in open_cache(out)])
    assert outs[0] == outs[1] != outs[2]
    assert not merged.exists()


def masked(sequence, kept):
    """The positions of a sequence's targets in the kept documents."""
    documents = np.repeat(np.arange(len(sequence.document_lengths)), sequence.document_lengths)
    return np.flatnonzero(np.isin(documents[sequence.target_positions + 1], np.flatnonzero(kept)))


def test_labels_of_other_documents_are_off_and_nothing_else_changes(folder, tmp_path):
    cache, out = open_cache(folder), tmp_path / "view.json"
    select(config(folder, out, by="document", keep=0.4, seed=3))
    view = open_cache(out)
    assert view.selected.documents is not None
    for index, sequence in enumerate(view):
        whole, kept = cache[int(view.selected.rows[index])], view.selected.documents_of(index)
        rows = masked(whole, kept)
        np.testing.assert_array_equal(sequence.token_ids, whole.token_ids)
        np.testing.assert_array_equal(sequence.target_positions, whole.target_positions[rows])
        np.testing.assert_array_equal(sequence.targets.ids, whole.targets.ids[rows])
        np.testing.assert_array_equal(sequence.targets.logsumexps, whole.targets.logsumexps[rows])
        np.testing.assert_array_equal(sequence.targets.label_logits, whole.targets.label_logits[rows])
        assert (sequence.key == whole.key) == (len(rows) == len(whole.targets))


@pytest.mark.parametrize("by", ["sequence", "document"])
def test_merge_and_export_take_a_view(folder, tmp_path, by):
    """What they write is what the view reads, sequence by sequence; the merged cache is sound."""
    out = tmp_path / "view.json"
    select(config(folder, out, by=by, keep=0.3))
    view = open_cache(out)
    merge_caches(MergeConfig(caches=(out,), out=tmp_path / "merged", workers=1))
    merged = open_cache(tmp_path / "merged")
    assert verify_cache(tmp_path / "merged").problems == []
    assert merged.manifest.num_targets == view.manifest.num_targets
    for ours, theirs in zip(merged, view, strict=True):
        assert ours.key == theirs.key
        for name in ("ids", "logits", "tail_logprobs", "entropies", "label_logits"):
            np.testing.assert_array_equal(getattr(ours.targets, name), getattr(theirs.targets, name))
    export_cache(ExportConfig(cache=out, out=tmp_path / "exported", temperature=2.0, workers=1))
    rows = [
        row for path in sorted((tmp_path / "exported").glob("*.parquet")) for row in pq.read_table(path).to_pylist()
    ]
    assert [row["target_positions"] for row in rows] == [sequence.target_positions.tolist() for sequence in view]
    for row, sequence in zip(rows, view, strict=True):
        logprobs = sequence.targets.logprobs(2.0)
        assert [len(entries) for entries in row["target_logprobs"]] == np.isfinite(logprobs).sum(1).tolist()
        found = np.concatenate([np.float32(entries) for entries in row["target_logprobs"]])
        np.testing.assert_array_equal(found, logprobs[np.isfinite(logprobs)])


def test_a_view_of_a_cache_is_merged_with_another_cache_once(arrow, tmp_path):
    out = tmp_path / "view.json"
    select(config(arrow, out, keep=10))
    merge_caches(MergeConfig(caches=(out, arrow), out=tmp_path / "merged", workers=1))
    assert sorted(sequence.key for sequence in open_cache(tmp_path / "merged")) == sorted(
        sequence.key for sequence in open_cache(arrow)
    )


def test_a_view_is_selected_from_again(arrow, tmp_path):
    """Half of the documents, then a third of the sequences: masks stay."""
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    select(config(arrow, first, by="document", keep=0.5))
    select(config(first, second, keep=0.34, order="largest:entropy"))
    before = {sequence.key: len(sequence.targets) for sequence in open_cache(first)}
    after = {sequence.key: len(sequence.targets) for sequence in open_cache(second)}
    assert len(after) == round(0.34 * len(before))
    assert after.items() <= before.items()
    means = {sequence.key: sequence.targets.entropy(1.0).mean(dtype=np.float64) for sequence in open_cache(first)}
    assert min(means[key] for key in after) >= max(mean for key, mean in means.items() if key not in after)
    assert read_view(store_of(second)).rule["of"]["by"] == "document"
    third = tmp_path / "third.json"
    select(config(second, third, by="document", keep=3))
    assert sum(len(sequence.targets) for sequence in open_cache(third)) == read_view(store_of(third)).num_targets


def test_learnability_is_the_students_loss_less_the_teachers(arrow, tmp_path, student):
    """Against a dense float64 model, document by document."""
    cache, out = open_cache(arrow), tmp_path / "view.json"
    model = AutoModelForCausalLM.from_pretrained(student, dtype="float64")
    expected = []
    for sequence in cache:
        start, logprobs = 0, []
        for length in sequence.document_lengths:
            ids = torch.tensor(sequence.token_ids[start : start + length].astype(np.int64))[None]
            with torch.no_grad():
                logprobs.append(torch.log_softmax(model(ids).logits[0], 1))
            start += length
        labels = torch.tensor(sequence.token_ids[sequence.target_positions + 1].astype(np.int64))
        own = -torch.cat(logprobs)[sequence.target_positions].gather(1, labels[:, None]).squeeze(1).numpy()
        teacher = -sequence.targets.label_logprobs(1.0).astype(np.float64)
        expected.append(own.mean() - teacher.mean())
    order = np.argsort(-np.array(expected), kind="stable")
    how = {"student": student, "batch_size": 3, "temperature": 2.0}
    select(config(arrow, out, keep=9, order="largest:learnability", **how), None, student_losses)
    assert sorted(order[:9].tolist()) == open_cache(out).selected.rows.tolist()
    low, high = (expected[order[at]] for at in (20, 10))
    select(
        config(arrow, out, where=(f"learnability={low - 1e-5:.17g}:{high + 1e-5:.17g}",), **how), None, student_losses
    )
    assert sorted(order[10:21].tolist()) == open_cache(out).selected.rows.tolist()


def trained(cache, out, tmp_path, **changes):
    vocab_size = open_cache(cache).manifest.vocab_size
    llama_config(vocab_size, num_hidden_layers=1, initializer_range=0.02).save_pretrained(tmp_path / "config")
    values = {"max_steps": 4, "batch_size": 4, "log_steps": 1, "learning_rate": 1e-2, "gradient_accumulation": 1}
    settings = TrainConfig(student=tmp_path / "config" / "config.json", cache=cache, out=out, **values | changes)
    metrics = train_student(settings)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(entry["loss"], entry["grad_norm"]) for entry in log if "loss" in entry], metrics


def test_training_on_a_view_is_training_on_a_cache_of_what_it_selects(arrow, tmp_path):
    """To the bit; and the run knows its view: another one is refused."""
    out = tmp_path / "view.json"
    select(config(arrow, out, by="document", keep=0.4))
    merge_caches(MergeConfig(caches=(out,), out=tmp_path / "merged", workers=1))
    losses, metrics = trained(out, tmp_path / "on-view", tmp_path, eval_cache=out)
    expected, others = trained(tmp_path / "merged", tmp_path / "on-merged", tmp_path, eval_cache=tmp_path / "merged")
    assert losses == expected
    assert {**metrics, "train_seconds": 0} == {**others, "train_seconds": 0}
    select(config(arrow, out, by="document", keep=0.4, seed=9))
    with pytest.raises(ConfigError, match=r"holds a run with other settings: .*corpus"):
        trained(out, tmp_path / "on-view", tmp_path, eval_cache=out)


def test_a_cache_may_move_with_its_view_or_be_converted(arrow, tmp_path):
    here = tmp_path / "here"
    shutil.copytree(arrow, here / "cache")
    select(config(here / "cache", here / "view.json", keep=5))
    keys = [sequence.key for sequence in open_cache(here / "view.json")]
    here.rename(tmp_path / "there")
    assert [sequence.key for sequence in open_cache(tmp_path / "there" / "view.json")] == keys
    (tmp_path / "there" / "cache").rename(tmp_path / "old")
    convert_cache(ConvertConfig(cache=tmp_path / "old", format="zarr", out=tmp_path / "there" / "cache", workers=1))
    assert [sequence.key for sequence in open_cache(tmp_path / "there" / "view.json")] == keys
    assert read_view(store_of(tmp_path / "there" / "view.json")).cache == "cache"


def test_a_view_whose_cache_is_gone_or_another_is_refused_in_a_line(arrow, tmp_path, corpus):
    shutil.copytree(arrow, tmp_path / "cache")
    out = tmp_path / "view.json"
    select(config(tmp_path / "cache", out, keep=5))
    shutil.rmtree(tmp_path / "cache")
    code, _, errors = run("inspect", out)
    assert code == 2
    assert "view.json: selects from a cache that is not there, or not finished: " in errors
    other = make_corpus(tmp_path / "corpus", random_sequences(40, vocab_size=300, seed=7))
    make_cache(tmp_path / "cache", other)
    with pytest.raises(CacheMismatchError, match=r"holds another cache now; select again"):
        open_cache(out)
    assert len(list(Corpus(corpus).rows())) == 40


def test_a_damaged_or_forged_view_is_refused(arrow, tmp_path):
    out = tmp_path / "view.json"
    select(config(arrow, out, by="document", keep=0.3))
    contents = out.read_bytes()
    out.write_bytes(contents.replace(b'"num_targets": ', b'"num_targets": 1'))
    with pytest.raises(CacheCorruptError, match="checksum does not match"):
        open_cache(out)
    view = read_view_of(contents, out)
    for changes in (
        {"num_sequences": view.num_sequences + 1},
        {"rows": view.rows[:-8]},
        {"keys": "!"},
        {"documents": "AA=="},
        {"document_counts": view.rows},
    ):
        write_forged(out, view, changes)
        with pytest.raises(PipelineError, match=r"view\.json: "):
            open_cache(out)
    swapped = dataclasses.replace(view, keys=view.keys[24:] + view.keys[:24])
    write_forged(out, swapped, {})
    with pytest.raises(PipelineError, match="selected; select again"):
        list(open_cache(out))
    with pytest.raises(CacheMismatchError, match="select again"):
        merge_caches(MergeConfig(caches=(out,), out=tmp_path / "merged", workers=1))


def read_view_of(contents, out):
    out.write_bytes(contents)
    return read_view(store_of(out))


def write_forged(out, view, changes):
    write_view(store_of(out), store_of(view.cache), dataclasses.replace(view, **changes))


def test_inspect_reads_a_view(arrow, tmp_path):
    out = tmp_path / "view.json"
    select(config(arrow, out, by="document", keep=0.3))
    view = open_cache(out)
    code, text, _ = run("inspect", out)
    assert code == 0
    assert f"{view.manifest.num_targets:,} targets" in text
    assert "by document, keep 0.3" in text
    code, text, _ = run("inspect", out, "--sequence", 1)
    assert code == 0
    assert view[1].key.hex() in text
    code, text, _ = run("inspect", out, "--worst", 2, "--sample", "all", "--html", tmp_path / "page.html")
    assert code == 0
    assert f"all {len(view)} sequences" in text
    key = view.selected.keys[2].tobytes().hex()
    assert "sequence 2 of" in run("inspect", out, "--sequence", key)[1]
    assert run("inspect", out, "--sequence", "0" * 32)[0] == 2
    assert PartialCache(arrow).find(view.base[3].key) == 3


@pytest.mark.parametrize(
    "text",
    ["entropy", "entropy=", "entropy=2", "entropy=3:2", "entropy=a:", "wit=1:2", "entropy=10%:2", "entropy=:101%"],
)
def test_a_range_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match="expected MEASURE=LOW:HIGH"):
        Band.parse(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "neither --where nor --keep"),
        ({"keep": 1.5}, "keep is 1.5; expected a share below 1 or a whole number"),
        ({"keep": -1}, "keep is -1"),
        ({"keep": 0.5, "order": "best"}, "order is 'best'"),
        ({"where": ("entropy=1:",), "order": "largest:entropy"}, "without keep"),
        ({"keep": 3, "order": "largest:learnability"}, "give --student"),
        ({"keep": 3, "sure": 0.0}, "sure is 0.0"),
        ({"keep": 3, "out": "view"}, "the name of a view ends in .json"),
        ({"where": ("entropy=1e9:",)}, r"no sequence of .* fits entropy=1e9:; nothing is selected"),
        ({"keep": 3, "temperature": 3.0}, "temperature 3 was not captured"),
    ],
)
def test_mistakes_are_one_line(arrow, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        select(config(**{"cache": arrow, "out": tmp_path / "view.json"} | changes))


def test_commands_that_take_no_view_say_so(arrow, tmp_path):
    out = tmp_path / "view.json"
    select(config(arrow, out, keep=5))
    code, _, errors = run("convert", out, "--format", "zarr", "--out", tmp_path / "zarr")
    assert code == 2
    assert "a view; this command takes the cache itself" in errors
    assert run("inspect", tmp_path / "none.json")[0] == 2
    assert run("select", arrow, "--out", tmp_path / "v.json", "--keep", "0.2", "--order", "random")[0] == 0


def test_damage_in_what_is_measured_is_noticed(folder, tmp_path):
    """A byte of the stored entropies: read alone, they are checked as well."""
    shutil.copytree(folder, tmp_path / "cache")
    cache = open_cache(tmp_path / "cache")
    stored, shard = cache.opened(2)
    first, last = (
        shard._arrays["nats" if "nats" in shard._arrays else "entropies"].extents[0]
        if cache.manifest.container == "zarr"
        else shard.checked_ranges()[-3]
    )
    path = stored.file()
    contents = bytearray(path.read_bytes())
    contents[(first + last) // 2] ^= 1
    path.write_bytes(contents)
    with pytest.raises(CacheCorruptError, match="checksum"):
        select(config(tmp_path / "cache", tmp_path / "view.json", keep=5, order="largest:entropy"))


def test_caches_and_views_may_lie_in_an_object_store(url, corpus, tmp_path):
    """A view in the store beside its cache, and one on this machine."""
    make_cache(url, corpus, container="zarr")
    keys = []
    for out in (url.parent / "view.json", tmp_path / "view.json"):
        select(config(url, out, keep=7, order="smallest:entropy"))
        keys.append([sequence.key for sequence in open_cache(str(out))])
        assert read_view(store_of(out)).cache == str(url)
        assert run("inspect", out)[0] == 0
    assert keys[0] == keys[1]
    assert len(keys[0]) == 7
