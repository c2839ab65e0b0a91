"""What an accelerator would be asked to do: run on tensors without data, on a device without kernels and float64.

Operators that mix devices, or need a value on the host, raise there. What is copied between the two is counted.
"""

import contextlib
import multiprocessing
import os
import subprocess
import sys
import types
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from stages.cache_logits.draws import reduce_rows
from stages.cache_logits.engine import Request
from stages.cache_logits.reduction import LANE, Reduction
from stages.cache_logits.sketching import RowSketch
from stages.train_student.divergences import DIVERGENCES
from stages.train_student.sketch import SketchHead
from stages.train_student.tails import DIVERGING_TAILS, TAILS

CARD = "card:0"
STAGING = (
    torch.ops.prim.device.default,
    torch.ops.aten.lift_fresh.default,
    torch.ops.aten.detach.default,
    torch.ops.aten.copy_.default,
)
"""What the host may do to its own tensors before it sends them."""
ROWS, VOCAB, HIDDEN, ROW_CHUNK = 24, 1003, 16, 10
NUM_DRAWS = 3
SCHEDULED, ENDS, PROMPTS = (12, 5, 11, 6), (12, 5, 20, 6), (12, 9, 20, 6)
"""Tokens of a step, request by request, where they end, and the lengths of the prompts."""
BENCHMARK = """
import runpy, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"zstandard", "numcodecs", "pcodec", "zarr", "obstore", "msgspec", "xxhash"}:
            raise ImportError(f"{name} is not there")

sys.meta_path.insert(0, Absent())
sys.argv[1:] = "--device cpu --rows 16 --length 8 --vocab 512 --hidden 32 --ffn 64 --heads 2".split()
sys.argv += "--kv-heads 1 --layers 1 --rounds 1 --row-chunks 16 --top-k 4".split()
runpy.run_module("benchmarks.capture_gpu", run_name="__main__")
"""


@dataclass
class Work(TorchDispatchMode):
    """What operators there were."""

    uploads: int = 0
    """Copies from the host."""
    waits: int = 0
    """Those of them until whose end the host waits, and so for all that the device has yet to do."""
    downloads: int = 0
    on_host: list[str] = field(default_factory=list)
    """Operators other than copies that had a tensor of the host's."""
    _pinned: list[Tensor] = field(default_factory=list)
    float64: list[tuple[str, int]] = field(default_factory=list)
    """Operators that gave float64 on the device, and how many elements."""

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, kinds: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Note where it comes from and where it goes."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given, made = ([leaf for leaf in pytree.tree_leaves(tree) if torch.is_tensor(leaf)] for tree in (args, result))
        devices = [{tensor.device.type for tensor in tensors} for tensors in (given, made)]
        if kwargs.get("pin_memory"):
            self._pinned.append(result)
        elif devices == [{"cpu"}, {"card"}]:
            self.uploads += 1
            memory = given[0].untyped_storage()._cdata
            is_pinned = any(memory == tensor.untyped_storage()._cdata for tensor in self._pinned)
            self.waits += not (is_pinned and kwargs.get("non_blocking"))
        elif devices == [{"card"}, {"cpu"}]:
            self.downloads += 1
        elif "cpu" in devices[0] | devices[1] and func not in STAGING:
            self.on_host.append(str(func))
        doubles = [tensor.numel() for tensor in made if tensor.dtype == torch.float64 and tensor.device.type == "card"]
        self.float64 += [(str(func), size) for size in doubles]
        return result


