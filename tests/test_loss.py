"""The fused loss against plain float64 autograd over dense logits, written from the formulas of the policies."""

import contextlib
import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from stages.train_student import fused_head
from stages.train_student.divergences import DIVERGENCES, OUTCOME_DIVERGENCES
from stages.train_student.loss import distillation_loss, fused_distillation_loss
from stages.train_student.loss_settings import LossSettings
from stages.train_student.row_loss import distillation_rows_
from stages.train_student.sketch import SketchHead
from stages.train_student.tails import DIVERGING_TAILS, TAILS
from stages.train_student.targets import DistillationTargets, TeacherTargets
from tests.support.rounding import UNIT

STORED_TAILS = tuple(name for name, tail in TAILS.items() if not tail.is_drawn and not tail.is_sketched)
"""Without draws, of which this file's cases have none; test_sketch_loss.py has those with a sketch."""
ROOT = Path(__file__).parent.parent
TEMPERATURES = (1.0, 2.0, 3.7)
ALPHAS = (0.0, 0.3, 1.0)
FLOAT64_ERROR = 1e-11


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Matrices this small spend their time handing work between threads where cores are shared: ten times as long."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def dense_kl_rows(logits, ids, probs, tail_mass, temperature, tail):
    """KL(p_T || q_T) of every row under the policy, from a dense log-softmax; rows have no padding slots."""
    vocab_size, k = logits.shape[1], ids.shape[1]
    logprobs = torch.log_softmax(logits / temperature, 1)
    stored = torch.zeros_like(logits).scatter(1, ids, 1.0) > 0
    if tail == "renormalise":
        probs = probs / probs.sum(1, keepdim=True)
    kl = torch.special.xlogy(probs, probs).sum(1) - (probs * logprobs.gather(1, ids)).sum(1)
    if tail == "ghost" and k < vocab_size:
        rest_logprob = torch.logsumexp(logprobs.masked_fill(stored, -math.inf), 1)
        kl = kl + torch.special.xlogy(tail_mass, tail_mass) - tail_mass * rest_logprob
    if tail == "uniform" and k < vocab_size:
        level = tail_mass / (vocab_size - k)
        kl = kl + torch.special.xlogy(tail_mass, level) - level * logprobs.masked_fill(stored, 0.0).sum(1)
    return kl


def dense_loss(hidden, weight, labels, ids, probs, tail_mass, alpha, temperature, tail):
    """loss, cross_entropy and kl as means over the labels that are not -100."""
    rows = labels != -100
    logits = (hidden @ weight.T)[rows]
    cross_entropy = -torch.log_softmax(logits, 1).gather(1, labels[rows, None]).mean()
    kl = dense_kl_rows(logits, ids[rows], probs[rows], tail_mass[rows], temperature, tail).mean()
    return (1 - alpha) * cross_entropy + alpha * temperature**2 * kl, cross_entropy, kl


def make_case(num_tokens=6, hidden_size=4, vocab_size=17, k=5, temperature=2.0, ignored=(2,), seed=0):
    """Student and targets in float64: (hidden, weight, labels, ids, probs, tail_mass)."""
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    hidden = torch.randn(num_tokens, hidden_size, **options).requires_grad_()
    weight = torch.randn(vocab_size, hidden_size, **options).requires_grad_()
    labels = torch.randint(0, vocab_size, (num_tokens,), generator=generator)
    teacher = torch.softmax(2 * torch.randn(num_tokens, vocab_size, **options) / temperature, 1)
    ids = teacher.topk(k, 1).indices
    labels[0] = ids[0, -1]  # a label among the stored ids
    labels[1] = teacher[1].argmin()
    labels[list(ignored)] = -100
    stored = torch.zeros_like(teacher).scatter(1, ids, 1.0) > 0
    return hidden, weight, labels, ids, teacher.gather(1, ids), teacher.masked_fill(stored, 0.0).sum(1)


def gradients(loss, hidden, weight):
    return torch.autograd.grad(loss, (hidden, weight))


