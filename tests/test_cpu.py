"""No feature of one processor is taken for granted on a CPU: its products, its cores, how its threads wait."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig

from pipeline import cpu, open_cache
from pipeline.progress import KeptLines, Progress
from stages.cache_logits.audit import audit_cache
from stages.cache_logits.run import cache_logits
from stages.cache_logits.settings import AuditConfig, CacheConfig
from stages.cache_logits.wide_products import HALF, WideProducts
from stages.demo.muon import Muon, orthogonal
from stages.demo.recipe import teacher_config
from stages.demo.teacher import _train
from stages.train_student.loss import fused_distillation_loss
from stages.train_student.run import train_student
from stages.train_student.settings import TrainConfig
from tests.support.small import llama_config, make_cache, make_corpus, make_teacher, random_sequences
from tests.test_demo_teacher import TINY

ROOT = Path(__file__).parent.parent
MATRICES = ("mm", "linear", "matmul", "einsum", "bilinear", "conv", "attention", "dot", "mv")
"""Parts of the names of operations that multiply matrices."""


class Products(TorchDispatchMode):
    """Counts products of matrices, and those of half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.half = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if any(part in name for part in MATRICES):
            self.all += 1
            tensors = filter(torch.is_tensor, pytree.tree_leaves((args, kwargs)))
            if any(tensor.dtype in HALF for tensor in tensors):
                self.half.append(name)
        return func(*args, **kwargs or {})


@pytest.fixture
def no_half_products(tmp_path, monkeypatch):
    """A CPU of 2015."""
    flags = tmp_path / "cpuinfo"
    flags.write_text("flags : fpu sse4_2 avx avx2 fma f16c\n")
    monkeypatch.setattr(cpu, "FLAGS", flags)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("rows"), random_sequences(4, 300), num_partitions=1)


def a_demo_teacher(folder, rows):
    model = LlamaForCausalLM(LlamaConfig.from_dict(teacher_config(TINY)))
    _train(model, np.random.default_rng(0).integers(0, 300, (8, 32)).astype(np.int32), TINY, Progress())


def a_student(folder, rows, **changes):
    cache = make_cache(folder / "cache", rows)
    llama_config(open_cache(cache).manifest.vocab_size, num_hidden_layers=1).save_pretrained(folder / "student")
    values = {"student": folder / "student" / "config.json", "eval_cache": cache, "max_steps": 1, "batch_size": 2}
    train_student(TrainConfig(cache=cache, out=folder / "out", **values | changes))


def a_student_with_adapters(folder, rows):
    a_student(folder, rows, lora_rank=4, lora_head=True)


def a_capture(folder, rows, dtype="float32", reporter=None):
    teacher = make_teacher(folder / "teacher")
    config = CacheConfig(
        teacher=teacher, corpus=rows, out=folder / "cache", engine="transformers", top_k=8, dtype=dtype
    )
    cache_logits(config, reporter)
    audit = audit_cache(AuditConfig(cache=config.out, teacher=teacher), reporter)
    assert audit.problems == []


def a_bfloat16_capture(folder, rows):
    a_capture(folder, rows, "bfloat16")


def a_float16_capture(folder, rows):
    a_capture(folder, rows, "float16")


def a_fused_loss(folder, rows):
    hidden, weight = (torch.randn(size, 16).bfloat16().requires_grad_() for size in (6, 20))
    ids = torch.arange(18).reshape(6, 3)
    probs, tail = torch.full((6, 3), 0.25), torch.full((6,), 0.25)
    out = fused_distillation_loss(
        hidden, weight, torch.arange(6), ids, probs, tail, alpha=0.5, temperature=2.0, tail="ghost"
    )
    out.loss.backward()


PATHS = [a_demo_teacher, a_student, a_student_with_adapters, a_capture, a_bfloat16_capture, a_float16_capture]


