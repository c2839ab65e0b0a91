"""An audit agrees with what the teacher says, and names what it does not say."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline import open_cache
from pipeline.cache.commits import SHARDS, commit_path, read_commit
from pipeline.cache.folder import CacheFolder
from pipeline.cache.manifest import MANIFEST, CacheManifest
from pipeline.cache.verify import verify_cache
from pipeline.corpus import Corpus
from pipeline.errors import CacheCorruptError, CacheMismatchError
from pipeline.formats.containers import CONTAINERS
from pipeline.formats.layout import encode
from pipeline.stores.sealed import read_json, write_json
from pipeline.targets import SparseTargets
from stages.cache_logits.audit import audit_cache, sample, token_sequence
from stages.cache_logits.comparison import differences
from stages.cache_logits.fake_engine import fake_targets
from stages.cache_logits.run import cache_logits
from stages.cache_logits.settings import AuditConfig, CacheConfig
from stages.cache_logits.teacher import hash_weights
from tests.support.helpers import run
from tests.support.rounding import UNIT, prob_errors
from tests.support.small import make_teacher, rounding_of_logits, true_logits


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory, teacher, corpus):
    return captured(tmp_path_factory.mktemp("audit") / "cache", teacher, corpus)


def captured(out: Path, teacher: Path, corpus: Path, **changes: object) -> Path:
    settings = {"top_k": 16, "engine": "transformers", "shard_tokens": 500, "batch_tokens": 128, "tail_samples": 2}
    cache_logits(CacheConfig(teacher=teacher, corpus=corpus, out=out, **settings | changes))
    return out


def rewritten(source: Path, folder: Path, change) -> Path:
    """A copy of a cache whose first partition went through `change(sequence, targets)`; `verify` finds it sound."""
    shutil.copytree(source, folder)
    cache, new = open_cache(source), CacheFolder(folder)
    stored = cache.shard(0)
    commit_path(new.folder, 0).unlink()
    (new.folder / SHARDS / stored.commit.file).unlink()
    with new.new_shard(0) as partial:
        writer = CONTAINERS[stored.container].create(partial, stored.layout)
        for index in range(stored.num_sequences):
            sequence = token_sequence(cache[index])
            writer.append(encode(stored.layout, sequence, change(index, cache[index].targets)))
        writer.close()
        new.commit(0, partial, stored.layout.counts, stored.commit.statistics)
    assert verify_cache(folder).problems == []
    return folder


def audit(cache: Path, teacher: Path, **changes: object):
    return audit_cache(AuditConfig(cache=cache, teacher=teacher, **{"fraction": 1.0} | changes))


@pytest.mark.parametrize(("max_kl_error", "container"), [(1e-4, "arrow"), (0.0, "zarr")])
def test_teacher_agrees_with_its_own_cache(tmp_path, teacher, corpus, max_kl_error, container):
    folder = captured(tmp_path / "cache", teacher, corpus, max_kl_error=max_kl_error, format=container)
    report = audit(folder, teacher, batch_tokens=300)
    assert report.problems == []
    assert report.num_sequences == 40
    assert report.num_targets == CacheManifest.read(folder).num_targets
    vocab_size = CacheManifest.read(folder).vocab_size
    arithmetic = 0.0  # of two runs in batches of other sizes
    for sequence, off in zip(Corpus(corpus).rows(), rounding_of_logits(teacher, corpus, vocab_size), strict=True):
        logits = true_logits(teacher, sequence, vocab_size)
        arithmetic = max(arithmetic, *(2 * prob_errors(logits, temperature, off).max() for temperature in (1.0, 2.0)))
    assert report.rounding_error <= (1e-3 + arithmetic if max_kl_error else 0.0)
    assert report.largest <= report.rounding_error + arithmetic


def test_sample_is_seeded_and_never_empty():
    np.testing.assert_array_equal(sample(10**7, 1e-6, 8, 0), sample(10**7, 1e-6, 8, 0))
    assert len(sample(10**7, 1e-6, 8, 0)) == 10
    assert len(set(sample(10**7, 0.0, 8, 0)) & set(sample(10**7, 0.0, 8, 1))) == 0
    np.testing.assert_array_equal(sample(5, 0.0, 8, 3), np.arange(5))


def shifted(index: int, targets: SparseTargets) -> SparseTargets:
    """The field's most common bug: every target one position late."""
    columns = {name: np.roll(getattr(targets, name), 1, axis=0) for name in ("ids", "logits", "label_logits", "draws")}
    columns |= {
        name: np.roll(getattr(targets, name), 1, axis=0) for name in ("logsumexps", "tail_logprobs", "entropies")
    }
    return dataclasses.replace(targets, **columns)


def wrong_label(index: int, targets: SparseTargets) -> SparseTargets:
    """The label's logit of the token before."""
    return dataclasses.replace(targets, label_logits=np.roll(targets.label_logits, 1))


def sharpened(index: int, targets: SparseTargets) -> SparseTargets:
    """A T that is not what it says: all logits 5% too large, sums and tails to match."""
    logits = targets.logits * np.float32(1.05)
    lse = np.stack([np.log(np.exp(logits / T).sum(1) / (1 - targets.tail_mass(T))) for T in targets.temperatures], 1)
    return dataclasses.replace(targets, logits=logits, logsumexps=lse.astype(np.float32))