def relative_error(found, expected):
    return ((found.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def assert_matches_dense(case, alpha, temperature, tail, **extras):
    fused = fused_distillation_loss(*case, alpha=alpha, temperature=temperature, tail=tail, **extras)
    dense = dense_loss(*case, alpha, temperature, tail)
    for found, expected in zip(fused, dense):
        assert found.dtype == torch.float64
        assert abs(found.item() - expected.item()) <= FLOAT64_ERROR * max(1.0, abs(expected.item()))
    for found, expected in zip(gradients(fused.loss, *case[:2]), gradients(dense[0], *case[:2])):
        torch.testing.assert_close(found, expected, rtol=FLOAT64_ERROR, atol=FLOAT64_ERROR)


@pytest.mark.parametrize("k", [1, 5, 16, 17])
@pytest.mark.parametrize("tail", STORED_TAILS)
def test_values_and_gradients_match_dense_autograd(tail, k):
    for temperature, alpha in itertools.product((*TEMPERATURES, 0.7), ALPHAS):
        assert_matches_dense(make_case(k=k, temperature=temperature), alpha, temperature, tail)


@pytest.mark.parametrize("tail", STORED_TAILS)
def test_whole_vocabulary_equals_dense_kl_div(tail):
    hidden, weight, labels, ids, probs, tail_mass = make_case(k=17)
    assert tail_mass.count_nonzero() == 0
    teacher = torch.zeros(6, 17, dtype=torch.float64).scatter(1, ids, probs)
    rows = labels != -100
    logprobs = torch.log_softmax((hidden @ weight.T)[rows] / 2.0, 1)
    expected = torch.nn.functional.kl_div(logprobs, teacher[rows], reduction="batchmean")
    fused = fused_distillation_loss(hidden, weight, labels, ids, probs, tail_mass, alpha=1.0, tail=tail)
    assert fused.kl.item() == pytest.approx(expected.item(), rel=1e-12)
    for found, wanted in zip(gradients(fused.loss, hidden, weight), gradients(4 * expected, hidden, weight)):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("k", [5, 17])
@pytest.mark.parametrize("tail", STORED_TAILS)
def test_gradcheck(tail, k):
    for temperature, alpha in itertools.product(TEMPERATURES, ALPHAS):
        hidden, weight, *rest = make_case(num_tokens=3, hidden_size=2, k=k, temperature=temperature)
        assert torch.autograd.gradcheck(
            lambda h, w, rest=rest, alpha=alpha, temperature=temperature: (
                fused_distillation_loss(h, w, *rest, alpha=alpha, temperature=temperature, tail=tail).loss
            ),
            (hidden, weight),
        )


@pytest.mark.parametrize("tail", STORED_TAILS)
@pytest.mark.parametrize("rows_a_chunk", [1, 2, 3, 4, 100])
def test_chunks_do_not_change_the_result(tail, rows_a_chunk):
    assert_matches_dense(make_case(num_tokens=7), 0.3, 2.0, tail, chunk_bytes=rows_a_chunk * 17 * 8)


def test_blocks_of_rows_do_not_change_the_result(monkeypatch):
    monkeypatch.setattr("stages.train_student.fused_head.BLOCK_BYTES", {"cpu": 2 * 17 * 8})
    for tail, temperature in itertools.product(STORED_TAILS, TEMPERATURES):
        assert_matches_dense(make_case(num_tokens=7), 0.3, temperature, tail, chunk_bytes=5 * 17 * 8)


def case_in(dtype):
    """Seven tokens of `make_case` whose student is in another dtype."""
    hidden, weight, *rest = make_case(num_tokens=7)
    return *(tensor.detach().to(dtype).requires_grad_() for tensor in (hidden, weight)), *rest


def as_on_a_gpu(monkeypatch):
    """Products that read bfloat16 and write float32, which no CPU has, and rows with padding behind them."""

    def product(left, right, out, scale, *, accumulate):
        wide = scale * (left.float() @ right.float())
        out.copy_(out + wide if accumulate else wide)

    monkeypatch.setattr("stages.train_student.loss.product_dtype", lambda hidden: torch.bfloat16)
    monkeypatch.setattr(fused_head, "_product", product)
    monkeypatch.setitem(fused_head.ROW_ALIGNMENT, "cpu", 16)


def narrow_kernel(logits, labels, targets, settings, weights, gradient, tail):
    """What the row kernel promises, by the torch path: the gradient takes the place of the logits."""
    rows = logits.clone(memory_format=torch.contiguous_format)
    values = distillation_rows_(rows, labels, targets, settings, weights, torch.empty_like(rows), tail)
    assert gradient.data_ptr() == logits.data_ptr()
    assert gradient.stride(0) * gradient.itemsize == logits.stride(0) * logits.itemsize
    torch.as_strided(logits, (len(logits), logits.stride(0)), logits.stride()).fill_(torch.nan)
    gradient.copy_(rows)
    return values


@pytest.mark.parametrize("tail", STORED_TAILS)
def test_gradient_in_the_place_of_the_logits_is_the_rounded_one(monkeypatch, tail):
    """17 columns in rows of 32, in chunks of which the last is smaller."""
    as_on_a_gpu(monkeypatch)
    found = []
    for kernel in (None, narrow_kernel):
        monkeypatch.setattr(fused_head, "_row_kernel", lambda logits, kernel=kernel: kernel)
        hidden, weight, *rest = case_in(torch.bfloat16)
        loss = fused_distillation_loss(hidden, weight, *rest, tail=tail, chunk_bytes=3 * 32 * 4)
        loss.loss.backward()
        found.append((loss.loss.detach(), hidden.grad, weight.grad))
    for first, second in zip(*found):
        assert torch.equal(first, second)
        assert first.abs().sum() > 0


@pytest.mark.parametrize("kind", [*({"tail": tail} for tail in STORED_TAILS), {"divergence": "js"}])
def test_padding_behind_the_rows_changes_no_bit(monkeypatch, kind):
    found = []
    for alignment in (1, 16):
        monkeypatch.setitem(fused_head.ROW_ALIGNMENT, "cpu", alignment)
        hidden, weight, *rest = case_in(torch.float32)
        loss = fused_distillation_loss(hidden, weight, *rest, logit_softcap=2.0, chunk_bytes=3 * 32 * 4, **kind)
        loss.loss.backward()
        found.append((*loss, hidden.grad, weight.grad))
    for first, second in zip(*found):
        assert torch.equal(first, second)


@pytest.mark.parametrize("tail", STORED_TAILS)
def test_padding_rows_of_the_head_take_no_part(tail):
    hidden, weight, *rest = make_case()
    padded = torch.cat([weight.detach(), torch.full((3, 4), 50.0, dtype=torch.float64)]).requires_grad_()
    expected = fused_distillation_loss(hidden, weight, *rest, tail=tail)
    found = fused_distillation_loss(hidden, padded, *rest, tail=tail, vocab_size=17)
    assert found.loss.item() == expected.loss.item()
    grad_hidden, grad_weight = gradients(found.loss, hidden, padded)
    expected_hidden, expected_weight = gradients(expected.loss, hidden, weight)
    torch.testing.assert_close(grad_hidden, expected_hidden, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(grad_weight[:17], expected_weight, rtol=1e-13, atol=1e-13)
    assert grad_weight[17:].count_nonzero() == 0


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("tail", STORED_TAILS)
def test_padding_slots_repeat_slot_0(tail, temperature):
    hidden, weight, labels, ids, probs, tail_mass = make_case(temperature=temperature)
    padded_ids = torch.cat([ids, ids[:, :1].expand(-1, 3)], 1)
    padded_probs = torch.cat([probs, torch.zeros(6, 3, dtype=torch.float64)], 1)
    labels[3] = ids[3, 0]  # the label is the repeated id
    expected = fused_distillation_loss(hidden, weight, labels, ids, probs, tail_mass, 0.3, temperature, tail)
    found = fused_distillation_loss(hidden, weight, labels, padded_ids, padded_probs, tail_mass, 0.3, temperature, tail)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-13)
    pairs = zip(gradients(found.loss, hidden, weight), gradients(expected.loss, hidden, weight))
    for grad, expected_grad in pairs:
        torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-13)


def test_ignored_rows_have_no_gradient_and_may_hold_anything():
    hidden, weight, labels, ids, probs, tail_mass = make_case(ignored=(0, 2, 5))
    expected = fused_distillation_loss(hidden, weight, labels, ids, probs, tail_mass)
    ignored = labels == -100
    found = fused_distillation_loss(
        hidden,
        weight,
        labels,
        ids.masked_fill(ignored[:, None], -1),
        probs.masked_fill(ignored[:, None], math.nan),
        tail_mass.masked_fill(ignored, math.nan),
    )
    assert found.loss.item() == expected.loss.item()
    assert gradients(found.loss, hidden, weight)[0][ignored].count_nonzero() == 0
    other_index = fused_distillation_loss(
        hidden, weight, labels.masked_fill(ignored, 3), ids, probs, tail_mass, ignore_index=3
    )
    rows = ~ignored & (labels != 3)
    alone = fused_distillation_loss(hidden[rows], weight, labels[rows], ids[rows], probs[rows], tail_mass[rows])
    assert other_index.loss.item() == pytest.approx(alone.loss.item(), rel=1e-13)


@pytest.mark.parametrize("num_target_tokens", [None, 0, 12])
def test_batch_without_target_tokens_is_zero_and_keeps_the_graph(num_target_tokens):
    hidden, weight, *rest = make_case(ignored=range(6))
    out = fused_distillation_loss(hidden, weight, *rest, num_target_tokens=num_target_tokens)
    assert [value.item() for value in out] == [0.0, 0.0, 0.0]
    for gradient in gradients(out.loss, hidden, weight):
        assert torch.equal(gradient, torch.zeros_like(gradient))


STUDENTS = {"certain of a stored id": (0, 200.0), "certain of another id": (1, 200.0), "torn": (2, 0.0)}


@pytest.mark.parametrize("tail_mass", [0.0, 1e-9, 0.3])
@pytest.mark.parametrize("student", [*STUDENTS, "uniform"])
@pytest.mark.parametrize("tail", STORED_TAILS)
def test_extreme_logits_stay_exact_in_float32(tail, student, tail_mass):
    vocab_size, k = 50, 4
    rounding = (vocab_size + 8) * UNIT  # of a sum in the worst order, and of what is done to its terms
    for temperature, alpha in itertools.product(TEMPERATURES, (0.3, 1.0)):
        logits = torch.zeros(3, vocab_size, dtype=torch.float64)
        if student != "uniform":
            column, level = STUDENTS[student]
            logits += torch.linspace(-1, 1, vocab_size, dtype=torch.float64) - level
            logits[:, column] = 200.0  # the stored ids are 0, 10, 20 and 30
        ids = torch.tensor([[0, 10, 20, 30]]).expand(3, k)
        probs = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64).expand(3, k) * (1 - tail_mass)
        tails = torch.full((3,), tail_mass, dtype=torch.float64)
        labels, eye = torch.tensor([0, 1, 49]), torch.eye(vocab_size, dtype=torch.float64)
        logits = logits.float().double().requires_grad_()
        expected = dense_loss(logits, eye, labels, ids, probs.float().double(), tails, alpha, temperature, tail)
        hidden = logits.detach().float().requires_grad_()
        found = fused_distillation_loss(
            hidden, eye.float(), labels, ids, probs.float(), tails.float(), alpha, temperature, tail
        )
        for value, expected_value in zip(found, expected):
            assert value.dtype == torch.float32
            assert abs(value.item() - expected_value.item()) <= rounding * max(1.0, abs(expected_value.item()))
        (grad,) = torch.autograd.grad(found.loss, hidden)
        (expected_grad,) = torch.autograd.grad(expected[0], logits)
        assert (grad.double() - expected_grad).abs().max() <= rounding


