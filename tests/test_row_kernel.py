"""The Triton row kernel on the CPU, in Triton's interpreter, against the torch path in float64."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed; `pip install --no-deps --target FOLDER triton` and PYTHONPATH=FOLDER",
)


@pytest.mark.parametrize("count", [40, pytest.param(504, marks=pytest.mark.slow)])
def test_kernel_agrees_with_the_torch_path(count):
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernel_rows", str(count)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert finished.returncode == 0, finished.stderr
    assert int(finished.stdout) == count + 4
