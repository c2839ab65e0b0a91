"""The loss with a sketched tail against plain float64 autograd over dense distributions, written from its formula."""

import itertools
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.sketch import TailSketch
from stages.train_student import fused_head
from stages.train_student.divergences import DIVERGENCES
from stages.train_student.loss import distillation_loss, fused_distillation_loss
from stages.train_student.loss_settings import LossSettings
from stages.train_student.sketch import SketchedTails, SketchHead
from stages.train_student.targets import DistillationTargets, TeacherTargets
from tests.support.rounding import UNIT
from tests.test_loss import FLOAT64_ERROR, largest_tensor, one_thread  # noqa: F401

N, H, V, ROWS, R = 7, 4, 17, 20, 3
"""Rows of the head from V on are padding, and so are those of the sketch."""
TINY = torch.finfo(torch.float64).tiny
TEMPERATURES = (1.0, 2.0, 3.3)
TAIL_MASSES = (0.0, 1e-9, 0.4, 1 - 1e-7)
KINDS = {
    "plain": {},
    "capped sketch": {"sketch_cap": 2.5},
    "capped, scaled student": {"logit_scale": 0.5, "logit_softcap": 2.0},
    "adapter": {"adapter": True, "logit_softcap": 3.0},
}


class Case(NamedTuple):
    """A student, and what is stored of a teacher; float64."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    ids: Tensor
    probs: Tensor
    tail: Tensor
    coefficients: Tensor
    offset: Tensor
    basis: Tensor
    adapter: tuple[Tensor, Tensor]


def make_case(k: int, tail_mass: float, *, padded: bool = False, seed: int = 0, spread: float = 1.0) -> Case:
    """Random, with the given mass outside k stored ids.

    With padding slots on every row but the first where asked for; the last row then has nothing but a tail, as one of
    which a smaller vocabulary leaves nothing.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return spread * torch.randn(*shape, generator=generator, dtype=torch.float64)

    ids = torch.stack([torch.randperm(V, generator=generator)[:k] for _ in range(N)])
    probs = torch.softmax(draw(N, k), 1)
    if padded:
        for row in range(1, N):
            start = 1 + row % k if row % k else k
            ids[row, start:], probs[row, start:] = ids[row, 0], 0.0
    probs = probs / probs.sum(1, keepdim=True)
    tail = torch.full((N,), tail_mass, dtype=torch.float64)
    if k == V:
        tail[0 if padded else slice(None)] = 0.0
    if padded:
        tail[-1], ids[-1] = 1.0, ids[-1, 0]
    probs = probs * (1 - tail)[:, None]
    labels = torch.randint(V, (N,), generator=generator)
    labels[0], labels[1], labels[2] = ids[0, -1], ids[1, 0], -100
    leaves = (draw(N, H), draw(ROWS, H), draw(N, 2), draw(ROWS, 2))
    hidden, weight, down, up = (leaf.requires_grad_() for leaf in leaves)
    return Case(hidden, weight, labels, ids, probs, tail, draw(N, R), draw(ROWS), draw(ROWS, R), (down, up))


def dense_teacher(case: Case, temperature: float, sketch_cap: float | None, smallest: float = 0.0) -> Tensor:
    """log p-hat_T, float64 [N, V], a row at a time; entries and tail masses below `smallest` count as that."""
    log_p = torch.zeros(len(case.ids), V, dtype=torch.float64)
    for row in range(len(log_p)):
        logits = case.basis[:V].double() @ case.coefficients[row].double() + case.offset[:V].double()
        if sketch_cap is not None:
            logits = sketch_cap * torch.tanh(logits / sketch_cap)
        stored = {int(id_) for id_ in case.ids[row]}
        rest = [id_ for id_ in range(V) if id_ not in stored]
        if rest:
            mass = case.tail[row].double().clamp_min(smallest).log()
            log_p[row, rest] = mass + torch.log_softmax(logits[rest] / temperature, 0)
        for id_ in stored:
            log_p[row, id_] = case.probs[row, case.ids[row] == id_].sum().double().clamp_min(smallest).log()
    return log_p


