"""The transformers engine: what it multiplies on a device, and how rows of several requests are reduced together."""

import numpy as np
import pytest
import torch

from pipeline.models import read_model
from pipeline.targets import COLUMNS
from stages.cache_logits.engine import Request
from stages.cache_logits.settings import TeacherConfig
from stages.cache_logits.teacher import Teacher
from stages.cache_logits.transformers_engine import TransformersEngine
from tests.support.small import CONTEXT, make_teacher

VOCAB_SIZE, ROW_CHUNK = 300, 7


def requests():
    """Five, one of which wants nothing."""
    random = np.random.default_rng(0)
    made = []
    for key, length in enumerate((9, 30, 4, 17, 30)):
        positions = np.flatnonzero(random.random(length - 1) < 0.6) if key != 2 else np.zeros(0)
        uniforms = random.random(len(positions), dtype=np.float32)
        token_ids = random.integers(0, VOCAB_SIZE, length).astype(np.int32)
        made.append(Request(key, token_ids, positions.astype(np.int32), uniforms))
    return made


@pytest.fixture(params=["bfloat16", "float16", "float32"])
def engine(request, tmp_path):
    """On a CPU, which has products of the type, so that hidden states are the same however batches are made."""
    make_teacher(tmp_path)
    config = TeacherConfig(teacher=tmp_path, top_k=8, tail_samples=2, batch_tokens=60, row_chunk=ROW_CHUNK)
    teacher = Teacher(model=read_model(tmp_path), vocab_size=VOCAB_SIZE, dtype=request.param, quantization="none")
    engine = TransformersEngine(teacher, config, CONTEXT)
    yield engine
    engine.close()


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, targets in found.items():
        for name in COLUMNS:
            np.testing.assert_array_equal(getattr(targets, name), getattr(expected[key], name), err_msg=name)


@pytest.fixture
def products(monkeypatch):
    """`torch.mm` with an `out_dtype` as a GPU has it and a CPU has not: exact products, summed in float32."""
    given = []

    def mm(left, right, *, out_dtype):
        assert out_dtype == torch.float32
        given.append((left.dtype, right.dtype, len(left)))
        return torch.nn.functional.linear(left.float(), right.t().float())

    monkeypatch.setattr(torch, "mm", mm)
    return given


def test_head_of_a_device_is_multiplied_as_it_is_and_gives_the_same_targets(engine, products):
    expected = dict(engine.score(requests()))
    assert products == []
    head = engine._model.get_output_embeddings().weight
    engine._head_VH = head[:VOCAB_SIZE]  # as it is kept where the device is no CPU
    assert_same(dict(engine.score(requests())), expected)
    if head.dtype == torch.float32:
        assert products == []
        return
    assert {part for *dtypes, _ in products for part in dtypes} == {head.dtype}
    chunks = [rows for *_, rows in products]
    assert sum(chunks) == sum(len(request.positions) for request in requests())
    assert chunks.count(ROW_CHUNK) >= len(chunks) - 2  # of the two batches each has a rest, and no request its own


def test_bias_and_scales_come_after_the_product(engine, products):
    engine._bias_V, engine._scale, engine._soft_cap = torch.linspace(-2, 2, VOCAB_SIZE), 0.5, 3.0
    hidden_NH = torch.randn(5, 64).to(engine._model.dtype)
    with torch.inference_mode():
        expected = engine._logits(hidden_NH)
        engine._head_VH = engine._model.get_output_embeddings().weight[:VOCAB_SIZE]
        found = engine._logits(hidden_NH)
    assert (len(products) == 1) == (engine._model.dtype != torch.float32)
    largest = torch.nn.functional.linear(hidden_NH.float(), engine._head_VH.float(), engine._bias_V).abs().max().item()
    atol = 4 * torch.finfo(torch.float32).eps * largest  # the bias is added before or after the last products
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)