@pytest.mark.parametrize("path", [*PATHS, a_fused_loss])
def test_a_cpu_without_half_products_is_asked_for_none(tmp_path, rows, no_half_products, path):
    with Products() as products:
        path(tmp_path, rows)
    assert products.all >= 3
    assert products.half == []


def test_products_of_the_settings_are_seen_where_the_cpu_has_them(tmp_path, rows, monkeypatch):
    """What the test above would see if a path did not ask."""
    monkeypatch.setattr("stages.cache_logits.transformers_engine.has_products", lambda dtype: True)
    with Products() as products:
        a_bfloat16_capture(tmp_path, rows)
    assert {"linear", "scaled_dot_product_attention"} <= set(products.half)


@pytest.mark.parametrize("dtype", HALF)
def test_widened_product_is_the_true_one_rounded_once(dtype):
    torch.manual_seed(0)
    left, right = torch.randn(50, 300).to(dtype), torch.randn(70, 300).to(dtype)
    with torch.inference_mode(), WideProducts():
        found = torch.nn.functional.linear(left, right)
    assert found.dtype == dtype
    exact = left.double() @ right.double().T
    half_step = torch.finfo(dtype).eps / 2
    summed = 300 * torch.finfo(torch.float32).eps * (left.double().abs() @ right.double().abs().T)
    assert ((found.double() - exact).abs() <= half_step * exact.abs() + (1 + half_step) * summed).all()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_widened_models_are_those_of_half_precision(dtype, attention):
    """Attention, experts, and a type that stays what it was between the products."""
    shape = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    for config in (llama_config(300), MixtralConfig(**shape, num_attention_heads=2, num_key_value_heads=1)):
        config._attn_implementation = attention
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        ids = torch.arange(24)[None].repeat(2, 1)
        with torch.inference_mode():
            expected = model(ids, use_cache=False).logits
            with WideProducts():
                found = model(ids, use_cache=False).logits
        assert found.dtype == dtype
        size = expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=8 * torch.finfo(dtype).eps * size)


@pytest.mark.parametrize(
    ("flags", "bfloat16", "float16"),
    [
        ("avx2 fma", False, False),
        ("avx512f avx512_bf16", True, False),
        ("avx512f avx512_fp16", False, True),
        ("amx_bf16 amx_tile", True, False),
        ("asimdhp sve bf16", True, True),
        (None, False, False),
    ],
)
def test_what_a_cpu_multiplies_stands_in_its_flags(tmp_path, monkeypatch, flags, bfloat16, float16):
    path = tmp_path / "cpuinfo"
    if flags is not None:
        path.write_text(f"flags\t\t: fpu {flags} sse\n")
    monkeypatch.setattr(cpu, "FLAGS", path)
    found = [cpu.has_products(dtype) for dtype in ("float32", "auto", "bfloat16", "float16")]
    assert found == [True, True, bfloat16, float16]


def test_a_user_is_told_what_will_crawl(tmp_path, rows, no_half_products, monkeypatch):
    lines = KeptLines()
    a_capture(tmp_path / "quick", rows, "bfloat16", lines)  # widened: nothing crawls
    assert not [line for line in lines.lines if "this CPU" in line]
    cache = make_cache(tmp_path / "cache", rows)
    llama_config(open_cache(cache).manifest.vocab_size, num_hidden_layers=1).save_pretrained(tmp_path / "student")
    values = {"student": tmp_path / "student" / "config.json", "max_steps": 1, "batch_size": 2}
    train_student(TrainConfig(cache=cache, out=tmp_path / "slow", dtype="bfloat16", **values), lines)
    (line,) = [line for line in lines.lines if "this CPU" in line]
    assert "no products of bfloat16 matrices" in line
    assert "--dtype float32" in line


def test_threads_spin_shortly_while_they_wait_unless_the_user_has_said_how():
    environment = {}
    cpu.prepare_threads(environment, cores=10**6)
    assert environment == {"GOMP_SPINCOUNT": cpu.SPINS}
    for name in cpu.WAITING:
        environment = {name: "as I like"}
        cpu.prepare_threads(environment, cores=10**6)
        assert environment == {name: "as I like"}