def test_small_student_tail_is_a_sum_and_not_a_difference():
    """Off S the gradient of ghost is (1 - Q - t) softmax_rest: with 1 - Q = 1e-8 float32 subtraction leaves noise."""
    logits = torch.tensor([[30.0, 29.0, 11.0, 10.0, 10.5]], dtype=torch.float64, requires_grad=True)
    ids, tail_mass = torch.tensor([[0, 1]]), torch.tensor([1e-9], dtype=torch.float64)
    probs = torch.tensor([[0.7, 0.3]], dtype=torch.float64)
    label, eye = torch.tensor([0]), torch.eye(5, dtype=torch.float64)
    expected = dense_loss(logits, eye, label, ids, probs, tail_mass, 1.0, 1.0, "ghost")[0]
    hidden = logits.detach().float().requires_grad_()
    found = fused_distillation_loss(hidden, eye.float(), label, ids, probs, tail_mass, 1.0, 1.0, "ghost").loss
    tail_grad = torch.autograd.grad(found, hidden)[0][0, 2:].double()
    rounding = 8 * 20 * UNIT  # exponents and logarithms of up to 20, to and fro
    torch.testing.assert_close(tail_grad, torch.autograd.grad(expected, logits)[0][0, 2:], rtol=rounding, atol=0)


