"""Cost of the loss on a GPU, forward and backward, beside others and beside the floor of its matrix products.

    python -m benchmarks.loss_gpu [--tokens 8192 32768] [--hidden 4096] [--vocab 102400] [--top-k 64] [--rounds 20]

bfloat16 hidden states and head. For every scheme, interleaved: the median time by CUDA events, and the peak of
allocated memory over what is allocated before the step (gradients included). The floor is the time of the three matrix
products (logits, gradient of the hidden states, gradient of the head), each measured alone in chunks as large as ours.
Peers are used where they are installed (liger-kernel, cut-cross-entropy) and named where they are not. Checks our
gradients against float32 dense ones on some tokens first. Without a CUDA device it says so and does nothing; `--smoke`
runs the schemes that a CPU can, at a tiny size, without figures.
"""

import argparse
import importlib.util
import random
import statistics
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.loss import Case, make_case, our_cross_entropy, ours
from stages.train_student.fused_head import DEFAULT_CHUNK_BYTES
from stages.train_student.sketch import SketchHead

Scheme = Callable[[Case], Tensor]


def torch_cross_entropy(case: Case) -> Tensor:
    """torch's chunked cross-entropy (2.13 and later)."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(case.hidden_NH, case.weight_VH, case.labels_N, options=options)


def dense_cross_entropy(case: Case) -> Tensor:
    """The whole matrix of logits."""
    return F.cross_entropy((case.hidden_NH @ case.weight_VH.T).float(), case.labels_N)


def liger_cross_entropy(case: Case) -> Tensor:
    """Liger's fused linear cross-entropy."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(case.weight_VH, case.hidden_NH, case.labels_N)


def liger_distillation(case: Case) -> Tensor:
    """Liger's fused linear distillation; it computes a dense teacher's head."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(beta=0.0, temperature=2.0)
    return loss(case.hidden_NH, case.weight_VH, case.teacher_hidden_NH, case.weight_VH.detach(), case.labels_N)


def cut_cross_entropy(case: Case) -> Tensor:
    """apple's cut cross-entropy, with its gradient filter as it comes."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(case.hidden_NH, case.weight_VH, case.labels_N)


def schemes() -> tuple[dict[str, Scheme], dict[str, str]]:
    """What can run, and why the others cannot."""
    found: dict[str, Scheme] = {
        "ours, cross-entropy": our_cross_entropy,
        "ours, KD T=1, ghost": ours(1.0),
        "ours, KD T=2, ghost": ours(2.0),
        "ours, KD T=2, uniform": ours(2.0, "uniform"),
        "ours, KD T=2, sketch": ours(2.0, "sketch"),
        "dense cross-entropy": dense_cross_entropy,
    }
    missing = {}
    peers = {
        "liger_kernel": {
            "Liger, cross-entropy": liger_cross_entropy,
            "Liger, distillation, dense teacher": liger_distillation,
        },
        "cut_cross_entropy": {"cut cross-entropy": cut_cross_entropy},
    }
    for module, entries in peers.items():
        if importlib.util.find_spec(module) is None:
            missing |= dict.fromkeys(entries, f"{module} is not installed")
        else:
            found |= entries
    if hasattr(F, "linear_cross_entropy"):
        found["torch F.linear_cross_entropy"] = torch_cross_entropy
    else:
        missing["torch F.linear_cross_entropy"] = f"torch {torch.__version__} has none (2.13 does)"
    return found, missing


def on_device(case: Case, device: str) -> Case:
    """The case in bfloat16 on a device; leaves that want gradients stay leaves."""

    def moved(tensor: Tensor | SketchHead) -> Tensor | SketchHead:
        if isinstance(tensor, SketchHead):
            return tensor.to(torch.device(device))
        dtype = torch.bfloat16 if tensor.requires_grad or tensor is case.teacher_hidden_NH else tensor.dtype
        return tensor.detach().to(device, dtype).requires_grad_(tensor.requires_grad)

    return Case(*map(moved, case))


def step(scheme: Scheme, case: Case) -> None:
    """One forward and backward."""
    case.hidden_NH.grad = case.weight_VH.grad = None
    scheme(case).backward()


