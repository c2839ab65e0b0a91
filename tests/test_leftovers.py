"""A run of tests that fail ends, and leaves no process behind."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support import leftovers

ROOT = Path(__file__).parent.parent
FAILING = '''
import os, signal, subprocess, sys, time
import pytest
from tests.support.object_store import _processes
from tests.test_workers import COUNT, HangingEngine
from tests.support.workers import new_cache, start_worker, tiny_corpus

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1000)"


@pytest.mark.parametrize("way", [AssertionError, KeyError])
def test_forked_worker(tmp_path, way):
    rows = tiny_corpus(tmp_path / "corpus", COUNT)
    start_worker(new_cache(tmp_path / "cache", rows), rows, make_engine=HangingEngine)
    raise way


def test_worker_of_the_fork_server():
    """multiprocessing terminates it at the end and then waits for it."""
    _processes.Process(target=time.sleep, args=(1000,), daemon=True).start()
    _processes.Process(target=os.execv, args=(sys.executable, [sys.executable, "-c", STUBBORN]), daemon=True).start()
    time.sleep(1)
    raise AssertionError


def test_passes_with_a_command_in_a_session_of_its_own():
    subprocess.Popen([sys.executable, "-c", STUBBORN], start_new_session=True)


def test_passes_with_an_orphan():
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {STUBBORN!r}])"
    subprocess.run([sys.executable, "-c", code])
'''
PASSING = "import subprocess\n\n\ndef test_passes():\n    assert subprocess.run(['true']).returncode == 0\n"


def run_tests(folder: Path, text: str) -> tuple[int, str]:
    """Exit code and output of pytest with this project's fixtures, which must end by itself."""
    (folder / "test_of_ours.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", "--rootdir", folder]
    finished = subprocess.run([*command, "-q", folder], cwd=ROOT, capture_output=True, text=True, timeout=400)
    return finished.returncode, finished.stdout + finished.stderr


def stubborn() -> list[psutil.Process]:
    """Processes of FAILING that still run."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "SIG_IGN); time.sleep(1000)" in " ".join(process.info["cmdline"] or ()) and leftovers.is_running(process):
            found.append(process)
    return found


@pytest.mark.slow
def test_a_red_run_ends_and_leaves_nothing(tmp_path):
    code, output = run_tests(tmp_path, FAILING)
    assert code == 1, output
    assert "3 failed, 2 passed, 4 errors" in output
    assert output.count("the test has left processes behind, which were killed: process ") >= 4
    assert "processes that the tests have left behind were killed:" in output
    assert stubborn() == []


def test_what_a_test_leaves_is_found_and_killed():
    """SIGTERM would not do."""
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(1000)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert [child.pid for child in leftovers.children()] == [process.pid]
        assert process.pid in [child.pid for child in leftovers.marked()]
        with leftovers.kept(process.pid):
            assert leftovers.children() == []
        process.terminate()
        (line,) = leftovers.end(leftovers.children())
    assert line.startswith(f"process {process.pid}: {sys.executable} -c import signal")
    assert leftovers.children() == []
    assert os.environ[leftovers.MARK] == str(os.getpid())


@pytest.mark.slow
def test_a_green_run_stays_green(tmp_path):
    code, output = run_tests(tmp_path, PASSING)
    assert code == 0, output