@pytest.mark.parametrize("tail", STORED_TAILS)
def test_bfloat16_error_is_that_of_the_inputs_not_of_the_loss(tail):
    """Both errors are measured from float64 over the same rounded inputs; naive is autograd in bfloat16."""
    case = make_case(num_tokens=64, hidden_size=32, vocab_size=512, k=16)
    hidden, weight = (tensor.detach().to(torch.bfloat16).requires_grad_() for tensor in case[:2])
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    truth = dense_loss(*exact, *case[2:], 0.5, 2.0, tail)[0]
    low = [case[4].to(torch.bfloat16), case[5].to(torch.bfloat16)]
    naive = dense_loss(hidden, weight, *case[2:4], *low, 0.5, 2.0, tail)[0]
    fused = fused_distillation_loss(hidden, weight, *case[2:], tail=tail)
    assert {value.dtype for value in fused} == {torch.float32}
    off = 32 * UNIT * (exact[0].abs() @ exact[1].abs().T).max().item()  # of a logit, in the worst order
    # It enters a cross-entropy twice, and the KL at T = 2 as often, over T; the weights are 1/2 and T^2 / 2.
    assert abs(fused.loss.item() - truth.item()) <= 3 * off + (512 + 8) * UNIT * truth.item()
    pairs = zip(gradients(fused.loss, hidden, weight), gradients(naive, hidden, weight), gradients(truth, *exact))
    for found, naive_grad, expected in pairs:
        assert found.dtype == torch.bfloat16
        rounding = relative_error(expected.to(torch.bfloat16), expected)
        assert relative_error(found, expected) <= min(1.5 * rounding, 0.5 * relative_error(naive_grad, expected))


