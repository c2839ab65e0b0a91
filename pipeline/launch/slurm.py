"""Workers as a Slurm job array, a gate that starts it again, and the training behind the gate.

Four scripts are written next to the cache, or next to the settings of one in an object store: submit.sh,
capture.sbatch (or prepare.sbatch), gate.sbatch, student.sbatch. What `pipeline submit` does is to run the first.
Slurm's accounting is not needed.
"""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from pipeline.errors import ConfigError, PipelineError
from pipeline.exit_codes import AGAIN, DONE, INCOMPLETE, MENDABLE, SET_ASIDE
from pipeline.launch.job import PIPELINE, TORCHRUN, Job, Launcher
from pipeline.launch.scripts import Script, write_script
from pipeline.progress import Reporter

EXIT_CODES = {"done": DONE, "mendable": MENDABLE, "incomplete": INCOMPLETE, "set_aside": SET_ASIDE, "again": AGAIN}
"""By the names that the scripts' templates have for them."""

WORKERS = """#!/bin/bash
# @workers workers on one @thing. Safe to submit at any time and any number of times.
#SBATCH --job-name=@name-@stage
#SBATCH --array=0-@last
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@@@drain_s
#SBATCH --output=@worker_log
@directives
cd @cwd
@setup
# exec: the warning before a time limit reaches the worker itself, which finishes its shard and exits with @again.
exec @worker
"""

GATE = """#!/bin/bash
# Runs when every task of the array has ended, in whatever way. A whole @thing opens the gate for what follows.
# An incomplete one starts the array again, with a new gate, unless @attempts rounds in a row got nowhere.
#SBATCH --job-name=@name-gate
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=@gate_log
@directives
set -uo pipefail
cd @cwd
@setup
before=${DONE:-0} attempt=${ATTEMPT:-1} student=${STUDENT:-}

@pipeline status @cache
# @done complete, @incomplete incomplete, @set_aside all that is left was set aside, @again the store does not answer
state=$?
if [ $state -eq @done ]; then
    @check    # with @done the student starts, if there is one
    state=$?
    if [ $state -ne @again ]; then exit $state; fi
fi
if [ $state -eq @again ] && [ ${SLURM_RESTART_COUNT:-0} -lt @attempts ]; then
    echo "the store does not answer; this gate comes back"
    scontrol requeue $SLURM_JOB_ID
    sleep 60    # Slurm ends this script
fi

now=$(@pipeline status @cache --json | sed -n 's/^ "num_done": //p' | tr -d ,)
now=${now:-$before}
if [ $now -gt $before ]; then attempt=1; else attempt=$((attempt + 1)); fi
if [ $state -ne @incomplete ] || [ $attempt -gt @attempts ]; then
    echo "the gate stays shut: state $state, attempt $attempt of @attempts"
    exit 1
fi
set -e
workers=$(sbatch --parsable @folder/@stage.sbatch)
gate=$(sbatch --parsable --dependency=afterany:$workers \\
    --export=ALL,DONE=$now,ATTEMPT=$attempt,STUDENT=$student @folder/gate.sbatch)
if [ -n "$student" ]; then scontrol update jobid=$student dependency=afterok:$gate; fi
echo "$now partitions are done; the array runs again as job $workers, its gate as $gate"
"""

STUDENT = """#!/bin/bash
# Stage two: waits for the gate. Started again it continues from its newest checkpoint.
#SBATCH --job-name=@name-student
#SBATCH --nodes=@nodes
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@@@drain_s
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --output=@student_log
@directives
cd @cwd
@setup
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Of its own for every start: what the last one left behind may not have ended yet.
start=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
port=$((29000 + (SLURM_JOB_ID + 499 * ${SLURM_RESTART_COUNT:-0}) % 1000))
# The warning reaches every process of the step: a launcher ignores it, the training saves a checkpoint and leaves.
srun --cpus-per-task=$SLURM_CPUS_ON_NODE --kill-on-bad-exit=1 bash -c 'trap "" USR1; exec "$@@"' student \\
    @student
code=$?
# @mendable is a mistake that starting again does not mend.
if [ $code -ne @done ] && [ $code -ne @mendable ] && [ ${SLURM_RESTART_COUNT:-0} -lt @attempts ]; then
    scontrol requeue $SLURM_JOB_ID
    sleep 60    # Slurm ends this script
fi
exit $code
"""

SEVERAL_NODES = """@python @torchrun --nnodes @nodes --nproc-per-node @processes \\
    --rdzv-backend c10d --rdzv-id $start --rdzv-endpoint $head:$port \\
    --no-python @process"""