def on_the_card(fake: FakeTensorMode, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return FakeTensor(fake, torch.empty(shape, dtype=dtype, device="meta"), torch.device(CARD))


def in_a_process(function: Any, cases: list[tuple[int, ...]]) -> list[Work]:
    """What `function` did in each case; a process has one such device, and for good."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return [Work(**work) for work in pool.submit(_with_a_card, function, cases).result(timeout=400)]


def _with_a_card(function: Any, cases: list[tuple[int, ...]]) -> list[dict[str, Any]]:
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    warnings.simplefilter("ignore")
    _setup_privateuseone_for_python_backend("card")
    with FakeTensorMode() as fake:
        return [function(fake, *case) for case in cases]


def _reduction(num_draws: int, rank: int = 0) -> Reduction:
    return Reduction(8, (1.0, 2.0), num_draws, 2.0 if num_draws else None, rank)


def _reduce_rows(fake: FakeTensorMode, num_draws: int, ranks: int, tail_rank: int) -> dict[str, Any]:
    logits, uniforms = on_the_card(fake, ROWS, VOCAB), on_the_card(fake, ROWS)
    labels = on_the_card(fake, ROWS, dtype=torch.int64)
    place = {"ranks": ranks, "rank": ranks - 1, "gather": lambda columns: columns.repeat(1, ranks)}
    if tail_rank:
        sizes = {"mean_H": (HIDDEN,), "encoder_RH": (tail_rank, HIDDEN), "basis_VR": (VOCAB, tail_rank)}
        tensors = {name: on_the_card(fake, *size) for name, size in sizes.items()}
        sketch = RowSketch(**tensors, offset_V=on_the_card(fake, VOCAB), softcap=30.0)
        place |= {"sketch": sketch, "hidden_NH": on_the_card(fake, ROWS, HIDDEN, dtype=torch.bfloat16)}
    reduction = _reduction(num_draws, tail_rank)
    with Work() as work:
        packed = reduce_rows(reduction, logits, labels, uniforms, **place)
    assert (str(packed.device), packed.dtype, packed.shape) == (CARD, torch.int32, (ROWS, reduction.width))
    return vars_of(work)


def vars_of(work: Work) -> dict[str, Any]:
    return {name: getattr(work, name) for name in ("uploads", "waits", "downloads", "on_host", "float64")}


def test_reduction_stays_on_its_device():
    cases = [(num_draws, ranks, rank) for num_draws in (0, NUM_DRAWS) for ranks in (1, 3) for rank in (0, 4)]
    for (num_draws, *_), work in zip(cases, in_a_process(_reduce_rows, cases), strict=True):
        assert (work.uploads, work.downloads, work.on_host) == (0, 0, [])
        assert_little_float64(work, num_draws)


def assert_little_float64(work: Work, num_draws: int) -> None:
    """Running sums over lanes and inside the drawn ones; never as many elements as there are logits."""
    assert bool(work.float64) == bool(num_draws)
    assert all(size <= ROWS * max(VOCAB // LANE + 2, num_draws * LANE) for _, size in work.float64), work.float64


def _pool(fake: FakeTensorMode, num_draws: int) -> dict[str, Any]:
    from stages.cache_logits.vllm_plugin import pooler as module

    module.get_tensor_model_parallel_world_size, module.get_tensor_model_parallel_rank = lambda: 1, lambda: 0
    module.tensor_model_parallel_all_gather = lambda columns: columns
    head = types.SimpleNamespace(
        weight=on_the_card(fake, VOCAB, HIDDEN),
        shard_indices=types.SimpleNamespace(org_vocab_start_index=0, num_org_elements=VOCAB),
    )
    processor = types.SimpleNamespace(_apply_head=lambda head, hidden, bias: hidden @ head.weight.T)
    options = {"top_k": 8, "temperatures": [1.0, 2.0], "tail_samples": num_draws, "draw_temperature": 2.0}
    model = torch.nn.Module()
    pooler = module.SparseTargetPooler(model, reduction=options, row_chunk=ROW_CHUNK, vocab_size=VOCAB - 3)
    model.compute_logits = lambda hidden: pooler._local_logits(processor, hidden, head)
    hidden_states, step = on_the_card(fake, sum(SCHEDULED), HIDDEN), _step(fake, module.pack_rows, num_draws)
    with Work() as work:
        results = pooler(hidden_states, step)
    whole, first, last, profiled = results
    assert first is None
    assert [len(rows) for rows in (whole, last, profiled)] == [SCHEDULED[0] - 1, PROMPTS[2] - 1, SCHEDULED[3]]
    assert {(str(rows.device), rows.dtype) for rows in (whole, last, profiled)} == {(CARD, torch.int32)}
    return vars_of(work)


def _step(fake: FakeTensorMode, pack_rows: Any, num_draws: int) -> Any:
    """The metadata of a step: a whole prompt, the first part of one, the last of one, and one of a profiling run."""
    requests = [Request(0, ids := np.arange(n), ids[:-1], np.zeros(n - 1, np.float32)) for n in PROMPTS]
    starts = [end - count for end, count in zip(ENDS, SCHEDULED)]
    width = _reduction(num_draws).width
    held = [[on_the_card(fake, start, width, dtype=torch.int32)] if start else [] for start in starts]
    params = [types.SimpleNamespace(extra_kwargs=pack_rows(request)) for request in requests[:-1]]
    cursor = types.SimpleNamespace(
        num_scheduled_tokens_cpu=np.array(SCHEDULED), seq_lens_cpu=np.array(ENDS), prompt_lens_cpu=np.array(PROMPTS)
    )
    return types.SimpleNamespace(
        get_pooling_cursor=lambda: cursor,
        pooling_params=[*params, types.SimpleNamespace(extra_kwargs=None)],
        pooling_states=[types.SimpleNamespace(hidden_states_cache=rows, clean=rows.clear) for rows in held],
    )


@pytest.mark.vllm
def test_pooler_sends_one_tensor_a_step_to_the_device_and_waits_for_nothing():
    """Which rows, their labels and uniforms, however many requests and chunks of rows there are."""
    for num_draws, work in zip((0, NUM_DRAWS), in_a_process(_pool, [(0,), (NUM_DRAWS,)]), strict=True):
        assert (work.uploads, work.waits, work.downloads, work.on_host) == (1, 0, 0, [])
        assert_little_float64(work, num_draws)


def _lose(fake: FakeTensorMode, tail: str, divergence: str, has_cap: bool) -> dict[str, Any]:
    """A step of the fused loss, backward included."""
    from stages.train_student import fused_head
    from stages.train_student.loss import DistillationTargets, LossSettings, TeacherTargets, distillation_loss

    for sizes in (fused_head.DEFAULT_CHUNK_BYTES, fused_head.BLOCK_BYTES, fused_head.ROW_ALIGNMENT):
        sizes["card"] = sizes["cuda"]
    torch.is_autocast_enabled, torch.autocast = lambda device: False, lambda *_, **__: contextlib.nullcontext()
    hidden, head = on_the_card(fake, ROWS, HIDDEN), on_the_card(fake, VOCAB, HIDDEN)
    teacher = TeacherTargets(
        ids_MK=on_the_card(fake, ROWS, 8, dtype=torch.int64),
        probs_MK=on_the_card(fake, ROWS, 8),
        tail_mass_M=on_the_card(fake, ROWS),
        entropy_M=on_the_card(fake, ROWS) if TAILS[tail].is_drawn else None,
        coefficients_MR=on_the_card(fake, ROWS, 2) if TAILS[tail].is_sketched else None,
        sketch=SketchHead(on_the_card(fake, 3, VOCAB), VOCAB, 30.0) if TAILS[tail].is_sketched else None,
    )
    targets = DistillationTargets(labels_M=on_the_card(fake, ROWS, dtype=torch.int64), teacher=teacher)
    softcap = 30.0 if has_cap else None
    settings = LossSettings(vocab_size=VOCAB - 3, tail=tail, divergence=divergence, logit_softcap=softcap)
    row_bytes = 4 * (VOCAB + 16)
    with Work() as work:
        loss = distillation_loss(
            hidden.requires_grad_(), head.requires_grad_(), targets, settings, chunk_bytes=ROW_CHUNK * row_bytes
        )
        loss.loss.backward()
    assert (str(hidden.grad.device), head.grad.shape) == (CARD, head.shape)
    return vars_of(work)


def test_loss_and_its_gradients_never_wait_for_the_device():
    cases = [(tail, "forward", False) for tail in TAILS]
    cases += [(tail, name, False) for tail in DIVERGING_TAILS for name in DIVERGENCES[1:]]
    cases.append(("ghost", "forward", True))
    for case, work in zip(cases, in_a_process(_lose, cases), strict=True):
        assert (work.uploads, work.downloads, work.on_host, work.float64) == (0, 0, [], []), case


def _choose(fake: FakeTensorMode, has_cap: bool) -> dict[str, Any]:
    """The rows where the student is least sure, of three sequences."""
    from stages.train_student.loss_settings import LossSettings
    from stages.train_student.student_entropy import least_sure_rows

    torch.is_autocast_enabled, torch.autocast = lambda device: False, lambda *_, **__: contextlib.nullcontext()
    hidden, head = on_the_card(fake, ROWS, HIDDEN), on_the_card(fake, VOCAB, HIDDEN)
    settings = LossSettings(vocab_size=VOCAB - 3, logit_softcap=30.0 if has_cap else None)
    with Work() as work:
        rows = least_sure_rows(hidden, head, None, settings, [(10, 2), (0, 0), (14, 3)])
    assert (str(rows.device), rows.shape) == (CARD, (5,))
    return vars_of(work)


def test_choice_of_the_students_positions_never_waits_for_the_device():
    for case, work in zip((False, True), in_a_process(_choose, [(False,), (True,)]), strict=True):
        assert (work.uploads, work.downloads, work.on_host, work.float64) == (0, 0, [], []), case


def test_benchmark_for_a_gpu_needs_torch_alone():
    """A machine with a GPU may have no more than torch, and this package as a folder."""
    root = Path(__file__).parent.parent
    command = [sys.executable, "-W", "ignore", "-c", BENCHMARK]
    environment = os.environ | {"PYTHONPATH": ""}
    said = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert (said.returncode, said.stderr) == (0, "")
    assert "and reduction" in said.stdout
