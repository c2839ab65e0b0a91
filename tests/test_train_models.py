"""Stage two over the kinds of students and held-out metrics: against dense float64, or refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline import open_cache
from pipeline.errors import ConfigError, PipelineError
from stages.train_student.agreement import dense_loss, require_agreement
from stages.train_student.compat.peft_hooks import merged
from stages.train_student.dataset import Collate
from stages.train_student.divergences import DIVERGENCES
from stages.train_student.evaluation import finish, measure_rows
from stages.train_student.head import attach_fused_loss
from stages.train_student.lora import add_adapters
from stages.train_student.loss_settings import LossSettings
from stages.train_student.run import train_student
from stages.train_student.settings import TrainConfig
from stages.train_student.student import read_student
from stages.train_student.tails import TAILS
from stages.train_student.targets import DistillationTargets
from tests.support.helpers import tiny_tokenizer
from tests.support.oracle import softmax
from tests.support.small import llama_config, make_cache, true_logits

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 96,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
KINDS = {
    "llama": {},
    "gemma2": {"head_dim": 32, "final_logit_softcapping": 0.5, "initializer_range": 0.3},
    "cohere": {"logit_scale": 0.25, "initializer_range": 0.3},
    "granite": {"logits_scaling": 4.0, "initializer_range": 0.3},
    "qwen3": {"head_dim": 32, "tie_word_embeddings": True},
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory, corpus):
    return make_cache(tmp_path_factory.mktemp("cache"), corpus, max_kl_error=0.0)


def student_folder(folder: Path, cache: Path, kind: str) -> Path:
    """The config.json of a small student of an architecture with padded vocabulary, and its tokenizer."""
    tiny_tokenizer(folder)
    vocab_size = open_cache(cache).manifest.vocab_size + 7
    AutoConfig.for_model(kind, **{"vocab_size": vocab_size} | SMALL | KINDS[kind]).save_pretrained(folder)
    return folder / "config.json"


def model_of(student, settings, **adapters):
    model = student.load(0).double()
    model = add_adapters(model, **adapters).double() if adapters else model
    attach_fused_loss(model.get_base_model() if adapters else model, settings)
    return model


def settings_of(student, cache, **changes):
    manifest = open_cache(cache).manifest
    factors = {"logit_scale": student.model.logit_scale, "logit_softcap": student.model.logit_softcap}
    return LossSettings(vocab_size=manifest.vocab_size, **factors, **changes)


def batch_of(cache, settings, indices=(3, 8)):
    batch = Collate(settings)([open_cache(cache)[index] for index in indices])
    del batch["keys"]
    return batch


def own_logits(model, batch, settings):
    """Of the target rows, as the model gives them without a hook; documents of a sequence do not see each other."""
    tokens = {name: batch[name] for name in ("input_ids", "position_ids")}
    logits = model(**tokens, use_cache=False).logits
    return logits.flatten(0, 1)[batch["target_rows"], : settings.vocab_size]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_every_kind_are_those_of_its_own_logits(tmp_path, cache, kind):
    """The reference is the untouched model's logits, whatever it does to them."""
    student = read_student(student_folder(tmp_path, cache, kind), open_cache(cache))
    settings = settings_of(student, cache)
    model, batch = model_of(student, settings), batch_of(cache, settings)
    out = model(**batch)
    expected = dense_loss(own_logits(model, batch, settings), DistillationTargets.of_batch(batch), settings)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-9)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    pairs = zip(torch.autograd.grad(out.loss, trained), torch.autograd.grad(expected, trained), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_packed_into_a_sequence_do_not_see_each_other(tmp_path, cache, kind):
    """All logits of a batch of packed and padded sequences are those of every document alone."""
    student = read_student(student_folder(tmp_path, cache, kind), open_cache(cache))
    model, batch = student.load(0).double(), batch_of(cache, settings_of(student, cache), indices := (3, 8, 1))
    sequences = [open_cache(cache)[index] for index in indices]
    assert max(len(sequence.document_lengths) for sequence in sequences) > 1
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        for row, sequence in enumerate(sequences):
            documents = torch.tensor(sequence.token_ids.astype(np.int64)).split(sequence.document_lengths.tolist())
            alone = torch.cat([model(document[None]).logits[0] for document in documents])
            torch.testing.assert_close(packed[row, : len(alone)], alone, rtol=1e-9, atol=1e-9)
            crossing = model(torch.cat(documents)[None]).logits[0]
            assert (len(documents) == 1) == torch.allclose(crossing, alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("on_head", [False, True])
def test_adapters_train_as_in_the_merged_model(tmp_path, cache, on_head):
    """Values of the merged weights, gradients of the adapters alone; the head's is frozen or has its own."""
    student = read_student(student_folder(tmp_path, cache, "granite"), open_cache(cache))
    settings = settings_of(student, cache)
    model = model_of(student, settings, rank=3, alpha=6.0, on_head=on_head)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    batch = batch_of(cache, settings)
    out = model(**batch)
    expected = dense_loss(own_logits(model, batch, settings), DistillationTargets.of_batch(batch), settings)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in trained)
    assert any("lm_head" in name for name in trained) == on_head
    grads = (torch.autograd.grad(loss, list(trained.values())) for loss in (out.loss, expected))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    merged_loss = dense_loss(own_logits(merged(model), batch, settings), DistillationTargets.of_batch(batch), settings)
    assert merged_loss.item() == pytest.approx(out.loss.item(), rel=1e-9)


def test_adapted_student_is_written_merged_and_continues(tmp_path, cache):
    values = {"max_steps": 40, "batch_size": 8, "learning_rate": 1e-2, "log_steps": 1, "save_steps": 30}
    adapters = {"lora_rank": 4, "lora_alpha": 8.0, "lora_head": True, "eval_cache": cache}
    student = student_folder(tmp_path / "student", cache, "llama")
    config = TrainConfig(student=student, cache=cache, out=tmp_path / "run", **values, **adapters)
    metrics = train_student(config)
    log = [json.loads(line) for line in (config.out / "log.jsonl").read_text().splitlines()]
    steps = [entry for entry in log if "loss" in entry]
    assert steps[-1]["loss"] < 0.9 * steps[0]["loss"]
    assert "adapter_model.safetensors" in {path.name for path in (config.out / "checkpoints").rglob("*")}
    model = AutoModelForCausalLM.from_pretrained(config.out).double()
    assert not any("lora" in name for name, _ in model.named_parameters())
    sequence = open_cache(cache)[0]
    ids = torch.tensor(sequence.token_ids[: sequence.document_lengths[0]].astype(np.int64))[None]
    assert model(ids).logits.isfinite().all()
    (config.out / "metrics.json").unlink()  # as if killed before it: the finished checkpoint gives the same student
    again = train_student(config)
    assert again["eval_cross_entropy"] == pytest.approx(metrics["eval_cross_entropy"], rel=1e-6)


def test_adapter_on_a_tied_head_is_refused(tmp_path, cache):
    student = student_folder(tmp_path / "student", cache, "qwen3")
    config = TrainConfig(student=student, cache=cache, out=tmp_path / "run", lora_rank=4, lora_head=True)
    with pytest.raises(ConfigError, match="its head is tied to the embeddings; train it without --lora-head"):
        train_student(config)


def test_model_that_changes_its_logits_otherwise_is_refused_before_the_first_step(tmp_path, cache):
    student = read_student(student_folder(tmp_path, cache, "cohere"), open_cache(cache))
    known = settings_of(student, cache)
    batch = batch_of(cache, known, [3])
    require_agreement(model_of(student, known), batch, known)
    for divergence in DIVERGENCES:
        other = settings_of(student, cache, divergence=divergence)
        require_agreement(model_of(student, other), batch, other)
    for tail in (name for name, tail in TAILS.items() if not tail.is_drawn and not tail.is_sketched):
        other = settings_of(student, cache, tail=tail)
        require_agreement(model_of(student, other), batch, other)
    unknown = LossSettings(vocab_size=known.vocab_size)
    with pytest.raises(PipelineError, match="it does something to its logits that the fused loss does not know"):
        require_agreement(model_of(student, unknown), batch, unknown)


def test_special_tokens_outside_the_vocabulary_are_refused(tmp_path, cache):
    path = student_folder(tmp_path / "student", cache, "llama")
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"eos_token_id": [0, 99_999]}))
    with pytest.raises(ConfigError, match="eos_token_id is 99999, outside its vocabulary of"):
        read_student(path, open_cache(cache))


