"""Stage one against float64, with real engines: one contract for vLLM and transformers."""

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from pipeline import open_cache
from pipeline.cache.commits import COMMITS, SHARDS, list_commits
from pipeline.cache.verify import verify_cache
from pipeline.corpus import Corpus, TokenSequence
from pipeline.errors import CacheMismatchError, ConfigError, CorpusError, EngineError
from pipeline.formats.containers import CONTAINERS
from stages.cache_logits.run import cache_logits
from stages.cache_logits.settings import CacheConfig
from stages.prepare.run import prepare
from stages.prepare.settings import PrepareConfig
from tests.support.helpers import MARKED_CHAT_TEMPLATE, tiny_tokenizer, wait_until
from tests.support.oracle import assert_true_top_k, assert_within, entropy, softmax
from tests.support.rounding import entropy_errors, prob_errors
from tests.support.small import (
    CONTEXT,
    make_corpus,
    make_counting_teacher,
    make_teacher,
    random_sequences,
    rounding_of_logits,
    true_logits,
)

ENTROPY_STEP = 1 / 128
"""nats: how far rounding may put an entropy."""
FLOAT64 = 1e-12
"""What is left of float64 in 1 - a sum of probabilities."""
PIPELINE = [sys.executable, "-m", "pipeline.cli"]
ROOT = Path(__file__).parent.parent


def settings(teacher: Path, corpus: Path, out: Path, **changes: object) -> CacheConfig:
    """Small steps, so that prompts are chunked and partitions are many."""
    values = {"top_k": 16, "engine": "transformers", "max_kl_error": 0.0, "shard_tokens": 500, "batch_tokens": 128}
    return CacheConfig(teacher=teacher, corpus=corpus, out=out, **values | {"enforce_eager": True} | changes)


