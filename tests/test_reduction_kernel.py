"""The Triton kernels of the reduction on the CPU, in Triton's interpreter, and compiled for GPUs that are not here."""

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from stages.cache_logits import draws
from stages.cache_logits.engine import unpack
from tests.test_reduction import check

ROOT = Path(__file__).parent.parent
SHAPES = (
    "(equals_float64 and temperatures1-1003-3) or whole_vocabulary or more_ranks or peaked or extreme or half or "
    "ruled_out or no_number or uniform or running_sum or without_tail or row_alone or their_own_logits"
)
"""Of the reduction's tests, those that take the interpreter seconds."""
NEEDS_TRITON = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed; `make slow` does it"
)


@pytest.mark.slow
@NEEDS_TRITON
def test_kernels_pass_the_tests_of_the_reduction():
    command = [sys.executable, "-m", "tests.support.kernel_reduction", "tests/test_reduction.py", "-q", "-k", SHAPES]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)
    assert finished.returncode == 0, finished.stdout
    assert " passed" in finished.stdout
    assert "skipped" not in finished.stdout


@pytest.mark.slow
@NEEDS_TRITON
def test_kernels_fit_the_registers_of_real_gpus_and_read_in_vectors():
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.kernel_builds", "reduction"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert finished.returncode == 0, finished.stderr
    builds = [json.loads(line) for line in finished.stdout.splitlines()]
    assert len(builds) == 3 * 2 * (4 + 6)
    for build in builds:
        assert build["registers"] <= 64, build
        widens = build["logits"] == "bf16" and build.get("SLOTS", 0) > 64  # 12 bytes a thread
        assert build["spill_stores"] <= (12 if widens else 0), build
        bits = 32 if build["logits"] == "fp32" else 16
        columns = 16 if build["kernel"] == "_lanes" else build["SLOTS"] * build["LANE"] // (32 * build["num_warps"])
        assert build["vector_loads"] >= columns * bits // 128, build


class Wrong(types.ModuleType):
    """Kernels that torch's results, moved, stand in for."""

    def __init__(self, move):
        super().__init__("wrong")
        self.move = move

    def reduce_shard(self, reduction, logits, labels, first_id):
        packed = reduction.reduce_shard(logits, labels, first_id)
        self.move(*reduction.split_shard(packed))
        return packed, None


@pytest.mark.parametrize(
    ("move", "difference"),
    [
        (lambda values, ids, rest, moment, label: None, ""),
        (lambda values, ids, rest, moment, label: ids[5, 3].add_(1), "other ids"),
        (lambda values, ids, rest, moment, label: rest[2, 1].mul_(1.01), "a target is 0.0"),
        (lambda values, ids, rest, moment, label: moment[2, 1].mul_(torch.nan), "a target is nan"),
        (lambda values, ids, rest, moment, label: label[2].add_(0.1), "a target is 0.1"),
    ],
)
def test_kernels_that_are_wrong_on_a_device_are_left_out_there(move, difference):
    assert draws._difference(Wrong(move), torch.device("cpu")).startswith(difference)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("top_k", "vocab_size"), [(1, 50257), (64, 102400), (128, 32001)])
def test_kernels_give_float64s_targets_on_a_gpu(dtype, top_k, vocab_size):
    assert draws.kernel_of(torch.device("cuda", 0)) is not None
    logits, labels = (3 * torch.randn(64, vocab_size)).to(dtype), torch.arange(64)
    reduction, uniforms = draws.Reduction(top_k, (1.0, 2.0), 8, 2.0), torch.rand(64)
    packed = draws.reduce_rows(reduction, logits.cuda(), labels, uniforms)
    targets = unpack(packed.cpu().numpy(), reduction)
    check(targets, logits.float(), labels)
    assert not (targets.draws[:, :, None] == targets.ids[:, None]).any()
