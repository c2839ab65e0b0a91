"""What the capture costs: our reduction against the bare head and against vLLM's own prompt_logprobs.

    python benchmarks/capture.py --vocab 102400 --top-k 64
    python benchmarks/capture.py --shape 67b --dummy --quantization fp8 --no-stock --length 4095    # one H200

A random Llama, two vLLM engines with the same settings (ours in the pooling runner, the stock one in the
generate runner), each in a process of its own, and these cases, one after another in every round:

    bare      our engine, no position wanted: prefill alone
    head      the LM head at every position on top, its logits thrown away: the floor of any capture
    ours k    `VllmEngine.score` as `pipeline cache-logits` drives it, up to its `SparseTargets`
    stock k   `LLM.generate` with prompt_logprobs=k and flat_logprobs=True (T=1 only), up to its lists

Figures are medians over rounds; ratios are medians of the ratios within a round. CPU is user plus system
time of a process with all its threads. "Outside" is what remains of both processes' CPU when the forward
pass and the pooler (head and reduction) are taken out: scheduling, serialisation, unpacking, and the time
for which OpenMP's threads go on spinning. On a machine that does other work all CPU figures grow.
"""

import argparse
import functools
import importlib.metadata
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

TEMPERATURES = (1.0, 2.0)
SHAPES = {
    "67b": {"hidden": 8192, "ffn": 22_016, "layers": 95, "heads": 64, "kv_heads": 8, "dtype": "bfloat16"},
    "7b": {"hidden": 4096, "ffn": 11_008, "layers": 30, "heads": 32, "kv_heads": 32, "dtype": "bfloat16"},
    "wide": {"hidden": 4096, "ffn": 4096, "layers": 1, "heads": 32, "kv_heads": 32, "dtype": "float32"},
    "smollm2": {"hidden": 576, "ffn": 1536, "layers": 30, "heads": 9, "kv_heads": 3, "dtype": "float32"},
    "small": {"hidden": 1024, "ffn": 2816, "layers": 2, "heads": 16, "kv_heads": 16, "dtype": "float32"},
    "tiny": {"hidden": 256, "ffn": 768, "layers": 2, "heads": 4, "kv_heads": 4, "dtype": "float32"},
}
"""deepseek-llm-67b-base, deepseek-llm-7b-base, the head of the latter, SmolLM2-135M (V = 49,152), and smaller."""
COLUMNS = "{:<10}{:>9}{:>14}{:>11}{:>12}{:>12}{:>10}{:>13}{:>11}"
HEADINGS = ("case", "tokens/s", "front-end CPU", "engine CPU", "outside CPU")
RATIOS = ("speed/head", "CPU/head", "speed/stock", "CPU/stock")


@dataclass(frozen=True)
class Measurement:
    """A case in one round: seconds, over all its tokens."""

    wall: float
    front_end: float
    engine: float
    model: float
    """The part of `engine` inside the forward pass and the pooler; nan where it is not measured."""

    @property
    def cpu(self) -> float:
        """CPU of both processes."""
        return self.front_end + self.engine


@dataclass
class Case:
    """Something to measure, and its measurements so far."""

    name: str
    run: Callable[[], int]
    """Returns how many positions came back."""
    expected: int
    llm: Any
    processes: list[psutil.Process]
    prepare: Callable[[], None] = lambda: None
    hooked: bool = True

    def measure(self) -> Measurement:
        """Run once."""
        self.prepare()
        before = self._clocks()
        found = self.run()
        wall, front_end, engine, model = (b - a for a, b in zip(before, self._clocks()))
        assert found == self.expected, f"{self.name}: {found} positions of {self.expected}"
        return Measurement(wall, front_end, engine, model)

    def _clocks(self) -> tuple[float, float, float, float]:
        model = self.llm.collective_rpc(_model_seconds)[0] if self.hooked else float("nan")
        times = [process.cpu_times() for process in self.processes]
        return time.perf_counter(), time.process_time(), sum(t.user + t.system for t in times), model


