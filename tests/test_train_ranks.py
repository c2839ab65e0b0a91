"""Stage two on two ranks: sharded or not, killed or asked to leave, the losses are those of one undisturbed run."""

import dataclasses
import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline import open_cache
from pipeline.errors import ConfigError
from pipeline.settings import resolved
from stages.train_student.run import read_metrics, train_student
from stages.train_student.settings import TrainConfig
from tests.support.kinds import kind_student
from tests.support.small import llama_config, make_cache

ROOT = Path(__file__).parent.parent
UNITS = ["FSDPLlamaForCausalLM", "FSDPEmbedding", *["FSDPLlamaDecoderLayer"] * 2, "FSDPLlamaRMSNorm", "FSDPLinear"]
ADAPTED_UNITS = ["FSDPPeftModelForCausalLM", *UNITS[1:4], "FSDPLinear"]
ADAPTERS = {"lora_rank": 4, "lora_alpha": 8.0, "lora_head": True}


@pytest.fixture(scope="module")
def base(tmp_path_factory, corpus):
    """Settings of a run on one rank with a global batch of 8, for a student that starts from random weights."""
    cache = make_cache(tmp_path_factory.mktemp("cache"), corpus, max_kl_error=0.0)
    student = tmp_path_factory.mktemp("student") / "config.json"
    vocab_size = open_cache(cache).manifest.vocab_size
    llama_config(vocab_size, num_hidden_layers=2, initializer_range=0.02).save_pretrained(student.parent)
    values = {"max_steps": 8, "batch_size": 8, "log_steps": 1, "save_steps": 3, "learning_rate": 1e-2}
    return TrainConfig(student=student, cache=cache, out=Path("unset"), **values)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, base):
    """The run on one rank."""
    config = dataclasses.replace(base, out=tmp_path_factory.mktemp("whole") / "run")
    train_student(config)
    return config


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, base):
    """What two ranks do that nothing happens to, by the kind of sharding, with adapters or without."""

    @functools.cache
    def run(sharding, adapted):
        out = tmp_path_factory.mktemp("undisturbed") / "run"
        config = two_ranks(base, out, sharding=sharding, **ADAPTERS if adapted else {})
        assert launch(config)[0] == 0
        return config

    return run


def two_ranks(config, out, **changes):
    """The same global batch on two ranks of two micro-batches."""
    return dataclasses.replace(config, out=out, **{"batch_size": 2, "gradient_accumulation": 2} | changes)


