"""How long vLLM's worker waits between two steps, where each is prepared while another runs and where it is not.

    python benchmarks/steps_ahead.py --tensor-parallel 2

Two engines of a small random Llama score the same sequences in turn, round after round; the first of each warms
up. The smaller the model, the more of a step is waiting. vLLM's CPU build never prepares a step ahead: here it is made
to, which changes nothing else. On a GPU a worker's step ends when it is launched: look at the tokens a second there.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np


def main() -> None:
    """Start both, score in turn, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--length", type=int, default=64, help="Tokens of a sequence.")
    parser.add_argument("--sequences", type=int, default=512, help="Of a round.")
    parser.add_argument("--batch-tokens", type=int, default=256)
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # collective_rpc sends functions to the worker
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {vars(options)}")
    with tempfile.TemporaryDirectory() as name:
        folder = _make_teacher(Path(name), options)
        engines = {ahead: _start(folder, options, ahead) for ahead in (False, True)}
        rounds: dict[bool, list[tuple[float, ...]]] = {ahead: [] for ahead in engines}
        found: dict[bool, dict[int, Any]] = {}
        for number in range(options.rounds + 1):
            for ahead, engine in engines.items():
                measured, found[ahead] = _score(engine, options, seed=number)
                rounds[ahead] += [measured] if number else []
        for engine in engines.values():
            engine.close()
    print(f"{'':26}{'steps':>8}{'ms a step':>12}{'ms between':>12}{'tokens/s':>12}")
    for ahead, measured in rounds.items():
        steps, inside, between, speed = map(statistics.median, zip(*measured))
        name = "prepared ahead" if ahead else "one after another"
        print(f"{name:26}{steps:>8.0f}{1e3 * inside:>12.2f}{1e3 * between:>12.2f}{speed:>12,.0f}")
    _compare(found)


def _make_teacher(folder: Path, options: argparse.Namespace) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=2,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 64,
        max_position_embeddings=options.length,
        initializer_range=0.15,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _start(folder: Path, options: argparse.Namespace, ahead: bool) -> Any:
    from pipeline.models import read_model
    from stages.cache_logits import vllm_engine
    from stages.cache_logits.settings import TeacherConfig
    from stages.cache_logits.teacher import Teacher

    _make_a_cpu_obey()
    vllm_engine._schedules_ahead = lambda config, version: ahead
    teacher = Teacher(model=read_model(folder), vocab_size=options.vocab, dtype="float32", quantization="none")
    config = TeacherConfig(
        teacher=folder,
        top_k=16,
        batch_tokens=options.batch_tokens,
        tensor_parallel=options.tensor_parallel,
        enforce_eager=True,
    )
    engine = vllm_engine.VllmEngine(teacher, config, options.length)
    assert engine._llm.llm_engine.vllm_config.max_concurrent_batches == (2 if ahead else 1)
    engine._llm.collective_rpc(_note_steps)
    return engine


def _make_a_cpu_obey() -> None:
    from vllm.platforms import current_platform

    adapt = type(current_platform).check_and_update_config

    def keep(config: Any) -> None:
        asked = config.scheduler_config.async_scheduling
        adapt(config)
        config.scheduler_config.async_scheduling = asked

    type(current_platform).check_and_update_config = staticmethod(keep)


def _note_steps(worker: Any) -> None:
    """In the worker: when each step of its runner began and ended, from now on."""
    runner = worker.model_runner
    execute, runner.benchmark_steps = runner.execute_model, []

    def noted(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = execute(scheduled, *args, **kwargs)
        if scheduled.total_num_scheduled_tokens:
            runner.benchmark_steps.append((began, time.perf_counter()))
        return result

    runner.execute_model = noted


def _take_steps(worker: Any) -> list[tuple[float, float]]:
    steps, worker.model_runner.benchmark_steps[:] = list(worker.model_runner.benchmark_steps), []
    return steps


def _score(engine: Any, options: argparse.Namespace, seed: int) -> tuple[tuple[float, ...], dict[int, Any]]:
    """Steps, seconds in one and between two (medians), tokens a second; and the targets."""
    from stages.cache_logits.engine import Request

    random = np.random.default_rng(seed)
    positions = np.arange(options.length - 1, dtype=np.int32)
    uniforms = np.zeros(len(positions), np.float32)
    requests = [
        Request(number, random.integers(0, options.vocab, options.length).astype(np.int32), positions, uniforms)
        for number in range(options.sequences)
    ]
    engine._llm.collective_rpc(_take_steps)
    began = time.perf_counter()
    found = dict(engine.score(requests))
    seconds = time.perf_counter() - began
    begins, ends = np.array(engine._llm.collective_rpc(_take_steps)[0]).T
    inside, between = np.median(ends - begins), np.median(begins[1:] - ends[:-1])
    return (len(begins), inside, between, len(requests) * options.length / seconds), found


def _compare(found: dict[bool, dict[int, Any]]) -> None:
    pairs = [
        (ours, getattr(found[True][key], name))
        for key, targets in found[False].items()
        for name, ours in vars(targets).items()
        if isinstance(ours, np.ndarray)
    ]
    differ = sum(ours.tobytes() != theirs.tobytes() for ours, theirs in pairs)
    print(f"{differ} of {len(pairs)} arrays of the last round differ (steps that hold other sequences round otherwise)")


if __name__ == "__main__":
    main()
