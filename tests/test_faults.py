"""Ordinary faults of disks, users and copies: the right result, or one line, and nothing lost."""

import contextlib
import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import open_cache
from pipeline.cache.commits import SHARDS, list_commits
from pipeline.cache.index import INDEX
from pipeline.cache.manifest import CacheManifest
from pipeline.cache.verify import verify_cache
from pipeline.errors import ConfigError, PipelineError, fault_of_machine
from pipeline.files import PARTIAL, held, publish_first
from pipeline.stores.local_copies import copies_folder
from pipeline.stores.sealed import write_json
from tests.support.helpers import run, tiny_tokenizer
from tests.support.small import assert_equal_caches, make_cache, make_corpus, random_sequences
from tests.support.workers import new_cache, run_worker, tiny_corpus

ROOT = Path(__file__).parent.parent
WITHOUT_POWERS = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")
"""Makes of root an ordinary user, to whom permissions apply."""


@contextlib.contextmanager
def mounted(folder: Path, *command: object) -> Iterator[Path]:
    """A file system in a folder; skips the test where there may be none."""
    folder.mkdir(exist_ok=True)
    made = subprocess.run([*map(str, command), str(folder)], capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def tmpfs(folder: Path, kilobytes: int) -> contextlib.AbstractContextManager[Path]:
    """A disk of that size."""
    return mounted(folder, "mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none")


def one_line(outcome: tuple[int, str, str], message: str) -> None:
    """Exit code 2 and one line, after what was said of the work."""
    code, out, err = outcome
    assert code == 2, (out, err)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert err.endswith(f"{errors[0]}\n")
    assert message in errors[0]


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if PARTIAL in path.name]


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """A cache of 80 partitions."""
    folder = tmp_path_factory.mktemp("many")
    return make_cache(
        folder / "cache",
        make_corpus(folder / "corpus", random_sequences(400, 300), 1),
        partitions=tuple(range(0, 401, 5)),
    )


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """A tokenizer, and 200 kB of text in 20 files."""
    folder = tmp_path_factory.mktemp("texts")
    tiny_tokenizer(folder / "tokenizer")
    (folder / "text").mkdir()
    for number in range(20):
        (folder / "text" / f"{number}.txt").write_text(f"The keeper wrote down {number}. " * 400)
    return folder


def command_into(name: str, out: Path, many: Path, texts: Path) -> list[object]:
    return {
        "prepare": ["prepare", texts / "text", "--tokenizer", texts / "tokenizer", "--out", out],
        "convert": ["convert", many, "--format", "zarr", "--out", out, "--workers", 1],
        "export": ["export", many, "--to", "parquet", "--temperature", 1.0, "--out", out, "--workers", 1],
        "merge": ["merge", many, many, "--out", out, "--workers", 1],
    }[name]


@pytest.mark.parametrize(("name", "kilobytes"), [("prepare", 300), ("convert", 200), ("export", 150), ("merge", 200)])
def test_full_disk_is_one_line_and_with_room_the_command_goes_on(many, texts, tmp_path, name, kilobytes):
    with tmpfs(tmp_path / "disk", kilobytes) as disk:
        arguments = [*command_into(name, disk / "out", many, texts)]
        one_line(run(*arguments), f"{disk}/out")
        assert leftovers(disk) == []
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        code, _, err = run(*arguments)
        assert code == 0, err
        if name in ("convert", "merge"):
            assert_equal_caches(many, disk / "out")


def test_full_disk_during_a_capture_loses_nothing_that_is_committed(tmp_path):
    corpus = make_corpus(tmp_path / "corpus", random_sequences(200, 300), 1)
    with tmpfs(tmp_path / "disk", 400) as disk:
        cache = new_cache(disk / "cache", corpus)
        with pytest.raises(OSError, match=f"{disk}/cache") as caught:
            run_worker(cache, corpus)
        assert caught.value.errno == errno.ENOSPC
        assert leftovers(cache / SHARDS) == []
        done = list_commits(cache)
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        run_worker(cache, corpus)
        assert done < list_commits(cache)
        assert verify_cache(cache).problems == []


