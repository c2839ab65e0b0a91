"""Libraries that have changed: what stage two relied on is an error that names it, never a silence."""

import os
from types import SimpleNamespace

import peft
import pytest
import torch
from transformers import Trainer

from pipeline import open_cache
from pipeline.errors import PipelineError
from stages.train_student import lora
from stages.train_student.compat import accelerate_hooks, peft_hooks, torch_hooks, transformers_hooks
from stages.train_student.dataset import Collate
from stages.train_student.head import attach_fused_loss
from stages.train_student.loss_settings import LossSettings
from stages.train_student.run import train_student
from stages.train_student.settings import TrainConfig
from stages.train_student.trainer import DistillationTrainer, _StepHooks
from tests.support.kinds import kind_model
from tests.support.small import llama_config, make_cache


@pytest.fixture(scope="module")
def cache(tmp_path_factory, corpus):
    return make_cache(tmp_path_factory.mktemp("cache"), corpus)


@pytest.fixture
def config(tmp_path, cache):
    """A run of two steps."""
    llama_config(open_cache(cache).manifest.vocab_size, num_hidden_layers=1).save_pretrained(tmp_path / "student")
    student = tmp_path / "student" / "config.json"
    return TrainConfig(student=student, cache=cache, out=tmp_path / "run", max_steps=2, batch_size=2, save_steps=1)


@pytest.mark.parametrize("name", ["_get_grad_norm", "_save_checkpoint", "create_accelerator_and_postprocess"])
def test_method_that_the_trainer_has_no_more_is_named_before_anything_is_loaded(config, monkeypatch, name):
    monkeypatch.delattr(Trainer, name)
    with pytest.raises(
        PipelineError, match=rf"transformers [\d.]+: Trainer\.{name}: is gone\. .* tried with transformers 5"
    ):
        train_student(config)
    assert not config.out.exists()


@pytest.mark.parametrize(
    ("owner", "name", "hook"),
    [
        (
            DistillationTrainer,
            "_get_grad_norm",
            "Trainer._get_grad_norm: was not called: a gradient that is not finite",
        ),
        (DistillationTrainer, "_save_checkpoint", "Trainer._save_checkpoint: was not called: a full disk"),
        (DistillationTrainer, "get_batch_samples", "Trainer.get_batch_samples: was not called: nothing counted"),
        (
            DistillationTrainer,
            "create_accelerator_and_postprocess",
            "Trainer.create_accelerator_and_postprocess: was not",
        ),
        (_StepHooks, "on_pre_optimizer_step", "on_pre_optimizer_step: was not called: a bad step would not be noticed"),
    ],
)
def test_method_that_the_trainer_calls_no_more_is_named(config, monkeypatch, owner, name, hook):
    """As if it were called by another name: ours is not there."""
    monkeypatch.delattr(owner, name)
    with pytest.raises(PipelineError, match=hook):
        train_student(config)
    assert not (config.out / "metrics.json").exists()


def test_trainer_that_would_divide_by_the_micro_batches_again_is_refused():
    with pytest.raises(PipelineError, match="model_accepts_loss_kwargs: is gone"):
        transformers_hooks.count_tokens_once(SimpleNamespace())


def test_gpus_that_would_become_data_parallel_are_refused():
    with pytest.raises(PipelineError, match="_n_gpu: has no effect; DataParallel would be taken"):
        transformers_hooks.one_gpu_a_process(SimpleNamespace(n_gpu=2))


def test_setting_of_fsdp_that_is_passed_over_is_refused():
    handed_on = {
        "fsdp_version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "reshard_after_forward": "true",
        "state_dict_type": "SHARDED_STATE_DICT",
        "cpu_ram_efficient_loading": False,
    }
    transformers_hooks.require_sharding(SimpleNamespace(fsdp_plugin_args=handed_on), "fsdp2")
    transformers_hooks.require_sharding(SimpleNamespace(fsdp_plugin_args=None), "none")
    for other in (handed_on | {"state_dict_type": "FULL_STATE_DICT"}, None):
        with pytest.raises(PipelineError, match=r"fsdp_plugin_args: is .*'state_dict_type'.* differ"):
            transformers_hooks.require_sharding(SimpleNamespace(fsdp_plugin_args=other), "fsdp2")


