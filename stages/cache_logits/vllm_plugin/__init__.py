"""vLLM plugin (entry point group `vllm.general_plugins`): teachers whose output is sparse targets.

vLLM calls `register` in the front end, the engine core and every worker.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.processes import owner_is_dead, owner_name

OPTIONS = "sparse_targets"
"""Key of the pooler's options in vLLM's `additional_config`."""
ROWS = "sparse_target_rows"
"""Key of a request's positions and labels in `PoolingParams.extra_kwargs`."""
PROBE = "sparse_target_probe"
"""Key there that has the pooler return vLLM's own logits beside each row."""
HIDDEN = "sparse_target_hidden"
"""Key there that has the pooler return the hidden state beside each row."""
HEAD = "sparse_target_head"
"""Key there that has it return, beside each row, the logits of no hidden state for 0 and of unit vector i - 1 for i,
where i counts a request's rows from the number that the key has, in text."""
UNIT = 2.0**-6
"""Length of these vectors: what a soft cap does to their logits is below rounding."""
FRONT_END = "PIPELINE_FRONT_END"
"""Environment variable with the `owner_name` of the process that drives the engine, while it starts one."""
FAILURES = "PIPELINE_ENGINE_FAILURES"
"""Environment variable with the file to which vLLM's processes write why they cannot start, while it is there."""
LANGUAGE_MODEL = {"language_model.": "", "model.language_model.": "model.", "lm_head.": "lm_head."}
"""How checkpoints of vision-language models begin the names of their language model's tensors, and what vLLM's own
language models have in that place."""
WATCH_INTERVAL_S = 1.0
RECHECK_INTERVAL_MS = 10
"""How often an idle process of vLLM looks for a message whose notification was lost, on a CPU."""


def register() -> None:
    """Prepare a process of our engine's; nothing is done to any other vLLM of the environment. Can be called twice."""
    if FRONT_END in os.environ:
        _die_with_front_end()
        _wait_without_spinning()
        _keep_reasons()


@contextmanager
def serving(architecture: str) -> Iterator[dict[str, str]]:
    """What vLLM's `model_class_overrides` takes for the capturing twin of the class that serves an architecture.

    The architecture keeps its name, by which vLLM has settings. vLLM leaves its registry changed, once for all engines
    of a process; here it is as before afterwards.
    """
    from vllm import ModelRegistry

    registered = ModelRegistry.models[architecture]
    if hasattr(registered, "model_cls"):
        module, name = registered.model_cls.__module__, registered.model_cls.__qualname__
    else:
        module, name = registered.module_name, registered.class_name
    twin = f"{__name__}.models:{module}.{name}"  # looked up late: no process imports CUDA because of this
    ModelRegistry.register_model(architecture, twin)
    try:
        yield {architecture: twin}
    finally:
        ModelRegistry.models[architecture] = registered


def as_text_model(config: Any, architecture: str, ties_head: bool) -> Any:
    """The config of the language model, a part of `config` or all of it, that asks for `architecture`.

    Whether the head is tied to the embeddings may stand in the whole and in the part, and differ.
    """
    text = config.get_text_config()
    if text is not config:
        text.tie_word_embeddings = ties_head
        if getattr(config, "quantization_config", None) is not None:
            text.quantization_config = config.quantization_config
    text.architectures = [architecture]
    return text


def _wait_without_spinning() -> None:
    """On a CPU, let vLLM's processes sleep while they wait for each other.

    They read their shared memory in a loop for a second after every message: a core that the forward pass needs.
    A notification that follows another at once is dropped now and then; then the reader looks again after its
    recheck interval, which is 5 s in vLLM.
    """
    from vllm.distributed.device_communicators import shm_broadcast
    from vllm.platforms import current_platform

    condition = getattr(shm_broadcast, "SpinCondition", None)
    if current_platform.is_cpu() and condition is not None and condition.__init__.__defaults__ == (1,):
        condition.__init__.__defaults__ = (0,)  # of `busy_loop_s`, the only one that has a default
        shm_broadcast.SHM_READER_RECHECK_INTERVAL_MS = RECHECK_INTERVAL_MS


def _keep_reasons() -> None:
    """Have exceptions that vLLM logs while it starts written down, the last line of each, in place of the traceback."""
    path = os.environ.get(FAILURES)
    handlers = logging.getLogger("vllm").handlers
    kept = [keeper.name for handler in handlers for keeper in handler.filters if isinstance(keeper, _Reasons)]
    if path is None or path in kept:
        return
    for handler in handlers:
        handler.addFilter(_Reasons(path))


class _Reasons(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if not record.exc_info or not os.path.exists(self.name):
            return True
        with open(self.name, "a", encoding="utf-8") as file:
            lines = str(record.exc_info[1]).strip().splitlines() or [type(record.exc_info[1]).__name__]
            file.write(lines[-1].strip() + "\n")
        return False


def _die_with_front_end() -> None:
    """Let an engine process end itself when the front end is gone.

    vLLM's processes outlive a front end that was killed with SIGKILL and would keep the GPUs' memory.
    """
    front_end = os.environ.get(FRONT_END)
    watching = any(thread.name == FRONT_END for thread in threading.enumerate())
    if front_end is None or front_end == owner_name() or watching:
        return

    def watch() -> None:
        while not owner_is_dead(front_end):
            time.sleep(WATCH_INTERVAL_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name=FRONT_END, daemon=True).start()
