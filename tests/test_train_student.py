"""Stage two: the loss inside the model against dense float64, and a run that survives."""

import contextlib
import dataclasses
import itertools
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from pipeline import open_cache
from pipeline.cache.commits import COMMITS
from pipeline.cache.manifest import MANIFEST
from pipeline.errors import CacheIncompleteError, CacheMismatchError, ConfigError, PipelineError
from pipeline.progress import KeptLines
from pipeline.settings import resolved
from pipeline.stores.sealed import read_json, write_json
from stages.cache_logits.draws import reduce_rows
from stages.cache_logits.engine import unpack
from stages.cache_logits.reduction import Reduction
from stages.train_student.checkpoints import newest_whole_checkpoint, remove_torn_checkpoints
from stages.train_student.dataset import Collate
from stages.train_student.head import attach_fused_loss
from stages.train_student.loss import fused_distillation_loss
from stages.train_student.loss_settings import LossSettings
from stages.train_student.progress import ReportProgress
from stages.train_student.run import train_student
from stages.train_student.settings import TrainConfig
from stages.train_student.trainer import DistillationTrainer
from tests.support.helpers import tiny_tokenizer, wait_until
from tests.support.small import llama_config, make_cache

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory, corpus):
    return make_cache(tmp_path_factory.mktemp("cache"), corpus, max_kl_error=0.0)


@pytest.fixture(scope="module")
def student(tmp_path_factory, cache_folder):
    """A config.json alone: a student that starts from random weights."""
    folder = tmp_path_factory.mktemp("student")
    vocab_size = open_cache(cache_folder).manifest.vocab_size
    llama_config(vocab_size, num_hidden_layers=1, initializer_range=0.02).save_pretrained(folder)
    return folder / "config.json"


def settings(student: Path, cache: Path, out: Path, **changes: object) -> TrainConfig:
    values = {"max_steps": 12, "batch_size": 4, "log_steps": 1, "save_steps": 4, "learning_rate": 1e-2}
    return TrainConfig(student=student, cache=cache, out=out, **values | changes)


def write_yaml(config: TrainConfig) -> Path:
    """The settings as a file for the command line."""
    path = config.out.with_suffix(".yaml")
    path.write_text(json.dumps(resolved(config)))
    return path


def dense_loss(model, cache, indices, alpha, temperature):
    """(1 - alpha) CE + alpha T^2 KL with a ghost tail, document by document, from full logits."""
    losses = []
    vocab_size = cache.manifest.vocab_size
    for index in indices:
        sequence, start = cache[index], 0
        logits = []
        for length in sequence.document_lengths:
            ids = torch.tensor(sequence.token_ids[start : start + length].astype(np.int64))[None]
            logits.append(model(ids).logits[0, :, :vocab_size])
            start += length
        logits = torch.cat(logits)[sequence.target_positions]
        labels = torch.tensor(sequence.token_ids[sequence.target_positions + 1].astype(np.int64))
        cross_entropy = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        p = torch.tensor(sequence.targets.probs(temperature).astype(np.float64))
        tail = torch.tensor(sequence.targets.tail_mass(temperature).astype(np.float64))
        log_q = torch.log_softmax(logits / temperature, 1)
        log_q_kept = log_q.gather(1, torch.tensor(sequence.targets.ids.astype(np.int64)))
        kl = (p * (p.log() - log_q_kept)).sum(1) + tail * (tail.log() - torch.log1p(-log_q_kept.exp().sum(1)))
        losses.append((1 - alpha) * cross_entropy + alpha * temperature**2 * kl)
    return torch.cat(losses)


def collated(sequences, settings):
    """A batch as the model takes it."""
    batch = Collate(settings)(sequences)
    assert batch.pop("keys") == [sequence.key.hex() for sequence in sequences]
    return batch