def timed(function: Callable[[], None]) -> float:
    """Milliseconds between two CUDA events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def peak_mib(scheme: Scheme, case: Case) -> float:
    """Peak of allocated memory over the inputs, gradients included."""
    case.hidden_NH.grad = case.weight_VH.grad = None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    scheme(case).backward()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def floor_ms(case: Case, rounds: int) -> tuple[float, float]:
    """(milliseconds of the three matrix products, TFLOP/s that they ran at), in chunks as large as ours."""
    hidden, weight = case.hidden_NH.detach(), case.weight_VH.detach()
    rows = min(len(hidden), DEFAULT_CHUNK_BYTES["cuda"] // (4 * len(weight)))
    chunks = hidden.split(rows)
    logits = chunks[0] @ weight.T

    def products() -> None:
        for chunk in chunks:
            part = logits[: len(chunk)]
            torch.mm(chunk, weight.T, out=part)
            torch.mm(part, weight)
            torch.mm(part.T, chunk)

    products()
    milliseconds = statistics.median(timed(products) for _ in range(rounds))
    flops = 6 * hidden.shape[0] * hidden.shape[1] * weight.shape[0]
    return milliseconds, flops / milliseconds / 1e9


def largest_error(vocab_size: int, hidden_size: int, top_k: int, device: str) -> float:
    """Relative error of our bfloat16 gradients on 64 tokens, from float32 ones of the same rounded inputs."""
    case = on_device(make_case(64, hidden_size, vocab_size, top_k), device)
    exact = case._replace(
        hidden_NH=case.hidden_NH.detach().float().requires_grad_(),
        weight_VH=case.weight_VH.detach().float().requires_grad_(),
    )
    logits = exact.hidden_NH @ exact.weight_VH.T
    kept = torch.log_softmax(logits / 2, 1).gather(1, case.ids_NK)
    kl = (case.probs_NK * (case.probs_NK.log() - kept)).sum(1)
    kl += case.tail_N * (case.tail_N.log() - torch.log1p(-kept.exp().sum(1)))
    (0.5 * F.cross_entropy(logits, case.labels_N) + 2 * kl.mean()).backward()
    ours(2.0)(case).backward()
    pairs = ((case.hidden_NH, exact.hidden_NH), (case.weight_VH, exact.weight_VH))
    return max(((found.grad.float() - true.grad).norm() / true.grad.norm()).item() for found, true in pairs)


def table(arguments: argparse.Namespace, num_tokens: int) -> None:
    """Print times and memory at a number of tokens."""
    found, missing = schemes()
    case = on_device(make_case(num_tokens, arguments.hidden, arguments.vocab, arguments.top_k), "cuda")
    floor, rate = floor_ms(case, arguments.rounds)
    times: dict[str, list[float]] = {}
    memory: dict[str, float] = {}
    for name in list(found):
        try:
            for _ in range(3):
                step(found[name], case)
            memory[name] = peak_mib(found[name], case)
        except (RuntimeError, ImportError, TypeError) as error:  # a peer that does not fit this machine
            missing[name] = " ".join(str(error).split())[:120]
            del found[name]
    for _ in range(arguments.rounds):
        for name in random.sample(list(found), len(found)):
            times.setdefault(name, []).append(timed(lambda name=name: step(found[name], case)))
    print(f"\nN={num_tokens} H={arguments.hidden} V={arguments.vocab} k={arguments.top_k}, bfloat16")
    print(f"three products: {floor:.2f} ms, {rate:.0f} TFLOP/s")
    print(f"{'':38} {'ms':>8} {'over ours, CE':>14} {'over the floor':>15} {'peak MiB':>9}")
    base = statistics.median(times["ours, cross-entropy"])
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:38} {median:8.2f} {median / base:14.3f} {median / floor:15.3f} {memory[name]:9,.0f}", flush=True)
    for name, reason in missing.items():
        print(f"left out: {name}: {reason}")


def smoke() -> None:
    """Run what a CPU can once, at a tiny size."""
    case = on_device(make_case(32, 16, 256, 4), "cpu")
    for name in ("ours, cross-entropy", "ours, KD T=2, ghost", "ours, KD T=2, sketch", "dense cross-entropy"):
        step(schemes()[0][name], case)
    error = largest_error(256, 16, 4, "cpu")
    assert error < 0.02, error
    print(f"ran; largest relative error of a gradient {error:.1e}")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32_768])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=102_400)
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--smoke", action="store_true", help="tiny, on a CPU, no figures")
    arguments = parser.parse_args()
    if arguments.smoke:
        return smoke()
    if not torch.cuda.is_available():
        print("skipped: no CUDA device")
        return None
    triton = "with" if importlib.util.find_spec("triton") else "WITHOUT"
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {triton} triton")
    error = largest_error(arguments.vocab, arguments.hidden, arguments.top_k, "cuda")
    print(f"our gradients against float32 dense ones: relative error {error:.1e}")
    for num_tokens in arguments.tokens:
        table(arguments, num_tokens)
    return None


if __name__ == "__main__":
    sys.exit(main())
