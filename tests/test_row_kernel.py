"""The Triton row kernel on the CPU, in Triton's interpreter, against the torch path in float64."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages.train_student.divergences import DIVERGENCES
from stages.train_student.tails import TAILS

ROOT = Path(__file__).parent.parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed; `make slow` does it"
    ),
]


def test_kernel_agrees_with_the_torch_path():
    """72 cases of every tail and every other divergence, and 4 of hard labels alone."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernel_rows"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert finished.returncode == 0, finished.stderr
    assert int(finished.stdout) == 72 * (len(TAILS) + len(DIVERGENCES) - 1) + 4