def one_wrong_entry(index: int, targets: SparseTargets) -> SparseTargets:
    """Two ids of one position exchanged, in one sequence."""
    ids = targets.ids.copy()
    if index == 3:
        ids[1, :2] = ids[1, 1::-1]
    return dataclasses.replace(targets, ids=ids)


@pytest.mark.parametrize(
    ("change", "quantity"),
    [
        (shifted, "p of a stored id"),
        (wrong_label, "p of the label"),
        (sharpened, "p of a stored id"),
        (one_wrong_entry, "p of a stored id"),
    ],
)
def test_what_the_teacher_does_not_say_is_named(tmp_path, cache_folder, teacher, change, quantity):
    folder = rewritten(cache_folder, tmp_path / "cache", change)
    report = audit(folder, teacher)
    assert any(quantity in problem for problem in report.problems)
    num_changed = read_commit(folder, 0).num_sequences
    named = {int(problem.split("sequence ")[1].split(" ")[0]) for problem in report.problems}
    assert named == {3} if change is one_wrong_entry else named <= set(range(num_changed))
    assert len(named) >= (1 if change is one_wrong_entry else num_changed - 1)


def test_another_teacher_is_refused_before_it_is_loaded(tmp_path, cache_folder, teacher, corpus):
    other = make_teacher(tmp_path / "other", seed=1)
    with pytest.raises(CacheMismatchError, match=r"is not the teacher that made .*: weights is \w+, now \w+"):
        audit(cache_folder, other)
    changed = shutil.copytree(teacher, tmp_path / "changed")
    config = json.loads((changed / "config.json").read_text()) | {"rope_theta": 1234.0}
    (changed / "config.json").write_text(json.dumps(config))
    with pytest.raises(CacheMismatchError, match=r"config is \w+, now \w+"):
        audit(cache_folder, changed)


def test_another_teacher_that_claims_to_be_the_one_is_found_out(tmp_path, cache_folder, teacher):
    """A manifest that was made to name it: the numbers tell."""
    other = make_teacher(tmp_path / "other", seed=1)
    folder = shutil.copytree(cache_folder, tmp_path / "cache")

    document = read_json(folder / MANIFEST, CacheCorruptError)
    document["teacher"]["weights"] = hash_weights(other)
    (folder / MANIFEST).unlink()
    write_json(folder / MANIFEST, document)
    report = audit(folder, other, fraction=0.0)
    assert report.num_sequences == 8
    assert len({problem.split("(")[1][:32] for problem in report.problems}) == 8


def test_bfloat16_teacher_agrees_within_its_noise(tmp_path, teacher, corpus):
    """Another batch size, which sums in another order."""
    folder = captured(tmp_path / "cache", teacher, corpus, dtype="bfloat16", batch_tokens=96)
    report = audit(folder, teacher, batch_tokens=1000)
    assert report.problems == []
    assert report.noise == 0.1


@pytest.mark.vllm
@pytest.mark.slow
def test_the_other_engine_agrees_in_bfloat16(tmp_path, teacher, corpus):
    folder = captured(tmp_path / "cache", teacher, corpus, dtype="bfloat16")
    command = [
        "audit",
        str(folder),
        "--teacher",
        str(teacher),
        "--engine",
        "vllm",
        "--fraction",
        "1",
        "--enforce-eager",
    ]
    done = subprocess.run([sys.executable, "-m", "pipeline.cli", *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the teacher agrees" in done.stdout


def test_command_exits_1_and_names_the_sequences(tmp_path, cache_folder, teacher):
    code, out, _ = run("audit", cache_folder, "--teacher", teacher)
    assert code == 0
    assert "the teacher agrees: 8 sequences" in out
    folder = rewritten(cache_folder, tmp_path / "cache", shifted)
    code, out, _ = run("audit", folder, "--teacher", teacher, "--fraction", 1)
    assert code == 1
    assert "sequence 0 (" in out
    assert "disagreements: 40 sequences" in out
    code, _, err = run("audit", cache_folder, "--teacher", teacher, "--fraction", 2)
    assert code == 2
    assert "fraction is 2.0; it must lie in [0, 1]" in err


def test_differences_are_those_of_the_probabilities(corpus):
    """Ids in another order, and ids that only one side has."""
    found = fake_targets(*np.array([[5, 6], [7, 8]], np.int32), 4, (1.0,), 50)
    assert all(difference.value == 0 for difference in differences(found, found, 1.0))
    order = np.array([1, 0, 3, 2])
    wanted = dataclasses.replace(found, ids=found.ids[:, order], logits=found.logits[:, order])
    assert differences(found, wanted, 1.0)[0].value == 0
    ids = found.ids.copy()
    ids[1, 3] = 49
    missing = dataclasses.replace(found, ids=ids)
    assert differences(found, missing, 1.0)[0].value == 0  # below the smallest kept: the teacher may have said so
    ids[1, 0] = 48
    found_it = differences(found, dataclasses.replace(found, ids=ids), 1.0)[0]
    assert found_it.position == 1
    expected = found.probs(1.0)[1, 0] - found.probs(1.0)[1, 3]
    assert abs(found_it.value - expected) <= UNIT  # a difference of float32 probabilities


def test_audit_needs_no_corpus(tmp_path, teacher, corpus):
    moved = shutil.copytree(corpus, tmp_path / "corpus")
    folder = captured(tmp_path / "cache", teacher, moved)
    shutil.rmtree(moved)
    assert len(Corpus(corpus)) == 40
    assert audit(folder, teacher, fraction=0.0).problems == []