def dense_divergences(log_p: Tensor, log_q: Tensor, divergence: str) -> Tensor:
    """[N], of dense rows."""
    p, q = log_p.exp(), log_q.exp()
    if divergence == "forward":
        return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(1)
    if divergence == "reverse":
        return (q * (log_q - log_p)).sum(1)
    log_mean = torch.stack([log_p, log_q]).logsumexp(0) - math.log(2)
    return ((p * (log_p - log_mean)).sum(1) + (q * (log_q - log_mean)).sum(1)) / 2


def dense_loss(case, temperature, divergence, alpha=0.3, *, smallest=TINY, **how):
    """loss, cross_entropy and divergence as means over the labels that are not -100; an adapter is merged."""
    rows = case.labels != -100
    products = case.hidden @ case.weight.T
    if how.get("adapter"):
        products = products + case.adapter[0] @ case.adapter[1].T
    logits = how.get("logit_scale", 1.0) * products[rows, :V]
    if how.get("logit_softcap"):
        logits = how["logit_softcap"] * torch.tanh(logits / how["logit_softcap"])
    cross_entropy = torch.nn.functional.cross_entropy(logits, case.labels[rows])
    smallest = 0.0 if divergence == "forward" else smallest
    log_p = dense_teacher(case, temperature, how.get("sketch_cap"), smallest)[rows]
    value = dense_divergences(log_p, torch.log_softmax(logits / temperature, 1), divergence).mean()
    return (1 - alpha) * cross_entropy + alpha * temperature**2 * value, cross_entropy, value


def fused(case, temperature, divergence, alpha=0.3, *, sketch_cap=None, adapter=False, **extras):
    return fused_distillation_loss(
        *case[:6],
        alpha=alpha,
        temperature=temperature,
        tail="sketch",
        divergence=divergence,
        vocab_size=V,
        coefficients_NR=case.coefficients,
        sketch=SketchHead.of(case.offset, case.basis, sketch_cap),
        adapter=case.adapter if adapter else None,
        **extras,
    )


def assert_matches_dense(case, temperature, divergence, **how):
    found = fused(case, temperature, divergence, **how)
    dense_how = {name: value for name, value in how.items() if name != "chunk_bytes"}
    expected = dense_loss(case, temperature, divergence, **dense_how)
    for value, wanted in zip(found, expected, strict=True):
        assert abs(value.item() - wanted.item()) <= FLOAT64_ERROR * max(1.0, abs(wanted.item()))
    leaves = [case.hidden, case.weight, *(case.adapter if how.get("adapter") else ())]
    grads, wanted_grads = (torch.autograd.grad(out[0], leaves) for out in (found, expected))
    for grad, wanted in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=FLOAT64_ERROR, atol=FLOAT64_ERROR)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_match_dense_autograd(kind, divergence):
    grid = itertools.product(TEMPERATURES, (1, 5, V - 1, V), TAIL_MASSES, (False, True))
    for temperature, k, tail_mass, padded in grid:
        case = make_case(k, tail_mass, padded=padded, seed=k)
        assert_matches_dense(case, temperature, divergence, **KINDS[kind])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck(divergence):
    for temperature, tail_mass in itertools.product(TEMPERATURES, (0.0, 0.4)):
        case = make_case(5, tail_mass, padded=True)

        def loss(hidden, weight, case=case, temperature=temperature):
            moved = case._replace(hidden=hidden, weight=weight)
            return fused(moved, temperature, divergence, sketch_cap=2.5, logit_softcap=3.0).loss

        assert torch.autograd.gradcheck(loss, (case.hidden, case.weight))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_chunks_and_blocks_of_rows_do_not_change_the_result(monkeypatch, divergence):
    case = make_case(5, 0.4, padded=True)
    for rows, block_rows in ((1, 1), (2, 1), (3, 2), (100, 2)):
        monkeypatch.setattr(fused_head, "BLOCK_BYTES", {"cpu": block_rows * V * 8})
        how = {"chunk_bytes": rows * V * 8, "logit_softcap": 3.0}
        assert_matches_dense(case, 2.0, divergence, **how)


