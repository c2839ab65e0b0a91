"""Stage two step by step: precision, recomputed activations, clipping, the first check, and spikes."""

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from pipeline import open_cache
from pipeline.errors import PipelineError
from stages.train_student import fused_head, head
from stages.train_student.guards import MIN_HISTORY
from stages.train_student.row_loss import distillation_rows_
from stages.train_student.run import train_student
from stages.train_student.sampler import StepShape, StreamSampler
from stages.train_student.settings import TrainConfig
from stages.train_student.trainer import DistillationTrainer
from tests.support.small import llama_config, make_cache

LAYERS, STEPS = 2, 6


@pytest.fixture(scope="module")
def base(tmp_path_factory, corpus):
    """Settings of a short run for a student that starts from random weights."""
    cache = make_cache(tmp_path_factory.mktemp("cache"), corpus, max_kl_error=0.0)
    student = tmp_path_factory.mktemp("student") / "config.json"
    vocab_size = open_cache(cache).manifest.vocab_size
    llama_config(vocab_size, num_hidden_layers=LAYERS, initializer_range=0.02).save_pretrained(student.parent)
    values = {"max_steps": STEPS, "batch_size": 4, "log_steps": 1, "save_steps": 100, "learning_rate": 1e-2}
    return TrainConfig(student=student, cache=cache, out=Path("unset"), warmup_ratio=0.0, **values)


def run(base, out, **changes):
    """What a run logs of every step."""
    train_student(dataclasses.replace(base, out=out, **changes))
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [entry for entry in log if "loss" in entry]


def before_each_step(monkeypatch, look):
    """Let `look` see the trainer when gradients are ready and clipped, and nothing has moved yet."""
    judge = DistillationTrainer.judge_step

    def judge_step(self):
        look(self)
        judge(self)

    monkeypatch.setattr(DistillationTrainer, "judge_step", judge_step)


def test_bfloat16_computes_in_it_and_keeps_weights_gradients_and_moments_in_float32(tmp_path, base, monkeypatch):
    kept, products = set(), set()

    def look(trainer):
        for parameter in trainer.model.parameters():
            kept.update({parameter.dtype, parameter.grad.dtype})
        for state in trainer.optimizer.state.values():
            kept.update(value.dtype for value in state.values() if torch.is_tensor(value))

    def product(module, args, output):
        if isinstance(module, torch.nn.Linear) and torch.is_tensor(output) and torch.is_autocast_enabled("cpu"):
            products.add(output.dtype)

    exact = run(base, tmp_path / "float32", dtype="float32")
    before_each_step(monkeypatch, look)
    hook = torch.nn.modules.module.register_module_forward_hook(product)
    rounded = run(base, tmp_path / "bfloat16", dtype="bfloat16")
    hook.remove()
    assert (kept, products) == ({torch.float32}, {torch.bfloat16})
    for ours, theirs in zip(rounded, exact, strict=True):
        assert ours["loss"] != theirs["loss"]
        for name in ("loss", "cross_entropy", "kl"):
            assert ours[name] == pytest.approx(theirs[name], rel=2**-8), name  # a bfloat16 has 8 bits
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "bfloat16")
    assert {weight.dtype for weight in model.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 4}, {"dtype": "bfloat16"}])
def test_gradient_checkpointing_computes_every_layer_twice_and_changes_nothing(tmp_path, base, monkeypatch, changes):
    calls, forward = [], LlamaDecoderLayer.forward

    def counted(self, *args, **kwargs):
        calls.append(self.training and torch.is_grad_enabled())  # not in the checks before the first step
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", counted)
    logs, counts = [], []
    for checkpointing in (False, True):
        calls.clear()
        out = tmp_path / str(checkpointing)
        logs.append(run(base, out, gradient_accumulation=2, gradient_checkpointing=checkpointing, **changes))
        counts.append(sum(calls))
    assert counts == [LAYERS * STEPS * 2, 2 * LAYERS * STEPS * 2]
    names = ("loss", "cross_entropy", "kl", "grad_norm")
    assert [[step[name] for name in names] for step in logs[0]] == [[step[name] for name in names] for step in logs[1]]


def test_gradients_are_clipped_to_the_norm_and_its_logged_value_is_from_before(tmp_path, base, monkeypatch):
    norms = []

    def look(trainer):
        squares = [parameter.grad.double().square().sum() for parameter in trainer.model.parameters()]
        norms.append(torch.stack(squares).sum().sqrt().item())

    before_each_step(monkeypatch, look)
    free = run(base, tmp_path / "free", max_grad_norm=0.0)
    assert [step["grad_norm"] for step in free] == pytest.approx(norms, rel=1e-5)
    limit = 0.5 * free[0]["grad_norm"]
    norms.clear()
    clipped = run(base, tmp_path / "clipped", max_grad_norm=limit)
    assert clipped[0]["grad_norm"] == free[0]["grad_norm"]
    assert any(step["grad_norm"] > limit for step in clipped)
    assert norms == pytest.approx([min(limit, step["grad_norm"]) for step in clipped], rel=1e-4)


