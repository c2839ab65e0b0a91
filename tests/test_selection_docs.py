"""docs/selection.md: its example runs as it is written."""

import json
import re
import shlex
from pathlib import Path

from pipeline import open_cache
from tests.support.helpers import run
from tests.support.small import make_teacher

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "selection.md").read_text(encoding="utf-8")
COMMANDS = re.search(r"```shell\n(.*?)```", PAGE, re.DOTALL)[1].splitlines()


def test_the_example_runs(tmp_path, monkeypatch):
    teacher, student = (make_teacher(tmp_path / name, seed=seed) for seed, name in enumerate(("teacher", "student")))
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    for line in COMMANDS:
        pipeline, *words = shlex.split(line.replace("TEACHER", str(teacher)).replace("STUDENT", str(student)))
        assert pipeline == "pipeline"
        code, out, errors = run(*words)
        assert code == 0, (line, errors)
        if words[0] == "inspect":
            assert "largest:learnability" in out
    english, typical, hard = (open_cache(tmp_path / name) for name in ("english.cache", "typical.json", "hard.json"))
    assert len(typical) == round(0.9 * len(english)) - round(0.1 * len(english))
    assert len(hard) == max(1, round(0.5 * len(typical)))
    metrics = json.loads((tmp_path / "trained" / "metrics.json").read_text())
    assert [metrics[f"sequences/{name}"] for name in ("hard", "chinese.cache", "code")] == [8, 6, 6]
    assert {"eval_kl_2", "eval_kl_2/english.cache", "eval_kl_2/chinese.cache"} <= metrics.keys()
