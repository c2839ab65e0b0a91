"""Models by the names of a hub: a small one on loopback, and its cache without it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.hub import NAME, name_of, stay_offline
from pipeline.lifecycle.reuse import CacheManifest
from tests.support.hub import REVISION, Hub, commit_of, serving
from tests.support.small import make_corpus, make_teacher, random_sequences

NAMED = "someone/a-teacher.v2"


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return make_teacher(tmp_path / "served")


def command(tmp_path: Path, hub: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command of this project in a process of its own, with a hub and its cache."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PIPELINE_HUB"))}
    known = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"} | environment
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "pipeline.cli", *map(str, arguments)],
        env=clean | known,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )


def capture(tmp_path: Path, hub: str, name: str, **environment: str) -> subprocess.CompletedProcess[str]:
    if not (tmp_path / "corpus").exists():
        make_corpus(tmp_path / "corpus", random_sequences(3, vocab_size=300))
    arguments = ["--teacher", name, "--corpus", "corpus", "--out", "cache", "--engine", "transformers", "--top-k", "8"]
    return command(tmp_path, hub, "cache-logits", *arguments, **environment)


@pytest.mark.parametrize("revision", ["", f"@{REVISION}", "@commit"])
def test_teacher_by_its_name_is_fetched_and_its_commit_recorded(tmp_path, teacher, revision):
    commit = commit_of(teacher)
    with serving({NAMED: teacher}) as hub:
        finished = capture(tmp_path, hub.url, NAMED + revision.replace("commit", commit))
    assert finished.returncode == 0, finished.stderr
    assert f"{NAMED}@{commit}" in finished.stderr
    manifest = CacheManifest.read(tmp_path / "cache")
    assert manifest.settings["teacher"] == f"{NAMED}@{commit}"


def test_cache_of_the_hub_is_enough_where_the_hub_is_not(tmp_path, teacher):
    with serving({NAMED: teacher}) as hub:
        assert capture(tmp_path, hub.url, NAMED).returncode == 0
        num_asked = len(hub.asked)
        (tmp_path / "cache").rename(tmp_path / "first")
        again = capture(tmp_path, hub.url, NAMED, HF_HUB_OFFLINE="1")
        assert (again.returncode, len(hub.asked)) == (0, num_asked), again.stderr
    (tmp_path / "cache").rename(tmp_path / "second")
    gone = capture(tmp_path, hub.url, NAMED)
    assert gone.returncode == 0, gone.stderr


@pytest.mark.parametrize(
    ("name", "environment", "said"),
    [
        ("someone/else", {}, "someone/else"),
        (f"{NAMED}@v7", {}, "v7"),
        (NAMED, {"HF_HUB_OFFLINE": "1"}, "offline"),
        (NAMED, {"HF_ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9"),
    ],
)
def test_what_cannot_be_had_is_one_line_that_says_where_it_was_looked_for(tmp_path, teacher, name, environment, said):
    with serving({NAMED: teacher}) as hub:
        finished = capture(tmp_path, hub.url, name, **environment)
    assert finished.returncode == 2
    (line,) = (line for line in finished.stderr.splitlines() if line.startswith("error: "))
    assert name in line
    assert said in line
    assert str(tmp_path / "home") in line
    assert f"hf download {name.partition('@')[0]}" in line
    assert "Traceback" not in finished.stderr


def test_only_what_a_command_needs_is_fetched(tmp_path, teacher):
    (teacher / "consolidated.safetensors").write_bytes(b"the same in another format")
    (teacher / "pytorch_model.bin").write_bytes(b"the same as pickles")
    (tmp_path / "text.txt").write_text("Some words of text.\n" * 20)
    prepare = ["prepare", "text.txt", "--tokenizer", NAMED, "--out", "prepared", "--sequence-length", "32"]
    with serving({NAMED: teacher}) as hub:
        finished = command(tmp_path, hub.url, *prepare)
        assert finished.returncode == 0, finished.stderr
        assert not _weights_of(hub)
        assert capture(tmp_path, hub.url, NAMED).returncode == 0
        assert _weights_of(hub) == {"model.safetensors"}


def _weights_of(hub: Hub) -> set[str]:
    names = {path.rpartition("/")[2] for path in hub.asked}
    return {name for name in names if name.endswith((".safetensors", ".bin"))}


def test_student_by_its_name_is_trained(tmp_path, teacher):
    with serving({NAMED: teacher}) as hub:
        assert capture(tmp_path, hub.url, NAMED).returncode == 0
        arguments = ["--student", NAMED, "--cache", "cache", "--out", "run", "--max-steps", "1"]
        finished = command(tmp_path, hub.url, "train-student", *arguments)
    assert finished.returncode == 0, finished.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize("path", ["/data/teacher", "./a/b", "data/demo/teacher", "teacher", "../a", "a b/c", "a/b@"])
def test_paths_are_no_names(path):
    assert NAME.fullmatch(path) is None


def test_folders_that_are_no_snapshots_keep_their_path():
    assert name_of(Path("/data/teacher")) == "/data/teacher"
    commit = "0123456789abcdef" * 2 + "01234567"
    assert name_of(Path(f"/h/hub/models--a--b--c/snapshots/{commit}")) == f"a/b--c@{commit}"


@pytest.mark.parametrize(
    ("given", "expected"), [({}, "0"), ({"HF_HUB_OFFLINE": "1"}, "1"), ({"TRANSFORMERS_OFFLINE": "1"}, "1")]
)
def test_what_the_user_says_of_the_hub_reaches_every_process(given, expected):
    environment = dict(given)
    for _ in range(2):  # a command, and one that it starts
        stay_offline(environment)
        assert (environment["HF_HUB_OFFLINE"], environment["PIPELINE_HUB_OFFLINE"]) == ("1", expected)
