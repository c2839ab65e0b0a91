"""The vLLM engine: drives vLLM's own loop with a bounded number of requests in flight."""

import dataclasses
import functools
import importlib.metadata
import os
import tempfile
import threading
import warnings
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cpu import slow_products
from pipeline.errors import EngineError
from pipeline.processes import owner_name
from pipeline.sketch import FittedSketch
from pipeline.targets import SparseTargets
from stages.cache_logits.comparison import disagreement
from stages.cache_logits.engine import Request, reduction_of, unpack
from stages.cache_logits.settings import TeacherConfig
from stages.cache_logits.teacher import LLAMA4_TUNED, Teacher, is_llama4, original_context
from stages.cache_logits.vllm_plugin import (
    FAILURES,
    FRONT_END,
    HEAD,
    HIDDEN,
    OPTIONS,
    PROBE,
    UNIT,
    WATCH_INTERVAL_S,
    as_text_model,
    register,
    serving,
)
from stages.cache_logits.vllm_plugin.compat import (
    installed,
    keeps_slot_for_a_token,
    require_known_vllm,
    version_of,
)

PLUGIN = "pipeline_teacher"
WAITING = 2
"""Requests are handed over until so many times as many tokens wait or run as fit into the steps that run at a time."""
QUIET = "ERROR"
"""vLLM's logging level unless the user has set one."""
HEAD_ROWS = 64
"""Rows of the head that are asked for at a time: 26 MB at a vocabulary of 102,400."""
PROBE_TOKENS = 8
"""Tokens on which the pooler's targets are compared with vLLM's own logits at start."""
MAX_REQUESTS = 1024
"""Requests in a step at most. vLLM's own limit, 256 on most machines, would leave steps of short documents unfilled."""


