"""Cost of the loss, forward and backward, beside others: time over our own cross-entropy, and peak memory.

    python -m benchmarks.loss [--rounds 9] [--shape 512 512 32000] [--only ours torch]   # ratios of CPU time
    python -m benchmarks.loss --only T=2 --over "ours, KD T=2, ghost"                   # over another one's
    python -m benchmarks.loss --memory [--tokens 512 1024 2048]                       # MiB over the inputs

Time: one thread, every scheme once a round in random order, CPU time of the process; the table has the median over
rounds of a scheme's time over that of `ours, cross-entropy` in the same round, and the fastest time. Memory: every
case in a process of its own, the kernel's high-water mark less what is resident before the loss; gradients included.

Peers are installed for the measurement only (`pip install --no-deps liger-kernel`) and left out where they are missing.
What the schemes compute differs, and is said in their names; N tokens, H hidden, V vocabulary, k entries, R
coefficients of a sketch.
"""

import argparse
import importlib.util
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.train_student.loss import fused_distillation_loss
from stages.train_student.sketch import SketchHead
from stages.train_student.tails import TAILS

SHAPES = ((512, 512, 32_000), (256, 1024, 102_400))
RANK = 16
"""Coefficients of a sketch."""
BASE = "ours, cross-entropy"
ALPHA = 0.5
CHUNK = 128
"""Tokens of a chunk in the re-stated peers."""


class Case(NamedTuple):
    """Inputs of one step: a student's hidden states and head, labels, and a teacher."""

    hidden_NH: Tensor
    weight_VH: Tensor
    labels_N: Tensor
    ids_NK: Tensor
    probs_NK: Tensor
    tail_N: Tensor
    teacher_hidden_NH: Tensor
    """For peers that compute a dense teacher on the fly; its head is the student's."""
    coefficients_NR: Tensor
    sketch: SketchHead


def make_case(num_tokens: int, hidden_size: int, vocab_size: int, top_k: int) -> Case:
    """Random inputs; the stored half of the teacher's mass lies on spread ids."""
    torch.manual_seed(0)
    step = vocab_size // top_k
    ids = torch.randint(step, (num_tokens, top_k)) + torch.arange(top_k) * step
    return Case(
        torch.randn(num_tokens, hidden_size, requires_grad=True),
        torch.empty(vocab_size, hidden_size).normal_(0, 0.02).requires_grad_(),
        torch.randint(vocab_size, (num_tokens,)),
        ids,
        torch.full((num_tokens, top_k), 0.5 / top_k),
        torch.full((num_tokens,), 0.5),
        torch.randn(num_tokens, hidden_size),
        torch.randn(num_tokens, RANK),
        SketchHead.of(torch.randn(vocab_size), torch.empty(vocab_size, RANK).normal_(0, 0.5)),
    )


def ours(temperature: float, tail: str = "ghost", alpha: float = ALPHA, **extras: object) -> Callable[[Case], Tensor]:
    """Our loss under the given settings."""

    def loss(case: Case) -> Tensor:
        targets = (case.ids_NK, case.probs_NK, case.tail_N)
        if TAILS[tail].is_sketched:
            extras.update(coefficients_NR=case.coefficients_NR, sketch=case.sketch)
        return fused_distillation_loss(
            case.hidden_NH, case.weight_VH, case.labels_N, *targets, alpha, temperature, tail, **extras
        ).loss

    return loss


def our_cross_entropy(case: Case) -> Tensor:
    """Ours without a teacher."""
    return fused_distillation_loss(case.hidden_NH, case.weight_VH, case.labels_N, None, None, None, alpha=0.0).loss


def torch_fused_cross_entropy(case: Case) -> Tensor:
    """torch's own chunked cross-entropy."""
    return F.linear_cross_entropy(
        case.hidden_NH, case.weight_VH, case.labels_N, options=torch.nn.LinearCrossEntropyOptions()
    )