def test_it_is_the_kl_of_whole_distributions():
    """Against kl_div of the tail that a real low-rank teacher has: then p-hat is p, and the tail is not approximate."""
    case = make_case(5, 0.4)
    logits = case.coefficients @ case.basis[:V].T + case.offset[:V]
    for temperature, divergence in itertools.product(TEMPERATURES, DIVERGENCES):
        p = torch.softmax(logits / temperature, 1)
        probs, ids = p.topk(5, 1)
        exact = case._replace(ids=ids, probs=probs, tail=p.scatter(1, ids, 0.0).sum(1))
        rows = case.labels != -100
        log_q = torch.log_softmax((case.hidden @ case.weight.T)[rows, :V] / temperature, 1)
        found = fused(exact, temperature, divergence).kl
        if divergence == "forward":
            assert found.item() == pytest.approx(
                torch.nn.functional.kl_div(log_q, p[rows], reduction="batchmean").item(), rel=1e-12
            )
        ghost = fused_distillation_loss(*exact[:6], 0.3, temperature, divergence=divergence, vocab_size=V).kl
        assert 0 < ghost.item() < found.item()  # merging outcomes never raises a divergence


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_student_that_equals_the_rebuilt_teacher_has_no_divergence_and_no_gradient(divergence):
    case = make_case(5, 0.4, padded=True)
    for temperature in TEMPERATURES:
        logits = temperature * dense_teacher(case, temperature, None, 1e-300)
        eye, hidden = torch.eye(V, dtype=torch.float64), logits.requires_grad_()
        same = case._replace(hidden=hidden, weight=eye.requires_grad_())
        out = fused(same, temperature, divergence, alpha=1.0)
        assert abs(out.kl.item()) < 1e-14
        for grad in torch.autograd.grad(out.loss, (hidden, eye)):
            assert grad.abs().max() < 1e-13


STUDENTS = {"certain of a stored id": (0, 200.0), "certain of another id": (1, 200.0), "torn": (2, 0.0)}