def run_command(config: CacheConfig, **environment: str) -> subprocess.Popen:
    """`pipeline cache-logits` with the settings in a YAML file; `environment` holds more variables."""
    path = config.out.with_suffix(".yaml")
    values = {key: str(value) if isinstance(value, Path) else value for key, value in vars(config).items()}
    path.write_text(json.dumps(values))
    return subprocess.Popen(
        [*PIPELINE, "cache-logits", "--config", str(path)],
        cwd=ROOT,
        env=os.environ | environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def assert_exact(folder: Path, teacher: Path, corpus: Path) -> None:
    """Every stored number against a float64 forward of the same weights, within float32's arithmetic and rounding."""
    cache = open_cache(folder)
    vocab_size, is_rounded = cache.manifest.vocab_size, cache.manifest.max_kl_error > 0
    rounding = 1e-3 if is_rounded else 0.0  # what --max-kl-error promises of every probability
    off = rounding_of_logits(teacher, corpus, vocab_size)
    for cached, sequence, logit_error in zip(cache, Corpus(corpus).rows(), off, strict=True):
        assert cached.key == sequence.key
        targets, ids = cached.targets, cached.targets.ids.astype(np.int64)
        logits = true_logits(teacher, sequence, vocab_size)
        labels = sequence.token_ids[cached.target_positions + 1][:, None].astype(np.int64)
        assert_true_top_k(targets.ids, logits, 2 * logit_error, in_order=not is_rounded)
        for temperature in cache.manifest.temperatures:
            probs, errors = softmax(logits, temperature), prob_errors(logits, temperature, logit_error)
            of = functools.partial(np.take_along_axis, axis=1)
            assert_within(targets.probs(temperature), of(probs, ids), of(errors, ids) + rounding)
            tail_error = errors.sum(1) - of(errors, ids).sum(1)
            assert_within(targets.tail_mass(temperature), 1 - of(probs, ids).sum(1), tail_error + FLOAT64 + rounding)
            allowed = entropy_errors(logits, temperature, logit_error) + (ENTROPY_STEP if is_rounded else 0.0)
            assert_within(targets.entropy(temperature), entropy(probs), allowed)
            label = np.exp(targets.label_logprobs(temperature))
            assert_within(label, of(probs, labels)[:, 0], of(errors, labels)[:, 0] + rounding)


def capture(config: CacheConfig, **environment: str) -> None:
    """The cache of `config`; vLLM in a process of its own, as it is used."""
    if config.engine == "transformers":
        cache_logits(config)
        return
    process = run_command(config, **environment)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def kill(process: subprocess.Popen) -> None:
    """kill -9 of a command; what it started must end by itself."""
    started = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    process.stderr.close()
    assert started
    assert psutil.wait_procs(started, timeout=20)[1] == []


def wait_for_commits(folder: Path, count: int) -> None:
    """Until `count` partitions are committed."""
    wait_until(lambda: (folder / COMMITS).is_dir() and len(list((folder / COMMITS).iterdir())) >= count)


@pytest.mark.vllm
def test_vllm_killed_and_continued_is_exact_and_agrees_with_transformers(tmp_path, teacher, corpus):
    """Chunked prompts, a sequence that fills the context, isolated documents, dead columns; kill -9 on the way."""
    config = settings(teacher, corpus, tmp_path / "vllm", engine="vllm", tail_samples=4)
    process = run_command(config)
    wait_for_commits(config.out, 1)
    kill(process)
    capture(config)
    assert verify_cache(config.out).problems == []
    assert_exact(config.out, teacher, corpus)
    cache_logits(settings(teacher, corpus, tmp_path / "transformers", tail_samples=4))
    assert_exact(tmp_path / "transformers", teacher, corpus)
    caches = zip(open_cache(config.out), open_cache(tmp_path / "transformers"), strict=True)
    agreeing = [(ours.targets.draws == theirs.targets.draws).mean() for ours, theirs in caches]
    assert np.mean(agreeing) > 0.99  # one uniform a position, from its content: only rounding can tell them apart
    with pytest.raises(CacheMismatchError, match=r"teacher\.engine is 'vllm', now 'transformers'"):
        cache_logits(dataclasses.replace(config, engine="transformers"))


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_worker_drains_and_outlives_its_engine(tmp_path, teacher, corpus):
    """Signals to every process, as Slurm sends them; then a kill -9 of the engine, as the kernel's, short of memory."""
    config = settings(teacher, corpus, tmp_path / "cache", engine="vllm", shard_tokens=1)
    process = run_command(config)
    wait_for_commits(config.out, 1)
    started = psutil.Process(process.pid).children(recursive=True)
    for each in [*started, process]:
        each.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 75, errors
    assert psutil.wait_procs(started, timeout=20)[1] == []
    assert 0 < len(list_commits(config.out)) < Corpus(corpus).manifest.num_sequences
    assert list((config.out / SHARDS).glob("*.partial")) == []
    process = run_command(config)
    wait_for_commits(config.out, len(list_commits(config.out)) + 1)
    engines = [child for child in psutil.Process(process.pid).children() if "Engine" in "".join(child.cmdline())]
    assert engines
    for engine in engines:
        engine.kill()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "EngineDeadError" in errors
    assert verify_cache(config.out).problems == []


@pytest.mark.parametrize("max_kl_error", [0.0, 1e-4])
@pytest.mark.parametrize("container", CONTAINERS)
def test_transformers_is_exact(tmp_path, teacher, corpus, max_kl_error, container):
    config = settings(
        teacher, corpus, tmp_path / "cache", max_kl_error=max_kl_error, format=container, temperatures=(2.0, 1.0, 0.5)
    )
    cache_logits(config)
    assert_exact(config.out, teacher, corpus)


def test_whole_vocabulary_can_be_kept(tmp_path, teacher, corpus):
    vocab_size = Corpus(corpus).manifest.tokenizer.vocab_size
    cache_logits(settings(teacher, corpus, tmp_path / "cache", top_k=vocab_size))
    assert_exact(tmp_path / "cache", teacher, corpus)
    assert all((sequence.targets.tail_mass(2.0) == 0).all() for sequence in open_cache(tmp_path / "cache"))


@pytest.mark.parametrize("engine", ["transformers", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_position_t_describes_token_t_plus_1(tmp_path, engine):
    """The teacher counts; so do the sequences; the most probable id must be the label."""
    teacher = make_counting_teacher(tmp_path / "teacher")
    sequences = []
    for start in (0, 40, 100):
        tokens = np.arange(start, start + 50, dtype=np.int32)
        mask = np.arange(50) >= 20
        sequences.append(TokenSequence(token_ids=tokens, loss_mask=mask, document_lengths=np.array([50], np.int32)))
    corpus = make_corpus(tmp_path / "corpus", sequences)
    capture(settings(teacher, corpus, tmp_path / "cache", engine=engine))
    for cached in open_cache(tmp_path / "cache"):
        np.testing.assert_array_equal(cached.target_positions, np.arange(19, 49))
        np.testing.assert_array_equal(cached.targets.ids[:, 0], cached.token_ids[cached.target_positions + 1])
        np.testing.assert_array_equal(cached.targets.label_logits, 0.0)


def test_documents_of_a_sequence_do_not_see_each_other(tmp_path, teacher):
    """The second document's targets are those of the document alone."""
    first, second = random_sequences(2, 300, seed=3, longest=40)
    alone = TokenSequence(
        token_ids=second.token_ids, loss_mask=second.loss_mask, document_lengths=np.array([40], np.int32)
    )
    both = TokenSequence(
        token_ids=np.concatenate([first.token_ids, alone.token_ids]),
        loss_mask=np.concatenate([first.loss_mask, alone.loss_mask]),
        document_lengths=np.array([len(first.token_ids), 40], np.int32),
    )
    corpus = make_corpus(tmp_path / "corpus", [alone, both])
    cache_logits(settings(teacher, corpus, tmp_path / "cache"))
    cached_alone, cached_both = open_cache(tmp_path / "cache")
    last = len(cached_alone.target_positions)
    logits = true_logits(teacher, alone, open_cache(tmp_path / "cache").manifest.vocab_size)
    off = rounding_of_logits(teacher, corpus, logits.shape[1])[0]
    allowed = 2 * np.take_along_axis(prob_errors(logits, 1.0, off), cached_alone.targets.ids.astype(np.int64), 1)
    assert_within(cached_both.targets.probs(1.0)[-last:], cached_alone.targets.probs(1.0), allowed)


def test_second_run_does_nothing_and_other_settings_are_refused(tmp_path, teacher, corpus):
    config = settings(teacher, corpus, tmp_path / "cache")
    cache_logits(config)
    before = {path: path.stat().st_mtime_ns for path in (config.out / SHARDS).iterdir()}
    cache_logits(config)
    assert {path: path.stat().st_mtime_ns for path in (config.out / SHARDS).iterdir()} == before
    with pytest.raises(CacheMismatchError, match=r"top_k is 16, now 8"):
        cache_logits(dataclasses.replace(config, top_k=8))
    other = make_teacher(tmp_path / "other", seed=1)
    with pytest.raises(CacheMismatchError, match=r"teacher\.weights is"):
        cache_logits(dataclasses.replace(config, teacher=other))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"teacher": Path("nowhere")}, ConfigError, r"nowhere: no model there"),
        ({"corpus": Path("nowhere")}, CorpusError, r"nowhere: no finished corpus"),
        ({"top_k": 100_000}, ConfigError, r"top_k is 100000; the vocabulary of .* has \d+ ids"),
    ],
)
def test_mistakes_are_named_before_the_teacher_is_loaded(tmp_path, teacher, corpus, changes, error, message):
    with pytest.raises(error, match=message):
        cache_logits(dataclasses.replace(settings(teacher, corpus, tmp_path / "cache"), **changes))
    assert not (tmp_path / "cache").exists()


