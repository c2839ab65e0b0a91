"""Share of a student's training time that is spent waiting for data, at the speed of a small model.

    python -m benchmarks.data_wait [--steps 150] [--top-k 64] [--cache CACHE --student STUDENT]

Trains the demo's student (128 wide, 2 layers, sequences of 256, 8 a batch) on a synthetic cache that is made on the
spot, or a given student on a given cache: once for every way to load. Prints the median over the log's lines of the
time waited for batches over the whole, as the log has it (`data_wait_share`), the speed, and what a batch costs to
read, decode and collate. The smaller the model, the harder it is to keep fed: a larger vocabulary only helps.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from pipeline import open_cache
from stages.train_student.dataset import Collate
from stages.train_student.loss_settings import LossSettings
from stages.train_student.run import train_student
from stages.train_student.settings import TrainConfig
from tests.support.small import llama_config, make_cache, make_corpus, random_sequences

LENGTH, BATCH, LOG_STEPS, WARM_UP = 256, 8, 10, 3


def make_inputs(folder: Path, top_k: int) -> tuple[Path, Path]:
    """A cache of 400 sequences, and the config of a student for it."""
    corpus = make_corpus(folder / "corpus", random_sequences(400, vocab_size=300, longest=LENGTH))
    cache = make_cache(folder / "cache", corpus, top_k=top_k)
    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 4}
    vocab_size = open_cache(cache).manifest.vocab_size
    llama_config(vocab_size, **sizes, num_key_value_heads=4, max_position_embeddings=LENGTH).save_pretrained(
        folder / "student"
    )
    return cache, folder / "student"


def batch_ms(cache: Path) -> float:
    """CPU milliseconds to read, decode and collate a batch."""
    sequences = open_cache(cache)
    collate = Collate(LossSettings(vocab_size=sequences.manifest.vocab_size))
    spent = []
    for start in range(0, min(len(sequences), 30 * BATCH), BATCH):
        started = time.process_time()
        collate([sequences[index] for index in range(start, min(start + BATCH, len(sequences)))])
        spent.append(time.process_time() - started)
    return 1000 * statistics.median(spent)


def run(cache: Path, student: Path, out: Path, workers: int, steps: int) -> tuple[float, float]:
    """Median share of the time spent waiting, and median tokens a second."""
    config = TrainConfig(
        student=student,
        cache=cache,
        out=out,
        max_steps=steps,
        batch_size=BATCH,
        log_steps=LOG_STEPS,
        save_steps=10**6,
        loader_workers=workers,
    )
    train_student(config)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    lines = [entry for entry in log if "data_wait_share" in entry][WARM_UP:]
    return tuple(statistics.median(line[name] for line in lines) for name in ("data_wait_share", "tokens_per_second"))


def main() -> None:
    """Print a row for every way to load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--student", type=Path)
    arguments = parser.parse_args()
    if arguments.steps < LOG_STEPS * (WARM_UP + 1):
        parser.error(f"--steps is {arguments.steps}; the first {LOG_STEPS * WARM_UP} are warm-up, give more.")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        cache, student = arguments.cache, arguments.student
        if cache is None or student is None:
            cache, student = make_inputs(folder, arguments.top_k)
        print(f"{torch.get_num_threads()} threads; a batch of {BATCH} costs {batch_ms(cache):.2f} ms of CPU time")
        print(f"{'':22} {'waiting':>8} {'tokens/s':>10}")
        for workers in (0, 1, 2):
            share, rate = run(cache, student, folder / f"run-{workers}", workers, arguments.steps)
            name = "a thread (0 workers)" if workers == 0 else f"{workers} worker processes"
            print(f"{name:22} {share:8.2%} {rate:10,.0f}", flush=True)


if __name__ == "__main__":
    main()
