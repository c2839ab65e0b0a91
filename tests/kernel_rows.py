"""The Triton row kernel against the torch path; run by test_row_kernel.py in Triton's interpreter.

    TRITON_INTERPRET=1 python -m tests.kernel_rows COUNT

Takes COUNT of 504 cases. Prints how many agreed; exits with a traceback at the first that does not.
"""

import itertools
import random
import sys

import torch

from stages.train_student import row_kernel
from stages.train_student.divergences import DIVERGENCES
from stages.train_student.fused_head import _cap_
from stages.train_student.row_loss import cross_entropy_rows_, distillation_rows_
from stages.train_student.row_targets import make_row_targets

row_kernel.BLOCK = 16  # several blocks and a ragged one
N, V = 7, 45
TAILS = ("ghost", "zero", "renormalise", "uniform", "hybrid")


def torch_path(logits, labels, targets, temperature, weights, divergence, softcap):
    """Values and gradients of row_loss.py in float64 after the soft cap."""
    logits = logits.double()
    slope = torch.ones_like(logits)
    if softcap is not None:
        _cap_(logits, softcap, slope)
    if targets is None:
        values = (cross_entropy_rows_(logits, labels, weights[0] if weights else None), None)
    else:
        targets = type(targets)(*(field.double() if _is_float(field) else field for field in targets))
        scratch = torch.empty_like(logits)
        values = distillation_rows_(logits, labels, targets, temperature, weights, scratch, divergence)
    return values, logits * slope


def _is_float(field):
    return field is not None and field.is_floating_point()


def make_targets(k, tail, tail_mass, temperature):
    """k distinct ids, two of them padding slots where there is room, and the rest's mass."""
    ids = torch.stack([torch.randperm(V)[:k] for _ in range(N)])
    probs = torch.softmax(torch.randn(N, k) / temperature, 1) * (1 - tail_mass)
    if 3 < k < V:
        ids[2, -2:], probs[2, -2:] = ids[2, 0], 0.0
    return make_row_targets(ids, probs, torch.full((N,), tail_mass), tail, V)


def check(name, found, expected, tolerance=2e-5):
    """Raise unless two tensors agree, relative to the larger of 1 and the expected."""
    error = ((found.double() - expected).abs() / expected.abs().clamp_min(1.0)).max().item()
    assert error <= tolerance, f"{name}: off by {error:.2e}"


def main():
    """Every kind of target, temperature, divergence and cap, at ordinary and at extreme logits."""
    torch.manual_seed(0)
    count = 0
    kinds = [(tail, "forward") for tail in TAILS] + [("ghost", other) for other in DIVERGENCES[1:]]
    cases = list(itertools.product(kinds, (1, 5, V), (1.0, 2.0, 3.3), (None, 2.5), (1.0, 60.0), (1e-9, 0.4)))
    random.Random(0).shuffle(cases)
    for (tail, divergence), k, temperature, softcap, spread, tail_mass in cases[: int(sys.argv[1])]:
        targets = make_targets(k, tail, tail_mass, temperature)
        logits, labels = spread * torch.randn(N, V), torch.randint(V, (N,))
        labels[0], labels[2] = targets.ids_NK[0, -1], targets.ids_NK[2, 0]
        for weights in ((0.3, 0.7), None) if count % 5 == 0 else ((0.3, 0.7),):
            ours = logits.clone()
            found = row_kernel.kernel_rows_(ours, labels, targets, temperature, weights, divergence, softcap)
            expected, gradient = torch_path(logits, labels, targets, temperature, weights, divergence, softcap)
            name = f"{tail} {divergence} k={k} T={temperature} cap={softcap} spread={spread} tail={tail_mass}"
            check(f"{name}: cross-entropy", found[0], expected[0])
            check(f"{name}: divergence", found[1], expected[1])
            if weights is not None:
                check(f"{name}: gradient", ours, gradient)
        count += 1
    for softcap, spread in itertools.product((None, 2.5), (1.0, 60.0)):
        logits, labels = spread * torch.randn(N, V), torch.randint(V, (N,))
        ours = logits.clone()
        found = row_kernel.kernel_rows_(ours, labels, None, 1.0, (0.3, 0.0), softcap=softcap)
        expected, gradient = torch_path(logits, labels, None, 1.0, (0.3, 0.0), "forward", softcap)
        check(f"cross-entropy alone, cap={softcap}", found[0], expected[0])
        check(f"gradient alone, cap={softcap}", ours, gradient)
        count += 1
    print(count)


if __name__ == "__main__":
    main()
