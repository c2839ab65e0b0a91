"""Stage one with other teachers than Llama: model families, tensor parallelism, bfloat16 and float8 bodies."""

import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaForCausalLM,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from pipeline import open_cache
from pipeline.corpus import Corpus, TokenSequence
from pipeline.models import read_model
from stages.cache_logits.run import cache_logits
from stages.cache_logits.settings import CacheConfig
from stages.cache_logits.teacher import Teacher, length_regime
from stages.cache_logits.vllm_plugin import serving
from tests.support.oracle import softmax
from tests.support.small import CONTEXT, llama_config, make_corpus, make_teacher, random_sequences, true_logits
from tests.test_cache_logits import assert_exact, capture, settings

HEAD_ROWS = 397
"""A prime above the tokenizer's vocabulary: no split over devices and no block divides it, and some rows are dead."""
TINY = {
    "vocab_size": HEAD_ROWS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.25,
}
TINY_GPT = {
    "vocab_size": HEAD_ROWS,
    "n_embd": 64,
    "n_inner": 96,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": CONTEXT,
    "initializer_range": 0.25,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
FAMILIES: dict[str, PreTrainedConfig] = {
    "bloom": BloomConfig(vocab_size=HEAD_ROWS, hidden_size=64, n_layer=2, n_head=2, initializer_range=0.25),
    "falcon": FalconConfig(**TINY | {"num_kv_heads": 2}, activation="gelu_new", bias=True),
    "gemma2": Gemma2Config(**TINY, head_dim=32, query_pre_attn_scalar=32, sliding_window=16),  # soft caps, tied head
    "gpt2": GPT2Config(**TINY_GPT),  # GPT2LMHeadModel
    "gpt_neox": GPTNeoXConfig(**TINY | {"num_key_value_heads": 2}),  # in vLLM through transformers
    "gptj": GPTJConfig(**TINY_GPT, rotary_dim=16),  # a head with a bias
    "mistral": MistralConfig(**TINY, head_dim=32, sliding_window=16),
    "mixtral": MixtralConfig(**TINY, head_dim=32, num_local_experts=4, num_experts_per_tok=2),
    "qwen2": Qwen2Config(**TINY),
    "qwen3": Qwen3Config(**TINY, head_dim=32),
}
ENGINES = ["transformers", pytest.param("vllm", marks=pytest.mark.vllm)]


@pytest.fixture(scope="module")
def short_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six sequences: every start of vLLM costs more than they do."""
    return make_corpus(tmp_path_factory.mktemp("short"), random_sequences(6, vocab_size=300))


def make_family(folder: Path, family: str) -> Path:
    """A random teacher of the family, every weight away from zero. Ships no tokenizer: its folder's class differs."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family])
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_()
    model.save_pretrained(folder)
    return folder


def make_headstrong_teacher(folder: Path) -> Path:
    """A bfloat16 Llama whose layers add nothing and whose logits are large.

    All libraries get the same bits before its head, and bfloat16 logits of this size miss by 0.06 nats.
    """
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(HEAD_ROWS))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.normal_()
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def family_settings(root: Path, corpus: Path, family: str, engine: str) -> CacheConfig:
    return settings(root / family, corpus, root / f"{family}-{engine}", engine=engine)


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory, short_corpus: Path) -> Path:
    """A teacher of every family and its cache by vLLM: one process for all of them, most of its time is its start."""
    root = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        make_family(root / family, family)
    configs = [family_settings(root, short_corpus, family, "vllm") for family in FAMILIES]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(capture_in_this_process, configs).result(timeout=500)
    return root


