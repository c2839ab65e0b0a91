"""What happens inside an engine's steps: how full they are, how much memory they take, and what vLLM takes back."""

import functools
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from pipeline.cache.commits import list_commits
from pipeline.corpus import TokenSequence
from pipeline.errors import EngineError
from pipeline.models import read_model
from pipeline.processes import owner_name
from stages.cache_logits.engine import Request
from stages.cache_logits.run import cache_logits
from stages.cache_logits.settings import CacheConfig
from stages.cache_logits.teacher import Teacher
from stages.cache_logits.transformers_engine import _batches
from stages.cache_logits.vllm_engine import (
    PROBE_TOKENS,
    _max_model_len,
    _schedules_ahead,
    _skips_compilation,
    _tokens_in_flight,
)
from stages.cache_logits.vllm_plugin import FRONT_END, register
from tests.support.small import llama_config, make_corpus, random_sequences
from tests.test_cache_logits import assert_exact, settings
from tests.test_loss import LargestTensor
from tests.test_teachers import HEAD_ROWS, make_family

MESSAGES = 12


@dataclass
class Steps:
    """What vLLM did in a capture."""

    preemptions: int = 0
    """How often it took back what a request had."""
    tokens: list[int] = field(default_factory=list)
    """Of every step that had any."""
    largest: int = 0
    """Elements of the largest tensor that the pooler made."""
    in_flight: int = 0
    """Steps that were scheduled and had not ended, at most."""


def watch(config: CacheConfig, options: dict[str, Any], ahead: bool = False) -> Steps:
    """Capture in a process of its own, with the engine's core in it; `options` are more of vLLM's.

    With `ahead` a step is scheduled while another runs, which vLLM has on GPUs alone.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_watched_capture, config, options, ahead).result(timeout=400)


def _schedule_ahead_on_a_cpu() -> None:
    from vllm.platforms.cpu import CpuPlatform

    adapt = CpuPlatform.check_and_update_config

    def keep(config: Any) -> None:
        asked = config.scheduler_config.async_scheduling
        adapt(config)
        config.scheduler_config.async_scheduling = asked

    CpuPlatform.check_and_update_config = staticmethod(keep)


def _watched_capture(config: CacheConfig, options: dict[str, Any], ahead: bool) -> Steps:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import vllm
    from vllm.v1.core.sched.scheduler import Scheduler

    if ahead:
        _schedule_ahead_on_a_cpu()

    from stages.cache_logits.vllm_plugin.pooler import SparseTargetPooler

    steps, began, in_flight = Steps(), [], [0]
    preempt, schedule, reduce = Scheduler._preempt_request, Scheduler.schedule, SparseTargetPooler._reduce
    end = Scheduler.update_from_output

    def counted(self: Scheduler, *args: Any, **kwargs: Any) -> None:
        steps.preemptions += 1
        preempt(self, *args, **kwargs)

    def noted(self: Scheduler, *args: Any, **kwargs: Any) -> Any:
        output = schedule(self, *args, **kwargs)
        if output.total_num_scheduled_tokens:
            steps.tokens.append(output.total_num_scheduled_tokens)
        began.append(True)
        in_flight[0] += 1
        steps.in_flight = max(steps.in_flight, in_flight[0])
        return output

    def ended(self: Scheduler, *args: Any, **kwargs: Any) -> Any:
        in_flight[0] -= 1
        return end(self, *args, **kwargs)

    def measured(self: SparseTargetPooler, hidden_states: Any, *columns: Any) -> Any:
        with LargestTensor([hidden_states]) as recorder:
            packed = reduce(self, hidden_states, *columns)
        if began:  # not the profiling run at the start
            steps.largest = max(steps.largest, recorder.num_elements)
        return packed

    Scheduler._preempt_request, Scheduler.schedule, SparseTargetPooler._reduce = counted, noted, measured
    Scheduler.update_from_output = ended
    vllm.LLM = functools.partial(vllm.LLM, **options)
    cache_logits(config)
    return steps


@pytest.mark.vllm
@pytest.mark.parametrize("ahead", [False, True], ids=["", "scheduled ahead"])
def test_requests_that_vllm_preempts_are_exact(tmp_path, teacher, corpus, ahead):
    """A key-value cache for less than two sequences, and prompts that grow side by side."""
    config = settings(teacher, corpus, tmp_path / "cache", engine="vllm")
    scarce = {"num_gpu_blocks_override": 6, "block_size": 32}
    growing = {"scheduler_reserve_full_isl": False, "long_prefill_token_threshold": 16}
    steps = watch(config, scarce | growing, ahead)
    assert steps.preemptions > 0
    assert steps.in_flight == (2 if ahead else 1)
    assert_exact(config.out, teacher, corpus)


def short_documents(count: int, seed: int) -> list[TokenSequence]:
    """Sequences of 3 to 12 tokens, every one but the first a label."""
    random = np.random.default_rng(seed)
    lengths = random.integers(3, 13, count)
    return [
        TokenSequence(
            token_ids=random.integers(0, 300, length).astype(np.int32),
            loss_mask=np.arange(length) > 0,
            document_lengths=np.array([length], np.int32),
        )
        for length in lengths
    ]


@pytest.mark.vllm
def test_steps_are_full_and_full_logits_stay_a_chunk(tmp_path):
    """Documents so short that vLLM's default of 256 requests would fill half a step, one of full length behind them."""
    budget, row_chunk = 4096, 64
    sequences = [*short_documents(2600, seed=1), *random_sequences(2, vocab_size=300)]
    corpus = make_corpus(tmp_path / "corpus", sequences)
    teacher = make_family(tmp_path / "teacher", "mistral")
    changes = {"top_k": 4, "batch_tokens": budget, "logits_bytes": row_chunk * HEAD_ROWS * 4, "shard_tokens": 2000}
    steps = watch(settings(teacher, corpus, tmp_path / "cache", engine="vllm", **changes), {})
    probe, *tokens = steps.tokens
    assert probe == PROBE_TOKENS
    assert sum(tokens) == sum(len(sequence.token_ids) for sequence in sequences)
    assert min(tokens[:-2]) > 0.9 * budget, tokens
    # The bound that `logits_bytes` states: chunks of logits, and the packed results (15 columns) of the whole step.
    assert steps.largest <= max(row_chunk * HEAD_ROWS, budget * 15)
    assert steps.largest < 0.1 * budget * HEAD_ROWS


