"""What we rely on in vLLM is listed, looked for before anything is loaded, and left alone for everybody else."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import EngineError
from stages.cache_logits.vllm_plugin import FRONT_END, RECHECK_INTERVAL_MS
from stages.cache_logits.vllm_plugin.compat import ENGINE_ARGUMENTS, HOOKS, installed, problems, require_known_vllm
from tests.support.small import make_teacher

STAGE = Path(__file__).parent.parent / "stages" / "cache_logits"
FOREIGN = """
import json, logging, threading
from vllm import ModelRegistry
from vllm.distributed.device_communicators import shm_broadcast
from vllm.plugins import load_plugins_by_group

def state():
    condition = shm_broadcast.SpinCondition.__init__.__defaults__
    filters = [str(keeper) for handler in logging.getLogger("vllm").handlers for keeper in handler.filters]
    threads = sorted(thread.name for thread in threading.enumerate())
    models = {name: str(model) for name, model in ModelRegistry.models.items()}
    return condition, shm_broadcast.SHM_READER_RECHECK_INTERVAL_MS, filters, threads, models

before = state()
load_plugins_by_group("vllm.general_plugins")["pipeline_teacher"]()
after = state()
print(json.dumps([before == after, *after[:2]]))
"""
GRAPHS = """
import json, sys
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms.cpu import CpuPlatform

CpuPlatform.support_static_graph_mode = staticmethod(lambda: True)  # as a GPU's does; what a CPU changes is left out
CpuPlatform.check_and_update_config = staticmethod(lambda config: setattr(config.cache_config, "block_size", 16))

def compilation(asked):
    shared = {"model": sys.argv[1], "skip_tokenizer_init": True, "runner": "pooling", "max_model_len": 64}
    config = EngineArgs(compilation_config=asked, **shared).create_engine_config().compilation_config
    names = "mode backend splitting_ops compile_sizes compile_ranges_endpoints custom_ops pass_config".split()
    compiled = {name: str(getattr(config, name)) for name in names}
    return config.cudagraph_mode.name, config.cudagraph_capture_sizes, compiled

print(json.dumps([compilation({}), compilation({"cudagraph_mode": "NONE"})]))
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The modules of the installed vLLM that are listed, in a folder of their own."""
    folder = tmp_path_factory.mktemp("wheel") / "vllm"
    for path in {source_of(hook.module, installed()) for hook in HOOKS} | {installed() / "_version.py"}:
        target = folder / path.relative_to(installed())
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return folder


def source_of(module: str, folder: Path) -> Path:
    path = folder.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@pytest.mark.vllm
def test_installed_vllm_has_every_name():
    assert problems(installed()) == {}


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (
            *("model_executor/layers/logits_processor.py", "def _get_logits(", "def _make_logits("),
            r"`.*\.logits_processor\.LogitsProcessor\._get_logits` is not .* \(there is no such name\)",
        ),
        (
            *("model_executor/layers/logits_processor.py", "skip_gather: bool = False", "cap: bool = False"),
            r"LogitsProcessor\._get_logits` .* \(it takes cap too\)",
        ),
        (
            *("model_executor/layers/logits_processor.py", "self._get_logits(", "self._head_logits("),
            r"LogitsProcessor\.forward` .* \(it does not speak of self\._get_logits\(\)",
        ),
        ("v1/pool/metadata.py", "self.hidden_states_cache", "self.chunks", r"PoolingStates\.hidden_states_cache`"),
        ("v1/engine/core_client.py", "engine_dead", "is_dead", r"`vllm\.v1\.engine\.core_client\.Backgr"),
        ("engine/arg_utils.py", "model_class_overrides:", "classes:", r"EngineArgs` .*takes no model_class_overrides"),
        ("pooling_params.py", None, None, r"`vllm\.pooling_params\.PoolingParams` .* \(there is no such module\)"),
    ],
)
def test_vllm_with_another_name_is_refused_with_the_name(copy, file, old, new, message):
    path = copy / file
    before = path.read_text()
    try:
        path.unlink() if old is None else path.write_text(before.replace(old, new))
        with pytest.raises(EngineError, match=rf"^vLLM [\d.]+: .*{message}.*; known to work: 0\.27.*, 0\.32\.0\.$"):
            require_known_vllm(copy)
    finally:
        path.write_text(before)


@pytest.mark.vllm
def test_a_wheel_is_judged_without_importing_it(copy):
    """By the command, in a folder that could not be imported."""
    command = [sys.executable, "-m", "stages.cache_logits.vllm_plugin.compat", str(copy)]
    judged = subprocess.run(command, capture_output=True, text=True, cwd=STAGE.parent.parent)
    assert (judged.returncode, judged.stderr) == (0, "")
    assert judged.stdout.endswith(f"{len(HOOKS)} of {len(HOOKS)} names are as known.\n")
    shutil.rmtree(copy / "v1")
    judged = subprocess.run(command, capture_output=True, text=True, cwd=STAGE.parent.parent)
    assert judged.returncode == 1
    assert "`vllm.v1.pool.metadata.PoolingStates.clean`" in judged.stdout


def test_every_import_from_vllm_is_listed():
    listed = {(hook.module, hook.name.partition(".")[0]) for hook in HOOKS}
    listed |= {tuple(hook.module.rsplit(".", 1)) for hook in HOOKS if "." in hook.module}
    used = {
        (node.module, alias.name)
        for path in STAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm"
        for alias in node.names
    }
    assert used
    assert used <= listed


def test_every_argument_of_the_engine_is_listed():
    tree = ast.parse((STAGE / "vllm_engine.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "LLM"]
    assert [{keyword.arg for keyword in call.keywords} for call in calls] == [set(ENGINE_ARGUMENTS)]


@pytest.mark.vllm
@pytest.mark.parametrize("is_ours", [False, True])
def test_another_vllm_of_the_environment_keeps_its_own_ways(is_ours):
    """Its models, how its processes wait, its threads, its log; only what our engine starts is changed."""
    environment = {name: value for name, value in os.environ.items() if name != FRONT_END}
    environment |= {FRONT_END: "host.0.1"} if is_ours else {}
    command = [sys.executable, "-W", "ignore", "-c", FOREIGN]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=STAGE.parent.parent)
    assert said.returncode == 0, said.stderr
    unchanged, defaults, interval_ms = json.loads(said.stdout.splitlines()[-1])
    assert (unchanged, defaults) == (not is_ours, [0 if is_ours else 1])
    assert (interval_ms == RECHECK_INTERVAL_MS) == is_ours


@pytest.mark.vllm
@pytest.mark.slow
def test_no_graphs_are_captured_and_what_is_compiled_stays_as_it_is(tmp_path):
    """On a platform that has graphs."""
    command = [sys.executable, "-W", "ignore", "-c", GRAPHS, make_teacher(tmp_path / "teacher")]
    said = subprocess.run(command, capture_output=True, text=True, cwd=STAGE.parent.parent)
    assert said.returncode == 0, said.stderr
    (default, sizes, before), (asked, none, after) = json.loads(said.stdout.splitlines()[-1])
    assert (default, asked, none) == ("PIECEWISE", "NONE", [])
    assert len(sizes) > 8
    assert before == after
    assert before["mode"] == "3", "vLLM compiles"
