"""Both stages over models that are not just a causal LM with the corpus's vocabulary."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BertConfig,
    PreTrainedTokenizerFast,
)

from pipeline import open_cache
from pipeline.corpus import Corpus
from pipeline.errors import CacheMismatchError, ConfigError, EngineError
from pipeline.progress import KeptLines
from stages.cache_logits.run import cache_logits
from stages.train_student.run import train_student
from stages.train_student.settings import TrainConfig
from stages.train_student.student import read_student
from tests.support.helpers import tiny_tokenizer
from tests.support.oracle import softmax
from tests.support.small import CONTEXT, llama_config, make_cache, make_corpus, random_sequences, true_logits
from tests.test_cache_logits import assert_exact, capture, run_command, settings

TEXT = {
    "vocab_size": 413,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.25,
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
SEEING = {
    "gemma3": {"text_config": TEXT, "vision_config": VISION, "mm_tokens_per_image": 1},
    "mistral3": {
        "text_config": TEXT | {"model_type": "mistral"},
        "vision_config": VISION | {"model_type": "pixtral"},
    },
    "llava": {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": VISION | {"model_type": "clip_vision_model", "projection_dim": 32},
    },
}
"""Kinds of vision-language models. The text part of the second says that its head is its own; the whole, and it is
right, that it is tied."""


@pytest.fixture(scope="module")
def short_corpus(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("short"), random_sequences(6, vocab_size=300))


def make_seeing_model(folder: Path, kind: str) -> Path:
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **SEEING[kind])).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", SEEING)
def test_language_model_inside_a_seeing_one_is_exact(tmp_path, short_corpus, kind):
    teacher = make_seeing_model(tmp_path / "teacher", kind)
    config = settings(teacher, short_corpus, tmp_path / "cache")
    capture(config)
    assert_exact(config.out, teacher, short_corpus)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("kind", SEEING)
def test_language_model_inside_a_seeing_one_is_exact_in_vllm(tmp_path, short_corpus, kind):
    teacher = make_seeing_model(tmp_path / "teacher", kind)
    config = settings(teacher, short_corpus, tmp_path / "cache", engine="vllm")
    capture(config)
    assert_exact(config.out, teacher, short_corpus)


@pytest.mark.parametrize("kind", ["gemma3", "mistral3"])
def test_student_inside_a_seeing_model_is_trained_and_the_rest_kept(tmp_path, short_corpus, kind):
    cache = make_cache(tmp_path / "cache", short_corpus)
    student = make_seeing_model(tmp_path / "student", kind)
    tiny_tokenizer(student)
    values = {"max_steps": 12, "batch_size": 3, "learning_rate": 3e-3, "log_steps": 1}
    config = TrainConfig(student=student, cache=cache, out=tmp_path / "run", **values)
    train_student(config)
    log = [json.loads(line) for line in (config.out / "log.jsonl").read_text().splitlines()]
    assert log[11]["loss"] < 0.9 * log[0]["loss"]
    before, after = (
        AutoModelForImageTextToText.from_pretrained(folder).state_dict() for folder in (student, config.out)
    )
    assert before.keys() == after.keys()
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert moved == {name for name in before if "language_model" in name or name.startswith("lm_head")}


def grown(folder: Path, tokens: list[str]) -> PreTrainedTokenizerFast:
    """The tokenizer of the corpora here with more special tokens at its end, saved in `folder`."""
    tokenizer = tiny_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.save_pretrained(folder)
    assert len(AutoTokenizer.from_pretrained(folder)) == len(tokenizer)
    return tokenizer


def make_model(folder: Path, vocab_size: int) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(llama_config(vocab_size)).save_pretrained(folder)
    return folder


def test_tokenizer_with_more_ids_than_the_head_is_taken_where_the_corpus_uses_none_of_them(tmp_path, short_corpus):
    own = len(tiny_tokenizer(tmp_path / "teacher"))
    make_model(tmp_path / "teacher", own - 20)  # the corpus has ids below 300
    reporter = KeptLines()
    config = settings(tmp_path / "teacher", short_corpus, tmp_path / "cache")
    manifest = cache_logits(config, reporter)
    assert (manifest.vocab_size, manifest.largest_token_id) == (own - 20, Corpus(short_corpus).largest_token_id())
    assert any(f"a head of {own - 20} ids for a tokenizer of {own}" in line for line in reporter.lines)
    assert_exact(config.out, config.teacher, short_corpus)
    make_model(tmp_path / "teacher", manifest.largest_token_id)
    with pytest.raises(ConfigError, match=rf"holds id {manifest.largest_token_id} \(its tokenizer has {own}\)"):
        cache_logits(settings(tmp_path / "teacher", short_corpus, tmp_path / "other"))


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_vocabularies_may_differ_in_trailing_tokens_that_no_sequence_uses(tmp_path, short_corpus, role):
    size = len(grown(tmp_path / "model", ["<think>", "</think>"]))
    model = make_model(tmp_path / "model", size + 5)
    reporter = KeptLines()
    if role == "teacher":
        manifest = cache_logits(settings(model, short_corpus, tmp_path / "cache"), reporter)
        assert manifest.vocab_size == size - 2
    else:
        cache = make_cache(tmp_path / "cache", short_corpus)
        train_student(TrainConfig(student=model, cache=cache, out=tmp_path / "run", max_steps=1), reporter)
    (note,) = [line for line in reporter.lines if "differs from the" in line]
    assert "'<think>', '</think>'" in note


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_vocabularies_that_differ_in_a_token_in_use_are_refused_with_the_token(tmp_path, short_corpus, role):
    folder = tmp_path / "model"
    size = len(tiny_tokenizer(folder))
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text())
    vocabulary = document["model"]["vocab"]
    used = int(next(Corpus(short_corpus).rows()).token_ids[0])
    (token,) = [token for token, index in vocabulary.items() if index == used]
    del vocabulary[token]
    vocabulary["zzz"] = used
    document["model"]["merges"] = [pair for pair in document["model"]["merges"] if token not in ("".join(pair), *pair)]
    path.write_text(json.dumps(document))
    make_model(folder, size)
    wanted = f"id {used} is 'zzz' and {token!r}"
    if role == "teacher":
        with pytest.raises(ConfigError) as caught:
            cache_logits(settings(folder, short_corpus, tmp_path / "cache"))
    else:
        cache = open_cache(make_cache(tmp_path / "cache", short_corpus))
        with pytest.raises(CacheMismatchError) as caught:
            read_student(folder, cache)
    assert wanted in str(caught.value)


def test_student_with_a_smaller_head_learns_what_it_has_rows_for(tmp_path, short_corpus):
    """From a teacher whose stored ids go beyond: its held-out KL is that of the teacher without them, to float64."""
    teacher = make_model(tmp_path / "teacher", 421)
    tiny_tokenizer(teacher, vocab_size=400)
    cache = tmp_path / "cache"
    capture(settings(teacher, short_corpus, cache, top_k=32))
    known = open_cache(cache)
    size = known.largest_token_id() + 1
    assert any((sequence.targets.ids >= size).any() for sequence in known)
    student = make_model(tmp_path / "student", size)
    tiny_tokenizer(student, vocab_size=400)
    values = {"max_steps": 2, "learning_rate": 1e-6, "eval_cache": cache}
    reporter = KeptLines()
    metrics = train_student(TrainConfig(student=student, cache=cache, out=tmp_path / "run", **values), reporter)
    assert any(f"a vocabulary of {size}, of the cache's {known.manifest.vocab_size}" in line for line in reporter.lines)
    kls = []
    for sequence in known:
        q = softmax(true_logits(tmp_path / "run", sequence, size), 2.0)
        for ids, probs, row in zip(sequence.targets.ids, sequence.targets.probs(2.0).astype(np.float64), q):
            kept, p = ids[ids < size], probs[ids < size]
            tail = 1 - p.sum()
            kls.append((p * np.log(p / row[kept])).sum() + tail * np.log(tail / (1 - row[kept].sum())))
    assert metrics["eval_kl_2"] == pytest.approx(np.mean(kls), rel=1e-4)


@pytest.mark.parametrize("engine", ["transformers", pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.slow])])
def test_value_head_beside_the_teacher_is_left_out_with_a_note(tmp_path, short_corpus, engine):
    teacher = make_model(tmp_path / "teacher", 413)
    tensors = load_file(teacher / "model.safetensors")
    save_file(tensors | {"v_head.summary.weight": torch.ones(1, 64)}, tmp_path / "all.safetensors")
    (tmp_path / "all.safetensors").rename(teacher / "model.safetensors")
    config = settings(teacher, short_corpus, tmp_path / "cache", engine=engine)
    if engine == "vllm":
        process = run_command(config)
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    else:
        reporter = KeptLines()
        cache_logits(config, reporter)
        said = "\n".join(reporter.lines)
    assert "v_head.summary.weight: no part of the teacher, left out" in said
    assert_exact(config.out, teacher, short_corpus)


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_teacher_that_lacks_a_tensor_is_refused_whatever_runs_it(tmp_path, short_corpus, engine):
    teacher = make_model(tmp_path / "teacher", 413)
    tensors = load_file(teacher / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]  # vLLM would keep a third of its fused matrix as it was
    save_file(tensors, tmp_path / "all.safetensors")
    (tmp_path / "all.safetensors").rename(teacher / "model.safetensors")
    with pytest.raises(ConfigError, match=r"layers\.1\.self_attn\.k_proj\.weight would start from random numbers"):
        cache_logits(settings(teacher, short_corpus, tmp_path / "cache", engine=engine))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("suffix", [".gguf", ".pth"])
def test_student_folder_without_weights_does_not_start_from_random_ones(tmp_path, short_corpus, suffix):
    cache = open_cache(make_cache(tmp_path / "cache", short_corpus))
    student = make_model(tmp_path / "student", cache.manifest.vocab_size)
    (student / "model.safetensors").rename(student / f"weights{suffix}")
    with pytest.raises(ConfigError, match=r"To start from random weights, give .*config\.json itself") as caught:
        read_student(student, cache)
    assert "\n" not in str(caught.value)
    assert not read_student(student / "config.json", cache).has_weights


def test_quantised_student_is_refused(tmp_path, short_corpus):
    cache = open_cache(make_cache(tmp_path / "cache", short_corpus))
    student = make_model(tmp_path / "student", cache.manifest.vocab_size)
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(ConfigError, match=r"a quantised student \(gptq\)"):
        read_student(student, cache)


def test_teacher_that_sees_what_comes_is_refused(tmp_path, short_corpus):
    """BERT counts as a causal LM to transformers, and looks in both directions."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = BertConfig(vocab_size=413, max_position_embeddings=CONTEXT, initializer_range=0.3, **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "teacher")
    with pytest.raises(EngineError, match="when other text or padding follows it"):
        cache_logits(settings(tmp_path / "teacher", short_corpus, tmp_path / "cache"))


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["home-made", "fp8"])
def test_teacher_that_vllm_cannot_load_is_one_line(tmp_path, short_corpus, quantization):
    """A scheme that nobody knows, which the front end finds, and one without a kernel here, which a worker finds."""
    teacher = make_model(tmp_path / "teacher", 413)
    changes = {"engine": "vllm", "quantization": quantization}
    process = run_command(settings(teacher, short_corpus, tmp_path / "cache", **changes))
    _, message = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "vLLM cannot serve this teacher: " in message
    assert "Traceback" not in message
    assert len(message.strip().splitlines()) < 6
