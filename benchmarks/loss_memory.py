"""Peak memory of the loss, forward and backward, over its inputs: fused, and dense.

    python benchmarks/loss_memory.py [--hidden 1024] [--vocab 102400] [--top-k 64]

Each case runs in a process of its own; the peak is the kernel's high-water mark of resident memory
less what is resident before the loss. "Dense" is (1 - alpha) CE + alpha T^2 KL with a ghost tail on
full float32 logits by plain torch.
"""

import argparse
import os
import platform
import resource
import subprocess
import sys

import psutil
import torch

from stages.train_student.loss import fused_distillation_loss

TOKENS = (512, 1024, 2048)
ALPHA, TEMPERATURE = 0.5, 2.0


def dense_loss(hidden, weight, labels, ids, probs, tail):
    """The same loss with the whole [tokens, vocabulary] matrix."""
    logits = hidden @ weight.T
    cross_entropy = torch.nn.functional.cross_entropy(logits, labels)
    log_q = torch.log_softmax(logits / TEMPERATURE, 1)
    kept = log_q.gather(1, ids)
    kl = (probs * (probs.log() - kept)).sum(1) + tail * (tail.log() - torch.log1p(-kept.exp().sum(1)))
    return (1 - ALPHA) * cross_entropy + ALPHA * TEMPERATURE**2 * kl.mean()


def fused_loss(hidden, weight, *targets):
    """Ours, with the settings of `dense_loss`."""
    return fused_distillation_loss(hidden, weight, *targets, alpha=ALPHA, temperature=TEMPERATURE).loss


def peak_mib(kind: str, num_tokens: int, hidden_size: int, vocab_size: int, top_k: int) -> float:
    """Resident memory that one forward and backward adds, MiB."""
    torch.manual_seed(0)
    hidden = torch.randn(num_tokens, hidden_size, requires_grad=True)
    weight = torch.empty(vocab_size, hidden_size).normal_(0, 0.02).requires_grad_()
    labels = torch.randint(vocab_size, (num_tokens,))
    ids = torch.randint(vocab_size // top_k, (num_tokens, top_k)) + torch.arange(top_k) * (vocab_size // top_k)
    probs, tail = torch.full((num_tokens, top_k), 0.5 / top_k), torch.full((num_tokens,), 0.5)
    before = psutil.Process().memory_info().rss
    loss = {"fused": fused_loss, "dense": dense_loss}[kind]
    loss(hidden, weight, labels, ids, probs, tail).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10 - before / 2**20


def main() -> None:
    """Print a table; with --case, run one case and print its figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size")
    parser.add_argument("--vocab", type=int, default=102_400, help="vocabulary")
    parser.add_argument("--top-k", type=int, default=64, help="stored entries of a token")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = (arguments.hidden, arguments.vocab, arguments.top_k)
    if arguments.case:
        print(peak_mib(arguments.case[0], int(arguments.case[1]), *sizes))
        return
    print(
        f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}; H={sizes[0]} V={sizes[1]} k={sizes[2]}"
    )
    print(f"{'tokens':>8} {'N x V float32':>14} {'dense':>10} {'fused':>10}   MiB over the inputs (gradients included)")
    for num_tokens in TOKENS:
        peaks = []
        for kind in ("dense", "fused"):
            command = [sys.executable, __file__, *sys.argv[1:], "--case", kind, str(num_tokens)]
            finished = subprocess.run(command, capture_output=True, text=True, check=True)
            peaks.append(float(finished.stdout))
        print(
            f"{num_tokens:>8} {num_tokens * sizes[1] * 4 / 2**20:>14,.0f} {peaks[0]:>10,.0f} {peaks[1]:>10,.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