class VllmEngine:
    """A teacher in vLLM. Construction loads the model and takes 10 s to minutes."""

    def __init__(
        self, teacher: Teacher, config: TeacherConfig, longest_request: int, sketch: FittedSketch | None = None
    ) -> None:
        _prepare_environment(config)
        self._vocab_size, self._longest = teacher.vocab_size, longest_request
        self._reduction = reduction_of(config)
        self._closed = threading.Event()
        with warnings.catch_warnings(), _one_line_failures(teacher):
            warnings.simplefilter("ignore")  # vLLM's imports use what torch has deprecated
            with _marked(), serving(teacher.model.text_architecture) as twin, _as_file(sketch) as path:
                self._llm = _load(teacher, config, longest_request, twin, path)
            concurrent_batches = self._llm.llm_engine.vllm_config.max_concurrent_batches
            self._budget_tokens = _tokens_in_flight(config.batch_tokens, concurrent_batches)
            threading.Thread(target=self._watch_core, name="engine-watch", daemon=True).start()
            try:
                self._check_head(teacher, min(PROBE_TOKENS, longest_request))
            except BaseException:
                self.close()
                raise

    def score(self, requests: Iterable[Request]) -> Iterator[tuple[Hashable, SparseTargets]]:
        """Targets in the order in which vLLM finishes."""
        for request, rows_NW in self._run(requests):
            yield request.key, self._targets(request, rows_NW)

    def _run(self, requests: Iterable[Request], **extra: bytes) -> Iterator[tuple[Request, np.ndarray]]:
        """What the pooler returns of each request, which is asked for with `extra` beside its rows."""
        from vllm import PoolingParams

        from stages.cache_logits.vllm_plugin.pooler import pack_rows

        engine = self._llm.llm_engine
        waiting: dict[str, Request] = {}
        source, exhausted, tokens, serial = iter(requests), False, 0, 0
        while waiting or not exhausted:
            while not exhausted and (tokens < self._budget_tokens or not waiting):
                request = next(source, None)
                if request is None:
                    exhausted = True
                    break
                params = PoolingParams(task="token_classify", extra_kwargs=pack_rows(request) | extra)
                (prompt,) = engine.renderer.render_cmpl([{"prompt_token_ids": request.token_ids.tolist()}])
                engine.add_request(str(serial), prompt, params)
                waiting[str(serial)] = request
                tokens += len(request.token_ids)
                serial += 1
            for output in engine.step() if waiting else ():
                if output.finished:
                    request = waiting.pop(output.request_id)
                    tokens -= len(request.token_ids)
                    yield request, output.outputs.data.numpy()

    def hidden_states(self, requests: Iterable[Request]) -> Iterator[tuple[Hashable, np.ndarray]]:
        """float32 [N, H] of every request."""
        for request, rows_NW in self._run(requests, **{HIDDEN: b""}):
            yield request.key, self._beside_targets(rows_NW)

    def head(self) -> tuple[np.ndarray, np.ndarray]:
        """float32 [V, H] and [V], from the logits that the engine gives to unit vectors, whatever it calls its head."""
        rows = min(HEAD_ROWS, self._longest - 1)
        request = Request("head", np.zeros(rows + 1, np.int32), np.arange(rows, dtype=np.int32), np.zeros(rows, "f4"))
        width = self._llm.llm_engine.vllm_config.model_config.get_hidden_size()
        parts = []
        for first in range(0, width + 1, rows):
            ((_, rows_NW),) = self._run([request], **{HEAD: str(first).encode()})
            parts.append(self._beside_targets(rows_NW))
        logits_UV = np.concatenate(parts)[: width + 1]
        return np.ascontiguousarray((logits_UV[1:] - logits_UV[0]).T) / np.float32(UNIT), logits_UV[0]

    def _beside_targets(self, rows_NW: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(rows_NW[:, self._reduction.width :]).view(np.float32)

    def close(self) -> None:
        """Stop the engine core and its workers, by SIGKILL: they have nothing to save, and get no SIGTERM."""
        self._closed.set()
        self._llm.llm_engine.engine_core.shutdown(timeout=0)

    def _watch_core(self) -> None:
        """Let `step` raise once the core was killed, by the kernel for its memory say: vLLM would wait for ever."""
        core = self._llm.llm_engine.engine_core
        if not hasattr(core, "outputs_queue"):  # runs in this process
            return
        while not self._closed.wait(WATCH_INTERVAL_S):
            if core.resources.engine_dead:
                core.outputs_queue.put(RuntimeError("the engine process has died"))  # raised as EngineDeadError
                return

    def _targets(self, request: Request, rows_NW: np.ndarray) -> SparseTargets:
        expected = (len(request.positions), self._reduction.width)
        if rows_NW.shape != expected:
            raise RuntimeError(f"request {request.key}: vLLM returned {rows_NW.shape} values of {expected}")
        return unpack(rows_NW, self._reduction)

    def _check_head(self, teacher: Teacher, num_tokens: int) -> None:
        """Refuse a head that the pooler reduces to other targets than those of the logits that vLLM itself computes."""
        head_dtype = self._llm.llm_engine.vllm_config.model_config.head_dtype
        if str(head_dtype) != "torch.float32":
            raise EngineError(f"{teacher.folder}: vLLM runs its head in {head_dtype}; targets need a float32 head.")
        ids = np.arange(num_tokens, dtype=np.int32) % teacher.vocab_size
        positions = np.arange(num_tokens - 1, dtype=np.int32)
        probe = Request("the first probe", ids, positions, np.zeros(len(positions), np.float32))
        ((_, rows_NW),) = self._run([probe], **{PROBE: b""})
        targets_NW, logits_NV = np.split(rows_NW, [self._reduction.width], axis=1)
        problem = f"{logits_NV.shape[1]} ids for {teacher.vocab_size}"
        if logits_NV.shape[1] == teacher.vocab_size:
            logits_NV = np.ascontiguousarray(logits_NV).view(np.float32)
            problem = disagreement(self._targets(probe, targets_NW), logits_NV, probe.labels)
        if problem:
            raise EngineError(
                f"{teacher.folder}: vLLM gives this model other logits than its head alone ({problem}), so that its "
                "targets would be wrong; take --engine transformers."
            )


@contextmanager
def _one_line_failures(teacher: Teacher) -> Iterator[None]:
    """Whatever keeps vLLM from starting is an EngineError with the reason, not the tracebacks of its processes.

    These are shown with VLLM_LOGGING_LEVEL set to anything but its default here.
    """
    if os.environ["VLLM_LOGGING_LEVEL"] != QUIET:
        yield
        return
    with tempfile.NamedTemporaryFile(prefix="pipeline-engine-") as file:
        os.environ[FAILURES] = file.name
        try:
            yield
        except EngineError:
            raise
        except Exception as exc:
            reasons = Path(file.name).read_text(encoding="utf-8").splitlines()
            reason = reasons[0] if reasons else " ".join(str(exc).split()) or type(exc).__name__
            raise EngineError(
                f"{teacher.folder}: vLLM cannot serve this teacher: {reason[:400]} "
                "(VLLM_LOGGING_LEVEL=INFO shows more)."
            ) from exc
        finally:
            del os.environ[FAILURES]


@contextmanager
def _marked() -> Iterator[None]:
    """Processes that are started in here are our engine's, and see who drives them; so is this one prepared."""
    os.environ[FRONT_END] = owner_name()
    try:
        register()
        yield
    finally:
        del os.environ[FRONT_END]


@contextmanager
def _as_file(sketch: FittedSketch | None) -> Iterator[str | None]:
    """A file from which the engine's processes on this machine read the sketch when they start."""
    if sketch is None:
        yield None
        return
    with tempfile.NamedTemporaryFile(prefix="pipeline-sketch-") as file:
        file.write(sketch.to_bytes())
        file.flush()
        yield file.name


def _load(
    teacher: Teacher,
    config: TeacherConfig,
    longest_request: int,
    model_classes: dict[str, str],
    sketch: str | None,
) -> Any:
    from vllm import LLM

    model, architecture, version = teacher.model, teacher.model.text_architecture, version_of(installed())
    options = {
        "reduction": dataclasses.asdict(reduction_of(config)),
        "row_chunk": config.rows_at_once(teacher.vocab_size),
        "vocab_size": teacher.vocab_size,
        "sketch": sketch,
        "files": teacher.weight_pattern,
        "left_out": teacher.left_out,
        "is_part": model.text is not model.config,
    }
    return LLM(
        model=str(teacher.folder),
        skip_tokenizer_init=True,
        trust_remote_code=model.trust_remote_code,
        runner="pooling",
        hf_overrides=functools.partial(as_text_model, architecture=architecture, ties_head=model.ties_head),
        model_class_overrides=model_classes,
        pooler_config={"task": "token_classify"},
        additional_config={OPTIONS: options},
        dtype=teacher.dtype,
        quantization=config.quantization,
        tensor_parallel_size=config.tensor_parallel,
        pipeline_parallel_size=config.pipeline_parallel,
        max_model_len=_max_model_len(teacher, longest_request, version),
        max_num_batched_tokens=max(config.batch_tokens, longest_request),
        max_num_seqs=min(MAX_REQUESTS, max(config.batch_tokens, longest_request)),
        gpu_memory_utilization=config.gpu_memory_utilization,
        async_scheduling=_schedules_ahead(config, version),
        enforce_eager=_skips_compilation(config),
        compilation_config={"cudagraph_mode": "NONE"},  # steps of prompts are larger than any graph that it captures
        enable_prefix_caching=False,
        disable_log_stats=True,
    )


def _tokens_in_flight(batch_tokens: int, concurrent_batches: int) -> int:
    """Tokens that wait or run, so that a full step is there whenever one ends: a pipeline runs one a stage."""
    return WAITING * concurrent_batches * batch_tokens


def _schedules_ahead(config: TeacherConfig, version: str) -> bool | None:
    """Whether vLLM prepares a step while another runs, which its default leaves out for the sake of latency.

    None leaves it to vLLM: a pipeline has steps in flight already; and a version that keeps a place for a token behind
    each prompt would run one for it, whose output the pooler knows nothing of. On a CPU vLLM takes it back.
    """
    return True if config.pipeline_parallel == 1 and not keeps_slot_for_a_token(version) else None


def _max_model_len(teacher: Teacher, longest_request: int, version: str) -> int:
    """What vLLM is told; raises EngineError for sequences whose last token an older one would never give.

    Such a version needs a further place, which must not put a model beyond a length at which it computes otherwise:
    the end of its context, of its original context (Phi-3's factors), or Llama 4's 32,768.
    """
    if not keeps_slot_for_a_token(version):
        return longest_request
    model = teacher.model
    edges = {model.context_length, original_context(model), LLAMA4_TUNED if is_llama4(model) else None}
    if longest_request in edges:
        raise EngineError(
            f"{teacher.folder}: vLLM {version} keeps a place for a token behind sequences of {longest_request}, for "
            f"which this model has no room; take vLLM 0.32 or later, or prepare again with --sequence-length "
            f"{longest_request - 1} or less."
        )
    return longest_request + 1


def _skips_compilation(config: TeacherConfig) -> bool:
    """What the settings say, else what pays: a CPU's compilation takes minutes and a C++ compiler.

    Stages of a pipeline are compiled in any case: without, vLLM fails on a CPU.
    """
    from vllm.platforms import current_platform

    if config.enforce_eager is not None:
        return config.enforce_eager
    return current_platform.is_cpu() and config.pipeline_parallel == 1


def _prepare_environment(config: TeacherConfig) -> None:
    """Defaults for what vLLM reads from the environment; what the user has set stays."""
    names = {entry.name for entry in importlib.metadata.entry_points(group="vllm.general_plugins")}
    if PLUGIN not in names:
        raise EngineError(
            f"vLLM cannot see the plugin {PLUGIN!r}: this package is not installed; "
            "run `pip install --no-deps -e .` in its folder."
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        raise EngineError(f"VLLM_PLUGINS is {allowed!r} and hides {PLUGIN!r}; add it or unset the variable.")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", QUIET)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of the processes that vLLM starts
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", _cores_of_workers(config))


def _cores_of_workers(config: TeacherConfig) -> str:
    """Which cores each worker gets, in vLLM's notation; read on a CPU only.

    Left to itself vLLM takes a NUMA node a worker: it binds a single one to the cores of one node, in
    a container to one core, and refuses to start several on fewer nodes.
    """
    workers = config.tensor_parallel * config.pipeline_parallel
    nodes = len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))
    if 1 < workers <= nodes:
        return "auto"
    cores = sorted(os.sched_getaffinity(0)) if workers > 1 else []
    share = len(cores) // workers
    shares = [cores[start : start + share] for start in range(0, share * workers, share)] if share else []
    return "|".join(",".join(map(str, part)) for part in shares) or "nobind"


def notes(teacher: Teacher) -> list[str]:
    """What a user should know of the time that this machine will take."""
    import torch

    if torch.cuda.is_available():
        return []
    return slow_products(teacher.dtype, "--dtype float32 is faster, and so is --engine transformers")


def require_vllm(teacher: Teacher) -> None:
    """Raise EngineError unless vLLM is there and serves the teacher's architecture."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from vllm import ModelRegistry
    except ImportError as exc:
        raise EngineError(f"vLLM is not installed ({exc}); see the README, or take --engine transformers.") from exc
    require_known_vllm()
    architecture = teacher.model.text_architecture
    if architecture not in ModelRegistry.get_supported_archs():
        part = "" if architecture == teacher.architecture else f" ({architecture or 'as text alone'})"
        raise EngineError(
            f"{teacher.folder}: vLLM does not serve the architecture {teacher.architecture}{part}; "
            "take --engine transformers."
        )
