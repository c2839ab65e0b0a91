"""Stage two with --tail sketch: in the model, in a run, in its checkpoints and in its held-out metrics."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import LlamaForCausalLM

from pipeline import open_cache
from pipeline.errors import ConfigError, PipelineError
from stages.train_student.agreement import require_agreement
from stages.train_student.dataset import Collate
from stages.train_student.divergences import DIVERGENCES
from stages.train_student.head import attach_fused_loss
from stages.train_student.lora import add_adapters
from stages.train_student.loss_settings import LossSettings
from stages.train_student.run import train_student
from stages.train_student.settings import TrainConfig
from stages.train_student.sketch import SketchHead
from tests.support.oracle import softmax
from tests.support.sketched import coefficients_of, sketch_caches, sketch_of
from tests.support.small import llama_config, make_cache, true_logits
from tests.test_train_models import student_folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory, corpus):
    return make_cache(tmp_path_factory.mktemp("cache"), corpus, max_kl_error=0.0)


def rebuilt(cache, sequence, temperature):
    """float64 [N, V]: p-hat_T of a sequence's targets, from the formula."""
    sketch, targets = sketch_of(cache), sequence.targets
    p = np.zeros((len(targets), cache.manifest.vocab_size))
    for row, coefficients in enumerate(coefficients_of(sequence)):
        logits = sketch.basis.astype(np.float64) @ coefficients + sketch.offset
        logits = sketch.softcap * np.tanh(logits / sketch.softcap)
        rest = np.setdiff1d(np.arange(p.shape[1]), targets.ids[row])
        p[row, rest] = targets.tail_mass(temperature)[row] * softmax(logits[None, rest], temperature)[0]
        p[row, targets.ids[row]] = targets.probs(temperature)[row]
    return p


def config_of(tmp_path, cache, **changes):
    student = student_folder(tmp_path / "student", cache, "llama")
    values = {"max_steps": 12, "batch_size": 8, "learning_rate": 1e-2, "log_steps": 1, "save_steps": 6}
    return TrainConfig(student=student, cache=cache, out=tmp_path / "run", tail="sketch", **values | changes)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_loss_in_the_model_equals_the_dense_one(cache, monkeypatch, divergence):
    """Packing, padding, padded vocabulary; hidden states and head in float64."""
    sketch_caches(monkeypatch)
    known = open_cache(cache)
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(known.manifest.vocab_size + 11, num_hidden_layers=1)).double()
    settings = LossSettings(alpha=1.0, vocab_size=known.manifest.vocab_size, tail="sketch", divergence=divergence)
    sketch = SketchHead.of_cache(known.sketch)
    attach_fused_loss(model, settings, sketch=sketch)
    sequences = [known[index] for index in (3, 8, 1)]
    batch = Collate(settings)(sequences)
    del batch["keys"]
    values = []
    for sequence, ids, positions in zip(sequences, batch["input_ids"], batch["position_ids"]):
        with torch.no_grad():
            logits = model(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits[0]
        q = softmax(logits[sequence.target_positions, : known.manifest.vocab_size].numpy(), 2.0)
        p = rebuilt(known, sequence, 2.0)
        mean = (p + q) / 2
        values += {
            "forward": list((p * np.log(p / q)).sum(1)),
            "reverse": list((q * np.log(q / p)).sum(1)),
            "js": list((p * np.log(p / mean) + q * np.log(q / mean)).sum(1) / 2),
        }[divergence]
    assert model(**batch).loss.item() == pytest.approx(4 * np.mean(values), rel=1e-5)
    one = Collate(settings)([known[3]])
    del one["keys"]
    require_agreement(model, one, settings, sketch=sketch)
    other = SketchHead(0 * sketch.weight_SP, sketch.vocab_size, sketch.softcap)
    with pytest.raises(PipelineError, match="the fused loss of 8 rows is"):  # the check sees the sketch
        require_agreement(model, one, settings, sketch=other)


def test_adapted_head_agrees_with_the_dense_loss(cache, monkeypatch):
    sketch_caches(monkeypatch)
    known = open_cache(cache)
    model = add_adapters(LlamaForCausalLM(llama_config(known.manifest.vocab_size)), rank=3, alpha=6.0, on_head=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    for divergence in DIVERGENCES:
        settings = LossSettings(vocab_size=known.manifest.vocab_size, tail="sketch", divergence=divergence)
        sketch, base = SketchHead.of_cache(known.sketch), model.get_base_model()
        attach_fused_loss(base, settings, sketch=sketch)
        batch = Collate(settings)([known[3]])
        del batch["keys"]
        require_agreement(model, batch, settings, sketch=sketch)


def test_run_learns_and_keeps_the_sketch_out_of_its_checkpoints(tmp_path, cache, monkeypatch):
    """And its held-out metric is that of float64, over the whole vocabulary."""
    sketch_caches(monkeypatch)
    config = config_of(tmp_path, cache, eval_cache=cache)
    metrics = train_student(config)
    log = [json.loads(line) for line in (config.out / "log.jsonl").read_text().splitlines()]
    steps = [entry["kl"] for entry in log if "kl" in entry]
    assert steps[-1] < 0.9 * steps[0]
    known = open_cache(cache)
    for temperature in (1, 2):
        divergences = []
        for sequence in known:
            q = softmax(true_logits(config.out, sequence, known.manifest.vocab_size), temperature)
            p = rebuilt(known, sequence, temperature)
            divergences += list((p * np.log(p / q)).sum(1))
        assert metrics[f"eval_kl_sketch_{temperature}"] == pytest.approx(np.mean(divergences), rel=1e-4)
        assert 0 < metrics[f"eval_kl_{temperature}"] < metrics[f"eval_kl_sketch_{temperature}"]
    (newest,) = (config.out / "checkpoints").glob("*-12")
    written = list(newest.rglob("*.safetensors")) + list(config.out.glob("*.safetensors"))
    assert len(written) > 1
    for path in written:
        with safe_open(path, "pt") as file:
            assert not [name for name in file.keys() if "sketch" in name]  # noqa: SIM118
    (config.out / "metrics.json").unlink()  # as if killed before it
    assert train_student(config)["eval_kl_sketch_2"] == pytest.approx(metrics["eval_kl_sketch_2"], rel=1e-6)


def test_other_tails_train_and_are_measured_as_before(tmp_path, cache, monkeypatch):
    sketch_caches(monkeypatch)
    config = config_of(tmp_path, cache, eval_cache=cache, max_steps=2)
    metrics = train_student(dataclasses.replace(config, tail="ghost"))
    assert "eval_kl_2" in metrics
    assert not [name for name in metrics if "sketch" in name]


def test_cache_without_a_sketch_is_refused_in_one_line(tmp_path, cache):
    with pytest.raises(
        ConfigError, match=r"holds no sketch of the tail, which tail 'sketch' needs; .* --tail-rank"
    ) as info:
        train_student(config_of(tmp_path, cache))
    assert "\n" not in str(info.value)
    assert not (tmp_path / "run").exists()
