"""The command line: help, exit codes, and mistakes as one line without a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from pipeline.cache.commits import SHARDS
from pipeline.cli import main
from pipeline.launch.job import PIPELINE, TORCHRUN
from tests.support.helpers import run, tiny_tokenizer
from tests.support.small import make_cache

ROOT = Path(__file__).parent.parent


def assert_refused(message: str, *arguments: object) -> None:
    """Exit code 2 and one line."""
    code, out, err = run(*arguments)
    assert code == 2, (out, err)
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert message in err


@pytest.mark.parametrize("command", main.commands)
def test_help_explains_every_option_with_its_default(command):
    code, out, _ = run(command, "--help")
    assert code == 0
    options = [line for line in out.splitlines() if line.startswith("  --") and not line.startswith("  --config")]
    declared = [parameter for parameter in main.commands[command].params if isinstance(parameter, click.Option)]
    shown = [parameter for parameter in declared if not parameter.hidden]
    assert len(options) == len(shown) - 1  # --config
    assert out.count("[default:") + out.count("[required]") + out.count("[default:\n") >= len(options)


def test_help_loads_neither_torch_nor_vllm():
    code = (
        "import sys; from click.testing import CliRunner; from pipeline.cli import main\n"
        "assert CliRunner().invoke(main, ['cache-logits', '--help']).exit_code == 0\n"
        "print([name for name in ('torch', 'vllm', 'transformers') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


def test_verify_exits_1_and_names_the_damage(tmp_path, corpus):
    cache = make_cache(tmp_path / "cache", corpus)
    code, out, _ = run("verify", cache)
    assert code == 0
    assert "sound" in out
    shard = sorted((cache / SHARDS).iterdir())[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    code, out, _ = run("verify", cache)
    assert code == 1
    assert shard.name in out
    manifest = cache / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-9])
    code, out, _ = run("verify", cache)
    assert code == 1
    assert "manifest.json" in out


def test_mistakes_are_one_line_and_exit_code_2(tmp_path):
    tiny_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n{"text": \n')
    out = tmp_path / "out"
    tokenizer = tmp_path / "tokenizer"
    assert_refused("--tokenizer is missing", "prepare", "x.txt", "--out", out)
    assert_refused("nowhere.txt", "prepare", tmp_path / "nowhere.txt", "--tokenizer", tokenizer, "--out", out)
    assert_refused("bad.jsonl", "prepare", tmp_path / "bad.jsonl", "--tokenizer", tokenizer, "--out", out)
    assert_refused("no cache there", "verify", tmp_path / "nowhere")
    assert_refused("no finished corpus", "cache-logits", "--teacher", "t", "--corpus", tmp_path, "--out", out)
    assert_refused(
        "finite number above 0", "cache-logits", "--teacher", "t", "--corpus", "c", "--out", out, "--temperature", 0
    )
    assert_refused("no cache there", "train-student", "--student", "s", "--cache", tmp_path, "--out", out)
    assert_refused("no such file", "verify", "--config", tmp_path / "nowhere.yaml")


def test_corrupt_json_line_is_named_with_its_number_or_counted(tmp_path):
    tiny_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": \n')
    command = ["prepare", tmp_path / "bad.jsonl", "--tokenizer", tmp_path / "tokenizer", "--out", tmp_path / "out"]
    code, _, err = run(*command)
    assert code == 2
    assert "3" in err
    assert "bad.jsonl" in err
    code, _, err = run(*command, "--skip-bad-lines")
    assert code == 0, err
    assert "1 bad" in err or "bad" in err


def test_unknown_flag_is_click_s_own_exit_code_2():
    code, _, err = run("cache-logits", "--top-kk", 3)
    assert code == 2
    assert "--top-k" in err


def test_full_disk_is_one_line(tmp_path, corpus, monkeypatch):
    import errno

    import pipeline.cache.verify

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device", "/somewhere")

    monkeypatch.setattr(pipeline.cache.verify, "verify_cache", full)
    assert_refused("No space left on device", "verify", make_cache(tmp_path / "cache", corpus))


@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, *PIPELINE],
        pytest.param(
            [sys.executable, *TORCHRUN, "--nproc-per-node", "1", "--no-python", sys.executable, *PIPELINE],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["python", "torchrun"],
)
def test_modules_of_the_user_s_in_the_working_directory_are_not_ours(tmp_path, command):
    """Also those of the libraries that we start: they find `stages` by an entry point."""
    for name in ("pipeline.py", "config.py", "stages/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise SystemExit('the user's own')")
    arguments = ["prepare", "nothing.txt", "--tokenizer", "t", "--out", "o"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "error: nothing.txt: no such file or folder" in done.stderr
    assert "the user's own" not in done.stderr + done.stdout


def test_stages_of_the_user_s_do_not_hide_ours_from_python_m(tmp_path):
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "__init__.py").write_text("raise SystemExit('the user's own')")
    arguments = ["prepare", "nothing.txt", "--tokenizer", "t", "--out", "o"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pipeline.cli", *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stderr.startswith("error: nothing.txt: no such file or folder")