def capture_in_this_process(configs: list[CacheConfig]) -> None:
    """Caches by vLLM with its core in this process, one after the other."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    for config in configs:
        cache_logits(config)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.vllm
def test_family_is_exact_in_vllm(families, short_corpus, family):
    config = family_settings(families, short_corpus, family, "vllm")
    assert_exact(config.out, config.teacher, short_corpus)


@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_exact_in_transformers(tmp_path, short_corpus, family):
    make_family(tmp_path / family, family)
    config = family_settings(tmp_path, short_corpus, family, "transformers")
    capture(config)
    assert_exact(config.out, config.teacher, short_corpus)


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")  # vLLM's imports use what torch has deprecated
def test_capturing_class_stands_in_for_one_architecture_while_the_engine_starts():
    """Under its own name, by which vLLM has settings; another vLLM of the process then has its own class."""
    from vllm import ModelRegistry

    before = dict(ModelRegistry.models)
    with serving("InternLM3ForCausalLM") as twin:  # which vLLM's Llama serves
        changed = {name for name, model in ModelRegistry.models.items() if model != before[name]}
        assert changed == twin.keys() == {"InternLM3ForCausalLM"}
        served = ModelRegistry.models["InternLM3ForCausalLM"].load_model_cls()
    assert ModelRegistry.models == before
    original = before["InternLM3ForCausalLM"].load_model_cls()
    assert issubclass(served, original)
    assert (served.__name__, served.is_pooling_model) == (original.__name__, True)
    with serving("BertModel"), pytest.raises(TypeError, match=r"vLLM's BertEmbeddingModel has no .* head"):
        ModelRegistry.models["BertModel"].load_model_cls()


@pytest.mark.vllm
def test_two_tensor_parallel_ranks_are_exact(tmp_path, short_corpus):
    """Ranks with different numbers of real columns; draws from both parts of the tail."""
    teacher = make_teacher(tmp_path / "teacher")
    config = settings(teacher, short_corpus, tmp_path / "two", engine="vllm", tensor_parallel=2, tail_samples=4)
    capture(config)
    assert_exact(config.out, teacher, short_corpus)
    assert_draws_are_systematic(config.out, teacher, short_corpus, temperature=2.0)


def assert_draws_are_systematic(folder: Path, teacher: Path, corpus: Path, temperature: float) -> None:
    """Counts within one of their expectation, token by token, and unbiased in sum over the head's two halves.

    The tail is laid out rank by rank: the single draws depend on the number of ranks, their distribution does not.
    """
    cache, surplus = open_cache(folder), 0.0
    for cached, sequence in zip(cache, Corpus(corpus).rows(), strict=True):
        tail = softmax(true_logits(teacher, sequence, cache.manifest.vocab_size), temperature)
        np.put_along_axis(tail, cached.targets.ids.astype(np.int64), 0.0, axis=1)
        tail /= tail.sum(axis=1, keepdims=True)
        draws = cached.targets.draws
        counts = (draws[:, :, None] == np.arange(tail.shape[1])).sum(axis=1)
        assert (counts.sum(axis=1) == cache.manifest.tail_samples).all()
        assert (counts[tail == 0] == 0).all()
        assert np.abs(counts - cache.manifest.tail_samples * tail).max() < 1 + 1e-4
        surplus += (counts - cache.manifest.tail_samples * tail)[:, : HEAD_ROWS // 2].sum()
    assert abs(surplus) < 2 * cache.manifest.num_targets**0.5  # at most half a draw a position, at random


@pytest.mark.parametrize("engine", ENGINES)
def test_head_of_a_bfloat16_teacher_runs_in_float32(tmp_path, short_corpus, engine):
    teacher = make_headstrong_teacher(tmp_path / "teacher")
    config = settings(teacher, short_corpus, tmp_path / "cache", engine=engine)
    capture(config)
    cache = open_cache(config.out)
    assert cache.manifest.teacher["dtype"] == "bfloat16"
    errors, errors_of_bfloat16_head = [], []
    for cached, sequence in zip(cache, Corpus(short_corpus).rows(), strict=True):
        exact, rounded = logits_with_both_heads(teacher, sequence, cache.manifest.vocab_size)
        ids = cached.targets.ids.astype(np.int64)
        relative = np.take_along_axis(exact, ids, axis=1) - exact.max(axis=1, keepdims=True)
        errors.append(np.abs(cached.targets.logits - relative))
        relative_rounded = np.take_along_axis(rounded, ids, axis=1) - rounded.max(axis=1, keepdims=True)
        errors_of_bfloat16_head.append(np.abs(relative_rounded - relative))
    # A norm that rounds one hidden value the other way costs up to 0.01 nats in its row.
    assert np.median(np.concatenate(errors)) < 1e-5
    assert np.concatenate(errors).max() < 0.02
    assert np.median(np.concatenate(errors_of_bfloat16_head)) > 1e-2
    assert np.concatenate(errors_of_bfloat16_head).max() > 0.06


def logits_with_both_heads(teacher: Path, sequence: TokenSequence, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """float64 [N, vocab_size] twice: the bfloat16 body's output times the head in float64, and in bfloat16.

    For a body without attention, which sees no document boundary.
    """
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype="bfloat16")
    with torch.no_grad():
        hidden_NH = model.model(torch.tensor(sequence.token_ids)[None].long()).last_hidden_state[0]
        hidden_NH = hidden_NH[sequence.target_positions]
        exact_NV = hidden_NH.double() @ model.lm_head.weight.double().T
        rounded_NV = model.lm_head(hidden_NH).double()
    return exact_NV[:, :vocab_size].numpy(), rounded_NV[:, :vocab_size].numpy()


def make_fp8_teacher(folder: Path) -> Path:
    """A Llama as compressed-tensors stores it: float8 weights with a scale a channel, activations scaled a token."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(HEAD_ROWS, hidden_size=128, intermediate_size=256))
    model.save_pretrained(folder)
    state = model.state_dict()
    for name, weight in quantised_weights(model).items():
        state[name], state[name.replace("weight", "weight_scale")] = weight
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    eight_bits = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": eight_bits | {"strategy": "channel", "dynamic": False},
        "input_activations": eight_bits | {"strategy": "token", "dynamic": True},
    }
    quantization = {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"]}
    quantization |= {"config_groups": {"group_0": group}, "quantization_status": "compressed"}
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def quantised_weights(model: LlamaForCausalLM) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """float8 weight and float32 scale [out, 1] of every matrix inside the layers."""
    matrices = {name: weight for name, weight in model.state_dict().items() if name.endswith("proj.weight")}
    return {name: to_float8(weight) for name, weight in matrices.items()}


def to_float8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in float8 and the scale of each, so that its largest magnitude is float8's."""
    scale = rows.abs().amax(-1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    return (rows / scale).to(torch.float8_e4m3fn), scale.float()


def float8_model(folder: Path) -> LlamaForCausalLM:
    """The teacher of `make_fp8_teacher` in plain torch: products of what float8 leaves of weights and activations."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(HEAD_ROWS, hidden_size=128, intermediate_size=256))

    def round_activations(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        rounded, scale = to_float8(inputs[0])
        return rounded.float() * scale

    weights = quantised_weights(model)
    for name, module in model.named_modules():
        if f"{name}.weight" in weights:
            rounded, scale = weights[f"{name}.weight"]
            module.weight.data = rounded.float() * scale
            module.register_forward_pre_hook(round_activations)
    return model


@pytest.mark.vllm
def test_float8_teacher_is_captured_as_it_is_and_named_in_the_manifest(tmp_path, short_corpus):
    teacher = make_fp8_teacher(tmp_path / "teacher")
    config = settings(teacher, short_corpus, tmp_path / "cache", engine="vllm")
    capture(config)
    cache = open_cache(config.out)
    found = {name: cache.manifest.teacher[name] for name in ("quantization", "head_dtype", "dtype")}
    assert found == {"quantization": "compressed-tensors", "head_dtype": "float32", "dtype": "float32"}
    model = float8_model(teacher)
    torch.manual_seed(0)
    unquantised = LlamaForCausalLM(llama_config(HEAD_ROWS, hidden_size=128, intermediate_size=256))
    errors, errors_of_unquantised = [], []
    for cached, sequence in zip(cache, Corpus(short_corpus).rows(), strict=True):
        for reference, gathered in ((model, errors), (unquantised, errors_of_unquantised)):
            logits = document_logits(reference, sequence)[:, : cache.manifest.vocab_size]
            kept = np.take_along_axis(softmax(logits, 1.0), cached.targets.ids.astype(np.int64), axis=1)
            gathered.append(np.abs(cached.targets.probs(1.0) - kept))
    # An activation that float32 noise rounds the other way moves its row by a step of float8, so not the maximum.
    assert np.mean(np.concatenate(errors)) < 0.1 * np.mean(np.concatenate(errors_of_unquantised))


def document_logits(model: LlamaForCausalLM, sequence: TokenSequence) -> np.ndarray:
    """[N, V]: logits at the target positions, document by document."""
    documents = torch.tensor(sequence.token_ids).long().split(sequence.document_lengths.tolist())
    with torch.no_grad():
        return torch.cat([model(ids[None]).logits[0] for ids in documents])[sequence.target_positions].numpy()


@pytest.mark.parametrize(("longest", "regime"), [(32, ""), (33, "with the rope factors of texts above 32 tokens")])
def test_what_the_longest_sequence_changes_of_the_others_is_part_of_the_teacher(tmp_path, longest, regime):
    """vLLM takes the long factors for all texts or for none."""
    factors = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16, "rope_theta": 1e4, "rope_type": "longrope"}
    config = Phi3Config(
        **{"vocab_size": 300, "hidden_size": 64, "num_attention_heads": 2, "pad_token_id": 0},
        **{"max_position_embeddings": 128, "original_max_position_embeddings": 32, "rope_parameters": factors},
    )
    config.architectures = ["Phi3ForCausalLM"]
    config.save_pretrained(tmp_path)
    model = read_model(tmp_path)
    assert length_regime(model, longest) == regime
    teacher = Teacher(model=model, vocab_size=300, dtype="float32", quantization="none", length_regime=regime)
    with patch("stages.cache_logits.teacher.hash_weights", return_value="0"):
        assert teacher.identity().get("length_regime", "") == regime


def test_length_changes_nothing_for_most(tmp_path):
    llama_config(300).save_pretrained(tmp_path)
    assert length_regime(read_model(tmp_path), 90) == ""
