"""Stage two with --tail sketch: in the model, in a run, in its checkpoints and in its held-out metrics."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import LlamaForCausalLM

from pipeline import open_cache
from pipeline.approximate import approximated
from pipeline.errors import ConfigError, PipelineError
from stages.train_student.agreement import require_agreement
from stages.train_student.dataset import Collate
from stages.train_student.divergences import DIVERGENCES
from stages.train_student.head import attach_fused_loss
from stages.train_student.lora import add_adapters
from stages.train_student.loss_settings import LossSettings
from stages.train_student.run import train_student
from stages.train_student.sampler import StepShape, StreamSampler
from stages.train_student.settings import TrainConfig
from stages.train_student.sketch import SketchHead
from stages.train_student.student import read_student
from tests.support.oracle import softmax
from tests.support.sketched import rebuilt
from tests.support.small import llama_config, make_cache, true_logits
from tests.test_train_models import student_folder


@pytest.fixture
def cache(sketched):
    return sketched["arrow"].out


def config_of(tmp_path, cache, **changes):
    student = student_folder(tmp_path / "student", cache, "llama")
    values = {"max_steps": 12, "batch_size": 8, "learning_rate": 1e-2, "log_steps": 1, "save_steps": 6}
    return TrainConfig(student=student, cache=cache, out=tmp_path / "run", tail="sketch", **values | changes)


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_loss_in_the_model_equals_the_dense_one(cache, divergence, softcap):
    """Packing, padding, padded vocabulary; hidden states and head in float64."""
    known = open_cache(cache)
    decoder = dataclasses.replace(known.sketch, softcap=softcap)
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(known.manifest.vocab_size + 11, num_hidden_layers=1)).double()
    settings = LossSettings(alpha=1.0, vocab_size=known.manifest.vocab_size, tail="sketch", divergence=divergence)
    sketch = SketchHead.of_cache(decoder)
    attach_fused_loss(model, settings, sketch=sketch)
    sequences = [known[index] for index in (3, 8, 1)]
    batch = Collate(settings)(sequences)
    del batch["keys"]
    values = []
    for sequence, ids, positions in zip(sequences, batch["input_ids"], batch["position_ids"]):
        with torch.no_grad():
            logits = model(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits[0]
        q = softmax(logits[sequence.target_positions, : known.manifest.vocab_size].numpy(), 2.0)
        p = rebuilt(decoder, sequence, 2.0)
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


def test_adapted_head_agrees_with_the_dense_loss(cache):
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


def dense_losses(folder, cache, indexes, temperature=2.0):
    """Mean cross-entropy and KL(p-hat_T || q_T) of the targets of some sequences, by the student in a folder."""
    cross_entropies, divergences = [], []
    for sequence in map(cache.__getitem__, indexes):
        logits = true_logits(folder, sequence, cache.manifest.vocab_size)
        sequence = dataclasses.replace(sequence, targets=approximated(sequence.targets, cache.sketch, temperature))
        p, q = rebuilt(cache.sketch, sequence, temperature), softmax(logits, temperature)
        labels = sequence.token_ids[sequence.target_positions + 1]
        cross_entropies += list(-np.log(softmax(logits, 1.0)[np.arange(len(labels)), labels]))
        divergences += list((p * np.log(p / q)).sum(1))
    return np.mean(cross_entropies), np.mean(divergences)


def first_batch(config, cache):
    """Indexes of the sequences of a training's first step."""
    shape = StepShape(batch_size=config.batch_size, accumulation=1, rank=0, world_size=1)
    return next(iter(StreamSampler(len(cache), config.seed, shape, config.max_steps)))


def test_run_learns_and_keeps_the_sketch_out_of_its_checkpoints(tmp_path, cache):
    """And its first loss and its held-out metrics are those of float64, over the whole vocabulary."""
    config = config_of(tmp_path, cache, eval_cache=cache, alpha=0.9)
    known, untrained = open_cache(cache), tmp_path / "untrained"
    read_student(config.student, known).load(config.seed).save_pretrained(untrained)
    cross_entropy, kl = dense_losses(untrained, known, first_batch(config, known))
    metrics = train_student(config)
    first = json.loads((config.out / "log.jsonl").read_text().splitlines()[0])
    assert first["kl"] == pytest.approx(kl, rel=1e-5)
    assert first["loss"] == pytest.approx(0.1 * cross_entropy + 0.9 * 4 * kl, rel=1e-5)
    assert metrics["eval_kl_sketch_2"] < 0.95 * dense_losses(untrained, known, range(len(known)))[1]
    for temperature in (1, 2):
        divergences = []
        for sequence in known:
            q = softmax(true_logits(config.out, sequence, known.manifest.vocab_size), temperature)
            p = rebuilt(known.sketch, sequence, temperature)
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


def test_other_tails_train_and_are_measured_as_before(tmp_path, cache):
    config = config_of(tmp_path, cache, eval_cache=cache, max_steps=2)
    metrics = train_student(dataclasses.replace(config, tail="ghost"))
    assert "eval_kl_2" in metrics
    assert not [name for name in metrics if "sketch" in name]


def test_cache_without_a_sketch_is_refused_in_one_line(tmp_path, corpus):
    cache = make_cache(tmp_path / "cache", corpus)
    with pytest.raises(
        ConfigError, match=r"holds no sketch of the tail, which tail 'sketch' needs; .* --tail-rank"
    ) as info:
        train_student(config_of(tmp_path, cache))
    assert "\n" not in str(info.value)
    assert not (tmp_path / "run").exists()


def test_temperature_that_was_not_captured_is_trained_at_only_where_asked_for(tmp_path, cache, corpus, caplog):
    """And is said to be approximate: in a note, in the metrics and in the report."""
    config = config_of(tmp_path, cache, temperature=1.5, eval_cache=cache, max_steps=1, alpha=1.0)
    with pytest.raises(ConfigError, match=r"exact at: 1, 2\. --approximate-temperature trains at others"):
        train_student(config)
    config = dataclasses.replace(config, approximate_temperature=True)
    plain = make_cache(tmp_path / "plain", corpus)
    with pytest.raises(ConfigError, match=r"exact at: 1, 2\. It holds no sketch"):
        train_student(dataclasses.replace(config, cache=plain))
    known, untrained = open_cache(cache), tmp_path / "untrained"
    read_student(config.student, known).load(config.seed).save_pretrained(untrained)
    metrics = train_student(config)
    first = json.loads((config.out / "log.jsonl").read_text().splitlines()[0])
    _, kl = dense_losses(untrained, known, first_batch(config, known), 1.5)
    assert first["loss"] == pytest.approx(1.5**2 * kl, rel=1e-5)
    _, trained = dense_losses(config.out, known, range(len(known)), 1.5)
    assert metrics["eval_kl_sketch_1.5"] == pytest.approx(trained, rel=1e-4)
    assert metrics["approximate_temperature"] == 1.5
    assert "T=1.5 was not captured; targets and metrics there are approximate" in caplog.text
    assert "Targets at T = 1.5 are approximate" in (config.out / "report.html").read_text()
    exact = dataclasses.replace(config, temperature=2.0, out=tmp_path / "exact")
    assert "approximate_temperature" not in train_student(exact)
    assert caplog.text.count("was not captured") == 1