def test_micro_batches_add_up_to_the_batch():
    hidden, weight, *rest = make_case(num_tokens=8, ignored=(1, 2, 6))
    whole = fused_distillation_loss(hidden, weight, *rest)
    expected = gradients(whole.loss, hidden, weight)
    for num_target_tokens in (5, 5.0, torch.tensor(5)):
        parts = [
            fused_distillation_loss(
                hidden[rows], weight, *(part[rows] for part in rest), num_target_tokens=num_target_tokens
            )
            for rows in (slice(start, start + 2) for start in range(0, 8, 2))
        ]
        for field in range(3):
            assert sum(part[field] for part in parts).item() == pytest.approx(whole[field].item(), rel=1e-13)
        for found, wanted in zip(gradients(sum(part.loss for part in parts), hidden, weight), expected):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest storage that any operation returned, but for views of `inputs`."""

    def __init__(self, inputs):
        super().__init__()
        self.inputs = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        self.num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.inputs:
                self.num_elements = max(self.num_elements, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return result


def largest_tensor(function, inputs):
    with LargestTensor(inputs) as recorder:
        function()
    return recorder.num_elements


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tail", STORED_TAILS)
def test_no_tensor_grows_with_tokens_times_vocabulary(tail, dtype):
    vocab_size, hidden_size, rows_a_chunk = 1000, 8, 16
    limit = max(rows_a_chunk * vocab_size, vocab_size * hidden_size)
    for num_tokens in (64, 128, 256):
        case = make_case(num_tokens, hidden_size, vocab_size, k=4)
        hidden, weight = (tensor.detach().to(dtype).requires_grad_() for tensor in case[:2])

        def step(hidden=hidden, weight=weight, case=case):
            chunk_bytes = rows_a_chunk * vocab_size * 4
            fused_distillation_loss(hidden, weight, *case[2:], tail=tail, chunk_bytes=chunk_bytes).loss.backward()

        assert largest_tensor(step, [hidden, weight]) <= limit
    dense = largest_tensor(lambda: dense_loss(*case, 0.5, 2.0, tail)[0].backward(), case)
    assert dense >= (num_tokens - 1) * vocab_size  # the measurement can fail


def test_no_grad_allocates_nothing_for_gradients():
    case = make_case(num_tokens=3, hidden_size=64, vocab_size=1000, k=4)
    with torch.no_grad():
        assert largest_tensor(lambda: fused_distillation_loss(*case), case) <= 3 * 1000
        out = fused_distillation_loss(*case)
    assert not out.loss.requires_grad
    assert out.loss.item() == fused_distillation_loss(*case).loss.item()


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("tail", ["ghost", "uniform"])
def test_student_that_equals_the_teacher_has_no_kl_and_no_gradient(tail, temperature):
    hidden, weight, labels, *_ = make_case()
    with torch.no_grad():
        probs = torch.softmax(hidden @ weight.T / temperature, 1)
    k = 5 if tail == "ghost" else 17
    ids = probs.topk(k, 1).indices
    tail_mass = probs.scatter(1, ids, 0.0).sum(1)
    out = fused_distillation_loss(hidden, weight, labels, ids, probs.gather(1, ids), tail_mass, 1.0, temperature, tail)
    assert abs(out.kl.item()) < 1e-14
    for gradient in gradients(out.loss, hidden, weight):
        assert gradient.abs().max() < 1e-14


@pytest.mark.parametrize("temperature", [2.0, 4.0])
def test_temperature_squared_is_in_the_value_and_in_the_gradient(temperature):
    """At the logits, d(T^2 KL) = T (q - p): a gradient without T^2 is (q - p) / T."""
    _, _, _, ids, probs, tail_mass = make_case(k=17, ignored=(), temperature=temperature)
    logits = torch.randn(6, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    eye, labels = torch.eye(17, dtype=torch.float64), torch.zeros(6, dtype=torch.long)
    out = fused_distillation_loss(logits, eye, labels, ids, probs, tail_mass, 1.0, temperature)
    assert out.loss.item() == pytest.approx(temperature**2 * out.kl.item(), rel=1e-14)
    teacher = torch.zeros(6, 17, dtype=torch.float64).scatter(1, ids, probs)
    expected = temperature * (torch.softmax(logits.detach() / temperature, 1) - teacher) / 6
    torch.testing.assert_close(torch.autograd.grad(out.loss, logits)[0], expected, rtol=1e-11, atol=1e-13)


def test_alpha_0_needs_no_targets():
    hidden, weight, labels, *targets = make_case()
    alone = fused_distillation_loss(hidden, weight, labels, None, None, None, alpha=0.0)
    with_targets = fused_distillation_loss(hidden, weight, labels, *targets, alpha=0.0)
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, labels)
    expected_gradients = gradients(expected, hidden, weight)
    assert alone.kl.isnan()
    assert with_targets.kl > 0
    for out in (alone, with_targets):
        assert out.loss.item() == pytest.approx(expected.item(), rel=1e-13)
        assert out.cross_entropy.item() == out.loss.item()
        for found, wanted in zip(gradients(out.loss, hidden, weight), expected_gradients):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)


def test_gradient_is_scaled_by_what_follows_the_loss():
    hidden, weight, *rest = make_case()
    expected = gradients(fused_distillation_loss(hidden, weight, *rest).loss, hidden, weight)
    out = fused_distillation_loss(hidden, weight, *rest)
    for factor in (3.0, 0.5):  # a retained graph gives the gradient again
        found = torch.autograd.grad(out.loss * factor, (hidden, weight), retain_graph=True)
        torch.testing.assert_close(found, tuple(factor * gradient for gradient in expected))


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_input_gets_no_gradient(frozen):
    case = make_case()
    expected = gradients(fused_distillation_loss(*case).loss, *case[:2])[1 - frozen]
    case[frozen].requires_grad_(False)
    fused_distillation_loss(*case).loss.backward()
    assert case[frozen].grad is None
    torch.testing.assert_close(case[1 - frozen].grad, expected)


def test_second_backward_is_an_error():
    hidden, weight, *rest = make_case()
    out = fused_distillation_loss(hidden.detach().float().requires_grad_(), weight.detach().float(), *rest)
    out.loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.loss.backward()


def test_create_graph_is_an_error():
    hidden, weight, *rest = make_case()
    with pytest.raises(RuntimeError, match="create_graph=True, expected first derivatives only"):
        torch.autograd.grad(fused_distillation_loss(hidden, weight, *rest).loss, hidden, create_graph=True)


def test_metrics_are_detached():
    out = fused_distillation_loss(*make_case())
    assert out.loss.requires_grad
    assert not out.cross_entropy.requires_grad
    assert not out.kl.requires_grad


def dense_divergence_rows(logits, ids, probs, tail_mass, temperature, divergence):
    """Reverse KL or Jensen-Shannon over the stored ids and one bucket, by plain autograd."""
    logprobs = torch.log_softmax(logits / temperature, 1)
    stored = torch.zeros_like(logits).scatter(1, ids, 1.0) > 0
    log_q, log_p, p = logprobs.gather(1, ids), probs.log(), probs
    if ids.shape[1] < logits.shape[1]:
        log_q = torch.cat([log_q, torch.logsumexp(logprobs.masked_fill(stored, -math.inf), 1, keepdim=True)], 1)
        p = torch.cat([probs, tail_mass[:, None]], 1)
        log_p = p.clamp_min(1e-300).log()
    q = log_q.exp()
    if divergence == "reverse":
        return (q * (log_q - log_p)).sum(1)
    log_mean = ((p + q) / 2).log()
    return ((p * (log_p - log_mean)).sum(1) + (q * (log_q - log_mean)).sum(1)) / 2


@pytest.mark.parametrize("k", [1, 5, 17])
@pytest.mark.parametrize("divergence", OUTCOME_DIVERGENCES)
def test_other_divergences_match_dense_autograd(divergence, k):
    for temperature, alpha in itertools.product((*TEMPERATURES, 0.7), (0.3, 1.0)):
        case = hidden, weight, labels, *targets = make_case(k=k, temperature=temperature)
        rows = labels != -100
        logits = (hidden @ weight.T)[rows]
        cross_entropy = torch.nn.functional.cross_entropy(logits, labels[rows])
        args = (target[rows] for target in targets)
        expected = dense_divergence_rows(logits, *args, temperature, divergence).mean()
        loss = (1 - alpha) * cross_entropy + alpha * temperature**2 * expected
        found = fused_distillation_loss(*case, alpha=alpha, temperature=temperature, divergence=divergence)
        assert found.kl.item() == pytest.approx(expected.item(), rel=1e-11)
        for grad, wanted in zip(gradients(found.loss, hidden, weight), gradients(loss, hidden, weight)):
            torch.testing.assert_close(grad, wanted, rtol=FLOAT64_ERROR, atol=FLOAT64_ERROR)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergence_on_the_bucket_is_a_lower_bound_of_the_full_one(divergence):
    """Against the whole vocabulary: never above, equal for k = V, and the same gradient on the stored ids' side."""
    _, _, labels, *_ = make_case(ignored=())
    generator = torch.Generator().manual_seed(3)
    logits, teacher = (2 * torch.randn(6, 17, dtype=torch.float64, generator=generator) for _ in range(2))
    p, eye = torch.softmax(teacher / 2, 1), torch.eye(17, dtype=torch.float64)
    values = []
    for k in (1, 2, 5, 9, 17):
        probs, ids = p.topk(k, 1)
        tail = p.scatter(1, ids, 0.0).sum(1)
        out = fused_distillation_loss(logits, eye, labels, ids, probs, tail, 1.0, 2.0, divergence=divergence)
        values.append(out.kl.item())
    log_p, log_q = p.log(), torch.log_softmax(logits / 2, 1)
    q, mean = log_q.exp(), (p + log_q.exp()) / 2
    full = {
        "forward": (p * (log_p - log_q)).sum(1),
        "reverse": (q * (log_q - log_p)).sum(1),
        "js": ((p * (log_p - mean.log())).sum(1) + (q * (log_q - mean.log())).sum(1)) / 2,
    }[divergence]
    assert values == sorted(values)
    assert values[-1] == pytest.approx(full.mean().item(), rel=1e-12)