def main() -> None:
    """Measure and print."""
    options = _options()
    # collective_rpc sends functions to the worker.
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = _make_teacher(Path(name), options)
        engine, our_processes = _start(lambda: _our_engine(folder, options))
        with closing(engine):
            stock, stock_processes = None, []
            if options.stock:
                stock, stock_processes = _start(lambda: _stock_engine(folder, engine, options))
            cases = _cases(options, engine, our_processes, stock, stock_processes)
            for case in cases:
                case.measure()  # first touch of memory, caches and threads
            rounds = []
            for index in range(options.rounds):
                rounds.append({case.name: case.measure() for case in cases[:: 1 if index % 2 else -1]})
                print(f"round {index + 1} of {options.rounds}", flush=True)
            if stock is not None:
                stock.llm_engine.engine_core.shutdown()
    _report(options, rounds, [case.name for case in cases])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--vocab", type=int, default=102_400)
    parser.add_argument("--top-k", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--shape", choices=SHAPES, default="small", help="Of the teacher.")
    parser.add_argument("--dummy", action="store_true", help="Weights are made inside vLLM, not written to a file.")
    parser.add_argument("--quantization", help="vLLM's name of an online quantisation.")
    parser.add_argument("--no-stock", dest="stock", action="store_false", help="Leave out vLLM's own prompt_logprobs.")
    parser.add_argument("--length", type=int, default=512, help="Tokens of a sequence.")
    parser.add_argument("--sequences", type=int, default=8, help="Sequences a case and round.")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--logits-bytes", type=int, default=400 << 20)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def _make_teacher(folder: Path, options: argparse.Namespace) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SHAPES[options.shape]
    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=shape["hidden"],
        intermediate_size=shape["ffn"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=options.length + 1,
        initializer_range=0.15,  # a small model's row of logits spreads by 2.4, its top probability is about 0.01
        architectures=["LlamaForCausalLM"],
        dtype=shape["dtype"],
    )
    if options.dummy:
        import vllm

        vllm.LLM = functools.partial(vllm.LLM, load_format="dummy")
        config.save_pretrained(folder)
        return folder
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _start(build: Callable[[], Any]) -> tuple[Any, list[psutil.Process]]:
    """An engine and its processes: the engine core and, where vLLM gives it one of its own, the worker."""
    before = psutil.Process().children(recursive=True)
    engine = build()
    return engine, [process for process in psutil.Process().children(recursive=True) if process not in before]


def _our_engine(folder: Path, options: argparse.Namespace) -> Any:
    from pipeline.models import read_model
    from stages.cache_logits.settings import CacheConfig
    from stages.cache_logits.teacher import Teacher
    from stages.cache_logits.vllm_engine import VllmEngine

    config = CacheConfig(
        teacher=folder,
        corpus=folder,
        out=folder,
        top_k=options.top_k[0],
        temperatures=TEMPERATURES,
        dtype=SHAPES[options.shape]["dtype"],
        quantization=options.quantization,
        batch_tokens=options.batch_tokens,
        logits_bytes=options.logits_bytes,
        enforce_eager=True,
    )
    teacher = Teacher(
        model=read_model(folder),
        vocab_size=options.vocab,
        dtype=SHAPES[options.shape]["dtype"],
        quantization=options.quantization or "none",
    )
    engine = VllmEngine(teacher, config, options.length)
    engine._llm.collective_rpc(_count_model_seconds)
    return engine


def _stock_engine(folder: Path, ours: Any, options: argparse.Namespace) -> Any:
    from vllm import LLM

    scheduler = ours._llm.llm_engine.vllm_config.scheduler_config
    return LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype=SHAPES[options.shape]["dtype"],
        quantization=options.quantization,
        max_logprobs=max(options.top_k),
        max_model_len=options.length + 1,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        max_num_seqs=scheduler.max_num_seqs,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )


def _cases(
    options: argparse.Namespace,
    engine: Any,
    our_processes: list[psutil.Process],
    stock: Any,
    stock_processes: list[psutil.Process],
) -> list[Case]:
    from stages.cache_logits.engine import Request
    from stages.cache_logits.reduction import Reduction

    random = np.random.default_rng(0)
    tokens = random.integers(options.vocab, size=(options.sequences, options.length), dtype=np.int32)
    every, none = np.arange(options.length - 1, dtype=np.int32), np.arange(0, dtype=np.int32)

    def ours(name: str, reduction: Reduction, positions: np.ndarray) -> Case:
        uniforms = np.zeros(len(positions), np.float32)
        requests = [Request(index, row, positions, uniforms) for index, row in enumerate(tokens)]

        def prepare() -> None:
            engine._reduction = reduction
            engine._llm.collective_rpc(_setter(reduction, head_only=name == "head"))

        def run() -> int:
            return sum(len(targets.label_logits) for _, targets in engine.score(requests))

        return Case(name, run, options.sequences * len(positions), engine._llm, our_processes, prepare)

    cases = [ours("bare", Reduction(0, ()), none), ours("head", Reduction(0, ()), every)]
    for top_k in options.top_k:
        cases.append(ours(f"ours {top_k}", Reduction(top_k, TEMPERATURES), every))
        if stock is not None:
            cases.append(_stock_case(stock, stock_processes, tokens, top_k))
    return cases


