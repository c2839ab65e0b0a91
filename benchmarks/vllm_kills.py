"""Real vLLM engines that are killed again and again, and a cache that must come out whole.

    python -m benchmarks.vllm_kills --kills 10

`pipeline submit --on local` with real vLLM on a CPU and a tiny teacher. Once a worker has committed something
it is killed with SIGKILL: its engine's processes must end by themselves, the pool must start it again. With
--victim engine it is vLLM's engine process that dies: the worker must make a new one and go on. At the end:
every partition once, `verify` clean, no process left.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.support.launching import ROOT, SmallJob, small_job


def capturing(job: SmallJob, killed: set[int]) -> list[int]:
    """Pids of workers that live and have committed something."""
    records = [json.loads(path.read_text()) for path in (job.cache / "workers").glob("*.json")]
    return [
        record["pid"]
        for record in records
        if record["num_partitions"] and record["pid"] not in killed and psutil.pid_exists(record["pid"])
    ]


def engine_processes(worker: int) -> list[int]:
    """Pids of vLLM's engine processes under a worker."""
    children = psutil.Process(worker).children(recursive=True)
    return [child.pid for child in children if "EngineCore" in "".join(child.cmdline()) or "Engine" in child.name()]


def main() -> None:
    """Kill, wait, look."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--sequences", type=int, default=1000)
    parser.add_argument("--victim", choices=("worker", "engine"), default="worker")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kills-") as scratch:
        job = small_job(Path(scratch), options.sequences, engine="vllm", enforce_eager=True)
        command = job.command("local", "--workers", options.workers, "--attempts", 3)
        pool = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        started, killed, processes, done = time.monotonic(), set(), [], 0
        while len(killed) < options.kills and pool.poll() is None:
            victims = capturing(job, killed) if job.cache.is_dir() else []
            if options.victim == "engine":
                victims = [pid for worker in victims for pid in engine_processes(worker) if pid not in killed]
            if victims and job.num_done() > done:
                victim = psutil.Process(random.choice(victims))
                processes += [victim, *victim.children(recursive=True)]
                victim.kill()
                killed.add(victim.pid)
                done = job.num_done()
                print(f"{len(killed)}: {done} of {options.sequences} partitions", flush=True)
            time.sleep(0.2)
        errors = pool.communicate()[1]
        job.assert_whole()
        left = psutil.wait_procs(processes, timeout=30)[1]
        seconds = time.monotonic() - started
        print(f"{len(killed)} killed, {len(processes)} processes of theirs, {len(left)} left, {seconds:.0f} s")
        if pool.returncode or left or len(killed) < options.kills:
            sys.exit(errors)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
