"""Students with experts, and parts of students that are not trained: adapters, balancing, and what is said."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline import open_cache
from pipeline.errors import ConfigError
from pipeline.progress import KeptLines
from stages.train_student.agreement import dense_loss
from stages.train_student.compat.peft_hooks import merged
from stages.train_student.coverage import coverage_notes
from stages.train_student.dataset import Collate
from stages.train_student.gradients import WATCHED_STEPS, GradientWatch
from stages.train_student.head import attach_fused_loss
from stages.train_student.lora import add_adapters
from stages.train_student.loss_settings import LossSettings
from stages.train_student.routers import router_loss
from stages.train_student.run import train_student
from stages.train_student.settings import TrainConfig
from stages.train_student.targets import DistillationTargets
from tests.support.kinds import kind_model, kind_student
from tests.support.small import make_cache

VOCAB = 90


@pytest.fixture(scope="module")
def cache(tmp_path_factory, corpus):
    return make_cache(tmp_path_factory.mktemp("cache"), corpus, max_kl_error=0.0)


@pytest.fixture
def batch(cache):
    batch = Collate(LossSettings(vocab_size=vocab_of(cache)))([open_cache(cache)[index] for index in (3, 8)])
    del batch["keys"]
    return batch


def vocab_of(cache):
    return open_cache(cache).manifest.vocab_size


def logits_of(model, batch):
    tokens = {name: batch[name] for name in ("input_ids", "position_ids")}
    return model(**tokens, use_cache=False).logits.flatten(0, 1)[batch["target_rows"]]


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "llama4_text", "deepseek_v3", "gpt2"])
def test_adapted_experts_train_as_in_the_merged_model(cache, batch, kind):
    """In float64: values of the merged weights; gradients of the factors by the dense formula on the model's logits."""
    model = kind_model(kind, vocab_of(cache), dtype="float64")
    base, settings = model, LossSettings(vocab_size=vocab_of(cache))
    targets = DistillationTargets.of_batch(batch)
    plain = {name: parameter.clone() for name, parameter in base.named_parameters()}
    model = add_adapters(model, rank=2, alpha=4.0, on_head=False).double()
    attach_fused_loss(base, settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    out = model(**batch)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grads = [
        torch.autograd.grad(loss, trained)
        for loss in (out.loss, dense_loss(logits_of(model, batch), targets, settings))
    ]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    after = merged(model)
    changed = {name for name, parameter in after.named_parameters() if not torch.equal(parameter, plain[name])}
    stacks = {name for name, parameter in plain.items() if parameter.ndim == 3}
    assert stacks <= changed
    assert {name for name in plain if "shared_expert" in name or name.endswith("c_fc.weight")} <= changed
    assert dense_loss(logits_of(after, batch), targets, settings).item() == pytest.approx(out.loss.item(), rel=1e-9)


def test_note_counts_what_adapters_change_and_names_what_stays():
    model = kind_model("qwen3_moe", VOCAB)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    (note,) = coverage_notes(add_adapters(model, rank=2, alpha=4.0, on_head=False))
    frozen = {name: size for name, size in sizes.items() if "proj" not in name}
    share = 1 - sum(frozen.values()) / sum(sizes.values())
    assert note.startswith(f"adapters change {share:.2%} of the weights; as they are stay: ")
    gates = sum(size for name, size in frozen.items() if name.endswith("mlp.gate.weight")) / sum(sizes.values())
    assert f"model.layers.*.mlp.gate.weight {gates:.2%}" in note
    assert coverage_notes(kind_model("qwen3_moe", VOCAB)) == []


def test_weights_that_the_class_freezes_are_named():
    model = kind_model("llama", VOCAB)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    (note,) = coverage_notes(model)
    assert "training changes" in note
    assert "as they are stay: model.layers.*.mlp.up_proj.weight" in note


def test_weight_that_two_layers_share_gets_no_adapter():
    """Both adapters would be merged into it."""
    model = kind_model("llama", VOCAB, tie_word_embeddings=False)
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    adapted = add_adapters(model, rank=2, alpha=4.0, on_head=False)
    assert not any("up_proj.lora" in name for name, _ in adapted.named_parameters())
    assert any("down_proj.lora" in name for name, _ in adapted.named_parameters())


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_balancing_loss_is_that_of_the_models_own_forward(kind, one_by_one):
    model = kind_model(kind, VOCAB)
    router, note = router_loss(model, None)
    assert "is added with weight 0.001" in note
    ids = torch.randint(1, VOCAB, (1, 20), generator=torch.Generator().manual_seed(1))
    plain, balanced = (
        model(input_ids=ids, labels=ids, output_router_logits=flag, use_cache=False) for flag in (False, True)
    )
    own = (balanced.loss - plain.loss).item() / router.weight
    gate = next(
        parameter for name, parameter in model.named_parameters() if name.endswith(("gate.weight", "router.weight"))
    )
    (expected,) = torch.autograd.grad(balanced.aux_loss, gate)
    attach_fused_loss(model, LossSettings(vocab_size=VOCAB, alpha=0.0), router)
    model.one_by_one = one_by_one
    rows = torch.arange(19)
    out = model(
        input_ids=ids,
        position_ids=torch.arange(20)[None],
        target_rows=rows,
        shift_labels=ids[0, 1:],
    )
    assert out.router_loss.item() == pytest.approx(own, rel=1e-4)
    assert out.loss.item() == pytest.approx(balanced.loss.item(), rel=1e-5)
    (ours,) = torch.autograd.grad((out.loss - 0 * out.loss), gate, retain_graph=True)
    (tokens,) = torch.autograd.grad(plain.loss, gate)
    torch.testing.assert_close(ours - tokens, router.weight * expected, rtol=1e-2, atol=1e-7)


def test_balancing_losses_of_micro_batches_are_weighed_by_their_target_tokens(cache):
    """Padding takes no part: of a padded batch it is that of the documents."""
    model = kind_model("qwen3_moe", vocab_of(cache))
    router, _ = router_loss(model, 0.5)
    settings = LossSettings(vocab_size=vocab_of(cache))
    attach_fused_loss(model, settings, router)
    parts = [Collate(settings)([open_cache(cache)[index]]) for index in (3, 8)]
    alone = [model(**{k: v for k, v in part.items() if k != "keys"}).router_loss.item() for part in parts]
    sizes = [len(part["target_rows"]) for part in parts]
    step = [model(**{k: v for k, v in part.items() if k != "keys"}, num_items_in_batch=sum(sizes)) for part in parts]
    expected = sum(size * value for size, value in zip(sizes, alone)) / sum(sizes)
    assert sum(out.router_loss.item() for out in step) == pytest.approx(expected, rel=1e-6)
    terms = sum((0.5 * out.cross_entropy + 0.5 * 4 * out.kl).item() for out in step)
    assert sum(out.loss.item() for out in step) == pytest.approx(terms + 0.5 * expected, rel=1e-6)
    both = Collate(settings)([open_cache(cache)[index] for index in (3, 8)])
    lengths = [len(open_cache(cache)[index].token_ids) for index in (3, 8)]
    assert lengths[0] != lengths[1]
    logits = []
    for part in parts:
        tokens = {name: part[name] for name in ("input_ids", "position_ids")}
        logits.append(model.model(**tokens, output_router_logits=True, use_cache=False).router_logits)
    whole = router(tuple(torch.cat(layer) for layer in zip(*logits))).item()
    for model.one_by_one in (False, True):
        found = model(**{k: v for k, v in both.items() if k != "keys"}).router_loss.item()
        assert found == pytest.approx(whole, rel=1e-5)


def test_kinds_without_a_balancing_loss_say_so_and_dense_ones_nothing():
    router, note = router_loss(kind_model("deepseek_v3", VOCAB), None)
    assert router is None
    assert note.startswith("DeepseekV3ForCausalLM: transformers has no balancing loss for its experts")
    assert router_loss(kind_model("llama", VOCAB), None) == (None, None)
    assert router_loss(kind_model("qwen3_moe", VOCAB), 0.0)[0] is None
    assert router_loss(kind_model("qwen3_moe", VOCAB, router_aux_loss_coef=0.25), None)[0].weight == 0.25
    with pytest.raises(ConfigError, match="router_aux_loss is -1"):
        TrainConfig(student="s", cache="c", out="o", router_aux_loss=-1.0)


def adapted_run(folder, cache, **changes):
    student = kind_student(folder / "student", "qwen3_moe", vocab_of(cache))
    values = {"max_steps": 2, "batch_size": 4, "log_steps": 1, "save_steps": 100, "learning_rate": 1e-2}
    adapters = {"lora_rank": 2, "lora_alpha": 4.0, "router_aux_loss": 0.5}
    return TrainConfig(student=student, cache=cache, out=folder / "run", **values | adapters | changes)


def test_adapted_experts_are_balanced_and_both_are_said_and_logged(tmp_path, cache):
    config, notes = adapted_run(tmp_path, cache), KeptLines()
    train_student(config, notes)
    assert sum("adapters change" in line for line in notes.lines) == 1
    assert sum("added with weight 0.5" in line for line in notes.lines) == 1
    steps = [entry for entry in read_log(config) if "loss" in entry]
    assert len(steps) == 2
    for entry in steps:
        terms = 0.5 * entry["cross_entropy"] + 0.5 * 4 * entry["kl"]
        assert entry["loss"] == pytest.approx(terms + 0.5 * entry["router_loss"], rel=1e-5)
        assert entry["router_loss"] > 1
    assert not any("lora" in name for name in AutoModelForCausalLM.from_pretrained(config.out).state_dict())


@pytest.mark.slow
def test_adapted_experts_resume_to_the_bit(tmp_path, cache):
    whole = adapted_run(tmp_path, cache, max_steps=4, save_steps=2)
    train_student(whole)
    resumed = dataclasses.replace(whole, out=tmp_path / "resumed")
    train_student(resumed)
    (resumed.out / "metrics.json").unlink()
    (resumed.out / "checkpoints" / "checkpoint-4" / "whole.json").unlink()  # as if killed in the last save
    train_student(resumed)
    first, second = (AutoModelForCausalLM.from_pretrained(run.out).state_dict() for run in (whole, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)


def read_log(config):
    return [json.loads(line) for line in (config.out / "log.jsonl").read_text().splitlines()]


def test_parameters_without_a_gradient_are_named_once_after_the_first_steps():
    """One that gets its first gradient later, as an expert may, is none of them, nor is an adapter's first factor."""
    model = torch.nn.ModuleDict({"used": torch.nn.Linear(3, 3), "late": torch.nn.Linear(3, 3, bias=False)})
    model["never"], model["lora_A"] = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)
    watch, said = GradientWatch(), []
    for step in range(WATCHED_STEPS + 2):
        model.zero_grad()
        out = model["used"](torch.ones(3))
        (model["late"](out) if step == 2 else out).sum().backward()
        said.append(watch.look(model, 100, lambda flags: flags))
    assert [note is not None for note in said] == [step == WATCHED_STEPS - 1 for step in range(WATCHED_STEPS + 2)]
    assert said[WATCHED_STEPS - 1] == (
        "1 of 4 trained parameters, 16.00% of their weights, got no gradient in 5 steps: never.weight; "
        "nothing trains them."
    )


def test_part_that_a_students_forward_does_not_use_is_said(tmp_path, cache):
    """A cross-attention without an encoder."""
    student = kind_student(tmp_path / "student", "trocr", vocab_of(cache))
    values = {"max_steps": 2, "batch_size": 4, "log_steps": 1, "save_steps": 100, "learning_rate": 1e-3}
    notes = KeptLines()
    train_student(TrainConfig(student=student, cache=cache, out=tmp_path / "run", **values), notes)
    (line,) = [line for line in notes.lines if "got no gradient in 2 steps" in line]
    assert "encoder_attn" in line