@pytest.mark.parametrize("tail_mass", [0.0, 1e-9, 0.3, 1 - 1e-7])
@pytest.mark.parametrize("student", [*STUDENTS, "uniform"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_extreme_logits_stay_exact_in_float32(divergence, student, tail_mass):
    """Q and the tail mass near 0 and 1, and a sketch whose own logits reach over 60."""
    tolerance = 50 * UNIT * 8  # sums over the row, exponents up to 200 in a ratio of two
    for temperature, spread in itertools.product(TEMPERATURES, (1.0, 20.0)):
        case = make_case(4, tail_mass)
        case = Case(*(part.float() if torch.is_tensor(part) and part.is_floating_point() else part for part in case))
        case = case._replace(coefficients=spread * case.coefficients, labels=case.labels.clamp_min(0))
        logits = torch.zeros(N, V)
        ids = torch.tensor([[0, 4, 8, 12]]).expand(N, 4)
        if student != "uniform":
            column, level = STUDENTS[student]
            logits += torch.linspace(-1, 1, V) - level
            logits[:, column] = 200.0
        in_32 = case._replace(hidden=logits.requires_grad_(), weight=torch.eye(V), ids=ids)
        in_64 = in_32._replace(hidden=logits.detach().double().requires_grad_(), weight=torch.eye(V).double())
        in_64 = in_64._replace(probs=in_64.probs.double(), tail=in_64.tail.double())
        in_32 = in_32._replace(offset=in_32.offset[:V], basis=in_32.basis[:V])
        found = fused(in_32, temperature, divergence, alpha=1.0)
        expected = dense_loss(in_64, temperature, divergence, alpha=1.0, smallest=torch.finfo(torch.float32).tiny)
        assert found.kl.dtype == torch.float32
        assert abs(found.kl.item() - expected[2].item()) <= tolerance * max(1.0, abs(expected[2].item()))
        (grad,) = torch.autograd.grad(found.loss, in_32.hidden)
        (wanted,) = torch.autograd.grad(expected[0], in_64.hidden)
        assert (grad.double() - wanted).abs().max() <= tolerance * max(1.0, wanted.abs().max().item())


def test_small_student_tail_and_small_teacher_tail_are_sums_and_not_differences():
    """Off the stored ids the gradient is (1 - Q) softmax_rest - t r: with both at 1e-8, subtraction leaves noise."""
    logits = torch.tensor([[30.0, 29.0, 11.0, 10.0, 10.5]], dtype=torch.float64)
    one = {"ids": torch.tensor([[0, 1]]), "tail": torch.tensor([1e-9]), "labels": torch.tensor([0])}
    parts = {"coefficients": torch.tensor([[0.7]]), "offset": torch.tensor([9.0, 9.0, -1.0, 0.5, 0.2])}
    parts |= {"basis": torch.tensor([[9.0], [9.0], [1.0], [-1.0], [0.3]]), "probs": torch.tensor([[0.7, 0.3]])}
    hidden = logits.float().requires_grad_()
    found = fused_distillation_loss(
        *(hidden, torch.eye(5), one["labels"], one["ids"], parts["probs"], one["tail"], 1.0, 1.0, "sketch"),
        coefficients_NR=parts["coefficients"],
        sketch=SketchHead.of(parts["offset"], parts["basis"]),
    )
    (grad,) = torch.autograd.grad(found.loss, hidden)
    sketched = (parts["basis"].double() @ parts["coefficients"][0].double() + parts["offset"])[2:]
    expected = torch.softmax(logits, 1)[0, 2:] - one["tail"].double() * torch.softmax(sketched, 0)
    torch.testing.assert_close(grad[0, 2:].double(), expected, rtol=8 * 40 * UNIT, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_no_tensor_grows_with_tokens_times_vocabulary(divergence, dtype):
    vocab_size, hidden_size, rows_a_chunk, rank = 1000, 8, 16, 3
    limit = max(rows_a_chunk * vocab_size, vocab_size * hidden_size)
    torch.manual_seed(0)
    sketch = SketchHead.of(torch.randn(vocab_size), torch.randn(vocab_size, rank))
    for num_tokens in (64, 128, 256):
        hidden = torch.randn(num_tokens, hidden_size, dtype=dtype).requires_grad_()
        weight = torch.randn(vocab_size, hidden_size, dtype=dtype).requires_grad_()
        targets = DistillationTargets(
            labels_M=torch.zeros(num_tokens, dtype=torch.long),
            teacher=TeacherTargets(
                ids_MK=torch.tensor([[1, 2]]).expand(num_tokens, 2),
                probs_MK=torch.full((num_tokens, 2), 0.25),
                tail_mass_M=torch.full((num_tokens,), 0.5),
                coefficients_MR=torch.randn(num_tokens, rank),
                sketch=sketch,
            ),
        )
        settings = LossSettings(vocab_size=vocab_size, tail="sketch", divergence=divergence)

        def step(parts=(hidden, weight, targets, settings)):
            distillation_loss(*parts, chunk_bytes=rows_a_chunk * vocab_size * 4).loss.backward()

        assert largest_tensor(step, [hidden, weight, sketch.weight_SP]) <= limit


def test_bfloat16_student_has_the_error_of_its_inputs():
    case = make_case(5, 0.4)
    hidden, weight = (leaf.detach().to(torch.bfloat16).requires_grad_() for leaf in case[:2])
    exact = case._replace(hidden=hidden.detach().double().requires_grad_(), weight=weight.detach().double())
    found = fused(case._replace(hidden=hidden, weight=weight), 2.0, "forward")
    expected = dense_loss(exact, 2.0, "forward")
    assert found.loss.dtype == torch.float32
    assert found.loss.item() == pytest.approx(expected[0].item(), rel=1e-5)
    (grad,), (wanted,) = (
        torch.autograd.grad(out[0], leaf) for out, leaf in ((found, hidden), (expected, exact.hidden))
    )
    assert (grad.double() - wanted).norm() <= 2**-8 * wanted.norm()


def test_micro_batches_add_up_to_the_batch():
    case = make_case(5, 0.4)
    whole = fused(case, 2.0, "forward")
    parts = []
    for rows in (slice(0, 3), slice(3, N)):
        names = ("hidden", "labels", "ids", "probs", "tail", "coefficients")
        part = case._replace(**{name: getattr(case, name)[rows] for name in names})
        parts.append(fused(part, 2.0, "forward", num_target_tokens=N - 1).loss)
    assert sum(parts).item() == pytest.approx(whole.loss.item(), rel=1e-13)


def test_ignored_rows_may_hold_anything():
    case = make_case(5, 0.4)
    expected = fused(case, 2.0, "forward").loss
    ignored = (case.labels == -100)[:, None]
    anything = case._replace(coefficients=case.coefficients.masked_fill(ignored, math.nan))
    assert fused(anything, 2.0, "forward").loss.item() == expected.item()


def test_sketch_of_a_cache_makes_the_logits_that_the_loss_takes():
    random = np.random.default_rng(0)
    offset, basis, coefficients = (random.normal(size=size).astype(np.float32) for size in (V, (V, R), (N, R)))
    for softcap, temperature in itertools.product((None, 2.0), TEMPERATURES):
        sketch = TailSketch(offset, basis, softcap)
        assert sketch.rank == SketchHead.of_cache(sketch).rank == R
        logits = sketch.logits(coefficients)
        assert logits.dtype == np.float32
        head = SketchHead.of_cache(sketch)
        tails = SketchedTails.of(torch.from_numpy(coefficients), head, temperature, V, torch.float32)
        found = tails.write_(torch.empty(N, V)).numpy()
        np.testing.assert_allclose(found * temperature, logits, rtol=1e-5, atol=1e-5)
        exact = coefficients.astype(np.float64) @ basis.T + offset
        np.testing.assert_allclose(logits, exact if softcap is None else softcap * np.tanh(exact / softcap), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sketch": None}, "sketch: none with tail 'sketch', expected both"),
        ({"coefficients_NR": None}, "coefficients_NR: none with tail 'sketch', expected both"),
        ({"tail": "ghost"}, "coefficients_NR: given with tail 'ghost', expected both .* neither with another"),
        ({"coefficients_NR": lambda x: x[:, :2]}, r"coefficients_NR: shape \(7, 2\).*\(7, 3\)"),
        ({"coefficients_NR": lambda x: x[1:]}, r"coefficients_NR: shape \(6, 3\).*\(7, 3\)"),
        ({"coefficients_NR": lambda x: x.long()}, "torch.int64; expected"),
        ({"coefficients_NR": lambda x: x * math.nan}, "coefficients_NR: holds values from nan to nan, expected finite"),
        ({"coefficients_NR": lambda x: x.to("meta")}, "coefficients_NR: on meta, expected cpu"),
        ({"vocab_size": ROWS}, "sketch: of a vocabulary of 17, expected at least vocab_size, 20"),
    ],
)
def test_inputs_that_do_not_fit_are_named(changes, message):
    case = make_case(5, 0.4)
    arguments = {"vocab_size": V, "coefficients_NR": case.coefficients, "tail": "sketch"}
    arguments["sketch"] = SketchHead.of(case.offset[:V], case.basis[:V])
    arguments.update({name: new(arguments[name]) if callable(new) else new for name, new in changes.items()})
    with pytest.raises(ValueError, match=message):
        fused_distillation_loss(*case[:6], **arguments)


def test_sketches_that_are_none_are_named():
    with pytest.raises(ValueError, match=r"offset_V of shape \(4,\) and basis_VR of \(5, 2\), expected"):
        SketchHead.of(torch.zeros(4), torch.zeros(5, 2))
    with pytest.raises(ValueError, match="not finite"):
        SketchHead.of(torch.zeros(5), torch.full((5, 2), math.inf))
    with pytest.raises(ValueError, match="softcap of 0"):
        SketchHead.of(torch.zeros(5), torch.zeros(5, 2), 0.0)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_kernel_of_a_gpu_is_for_the_forward_kl_alone(monkeypatch, divergence):
    asked = []

    def kernel(logits, labels, targets, settings, weights, gradient, tail):
        asked.append(len(labels))
        gradient.zero_()
        return logits.new_zeros(len(labels)), logits.new_zeros(len(labels))

    case = make_case(5, 0.4)
    expected = fused(case, 2.0, divergence).loss.item()
    monkeypatch.setattr(fused_head, "_row_kernel", lambda logits: kernel)
    found = fused(case, 2.0, divergence).loss.item()
    assert (asked, found) == ([N - 1], 0.0) if divergence == "forward" else ([], expected)
