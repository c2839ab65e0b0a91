"""The loss on a share of the positions: which ones, against dense float64, however a step is divided."""

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from pipeline import open_cache
from pipeline.errors import ConfigError
from pipeline.settings import resolved
from stages.train_student import student_entropy
from stages.train_student.dataset import Collate
from stages.train_student.head import attach_fused_loss
from stages.train_student.loss_settings import LossSettings
from stages.train_student.positions import PositionRule, largest, random_scores
from stages.train_student.run import train_student
from stages.train_student.settings import TrainConfig
from stages.train_student.step_positions import StepPositions
from tests.support.kinds import kind_student
from tests.support.small import llama_config, make_cache
from tests.test_train_student import dense_loss

ROOT = Path(__file__).parent.parent
INDICES = [3, 8, 1, 39, 12, 20, 5, 31]


@pytest.fixture(scope="module", params=[0.0, 1e-4], ids=["lossless", "rounded"])
def cache(request, tmp_path_factory, corpus):
    """Rounded entropies come in steps of 1/64: many are equal."""
    return open_cache(make_cache(tmp_path_factory.mktemp("cache"), corpus, max_kl_error=request.param))


def step_of(cache, rule, indices, size, seed=0, step=0):
    """The kept micro-batches of a step of one rank, and the count of their targets."""
    settings = LossSettings(alpha=0.3, vocab_size=cache.manifest.vocab_size)
    collate = Collate(settings, with_entropies=rule.by == "entropy")
    batches = [collate([cache[i] for i in indices[at : at + size]]) for at in range(0, len(indices), size)]
    return batches, StepPositions(rule, seed).keep(batches, step)


