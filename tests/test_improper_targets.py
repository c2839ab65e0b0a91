"""Teachers whose logits are not finite, and what else is no distribution: refused by name, never stored."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from pipeline.cache.commits import COMMITS
from pipeline.corpus import Corpus
from pipeline.errors import EngineError
from pipeline.targets import COLUMNS, SIGNED, improper, restricted
from stages.cache_logits.fake_engine import fake_targets
from stages.cache_logits.run import cache_logits
from tests.support.small import llama_config, make_corpus, random_sequences
from tests.test_cache_logits import run_command, settings


def make_overflowing_teacher(folder: Path, token: int) -> Path:
    """A float16 Llama that overflows wherever it has seen `token`."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(400))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
        model.model.embed_tokens.weight[token, :] = torch.randn(64)
        model.model.embed_tokens.weight[token, 0] = 6e4
        model.model.layers[0].mlp.down_proj.weight *= 1e4
    model.to(torch.float16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("max_kl_error", [0.0, 1e-4])
@pytest.mark.parametrize("engine", ["transformers", pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.slow])])
def test_overflowing_teacher_is_one_line_that_names_the_sequence(tmp_path, engine, max_kl_error):
    corpus = make_corpus(tmp_path / "corpus", random_sequences(12, vocab_size=300))
    rows = list(Corpus(corpus).rows())
    token = int(rows[7].token_ids[0])
    teacher = make_overflowing_teacher(tmp_path / "teacher", token)
    config = settings(teacher, corpus, tmp_path / "cache", engine=engine, max_kl_error=max_kl_error)
    if engine == "vllm":
        process = run_command(config)
        _, message = process.communicate(timeout=300)
        assert process.returncode == 2
    else:
        with pytest.raises(EngineError, match="targets are not finite") as caught:
            cache_logits(config)
        message = str(caught.value)
    (named,) = [row for row in rows if row.key.hex() in message]
    if engine == "transformers":  # in vLLM what is no number can reach other requests of its step
        assert token in named.token_ids
    assert "--dtype" in message
    assert not list((config.out / "failures").glob("*"))
    committed = len(list((config.out / COMMITS).iterdir()))
    assert committed < 3


def good():
    tokens = np.arange(5, dtype=np.int32)
    return fake_targets(tokens, tokens + 1, 4, (1.0, 2.0), 30, 3)


@pytest.mark.parametrize("name", [name for name in COLUMNS if name not in SIGNED])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_value_that_no_distribution_has_is_found(name, value):
    targets = good()
    assert improper(targets) == ""
    column = getattr(targets, name)
    if column.dtype.kind != "f":
        value = -9
    column.reshape(len(targets), -1)[3, -1] = value
    is_empty_tail = name == "tail_logprobs" and value == -np.inf
    assert (improper(targets) == "") == is_empty_tail
    if not is_empty_tail:
        assert f"{name} of target 3" in improper(targets)


def test_restricted_targets_are_those_of_the_smaller_vocabulary():
    """Ids from 27 on become tail: probabilities of the others stay, and all adds up; also where the top id goes."""
    tokens = np.array([3, 24, 26, 29, 28], np.int32)
    whole = fake_targets(tokens, np.array([4, 25, 1, 2, 3]), 4, (1.0, 2.0), 30, 4)
    part = restricted(whole, 27)
    assert (part.ids < 27).all()
    assert (part.draws < 27).all()
    for temperature in (1.0, 2.0):
        before, after = whole.probs(temperature), part.probs(temperature)
        kept = np.where(whole.ids < 27, before, 0).sum(1)
        np.testing.assert_allclose(after.sum(1), kept, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(after.sum(1) + part.tail_mass(temperature), 1, rtol=1e-5)
        for row in range(len(tokens)):
            ours = dict(zip(whole.ids[row].tolist(), before[row].tolist()))
            for index, prob in zip(part.ids[row].tolist(), after[row].tolist()):
                assert prob == 0 or prob == ours[index]
            positive = part.ids[row][after[row] > 0]
            assert len(set(positive.tolist())) == len(positive)
            assert (np.diff(after[row]) <= 0).all()
    assert restricted(whole, 30) is whole
