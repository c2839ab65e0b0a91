"""Every name of vLLM that this project leans on, and whether a version of vLLM has it as it is known here.

    python -m stages.cache_logits.vllm_plugin.compat FOLDER    # `vllm` of an unpacked wheel; else the installed one

Reads vLLM's source and imports nothing of it: a build for a GPU can be judged on any machine.
"""

import ast
import functools
import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import EngineError

TRIED = ("0.27.1", "0.29.0", "0.31.0", "0.32.0")
"""Versions with which a real engine has been run (docs/vllm.md); of others the names below are compared."""
SLOTS_FIXED_IN = (0, 32)
"""Before, the scheduler keeps a place for a sampled token in pooling too, where nothing is sampled."""


@dataclass(frozen=True)
class Hook:
    """A name of vLLM's that we use, and how."""

    module: str
    name: str
    """Of a class, function or variable; inside a class after a dot."""
    takes: tuple[str, ...] = ()
    """Parameters by which we call it; of a class without a constructor of its own, fields."""
    may_take: tuple[str, ...] | None = None
    """Where our code stands in for it or is called like it: what else it may have. Others would be lost."""
    mentions: str = ""
    """What its source has to speak of."""
    only_speed: bool = False
    """Without it everything is right and slower."""


ENGINE_ARGUMENTS = (
    *("model", "skip_tokenizer_init", "trust_remote_code", "runner", "hf_overrides", "pooler_config"),
    *("model_class_overrides", "additional_config", "dtype", "quantization", "tensor_parallel_size"),
    *("pipeline_parallel_size", "max_model_len", "max_num_batched_tokens", "max_num_seqs", "gpu_memory_utilization"),
    *("async_scheduling", "enforce_eager", "compilation_config", "enable_prefix_caching", "disable_log_stats"),
)
ENVIRONMENT = (
    *("VLLM_PLUGINS", "VLLM_LOGGING_LEVEL", "VLLM_NO_USAGE_STATS", "VLLM_CPU_KVCACHE_SPACE"),
    "VLLM_CPU_OMP_THREADS_BIND",
)
_LAYERS = "vllm.model_executor.layers"
_MODELS = "vllm.model_executor.models"
_SHARED_MEMORY = "vllm.distributed.device_communicators.shm_broadcast"
_CORE = "vllm.v1.engine.core_client"
_POOL = "vllm.v1.pool.metadata"
HOOKS = (
    # What the engine drives.
    *(Hook("vllm", name) for name in ("LLM", "ModelRegistry", "PoolingParams")),
    Hook("vllm.entrypoints.llm", "LLM.llm_engine"),
    Hook("vllm.engine.arg_utils", "EngineArgs", takes=ENGINE_ARGUMENTS),
    *(Hook("vllm.envs", name) for name in ENVIRONMENT),
    Hook("vllm.pooling_params", "PoolingParams", takes=("task", "extra_kwargs")),
    *(Hook("vllm.v1.engine.llm_engine", f"LLMEngine.{name}") for name in ("vllm_config", "renderer", "engine_core")),
    Hook("vllm.v1.engine.llm_engine", "LLMEngine.add_request", takes=("request_id", "prompt", "params")),
    Hook("vllm.v1.engine.llm_engine", "LLMEngine.step", takes=()),
    Hook("vllm.renderers.base", "BaseRenderer.render_cmpl", takes=("prompts",)),
    *(Hook("vllm.outputs", f"RequestOutput.{name}") for name in ("request_id", "finished")),
    *(Hook("vllm.outputs", f"PoolingRequestOutput.{name}") for name in ("request_id", "finished", "outputs")),
    Hook("vllm.outputs", "PoolingOutput.data"),
    *(Hook("vllm.config.vllm", f"VllmConfig.{name}") for name in ("model_config", "additional_config")),
    Hook("vllm.config.vllm", "VllmConfig.max_concurrent_batches"),
    Hook("vllm.config.compilation", "CompilationConfig.cudagraph_mode"),
    Hook("vllm.config.compilation", "CUDAGraphMode.NONE"),
    Hook("vllm.v1.core.sched.async_scheduler", "AsyncScheduler", mentions="num_sampled_tokens_per_step"),
    *(Hook("vllm.config.model", f"ModelConfig.{name}") for name in ("head_dtype", "quantization")),
    Hook("vllm.transformers_utils.config", "get_config", takes=("model", "trust_remote_code")),
    # How it learns that the engine's process has died, and ends it.
    Hook(_CORE, "SyncMPClient.outputs_queue"),
    Hook(_CORE, "MPClient.resources"),
    Hook(_CORE, "BackgroundResources.engine_dead"),
    Hook(_CORE, "MPClient.shutdown", takes=("timeout",)),
    Hook(_CORE, "InprocClient.shutdown", takes=("timeout",)),
    # Which class vLLM loads in place of which.
    Hook("vllm.config.model", "ModelConfig.registry", mentions="model_class_overrides"),
    Hook("vllm.plugins", "load_general_plugins", takes=()),
    *(Hook(f"{_MODELS}.registry", f"_ModelRegistry.{name}") for name in ("models", "get_supported_archs")),
    *(Hook(f"{_MODELS}.registry", f"_LazyRegisteredModel.{name}") for name in ("module_name", "class_name")),
    Hook(f"{_MODELS}.registry", "_RegisteredModel.model_cls"),
    Hook(f"{_MODELS}.interfaces_base", "default_pooling_type", takes=("tok_pooling_type",)),
    Hook(f"{_MODELS}.interfaces_base", "VllmModelForPooling.is_pooling_model"),
    Hook(f"{_LAYERS}.activation", "get_act_fn", takes=("act_fn_name",)),
    Hook("vllm.model_executor.model_loader.default_loader", "DefaultModelLoader", mentions="allow_patterns_overrides"),
    # What the pooler is, is given and calls.
    Hook(f"{_LAYERS}.pooler.abstract", "Pooler"),
    Hook(f"{_LAYERS}.pooler.abstract", "Pooler.get_supported_tasks", takes=("self",), may_take=()),
    Hook(
        *(f"{_LAYERS}.pooler.abstract", "Pooler.forward"),
        takes=("self", "hidden_states", "pooling_metadata"),
        may_take=(),
    ),
    *(Hook(_POOL, f"PoolingMetadata.{name}") for name in ("get_pooling_cursor", "pooling_params", "pooling_states")),
    *(Hook(_POOL, f"PoolingCursor.{name}") for name in ("num_scheduled_tokens_cpu", "seq_lens_cpu", "prompt_lens_cpu")),
    *(Hook(_POOL, f"PoolingStates.{name}") for name in ("hidden_states_cache", "clean")),
    Hook(
        *(f"{_LAYERS}.logits_processor", "LogitsProcessor._get_logits"),
        takes=("self", "hidden_states", "lm_head", "embedding_bias"),
        may_take=("skip_gather",),
    ),
    Hook(
        *(f"{_LAYERS}.logits_processor", "LogitsProcessor._apply_head"),
        takes=("self", "lm_head", "hidden_states", "embedding_bias"),
        may_take=(),
    ),
    Hook(f"{_LAYERS}.logits_processor", "LogitsProcessor.forward", mentions="self._get_logits("),
    Hook(f"{_LAYERS}.vocab_parallel_embedding", "VocabParallelEmbedding.shard_indices"),
    *(
        Hook(f"{_LAYERS}.vocab_parallel_embedding", f"VocabParallelEmbeddingShardIndices.{name}")
        for name in ("org_vocab_start_index", "num_org_elements")
    ),
    Hook("vllm.distributed.communication_op", "tensor_model_parallel_all_gather", takes=("input_",)),
    *(
        Hook("vllm.distributed.parallel_state", f"get_tensor_model_parallel_{name}", takes=())
        for name in ("rank", "world_size")
    ),
    # How long its processes spin while they wait for each other, on a CPU.
    Hook("vllm.platforms", "current_platform"),
    Hook("vllm.platforms.interface", "Platform.is_cpu"),
    Hook(_SHARED_MEMORY, "SpinCondition.__init__", takes=("busy_loop_s",), only_speed=True),
    Hook(_SHARED_MEMORY, "SHM_READER_RECHECK_INTERVAL_MS", only_speed=True),
)


