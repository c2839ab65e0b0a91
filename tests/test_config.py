"""Settings: precedence, checks, and the messages that a user can act on."""

from pathlib import Path

import pytest
import yaml

from pipeline.errors import ConfigError
from pipeline.launch.settings import SubmitConfig
from pipeline.settings import load_config, resolved
from pipeline.stores.local_copies import COPIES, copies_folder
from pipeline.stores.places import store_of
from stages.cache_logits.settings import AuditConfig, CacheConfig
from stages.prepare.settings import PrepareConfig
from stages.train_student.settings import TrainConfig

EXAMPLES = Path(__file__).parent.parent / "data" / "examples"
CLASSES = {
    "prepare": PrepareConfig,
    "cache-logits": CacheConfig,
    "train-student": TrainConfig,
    "submit": SubmitConfig,
}
NEEDED = {
    PrepareConfig: {"inputs": ["a.txt"], "tokenizer": "t", "out": "o"},
    CacheConfig: {"teacher": "t", "corpus": "c", "out": "o"},
    SubmitConfig: {"launcher": "local", "cache_logits": "c.yaml"},
    TrainConfig: {"student": "s", "cache": "c", "out": "o"},
    AuditConfig: {"cache": "c", "teacher": "t"},
}


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_examples_are_valid(path):
    config = load_config(CLASSES[path.stem], path)
    values = yaml.safe_load(path.read_text()).items()
    assert all(resolved(config)[key] in (value, [value]) for key, value in values)  # one cache of several


def test_examples_exist_for_every_command_and_both_sizes():
    names = {f"{path.parent.name}/{path.stem}" for path in EXAMPLES.rglob("*.yaml")}
    whole = {f"{size}/{command}" for size in ("small", "deepseek") for command in CLASSES}
    assert names == whole | {"store/prepare", "store/cache-logits", "store/train-student"}


def test_the_recipe_is_the_default():
    config = load_config(TrainConfig, None, NEEDED[TrainConfig])
    assert (config.alpha, config.temperature, config.tail) == (0.5, 2.0, "ghost")


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("teacher: t\ncorpus: c\nout: o\ntop_k: 32\nshard_tokens: 1e6\n")
    config = load_config(CacheConfig, path, {"top_k": 8, "max_kl_error": None})
    assert (config.top_k, config.shard_tokens, config.max_kl_error) == (8, 1_000_000, 1e-4)


@pytest.mark.parametrize(("ranks", "logits_bytes", "rows"), [(1, None, 1024), (8, None, 8192), (8, 1000, 1)])
def test_budget_of_logits_is_that_of_one_device(ranks, logits_bytes, rows):
    changes = {"tensor_parallel": ranks, "logits_bytes": logits_bytes}
    assert load_config(CacheConfig, None, {**NEEDED[CacheConfig], **changes}).rows_at_once(102_400) == rows


def test_file_of_a_run_that_an_earlier_version_began_is_still_taken(tmp_path):
    """It counts positions, and says so to every worker that goes on; nobody is told of the setting any more."""
    path = tmp_path / "run.yaml"
    path.write_text("teacher: t\ncorpus: c\nout: o\nrow_chunk: 256\n")
    config = load_config(CacheConfig, path)
    assert config.rows_at_once(102_400) == 256
    assert load_config(CacheConfig, None, resolved(config)) == config
    path.write_text("zzzz: 1\n")
    with pytest.raises(ConfigError, match=r"valid keys are: .*logits_bytes") as caught:
        load_config(CacheConfig, path)
    assert "row_chunk" not in str(caught.value)


@pytest.mark.parametrize(("given", "value"), [("lossless", 0.0), ("1e-3", 1e-3), (0.002, 0.002)])
def test_bound_on_the_kl_error_is_a_number_or_lossless(given, value):
    config = load_config(CacheConfig, None, {**NEEDED[CacheConfig], "max_kl_error": given})
    assert config.max_kl_error == value
    assert load_config(CacheConfig, None, resolved(config)).max_kl_error == value


