"""vLLM's second model runner, in which GPUs run pooling models since 0.29: its own code, on tensors of the host.

Real are its `pool`, its dummy run, its pooling runner, its batches and its output, and our pooler. Played are what only
a GPU has: streams and events, the kernel that counts tokens, the page-locked table of requests (its prompt lengths are
all that a pooler gets to see), and the model, whose hidden states come from transformers.
"""

import contextlib
import dataclasses
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.models import read_model
from stages.cache_logits.audit import NOISE
from stages.cache_logits.comparison import differences
from stages.cache_logits.engine import Request, reduction_of, unpack
from stages.cache_logits.settings import TeacherConfig
from stages.cache_logits.teacher import Teacher
from stages.cache_logits.transformers_engine import TransformersEngine
from tests.support.small import CONTEXT, make_teacher

LENGTHS = (40, 25, 10, 3)
PADDING = 5
"""Rows behind those of a step, which hold what was in memory."""
MAX_REQUESTS = 4


class PlayedModel(torch.nn.Module):
    """What vLLM takes for a pooling model when it looks at its methods."""

    is_pooling_model = True

    def __init__(self, vllm_config: Any = None, prefix: str = "") -> None:
        super().__init__()

    def embed_input_ids(self, input_ids: Any) -> Any: ...

    def forward(self, input_ids: Any, positions: Any) -> Any: ...


class Runner:
    """A model runner between `execute_model` and `pool`; a step is given as who has which tokens of his."""

    def __init__(self, teacher: Teacher, config: TeacherConfig, requests: list[Request]) -> None:
        from vllm.config import ModelConfig, PoolerConfig
        from vllm.v1.worker.gpu.pool.pooling_runner import PoolingRunner

        self._requests, self._teacher = requests, teacher.model.load("float32").eval()
        self._table = types.SimpleNamespace(prompt_len=types.SimpleNamespace(np=np.zeros(MAX_REQUESTS, np.int32)))
        model_config = ModelConfig(
            model=str(teacher.folder),
            skip_tokenizer_init=True,
            runner="pooling",
            pooler_config=PoolerConfig(task="token_classify"),
        )
        scheduler_config = types.SimpleNamespace(max_num_seqs=MAX_REQUESTS)
        vllm_config = types.SimpleNamespace(model_config=model_config, scheduler_config=scheduler_config)
        self._pooling = PoolingRunner(self._model(teacher, config), vllm_config)
        self._runner = types.SimpleNamespace(
            pooling_runner=self._pooling,
            req_states=self._table,
            is_last_pp_rank=True,
            kv_connector=types.SimpleNamespace(post_forward=lambda finished: None),
            eplb=types.SimpleNamespace(step=lambda **kinds: None),
            postprocess_num_computed_tokens=lambda batch: None,
            main_stream=None,
            output_copy_stream=types.SimpleNamespace(wait_stream=lambda stream: None),
        )

    def _model(self, teacher: Teacher, config: TeacherConfig) -> torch.nn.Module:
        from stages.cache_logits.vllm_plugin.pooler import SparseTargetPooler

        weight_VH = self._teacher.lm_head.weight
        head = types.SimpleNamespace(
            shard_indices=types.SimpleNamespace(org_vocab_start_index=0, num_org_elements=len(weight_VH))
        )
        processor = types.SimpleNamespace(_apply_head=lambda head, hidden_NH, bias: hidden_NH @ weight_VH.T)
        model = PlayedModel()
        model.pooler = SparseTargetPooler(
            model,
            reduction=dataclasses.asdict(reduction_of(config)),
            row_chunk=config.rows_at_once(teacher.vocab_size),
            vocab_size=teacher.vocab_size,
        )
        model.compute_logits = lambda hidden_NH: model.pooler._local_logits(processor, hidden_NH, head)
        return model

    def add(self, number: int, slot: int) -> None:
        """A request comes, or comes back after it was preempted."""
        from vllm import PoolingParams

        from stages.cache_logits.vllm_plugin.pooler import pack_rows

        request = self._requests[number]
        params = PoolingParams(task="token_classify", extra_kwargs=pack_rows(request))
        self._pooling.add_request(str(number), slot, params, request.token_ids.tolist())
        self._table.prompt_len.np[slot] = len(request.token_ids)

    def remove(self, slot: int) -> None:
        """A request is done, or is preempted."""
        self._pooling.remove_request(slot)

    def step(self, *parts: tuple[int, int, int, int]) -> dict[int, np.ndarray]:
        """The packed targets of those that end in a step of (request, slot, first token, last token + 1)."""
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner

        hidden = [self._hidden(number)[start:end] for number, _, start, end in parts]
        rest = torch.full((PADDING, hidden[0].shape[1]), torch.nan)
        self._runner.execute_model_state = types.SimpleNamespace(
            input_batch=self._batch(parts),
            hidden_states=torch.cat([*hidden, rest]),
            finished_req_ids=set(),
            ec_connector_output=None,
        )
        output = GPUModelRunner.pool(self._runner).get_output()
        assert self._runner.execute_model_state is None
        found = dict(zip(map(int, output.req_ids), output.pooler_output, strict=True))
        return {number: rows.numpy() for number, rows in found.items() if rows is not None}

    @torch.inference_mode()
    def _hidden(self, number: int) -> torch.Tensor:
        ids = torch.from_numpy(self._requests[number].token_ids).long()[None]
        return self._teacher.model(ids).last_hidden_state[0]

    def _batch(self, parts: tuple[tuple[int, int, int, int], ...]) -> Any:
        from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers

        _, slots, starts, ends = np.array(parts, np.int32).T
        num_tokens = int((ends - starts).sum())
        buffers = InputBuffers(MAX_REQUESTS, num_tokens + PADDING, torch.device("cpu"))
        query_starts = np.concatenate([[0], np.cumsum(ends - starts)]).astype(np.int32)
        return dataclasses.replace(
            InputBatch.make_dummy(len(parts), num_tokens, buffers),
            req_ids=[str(number) for number, *_ in parts],
            idx_mapping=torch.from_numpy(slots).long(),
            idx_mapping_np=slots.astype(np.intp),
            num_scheduled_tokens=ends - starts,
            num_tokens_after_padding=num_tokens + PADDING,
            query_start_loc=torch.from_numpy(query_starts),
            query_start_loc_np=query_starts,
            seq_lens=torch.from_numpy(ends),
            seq_lens_cpu_upper_bound=torch.from_numpy(ends),
        )

    def dummy_run(self, num_tokens: int) -> None:
        """What vLLM does to see how much memory a step takes."""
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner

        hidden_states = torch.zeros(num_tokens, self._teacher.config.hidden_size)
        GPUModelRunner._dummy_pooler_run(self._runner, hidden_states)


