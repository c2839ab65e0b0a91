"""The tail sketch: what is stored of it against what the teacher's float64 logits say."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from pipeline import open_cache
from pipeline.cache.folder import CacheFolder
from pipeline.cache.verify import verify_cache
from pipeline.corpus import Corpus
from pipeline.errors import CacheCorruptError, CacheMismatchError, ConfigError
from pipeline.lifecycle.convert import convert_cache
from pipeline.lifecycle.merge import merge_caches
from pipeline.lifecycle.settings import ConvertConfig, MergeConfig
from pipeline.progress import Reporter
from pipeline.sketch import FittedSketch, checksum_of, sketch_name
from stages.cache_logits.audit import audit_cache
from stages.cache_logits.draws import reduce_rows
from stages.cache_logits.engine import unpack
from stages.cache_logits.reduction import Reduction
from stages.cache_logits.run import cache_logits
from stages.cache_logits.settings import AuditConfig
from stages.cache_logits.sketch_fitting import Head, Wanted, fit_sketch
from stages.cache_logits.sketching import RowSketch, shared_errors, tail_errors
from tests.support.sketched import RANK, TOP_K
from tests.support.small import true_logits
from tests.test_cache_logits import capture as run_capture
from tests.test_cache_logits import settings
from tests.test_format import checksum, read_by_the_book, read_document, read_sketch, rebuilt

V, H, R, K, T = 300, 24, RANK, TOP_K, (1.0, 2.0)


@pytest.fixture(scope="module")
def head() -> Head:
    generator = torch.Generator().manual_seed(3)
    scale = torch.linspace(2.0, 0.1, H)  # a few directions say most
    return Head(
        weight_VH=torch.randn(V, H, generator=generator) * scale,
        bias_V=torch.randn(V, generator=generator),
        softcap=None,
    )


@pytest.fixture(scope="module")
def hidden_NH() -> torch.Tensor:
    return torch.randn(600, H, generator=torch.Generator().manual_seed(4)) + 0.3


def wanted(rank: int = R, **changes) -> Wanted:
    return Wanted(**{"rank": rank, "top_k": K, "temperatures": T, "max_error": 0.01} | changes)


@pytest.fixture(scope="module")
def fitted(head, hidden_NH) -> FittedSketch:
    with Reporter().progress("fit", 1) as progress:
        return fit_sketch(hidden_NH, head, wanted(), progress)


def kl_by_hand(logits_V: np.ndarray, sketched_V: np.ndarray, ids: np.ndarray, temperature: float) -> float:
    """KL(p || p-hat) of one row in float64, p-hat being written out over the whole vocabulary."""
    p = np.exp(logits_V / temperature - np.logaddexp.reduce(logits_V / temperature))
    rest = np.setdiff1d(np.arange(len(p)), ids)
    shape = np.exp(sketched_V[rest] / temperature - np.logaddexp.reduce(sketched_V[rest] / temperature))
    rebuilt = p.copy()
    rebuilt[rest] = p[rest].sum() * shape
    return float((p * np.log(p / rebuilt)).sum())


def errors_by_hand(fitted: FittedSketch, head: Head, rows_NH: torch.Tensor, temperature: float) -> np.ndarray:
    logits_NV = head.logits(rows_NH.double() if head.weight_VH.dtype == torch.float64 else rows_NH).double().numpy()
    levels = np.rint((rows_NH.numpy() - fitted.encoder.mean) @ fitted.encoder.encoder.T)
    sketched_NV = fitted.decoder.logits(levels).astype(np.float64)
    order = np.argsort(-logits_NV, axis=1)[:, : fitted.record.top_k]
    return np.array([kl_by_hand(z, s, ids, temperature) for z, s, ids in zip(logits_NV, sketched_NV, order)])


def test_fitted_sketch_is_nearer_than_what_it_starts_from_and_a_larger_one_nearer_still(head, hidden_NH, fitted):
    spread = hidden_NH[300:]
    means = {}
    for rank in (1, R, 12):
        with Reporter().progress("fit", 1) as progress:
            sketch = fit_sketch(hidden_NH, head, wanted(rank), progress)
        means[rank] = np.mean([errors_by_hand(sketch, head, spread, temperature).mean() for temperature in T])
    flat = dataclasses.replace(
        fitted, decoder=dataclasses.replace(fitted.decoder, basis=np.zeros((V, R), "f4"), offset=np.zeros(V, "f4"))
    )
    uniform = np.mean([errors_by_hand(flat, head, spread, temperature).mean() for temperature in T])
    assert means[12] < means[R] < means[1] < uniform
    assert means[12] < 0.5 * means[1]


def test_record_tells_the_errors_of_positions_that_were_not_fitted_to(head, hidden_NH, fitted):
    order = torch.randperm(len(hidden_NH), generator=torch.Generator().manual_seed(0))
    checked = hidden_NH[order[: fitted.record.num_checked]]
    for temperature, mean in zip(T, fitted.record.mean_kl):
        assert mean == pytest.approx(errors_by_hand(fitted, head, checked, temperature).mean(), rel=1e-3)
    assert max(fitted.record.mean_kl_of_rounding) <= 0.01


def test_finer_bound_gives_finer_integers(head, hidden_NH, fitted):
    with Reporter().progress("fit", 1) as progress:
        fine = fit_sketch(hidden_NH, head, wanted(max_error=1e-4), progress)
    assert max(fine.record.mean_kl_of_rounding) <= 1e-4
    assert np.abs(fine.encoder.encoder).mean() > 3 * np.abs(fitted.encoder.encoder).mean()


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_errors_of_ranks_are_those_of_whole_rows(head, hidden_NH, ranks, softcap):
    capped = dataclasses.replace(head, softcap=softcap)
    with Reporter().progress("fit", 1) as progress:
        fitted = fit_sketch(hidden_NH, capped, wanted(), progress)
    rows = hidden_NH[:20]
    logits, sketch = capped.logits(rows), RowSketch.of(fitted, torch.device("cpu"))
    reduction = Reduction(K, T, 0, None, R)
    labels, uniforms = torch.arange(20), torch.rand(20, generator=torch.Generator().manual_seed(1))
    whole = unpack(
        reduce_rows(reduction, logits.clone(), labels, uniforms, sketch=sketch, hidden_NH=rows).numpy(), reduction
    )
    measured = uniforms.argsort()[:2].tolist()
    assert np.isnan(np.delete(whole.sketch_errors, measured, axis=0)).all()
    expected = np.stack([errors_by_hand(fitted, capped, rows[measured], temperature) for temperature in T], 1)
    np.testing.assert_allclose(whole.sketch_errors[measured], expected, rtol=2e-3, atol=2e-5)
    levels = np.rint((rows.numpy() - fitted.encoder.mean) @ fitted.encoder.encoder.T)
    np.testing.assert_array_equal(whole.coefficients, levels)
    ids = torch.from_numpy(whole.ids)
    dense = tail_errors(logits, sketch.logits(sketch.levels(rows)), ids.long(), T)
    np.testing.assert_allclose(dense[measured], expected, rtol=2e-3, atol=2e-5)
    bounds = np.linspace(0, V, ranks + 1).astype(int)
    parts = [slice(*pair) for pair in itertools.pairwise(bounds)]
    columns: list[list[torch.Tensor]] = [[] for _ in parts]

    def share(rank: int, gathered: list[torch.Tensor]) -> torch.Tensor:
        calls = iter(gathered)

        def gather(column: torch.Tensor) -> torch.Tensor:
            columns[rank].append(column)
            return next(calls, column.repeat(1, ranks))

        own = parts[rank]
        return shared_errors(
            logits[:, own],
            sketch.logits(sketch.levels(rows))[:, own],
            ids,
            torch.from_numpy(whole.logsumexps),
            torch.from_numpy(whole.tail_logprobs),
            T,
            own.start,
            gather,
        )

    gathered: list[torch.Tensor] = []
    for _ in range(2):  # the maxima first, and with them the parts
        for rank in range(ranks):
            columns[rank].clear()
            share(rank, gathered)
        gathered = (
            [torch.cat([columns[rank][len(gathered)] for rank in range(ranks)], 1)]
            if not gathered
            else [
                gathered[0],
                torch.cat([columns[rank][1] for rank in range(ranks)], 1),
            ]
        )
    for rank in range(ranks):
        np.testing.assert_allclose(share(rank, gathered), dense, rtol=2e-3, atol=2e-5)


def test_file_is_read_as_it_was_written_and_damage_is_refused(fitted):
    contents = fitted.to_bytes()
    again = FittedSketch.from_bytes(contents, "here", V, R)
    assert again.to_bytes() == contents
    assert again.record == fitted.record
    np.testing.assert_array_equal(again.decoder.basis, fitted.decoder.basis)
    for wrong in ((V + 1, R), (V, R + 1)):
        with pytest.raises(CacheCorruptError, match="not the sketch of"):
            FittedSketch.from_bytes(contents, "here", *wrong)
    random = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(contents)
        start = int(random.integers(0, 400))
        damaged[start : start + int(random.integers(1, 9))] = random.bytes(3)
        try:
            FittedSketch.from_bytes(bytes(damaged[: int(random.integers(1, len(damaged) + 1))]), "here", V, R)
        except CacheCorruptError:
            continue
        except Exception as exc:
            pytest.fail(f"{type(exc).__name__}: {exc}")


@pytest.mark.parametrize("container", ["arrow", "zarr"])
def test_cache_holds_what_the_hidden_states_say(sketched, teacher, corpus, container):
    cache = open_cache(sketched[container].out)
    assert cache.manifest.tail_rank == R
    assert not verify_cache(sketched[container].out).problems
    fitted = cache.fitted_sketch()
    errors = []
    for row, sequence in zip(Corpus(corpus).rows(), cache):
        logits_NV = true_logits(teacher, row, cache.manifest.vocab_size)
        sketched_NV = cache.sketch.logits(sequence.targets.coefficients).astype(np.float64)
        for z, s, ids in zip(logits_NV, sketched_NV, sequence.targets.ids):
            errors.append([kl_by_hand(z, s, ids, temperature) for temperature in cache.manifest.temperatures])
    recorded = [commit.statistics["mean_sketch_kl"] for commit in cache.commits]
    assert np.mean(errors, 0) == pytest.approx(fitted.record.mean_kl, rel=0.5)
    assert np.mean(errors, 0) == pytest.approx(np.mean(recorded, 0), rel=0.5)


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_vllm_makes_the_same_coefficients(sketched, tmp_path, teacher, corpus, tensor_parallel):
    config = dataclasses.replace(
        sketched["arrow"], out=tmp_path / "cache", engine="vllm", tensor_parallel=tensor_parallel
    )
    run_capture(config)
    cache, other = open_cache(config.out), open_cache(sketched["arrow"].out)
    ours, theirs = cache.fitted_sketch(), other.fitted_sketch()
    np.testing.assert_allclose(ours.record.mean_kl, theirs.record.mean_kl, rtol=0.05)
    again = AuditConfig(cache=config.out, teacher=teacher, engine="transformers", tensor_parallel=1, fraction=1.0)
    assert not audit_cache(again).problems
    recorded = [np.mean([commit.statistics["mean_sketch_kl"] for commit in one.commits], 0) for one in (cache, other)]
    np.testing.assert_allclose(*recorded, rtol=0.1)


@pytest.mark.parametrize("container", ["arrow", "zarr"])
@pytest.mark.filterwarnings("ignore")  # zarr's, on numcodecs' codecs
def test_reader_written_from_the_specification_rebuilds_the_distribution(sketched, teacher, corpus, container):
    folder = sketched[container].out
    manifest = read_document(folder / "manifest.json")
    sketch, cache = read_sketch(folder, manifest), open_cache(folder)
    for row, ours, sequence in zip(read_by_the_book(folder), cache, Corpus(corpus).rows(), strict=True):
        assert checksum(row) == int(row["checksum"])
        np.testing.assert_array_equal(row["coefficients"], ours.targets.coefficients)
        logits_NV = true_logits(teacher, sequence, manifest["vocab_size"])
        sketched_NV = cache.sketch.logits(ours.targets.coefficients).astype(np.float64)
        for temperature in manifest["temperatures"]:
            found = rebuilt(row, sketch, temperature, manifest)
            np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)
            p = np.exp(logits_NV / temperature)
            p /= p.sum(axis=1, keepdims=True)
            for z, s, ids, own, by_book in zip(logits_NV, sketched_NV, ours.targets.ids, p, found):
                assert (own * np.log(own / by_book)).sum() == pytest.approx(
                    kl_by_hand(z, s, ids, temperature), abs=1e-4
                )


def test_sketch_is_copied_by_merge_convert_and_reuse(sketched, tmp_path, teacher):
    config = sketched["arrow"]
    cache = open_cache(config.out)
    merged = merge_caches(MergeConfig(caches=(config.out, config.out), out=tmp_path / "merged"))
    converted = convert_cache(ConvertConfig(cache=config.out, out=tmp_path / "converted", format="zarr"))
    reused = cache_logits(dataclasses.replace(config, out=tmp_path / "reused", reuse=(config.out,)))
    assert merged.sketch == converted.sketch == reused.sketch == cache.manifest.sketch
    for name in ("merged", "converted", "reused"):
        copy = open_cache(tmp_path / name)
        assert not verify_cache(copy.folder).problems
        for one, other in zip(cache, copy, strict=True):
            np.testing.assert_array_equal(one.targets.coefficients, other.targets.coefficients)
    recorded = [
        np.average(
            [commit.statistics["mean_sketch_kl"] for commit in one.commits],
            0,
            [commit.num_targets for commit in one.commits],
        )
        for one in (cache, open_cache(tmp_path / "reused"))
    ]
    assert recorded[0] == pytest.approx(recorded[1])


def test_caches_of_different_sketches_are_not_merged(sketched, tmp_path):
    config = sketched["arrow"]
    other = dataclasses.replace(config, out=tmp_path / "other", sketch_tokens=200)
    cache_logits(other)
    with pytest.raises(CacheMismatchError, match="sketch is"):
        merge_caches(MergeConfig(caches=(config.out, other.out), out=tmp_path / "merged"))
    plain = dataclasses.replace(config, out=tmp_path / "plain", tail_rank=0)
    cache_logits(plain)
    with pytest.raises(CacheMismatchError, match="has no tail sketch"):
        cache_logits(dataclasses.replace(config, out=tmp_path / "reused", reuse=(plain.out,)))


def test_audit_scores_the_coefficients_again(sketched, tmp_path, teacher):
    config = sketched["zarr"]
    assert not audit_cache(AuditConfig(cache=config.out, teacher=teacher, fraction=1.0)).problems
    with_other = dataclasses.replace(config, out=tmp_path / "other", sketch_tokens=200)
    cache_logits(with_other)
    _put_sketch_of(config.out, with_other.out)
    problems = audit_cache(AuditConfig(cache=with_other.out, teacher=teacher, fraction=1.0)).problems
    assert any("coefficients of the tail sketch" in problem for problem in problems)


def _put_sketch_of(source, target) -> None:
    """As if a manifest had been forged to name another sketch."""
    manifest = CacheFolder(target).manifest
    theirs = CacheFolder(source).manifest.sketch
    (target / sketch_name(theirs)).write_bytes((source / sketch_name(theirs)).read_bytes())
    (target / "manifest.json").unlink()
    (target / "manifest.copy.json").unlink()
    dataclasses.replace(manifest, sketch=theirs).write(target)


@pytest.mark.parametrize("how", ["gone", "cut", "changed"])
def test_damaged_sketch_is_found(sketched, tmp_path, how):
    config = dataclasses.replace(sketched["arrow"], out=tmp_path / "cache")
    cache_logits(config)
    path = config.out / sketch_name(CacheFolder(config.out).manifest.sketch)
    contents = path.read_bytes()
    path.unlink()
    if how != "gone":
        path.write_bytes(contents[:-1] if how == "cut" else contents[:-1] + bytes([contents[-1] ^ 1]))
    problems = verify_cache(config.out).problems
    assert len(problems) == 1
    assert "sketch-" in problems[0]
    with pytest.raises(CacheCorruptError, match="sketch-"):
        _ = open_cache(config.out).sketch


def test_second_worker_takes_the_sketch_of_the_first(sketched, tmp_path, monkeypatch):
    config = dataclasses.replace(sketched["arrow"], out=tmp_path / "cache", worker=1, workers=2)
    contents = CacheFolder(sketched["arrow"].out).sketch_contents()

    def slower(*_: object) -> bytes:
        cache_logits(dataclasses.replace(config, worker=0, sketch_tokens=200))
        return contents

    monkeypatch.setattr("stages.cache_logits.run.sketch_of_run", slower_once(slower))
    manifest = cache_logits(config)
    assert manifest.sketch == checksum_of(CacheFolder(config.out).sketch_contents()) != checksum_of(contents)


@pytest.mark.parametrize("before", [{"shard_tokens": 700}, {"tail_rank": 0}, {"top_k": 12}])
def test_folder_with_another_plan_is_refused_before_a_sketch_is_fitted(sketched, tmp_path, monkeypatch, before):
    config = dataclasses.replace(sketched["arrow"], out=tmp_path / "cache")
    cache_logits(dataclasses.replace(config, **before))
    monkeypatch.setattr("stages.cache_logits.run.sketch_of_run", lambda *_: pytest.fail("a teacher is loaded"))
    with pytest.raises(CacheMismatchError, match="choose another --out"):
        cache_logits(config)


def slower_once(function):
    """The function the first time, the real one inside of it."""
    from stages.cache_logits.sketch_making import sketch_of_run

    calls = []

    def call(*arguments: object) -> bytes:
        calls.append(1)
        return function() if len(calls) == 1 else sketch_of_run(*arguments)

    return call


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tail_rank": -1}, "tail_rank is -1"),
        ({"tail_rank": 4, "top_k": 0, "tail_samples": 4}, "stands beside stored entries"),
        ({"tail_rank": 4, "sketch_tokens": 8}, "sketch_tokens is 8"),
        ({"tail_rank": 4, "max_sketch_error": 0.0}, "max_sketch_error is 0.0"),
        ({"tail_rank": 500, "sketch_tokens": 2000}, "hidden states have"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, teacher, corpus, changes, message):
    with pytest.raises(ConfigError, match=message):
        cache_logits(settings(teacher, corpus, tmp_path / "cache", **changes))
    assert not (tmp_path / "cache").exists()