def torch_in_one_chunk(case: Case) -> Tensor:
    """torch's own with all tokens in a chunk, as ours has them while they fit 256 MiB."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=len(case.labels_N), chunking_method=None)
    return F.linear_cross_entropy(case.hidden_NH, case.weight_VH, case.labels_N, options=options)


def dense_topk(hidden: Tensor, case: Case, rows: slice, temperature: float = 2.0) -> Tensor:
    """CE and ghost KL of some rows, from full float32 logits; a sum over the rows."""
    logits = hidden @ case.weight_VH.T
    cross_entropy = F.cross_entropy(logits, case.labels_N[rows], reduction="sum")
    kept = torch.log_softmax(logits / temperature, 1).gather(1, case.ids_NK[rows])
    probs, tail = case.probs_NK[rows], case.tail_N[rows]
    kl = (probs * (probs.log() - kept)).sum() + (tail * (tail.log() - torch.log1p(-kept.exp().sum(1)))).sum()
    return (1 - ALPHA) * cross_entropy + ALPHA * temperature**2 * kl


def dense(case: Case) -> Tensor:
    """The same loss with the whole [tokens, vocabulary] matrix."""
    return dense_topk(case.hidden_NH, case, slice(None)) / len(case.labels_N)


def dense_kl_div(case: Case) -> Tensor:
    """CE + kl_div against a dense teacher, as most training scripts have it; the teacher's product is not counted."""
    logits = case.hidden_NH @ case.weight_VH.T
    with torch.no_grad():
        teacher = torch.zeros_like(logits).scatter_(1, case.ids_NK, case.probs_NK)
    kl = F.kl_div(torch.log_softmax(logits / 2, 1), teacher, reduction="batchmean")
    return (1 - ALPHA) * F.cross_entropy(logits, case.labels_N) + ALPHA * 4 * kl


class ChunkedTopK(torch.autograd.Function):
    """Chunks of tokens, each through autograd, gradients added up: how axolotl's (and Liger's) chunked losses work."""

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, case):
        total, grads = 0.0, []
        grad_weight = torch.zeros_like(weight_VH)
        for start in range(0, len(hidden_NH), CHUNK):
            rows = slice(start, start + CHUNK)
            with torch.enable_grad():
                hidden, weight = hidden_NH[rows].detach().requires_grad_(), weight_VH.detach().requires_grad_()
                loss = dense_topk(hidden, case._replace(weight_VH=weight), rows) / len(hidden_NH)
                grad, grad_chunk = torch.autograd.grad(loss, (hidden, weight))
            total += loss.detach()
            grads.append(grad)
            grad_weight += grad_chunk
        ctx.save_for_backward(torch.cat(grads), grad_weight)
        return total

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_loss, grad_weight * grad_loss, None


def chunked_topk(case: Case) -> Tensor:
    """ChunkedTopK on the case."""
    return ChunkedTopK.apply(case.hidden_NH, case.weight_VH, case)


