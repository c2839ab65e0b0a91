"""Signals, closed streams and locales: what a terminal, a pipe or a scheduler does to a command."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline.cache.commits import SHARDS
from pipeline.cache.verify import verify_cache
from pipeline.corpus import Corpus
from pipeline.errors import fault_of_machine
from pipeline.tokenizer import load_tokenizer
from tests.support.helpers import tiny_tokenizer
from tests.support.small import make_cache, make_corpus, random_sequences

ROOT = Path(__file__).parent.parent
PIPELINE = [sys.executable, "-m", "pipeline.cli"]
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGUSR1: 138}


def plain_signals() -> None:
    """As a shell starts a command, whatever this process ignores."""
    for number in CODES:
        signal.signal(number, signal.SIG_DFL)


def start(*arguments: object, **options: object) -> subprocess.Popen:
    """A command in a session of its own, as one in the foreground of a terminal."""
    command = [*PIPELINE, *map(str, arguments)]
    outputs = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, preexec_fn=plain_signals, **(outputs | options))


def session_of(process: subprocess.Popen) -> list[psutil.Process]:
    """What still runs of a command and of all that it has started."""
    alive = []
    for other in psutil.process_iter():
        try:
            if os.getsid(other.pid) == process.pid and other.status() != psutil.STATUS_ZOMBIE:
                alive.append(other)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return alive


def begun(folder: Path, process: subprocess.Popen) -> None:
    """Wait until something lies in the folder."""
    deadline = time.monotonic() + 60
    while not (folder.is_dir() and any(folder.iterdir())):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def long_cache(tmp_path_factory) -> Path:
    """A cache whose conversion takes seconds."""
    folder = tmp_path_factory.mktemp("long")
    corpus = make_corpus(folder / "corpus", random_sequences(1200, vocab_size=300), 1)
    return make_cache(folder / "cache", corpus, partitions=tuple(range(0, 1201, 30)))


COMMANDS = {
    "convert": lambda cache, out: (["convert", cache, "--format", "zarr", "--out", out], out / SHARDS),
    "export": lambda cache, out: (["export", cache, "--to", "parquet", "--temperature", 1.0, "--out", out], out),
}


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("name", COMMANDS)
def test_signal_ends_a_command_with_its_processes_and_half_made_files(long_cache, tmp_path, name, number):
    """At any moment; a terminal sends its signals to every process, others to the command alone."""
    arguments, place = COMMANDS[name](long_cache, tmp_path / "out")
    process = start(*arguments, "--workers", 2)
    begun(place, process)
    time.sleep(0.02 * (os.getpid() % 7))
    os.kill(process.pid, number) if number == signal.SIGTERM else os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == CODES[number], output
    assert output.endswith(f"stopped by {number.name}.\n")
    assert "Traceback" not in output
    assert "Exception" not in output
    assert "resource_tracker" not in output
    time.sleep(0.1)
    assert session_of(process) == []
    assert [path for path in tmp_path.rglob("*") if ".partial" in path.name] == []


@pytest.mark.slow
def test_what_was_interrupted_again_and_again_is_whole_in_the_end(long_cache, tmp_path):
    out = tmp_path / "out"
    arguments = ["convert", long_cache, "--format", "zarr", "--out", out, "--workers", 2]
    for attempt in range(12):
        process = start(*arguments)
        time.sleep(0.3 + 0.15 * attempt)
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        assert "Traceback" not in output
        assert process.returncode in (0, 130, -signal.SIGINT), output
    last = start(*arguments)
    output, _ = last.communicate(timeout=120)
    assert last.returncode == 0, output
    assert verify_cache(out).problems == []


def test_second_signal_leaves_at_once(tmp_path):
    code = (
        "import os, signal, time; from pipeline.stopping import Stopped, Unwinding\n"
        "Unwinding().begin()\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT); time.sleep(60)\n"
        "except Stopped as stopped:\n"
        "    assert stopped.exit_code == 130\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"  # an echo
        "    print('unwinding', flush=True); time.sleep(2.1)\n"
        "    os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, preexec_fn=plain_signals
    )
    assert (done.returncode, done.stdout, done.stderr) == (143, "unwinding\n", "")


def test_ignored_signals_stay_ignored():
    """As under nohup, or in the background of a shell that has no jobs."""
    code = (
        "import os, signal\n"
        "for number in (signal.SIGHUP, signal.SIGINT): signal.signal(number, signal.SIG_IGN)\n"
        "from pipeline.stopping import Unwinding; from pipeline.drain import Drain\n"
        "Unwinding().begin()\n"
        "for number in (signal.SIGHUP, signal.SIGINT): os.kill(os.getpid(), number)\n"
        "with Drain() as drain:\n"
        "    for number in (signal.SIGHUP, signal.SIGINT): os.kill(os.getpid(), number)\n"
        "    assert not drain.requested\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("started_by", "handler"),
    [
        (["-m", "pipeline.cli"], "SIG_DFL"),
        (["/somewhere/bin/pipeline", "verify"], "SIG_DFL"),
        (["-m", "pytest"], "default_int_handler"),
        (["mine.py"], "default_int_handler"),
    ],
)
def test_ctrl_c_before_the_command_has_begun_is_silent_and_in_a_library_the_callers(started_by, handler):
    code = f"import signal, sys; sys.orig_argv[1:] = {started_by}; import pipeline, pipeline.cli\n"
    code += f"assert signal.getsignal(signal.SIGINT) is signal.{handler}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, preexec_fn=plain_signals
    )
    assert (done.returncode, done.stderr) == (0, "")


def shell(line: str) -> subprocess.CompletedProcess:
    """A line of bash with `pipeline` in it."""
    function = f'pipeline() {{ "{sys.executable}" -m pipeline.cli "$@"; }}; '
    return subprocess.run(["bash", "-c", function + line], cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_closed_streams_lose_their_lines_alone(corpus, tmp_path, redirection):
    """And no file gets what was meant for them: its descriptor would be that of the closed one."""
    cache = make_cache(tmp_path / "cache", corpus)
    converted = shell(f"pipeline convert {cache} --format zarr --workers 1 --out {tmp_path}/out {redirection}")
    assert converted.returncode == 0, converted.stderr
    assert verify_cache(tmp_path / "out").problems == []
    shard = next((cache / SHARDS).iterdir())
    shard.write_bytes(shard.read_bytes()[:-1])
    assert shell(f"pipeline verify {cache} {redirection}").returncode == 1


def test_pipe_that_nobody_reads_changes_no_exit_code(corpus, tmp_path):
    cache = make_cache(tmp_path / "cache", corpus)
    done = shell(f"pipeline verify {cache} 2>&1 | true; echo ${{PIPESTATUS[0]}}")
    assert (done.stdout, done.stderr) == ("0\n", "")
    (cache / SHARDS / "x").touch()
    next((cache / SHARDS).glob("*.arrow")).unlink()
    done = shell(f"pipeline verify {cache} 2>&1 | true; echo ${{PIPESTATUS[0]}}")
    assert (done.stdout, done.stderr) == ("1\n", "")
    done = shell(f"pipeline status {cache} --watch | true; echo ${{PIPESTATUS[0]}}")
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_result_that_cannot_be_written_is_an_error(corpus, tmp_path):
    done = shell(f"pipeline status {make_cache(tmp_path / 'cache', corpus)} > /dev/full")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "No space left on device" in done.stderr


C = "export LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0; "


def test_paths_beyond_ascii_in_the_c_locale(corpus, tmp_path):
    cache = make_cache(tmp_path / "каше é 中", corpus)
    done = shell(f"{C} pipeline convert '{cache}' --format zarr --workers 1 --out {tmp_path}/нов")
    assert done.returncode == 0, done.stderr
    assert verify_cache(tmp_path / "нов").problems == []
    done = shell(f"{C} pipeline verify {tmp_path}/нет")
    assert done.returncode == 2
    assert "нет: no cache there" in done.stderr


@pytest.mark.slow
def test_text_beyond_ascii_in_the_c_locale(tmp_path):
    tiny_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "今天.txt").write_text("今天的潮水 é €\n", encoding="utf-8")
    done = shell(f"{C} pipeline prepare {tmp_path}/今天.txt --tokenizer {tmp_path}/tokenizer --out {tmp_path}/корпус")
    assert done.returncode == 0, done.stderr
    (row,) = Corpus(tmp_path / "корпус").rows()
    assert load_tokenizer(tmp_path / "tokenizer").decode(row.token_ids).startswith("今天的潮水 é €\n")


def test_name_that_is_not_utf8_is_one_line(tmp_path):
    for arguments in (["verify", os.fsdecode(bytes(tmp_path) + b"/\xe9")],):
        done = subprocess.run([*PIPELINE, *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2
        assert "its name is not UTF-8" in done.stderr
        assert done.stderr.count("\n") == 1


def test_faults_of_the_machine_are_told_from_bugs():
    assert fault_of_machine(OSError(28, "whatever", "/there")) == "/there: No space left on device."
    assert fault_of_machine(ValueError("I/O error: (os error 28)")) == "reading or writing: No space left on device."
    assert fault_of_machine(MemoryError("Unable to allocate 3 TiB")) == "out of memory: Unable to allocate 3 TiB."
    for bug in (ValueError("28"), KeyError("x"), OSError("no number"), RuntimeError("CUDA error")):
        assert fault_of_machine(bug) is None