def require_known_vllm(folder: Path | None = None) -> None:
    """Raise EngineError unless vLLM, the installed one or that of a package's folder, has what we rely on."""
    folder = folder or installed()
    for hook, problem in problems(folder).items():
        if not hook.only_speed:
            raise EngineError(f"vLLM {version_of(folder)}: {problem}; known to work: {', '.join(TRIED)}.")


def problems(folder: Path) -> dict[Hook, str]:
    """A line for each hook that is not as we know it, of the vLLM in `folder`."""
    source = functools.cache(functools.partial(_source, folder))
    differences = {hook: _difference(hook, source(hook.module)) for hook in HOOKS}
    return {
        hook: f"`{hook.module}.{hook.name}` is not what this version of the pipeline relies on ({difference})"
        for hook, difference in differences.items()
        if difference
    }


def version_of(folder: Path) -> str:
    """As the package says; it is "dev" of a checkout that has never been built."""
    path = folder / "_version.py"
    found = re.search(r"^__version__\b.*= *'([^']+)'", path.read_text(), re.MULTILINE) if path.is_file() else None
    return found[1] if found else "dev"


def keeps_slot_for_a_token(version: str) -> bool:
    """Whether a request of `max_model_len` tokens that is cut into steps never gets its last one."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    return bool(numbers) and numbers < SLOTS_FIXED_IN


def installed() -> Path:
    """The folder of the vLLM that `import vllm` would take."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise EngineError("vLLM is not installed.")
    return Path(spec.submodule_search_locations[0])


