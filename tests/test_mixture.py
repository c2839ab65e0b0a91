"""Several caches in one training: exact shares, a stream that ranks and restarts do not change, figures by source."""

import dataclasses
import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from pipeline import open_cache
from pipeline.errors import CacheMismatchError, ConfigError
from pipeline.selection.run import select
from pipeline.selection.settings import SelectConfig
from pipeline.settings import resolved
from pipeline.stores.places import store_of
from pipeline.stores.sealed import read_json, write_json
from stages.train_student.dataset import CacheDataset, Collate, MixedDataset
from stages.train_student.head import attach_fused_loss
from stages.train_student.loss_settings import LossSettings
from stages.train_student.run import train_student
from stages.train_student.sampler import MixedSampler, Mixture, StepShape
from stages.train_student.settings import TrainConfig
from stages.train_student.sources import shares_of, sources_of
from stages.train_student.trainer import DistillationTrainer
from tests.support.helpers import run
from tests.support.small import llama_config, make_cache, make_corpus, random_sequences
from tests.test_train_student import dense_loss

ROOT = Path(__file__).parent.parent
MIXTURES = [
    ("3/10", "7/10"),
    ("1/2", "1/2"),
    ("1/1000", "999/1000"),
    ("1/3", "1/3", "1/3"),
    ("1/5", "3/10", "1/2"),
    ("98/100", "1/100", "1/100"),
    ("17/61", "23/61", "11/61", "10/61"),
    *(["1/8"] * 8,),
]


def fractions(texts):
    return [Fraction(text) for text in texts]


@pytest.mark.parametrize("shares", MIXTURES, ids=str)
def test_counts_are_exact_from_the_first_position_on(shares):
    """Every prefix within the stated bound, every window within twice that (of two sources: within 1); no drift."""
    shares = fractions(shares)
    mixture, length = Mixture(shares), 3000
    sources = [mixture.item(position)[0] for position in range(length)]
    counts = np.cumsum(np.eye(len(shares), dtype=int)[sources], axis=0)
    for number, share in enumerate(shares):
        exact = np.array([float(share * (position + 1)) for position in range(length)])
        off = np.concatenate([[0], counts[:, number] - exact])
        bound = 0.5 + float(share) * (len(shares) - 2) / 2
        assert np.abs(off).max() <= bound + 1e-9
        assert off.max() - off.min() <= 2 * bound + 1e-9  # the worst window
    assert mixture.counts(length) == counts[-1].tolist()


@pytest.mark.parametrize("shares", MIXTURES, ids=str)
def test_any_position_is_what_walking_there_gives(shares):
    mixture = Mixture(fractions(shares))
    seen = [0] * len(shares)
    for position in range(500):
        assert mixture.counts(position) == seen
        source, index = mixture.item(position)
        assert index == seen[source]
        seen[source] += 1


def test_a_position_far_away_costs_no_more():
    shares = fractions(["123457/1000000", "76543/1000000", "800000/1000000"])
    far = 10**15
    counts = Mixture(shares).counts(far)
    assert sum(counts) == far
    assert all(abs(count - share * far) < 1 for count, share in zip(counts, shares))


def test_by_size_every_sequence_comes_once_an_epoch():
    """The default is the whole of every source; with shares each source goes through its own epochs."""
    sizes = [5, 17, 40]
    shares = [Fraction(size, 62) for size in sizes]
    sampler = MixedSampler(sizes, shares, 3, StepShape(batch_size=1, accumulation=1), 10)
    for epoch in range(3):
        assert sorted(sampler.sequence_at(62 * epoch + at) for at in range(62)) == list(range(62))
    uneven = MixedSampler(sizes, fractions(["1/2", "1/4", "1/4"]), 3, StepShape(batch_size=1, accumulation=1), 10)
    taken = [uneven.sequence_at(position) for position in range(200)]
    first = [row for row in taken if row < 5]
    assert [sorted(first[at : at + 5]) for at in range(0, 95, 5)] == [list(range(5))] * 19
    assert len({tuple(first[at : at + 5]) for at in range(0, 95, 5)}) > 10


