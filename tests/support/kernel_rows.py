"""The Triton row kernel against the torch path; run by test_row_kernel.py in Triton's interpreter.

    TRITON_INTERPRET=1 python -m tests.support.kernel_rows [COUNT]

Takes COUNT of all cases. Prints how many agreed; exits with a traceback at the first that does not.
"""

import dataclasses
import itertools
import random
import sys

import torch

from stages.train_student import row_kernel
from stages.train_student.divergences import DIVERGENCES
from stages.train_student.fused_head import _cap_
from stages.train_student.loss_settings import LossSettings
from stages.train_student.row_loss import cross_entropy_rows_, distillation_rows_
from stages.train_student.row_targets import make_row_targets
from stages.train_student.sketch import SketchedTails, SketchHead
from stages.train_student.tails import TAILS
from stages.train_student.targets import TeacherTargets

row_kernel.BLOCK = 16  # several blocks and a ragged one
N, V, PADDED = 7, 45, 48
GRADIENT_DTYPES = itertools.cycle((torch.float16, None, torch.float32, None))
"""Of rows with padding behind them, in every other case: float16, since the interpreter cuts off in bfloat16."""
KINDS = [(tail, "forward") for tail in TAILS] + [("ghost", other) for other in DIVERGENCES[1:]]
"""What the kernel knows: with a sketch, the forward KL."""


def torch_path(logits, labels, targets, settings, weights):
    """Values and gradients of row_loss.py in float64 after the soft cap."""
    logits = logits.double()
    slope = torch.ones_like(logits)
    if settings.logit_softcap is not None:
        _cap_(logits, settings.logit_softcap, slope)
    if targets is None:
        values = (cross_entropy_rows_(logits, labels, weights[0] if weights else None), None)
    else:
        targets = type(targets)(*map(_in_64, targets))
        scratch = torch.empty_like(logits)
        tail = None if targets.sketch is None else targets.sketch.logits()
        values = distillation_rows_(logits, labels, targets, settings, weights, scratch, tail)
    return values, logits * slope


def _in_64(field):
    if isinstance(field, SketchedTails):
        return SketchedTails(field.coefficients_NS.double(), field.weight_SV.double(), field.cap)
    return field.double() if field is not None and field.is_floating_point() else field


def make_targets(k, tail_mass, settings, spread):
    """k distinct ids, two of them padding slots where there is room, and the rest's mass; a sketch where it is one."""
    ids = torch.stack([torch.randperm(V)[:k] for _ in range(N)])
    probs = torch.softmax(torch.randn(N, k) / settings.temperature, 1) * (1 - tail_mass)
    if 3 < k < V:
        ids[2, -2:], probs[2, -2:] = ids[2, 0], 0.0
    teacher = TeacherTargets(ids_MK=ids, probs_MK=probs, tail_mass_M=torch.full((N,), tail_mass))
    if TAILS[settings.tail].is_sketched:
        sketch = SketchHead.of(spread * torch.randn(V + 2), torch.randn(V + 2, 3))
        teacher = dataclasses.replace(teacher, coefficients_MR=torch.randn(N, 3), sketch=sketch)
    return make_row_targets(teacher, settings, torch.float32)


def kernel(name, logits, labels, targets, settings, weights):
    """Values and gradients of the kernel; raises unless rows with padding behind them give the same."""
    ours = logits.clone()
    tail = None if targets is None or targets.sketch is None else targets.sketch.logits()
    values = row_kernel.kernel_rows_(ours, labels, targets, settings, weights, ours, tail)
    if (dtype := next(GRADIENT_DTYPES)) is None:
        return values, ours
    padded = torch.full((N, PADDED), torch.nan)[:, :V].copy_(logits)
    gradient = padded.view(dtype)[:, :V]
    if tail is not None:
        tail = torch.full((N, PADDED), torch.nan)[:, :V].copy_(tail)
    again = row_kernel.kernel_rows_(padded, labels, targets, settings, weights, gradient, tail)
    for first, second in zip(values, again):
        assert first is second is None or torch.equal(first, second), f"{name}: values of padded rows"
    if weights is not None:
        assert torch.equal(gradient, ours.to(dtype)), f"{name}: gradient of padded rows in {dtype}"
    return values, ours


def check(name, found, expected, tolerance=2e-5):
    """Raise unless two tensors agree, relative to the larger of 1 and the expected."""
    error = ((found.double() - expected).abs() / expected.abs().clamp_min(1.0)).max().item()
    assert error <= tolerance, f"{name}: off by {error:.2e}"


def main():
    """Every kind of target, temperature, divergence and cap, at ordinary and at extreme logits."""
    torch.manual_seed(0)
    count = 0
    cases = list(itertools.product(KINDS, (1, 5, V), (1.0, 2.0, 3.3), (None, 2.5), (1.0, 60.0), (1e-9, 0.4)))
    random.Random(0).shuffle(cases)
    for (tail, divergence), k, temperature, softcap, spread, tail_mass in cases[
        : int(sys.argv[1]) if sys.argv[1:] else None
    ]:
        settings = LossSettings(
            vocab_size=V, tail=tail, divergence=divergence, temperature=temperature, logit_softcap=softcap
        )
        targets = make_targets(k, tail_mass, settings, spread)
        logits, labels = spread * torch.randn(N, V), torch.randint(V, (N,))
        labels[0], labels[2] = targets.ids_NK[0, -1], targets.ids_NK[2, 0]
        for weights in ((0.3, 0.7), None) if count % 5 == 0 else ((0.3, 0.7),):
            name = f"{tail} {divergence} k={k} T={temperature} cap={softcap} spread={spread} tail={tail_mass}"
            found, ours = kernel(name, logits, labels, targets, settings, weights)
            expected, gradient = torch_path(logits, labels, targets, settings, weights)
            check(f"{name}: cross-entropy", found[0], expected[0])
            check(f"{name}: divergence", found[1], expected[1])
            if weights is not None:
                check(f"{name}: gradient", ours, gradient)
        count += 1
    for softcap, spread in itertools.product((None, 2.5), (1.0, 60.0)):
        logits, labels = spread * torch.randn(N, V), torch.randint(V, (N,))
        settings = LossSettings(vocab_size=V, logit_softcap=softcap)
        found, ours = kernel(f"cap={softcap}", logits, labels, None, settings, (0.3, 0.0))
        expected, gradient = torch_path(logits, labels, None, settings, (0.3, 0.0))
        check(f"cross-entropy alone, cap={softcap}", found[0], expected[0])
        check(f"gradient alone, cap={softcap}", ours, gradient)
        count += 1
    print(count)


if __name__ == "__main__":
    main()