def _source(folder: Path, module: str) -> ast.Module | None:
    path = folder.joinpath(*module.split(".")[1:])
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else None


def _difference(hook: Hook, source: ast.Module | None) -> str:
    """What is not as we know it; empty if nothing."""
    if source is None:
        return "there is no such module"
    node: ast.AST = source
    for part in hook.name.split("."):
        members = _members(node)
        if part not in members:
            return "there is no such name"
        node = members[part]
    takes = _parameters(node)
    missing = [name for name in hook.takes if name not in takes]
    if missing:
        return f"it takes no {', '.join(missing)}"
    new = set(takes) - set(hook.takes) - set(hook.may_take or ()) if hook.may_take is not None else ()
    if new:
        return f"it takes {', '.join(sorted(new))} too"
    silent = hook.mentions and hook.mentions not in ast.unparse(node)
    return f"it does not speak of {hook.mentions}" if silent else ""


def _members(node: ast.AST | None) -> dict[str, ast.AST]:
    """What a module or class defines, imports or assigns, by name; of a class also what its methods set on `self`."""
    found: dict[str, ast.AST] = {}
    for statement in _statements(getattr(node, "body", ())):
        found |= dict.fromkeys(_names(statement), statement)
        if isinstance(node, ast.ClassDef) and isinstance(statement, ast.FunctionDef):
            found = dict.fromkeys(_set_on_self(statement), statement) | found
    return found


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try | ast.With):
            for part in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(statement, part, ()))


def _names(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
    elif isinstance(statement, ast.Import | ast.ImportFrom):
        yield from (alias.asname or alias.name for alias in statement.names)
    elif isinstance(statement, ast.Assign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        yield from (target.id for target in targets if isinstance(target, ast.Name))


def _set_on_self(method: ast.FunctionDef) -> Iterator[str]:
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def _parameters(node: ast.AST) -> list[str]:
    """Of a function, or of a class: its constructor's, or its fields."""
    if isinstance(node, ast.ClassDef):
        members = _members(node)
        return _parameters(members["__init__"]) if "__init__" in members else list(members)
    if not isinstance(node, ast.FunctionDef):
        return []
    arguments = node.args
    return [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]


def main() -> None:
    """Print what is not as we know it; exit code 1 if it matters to what comes out."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else installed()
    found = problems(folder)
    for hook, problem in found.items():
        print(problem + (": costs time, no more" if hook.only_speed else ""))
    print(f"vLLM {version_of(folder)}: {len(HOOKS) - len(found)} of {len(HOOKS)} names are as known.")
    sys.exit(not all(hook.only_speed for hook in found))


if __name__ == "__main__":
    main()