def without_squared_temperature(fused, hidden, weight, targets, settings, alpha=None, **extras):
    out = fused(hidden, weight, targets, settings, alpha=alpha, **extras)
    alpha = settings.alpha if alpha is None else alpha
    return out._replace(loss=out.loss - alpha * (settings.temperature**2 - 1) * out.kl)


def with_labels_of_the_next_row(fused, hidden, weight, targets, *rest, **extras):
    return fused(hidden, weight, dataclasses.replace(targets, labels_M=targets.labels_M.roll(1)), *rest, **extras)


def without_the_tail(fused, hidden, weight, targets, settings, **extras):
    return fused(hidden, weight, targets, dataclasses.replace(settings, tail="zero"), **extras)


MISTAKES = (without_squared_temperature, with_labels_of_the_next_row, without_the_tail)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_loss_is_refused_before_the_first_step(tmp_path, base, monkeypatch, mistake):
    monkeypatch.setattr(head, "distillation_loss", functools.partial(mistake, head.distillation_loss))
    with pytest.raises(PipelineError, match=r"the fused loss of 8 rows is .*, the dense formula .* gives"):
        run(base, tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"run.json"}


def larger_by_a_tenth(grad_logits, targets):
    grad_logits.mul_(1.1)


def without_the_first_entry(grad_logits, targets):
    grad_logits.scatter_(1, targets.ids_NK[:, :1], 0.0)


def without_the_rest(grad_logits, targets):
    kept = grad_logits.gather(1, targets.ids_NK)
    grad_logits.zero_().scatter_(1, targets.ids_NK, kept)


def kernel_with(mistake):
    """A kernel for the rows of a chunk that makes right values and a wrong gradient."""

    def rows(logits, labels, targets, settings, weights, gradient, tail):
        values = distillation_rows_(logits, labels, targets, settings, weights, torch.empty_like(logits), tail)
        if weights is not None:
            mistake(gradient, targets)
        return values

    return rows


@pytest.mark.parametrize("mistake", [larger_by_a_tenth, without_the_first_entry, without_the_rest])
@pytest.mark.parametrize("changes", [{}, {"dtype": "bfloat16"}, {"lora_rank": 4, "lora_head": True}])
def test_wrong_gradient_of_the_kernel_is_refused_before_the_first_step(tmp_path, base, monkeypatch, mistake, changes):
    monkeypatch.setattr(fused_head, "_row_kernel", lambda logits: kernel_with(mistake))
    with pytest.raises(
        PipelineError, match="the fused loss has another gradient for the hidden states of the head than"
    ):
        run(base, tmp_path / "run", **changes)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"run.json"}


def test_gradient_of_the_head_is_looked_at_beside_that_of_the_hidden_states(tmp_path, base, monkeypatch):
    accumulate = fused_head._accumulate_gradients

    def wrong(pair, *args):
        accumulate(pair, *args)
        if pair.grad_weight_VH is not None:
            pair.grad_weight_VH.mul_(1.1)

    monkeypatch.setattr(fused_head, "_accumulate_gradients", wrong)
    with pytest.raises(PipelineError, match="the fused loss has another gradient for the head than the dense formula"):
        run(base, tmp_path / "run")


def test_spike_is_written_with_the_keys_of_its_step(tmp_path, base, monkeypatch):
    """Twenty steps make the history; a loss thirty times as high in the next is one."""
    bad_step = MIN_HISTORY + 1

    def look(trainer):
        if trainer.state.global_step + 1 == bad_step:
            trainer._step_terms = 30 * trainer._step_terms

    before_each_step(monkeypatch, look)
    shape = {"batch_size": 2, "gradient_accumulation": 3}
    steps = run(base, tmp_path / "run", max_steps=bad_step + 1, on_bad_loss="skip", **shape)
    (entry,) = map(json.loads, (tmp_path / "run" / "bad_steps.jsonl").read_text().splitlines())
    cache = open_cache(base.cache[0])
    sampler = StreamSampler(len(cache), base.seed, StepShape(batch_size=2, accumulation=3), bad_step)
    keys = [cache[sampler.sequence_at(6 * (bad_step - 1) + place)].key.hex() for place in range(6)]
    assert (entry["step"], entry["action"], entry["keys"]) == (bad_step, "skipped", keys)
    assert f"the median of {MIN_HISTORY} steps is" in entry["problem"]
    assert [step["step"] for step in steps if step["loss"] is None] == [bad_step]
