"""A Slurm cluster on this machine: a controller and two virtual nodes of eight pretended GPUs each.

Needs root and the programs of Debian's slurmctld, slurmd, slurm-client and munge. Nothing outside its
folder is touched.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "munged")
CONFIG = """ClusterName=ci
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/sock
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=10000,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=5
MinJobAge=3600
MaxArraySize=10001
ReturnToService=2
SlurmdTimeout=10
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
MpiDefault=none
GresTypes=gpu
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port={first}-{last} CPUs=8 Boards=1 SocketsPerBoard=1 CoresPerSocket=8 ThreadsPerCore=1 RealMemory=1000 Gres=gpu:8
PartitionName=low  Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def why_not() -> str:
    """Why no cluster can be started here; empty if one can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"Slurm is not installed: no {', '.join(missing)}"
    return "" if os.geteuid() == 0 else "a Slurm cluster of one's own needs root"


class SlurmCluster:
    """A context in which the cluster runs; `environment` makes Slurm's commands talk to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._forgotten: set[str] = set()
        self._held: dict[str, float] = {}
        """Tasks that wait after a requeue, and since when."""
        self.config = str(folder / "slurm.conf")
        self.environment = {**os.environ, "SLURM_CONF": self.config}

    def __enter__(self) -> "SlurmCluster":
        folder, host = self.folder, socket.gethostname().partition(".")[0]
        for name in ("munge", "state", "spool/n1", "spool/n2", "log", "dev"):
            (folder / name).mkdir(parents=True)
        for index in range(8):  # plain files are refused
            os.mknod(folder / "dev" / f"nvidia{index}", 0o666 | 0o020000, os.makedev(1, 3))
        ports = _free_ports(3)
        text = CONFIG.format(folder=folder, host=host, port=ports[0], first=ports[1], last=ports[2])
        (folder / "slurm.conf").write_text(text)
        (folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={folder}/dev/nvidia[0-7]\n")
        (folder / "munge" / "key").write_bytes(os.urandom(1024))
        (folder / "munge" / "key").chmod(0o600)
        os.chmod(folder, 0o755)
        try:
            munge = folder / "munge"
            self._run(
                *("munged", f"--key-file={munge}/key", f"--socket={munge}/sock", f"--pid-file={folder}/munged.pid"),
                *(f"--log-file={munge}/log", f"--seed-file={munge}/seed", "--force"),
            )
            self._run("slurmctld", "-i")
            self.start_node("n1")
            self.start_node("n2")
            self.wait_until(lambda: self.node_states() == {"idle"}, 60)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(Exception):
            self.run("scancel", "--full", "--user=root")
            self.wait_until(lambda: self.run("squeue", "--noheader", "--states=R,CG") == "", 30)
        for path in [*self.folder.glob("slurmd-*.pid"), self.folder / "slurmctld.pid", self.folder / "munged.pid"]:
            with contextlib.suppress(OSError, ValueError):
                pid = int(path.read_text())
                os.kill(pid, signal.SIGTERM)
                self.wait_until(lambda pid=pid: not Path(f"/proc/{pid}").exists(), 20)

    def node_states(self) -> set[str]:
        """What the nodes are: idle, alloc, down, ..."""
        return set(self.run("sinfo", "--noheader", "--Node", "-o", "%t").split())

    def start_node(self, name: str) -> None:
        """Start the daemon of a node."""
        self._run("slurmd", "-N", name)

    def kill_node(self, name: str) -> None:
        """kill -9 of a node's daemon and of all that it has started: a node that loses power."""
        with contextlib.suppress(psutil.Error):
            psutil.Process(int((self.folder / f"slurmd-{name}.pid").read_text())).kill()
        tasks, steps = set(), set()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                if environment.get("SLURMD_NODENAME") == name and environment["SLURM_CONF"] == self.config:
                    tasks.add(process)
                    steps.update(parent for parent in process.parents() if parent.name().startswith("slurmstepd"))
        for process in [*steps, *tasks]:  # first those that would tell the controller of the others' end
            with contextlib.suppress(psutil.Error):
                process.kill()

    def run(self, *command: object) -> str:
        """A command's output."""
        finished = subprocess.run(
            list(map(str, command)), env=self.environment, capture_output=True, text=True, timeout=120
        )
        assert finished.returncode == 0, f"{command}: {finished.stderr}{finished.stdout}"
        return finished.stdout.strip()

    def forget(self) -> None:
        """Let `jobs` tell of later jobs only."""
        self._forgotten |= {job_id for job_id, *_ in self.jobs()}

    def jobs(self, *states: str) -> list[list[str]]:
        """Id, name and state of every task, in the order of submission, of those in the given states."""
        chosen = f"--states={','.join(states)}" if states else "--states=all"
        lines = self.run("squeue", "--noheader", "--array", chosen, "-o", "%i %j %T").splitlines()
        jobs = [line.split() for line in lines if line.split()[0] not in self._forgotten]
        return sorted(jobs, key=lambda job: [int(number) for number in job[0].split("_")])

    def wait_until(self, condition, deadline_s: float = 240.0) -> None:
        """Poll until the condition holds."""
        deadline = time.monotonic() + deadline_s
        while not condition():
            assert time.monotonic() < deadline, self.run("squeue", "--states=all")
            time.sleep(0.2)

    def start_requeued(self) -> None:
        """Let requeued tasks start without the two minutes for which Slurm holds them back.

        But not in the second in which they ended, where a node takes the new start for the old one ("Job
        credential revoked") and the task fails for good.
        """
        waiting = self.run("squeue", "--noheader", "--array", "--states=PD", "-o", "%i %r").splitlines()
        held = {line.split()[0] for line in waiting if line.split()[1] == "BeginTime"}
        now = time.monotonic()
        self._held = {job_id: self._held.get(job_id, now) for job_id in held}
        for job_id in [job_id for job_id, since in self._held.items() if now - since > 2.5]:
            with contextlib.suppress(AssertionError):
                self.run("scontrol", "update", f"job={job_id}", "StartTime=now")

    def _run(self, *command: str) -> None:
        subprocess.run(command, env=self.environment, check=True, capture_output=True, timeout=60)


def _free_ports(count: int) -> list[int]:
    """Neighbouring ports that nobody listens on."""
    for first in range(17817, 60000, 10):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
            return list(range(first, first + count))
    raise OSError("no free ports")