def steps_of(batch_size, accumulation, world_size, first_step=0):
    steps = [[] for _ in range(9 - first_step)]
    for rank in range(world_size):
        shape = StepShape(batch_size=batch_size, accumulation=accumulation, rank=rank, world_size=world_size)
        sampler = MixedSampler([50, 20, 7], fractions(["1/2", "3/10", "1/5"]), 5, shape, 9)
        sampler.first_step = first_step
        for number, micro_batch in enumerate(sampler):
            steps[number // accumulation] += micro_batch
    return [sorted(step) for step in steps]


def test_steps_of_a_mixture_do_not_depend_on_ranks_or_micro_batches():
    expected = steps_of(12, 1, 1)
    for division in ((6, 2, 1), (4, 1, 3), (2, 3, 2)):
        assert steps_of(*division) == expected
        assert steps_of(*division, first_step=4) == expected[4:]


def named(*texts):
    return sources_of([store_of(text) for text in texts])


def test_shares_are_those_given_and_the_rest_goes_by_size():
    sources = named("a", "b=0.3", "view.json=0.5")
    assert [source.name for source in sources] == ["a", "b", "view"]
    assert shares_of(sources, [10, 20, 30]) == fractions(["1/5", "3/10", "1/2"])
    assert shares_of(named("a", "b"), [10, 30]) == fractions(["1/4", "3/4"])
    assert shares_of(named("a=1", "b=3"), [10, 30]) == fractions(["1/4", "3/4"])
    assert shares_of(named("a", "b", "c=0.1"), [1, 2, 9]) == fractions(["3/10", "6/10", "1/10"])
    assert [source.name for source in named("x/a", "y/a", "s3://bucket/a=0.2")] == ["a", "a-2", "a-3"]
    assert str(named("s3://bucket/a=0.2")[0].place) == "s3://bucket/a"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache": (Path("a=0"), Path("b"))}, "the share after = must be above 0"),
        ({"cache": (Path("a=-1"), Path("b"))}, "the share after = must be above 0"),
        ({"cache": (Path("a=0.6"), Path("b=0.4"), Path("c"))}, "leaves nothing for those without one"),
        ({"cache": Path("a"), "eval_cache": (Path("b=0.5"),)}, "held-out caches are measured whole"),
    ],
)
def test_shares_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(student=Path("s"), out=Path("o"), **changes)


@pytest.fixture(scope="module")
def caches(tmp_path_factory, corpus):
    """Two caches by teachers of other k, of 40 and 12 sequences."""
    other = make_corpus(tmp_path_factory.mktemp("corpus"), random_sequences(12, vocab_size=300, seed=5))
    folder = tmp_path_factory.mktemp("caches")
    first = make_cache(folder / "one", corpus, max_kl_error=0.0)
    return first, make_cache(folder / "two", other, top_k=5, container="zarr", max_kl_error=1e-4)


@pytest.fixture(scope="module")
def base(tmp_path_factory, caches):
    student = tmp_path_factory.mktemp("student")
    vocab_size = open_cache(caches[0]).manifest.vocab_size
    llama_config(vocab_size, num_hidden_layers=1, initializer_range=0.02).save_pretrained(student)
    values = {"max_steps": 4, "batch_size": 8, "log_steps": 1, "save_steps": 2, "learning_rate": 1e-2}
    mixed = (caches[0], Path(f"{caches[1]}=0.4"))
    return TrainConfig(student=student / "config.json", cache=mixed, out=Path("unset"), eval_cache=caches, **values)


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def figures(folder):
    lost = ("tokens_per_second", "data_wait_share")
    entries = [entry for entry in log_of(folder) if "train_runtime" not in entry]
    return [{name: value for name, value in entry.items() if name not in lost} for entry in entries]


