"""`pipeline estimate`: costs against torch's own count of operations, and the figures of the models' makers."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen3Config

from pipeline.cli import main
from pipeline.corpus import Corpus
from pipeline.errors import ConfigError, CorpusError
from stages.cache_logits.run import cache_logits
from stages.cache_logits.settings import LOGITS_BYTES
from stages.estimate.run import Amount, ModelSize, estimate
from stages.estimate.settings import EstimateConfig
from tests.support.small import make_corpus, random_sequences
from tests.test_cache_logits import settings

DEEPSEEK_67B = LlamaConfig(
    vocab_size=102_400,
    hidden_size=8192,
    intermediate_size=22_016,
    num_hidden_layers=95,
    num_attention_heads=64,
    num_key_value_heads=8,
    max_position_embeddings=4096,
    architectures=["LlamaForCausalLM"],
)
SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES = {
    "llama": LlamaConfig(**SMALL),
    "tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "wide heads": Qwen3Config(**SMALL, head_dim=32),
}


def yaml(path: Path, **values: object) -> Path:
    path.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in values.items()))
    return path


@pytest.fixture
def deepseek(tmp_path):
    """Settings of both stages; neither weights nor a corpus exist."""
    DEEPSEEK_67B.save_pretrained(tmp_path / "67b")
    folders = {name: str(tmp_path / name) for name in ("corpus", "cache", "student")}
    return {
        "cache_logits": yaml(
            tmp_path / "cache.yaml",
            teacher=str(tmp_path / "67b"),
            corpus=folders["corpus"],
            out=folders["cache"],
            tensor_parallel=8,
            dtype="bfloat16",
        ),
        "train_student": yaml(
            tmp_path / "train.yaml",
            student=str(tmp_path / "67b"),
            cache=folders["cache"],
            out=folders["student"],
            sharding="fsdp2",
        ),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_operations_are_those_that_torch_counts(tmp_path, family):
    FAMILIES[family].save_pretrained(tmp_path)
    size = ModelSize.read(tmp_path)
    model = AutoModelForCausalLM.from_config(FAMILIES[family], attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros((1, 40), dtype=torch.long))
    # Eager attention multiplies whole squares where causal attention needs half.
    expected = 40 * (size.body_flops + size.head_flops + size.attention_flops * 40)
    assert counter.get_total_flops() == expected
    assert size.num_parameters == model.num_parameters()
    amount = Amount(num_tokens=400, num_targets=100, sequence_length=40)
    assert size.forward_flops(amount) == (size.body_flops + size.attention_flops * 20) * 400 + size.head_flops * 100


def test_token_meets_a_part_of_the_experts(tmp_path):
    MixtralConfig(**SMALL, num_local_experts=8, num_experts_per_tok=2).save_pretrained(tmp_path / "8")
    MixtralConfig(**SMALL, num_local_experts=2, num_experts_per_tok=2).save_pretrained(tmp_path / "2")
    eight, two = ModelSize.read(tmp_path / "8"), ModelSize.read(tmp_path / "2")
    experts = 3 * 3 * 64 * 80
    assert eight.num_parameters - two.num_parameters == 6 * (experts + 3 * 64)
    assert eight.body_flops - two.body_flops == 6 * 2 * 3 * 64  # the router's


def test_the_recipe_costs_what_its_models_are_known_to_cost(deepseek):
    found = estimate(EstimateConfig(**deepseek, tokens=10**9, sequence_length=4096, workers=4, utilization=0.5))
    assert found.capture.parameters == pytest.approx(67.4e9, rel=1e-3)
    assert found.capture.flops_per_token == pytest.approx(139.5e9, rel=1e-3)
    assert found.capture.device_hours == pytest.approx(139.5e18 / (989e12 * 0.5) / 3600, rel=1e-3)
    assert found.capture.seconds == pytest.approx(found.capture.device_hours * 3600 / 32)
    assert found.capture.memory_gb == pytest.approx(134.8 / 8 + 3 * LOGITS_BYTES / 1e9, rel=0.05)
    assert found.capture.fits
    assert found.storage.partitions == 954
    assert found.training is not None
    assert found.training.memory_gb == pytest.approx(67.4 * 16, rel=1e-3)
    assert not found.training.fits
    assert found.training.flops_per_token == pytest.approx(3 * found.capture.flops_per_token)


def test_size_of_an_arrow_cache_is_known_before(tmp_path, teacher):
    """A real cache of the same corpus beside what was said of it."""
    sequences = random_sequences(400, 96, seed=5)
    corpus = make_corpus(tmp_path / "corpus", sequences)
    config = settings(teacher, corpus, tmp_path / "cache", top_k=64)
    cache_logits(config)
    written = sum(path.stat().st_size for path in (config.out / "shards").iterdir())
    found = estimate(
        EstimateConfig(
            cache_logits=yaml(
                tmp_path / "c.yaml", teacher=str(teacher), corpus=str(corpus), out="x", top_k=64, dtype="float32"
            )
        )
    )
    assert found.capture.tokens == sum(len(sequence.token_ids) for sequence in sequences)
    assert found.storage.bytes == pytest.approx(written, rel=0.1)


@pytest.mark.parametrize("container", ["arrow", "zarr"])
def test_sketch_is_counted(tmp_path, teacher, corpus, sketched, container):
    values = {"teacher": str(teacher), "corpus": str(corpus), "out": "x", "top_k": 8, "format": container}
    found = {
        rank: estimate(EstimateConfig(cache_logits=yaml(tmp_path / f"{rank}.yaml", **values, tail_rank=rank))).storage
        for rank in (0, 4)
    }
    (path,) = sketched[container].out.glob("sketch-*")
    assert found[4].sketch_bytes == pytest.approx(path.stat().st_size, abs=1000)  # its head
    coefficients = {"arrow": 2, "zarr": 0.5}[container] * 4 * Corpus(corpus).manifest.num_targets
    assert found[4].bytes - found[0].bytes == pytest.approx(coefficients + found[4].sketch_bytes, abs=1)
    assert (found[0].sketch_bytes, found[0].sketch_flops) == (0, 0)
    model = ModelSize.read(teacher)
    assert found[4].sketch_flops > 200 * 128 * model.head_flops


def test_command_says_what_does_not_fit_and_what_it_assumes(deepseek):
    arguments = ["--cache-logits", str(deepseek["cache_logits"]), "--train-student", str(deepseek["train_student"])]
    shown = CliRunner().invoke(
        main, ["estimate", *arguments, "--tokens", "1000000", "--device", "l40s", "--price", "2"]
    )
    assert shown.exit_code == 0, shown.output
    assert "training" in shown.output
    assert "DOES NOT FIT" in shown.output
    assert "assume 40% of the peak of l40s" in shown.output
    document = CliRunner().invoke(main, ["estimate", *arguments, "--tokens", "1000000", "--json"])
    assert json.loads(document.output)["capture"]["tokens"] == 1_000_000


def test_missing_corpus_and_foreign_model_are_named(deepseek, tmp_path):
    with pytest.raises(CorpusError, match="--tokens"):
        estimate(EstimateConfig(**deepseek))
    (tmp_path / "67b" / "config.json").write_text('{"model_type": "nothing-of-that-name"}')
    with pytest.raises(ConfigError, match="67b"):
        estimate(EstimateConfig(**deepseek, tokens=1000))