def test_yaml_number_without_a_point_is_a_number(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 1e-4\n")
    assert load_config(TrainConfig, path, NEEDED[TrainConfig]).learning_rate == 1e-4


@pytest.mark.parametrize(
    ("config_class", "changes", "message"),
    [
        (CacheConfig, {"temperatures": [0]}, "temperatures is 0.0; a temperature must be a finite number above 0"),
        (CacheConfig, {"temperatures": [1.0, 1.0]}, "each may be given once"),
        (CacheConfig, {"temperatures": []}, "give at least one"),
        (CacheConfig, {"top_k": -1}, "top_k is -1; it must be at least 0"),
        (CacheConfig, {"top_k": 0}, "top_k is 0 and tail_samples is 0; keep at least one entry"),
        (CacheConfig, {"draw_temperature": 3.0}, r"draw_temperature is 3\.0; choose one of: \[1\.0, 2\.0\]"),
        (CacheConfig, {"top_k": 2.5}, r"top_k is 2\.5; expected a value of type int"),
        (
            CacheConfig,
            {"max_kl_error": 1e-9},
            r"max_kl_error is 1e-09; it must lie in \[1e-05, 1\] nats or be lossless",
        ),
        (CacheConfig, {"max_kl_error": "loseless"}, r"max_kl_error is 'loseless'; expected a value of type float"),
        (CacheConfig, {"engine": "sglang"}, "engine is 'sglang'; choose one of: vllm, transformers"),
        (CacheConfig, {"out": None}, "--out is missing"),
        (TrainConfig, {"alpha": 1.5}, r"alpha is 1\.5; it must lie in \[0, 1\]"),
        (TrainConfig, {"temperature": float("nan")}, "temperature is nan"),
        (TrainConfig, {"tail": "bucket"}, "choose one of: ghost, hybrid, sampled, zero, renormalise, uniform"),
        (TrainConfig, {"batch_size": True}, "batch_size is True; expected a value of type int"),
        (TrainConfig, {"eval_steps": 5}, "eval_steps is 5 without eval_cache"),
        *(
            (config_class, {"seed": seed}, f"seed is {seed}; it must lie in \\[0, 4294967295\\]")
            for config_class in (TrainConfig, AuditConfig)
            for seed in (-1, 2**32, 2**64)
        ),
        (TrainConfig, {"seed": 10**400}, "seed is 10{400}; expected a value of type int"),
        (TrainConfig, {"seed": 1.5}, "expected a value of type int"),
        (PrepareConfig, {"tokenizer": "~no-such-user/t"}, "~no-such-user/t: there is no such user"),
        (CacheConfig, {"out": "~no-such-user/t"}, "~no-such-user/t: there is no such user"),
        (PrepareConfig, {"inputs": []}, "no input was given"),
        (PrepareConfig, {"sequence_length": 1}, "sequence_length is 1; it must be at least 2"),
    ],
)
def test_mistakes_are_named(config_class, changes, message):
    values = {key: value for key, value in {**NEEDED[config_class], **changes}.items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        load_config(config_class, None, values)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("top-k: 3", "unknown key 'top-k'; did you mean 'top_k'"),
        ("temperature: 2", "unknown key 'temperature'; did you mean 'temperatures'"),
        ("xyzzy: 3", "unknown key 'xyzzy'; valid keys are: teacher, corpus"),
        ("- a\n- b", "found a list; expected `key: value` lines"),
        ("a: [", "not YAML"),
        ("top_k: 3\nout: o\ntop_k: 4", "the key 'top_k' is there twice, in lines 1 and 3"),
        ("top_k: 3\n'top_k': 3", "the key 'top_k' is there twice, in lines 1 and 2"),
        ("temperatures: [{a: 1, a: 2}]", "the key 'a' is there twice, in lines 1 and 1"),
    ],
)
def test_file_mistakes_are_named_with_the_file(tmp_path, contents, message):
    path = tmp_path / "run.yaml"
    path.write_text(contents)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(CacheConfig, path)
    assert str(path) in str(error.value)


def test_merged_key_may_be_given_again(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("<<: {top_k: 3, out: o}\ntop_k: 4\nteacher: t\ncorpus: c\n")
    assert load_config(CacheConfig, path).top_k == 4


def test_home_is_meant_wherever_a_path_is_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("teacher: ~/t\ncorpus: '~'\nout: ~/o\nreuse: [~/r, s3://bucket/~/r]\n")
    config = load_config(CacheConfig, Path("~/run.yaml"))
    assert (config.teacher, config.corpus, config.out) == (tmp_path / "t", tmp_path, tmp_path / "o")
    assert list(map(str, config.reuse)) == [f"{tmp_path}/r", "s3://bucket/~/r"]
    assert load_config(PrepareConfig, None, {**NEEDED[PrepareConfig], "inputs": ["a/~b", "~/c"]}).inputs == (
        Path("a/~b"),
        tmp_path / "c",
    )
    submit = load_config(SubmitConfig, None, {"launcher": "local", "cache_logits": "~/run.yaml"})
    assert load_config(CacheConfig, submit.cache_logits) == config
    assert TrainConfig(student=Path("~root"), cache=Path("c"), out=Path("o")).student == Path("~root").expanduser()
    assert store_of("~/cache") == tmp_path / "cache"
    monkeypatch.setenv(COPIES, "~/copies")
    assert copies_folder() == tmp_path / "copies"