def test_no_more_threads_than_a_container_has_time_for(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    environment = {"OMP_WAIT_POLICY": "ACTIVE"}
    cpu.prepare_threads(environment, cores=2)
    assert environment == {"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "2"}
    cpu.prepare_threads(environment, cores=1)
    assert environment["OMP_NUM_THREADS"] == "2"
    environment = {"OMP_WAIT_POLICY": "ACTIVE"}
    cpu.prepare_threads(environment, cores=64)
    assert environment == {"OMP_WAIT_POLICY": "ACTIVE"}


@pytest.mark.parametrize(
    ("group", "files", "cores"),
    [
        ("0::/", {}, 8),
        ("0::/", {"cpu.max": "max 100000"}, 8),
        ("0::/", {"cpu.max": "250000 100000"}, 3),
        ("0::/a/b", {"a/cpu.max": "400000 100000", "a/b/cpu.max": "50000 100000"}, 1),
        ("0::/a/b", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2),
        ("1:cpu:/a", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, 8),
        ("1:cpu:/a", {"cpu/a/cpu.cfs_quota_us": "400000", "cpu/a/cpu.cfs_period_us": "100000"}, 4),
        ("", {"cpu.max": "1600000 100000"}, 8),
        ("nonsense", {"cpu.max": "nonsense"}, 8),
    ],
)
def test_cores_are_those_that_a_container_gets_time_on(tmp_path, monkeypatch, group, files, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    own = tmp_path / "own"
    own.write_text(group)
    assert cpu.available_cores(tmp_path, own) == cores


def test_command_tells_openmp_before_torch_is_there():
    """libgomp shows what it makes of the environment when it is loaded; left alone it spins 300,000 times."""
    environment = {name: value for name, value in os.environ.items() if name not in cpu.WAITING}
    code = (
        "import sys; from pipeline.cli import main; sys.argv[1:] = ['verify', '.']\ntry: main()\nfinally: import torch"
    )
    environment["OMP_DISPLAY_ENV"] = "verbose"
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert f"GOMP_SPINCOUNT = '{cpu.SPINS}'" in finished.stderr


def test_muon_keeps_singular_vectors_and_puts_values_near_one():
    torch.manual_seed(0)
    for shape in ((3, 16, 16), (2, 64, 24), (2, 24, 64)):
        left, _, right = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
        values = torch.logspace(0, -2, shape[-1] if shape[-1] < shape[-2] else shape[-2], dtype=torch.float64)
        found = orthogonal(left * values @ right)
        assert found.dtype == torch.float32
        turned = left.mT @ found.double() @ right.mT
        diagonal = turned.diagonal(dim1=1, dim2=2)
        # Five odd polynomials amplify rounding by the slope of the first one at 0, each.
        error = shape[1] * torch.finfo(torch.float32).eps * 3.4445**5
        assert (turned - torch.diag_embed(diagonal)).abs().max() <= error
        assert diagonal.min() > 0.6
        assert diagonal.max() < 1.2


def test_muon_takes_the_steps_of_torchs_own_without_its_rounding():
    """Matrices of one shape and of others, several steps, weight decay; torch's own orthogonalises in bfloat16."""
    torch.manual_seed(0)
    shapes = [(24, 24), (24, 24), (48, 24), (24, 48)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(weight.detach().clone()) for weight in ours]
    start = [weight.detach().clone() for weight in ours]
    optimizers = [Muon(ours, lr=0.02), torch.optim.Muon(theirs, lr=0.02)]
    for _ in range(3):
        for one, other in zip(ours, theirs):
            one.grad = torch.randn(one.shape)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other, before in zip(ours, theirs, start):
        assert (one - other).norm() < 0.05 * (one - before).norm()