@pytest.mark.parametrize("tied", [False, True])
def test_loss_in_the_model_equals_dense_documents(cache_folder, tied):
    """Packing, padding, alignment and padded vocabulary: values and gradients of every weight."""
    cache = open_cache(cache_folder)
    torch.manual_seed(0)
    config = llama_config(cache.manifest.vocab_size + 11, num_hidden_layers=1, tie_word_embeddings=tied)
    model = LlamaForCausalLM(config).double()
    reference = LlamaForCausalLM(config).double()
    reference.load_state_dict(model.state_dict())
    settings = LossSettings(alpha=0.3, vocab_size=cache.manifest.vocab_size)
    attach_fused_loss(model, settings)
    indices = [3, 8, 1, 39]
    assert max(len(cache[index].document_lengths) for index in indices) > 1
    batch = collated([cache[index] for index in indices], settings)
    assert len({len(cache[index].token_ids) for index in indices}) > 1
    out = model(**batch)
    expected = dense_loss(reference, cache, indices, 0.3, 2.0).mean()
    torch.testing.assert_close(out.loss, expected, rtol=1e-6, atol=0)
    out.loss.backward()
    expected.backward()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7, msg=name)
    head = model.get_output_embeddings().weight.grad
    assert tied or (head[cache.manifest.vocab_size :] == 0).all()


def test_micro_batches_add_up_to_the_batch(cache_folder):
    cache = open_cache(cache_folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(cache.manifest.vocab_size, num_hidden_layers=1)).double()
    settings = LossSettings(vocab_size=cache.manifest.vocab_size)
    attach_fused_loss(model, settings)
    sequences = [cache[index] for index in range(8)]
    total = sum(len(sequence.targets) for sequence in sequences)
    whole = model(**collated(sequences, settings)).loss
    parts = [model(**collated(sequences[i : i + 2], settings), num_items_in_batch=total).loss for i in range(0, 8, 2)]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=0)


def losses(folder: Path) -> list[float]:
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [entry[name] for entry in log for name in ("loss", "cross_entropy", "kl", "grad_norm") if name in entry]


def test_accumulation_and_ranks_change_nothing(tmp_path, cache_folder, student):
    """One batch of 8; two micro-batches of 4; two ranks of two micro-batches of 2: the same losses and gradients."""
    whole = settings(student, cache_folder, tmp_path / "whole", batch_size=8, max_steps=5, log_steps=1)
    train_student(whole)
    halves = dataclasses.replace(whole, out=tmp_path / "halves", batch_size=4, gradient_accumulation=2)
    train_student(halves)
    assert losses(halves.out) == pytest.approx(losses(whole.out), rel=1e-5)
    ranks = dataclasses.replace(whole, out=tmp_path / "ranks", batch_size=2, gradient_accumulation=2)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "pipeline.cli", "train-student", "--config", str(write_yaml(ranks))]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert finished.returncode == 0, finished.stderr
    assert losses(ranks.out) == pytest.approx(losses(whole.out), rel=1e-4)


def gloo_threads() -> list[str]:
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


@pytest.mark.parametrize("fails", [False, True])
def test_no_thread_of_the_process_group_outlives_the_run(tmp_path, cache_folder, student, monkeypatch, fails):
    """One that does may abort the interpreter while it shuts down, when all work is done."""
    seen = []

    def on_log(*_: object, **__: object) -> None:
        seen.extend(gloo_threads())
        if fails:
            raise ArithmeticError

    monkeypatch.setattr(ReportProgress, "on_log", on_log)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    with pytest.raises(ArithmeticError) if fails else contextlib.nullcontext():
        train_student(settings(student, cache_folder, tmp_path / "run", max_steps=2))
    assert seen
    assert gloo_threads() == []


def test_attached_model_still_gives_logits(cache_folder):
    vocab_size = open_cache(cache_folder).manifest.vocab_size
    model = LlamaForCausalLM(llama_config(vocab_size))
    before = model(torch.arange(10)[None]).logits
    attach_fused_loss(model, LossSettings(vocab_size=vocab_size))
    torch.testing.assert_close(model(torch.arange(10)[None]).logits, before)