def test_held_out_metrics_are_those_of_float64(tmp_path, cache):
    """Every one of them from the written student's own logits, by numpy."""
    values = {"max_steps": 30, "batch_size": 8, "learning_rate": 1e-2, "save_steps": 100}
    student = student_folder(tmp_path / "student", cache, "llama")
    config = TrainConfig(student=student, cache=cache, out=tmp_path / "run", eval_cache=cache, **values)
    metrics = train_student(config)
    known = open_cache(cache)
    vocab_size = known.manifest.vocab_size
    columns = {name: [] for name in ("label", "agrees", "low", "high", "confidence", "correct", "kl_1", "kl_2")}
    for sequence in known:
        labels = sequence.token_ids[sequence.target_positions + 1]
        logits = true_logits(config.out, sequence, vocab_size)
        ids, rows = sequence.targets.ids, np.arange(len(logits))
        q = softmax(logits, 1.0)
        p, tail = sequence.targets.probs(1.0).astype(np.float64), sequence.targets.tail_mass(1.0).astype(np.float64)
        kept = np.take_along_axis(q, ids, 1)
        low = np.minimum(p, kept).sum(1)
        columns["label"] += list(-np.log(q[rows, labels]))
        columns["agrees"] += list(q.argmax(1) == ids[:, 0])
        columns["low"] += list(low)
        columns["high"] += list(low + np.minimum(tail, 1 - kept.sum(1)))
        columns["confidence"] += list(q.max(1))
        columns["correct"] += list(q.argmax(1) == labels)
        for temperature in (1, 2):
            q_T, p_T = softmax(logits, temperature), sequence.targets.probs(temperature).astype(np.float64)
            t = sequence.targets.tail_mass(temperature).astype(np.float64)
            kept_T = np.take_along_axis(q_T, ids, 1)
            kl = (p_T * np.log(p_T / kept_T)).sum(1) + t * np.log(t / (1 - kept_T.sum(1)))
            columns[f"kl_{temperature}"] += list(kl)
    values = {name: np.array(column, float) for name, column in columns.items()}
    bins = np.minimum((values["confidence"] * 15).astype(int), 14)
    assert len(set(bins)) > 3
    gaps = [abs((values["confidence"] - values["correct"])[bins == number].sum()) for number in range(15)]
    expected = {
        "eval_cross_entropy": values["label"].mean(),
        "eval_top1_agreement": values["agrees"].mean(),
        "eval_acceptance_min": values["low"].mean(),
        "eval_acceptance_max": values["high"].mean(),
        "eval_kl_1": values["kl_1"].mean(),
        "eval_kl_2": values["kl_2"].mean(),
        "eval_calibration_error": sum(gaps) / len(bins),
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert 0 < metrics["eval_acceptance_min"] < metrics["eval_acceptance_max"] < 1


def test_calibration_error_of_known_confidences():
    """Two rows a bin, one of them right: each bin's gap is its confidence less a half; certainty is in the last bin."""
    confidences = torch.tensor([0.45, 0.62, 0.62, 0.81, 0.97, 1.0], dtype=torch.float64).repeat(2)
    rest = (1 - confidences).clamp_min(1e-300) / 2
    logits_MV = torch.stack([confidences, rest, rest], 1).log()
    labels = torch.tensor([0] * 6 + [1] * 6)
    ids, teacher = torch.zeros(12, 1, dtype=torch.long), (torch.full((12, 1), 0.7), torch.full((12,), 0.3))
    found = finish(
        measure_rows(
            logits_MV,
            torch.eye(3, dtype=torch.float64),
            adapter=None,
            labels_M=labels,
            ids_MK=ids,
            teachers={1.0: teacher},
            settings=LossSettings(vocab_size=3),
        )
    )
    gaps = [abs(confidence - 0.5) for confidence in (0.45, 0.62, 0.62, 0.81)] + [abs(0.97 + 1.0 - 1)]
    assert found["calibration_error"] == pytest.approx(sum(gaps) / 6, rel=1e-12)
    accepted = [min(0.7, confidence) for confidence in (0.45, 0.62, 0.62, 0.81, 0.97, 1.0)]
    assert found["acceptance_min"] == pytest.approx(sum(accepted) / 6, rel=1e-6)
    assert found["top1_agreement"] == 1.0


def test_scheduled_alpha_and_wsd_learning_rate_are_logged(tmp_path, cache):
    values = {"max_steps": 11, "batch_size": 4, "learning_rate": 1e-3, "log_steps": 1, "save_steps": 100}
    schedule = {"schedule": "wsd", "alpha_schedule": "linear", "alpha": 1.0, "alpha_end": 0.5, "divergence": "js"}
    student = tmp_path / "student" / "config.json"
    llama_config(open_cache(cache).manifest.vocab_size, num_hidden_layers=1).save_pretrained(student.parent)
    shape = {"warmup_ratio": 0.2, "decay_ratio": 0.4}
    config = TrainConfig(student=student, cache=cache, out=tmp_path / "run", **values, **schedule, **shape)
    train_student(config)
    log = [json.loads(line) for line in (config.out / "log.jsonl").read_text().splitlines()]
    steps = [entry for entry in log if "loss" in entry]
    assert [entry["alpha"] for entry in steps] == pytest.approx([1 - 0.05 * step for step in range(11)])
    for entry in steps:
        alpha = entry["alpha"]
        assert entry["loss"] == pytest.approx((1 - alpha) * entry["cross_entropy"] + alpha * 4 * entry["kl"], rel=1e-5)
    shares = [0, 1 / 3, 2 / 3, 1, 1, 1, 1, 1, 3 / 4, 2 / 4, 1 / 4]  # 3 steps up, 4 down
    assert [entry["learning_rate"] for entry in steps] == pytest.approx([1e-3 * share for share in shares])
