"""Whether vLLM's compilation pays on a CPU: seconds until the first token and seconds a token, with and without.

    python benchmarks/compilation.py --teacher FOLDER --tokens 2048

Two engines of the same teacher, one of which compiles, in an empty cache of compiled code of its own; a third start
finds it filled. Then both score the same random sequences in turn, round after round, and the medians are compared.
CPU is user plus system time of the engine's processes: on a machine that does other work, believe it and not the
seconds that passed. The break-even is the tokens at which a whole capture takes as long either way.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil


def main() -> None:
    """Start, score in turn, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=2048, help="Of a round.")
    parser.add_argument("--length", type=int, default=512, help="Tokens of a sequence.")
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f}; {options}")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["VLLM_CACHE_ROOT"] = cache
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{cache}/inductor"
        starts, engines = {}, {}
        _start(options, eager=True)[0][0].close()  # reads vLLM and the weights from the disk
        for name, eager in (("eager", True), ("compiled", False)):
            engines[name], starts[name] = _start(options, eager)
        rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
        for number in range(options.rounds + 1):
            for name, (engine, processes) in engines.items():
                seconds = _score(engine, processes, options, seed=number)
                if number:  # the first warms up
                    rounds[name].append(seconds)
        for engine, _ in engines.values():
            engine.close()
        (engine, _), starts["compiled again"] = _start(options, eager=False)
        engine.close()
    _print(options, starts, rounds)


def _start(options: argparse.Namespace, eager: bool) -> tuple[tuple[Any, list[psutil.Process]], tuple[float, float]]:
    """An engine with its processes; seconds that passed and CPU seconds until it had scored one token."""
    from pipeline.models import read_model
    from stages.cache_logits.settings import TeacherConfig
    from stages.cache_logits.teacher import Teacher
    from stages.cache_logits.vllm_engine import VllmEngine

    model = read_model(options.teacher)
    teacher = Teacher(model=model, vocab_size=model.config.vocab_size, dtype="float32", quantization="none")
    config = TeacherConfig(
        teacher=options.teacher, dtype="float32", batch_tokens=options.batch_tokens, enforce_eager=eager
    )
    before, began = psutil.Process().children(recursive=True), time.perf_counter()
    engine = VllmEngine(teacher, config, options.length)
    seconds = time.perf_counter() - began
    processes = [process for process in psutil.Process().children(recursive=True) if process not in before]
    return (engine, processes), (seconds, _cpu(processes))


def _cpu(processes: list[psutil.Process]) -> float:
    """Seconds, with those of processes that these had started and that have ended: compilers."""
    return sum(sum(process.cpu_times()[:4]) for process in processes)


def _score(engine: Any, processes: list[psutil.Process], options: argparse.Namespace, seed: int) -> tuple[float, float]:
    """Seconds a token, that passed and of CPU."""
    from stages.cache_logits.engine import Request

    random = np.random.default_rng(seed)
    vocab_size = 256  # ids that any vocabulary has
    positions = np.arange(options.length - 1, dtype=np.int32)
    requests = [
        Request(
            number, random.integers(0, vocab_size, options.length).astype(np.int32), positions, np.zeros(len(positions))
        )
        for number in range(options.tokens // options.length)
    ]
    cpu, began = _cpu(processes), time.perf_counter()
    count = sum(1 for _ in engine.score(requests))
    assert count == len(requests)
    tokens = count * options.length
    return (time.perf_counter() - began) / tokens, (_cpu(processes) - cpu) / tokens


def _print(
    options: argparse.Namespace,
    starts: dict[str, tuple[float, float]],
    rounds: dict[str, list[tuple[float, float]]],
) -> None:
    print(f"{'':16}{'start, s':>10}{'CPU, s':>10}{'ms/token':>12}{'CPU ms/token':>14}")
    for name, (wall, cpu) in starts.items():
        columns = f"{name:16}{wall:>10.1f}{cpu:>10.1f}"
        if name in rounds:
            columns += "".join(f"{1e3 * value:>13.3f}" for value in map(statistics.median, zip(*rounds[name])))
        print(columns)
    for measure, label in enumerate(("passed", "CPU")):
        saved = [eager[measure] - compiled[measure] for eager, compiled in zip(rounds["eager"], rounds["compiled"])]
        saved_a_token = statistics.median(saved)
        for name in ("compiled", "compiled again"):
            lost = starts[name][measure] - starts["eager"][measure]
            even = f"{max(0, lost / saved_a_token):,.0f} tokens" if saved_a_token > 0 else "never"
            print(f"break-even by seconds {label}, {name}: {even} ({lost:.1f} s, {1e6 * saved_a_token:.0f} us a token)")


if __name__ == "__main__":
    main()