@contextlib.contextmanager
def exfat(folder: Path) -> Iterator[Path]:
    """A disk that knows neither hard links nor capitals."""
    if not shutil.which("mkfs.exfat") or not shutil.which("mount.exfat-fuse"):
        pytest.skip("exfatprogs and exfat-fuse are not installed")
    image = folder / "image"
    with image.open("wb") as file:
        file.truncate(32 << 20)
    subprocess.run(["mkfs.exfat", str(image)], check=True, capture_output=True)
    found = subprocess.run(["losetup", "--find", "--show", str(image)], capture_output=True, text=True)
    if found.returncode != 0:
        pytest.skip(f"no loop device: {found.stderr.strip()}")
    device = found.stdout.strip()
    try:
        with mounted(folder / "disk", "mount.exfat-fuse", device) as disk:
            yield disk
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def test_capture_and_conversion_on_a_disk_without_hard_links(tmp_path):
    corpus = tiny_corpus(tmp_path / "corpus", 12)
    with exfat(tmp_path) as disk:
        with pytest.raises(OSError, match="Operation not permitted"):
            os.link(new_cache(disk / "cache", corpus) / "manifest.json", disk / "link")
        run_worker(disk / "cache", corpus)
        assert verify_cache(disk / "cache").problems == []
        assert run("convert", disk / "cache", "--format", "zarr", "--out", disk / "zarr", "--workers", 1)[0] == 0
        assert_equal_caches(disk / "cache", disk / "zarr")
        one_line(run("convert", disk / "cache", "--format", "zarr", "--out", disk / "CACHE"), "other settings")


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP])
def test_one_of_many_writers_wins_without_hard_links(tmp_path, monkeypatch, number):
    def refused(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    def late(*names: Path) -> None:  # whoever looks meanwhile sees no file yet
        time.sleep(0.02)
        rename(*names)

    rename = os.rename
    monkeypatch.setattr(os, "link", refused)
    monkeypatch.setattr(os, "rename", late)
    pids = []
    for writer in range(4):
        pid = os.fork()
        if pid == 0:
            won = 0
            for record in range(6):
                won += write_json(tmp_path / f"{record}.json", {"writer": writer}, first_wins=True)
            os._exit(won)
        pids.append(pid)
    assert sum(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{record}.json" for record in range(6))


def test_link_that_fails_otherwise_is_an_error(tmp_path, monkeypatch):
    def broken(*args: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "link", broken)
    (tmp_path / "partial").write_text("x")
    with pytest.raises(OSError, match="Input/output error"):
        publish_first(tmp_path / "partial", tmp_path / "final")
    assert list(tmp_path.iterdir()) == []


READING = (
    ["verify", "{cache}", "--workers", "1"],
    ["status", "{cache}"],
    ["export", "{cache}", "--to", "parquet", "--temperature", "1", "--out", "{out}", "--workers", "1"],
)


@pytest.mark.parametrize("arguments", READING, ids=lambda arguments: arguments[0])
@pytest.mark.parametrize("how", ["mount", "user"])
def test_cache_that_cannot_be_written_is_read_all_the_same(corpus, tmp_path, arguments, how):
    cache = make_cache(tmp_path / "made", corpus)
    words = [word.format(cache=cache, out=tmp_path / "out") for word in arguments]
    before = sorted(cache.rglob("*"))
    with contextlib.ExitStack() as stack:
        if how == "mount":
            stack.enter_context(mounted(cache, "mount", "-o", "bind,ro", cache))
            code, _, err = run(*words)
        else:
            code, err = as_another_user(cache, words)
        assert code == 0, err
        open_cache(cache)[0]
    if how == "user":
        (cache / INDEX).unlink(missing_ok=True)  # by root, in this process
    assert sorted(cache.rglob("*")) == before


def as_another_user(cache: Path, words: list[str]) -> tuple[int, str]:
    """Exit code and errors of a command by a user to whom the cache does not belong."""
    if os.getuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("needs root, and setpriv of util-linux")
    for path in (cache, *cache.rglob("*")):
        shutil.chown(path, "nobody")
    command = [*WITHOUT_POWERS, sys.executable, "-m", "pipeline.cli", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stderr


def test_folders_that_are_another_users_are_one_line(corpus, many, tmp_path):
    cache = make_cache(tmp_path / "cache", corpus)
    (tmp_path / "theirs").mkdir()
    shutil.chown(tmp_path / "theirs", "nobody")
    out = ["--out", str(tmp_path / "theirs" / "out")]
    code, err = as_another_user(cache, ["convert", str(cache), "--format", "zarr", *out])
    assert (code, err.count("\n"), "Permission denied" in err) == (2, 1, True), err
    cache.chmod(0o700)
    code, err = as_another_user(cache, ["verify", str(cache)])
    assert (code, err) == (2, f"error: {cache}/manifest.json: Permission denied.\n")


def test_checkpoint_that_the_disk_does_not_take_goes_and_says_so(tmp_path):
    """Torch's own words for a full disk are of positions in a file."""
    torch = pytest.importorskip("torch")
    from stages.train_student.checkpoints import whole_or_gone

    with tmpfs(tmp_path / "disk", 64) as disk:
        before, after = disk / "checkpoint-2", disk / "checkpoint-4"
        for folder in (before, after):
            folder.mkdir()
        torch.save(torch.zeros(100), before / "optimizer.pt")
        with pytest.raises(PipelineError, match=r"checkpoint-4: cannot be written: .* make room"), whole_or_gone(after):
            torch.save(torch.zeros(100_000), after / "optimizer.pt")
        assert sorted(path.name for path in disk.rglob("*")) == ["checkpoint-2", "optimizer.pt"]
        with pytest.raises(RuntimeError, match="a bug"), whole_or_gone(before):
            raise RuntimeError("a bug")
        assert before.is_dir()


def test_folder_of_a_run_is_held_against_a_second_one_until_the_first_has_ended(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("{}")
    with held(path, ConfigError("taken")):
        pid = os.fork()
        if pid == 0:
            try:
                with held(path, ConfigError("taken")):
                    os._exit(0)
            except ConfigError:
                os._exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    with held(path, ConfigError("taken")):
        pass
    assert path.read_text() == "{}"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_file_system_without_locks_holds_nothing(tmp_path, monkeypatch, number):
    def refused(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refused)
    with held(tmp_path / "lock", ConfigError("taken")):
        pass


@pytest.mark.parametrize("limit", [["ulimit", "-n", "64"], ["ulimit", "-v", "600000"]])
def test_little_of_the_machine_is_enough_to_read(many, tmp_path, limit):
    """More shards than files may be open; 600 MB of addresses."""
    cache = tmp_path / "cache"
    shutil.copytree(many, cache)
    assert CacheManifest.read(cache).num_partitions > 64
    line = f'{" ".join(limit)}; exec "{sys.executable}" -m pipeline.cli export {cache} --to parquet --temperature 1'
    done = subprocess.run(["bash", "-c", f"{line} --workers 1 --out {tmp_path}/out"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_no_home_and_no_temporary_folder_are_one_line(tmp_path, monkeypatch):
    monkeypatch.delenv("LOGIT_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    with pytest.raises(ConfigError, match="set HOME"):
        copies_folder()
    error = FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")
    assert "set TMPDIR" in fault_of_machine(error)