def test_batches_of_transformers_hold_little_padding():
    random = np.random.default_rng(0)
    nothing = np.zeros(0, np.int32)
    lengths = random.integers(1, 200, 500)
    requests = [Request(i, np.zeros(n, np.int32), nothing, nothing) for i, n in enumerate(lengths)]
    batches = list(_batches(requests, budget_tokens=1000))
    assert sorted(request.key for batch in batches for request in batch) == list(range(500))
    padded = [len(batch) * max(len(request.token_ids) for request in batch) for batch in batches]
    assert max(padded) <= 1000
    assert sum(padded) < 1.1 * lengths.sum()
    assert [len(batch) for batch in _batches(requests[:1] * 3, budget_tokens=1)] == [1, 1, 1]


@pytest.mark.vllm
def test_messages_that_follow_each_other_at_once_are_not_slept_over(monkeypatch):
    """vLLM drops a notification now and then; an idle reader would look again after 5 s."""
    from vllm.distributed.device_communicators import shm_broadcast

    monkeypatch.setattr(shm_broadcast.SpinCondition.__init__, "__defaults__", (1,))
    monkeypatch.setattr(shm_broadcast, "SHM_READER_RECHECK_INTERVAL_MS", 5000)  # vLLM's own
    monkeypatch.setenv(FRONT_END, owner_name())
    register()
    assert shm_broadcast.SpinCondition.__init__.__defaults__ == (0,)
    there, back = shm_broadcast.MessageQueue(1, 1), shm_broadcast.MessageQueue(1, 1)

    def echo() -> None:
        queue = shm_broadcast.MessageQueue.create_from_handle(there.export_handle(), 0)
        for ready in (queue, back):
            ready.wait_until_ready()
        for _ in range(MESSAGES):
            back.enqueue(queue.dequeue(indefinite=True))

    with ThreadPoolExecutor(1) as pool:
        answered = pool.submit(echo)
        queue = shm_broadcast.MessageQueue.create_from_handle(back.export_handle(), 0)
        for ready in (there, queue):
            ready.wait_until_ready()
        seconds = []
        for number in range(MESSAGES):
            sent = time.monotonic()
            there.enqueue(number)
            assert queue.dequeue(indefinite=True) == number
            seconds.append(time.monotonic() - sent)
        answered.result()
    assert max(seconds) < 4


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("changes", "skips"),
    [
        ({"enforce_eager": None}, True),
        ({"enforce_eager": None, "pipeline_parallel": 2}, False),
        ({"enforce_eager": False}, False),
        ({"enforce_eager": True, "pipeline_parallel": 2}, True),
    ],
)
def test_a_cpu_compiles_where_it_is_asked_or_must(tmp_path, changes, skips):
    assert _skips_compilation(settings(tmp_path, tmp_path, tmp_path, **changes)) == skips