def launch(config, *what_happens):
    """Exit code and output of two ranks under torchrun."""
    path = config.out.with_suffix(".yaml")
    path.write_text(json.dumps(resolved(config)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "tests.support.ranks", str(path), *map(str, what_happens)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    return finished.returncode, finished.stderr


def trajectory(config):
    """What was logged of every step, in the order of the steps."""
    log = [json.loads(line) for line in (config.out / "log.jsonl").read_text().splitlines()]
    names = ("step", "loss", "cross_entropy", "kl", "grad_norm", "learning_rate")
    return [tuple(entry[name] for name in names) for entry in log if "loss" in entry]


def parameters(config):
    """What tests.support.ranks saw of the model, and the types of what its loss was computed from."""
    found = json.loads((config.out / "parameters.json").read_text())
    return found, {name: kind.removeprefix("torch.") for name, kind in found.pop("loss_of").items()}


def assert_same_student(config, expected):
    """Losses and weights but for the order of float32 sums, which two ranks add up otherwise than one."""
    for ours, theirs in zip(trajectory(config), trajectory(expected), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    weights, known = (AutoModelForCausalLM.from_pretrained(run.out).state_dict() for run in (config, expected))
    for (name, ours), theirs in zip(weights.items(), known.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)


def test_sharded_ranks_have_the_losses_of_one_rank(tmp_path, base, whole):
    """Parameters are really sharded, checkpoints too; the student is written once, whole."""
    config = two_ranks(base, tmp_path / "run", sharding="fsdp2", eval_cache=base.cache)
    code, errors = launch(config)
    assert code == 0, errors
    assert parameters(config)[0] == {"trained": ["DTensor"], "frozen": [], "units": UNITS}
    shards = {path.name for path in (config.out / "checkpoints" / "checkpoint-6").rglob("*.distcp")}
    assert shards == {"__0_0.distcp", "__1_0.distcp"}
    assert_same_student(config, whole)


@pytest.mark.parametrize("sharding", [pytest.param("none", marks=pytest.mark.slow), "fsdp2"])
def test_ranks_with_a_sketched_tail_have_the_losses_of_one_rank(tmp_path, base, sketched, sharding):
    """And its held-out metrics: every rank has the sketch beside its share of the model."""
    cache = sketched["arrow"].out
    alone = dataclasses.replace(base, cache=cache, eval_cache=cache, out=tmp_path / "alone", tail="sketch", max_steps=4)
    expected = train_student(alone)
    config = two_ranks(alone, tmp_path / "run", sharding=sharding)
    code, errors = launch(config)
    assert code == 0, errors
    assert_same_student(config, alone)
    found = read_metrics(config.out)
    for name in ("eval_cross_entropy", "eval_kl_2", "eval_kl_sketch_1", "eval_kl_sketch_2"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
def test_adapters_on_two_ranks_become_those_of_one(tmp_path, base, undisturbed, sharding):
    """Low-rank adapters beside frozen weights; with FSDP2 both are sharded."""
    alone = dataclasses.replace(base, out=tmp_path / "alone", **ADAPTERS)
    train_student(alone)
    config = undisturbed(sharding, True)
    kind, units = {"none": ("Parameter", []), "fsdp2": ("DTensor", ADAPTED_UNITS)}[sharding]
    assert parameters(config)[0] == {"trained": [kind], "frozen": [kind], "units": units}
    assert_same_student(config, alone)


@pytest.mark.slow
def test_sharded_bfloat16_is_of_weights_and_products_and_not_of_the_batch_or_the_loss(tmp_path, base, whole):
    config = two_ranks(base, tmp_path / "run", sharding="fsdp2", dtype="bfloat16", eval_cache=base.cache)
    code, errors = launch(config)
    assert code == 0, errors
    found, loss_of = parameters(config)
    assert found == {"trained": ["DTensor"], "frozen": [], "units": UNITS}
    assert loss_of == {"hidden": "bfloat16", "weight": "bfloat16", "probs": "float32"}
    losses, exact = ([step[1] for step in trajectory(run)] for run in (config, whole))
    assert losses == pytest.approx(exact, rel=2**-8)  # a bfloat16 has 8 bits
    assert all(torch.tensor(loss).bfloat16().item() != loss for loss in losses)
    assert {weight.dtype for weight in AutoModelForCausalLM.from_pretrained(config.out).parameters()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp2"])
@pytest.mark.parametrize("kind", ["mamba2", "qwen3_moe", "trocr"])
def test_every_kind_of_student_trains_on_two_ranks_as_on_one(tmp_path, base, kind, sharding):
    """Documents computed one by one; adapters on stacked experts; parameters that nothing uses."""
    student = kind_student(tmp_path / "student", kind, open_cache(base.cache[0]).manifest.vocab_size)
    adapters = {"lora_rank": 2, "lora_alpha": 4.0} if kind == "qwen3_moe" else {}
    settings = {"student": student, "max_steps": 4, "router_aux_loss": 0.0, "save_steps": 100}
    alone = dataclasses.replace(base, out=tmp_path / "alone", **settings, **adapters)
    train_student(alone)
    config = two_ranks(base, tmp_path / "run", sharding=sharding, **settings, **adapters)
    code, errors = launch(config)
    assert code == 0, errors
    assert_same_student(config, alone)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wrong_gradient_is_refused_where_the_model_is_sharded(tmp_path, base, dtype):
    """The kernel is right as long as the model is whole."""
    config = two_ranks(base, tmp_path / "run", sharding="fsdp2", dtype=dtype)
    code, errors = launch(config, 0, 0, "gradient")
    assert code != 0
    assert "FSDPLlamaForCausalLM: the fused loss has another gradient for the hidden states of the head" in errors
    assert not list((config.out / "checkpoints").glob("*"))


def test_global_batch_may_be_shared_out_anew_but_not_changed(tmp_path, whole, base):
    config = dataclasses.replace(base, out=tmp_path / "run", max_steps=2, batch_size=4, gradient_accumulation=2)
    train_student(config)
    (config.out / "metrics.json").unlink()
    train_student(dataclasses.replace(config, batch_size=2, gradient_accumulation=4))
    with pytest.raises(ConfigError, match=r"global_batch was 8, now 4 \(batch_size 4 x .* 1 x 1 ranks\)"):
        train_student(dataclasses.replace(config, gradient_accumulation=1))


@pytest.mark.slow
@pytest.mark.parametrize(("sharding", "adapted"), [("none", False), ("fsdp2", False), ("fsdp2", True)])
def test_ranks_killed_again_and_again_continue_to_the_bit(tmp_path, base, undisturbed, sharding, adapted):
    """kill -9 of one rank in a step, then of the other while a checkpoint is saved."""
    expected = undisturbed(sharding, adapted)
    killed = dataclasses.replace(expected, out=tmp_path / "killed", save_steps=2)
    for what_happens in ((1, 4, "step"), (0, 6, "save")):
        assert launch(killed, *what_happens)[0] != 0
        assert not (killed.out / "metrics.json").exists()
    assert launch(killed)[0] == 0
    assert trajectory(killed) == trajectory(expected)
    weights = [AutoModelForCausalLM.from_pretrained(run.out).state_dict() for run in (killed, expected)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*(w.values() for w in weights), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("sharding", "name"), [("none", "usr1"), ("fsdp2", "term")])
def test_signal_to_one_rank_saves_on_all_and_the_run_continues_to_the_bit(tmp_path, base, undisturbed, sharding, name):
    config = two_ranks(base, tmp_path / "run", sharding=sharding, save_steps=100)
    code, errors = launch(config, 1, 5, name)
    assert code != 0
    codes = set(re.findall(r"exitcode +: (-?\d+)", errors))
    assert "75" in codes, errors
    assert codes <= {"75", "-15"}, errors  # torchrun ends a rank that is still on its way out with SIGTERM
    assert (config.out / "checkpoints" / "checkpoint-5" / "whole.json").is_file()
    assert launch(config)[0] == 0
    assert trajectory(config) == trajectory(undisturbed(sharding, False))


@pytest.mark.slow
def test_run_continues_on_one_rank(tmp_path, base, whole):
    """What two ranks began, one finishes: the same steps, but for the order of the sums."""
    config = two_ranks(base, tmp_path / "run", save_steps=3)
    assert launch(config, 1, 5, "step")[0] != 0
    train_student(dataclasses.replace(config, batch_size=4))
    for ours, theirs in zip(trajectory(config), trajectory(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
def test_bad_loss_of_one_rank_is_skipped_by_all(tmp_path, base):
    config = two_ranks(base, tmp_path / "run", on_bad_loss="skip")
    code, errors = launch(config, 1, 4, "nan")
    assert code == 0, errors
    (entry,) = map(json.loads, (config.out / "bad_steps.jsonl").read_text().splitlines())
    assert (entry["step"], entry["problem"], len(set(entry["keys"]))) == (4, "a loss of nan", 8)
    assert [loss is None for _, loss, *_ in trajectory(config)] == [step == 4 for step in range(1, 9)]
