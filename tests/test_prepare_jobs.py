"""`pipeline submit --prepare`: a preparation on many workers, by every launcher, and its status."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from click.testing import CliRunner

from pipeline.cache.commits import list_commits
from pipeline.cli import main
from pipeline.corpus import Corpus, CorpusManifest
from pipeline.errors import ConfigError
from pipeline.launch.job import Job
from pipeline.launch.kubernetes import write_manifests
from pipeline.launch.settings import SubmitConfig
from pipeline.launch.slurm import write_scripts
from pipeline.runs.ephemeral import EphemeralFiles
from pipeline.runs.heartbeat import WORKERS
from pipeline.settings import load_config
from pipeline.stores.local_store import LocalStore
from pipeline.submit import job_of, submit
from stages.cache_logits.settings import CacheConfig
from stages.prepare.plan import Plan
from stages.prepare.run import prepare
from stages.prepare.settings import PrepareConfig
from stages.train_student.settings import TrainConfig
from tests.support.helpers import tiny_tokenizer, wait_until
from tests.support.launching import ROOT, run

LINES = 40


@pytest.fixture
def job(tmp_path: LocalStore) -> Path:
    """The settings file of a preparation of six units."""
    tiny_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "text").mkdir()
    for index in range(6):
        lines = [json.dumps({"text": f"document {index} {line} " * 9}) for line in range(LINES)]
        (tmp_path / "text" / f"{index}.jsonl").write_text("\n".join([*lines, '{"text": "again and again"}']))
    settings = {"inputs": [str(tmp_path / "text")], "tokenizer": str(tmp_path / "tokenizer"), "lease_s": 10.0}
    settings |= {"out": str(tmp_path / "corpus"), "sequence_length": 32, "partition_tokens": 1500}
    (tmp_path / "prepare.yaml").write_text(json.dumps(settings))
    return tmp_path / "prepare.yaml"


def config_of(job: Path, **changes: object) -> PrepareConfig:
    return PrepareConfig(**json.loads(job.read_text()) | {"inputs": (job.parent / "text",)} | paths(job) | changes)


def paths(job: Path) -> dict[str, Path]:
    return {"tokenizer": job.parent / "tokenizer", "out": job.parent / "corpus"}


def plan_in_small_units(job: Path) -> None:
    """The plan, with a unit a file; submissions that follow go by it."""
    from stages.prepare import run as stage

    unit_bytes, stage.UNIT_BYTES = stage.UNIT_BYTES, 7_000
    try:
        stage.plan_corpus(config_of(job))
    finally:
        stage.UNIT_BYTES = unit_bytes


def status(corpus: Path) -> tuple[int, dict]:
    result = CliRunner().invoke(main, ["status", str(corpus), "--json"])
    return result.exit_code, json.loads(result.stdout)


def start_worker(job: Path, worker: int, workers: int = 2) -> subprocess.Popen:
    environment = {**os.environ, "PIPELINE_WORKER": str(worker), "PIPELINE_WORKERS": str(workers)}
    command = [sys.executable, "-m", "pipeline.cli", "prepare", "--config", str(job), "--worker-from-env"]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def test_workers_share_a_plan_and_a_killed_one_is_taken_over(job: Path) -> None:
    plan_in_small_units(job)
    corpus = job.parent / "corpus"
    assert status(corpus)[1]["state"] == "incomplete"
    assert len(Plan.read(corpus).units) == 6
    first = start_worker(job, 0)
    wait_until(lambda: EphemeralFiles(corpus / "units" / WORKERS).names())
    first.kill()
    first.communicate()
    second = start_worker(job, 1)
    _, errors = second.communicate(timeout=200)
    assert second.returncode == 0, errors
    code, document = status(corpus)
    assert (code, document["state"], document["num_done"]) == (0, "complete", document["num_partitions"])
    assert document["phases"]["tokenised"] == [6, 6]
    assert document["num_tokens_done"] == sum(path.stat().st_size for path in (job.parent / "text").iterdir())
    alone = config_of(job, out=job.parent / "alone", workers=1)
    prepare(alone, unit_bytes=7_000)
    assert [row.key for row in Corpus(corpus).rows()] == [row.key for row in Corpus(alone.out).rows()]
    assert CorpusManifest.read(corpus).fingerprint == CorpusManifest.read(alone.out).fingerprint
    assert CorpusManifest.read(corpus).statistics["duplicate_documents"] == 5
    assert not (corpus / "units" / "staged").exists()


def test_local_pool_prepares_and_submitted_again_has_nothing_to_do(job: Path) -> None:
    command = [sys.executable, "-m", "pipeline.cli", "submit", "--on", "local", "--prepare", str(job), "--workers", "2"]
    finished = run(command)
    assert "complete" in finished.stderr
    assert (job.parent / "corpus.jobs" / "logs" / "prepare-1.log").is_file()
    assert CorpusManifest.read(job.parent / "corpus").statistics["documents"] == 6 * LINES + 1
    run(command)


def test_bad_record_is_set_aside_with_its_line_while_the_rest_is_done(job: Path) -> None:
    path = job.parent / "text" / "3.jsonl"
    good = path.read_text()
    path.write_text(good + "\n{broken")
    plan_in_small_units(job)
    worker = start_worker(job, 0, 1)
    _, errors = worker.communicate(timeout=200)
    assert worker.returncode == 2
    assert "3.jsonl: line 42: not JSON" in errors.strip().splitlines()[-1]
    corpus = job.parent / "corpus"
    assert list_commits(corpus / "units") == {0, 1, 2, 4, 5}
    code, document = status(corpus)
    assert code == 3
    assert "line 42: not JSON" in document["failed"]["3"]
    path.write_text(good)
    plan_in_small_units(job)  # as a second submission does
    assert list_commits(corpus / "units") == {0, 1, 2, 4, 5}
    assert status(corpus)[1]["failed"] == {}


def test_drained_worker_leaves_with_75_and_the_rest_goes_on(job: Path) -> None:
    plan_in_small_units(job)
    worker = start_worker(job, 0, 1)
    wait_until(lambda: EphemeralFiles(job.parent / "corpus" / "units" / WORKERS).names())
    worker.send_signal(signal.SIGTERM)
    _, errors = worker.communicate(timeout=200)
    assert worker.returncode in (75, 0), errors  # all may be done before the signal is heard
    again = start_worker(job, 0, 1)
    assert again.wait(timeout=200) == 0
    again.communicate()


def submitted(job: Path, on: str, **settings: object) -> Job:
    return job_of(SubmitConfig(launcher=on, prepare=job, write_only=True, **settings))


def test_slurm_scripts_start_the_workers_and_ask_for_the_corpus(job: Path) -> None:
    made = submitted(job, "slurm", workers=7)
    write_scripts(made)
    assert sorted(path.name for path in made.folder.glob("*.s*")) == ["gate.sbatch", "prepare.sbatch", "submit.sh"]
    script = (made.folder / "prepare.sbatch").read_text()
    assert "#SBATCH --array=0-6\n" in script
    assert f"exec {shlex.join(made.worker_command())}\n" in script
    assert "--gres" not in script
    gate = (made.folder / "gate.sbatch").read_text()
    assert f"status {made.cache}\n" in gate
    assert "verify" not in gate
    assert "prepare.sbatch" in gate
    for path in made.folder.glob("*.s*"):
        assert subprocess.run(["bash", "-n", str(path)]).returncode == 0


def test_kubernetes_manifests_are_by_the_schema(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = submitted(job, "kubernetes", workers=3, image="registry/pipeline:1", volume="models")
    write_manifests(made)
    for path in made.folder.glob("*.yaml"):
        kubernetes_validate.validate(yaml.safe_load(path.read_text()), "1.31", strict=True)
    document = yaml.safe_load((made.folder / "prepare.yaml").read_text())
    (container,) = document["spec"]["template"]["spec"]["containers"]
    assert container["command"][-4:] == ["prepare", "--config", "/settings/prepare.yaml", "--worker-from-env"]
    assert "prepare.yaml" in (made.folder / "submit.sh").read_text()


def test_a_submission_is_of_one_kind(job: Path) -> None:
    with pytest.raises(ConfigError, match="--prepare"):
        SubmitConfig(launcher="local")
    with pytest.raises(ConfigError, match="--prepare"):
        SubmitConfig(launcher="local", prepare=job, cache_logits=job)
    with pytest.raises(ConfigError, match="follows a capture"):
        SubmitConfig(launcher="local", prepare=job, train_student=job)


def test_mistakes_show_before_anything_is_started(job: Path) -> None:
    (job.parent / "text" / "0.jsonl").rename(job.parent / "text" / "0.csv")
    settings = json.loads(job.read_text()) | {"inputs": [str(job.parent / "text" / "0.csv")]}
    job.write_text(json.dumps(settings))
    from pipeline.progress import Reporter

    with pytest.raises(ConfigError, match="not a type of input"):
        submit(SubmitConfig(launcher="local", prepare=job), Reporter())


def test_walk_from_raw_text_to_the_student_parses() -> None:
    """The commands of docs/cluster.md are taken by the command line, and each reads what the one before has written."""
    text = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    section = text.partition("## Text first")[2].partition("\n## ")[0]
    code = "\n".join(line[4:] for line in section.splitlines() if line.startswith("    "))
    commands = [shlex.split(line) for line in code.replace("\\\n", " ").splitlines() if line]
    assert [command[1] for command in commands] == ["submit", "status", "submit", "status"]
    for command in commands:
        parsed = main.commands[command[1]].make_context(command[1], command[2:])
        assert parsed.params
    preparing, capturing = commands[0], commands[2]
    prepared = load_config(PrepareConfig, ROOT / preparing[preparing.index("--prepare") + 1])
    captured = load_config(CacheConfig, ROOT / capturing[capturing.index("--cache-logits") + 1])
    trained = load_config(TrainConfig, ROOT / capturing[capturing.index("--train-student") + 1])
    assert str(prepared.inputs[0]).startswith("s3://")
    assert (prepared.out, (captured.out,)) == (captured.corpus, trained.cache)
    assert [command[2] for command in (commands[1], commands[3])] == [str(prepared.out), str(captured.out)]
