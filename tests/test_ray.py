"""`pipeline submit --on ray` on a real Ray of two raylets: a killed worker and a killed raylet."""

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile

import psutil
import pytest

from tests.support.helpers import wait_until
from tests.support.launching import ROOT, small_job

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed; `make slow` does it"),
]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def of_this_test() -> list[psutil.Process]:
    """All processes of this test's cluster, the oldest first."""
    ours = [
        process
        for process in psutil.process_iter(["name", "environ", "create_time"])
        if (process.info["environ"] or {}).get("PIPELINE_TEST") == str(os.getpid())
    ]
    return sorted(ours, key=lambda process: process.info["create_time"])


def workers_under(raylet: psutil.Process) -> list[psutil.Process]:
    """Processes of `pipeline cache-logits` that a raylet has started."""
    with contextlib.suppress(psutil.Error):
        return [child for child in raylet.children(recursive=True) if "cache-logits" in child.cmdline()]
    return []


@pytest.fixture
def ray_address():
    """A head and a second node of one CPU each."""
    address = f"127.0.0.1:{free_port()}"
    environment = {**os.environ, "PIPELINE_TEST": str(os.getpid()), "RAY_USAGE_STATS_ENABLED": "0"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # The folder of the sockets: their paths may have 107 letters at most.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        common = ["--num-cpus", "1", "--object-store-memory", "80000000", "--disable-usage-stats"]
        head = ["--head", "--port", address.split(":")[1], "--temp-dir", folder, "--include-dashboard", "false"]
        try:
            for options in (head, ["--address", address]):
                started = subprocess.run(
                    [*RAY, "start", *options, *common], env=environment, capture_output=True, text=True, timeout=180
                )
                assert started.returncode == 0, started.stdout + started.stderr
            yield address
        finally:
            for process in of_this_test():
                with contextlib.suppress(psutil.Error):
                    process.kill()


def test_killed_worker_and_killed_raylet(ray_address, tmp_path):
    job = small_job(tmp_path, sequences=600, layers=6)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = job.command("ray", "--workers", 2, "--address", ray_address)
    driver = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: job.cache.is_dir() and len(job.worker_pids()) == 2 and job.num_done() >= 2)
    os.kill(job.worker_pids()[0], signal.SIGKILL)
    victim = [process for process in of_this_test() if process.info["name"] == "raylet"][-1]
    wait_until(lambda: workers_under(victim))
    orphans = workers_under(victim)
    victim.kill()
    _, errors = driver.communicate(timeout=400)
    assert driver.returncode == 0, errors
    job.assert_whole()
    assert psutil.wait_procs(orphans, timeout=60)[1] == []
