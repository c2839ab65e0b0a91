"""Exports hold what the cache holds, in the columns that the readers named in docs/export.md expect."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline import open_cache
from pipeline.cache.commits import SHARDS, commit_path
from pipeline.errors import CacheCorruptError, CacheIncompleteError, CacheMismatchError, ConfigError
from pipeline.lifecycle.export import export_cache
from pipeline.lifecycle.settings import ExportConfig
from tests.support.helpers import run
from tests.support.oracle import assert_within
from tests.support.rounding import total_errors
from tests.support.small import make_cache


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory, corpus):
    return make_cache(tmp_path_factory.mktemp("export") / "cache", corpus, max_kl_error=0.0, tail_samples=3)


def exported(cache: Path, out: Path, **settings: object) -> list[dict]:
    """The rows of an export, as Python lists."""
    export_cache(ExportConfig(cache=cache, out=out, workers=1, **settings))
    return [row for path in sorted(out.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_plain_rows_are_the_cache_s_sequences(tmp_path, cache_folder, temperature):
    rows = exported(cache_folder, tmp_path / "out", temperature=temperature)
    for row, sequence in zip(rows, open_cache(cache_folder), strict=True):
        np.testing.assert_array_equal(row["input_ids"], sequence.token_ids)
        np.testing.assert_array_equal(row["loss_mask"], sequence.loss_mask)
        np.testing.assert_array_equal(row["document_lengths"], sequence.document_lengths)
        np.testing.assert_array_equal(row["target_positions"], sequence.target_positions)
        np.testing.assert_array_equal(row["target_ids"], sequence.targets.ids)
        np.testing.assert_array_equal(row["target_logprobs"], sequence.targets.logprobs(temperature))
        np.testing.assert_array_equal(row["tail_mass"], sequence.targets.tail_mass(temperature))
        probs = np.exp(row["target_logprobs"])
        assert_within(probs.sum(1) + row["tail_mass"], 1.0, total_errors(probs, row["tail_mass"]))


def peer_loss(row: dict, logits_SV: np.ndarray) -> tuple[float, float]:
    """Sums of KL on the listed entries and of cross-entropy, as a trainer has them that shifts the labels alone."""
    logprobs_SV = logits_SV - np.log(np.exp(logits_SV).sum(1, keepdims=True))
    valid = np.array(row["target_mask"], bool)
    teacher = np.array(row["target_logprobs"])[valid]
    student = np.take_along_axis(logprobs_SV, np.array(row["target_token_ids"]), 1)[valid]
    labels = np.array([*row["labels"][1:], -100])
    kept = labels != -100
    return float((np.exp(teacher) * (teacher - student)).sum()), float(-logprobs_SV[kept, labels[kept]].sum())


def test_axolotl_rows_give_its_loss_the_right_targets(tmp_path, cache_folder):
    """Hidden state i meets the distribution and the label of token i + 1, document by document."""
    rows = exported(cache_folder, tmp_path / "out", layout="axolotl", temperature=1.0)
    cache = open_cache(cache_folder)
    random = np.random.default_rng(0)
    remaining = iter(rows)
    for sequence in cache:
        logits = random.normal(size=(len(sequence.token_ids), cache.manifest.vocab_size))
        logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        found, ends = np.zeros(2), np.cumsum(sequence.document_lengths)
        for start, end in zip(ends - sequence.document_lengths, ends):
            if not sequence.loss_mask[start:end].any():
                continue
            row = next(remaining)
            np.testing.assert_array_equal(row["input_ids"], sequence.token_ids[start:end])
            assert row["attention_mask"] == [1] * (end - start)
            for name in ("target_token_ids", "target_logprobs", "target_mask"):
                assert np.array(row[name]).shape == (end - start, cache.manifest.top_k)
            found += peer_loss(row, logits[start:end])
        student = logprobs[sequence.target_positions]
        teacher = sequence.targets.logprobs(1.0).astype(np.float64)
        kl = np.exp(teacher) * (teacher - np.take_along_axis(student, sequence.targets.ids.astype(int), 1))
        labels = sequence.token_ids[sequence.target_positions + 1]
        wanted = kl.sum(), -student[np.arange(len(labels)), labels].sum()
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert next(remaining, None) is None


def test_killed_export_continues_and_a_finished_one_is_left_alone(tmp_path, cache_folder):
    rows = exported(cache_folder, tmp_path / "out")
    paths = sorted((tmp_path / "out").glob("*.parquet"))
    paths[1].unlink()
    (tmp_path / "out" / f"{paths[1].name}.elsewhere.1.2.partial").write_bytes(b"PAR1 torn")
    before = {path: path.stat().st_mtime_ns for path in paths if path.exists()}
    assert exported(cache_folder, tmp_path / "out") == rows
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_command_exports_in_several_processes(tmp_path, cache_folder):
    arguments = ["export", cache_folder, "--to", "parquet", "--out", tmp_path / "out", "--workers", 2]
    code, _, err = run(*arguments, "--temperature", 2, "--layout", "axolotl")
    assert code == 0, err
    assert "complete" in err
    assert len(list((tmp_path / "out").glob("*.parquet"))) == open_cache(cache_folder).manifest.num_partitions
    code, _, err = run(*arguments, "--temperature", 1, "--layout", "axolotl")
    assert code == 2
    assert "temperature was 2.0, now 1.0" in err


def test_mistakes_are_named(tmp_path, cache_folder, corpus):
    with pytest.raises(ConfigError, match="3 was not captured"):
        exported(cache_folder, tmp_path / "out", temperature=3.0)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="exists and holds no export"):
        exported(cache_folder, tmp_path / "taken")
    with pytest.raises(ConfigError, match="holds draws alone"):
        exported(make_cache(tmp_path / "draws", corpus, top_k=0, tail_samples=4), tmp_path / "out")
    damaged = shutil.copytree(cache_folder, tmp_path / "damaged")
    path = sorted((damaged / SHARDS).iterdir())[0]
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CacheCorruptError, match=path.name):
        exported(damaged, tmp_path / "out")
    commit_path(damaged, 1).unlink()
    with pytest.raises(CacheIncompleteError):
        exported(damaged, tmp_path / "out")
    exported(cache_folder, tmp_path / "out2")
    with pytest.raises(CacheMismatchError, match="holds another export: cache was"):
        exported(make_cache(tmp_path / "other", corpus), tmp_path / "out2")