SUBMIT = """#!/bin/bash
# What `pipeline submit --on slurm` runs. Run it again at any time: what is done stays done.
set -euo pipefail
cd @folder
workers=$(sbatch --parsable @stage.sbatch)
"""

SUBMIT_ALONE = """gate=$(sbatch --parsable --dependency=afterany:$workers gate.sbatch)
echo "@stage $workers, gate $gate; pipeline status" @cache
"""

SUBMIT_BOTH = """# Held until its dependency is set: it must not start, and not be given up, before there is a gate.
student=$(sbatch --parsable --hold student.sbatch)
gate=$(sbatch --parsable --dependency=afterany:$workers --export=ALL,STUDENT=$student gate.sbatch)
scontrol update jobid=$student dependency=afterok:$gate
scontrol release $student
echo "@stage $workers, gate $gate, student $student; pipeline status" @cache
"""


def launch(job: Job, reporter: Reporter) -> None:
    """Write the scripts and run submit.sh; it returns as soon as the jobs are queued."""
    write_scripts(job)
    reporter.log(f"{job.folder}: wrote submit.sh, {job.stage}.sbatch, gate.sbatch" + _and_student(job))
    if job.submit.write_only:
        return
    if shutil.which("sbatch") is None:
        raise ConfigError(f"sbatch is not on the PATH; run {job.folder / 'submit.sh'} on a login node of the cluster.")
    finished = subprocess.run([str(job.folder / "submit.sh")], capture_output=True, text=True)
    if finished.returncode:
        raise PipelineError(f"{job.folder / 'submit.sh'}: {' '.join(finished.stderr.split())}")
    reporter.log(finished.stdout.strip())


def write_scripts(job: Job) -> None:
    """Write submit.sh and what it submits."""
    job.prepare_folder()
    submit = job.submit
    values = EXIT_CODES | {
        "name": re.sub(r"[^A-Za-z0-9._-]+", "-", job.name),
        "workers": submit.workers,
        "last": submit.workers - 1,
        "attempts": submit.attempts,
        "drain_s": submit.drain_s,
        "nodes": submit.student_nodes,
        "folder": shlex.quote(str(job.folder)),
        "stage": job.stage,
        "thing": "corpus" if job.stage == "prepare" else "cache",
        "worker_log": _quoted(job.logs, f"{job.stage}-%a.log"),
        "gate_log": _quoted(job.logs, "gate.log"),
        "student_log": _quoted(job.logs, "student.log"),
        "cache": shlex.quote(str(job.cache)),
        "cwd": shlex.quote(str(Path.cwd())),
        "setup": "\n".join(submit.setup),
        "worker": shlex.join(job.worker_command()),
        "check": shlex.join(job.gate_command(sys.executable)),
        "pipeline": shlex.join([sys.executable, *PIPELINE]),
    }
    write_script(
        job.folder / f"{job.stage}.sbatch", WORKERS, directives=_directives(job, job.gpus_per_worker), **values
    )
    write_script(job.folder / "gate.sbatch", GATE, directives=_directives(job, 0), **values)
    tail = SUBMIT_ALONE
    if submit.train_student is not None:
        tail = SUBMIT_BOTH
        directives = _directives(job, submit.student_gpus)
        write_script(job.folder / "student.sbatch", STUDENT, directives=directives, student=_student(job), **values)
    write_script(job.folder / "submit.sh", SUBMIT + tail, **values)


def _quoted(folder: Path, name: str) -> str:
    """A log for a directive, in which Slurm knows quotes, and in whose folder % begins nothing."""
    path = f"{str(folder).replace('%', '%%')}/{name}"
    return path if re.fullmatch(r"[\w./%+-]*", path) else '"' + re.sub(r'(["\\])', r"\\\1", path) + '"'


def _student(job: Job) -> str:
    if job.submit.student_nodes == 1:
        return shlex.join(job.student_command())
    return Script(SEVERAL_NODES).substitute(
        python=shlex.quote(sys.executable),
        torchrun=shlex.join(TORCHRUN),
        nodes=job.submit.student_nodes,
        processes=max(job.submit.student_gpus, 1),
        process=shlex.join(job.student_process()),
    )


def _directives(job: Job, gpus: int) -> str:
    gres = [f"--gres=gpu:{gpus}"] if gpus else []
    return "\n".join(f"#SBATCH {option}" for option in [*gres, *job.submit.directives])


def _and_student(job: Job) -> str:
    return ", student.sbatch" if job.submit.train_student is not None else ""


LAUNCHER = Launcher(launch=launch, writes_scripts=True)