@pytest.mark.parametrize(
    ("changes", "version", "ahead"),
    [({}, "0.32.0", True), ({"pipeline_parallel": 2}, "0.32.0", None), ({}, "0.31.0", None), ({}, "dev", True)],
)
def test_steps_are_scheduled_ahead_where_vllm_samples_nothing_behind_a_prompt(tmp_path, changes, version, ahead):
    assert _schedules_ahead(settings(tmp_path, tmp_path, tmp_path, **changes), version) is ahead


def test_as_many_tokens_wait_as_all_stages_take():
    assert _tokens_in_flight(8192, concurrent_batches=1) == 2 * 8192
    assert _tokens_in_flight(8192, concurrent_batches=4) >= (4 + 1) * 8192


@pytest.mark.vllm
@pytest.mark.slow
def test_steps_of_a_pipeline_of_two_stages_are_full(tmp_path, teacher):
    """vLLM compiles its stages; a step of either stage is under way while the other's next one waits."""
    corpus = make_corpus(tmp_path / "corpus", random_sequences(60, vocab_size=300))
    changes = {"pipeline_parallel": 2, "enforce_eager": None, "batch_tokens": 256}
    config = settings(teacher, corpus, tmp_path / "cache", engine="vllm", **changes)
    _, *tokens = watch(config, {}).tokens
    assert np.mean(tokens) > 0.85 * 256, tokens
    assert_exact(config.out, teacher, corpus)


@pytest.mark.parametrize("version", ["0.26.0", "0.31.0", "0.31.1rc2.dev7+g0a1b2c3", "0.32.0", "0.40.1", "dev"])
def test_older_vllm_gets_a_place_more_or_refuses(tmp_path, version):
    """Where the model computes alike with it: else its scheduler would never hand over the last token."""
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 48}
    llama_config(300, max_position_embeddings=192, rope_parameters=rope).save_pretrained(tmp_path)
    teacher = Teacher(model=read_model(tmp_path), vocab_size=300, dtype="float32", quantization="none")
    is_older = version.startswith(("0.26", "0.31"))
    assert _max_model_len(teacher, 100, version) == (101 if is_older else 100)
    for edge in (48, 192):
        if not is_older:
            assert _max_model_len(teacher, edge, version) == edge
            continue
        with pytest.raises(EngineError, match=rf"vLLM {version[:4]}.* of {edge}, .* --sequence-length {edge - 1} "):
            _max_model_len(teacher, edge, version)


def _capture_with_another_head(config: CacheConfig, change: str) -> None:
    """Capture with a pooler that is wrong in one way, the engine's core in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from stages.cache_logits.vllm_plugin.pooler import SparseTargetPooler

    right = SparseTargetPooler._local_logits

    def wrong(self: SparseTargetPooler, *arguments: Any, **options: Any) -> Any:
        logits_NV = right(self, *arguments, **options)
        return logits_NV * 1.001 if change == "scale" else logits_NV.roll(1, 1)

    SparseTargetPooler._local_logits = wrong
    cache_logits(config)


@pytest.mark.vllm
@pytest.mark.parametrize("change", ["scale", "shift"])
def test_head_that_the_pooler_does_not_know_is_refused_before_anything_is_scored(tmp_path, teacher, corpus, change):
    config = settings(teacher, corpus, tmp_path / "cache", engine="vllm")
    with (
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool,
        pytest.raises(EngineError, match=r"vLLM gives this model other logits than its head .*; take --engine transf"),
    ):
        pool.submit(_capture_with_another_head, config, change).result(timeout=400)
    assert list_commits(config.out) == set()