def test_loss_of_a_mixed_batch_and_its_sums_by_source_equal_dense_float64(caches):
    """Targets of other k in one batch; values and gradients."""
    opened = [open_cache(folder) for folder in caches]
    vocab_size = opened[0].manifest.vocab_size
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(vocab_size, num_hidden_layers=1)).double()
    reference = LlamaForCausalLM(llama_config(vocab_size, num_hidden_layers=1)).double()
    reference.load_state_dict(model.state_dict())
    settings = LossSettings(alpha=0.3, vocab_size=vocab_size)
    attach_fused_loss(model, settings, num_sources=2)
    data = MixedDataset([CacheDataset(cache, vocab_size) for cache in opened])
    assert len(data) == 52
    batch = Collate(settings)([data[index] for index in (3, 41, 20, 51)])
    batch.pop("keys")
    out = model(**batch)
    dense = [
        dense_loss(reference, opened[source], [index], 0.3, 2.0) for source, index in ((0, 3), (1, 1), (0, 20), (1, 11))
    ]
    expected = torch.cat(dense).mean()
    torch.testing.assert_close(out.loss, expected, rtol=1e-6, atol=0)
    for source, parts in ((0, dense[::2]), (1, dense[1::2])):
        count, loss, cross_entropy, kl = out.by_source[source].tolist()
        assert count == sum(map(len, parts))
        assert loss == pytest.approx(torch.cat(parts).sum().item(), rel=1e-5)
        assert loss == pytest.approx(0.7 * cross_entropy + 0.3 * 4 * kl, rel=1e-5)
    out.loss.backward()
    expected.backward()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_a_mixture_trains_the_same_however_it_is_divided(base, tmp_path):
    whole = dataclasses.replace(base, out=tmp_path / "whole", positions="entropy:0.5")
    metrics = train_student(whole)
    parts = dataclasses.replace(whole, out=tmp_path / "ranks", batch_size=2, gradient_accumulation=2)
    path = tmp_path / "ranks.yaml"
    path.write_text(json.dumps(resolved(parts)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "pipeline.cli", "train-student", "--config", str(path)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    for ours, theirs in zip(figures(parts.out), figures(whole.out), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    assert metrics["sequences/one"] + metrics["sequences/two"] == 32
    assert metrics["sequences/two"] == 13  # 0.4 of 32, to the nearest
    assert metrics["epochs/two"] == pytest.approx(13 / 12)


def test_a_resumed_mixture_continues_to_the_bit(base, tmp_path, monkeypatch):
    whole = dataclasses.replace(base, out=tmp_path / "whole", log_steps=3)
    train_student(whole)
    again = dataclasses.replace(whole, out=tmp_path / "again")
    judged, step = [], DistillationTrainer.judge_step

    def stop_at_3(self):
        judged.append(1)
        if len(judged) == 3:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(DistillationTrainer, "judge_step", stop_at_3)
    with pytest.raises(KeyboardInterrupt):
        train_student(again)
    train_student(again)
    assert len(judged) == 3 + 2
    assert figures(again.out) == figures(whole.out)
    mixed = tuple(Path(f"{source.place}=1") for source in sources_of(again.cache))
    with pytest.raises(ConfigError, match=r"shares was \['3/5', '2/5'\], now \['1/2', '1/2'\]"):
        train_student(dataclasses.replace(again, cache=mixed))


def test_figures_by_source_add_up_to_those_of_all(base, tmp_path):
    config = dataclasses.replace(base, out=tmp_path / "run", eval_steps=2)
    metrics = train_student(config)
    log = log_of(config.out)
    steps = [entry for entry in log if "loss" in entry]
    for entry in steps:
        counts = [entry[f"targets/{name}"] for name in ("one", "two")]
        for name in ("loss", "cross_entropy", "kl"):
            total = sum(count * entry[f"{name}/{source}"] for count, source in zip(counts, ("one", "two")))
            assert total / sum(counts) == pytest.approx(entry[name], rel=1e-4)
    sizes = [open_cache(place).manifest.num_targets for place in base.eval_cache]
    for name in ("eval_cross_entropy", "eval_kl_2", "eval_top1_agreement", "eval_teacher_cross_entropy"):
        total = sum(size * metrics[f"{name}/{source}"] for size, source in zip(sizes, ("one", "two")))
        assert total / sum(sizes) == pytest.approx(metrics[name], rel=1e-6)
    alone = dataclasses.replace(base, out=tmp_path / "alone", eval_cache=base.eval_cache[1:])
    single = train_student(alone)
    assert single["eval_cross_entropy"] == pytest.approx(metrics["eval_cross_entropy/two"], rel=1e-6)
    page = (config.out / "report.html").read_text(encoding="utf-8")
    assert "trained on" in page
    assert "Cross-entropy by held-out cache" in page


def test_views_take_part_in_a_mixture(base, caches, tmp_path):
    view = tmp_path / "best.json"
    select(SelectConfig(cache=caches[0], out=view, by="document", keep=0.3, order="largest:entropy"))
    mixed = (caches[1], Path(f"{view}=0.25"))
    metrics = train_student(dataclasses.replace(base, cache=mixed, out=tmp_path / "run", eval_cache=(view,)))
    assert metrics["sequences/best"] == 8
    assert metrics["epochs/best"] == pytest.approx(8 / len(open_cache(view)))


def test_caches_that_do_not_go_together_are_named(base, caches, tmp_path, corpus):
    def changed(name, entries):
        place = make_cache(tmp_path / name, corpus)
        document = read_json(place / "manifest.json", ConfigError)
        (place / "index.arrow").unlink(missing_ok=True)
        write_json(place / "manifest.json", {**document, **entries(document)})
        return place

    cold = changed("cold", lambda document: {"temperatures": [1.0, 3.0]})
    small = changed("small", lambda document: {"vocab_size": document["vocab_size"] - 1})
    foreign = changed("foreign", lambda document: {"tokenizer": document["tokenizer"] | {"probe": "0" * 32}})
    for place, message in (
        (cold, r"cold: temperature 2 was not captured"),
        (small, r"small: a vocabulary of \d+; .*one has \d+"),
        (foreign, r"foreign: its tokenizer is not that of .*one"),
    ):
        with pytest.raises((ConfigError, CacheMismatchError), match=message):
            train_student(dataclasses.replace(base, cache=(caches[0], place), out=tmp_path / "run"))
    hybrid = dataclasses.replace(base, tail="hybrid", out=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"one: tail 'hybrid' at T=2 needs draws"):
        train_student(hybrid)


def test_the_command_takes_several_caches(base, caches, tmp_path):
    values = ["--student", base.student, "--out", tmp_path / "run", "--max-steps", 2, "--batch-size", 4]
    code, _, errors = run("train-student", "--cache", caches[0], "--cache", f"{caches[1]}=0.5", *values)
    assert code == 0, errors
    assert "one 50.0%, two 50.0%" in errors
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["sequences/two"] == 4