def test_sequence_longer_than_the_context_is_refused(tmp_path, teacher):
    corpus = make_corpus(tmp_path / "corpus", random_sequences(2, 300, longest=CONTEXT + 4))
    with pytest.raises(ConfigError, match=rf"up to {CONTEXT + 4} tokens; the context of .* is {CONTEXT}"):
        cache_logits(settings(teacher, corpus, tmp_path / "cache"))


def test_manifest_names_the_template_that_wrote_the_conversations(tmp_path, teacher):
    """It tells where a cache comes from; what is in the cache, the tokens decide."""
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}]}\n')
    manifests = []
    for name, template in (("first", MARKED_CHAT_TEMPLATE), ("second", MARKED_CHAT_TEMPLATE + "{# changed #}")):
        tiny_tokenizer(tmp_path / name / "tokenizer", chat_template=template)
        corpus = tmp_path / name / "corpus"
        prepare(PrepareConfig(inputs=(chats,), tokenizer=corpus.parent / "tokenizer", out=corpus, sequence_length=64))
        manifests.append(cache_logits(settings(teacher, corpus, tmp_path / name / "cache")))
    assert len({manifest.chat_template for manifest in manifests} - {None}) == 2
    manifests[0].require_equal(manifests[1], tmp_path)
    ends = Corpus(tmp_path / "first" / "corpus").manifest.settings["end_token_ids"]
    assert list(manifests[0].end_token_ids) == ends == [0]  # EOS, which `prepare` appended


def test_empty_corpus_is_refused(tmp_path, teacher, corpus):
    empty = shutil.copytree(corpus, tmp_path / "corpus")
    manifest = dataclasses.replace(Corpus(corpus).manifest, partitions=())
    (empty / "corpus.json").unlink()
    manifest.write(empty)
    with pytest.raises(CorpusError, match="holds no sequence"):
        cache_logits(settings(teacher, empty, tmp_path / "cache"))


def test_foreign_tokenizer_is_refused(tmp_path, corpus):
    other = make_teacher(tmp_path / "other")
    tiny_tokenizer(other, vocab_size=290)
    with pytest.raises(ConfigError, match="its tokenizer is not the one that made the corpus"):
        cache_logits(settings(other, corpus, tmp_path / "cache"))


def test_foreign_folder_is_left_alone(tmp_path, teacher, corpus):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "thesis.tex").write_text("years of work")
    with pytest.raises(CacheMismatchError, match="exists and holds no cache"):
        cache_logits(settings(teacher, corpus, tmp_path / "cache"))
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["thesis.tex"]


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")  # vLLM's imports use what torch has deprecated
def test_model_that_vllm_does_not_know_names_the_other_engine(tmp_path, teacher, corpus):
    odd = shutil.copytree(teacher, tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text()) | {"architectures": ["HomeMadeForCausalLM"]}
    (odd / "config.json").write_text(json.dumps(config))
    with pytest.raises(EngineError, match=r"HomeMadeForCausalLM; take --engine transformers"):
        cache_logits(settings(odd, corpus, tmp_path / "cache", engine="vllm"))