def kept_places(batches):
    """The kept targets as pairs: key of the sequence, position in it."""
    return [
        (batch["keys"][row // batch["input_ids"].shape[1]], row % batch["input_ids"].shape[1])
        for batch in batches
        for row in batch["target_rows"].tolist()
    ]


def places(cache, indices):
    """All targets of a step, in the same form."""
    return [(cache[i].key.hex(), int(at)) for i in indices for at in cache[i].target_positions]


@pytest.mark.parametrize("share", [0.2, 1e-6, 0.5, 1.0])
def test_positions_of_the_teachers_largest_entropies_are_kept(cache, share):
    """Of equal ones those that come first in the step; a share too small for any keeps one."""
    rule = PositionRule("entropy", share)
    entropies = np.concatenate([cache[i].targets.entropy(2.0) for i in INDICES]).astype(np.float64)
    count = max(1, round(share * len(entropies)))
    expected = sorted(sorted(range(len(entropies)), key=lambda at: (-entropies[at], at))[:count])
    batches, num_kept = step_of(cache, rule, INDICES, 2)
    assert num_kept == count
    assert kept_places(batches) == [places(cache, INDICES)[at] for at in expected]
    assert [len(batch["labels"]) for batch in batches] == [len(batch["target_rows"]) for batch in batches]
    if cache.manifest.max_kl_error:
        assert len(np.unique(entropies)) < len(entropies)


@pytest.mark.parametrize("by", ["entropy", "random"])
def test_the_division_of_a_step_chooses_nothing(cache, by):
    rule = PositionRule(by, 0.3)
    whole, parts = (step_of(cache, rule, INDICES, size) for size in (8, 2))
    assert whole[1] == parts[1]
    assert kept_places(whole[0]) == kept_places(parts[0])
    ones = step_of(cache, PositionRule(by, 1e-9), INDICES, 1)  # micro-batches of which nothing is left
    assert sorted(len(batch["labels"]) for batch in ones[0]) == [0] * 7 + [1]


def test_random_positions_differ_by_step_and_seed(cache):
    rule = PositionRule("random", 0.3)
    kept = [kept_places(step_of(cache, rule, INDICES, 4, *where)[0]) for where in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert kept[0] == kept[3]
    assert len({tuple(each) for each in kept}) == 3
    scores = random_scores(100_000, 5, 7)
    assert len(np.unique(scores)) == len(scores)
    counts = np.bincount((scores >> np.uint64(60)).astype(np.int64), minlength=16)
    assert abs(counts - 6250).max() < 400  # five deviations
    assert scores[:3].tolist() == random_scores(3, 5, 7).tolist()


def student_and_double(cache):
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(cache.manifest.vocab_size + 11, num_hidden_layers=1)).double()
    return model, copy.deepcopy(model)


def dense_entropies(model, cache, index, temperature):
    """float64 [N]: of the student's softened distribution, document by document, from full logits."""
    rows, start, sequence = [], 0, cache[index]
    for length in sequence.document_lengths:
        ids = torch.tensor(sequence.token_ids[start : start + length].astype(np.int64))[None]
        rows.append(model(ids).logits[0, :, : cache.manifest.vocab_size] / temperature)
        start += length
    log_q = torch.log_softmax(torch.cat(rows)[sequence.target_positions], 1)
    return -(log_q.exp() * log_q).sum(1).detach().numpy()


@pytest.mark.parametrize("by", ["entropy", "student-entropy", "random"])
@pytest.mark.parametrize("share", [0.2, 1e-9])
def test_loss_and_gradient_are_the_mean_over_the_kept_positions(cache, by, share, monkeypatch):
    """Summed over micro-batches; the oracle is dense, float64, document by document."""
    monkeypatch.setattr(student_entropy, "CHUNK_BYTES", 8 * 400 * 7)  # chunks of a few rows
    rule = PositionRule(by, share)
    model, reference = student_and_double(cache)
    attach_fused_loss(model, LossSettings(alpha=0.3, vocab_size=cache.manifest.vocab_size))
    batches, num_kept = step_of(cache, rule, INDICES, 2)
    if by == "student-entropy":
        kept = []
        for at, index in enumerate(INDICES):
            entropies = dense_entropies(reference, cache, index, 2.0)
            count = max(1, round(share * len(entropies)))
            assert batches[at // 2]["kept_of_sequences"][at % 2] == (len(entropies), count)
            kept += [np.isin(np.arange(len(entropies)), np.argsort(-entropies, kind="stable")[:count])]
        mask = np.concatenate(kept)
    else:
        chosen = set(kept_places(batches))
        mask = np.array([place in chosen for place in places(cache, INDICES)])
    assert num_kept == mask.sum()
    expected = dense_loss(reference, cache, INDICES, 0.3, 2.0)[torch.from_numpy(mask)].mean()
    for batch in batches:
        batch.pop("keys")
    loss = sum(model(**batch, num_items_in_batch=num_kept).loss for batch in batches)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    loss.backward()
    expected.backward()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_equal_entropies_of_the_student_keep_the_first(cache):
    """Of a student that is equally unsure everywhere."""
    hidden, weight = torch.zeros(9, 4), torch.randn(50, 4)
    settings = LossSettings(vocab_size=40)
    rows = student_entropy.least_sure_rows(hidden, weight, None, settings, [(4, 2), (0, 0), (5, 1)])
    assert rows.tolist() == [0, 1, 4]


def test_entropies_of_an_adapted_capped_head_and_of_large_logits():
    random = torch.Generator().manual_seed(0)
    hidden, weight, inner, outer = (
        torch.randn(*shape, generator=random, dtype=torch.float64) for shape in ((7, 5), (30, 5), (7, 2), (30, 2))
    )
    settings = LossSettings(vocab_size=26, temperature=1.5, logit_scale=0.5, logit_softcap=30.0)
    logits = 30 * torch.tanh(0.5 * (100 * hidden @ weight.T + inner @ outer.T)[:, :26] / 30) / 1.5
    log_q = torch.log_softmax(logits, 1)
    found = student_entropy.student_entropies(100 * hidden, weight, (inner, outer), settings)
    torch.testing.assert_close(found, -(log_q.exp() * log_q).sum(1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("text", ["entropy", "entropy:", "entropy:0", "entropy:1.1", "entropy:nan", "worst:0.2", ""])
def test_what_is_no_rule_is_refused_in_a_line(text, tmp_path):
    with pytest.raises(ConfigError, match=r"positions is .*entropy:0.2.*student-entropy, random"):
        TrainConfig(student=tmp_path, cache=tmp_path, out=tmp_path, positions=text)


def test_largest_of_none_is_none():
    assert largest(np.zeros(0), PositionRule("random", 0.2).count(0)).tolist() == []
    assert PositionRule.parse("random:0.1").count(30) == 3


@pytest.fixture(scope="module")
def base(tmp_path_factory, corpus):
    cache = make_cache(tmp_path_factory.mktemp("cache"), corpus, max_kl_error=0.0)
    student = tmp_path_factory.mktemp("student")
    vocab_size = open_cache(cache).manifest.vocab_size
    llama_config(vocab_size, num_hidden_layers=1, initializer_range=0.02).save_pretrained(student)
    values = {"max_steps": 4, "batch_size": 8, "log_steps": 1, "save_steps": 2, "learning_rate": 1e-2}
    return TrainConfig(student=student / "config.json", cache=cache, out=Path("unset"), **values)


def losses(folder: Path) -> list[float]:
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [entry[name] for entry in log for name in ("loss", "cross_entropy", "kl", "grad_norm") if name in entry]


@pytest.mark.parametrize(
    ("positions", "sharding"), [("entropy:0.2", "none"), ("student-entropy:0.2", "fsdp2"), ("random:0.02", "none")]
)
def test_a_training_on_some_positions_is_the_same_however_it_is_divided(base, tmp_path, positions, sharding):
    """One batch, accumulated, resumed in the middle, and on two ranks, some of which get nothing in a step."""
    whole = dataclasses.replace(base, out=tmp_path / "whole", positions=positions)
    train_student(whole)
    halves = dataclasses.replace(whole, out=tmp_path / "halves", batch_size=2, gradient_accumulation=4)
    train_student(halves)
    assert losses(halves.out) == pytest.approx(losses(whole.out), rel=1e-5)
    ranks = dataclasses.replace(whole, out=tmp_path / "ranks", batch_size=2, gradient_accumulation=2, sharding=sharding)
    path = tmp_path / "ranks.yaml"
    path.write_text(json.dumps(resolved(ranks)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "pipeline.cli", "train-student", "--config", str(path)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    assert losses(ranks.out) == pytest.approx(losses(whole.out), rel=1e-4)


def test_a_resumed_training_keeps_the_positions_that_it_would_have_kept(base, tmp_path, monkeypatch):
    whole = dataclasses.replace(base, out=tmp_path / "whole", positions="random:0.2")
    train_student(whole)
    again = dataclasses.replace(whole, out=tmp_path / "again")
    kept, keep = [], StepPositions.keep

    def stop_at_3(self, batches, step):
        kept.append(step)
        if kept == [0, 1, 2]:
            raise KeyboardInterrupt
        return keep(self, batches, step)

    monkeypatch.setattr(StepPositions, "keep", stop_at_3)
    with pytest.raises(KeyboardInterrupt):
        train_student(again)
    train_student(again)
    assert kept == [0, 1, 2, 2, 3]
    assert losses(again.out) == losses(whole.out)
    with pytest.raises(ConfigError, match=r"positions was 'random:0\.2', now None"):
        train_student(dataclasses.replace(again, positions=None))


def test_an_evaluation_is_over_all_positions(base, tmp_path):
    """Of a student that has hardly moved, the same with a choice of positions as without."""
    still = dataclasses.replace(base, eval_cache=base.cache, learning_rate=1e-12, max_steps=1)
    every, some = (
        train_student(dataclasses.replace(still, out=tmp_path / str(positions), positions=positions))
        for positions in (None, "entropy:0.1")
    )
    for name in ("eval_cross_entropy", "eval_kl_2", "eval_top1_agreement", "eval_calibration_error"):
        assert some[name] == pytest.approx(every[name], rel=1e-6), name


@pytest.mark.parametrize("kind", ["llama", "mamba2", "qwen3_moe"])
def test_every_kind_of_student_keeps_the_positions_where_it_is_least_sure(base, tmp_path, kind):
    """An adapted head, documents computed one by one, experts: sequence by sequence as all at once."""
    changes = {"lora_rank": 4, "lora_alpha": 8.0, "lora_head": True}
    if kind != "llama":
        vocab_size = open_cache(base.cache[0]).manifest.vocab_size
        student = kind_student(tmp_path / "student", kind, vocab_size)
        changes = {"student": student, "router_aux_loss": 0.0 if kind == "qwen3_moe" else None}
    whole = dataclasses.replace(base, out=tmp_path / "whole", positions="student-entropy:0.2", max_steps=2, **changes)
    train_student(whole)
    ones = dataclasses.replace(whole, out=tmp_path / "ones", batch_size=1, gradient_accumulation=8)
    train_student(ones)
    assert losses(ones.out) == pytest.approx(losses(whole.out), rel=1e-4)