@pytest.mark.parametrize("tail_mass", [0.0, 1e-9, 0.3])
@pytest.mark.parametrize("student", [*STUDENTS, "uniform"])
@pytest.mark.parametrize("divergence", OUTCOME_DIVERGENCES)
def test_other_divergences_stay_exact_in_float32(divergence, student, tail_mass):
    vocab_size, k = 50, 4
    for temperature in TEMPERATURES:
        logits = torch.zeros(3, vocab_size, dtype=torch.float64)
        if student != "uniform":
            column, level = STUDENTS[student]
            logits += torch.linspace(-1, 1, vocab_size, dtype=torch.float64) - level
            logits[:, column] = 200.0
        logits = logits.float().double().requires_grad_()
        ids = torch.tensor([[0, 10, 20, 30]]).expand(3, k)
        probs = (torch.tensor([0.5, 0.3, 0.15, 0.05]).double() * (1 - tail_mass)).expand(3, k).float()
        tails = torch.full((3,), tail_mass)
        smallest = torch.finfo(torch.float32).tiny  # what a probability of 0 counts as
        in_64 = (probs.double(), tails.double().clamp_min(smallest))
        expected = dense_divergence_rows(logits, ids, *in_64, temperature, divergence).mean()
        hidden, labels, eye = logits.detach().float().requires_grad_(), torch.tensor([0, 1, 49]), torch.eye(vocab_size)
        found = fused_distillation_loss(hidden, eye, labels, ids, probs, tails, 1.0, temperature, divergence=divergence)
        assert abs(found.kl.item() - expected.item()) <= 2e-6 * max(1.0, abs(expected.item()))
        (grad,) = torch.autograd.grad(found.loss, hidden)
        (wanted,) = torch.autograd.grad(temperature**2 * expected, logits)
        assert (grad.double() - wanted).abs().max() <= 2e-6 * max(1.0, wanted.abs().max())


@pytest.mark.parametrize("tail", STORED_TAILS)
@pytest.mark.parametrize(("scale", "softcap"), [(0.25, None), (1.0, 1.5), (3.0, 2.0)])
def test_scaled_and_capped_logits_match_dense_autograd(tail, scale, softcap):
    for temperature, chunk_bytes in itertools.product(TEMPERATURES, (3 * 17 * 8, 10**6)):
        hidden, weight, labels, *targets = make_case(num_tokens=8, temperature=temperature)
        logits = scale * hidden @ weight.T
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        eye = torch.eye(17, dtype=torch.float64)
        dense = dense_loss(logits, eye, labels, *targets, 0.4, temperature, tail)
        extras = {"logit_scale": scale, "logit_softcap": softcap, "chunk_bytes": chunk_bytes}
        found = fused_distillation_loss(hidden, weight, labels, *targets, 0.4, temperature, tail, **extras)
        for value, expected in zip(found, dense):
            assert value.item() == pytest.approx(expected.item(), rel=1e-11)
        for grad, wanted in zip(gradients(found.loss, hidden, weight), gradients(dense[0], hidden, weight)):
            torch.testing.assert_close(grad, wanted, rtol=FLOAT64_ERROR, atol=FLOAT64_ERROR)