@pytest.fixture
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Streams, events and other ranks are played."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of vLLM's imports
        from vllm.v1.worker.gpu import async_utils, model_runner  # noqa: F401

        from stages.cache_logits.vllm_plugin import pooler

        event = types.SimpleNamespace(record=lambda stream: None, synchronize=lambda: None)
        monkeypatch.setattr(torch.cuda, "Event", lambda **kinds: event)
        monkeypatch.setattr(async_utils, "stream", lambda to, back: contextlib.nullcontext())
        monkeypatch.setattr(pooler, "get_tensor_model_parallel_world_size", lambda: 1)
        monkeypatch.setattr(pooler, "get_tensor_model_parallel_rank", lambda: 0)
        monkeypatch.setattr(pooler, "tensor_model_parallel_all_gather", lambda columns: columns)
        yield


def make_requests(vocab_size: int) -> list[Request]:
    random = np.random.default_rng(0)
    requests = []
    for number, length in enumerate(LENGTHS):
        ids = random.integers(0, vocab_size, length).astype(np.int32)
        positions = np.flatnonzero(random.random(length - 1) < 0.7).astype(np.int32)
        requests.append(Request(number, ids, positions, random.random(len(positions), np.float32)))
    return requests


@pytest.mark.vllm
@pytest.mark.slow
def test_second_runner_gives_the_targets_of_transformers(tmp_path: Path, without_a_gpu: None) -> None:
    """Prompts in one step and in several, one that is preempted and starts again in another slot, padding."""
    folder = make_teacher(tmp_path / "teacher")
    model = read_model(folder)
    teacher = Teacher(model=model, vocab_size=model.config.vocab_size - 21, dtype="float32", quantization="none")
    # A row of logits for 7 positions: a step has several chunks.
    config = TeacherConfig(teacher=folder, top_k=16, tail_samples=4, logits_bytes=7 * 4 * teacher.vocab_size)
    requests = make_requests(teacher.vocab_size)
    runner = Runner(teacher, config, requests)
    runner.dummy_run(50)
    for number in (0, 1, 2):
        runner.add(number, slot=number)
    found = runner.step((0, 0, 0, 40), (1, 1, 0, 8))
    runner.remove(0)
    runner.add(3, slot=0)
    found |= runner.step((1, 1, 8, 20), (3, 0, 0, 3), (2, 2, 0, 6))
    runner.remove(1)
    runner.remove(0)
    assert runner.step((2, 2, 6, 7)) == {}
    runner.add(1, slot=0)
    found |= runner.step((1, 0, 0, 14), (2, 2, 7, 10))
    assert sorted(found) == [0, 2, 3]
    found |= runner.step((1, 0, 14, 25))
    engine = TransformersEngine(teacher, config, CONTEXT)
    for number, wanted in engine.score(requests):
        targets = unpack(found.pop(number), reduction_of(config))
        assert len(targets) == len(requests[number].positions)
        assert (targets.draws == wanted.draws).mean() > 0.99  # only rounding can tell them apart
        apart = [difference for temperature in (1.0, 2.0) for difference in differences(targets, wanted, temperature)]
        assert max(difference.value for difference in apart) <= NOISE["float32"]
    assert found == {}
