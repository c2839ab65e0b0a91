"""The demo from end to end with tiny models, and a report that claims no more than was measured."""

import dataclasses
import subprocess
import sys

import psutil
import pytest

from pipeline.errors import PipelineError
from pipeline.progress import KeptLines, Reporter
from stages.demo.report import verdict
from stages.demo.results import STUDENTS, StudentResult, read_results
from stages.demo.run import Steps, demo
from stages.demo.settings import DemoConfig
from tests.support.workers import new_cache, tiny_corpus
from tests.test_demo_teacher import TINY

RECIPE = dataclasses.replace(
    TINY,
    student_hidden_size=32,
    student_intermediate_size=64,
    student_layers=1,
    student_text_bytes=20_000,
    held_out_text_bytes=8_000,
    student_steps=4,
    student_batch_size=2,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A demo that ran once: its configuration and the lines of its report."""
    config = DemoConfig(work=tmp_path_factory.mktemp("demo"), engine="transformers")
    return config, demo(config, recipe=RECIPE)


def test_demo_runs_every_command_and_reports(finished):
    config, lines = finished
    report = next(config.work.glob("run-*/report.html"))
    page = report.read_text(encoding="utf-8")
    assert page.count("<svg") == 6
    assert not any(word in page for word in ("<script", "<link", "src=", "url(http"))
    for word in ("cross-entropy", "KL to teacher, T=1", "KL to teacher, T=2", "bytes a token", "tokens/s", "Exactness"):
        assert word in "\n".join(lines)
    for name in STUDENTS:
        assert (report.parent / f"student-{name}" / "model.safetensors").is_file()


def test_second_run_reuses_every_step(finished):
    config, lines = finished
    reporter = KeptLines()
    again = demo(config, reporter, RECIPE)
    assert again[:-1] == lines[:-1]
    assert sum("reused" in line for line in reporter.lines) == 9
    assert not any("$ pipeline" in line for line in reporter.lines)


def test_report_says_better_only_if_it_is(finished):
    config, _ = finished
    folder = next(config.work.glob("run-*"))
    seconds = dict.fromkeys(
        ("teacher", "prepare", "cache-logits", "verify", "train-distilled", "train-hard-labels"), 1.0
    )
    results = read_results(folder, config.work / "teacher", RECIPE, seconds)

    def with_losses(distilled: float, hard_labels: float) -> str:
        losses = {"distilled": distilled, "hard-labels": hard_labels}
        students = {
            name: StudentResult(metrics={"eval_cross_entropy": loss}, curves={}) for name, loss in losses.items()
        }
        return verdict(dataclasses.replace(results, students=students))

    assert "is better" in with_losses(2.0, 2.1)
    assert "is NOT better" in with_losses(2.1, 2.0)
    assert "is NOT better" in with_losses(2.0, 2.0)


def test_failing_step_stops_the_demo(tmp_path, capfd):
    steps = Steps(tmp_path, Reporter())
    with pytest.raises(PipelineError, match="step 'verify' ended with exit code 2"):
        steps.command("verify", "verify", tmp_path / "nowhere")
    assert "no cache there" in capfd.readouterr().err
    assert not (tmp_path / "steps").exists()


def test_command_of_a_killed_demo_ends_with_it(tmp_path):
    cache = new_cache(tmp_path / "cache", tiny_corpus(tmp_path / "corpus", 2))
    code = (
        "from pathlib import Path; from pipeline.progress import Reporter; from stages.demo.run import Steps\n"
        f"Steps(Path({str(tmp_path)!r}), Reporter()).command('wait', 'status', {str(cache)!r}, '--watch')"
    )
    demo = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert demo.stdout.readline()  # of the command
    commands = psutil.Process(demo.pid).children()
    demo.kill()
    demo.communicate()
    assert len(commands) == 1
    assert psutil.wait_procs(commands, timeout=60)[1] == []
