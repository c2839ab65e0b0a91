"""A training knows its caches and its student by what they are, wherever they lie."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cache.manifest import CacheManifest
from pipeline.errors import CacheMismatchError, ConfigError
from pipeline.stores.sealed import read_json, write_json
from stages.train_student.checks import RUN, open_folder, require_measurable, require_room
from stages.train_student.divergences import DIVERGENCES
from stages.train_student.guards import BAD_LOSS_ACTIONS
from stages.train_student.sampler import StepShape
from stages.train_student.schedules import ALPHA_SCHEDULES, SCHEDULES
from stages.train_student.settings import TrainConfig
from stages.train_student.shardings import SHARDINGS
from stages.train_student.tails import TAILS
from tests.support.small import llama_config, make_cache

SHAPE = StepShape(batch_size=8, accumulation=1, rank=0, world_size=1)


@pytest.fixture
def config(tmp_path, corpus) -> TrainConfig:
    """A run that has begun, with a student of random weights and a held-out cache."""
    cache = make_cache(tmp_path / "cache", corpus)
    shutil.copytree(cache, tmp_path / "held-out")
    llama_config(400).save_pretrained(tmp_path / "student")
    config = TrainConfig(
        student=tmp_path / "student", cache=cache, out=tmp_path / "out", eval_cache=tmp_path / "held-out"
    )
    open_run(config)
    return config


def open_run(config: TrainConfig) -> None:
    held_out = [CacheManifest.read(place) for place in config.eval_cache]
    open_folder(config, [CacheManifest.read(place) for place in config.cache], held_out, SHAPE)


def test_moved_renamed_and_relative_paths_continue(config, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    for name in ("cache", "held-out", "student", "out"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / f"my-{name}")
    monkeypatch.chdir(tmp_path / "elsewhere")
    moved = {"student": Path("my-student"), "cache": Path("my-cache"), "eval_cache": Path("./my-held-out")}
    open_run(dataclasses.replace(config, **moved, out=Path("my-out"), trust_remote_code=True))


def test_a_copy_in_the_other_container_continues(config, tmp_path, corpus):
    other = make_cache(tmp_path / "zarr", corpus, container="zarr")
    open_run(dataclasses.replace(config, cache=other))


@pytest.mark.parametrize("name", ["cache", "eval_cache"])
def test_another_cache_under_the_same_path_is_refused(config, corpus, name):
    (folder,) = getattr(config, name)
    shutil.rmtree(folder)
    make_cache(folder, corpus, top_k=4)
    with pytest.raises(ConfigError, match=f"holds a run with other settings: {name}: top_k was 8, now 4; choose"):
        open_run(config)


def test_another_student_under_the_same_path_is_refused(config):
    path = config.student / "config.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"transformers_version": "9.9"}))
    open_run(config)
    path.write_text(json.dumps(document | {"rms_norm_eps": 1e-3}))
    with pytest.raises(ConfigError, match="student: config was"):
        open_run(config)
    path.write_text(json.dumps(document))
    (config.student / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(ConfigError, match="student: weights was"):
        open_run(config)


def test_held_out_cache_that_comes_or_goes_is_refused(config):
    with pytest.raises(ConfigError, match=r"eval_cache was \['.*held-out'\], now \[\]"):
        open_run(dataclasses.replace(config, eval_cache=None))


def test_run_of_a_version_that_knew_fewer_settings_continues(config):
    """It recorded paths alone, and no setting that came later."""
    path = config.out / RUN
    known = read_json(path, ConfigError)
    early = {key: value for key, value in known.items() if ": " not in key and key not in ("lora_head", "shares")}
    write_json(path, early | {"cache": "/other/place", "eval_cache": "/other/place"})
    open_run(config)
    with pytest.raises(ConfigError, match="lora_head was False, now True"):
        open_run(dataclasses.replace(config, lora_rank=4, lora_head=True))


def test_temperature_that_the_held_out_cache_lacks_names_that_cache(config):
    held_out = dataclasses.replace(CacheManifest.read(config.eval_cache[0]), temperatures=(1.0,))
    with pytest.raises(ConfigError, match=r"held-out: temperature 2 was not captured; the cache is exact at: 1\."):
        require_measurable(config, config.eval_cache[0], held_out)


def test_held_out_sequences_longer_than_the_context_name_that_cache(config):
    (place,) = config.eval_cache
    held_out = CacheManifest.read(place)
    require_room(config, place, held_out.sequence_length, held_out)
    with pytest.raises(CacheMismatchError, match=r"held-out: sequences of 96 tokens; .*student has a context of 95"):
        require_room(config, place, 95, held_out)


def test_help_knows_the_choices_without_torch_and_where_tensorboard_looks():
    program = (
        "import sys; from click.testing import CliRunner; from pipeline.cli import main\n"
        "out = CliRunner().invoke(main, ['train-student', '--help'], env={'COLUMNS': '500'}).stdout\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "print(out)"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=100
    ).stdout
    words = " ".join(out.split())
    assert "under OUT/tensorboard." in words
    for table in (TAILS, DIVERGENCES, SCHEDULES, ALPHA_SCHEDULES, SHARDINGS, BAD_LOSS_ACTIONS):
        assert f"[{'|'.join(table)}]" in words