def test_accelerate_that_speaks_of_precision_otherwise_or_does_not_shard_is_refused(monkeypatch):
    with pytest.raises(PipelineError, match="mixed_precision: is 'bfloat16', expected one of no, bf16, fp16"):
        accelerate_hooks.insist_on_fsdp(SimpleNamespace(mixed_precision="bfloat16"), {"fsdp_version": 2})
    with pytest.raises(PipelineError, match="fsdp_plugin: has no effect; the model is not sharded"):
        accelerate_hooks.require_sharded(torch.nn.Linear(2, 2))
    monkeypatch.delattr(accelerate_hooks.AcceleratorState, "_reset_state")
    with pytest.raises(PipelineError, match="_reset_state: is gone"):
        accelerate_hooks.require()


def adapted(cache):
    model = kind_model("llama", open_cache(cache).manifest.vocab_size, tie_word_embeddings=False)
    return model, lora.add_adapters(model, rank=2, alpha=4.0, on_head=True)


def rename(layer, name):
    setattr(layer, f"new_{name}", getattr(layer, name))
    delattr(layer, name)


@pytest.mark.parametrize("name", ["lora_A", "lora_B", "scaling"])
def test_adapter_of_the_head_that_is_named_otherwise_is_never_left_out_of_the_loss(cache, name):
    base, model = adapted(cache)
    settings = LossSettings(vocab_size=open_cache(cache).manifest.vocab_size)
    attach_fused_loss(base, settings)
    batch = Collate(settings)([open_cache(cache)[3]])
    del batch["keys"]
    assert model(**batch).loss.isfinite()
    rename(base.get_output_embeddings(), name)
    with pytest.raises(
        PipelineError, match=rf"peft [\d.]+: Linear\.{name}: is gone; its adapter would not be in the loss"
    ):
        model(**batch)


def test_adapters_that_are_named_otherwise_are_refused_as_they_are_added(cache, monkeypatch):
    get = peft.get_peft_model

    def renamed(model, config):
        found = get(model, config)
        rename(model.get_output_embeddings(), "lora_A")
        return found

    monkeypatch.setattr(peft, "get_peft_model", renamed)
    with pytest.raises(PipelineError, match=r"Linear\.lora_A: is gone"):
        adapted(cache)


def test_weight_without_the_adapter_that_was_asked_for_is_named(cache, monkeypatch):
    get = peft.get_peft_model

    def forgetful(model, config):
        config.target_modules = [name for name in config.target_modules if "up_proj" not in name]
        return get(model, config)

    monkeypatch.setattr(peft, "get_peft_model", forgetful)
    with pytest.raises(PipelineError, match=r"get_peft_model: \d+ weights got no adapter, such as .*up_proj\.weight"):
        adapted(cache)


def test_peft_that_passes_over_what_it_is_asked_is_refused(monkeypatch):
    monkeypatch.setattr(peft.PeftModel, "save_pretrained", lambda self, folder, **kwargs: None)
    with pytest.raises(PipelineError, match=r"save_pretrained\(save_embedding_layers\): is gone"):
        peft_hooks.require()


def test_torch_that_does_not_heed_weights_only_reads_no_checkpoint(monkeypatch):
    with torch_hooks.weights_only():
        assert os.environ[torch_hooks.WEIGHTS_ONLY] == "1"
    monkeypatch.setattr(torch, "load", lambda file, weights_only: os.getcwd)
    with (
        pytest.raises(PipelineError, match=r"torch .*: TORCH_FORCE_WEIGHTS_ONLY_LOAD: is not heeded"),
        torch_hooks.weights_only(),
    ):
        pass
    assert torch_hooks.WEIGHTS_ONLY not in os.environ