@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.5, 2.0)])
def test_adapter_of_the_head_equals_the_merged_head(scale, softcap, frozen_head):
    hidden, weight, *rest = make_case(num_tokens=8)
    generator = torch.Generator().manual_seed(1)
    down, up = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((2, 4), (17, 2)))
    leaves = [hidden, down.requires_grad_(), up.requires_grad_(), *([] if frozen_head else [weight])]
    weight.requires_grad_(not frozen_head)
    extras = {"logit_scale": scale, "logit_softcap": softcap, "chunk_bytes": 3 * 17 * 8}
    expected = fused_distillation_loss(hidden, weight + 0.7 * up @ down, *rest, **extras)
    found = fused_distillation_loss(hidden, weight, *rest, **extras, adapter=(0.7 * hidden @ down.T, up))
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)
    grads = (torch.autograd.grad(out.loss, leaves) for out in (found, expected))
    for grad, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-11, atol=1e-12)


def test_frozen_head_with_an_adapter_makes_no_gradient_of_the_head():
    hidden, weight, *rest = make_case(num_tokens=3, hidden_size=64, vocab_size=1000, k=4)
    weight.requires_grad_(False)
    adapter = (torch.ones(3, 2, dtype=torch.float64), torch.ones(1000, 2, dtype=torch.float64).requires_grad_())
    inputs = [hidden, weight, *adapter]
    step = lambda: fused_distillation_loss(hidden, weight, *rest, adapter=adapter).loss.backward()  # noqa: E731
    assert largest_tensor(step, inputs) <= 3 * 1000


NAMES = ("hidden_NH", "head_weight_VH", "labels_N", "ids_NK", "probs_NK", "tail_mass_N")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tail": "gost"}, "'gost'.*ghost, hybrid, sampled, zero, renormalise, uniform, sketch"),
        ({"alpha": 1.5}, "alpha: 1.5"),
        ({"divergence": "backward"}, "'backward'.*forward, reverse, js"),
        ({"divergence": "js", "tail": "zero"}, "'js' with tail 'zero', expected tail 'ghost' or 'sketch'"),
        ({"logit_scale": 0.0}, "logit_scale: 0.0"),
        ({"logit_softcap": -1.0}, "logit_softcap: -1.0"),
        ({"adapter": (torch.ones(6, 2), torch.ones(17, 3))}, r"adapter: shapes \(6, 2\) and \(17, 3\)"),
        ({"temperature": 0.0}, "temperature: 0.0"),
        ({"chunk_bytes": 0}, "chunk_bytes: 0"),
        ({"vocab_size": 18}, "vocab_size: 18, expected 1 to 17"),
        ({"num_target_tokens": 0}, "num_target_tokens: 0 with 5 target tokens"),
        ({"ids_NK": None, "probs_NK": None, "tail_mass_N": None}, "alpha: 0.5 without targets"),
        ({"tail_mass_N": None}, "2 of 3 given"),
        ({"hidden_NH": lambda x: x[:, :3]}, r"\(6, 3\).*\(17, 4\)"),
        ({"hidden_NH": lambda x: x.float()}, "float32.*float64"),
        ({"hidden_NH": lambda x: x.half()}, "float16.*bfloat16"),
        ({"labels_N": lambda x: x[1:]}, r"\(5,\).*\(6,\)"),
        ({"labels_N": lambda x: x + 17}, "labels_N: holds ids from -83 to .* expected 0 to 16"),
        ({"labels_N": lambda x: x.double()}, "labels_N: dtype torch.float64"),
        ({"ids_NK": lambda x: x[1:]}, r"\(5, 5\).*\(6, K\)"),
        ({"ids_NK": lambda x: x + 17}, "expected 0 to 16"),
        ({"ids_NK": lambda x: x - 17}, "expected 0 to 16"),
        ({"ids_NK": lambda x: x.double()}, "ids_NK: dtype torch.float64"),
        ({"ids_NK": lambda x: x[:, :1].expand(-1, 5)}, "repeated id carries probability"),
        ({"probs_NK": lambda x: x[:, 1:]}, r"\(6, 4\).*\(6, 5\)"),
        ({"probs_NK": lambda x: x.log()}, "probs_NK: .* have to be exponentiated"),
        ({"probs_NK": lambda x: x * math.nan}, "probs_NK: .*nan"),
        ({"tail_mass_N": lambda x: x[:, None]}, r"\(6, 1\).*\(6,\)"),
        ({"tail_mass_N": lambda x: x + 1}, "tail_mass_N: .*probabilities"),
        ({"tail_mass_N": lambda x: x.to("meta")}, "tail_mass_N: on meta, expected cpu"),
    ],
)
def test_inputs_that_do_not_fit_are_named(changes, message):
    arguments = dict(zip(NAMES, make_case()))
    arguments.update({name: new(arguments[name]) if callable(new) else new for name, new in changes.items()})
    with pytest.raises(ValueError, match=message):
        fused_distillation_loss(**arguments)


class Made(TorchDispatchMode):
    """Devices and types of all that any operation returned."""

    def __init__(self):
        super().__init__()
        self.devices, self.dtypes = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.devices.add(tensor.device.type)
                self.dtypes.add(tensor.dtype)
        return result


@pytest.fixture
def no_values(monkeypatch):
    """Tensors of the device "meta" in the place of a GPU's: they go its way, and whatever asks for a value is an error.

    Those of a FakeTensorMode say "cuda", but ask a torch that is built without it for its devices.
    """
    for sizes in (fused_head.DEFAULT_CHUNK_BYTES, fused_head.BLOCK_BYTES):
        monkeypatch.setitem(sizes, "meta", 4 * 17 * 4)
    monkeypatch.setitem(fused_head.ROW_ALIGNMENT, "meta", 16)
    monkeypatch.setattr(torch, "autocast", lambda device_type, enabled: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)
    return torch.device("meta")