def _stock_case(stock: Any, processes: list[psutil.Process], tokens: np.ndarray, top_k: int) -> Case:
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": row.tolist()} for row in tokens]
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=top_k, flat_logprobs=True, detokenize=False)

    def run() -> int:
        outputs = stock.generate(prompts, params, use_tqdm=False)
        return sum(len(output.prompt_logprobs) - 1 for output in outputs)  # the first token has none

    expected = len(tokens) * (tokens.shape[1] - 1)
    return Case(f"stock {top_k}", run, expected, stock, processes, hooked=False)


# The functions below run in the worker.


def _setter(reduction: Any, head_only: bool) -> Callable[[Any], None]:
    """Lets the pooler compute something else from now on."""

    def head(pooler: Any, hidden_NH: Any, labels_N: Any, uniforms_N: Any) -> Any:
        logits_NV = pooler._model().compute_logits(hidden_NH)
        return labels_N.new_zeros((len(logits_NV), reduction.width)).int()

    def set_work(worker: Any) -> None:
        pooler = worker.get_model().pooler
        pooler._reduction = reduction
        pooler.__dict__.pop("_reduce_chunk", None)
        if head_only:
            pooler._reduce_chunk = head.__get__(pooler)

    return set_work


def _count_model_seconds(worker: Any) -> None:
    """Add up the process' CPU time inside the forward pass and the pooler."""
    model = worker.get_model()
    model.benchmark_seconds = 0.0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                model.benchmark_seconds += time.process_time() - start

        return call

    model.forward = counted(model.forward)
    model.pooler.forward = counted(model.pooler.forward)


def _model_seconds(worker: Any) -> float:
    return worker.get_model().benchmark_seconds


# Back in the front end.


def _report(options: argparse.Namespace, rounds: list[dict[str, Measurement]], names: list[str]) -> None:
    tokens = options.sequences * options.length
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy")}
    versions["vllm"] = sys.modules["vllm"].__version__
    print(f"\n{_cpu_model()}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}; Python", end=" ")
    print(platform.python_version() + "".join(f", {name} {version}" for name, version in versions.items()))
    print(", ".join(f"{name}={value}" for name, value in vars(options).items()) + f", T={TEMPERATURES}")
    print("CPU in microseconds a token; ratios above 1: faster, or less CPU, than the head alone or stock at that k")
    print(COLUMNS.format(*HEADINGS, *RATIOS))

    for name in names:
        print(COLUMNS.format(*_row(rounds, name, tokens)))


def _row(rounds: list[dict[str, Measurement]], name: str, tokens: int) -> list[str]:
    def median(form: str, value: Callable[[Measurement], float], other: str | None = None) -> str:
        """Of a case's values, or of their ratios to another case's, where there is one."""
        values = [value(found[name]) / (value(found[other]) if other else 1.0) for found in rounds]
        return form.format(statistics.median(values)) if not math.isnan(values[0]) else "-"

    stock = name.replace("ours", "stock")
    has_stock = stock != name and stock in rounds[0]
    return [
        name,
        median("{:,.0f}", lambda found: tokens / found.wall),
        median("{:.1f}", lambda found: found.front_end / tokens * 1e6),
        median("{:.1f}", lambda found: found.engine / tokens * 1e6),
        median("{:.1f}", lambda found: (found.cpu - found.model) / tokens * 1e6),
        median("{:.2f}", lambda found: 1 / found.wall, "head"),
        median("{:.2f}", lambda found: 1 / found.cpu, "head"),
        median("{:.2f}", lambda found: 1 / found.wall, stock) if has_stock else "-",
        median("{:.2f}", lambda found: 1 / found.cpu, stock) if has_stock else "-",
    ]


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