def liger(case: Case) -> Tensor:
    """Liger's fused linear distillation, forward KL, with the dense teacher's head computed on the fly."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.5, weight_soft_loss=0.5, beta=0.0, temperature=2.0, compiled=False
    )
    teacher = (case.teacher_hidden_NH, case.weight_VH.detach())
    return loss(case.hidden_NH, case.weight_VH, *teacher, case.labels_N)


SCHEMES: dict[str, Callable[[Case], Tensor]] = {
    BASE: our_cross_entropy,
    "torch F.linear_cross_entropy": torch_fused_cross_entropy,
    "torch F.linear_cross_entropy, one chunk": torch_in_one_chunk,
    "ours, KD T=1, ghost": ours(1.0),
    "ours, KD T=2, ghost": ours(2.0),
    "ours, KD T=3, ghost": ours(3.0),
    "ours, KD T=2, uniform": ours(2.0, "uniform"),
    "ours, KD T=2, js": ours(2.0, divergence="js"),
    "ours, KD T=1, sketch": ours(1.0, "sketch"),
    "ours, KD T=2, sketch": ours(2.0, "sketch"),
    "ours, KD T=3, sketch": ours(3.0, "sketch"),
    "ours, KD T=2, sketch, js": ours(2.0, "sketch", divergence="js"),
    "dense CE + kl_div, teacher given": dense_kl_div,
    "dense CE + ghost KL": dense,
    "chunked autograd, top-k (axolotl's way)": chunked_topk,
    "Liger, dense teacher computed": liger,
}
MISSING = {
    "Liger, where the table has no such row": "`pip install --no-deps liger-kernel`",
    "Liger fused linear KL, sparse": "Liger has none; its distillation is the dense one above",
    "apple cut-cross-entropy": "CUDA only: it needs triton and a GPU",
}


def available(only: list[str], base: str) -> list[str]:
    """Names of what can run here and holds one of the words, if there are any; always the base."""
    has_liger = importlib.util.find_spec("liger_kernel") is not None
    chosen = [name for name in SCHEMES if name == base or not only or any(word in name for word in only)]
    return [name for name in chosen if "Liger" not in name or has_liger]


def step_seconds(name: str, case: Case) -> float:
    """CPU time of one forward and backward."""
    case.hidden_NH.grad = case.weight_VH.grad = None
    started = time.process_time()
    SCHEMES[name](case).backward()
    return time.process_time() - started


def time_table(names: list[str], base: str, shape: tuple[int, int, int], top_k: int, rounds: int) -> None:
    """Print the ratios of all schemes at a shape, over the time of the base."""
    case = make_case(*shape, top_k)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name in random.sample(names, len(names)):
            spent = step_seconds(name, case)
            if number:  # the first round warms up
                seconds[name].append(spent)
    print(f"\nN={shape[0]} H={shape[1]} V={shape[2]} k={top_k}, float32, {rounds} rounds")
    print(f"{'over ' + base:42} {'ratio':>14} {'fastest, s':>11}")
    for name in names:
        ratios = [spent / of_base for spent, of_base in zip(seconds[name], seconds[base])]
        print(f"{name:42} {statistics.median(ratios):14.3f} {min(seconds[name]):11.3f}", flush=True)


def peak_mib(name: str, case: Case) -> float:
    """Resident memory that one forward and backward adds."""
    import psutil  # which a machine that only imports this for its cases may lack

    before = psutil.Process().memory_info().rss
    SCHEMES[name](case).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10 - before / 2**20


def memory_table(names: list[str], tokens: list[int], hidden_size: int, vocab_size: int, top_k: int) -> None:
    """Print the peak memory of all schemes; needs a process a case."""
    print(f"\nMiB over the inputs, H={hidden_size} V={vocab_size} k={top_k}, float32")
    print(f"{'N':42} " + " ".join(f"{count:>8,}" for count in tokens))
    print(f"{'(N x V float32)':42} " + " ".join(f"{count * vocab_size * 4 / 2**20:8,.0f}" for count in tokens))
    for name in names:
        peaks = []
        for count in tokens:
            case = [str(count), str(hidden_size), str(vocab_size), str(top_k)]
            command = [sys.executable, "-m", "benchmarks.loss", "--case", name, *case]
            peaks.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        print(f"{name:42} " + " ".join(f"{peak:8,.0f}" for peak in peaks), flush=True)


def processor() -> str:
    """What /proc/cpuinfo calls the machine's processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def main() -> None:
    """Print the tables that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--shape", type=int, nargs=3, metavar=("N", "H", "V"), help="default: two shapes")
    parser.add_argument("--top-k", type=int, default=64, help="stored entries of a token")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048], help="N of --memory")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="schemes whose names hold one of these")
    parser.add_argument("--over", default=BASE, choices=SCHEMES, metavar="SCHEME", help="whose time is 1")
    parser.add_argument("--case", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.case:
        name, *sizes = arguments.case
        print(peak_mib(name, make_case(*map(int, sizes))))
        return
    names = available(arguments.only, arguments.over)
    print(f"{processor()}, one thread, torch {torch.__version__}")
    if arguments.memory:
        _, hidden_size, vocab_size = arguments.shape or SHAPES[1]
        memory_table(names, arguments.tokens, hidden_size, vocab_size, arguments.top_k)
    else:
        for shape in [tuple(arguments.shape)] if arguments.shape else SHAPES:
            time_table(names, arguments.over, shape, arguments.top_k, arguments.rounds)
    for name, reason in MISSING.items():
        print(f"left out: {name}: {reason}")


if __name__ == "__main__":
    main()