KINDS_OF_LOSS = [{"tail": tail} for tail in TAILS]
KINDS_OF_LOSS += [{"tail": tail, "divergence": name} for tail in DIVERGING_TAILS for name in OUTCOME_DIVERGENCES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS_OF_LOSS, ids=str)
def test_a_step_on_a_gpu_waits_for_nothing_and_makes_nothing_elsewhere_or_in_float64(no_values, kind, dtype):
    settings = LossSettings(vocab_size=17, logit_scale=0.5, logit_softcap=3.0, temperature=3.0, **kind)
    options = {"device": no_values, "dtype": dtype}
    leaves = [torch.empty(*size, **options).requires_grad_() for size in ((6, 4), (20, 4), (6, 2), (20, 2))]
    teacher = torch.empty(6, 3, device=no_values)
    tail = TAILS[settings.tail]
    sketch = SketchHead(torch.empty(3, 32, device=no_values), 20, 2.0) if tail.is_sketched else None
    targets = DistillationTargets(
        labels_M=teacher[:, 0].long(),
        teacher=TeacherTargets(
            ids_MK=teacher.long(),
            probs_MK=teacher,
            tail_mass_M=teacher[:, 0],
            entropy_M=teacher[:, 0] if tail.is_drawn else None,
            coefficients_MR=teacher[:, :2] if tail.is_sketched else None,
            sketch=sketch,
        ),
    )
    with Made() as made:
        out = distillation_loss(*leaves[:2], targets, settings, adapter=tuple(leaves[2:]))
        out.loss.backward()
    assert made.devices == {"meta"}
    assert made.dtypes == {dtype, torch.float32, torch.int64, torch.bool}
    assert {value.dtype for value in out} == {torch.float32}
    assert [leaf.grad.dtype for leaf in leaves] == [dtype] * 4
    with pytest.raises(RuntimeError, match="meta"):  # the measurement can fail
        out.loss.item()


class Waits(TorchFunctionMode):
    """Counts what a GPU would be waited for."""

    NAMES = ("item", "tolist", "nonzero", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.NAMES:
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_tensors_of_any_origin_are_waited_for_thrice_and_checked_targets_never():
    hidden, weight, labels, ids, probs, tail_mass = make_case(ignored=())
    with Waits() as waits:
        expected = fused_distillation_loss(
            hidden, weight, labels, ids, probs, tail_mass, num_target_tokens=torch.tensor(6)
        ).loss
    assert waits.found == ["nonzero", "tolist", "__float__"]
    teacher = TeacherTargets(ids_MK=ids, probs_MK=probs, tail_mass_M=tail_mass)
    targets = DistillationTargets(labels_M=labels, teacher=teacher)
    with Waits() as waits:
        found = distillation_loss(hidden, weight, targets, LossSettings(vocab_size=17), num_target_tokens=6).loss
    assert waits.found == []
    assert found.item() == expected.item()


def test_targets_go_through_a_batch_and_keep_their_rows():
    _, _, labels, ids, probs, tail_mass = make_case(ignored=())
    teacher = TeacherTargets(ids_MK=ids, probs_MK=probs, tail_mass_M=tail_mass)
    targets = DistillationTargets(labels_M=labels, teacher=teacher)
    again = DistillationTargets.of_batch({**targets.as_batch(), "input_ids": labels})
    assert list(targets.as_batch()) == ["shift_labels", "teacher_ids", "teacher_probs", "teacher_tail"]
    assert again == targets
    part = targets.rows(slice(1, 3)).to("cpu")
    assert torch.equal(part.teacher.probs_MK, probs[1:3])
    assert part.teacher.entropy_M is None
    assert len(part) == 2


LACKING = """
import sys

class Lacking:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Lacking())
sys.argv = ["loss_gpu", {argument!r}]
import benchmarks.loss_gpu
benchmarks.loss_gpu.main()
"""
MISSING = (
    "zstandard",
    "numcodecs",
    "pcodec",
    "zarr",
    "msgspec",
    "obstore",
    "xxhash",
    "pyarrow",
    "psutil",
    "accelerate",
)


@pytest.mark.parametrize("argument", ["--help", "--smoke"])
def test_benchmark_runs_on_a_gpu_machine_that_has_torch_and_little_else(argument):
    program = LACKING.format(missing=MISSING, argument=argument)
    command = [sys.executable, "-c", program]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert finished.returncode == 0, finished.stderr
    assert ("--tokens" if argument == "--help" else "largest relative error") in finished.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_equals_cpu(dtype):
    case = make_case(num_tokens=64, hidden_size=32, vocab_size=512, k=16)
    student = [tensor.detach().to(dtype).requires_grad_() for tensor in case[:2]]
    expected = fused_distillation_loss(*student, *case[2:])
    on_gpu = [tensor.detach().cuda().requires_grad_() for tensor in student]
    found = fused_distillation_loss(*on_gpu, *(tensor.cuda() for tensor in case[2:]), chunk_bytes=20 * 512 * 4)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-4)
    for grad, expected_grad in zip(gradients(found.loss, *on_gpu), gradients(expected.loss, *student)):
        assert relative_error(grad.cpu(), expected_grad.double()) < 1e-2
