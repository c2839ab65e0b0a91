"""Real vLLM engines that are killed again and again, and a cache that must come out whole.

    python -m benchmarks.vllm_kills --kills 10

`pipeline submit --on local` with real vLLM on a CPU and a tiny teacher. Once a worker has committed something
it is killed with SIGKILL: its engine's processes must end by themselves, the pool must start it again. Every
other kill is a SIGTERM instead with --drains. At the end: every partition once, `verify` clean, no process left.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.launching import ROOT, SmallJob, small_job


def capturing(job: SmallJob, killed: set[int]) -> list[int]:
    """Pids of workers that live and have committed something."""
    records = [json.loads(path.read_text()) for path in (job.cache / "workers").glob("*.json")]
    return [
        record["pid"]
        for record in records
        if record["num_partitions"] and record["pid"] not in killed and psutil.pid_exists(record["pid"])
    ]


def main() -> None:
    """Kill, wait, look."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--sequences", type=int, default=6000)
    parser.add_argument("--drains", action="store_true", help="every other kill is a SIGTERM")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kills-") as scratch:
        job = small_job(Path(scratch), options.sequences, engine="vllm", enforce_eager=True)
        command = job.command("local", "--workers", options.workers, "--attempts", 3)
        pool = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        started, killed, engines = time.monotonic(), set(), []
        while len(killed) < options.kills and pool.poll() is None:
            victims = capturing(job, killed) if job.cache.is_dir() else []
            if victims:
                victim = psutil.Process(random.choice(victims))
                engines += victim.children(recursive=True)
                drain = options.drains and len(killed) % 2
                victim.send_signal(signal.SIGTERM if drain else signal.SIGKILL)
                killed.add(victim.pid)
                print(f"{len(killed)}: {job.num_done()} of {options.sequences} partitions", flush=True)
            time.sleep(0.2)
        errors = pool.communicate()[1]
        job.assert_whole()
        left = psutil.wait_procs(engines, timeout=30)[1]
        seconds = time.monotonic() - started
        print(f"{len(killed)} killed, {len(engines)} processes of theirs, {len(left)} left, {seconds:.0f} s")
        if pool.returncode or left or len(killed) < options.kills:
            sys.exit(errors)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
