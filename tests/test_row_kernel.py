"""The Triton row kernel on the CPU, in Triton's interpreter, against the torch path in float64."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from stages.train_student.divergences import DIVERGENCES
from stages.train_student.loss_settings import LossSettings
from stages.train_student.tails import TAILS

ROOT = Path(__file__).parent.parent
PLAIN = {
    "HAS_TARGETS": True,
    "HAS_LEVEL": False,
    "HAS_SOFTCAP": False,
    "DIVERGENCE": "forward",
    "HAS_GRADIENT": True,
    "HAS_TAIL": False,
}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed; `make slow` does it")
def test_kernel_agrees_with_the_torch_path():
    """72 cases of every tail and every other divergence, and 4 of hard labels alone."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.kernel_rows"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert finished.returncode == 0, finished.stderr
    assert int(finished.stdout) == 72 * (len(TAILS) + len(DIVERGENCES) - 1) + 4


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed; `make slow` does it")
def test_kernel_fits_the_registers_of_real_gpus_and_reads_in_vectors():
    """Triton ships the assembler; no GPU is needed to see that a variant spills, or loads number by number.

    Also at a vocabulary of 50,257, where rows are padded, and with the gradient in the logits' place at half the width,
    where every pass waits once between its loads and its stores.
    """
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.kernel_builds", "rows"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert finished.returncode == 0, finished.stderr
    builds = [json.loads(line) for line in finished.stdout.splitlines()]
    assert len(builds) == 3 * (len(DIVERGENCES) + 7)
    barriers = {"bf16": set(), "fp32": set()}
    for build in builds:
        assert build["registers"] <= 64, build
        assert build["spill_stores"] == build["spill_loads"] == 0, build
        assert build["vector_loads"] >= (4 if build["HAS_GRADIENT"] else 2), build  # 8 logits a thread and pass
        is_narrow = build["gradient"] == "bf16"
        assert build["vector_stores"] >= (0 if not build["HAS_GRADIENT"] else 1 if is_narrow else 2), build
        assert bool(build["rounded"]) == (is_narrow and build["HAS_GRADIENT"]), build  # to the nearest
        if all(build[name] == value for name, value in PLAIN.items()):
            barriers[build["gradient"]].add(build["barriers"])
    ((narrow,), (wide,)) = barriers.values()
    assert narrow == wide + 1


class Launched:
    """A kernel of a triton that is not there: what it was called with, and inside which guard."""

    def __init__(self, function):
        self.calls, self.guards = [], []

    def __getitem__(self, grid):
        return lambda *args, **constants: self.calls.append((grid, tuple(self.guards), constants["DIVERGENCE"]))


@pytest.fixture
def kernel(monkeypatch):
    """row_kernel.py beside stubs of triton."""
    language = types.ModuleType("triton.language")
    language.constexpr = lambda value: value
    stub = types.ModuleType("triton")
    stub.jit, stub.language, stub.next_power_of_2 = Launched, language, lambda number: number
    monkeypatch.setitem(sys.modules, "triton", stub)
    monkeypatch.setitem(sys.modules, "triton.language", language)
    path = ROOT / "stages" / "train_student" / "row_kernel.py"
    spec = importlib.util.spec_from_file_location("row_kernel_beside_stubs", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_kernel_is_launched_on_the_device_of_its_tensors(kernel, monkeypatch):
    """Triton itself takes the current one: logits on cuda:1 beside a current cuda:0 would be read from there."""
    logits = torch.zeros(3, 5)

    @contextlib.contextmanager
    def guard(tensor):
        kernel._rows.guards.append(tensor)
        yield
        kernel._rows.guards.pop()

    monkeypatch.setattr(torch.cuda, "device_of", guard)
    kernel.kernel_rows_(logits, torch.zeros(3, dtype=torch.long), None, LossSettings(vocab_size=5), None, logits)
    ((grid, guards, divergence),) = kernel._rows.calls
    assert grid == (3,)
    assert len(guards) == 1
    assert guards[0] is logits
    assert divergence == "forward"
    assert kernel._rows.guards == []


def test_kernel_reads_padding_behind_a_row_where_vectors_then_fit(kernel):
    """Never what belongs to the next row."""
    cases = {(50_257, 50_272): 50_272, (50_257, 50_257): 50_257, (48, 48): 48, (45, 47): 45, (45, 64): 48, (32, 36): 32}
    for (num_columns, stride), expected in cases.items():
        logits = torch.empty(2, stride, device="meta")[:, :num_columns]
        assert kernel._width(logits) == expected