def test_trained_student_learns_and_loads(tmp_path, cache_folder, student):
    more = {"eval_cache": cache_folder, "max_steps": 120, "save_steps": 200, "eval_steps": 40, "tensorboard": True}
    config = settings(student, cache_folder, tmp_path / "run", **more)
    metrics = train_student(config)
    log = [json.loads(line) for line in (config.out / "log.jsonl").read_text().splitlines()]
    steps = [entry for entry in log if "loss" in entry]
    assert len(steps) == 120
    for entry in steps:
        assert entry["loss"] == pytest.approx(0.5 * entry["cross_entropy"] + 0.5 * 4 * entry["kl"], rel=1e-5)
    assert metrics["eval_kl_2"] < 0.3 * steps[0]["kl"]
    model = AutoModelForCausalLM.from_pretrained(config.out)
    tokenizer = AutoTokenizer.from_pretrained(config.out)
    assert len(tokenizer) == open_cache(cache_folder).manifest.vocab_size
    cache = open_cache(cache_folder)
    losses = torch.cat([dense_loss(model.double(), cache, [i], 0.0, 2.0) for i in range(len(cache))])
    assert losses.mean().item() == pytest.approx(metrics["eval_cross_entropy"], rel=1e-4)
    assert train_student(config) == metrics
    evaluations = [entry["step"] for entry in log if "eval_cross_entropy" in entry]
    assert evaluations == [40, 80, 120, 120]
    page = (config.out / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 13
    assert not any(word in page for word in ("<script", "<link", "src=", "url(http"))
    assert any((config.out / "tensorboard").glob("events.*"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_killed_run_continues_to_the_bit(tmp_path, cache_folder, student):
    """kill -9 after a checkpoint; the log and the weights are those of a run that nothing happened to."""
    whole = settings(student, cache_folder, tmp_path / "whole", max_steps=60, save_steps=10)
    train_student(whole)
    config = dataclasses.replace(whole, out=tmp_path / "killed")
    command = [sys.executable, "-m", "pipeline.cli", "train-student", "--config", str(write_yaml(config))]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_until(lambda: newest_whole_checkpoint(config.out / "checkpoints") is not None)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (config.out / "metrics.json").exists()
    train_student(config)
    for (name, ours), theirs in zip(weights(config.out).items(), weights(whole.out).values(), strict=True):
        assert torch.equal(ours, theirs), name
    logs = [
        [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] for out in (whole.out, config.out)
    ]
    trajectories = [[(entry["step"], entry["loss"]) for entry in log if "loss" in entry] for log in logs]
    assert trajectories[0] == trajectories[1]


def logged(folder: Path) -> list[tuple[int, float]]:
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_signal_saves_and_exits_75(tmp_path, cache_folder, student, number):
    """Between two lines of the log and two checkpoints; the means of the next line are those of an undisturbed run."""
    config = settings(student, cache_folder, tmp_path / "run", max_steps=100_000, log_steps=7, save_steps=100_000)
    command = [sys.executable, "-m", "pipeline.cli", "train-student", "--config", str(write_yaml(config))]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: (config.out / "log.jsonl").is_file() and logged(config.out))
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    step = newest_whole_checkpoint(config.out / "checkpoints").name.removeprefix("checkpoint-")
    assert f"step {step} of 100000 is saved; run the same command again to continue." in errors


def test_log_and_spikes_of_a_resumed_run_are_those_of_an_undisturbed_one(tmp_path, cache_folder, student, monkeypatch):
    """A checkpoint between two lines of the log holds what the next line's means need."""
    whole = settings(student, cache_folder, tmp_path / "whole", max_steps=14, log_steps=7, save_steps=5)
    train_student(whole)
    config = dataclasses.replace(whole, out=tmp_path / "stopped")
    judge = DistillationTrainer.judge_step

    def dies(self: DistillationTrainer) -> None:
        if self.state.global_step == 11:
            raise KeyboardInterrupt
        judge(self)

    with monkeypatch.context() as patched:
        patched.setattr(DistillationTrainer, "judge_step", dies)
        with pytest.raises(KeyboardInterrupt):
            train_student(config)
    torn = shutil.copytree(config.out / "checkpoints" / "checkpoint-10", config.out / "checkpoints" / "checkpoint-11")
    (torn / "whole.json").unlink()
    (torn / "model.safetensors").write_bytes(b"")
    assert newest_whole_checkpoint(config.out / "checkpoints").name == "checkpoint-10"
    train_student(config)
    assert logged(config.out) == logged(whole.out)
    assert not torn.exists()


@pytest.mark.parametrize("action", ["skip", "stop"])
def test_bad_step_moves_nothing_and_is_never_silent(tmp_path, cache_folder, student, monkeypatch, action):
    """An infinite gradient in step 3; without a bad step, weights move in every one."""
    judge, seen = DistillationTrainer.judge_step, []

    def broken(self: DistillationTrainer) -> None:
        if self.state.global_step == 2:
            for parameter in self.model.parameters():
                parameter.grad.fill_(float("inf"))
            self._grad_norm = float("inf")
        judge(self)
        seen.append([parameter.detach().clone() for parameter in self.model.parameters()])

    monkeypatch.setattr(DistillationTrainer, "judge_step", broken)
    lines = KeptLines()
    config = settings(student, cache_folder, tmp_path / "run", max_steps=5, on_bad_loss=action, warmup_ratio=0.0)
    if action == "stop":
        with pytest.raises(PipelineError, match=r"step 3: a gradient of norm inf .* --on-bad-loss skip in this one"):
            train_student(config, lines)
        return
    train_student(config, lines)
    (line,) = [line for line in lines.lines if "step 3: a gradient of norm inf" in line]
    assert "skipped; its 4 sequences" in line
    moved = [not torch.equal(before[1], after[1]) for before, after in itertools.pairwise(seen)]
    assert moved == [True, True, False, True]  # seen before the step of the same number
    assert all(torch.isfinite(weight).all() for weight in weights(config.out).values())


def test_torn_checkpoint_is_never_picked(tmp_path):
    for step, is_whole in ((4, True), (8, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text("{}")
        if is_whole:
            write_json(folder / "whole.json", {"step": step, "sums": [0.0] * 3, "good_steps": 0, "history": []})
    assert newest_whole_checkpoint(tmp_path).name == "checkpoint-4"
    remove_torn_checkpoints(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_hard_labels_alone_need_no_other_code(tmp_path, cache_folder, student):
    train_student(settings(student, cache_folder, tmp_path / "run", alpha=0.0, max_steps=3))
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[2])
    assert last["loss"] == pytest.approx(last["cross_entropy"], rel=1e-6)


def test_incomplete_cache_is_refused(tmp_path, cache_folder, student):
    incomplete = shutil.copytree(cache_folder, tmp_path / "cache")
    (incomplete / COMMITS / "00001.json").unlink()
    with pytest.raises(CacheIncompleteError, match="not captured yet"):
        train_student(settings(student, incomplete, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_student_of_another_vocabulary_is_refused_before_it_is_loaded(tmp_path, cache_folder):
    (tmp_path / "student").mkdir()
    llama_config(17).save_pretrained(tmp_path / "student")
    (tmp_path / "student" / "model.safetensors").write_text("would not load")
    with pytest.raises(CacheMismatchError, match=r"a vocabulary of 17; the cache has \d+ ids"):
        train_student(settings(tmp_path / "student", cache_folder, tmp_path / "run"))
    llama_config(open_cache(cache_folder).manifest.vocab_size).save_pretrained(tmp_path / "student")
    tiny_tokenizer(tmp_path / "student", vocab_size=290)
    with pytest.raises(CacheMismatchError, match="the student's tokenizer is not the cache's"):
        train_student(settings(tmp_path / "student", cache_folder, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_finished_run_is_known_after_everything_has_moved(tmp_path, cache_folder, student, monkeypatch):
    shutil.copytree(cache_folder, tmp_path / "cache")
    shutil.copytree(student.parent, tmp_path / "student")
    metrics = train_student(
        settings(tmp_path / "student" / student.name, tmp_path / "cache", tmp_path / "out", max_steps=1)
    )
    for name in ("student", "cache", "out"):
        (tmp_path / name).rename(tmp_path / f"moved-{name}")
    monkeypatch.chdir(tmp_path)
    places = (Path("moved-student") / student.name, Path("moved-cache"), Path("moved-out"))
    assert train_student(settings(*places, max_steps=1), lines := KeptLines()) == metrics
    assert lines.lines == ["moved-out: finished before; nothing to do."]


@pytest.mark.parametrize("ends", [(), (7,), (3, 7)])
def test_written_student_stops_where_the_documents_end(tmp_path, cache_folder, student, ends):
    shutil.copytree(cache_folder, tmp_path / "cache")
    document = read_json(tmp_path / "cache" / MANIFEST, PipelineError)
    write_json(tmp_path / "cache" / MANIFEST, {**document, "end_token_ids": list(ends)})
    train_student(settings(student, tmp_path / "cache", tmp_path / "out", max_steps=1))
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.eos_token_id
    assert generation.eos_token_id == (own if not ends else 7 if len(ends) == 1 else [3, 7])


def test_mistakes_are_named(tmp_path, cache_folder, student):
    with pytest.raises(ConfigError, match="temperature 3 was not captured; the cache is exact at: 1, 2"):
        train_student(settings(student, cache_folder, tmp_path / "run", temperature=3.0))
    with pytest.raises(ConfigError, match="nowhere: no student there"):
        train_student(settings(Path("nowhere"), cache_folder, tmp_path / "run"))
    config = settings(student, cache_folder, tmp_path / "run", max_steps=1)
    train_student(config)
    with pytest.raises(ConfigError, match=r"alpha was 0\.5, now 0\.1"):
        train_student(dataclasses.replace(config, alpha=0.1))


def test_hybrid_gradient_is_unbiased_where_ghost_and_zero_are_not():
    """Against the full-vocabulary KL, on fresh random numbers; each policy through collate's own merging."""
    num_draws, top_k, vocab_size, count, temperature = 8, 4, 60, 4000, 2.0
    torch.seed()
    teacher, student = 3 * torch.randn(1, vocab_size), torch.randn(1, vocab_size, dtype=torch.float64)
    reduction = Reduction(top_k, (temperature,), num_draws, temperature)
    rows = teacher.expand(count, -1).contiguous()
    packed = reduce_rows(reduction, rows, torch.zeros(count, dtype=torch.long), torch.rand(count))
    targets = unpack(packed.numpy(), reduction)
    p, q = (torch.softmax(logits.double() / temperature, 1)[0] for logits in (teacher, student))
    full = temperature * (q - p)
    value = temperature**2 * (p * (p / q).log()).sum()

    def run(tail, chosen):
        """Mean value, mean gradient and its standard error."""
        ids, probs = Collate(LossSettings(vocab_size=vocab_size, temperature=temperature, tail=tail))._entries(chosen)
        logits = student.expand(len(ids), -1).clone().requires_grad_()
        out = fused_distillation_loss(
            logits,
            torch.eye(vocab_size, dtype=torch.float64),
            torch.zeros(len(ids), dtype=torch.long),
            torch.tensor(ids).long(),
            torch.tensor(probs).double(),
            torch.tensor(chosen.tail_mass(temperature)).double(),
            alpha=1.0,
            temperature=temperature,
            tail=tail,
            num_target_tokens=1,
            teacher_entropy_N=torch.tensor(chosen.entropy(temperature)).double() if tail == "hybrid" else None,
        )
        out.loss.backward()
        gradients = logits.grad
        return out.loss.item() / len(ids), gradients.mean(0), gradients.std(0) / len(ids) ** 0.5

    mean_value, mean, error = run("hybrid", targets)
    assert ((mean - full).abs() <= 6 * error + 1e-6).all()
    assert mean_value == pytest.approx(value.item(), rel=0.02)
    bias = (mean - full).norm()
    for tail in ("ghost", "zero"):
        _, biased, _ = run(tail, targets[:2])
        assert (biased - full).norm() > 5 * bias, tail


def test_training_on_draws(tmp_path, corpus, student):
    """Top k and draws, and draws alone (random-sampling KD), from the cache to a student."""
    both = make_cache(tmp_path / "both", corpus, tail_samples=6)
    draws = make_cache(tmp_path / "draws", corpus, top_k=0, tail_samples=6)
    for name, cache, tail in (("both", both, "hybrid"), ("draws", draws, "sampled")):
        config = settings(student, cache, tmp_path / f"run-{name}", tail=tail, max_steps=30, save_steps=100)
        train_student(config)
        log = [json.loads(line) for line in (config.out / "log.jsonl").read_text().splitlines()]
        assert log[29]["kl"] < 0.7 * log[0]["kl"]
    with pytest.raises(ConfigError, match="take --tail sampled, not 'ghost'"):
        train_student(settings(student, draws, tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"at T=1 needs draws .* it has draws at T=2 alone"):
        train_student(settings(student, both, tmp_path / "run", tail="hybrid", temperature=1.0))
