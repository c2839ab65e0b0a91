"""The reduction of logits against float64: every temperature, tensor-parallel split and odd shape."""

import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from pipeline.targets import SparseTargets
from stages.cache_logits.comparison import disagreement
from stages.cache_logits.draws import reduce_rows
from stages.cache_logits.engine import unpack
from stages.cache_logits.reduction import Reduction
from tests.support.oracle import assert_true_top_k, assert_within, entropy, softmax
from tests.support.rounding import DEVIATIONS, UNIT, entropy_errors, prob_errors, ratio_errors


def reduce(logits: torch.Tensor, labels: torch.Tensor, reduction: Reduction, ranks: int = 1) -> SparseTargets:
    """What the engine does with the logits of `ranks` tensor-parallel workers."""
    return unpack(reduce_packed(logits, labels, reduction, ranks).numpy(), reduction)


def reduce_packed(logits, labels, reduction, ranks=1, uniforms=None):
    """Each rank in a thread of its own: they meet in every gather, as processes do."""
    uniforms = torch.zeros(len(logits)) if uniforms is None else uniforms
    shards = [columns.contiguous() for columns in logits.clone().tensor_split(ranks, dim=1)]
    starts = np.cumsum([0, *(columns.shape[1] for columns in shards)])
    meeting, parts = threading.Barrier(ranks, timeout=60), [None] * ranks

    def run(rank):
        def gather(columns):
            parts[rank] = columns
            meeting.wait()
            gathered = torch.cat(parts, dim=-1)
            meeting.wait()
            return gathered

        place = {"ranks": ranks, "rank": rank, "first_id": int(starts[rank]), "gather": gather}
        return reduce_rows(reduction, shards[rank], labels, uniforms, **place)

    with ThreadPoolExecutor(ranks) as pool:
        packed = list(pool.map(run, range(ranks)))
    assert all(torch.equal(packed[0], other) for other in packed)
    return packed[0]


def check(targets: SparseTargets, logits: torch.Tensor, labels: torch.Tensor) -> None:
    """Against float64, within what float32 does to exponentials and sums; the logits themselves are exact."""
    exact, ids = logits.double().numpy(), targets.ids.astype(np.int64)
    assert_true_top_k(targets.ids, exact, 0.0)
    of = functools.partial(np.take_along_axis, axis=1)
    for temperature in targets.temperatures:
        probs, errors = softmax(exact, temperature), prob_errors(exact, temperature)
        assert_within(targets.probs(temperature), of(probs, ids), of(errors, ids))
        tail, tail_errors = probs.copy(), errors.copy()
        for values in (tail, tail_errors):
            np.put_along_axis(values, ids, 0.0, axis=1)
        tail_depth = -np.log(tail.sum(1), where=tail.sum(1) > 0, out=np.zeros(len(tail)))  # stored as a logarithm
        allowed = tail_errors.sum(1) + 4 * UNIT * tail_depth * tail.sum(1)
        assert_within(targets.tail_mass(temperature), tail.sum(1), allowed)
        assert_within(targets.entropy(temperature), entropy(probs), entropy_errors(exact, temperature))
        places = labels.numpy()[:, None]
        allowed = of(ratio_errors(exact, temperature), places)[:, 0]
        assert_within(targets.label_logprobs(temperature), np.log(of(probs, places))[:, 0], allowed)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("vocab_size", [17, 1003, 20011])
@pytest.mark.parametrize("temperatures", [(1.0, 2.0), (4.0, 1.0, 2.0), (0.7, 3.1)])
def test_reduction_equals_float64(ranks, vocab_size, temperatures):
    generator = torch.Generator().manual_seed(vocab_size + ranks)
    logits = 4 * torch.randn(37, vocab_size, generator=generator)
    labels = torch.randint(vocab_size, (37,), generator=generator)
    for top_k in {1, 5, min(64, vocab_size)}:
        check(reduce(logits, labels, Reduction(top_k, temperatures), ranks), logits, labels)


def test_no_rows_give_no_targets():
    reduction = Reduction(5, (1.0, 2.0), 3, 1.0)
    assert reduce_packed(torch.empty(0, 50), torch.empty(0, dtype=torch.long), reduction).shape == (0, reduction.width)


def test_whole_vocabulary_leaves_no_tail():
    logits, labels = torch.randn(9, 50), torch.arange(9)
    targets = reduce(logits, labels, Reduction(50, (1.0, 2.0)), ranks=2)
    check(targets, logits, labels)
    assert (targets.tail_mass(2.0) == 0).all()


def test_more_ranks_than_columns():
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    check(reduce(logits, labels, Reduction(2, (1.0, 2.0)), ranks=5), logits, labels)


def test_tail_of_a_peaked_row_is_not_rounding_noise():
    """1 - sum(p) in float32 would give 0 or 6e-8 here."""
    logits = torch.full((1, 1000), -30.0)
    logits[0, 7] = 0.0
    targets = reduce(logits, torch.tensor([7]), Reduction(1, (1.0,)))
    check(targets, logits, torch.tensor([7]))
    assert targets.tail_mass(1.0)[0] == pytest.approx(999 * np.exp(-30.0), rel=1e-4)


def test_extreme_logits_stay_finite():
    logits = torch.randn(20, 500) * 1000
    targets = reduce(logits, torch.zeros(20, dtype=torch.long), Reduction(8, (1.0, 2.0)))
    for values in (targets.logits, targets.logsumexps, targets.entropies, targets.label_logits):
        assert np.isfinite(values).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_logits_give_the_targets_of_the_numbers_that_they_are(dtype):
    logits, labels = (3 * torch.randn(9, 700)).to(dtype), torch.arange(9)
    reduction = Reduction(6, (1.0, 2.0), 4, 2.0)
    packed, uniforms = [], torch.rand(9)
    for values in (logits, logits.float()):
        packed.append(unpack(reduce_packed(values, labels, reduction, uniforms=uniforms).numpy(), reduction))
    check(packed[0], logits.float(), labels)
    assert (packed[0].draws == packed[1].draws).all()


@pytest.mark.parametrize("ranks", [1, 2])
def test_ids_that_are_ruled_out_have_no_weight(ranks):
    logits = torch.randn(6, 400)
    logits[:, 100:390] = -torch.inf  # whole lanes, and all but some columns of a rank
    targets = reduce(logits, torch.zeros(6, dtype=torch.long), Reduction(4, (1.0,)), ranks)
    sums = np.logaddexp.reduce(logits.double().numpy() - logits.max(1, keepdim=True)[0].double().numpy(), axis=1)
    np.testing.assert_allclose(targets.logsumexps[:, 0], sums, rtol=1e-6)


@pytest.mark.parametrize("place", [3, 250])
def test_logit_that_is_no_number_makes_its_row_none(place):
    logits = torch.randn(3, 300)
    logits[1, place] = torch.nan
    targets = reduce(logits, torch.zeros(3, dtype=torch.long), Reduction(4, (1.0, 2.0)))
    assert np.isfinite(targets.logsumexps).all(1).tolist() == [True, False, True]


def test_uniform_row_has_maximal_entropy_and_ascending_ids():
    targets = reduce(torch.zeros(2, 4096), torch.zeros(2, dtype=torch.long), Reduction(16, (1.0, 2.0)), ranks=2)
    allowed = entropy_errors(np.zeros((2, 4096)), 2.0)
    assert_within(targets.entropy(2.0), np.full(2, np.log(4096)), allowed)
    assert (np.diff(targets.ids) > 0).all()


@pytest.mark.parametrize("threads", [1, 3])
def test_blocks_of_rows_and_threads_do_not_change_the_result(threads, monkeypatch):
    """Also in inference mode, which is a property of a thread."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    logits, labels = torch.randn(50, 3000), torch.arange(50)
    reduction = Reduction(10, (1.0, 2.0))
    rows = torch.cat([reduction.reduce_shard(logits[i : i + 1].clone(), labels[i : i + 1]) for i in range(50)])
    order = {"rtol": 2 * DEVIATIONS * 3000**0.5 * UNIT, "atol": 0}  # of sums of 3,000 terms of one sign, twice
    torch.testing.assert_close(reduction.reduce_shard(logits.clone(), labels), rows, **order)
    with torch.inference_mode():
        relative = logits * 1
        torch.testing.assert_close(reduction.reduce_shard(relative, labels), rows, **order)
        assert (relative.amax(1) == 0).all()  # in place


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize(("top_k", "vocab_size"), [(0, 300), (4, 300), (16, 1003)])
def test_draws_are_unbiased_and_systematic(ranks, top_k, vocab_size):
    """On fresh random numbers every time: each id comes up as often as p_T says, to within one of every row."""
    num_rows, num_draws = 3000, 16
    logits = 2 * torch.randn(1, vocab_size)
    reduction = Reduction(top_k, (1.0, 2.0), num_draws, 2.0)
    uniforms = torch.rand(num_rows)
    rows = logits.expand(num_rows, -1).contiguous()
    labels = torch.zeros(num_rows, dtype=torch.long)
    targets = unpack(reduce_packed(rows, labels, reduction, ranks, uniforms).numpy(), reduction)
    tail = softmax(logits.numpy(), 2.0)[0]
    tail[targets.ids[0]] = 0
    share = tail / tail.sum()
    counts = np.stack([np.bincount(row, minlength=vocab_size) for row in targets.draws])
    assert (counts[:, share == 0] == 0).all()
    assert (np.abs(counts - num_draws * share) < 1 + 1e-4).all()
    # Of every id a count is one of two neighbours: the variance of its mean is known.
    fraction = num_draws * share % 1
    deviation = np.sqrt(fraction * (1 - fraction) / num_rows)
    assert (np.abs(counts.mean(0) - num_draws * share) < 6 * deviation + 1e-3).all()


def test_draws_lie_where_the_running_sum_of_the_tail_says():
    """At points that rounding cannot move over the end of an id's stretch."""
    logits, labels, uniforms = 2 * torch.randn(40, 1003), torch.zeros(40, dtype=torch.long), torch.rand(40)
    reduction = Reduction(5, (2.0, 1.0), 8, 1.0)
    targets = unpack(reduce_packed(logits, labels, reduction, uniforms=uniforms).numpy(), reduction)
    tail = softmax(logits.numpy(), 1.0)
    np.put_along_axis(tail, targets.ids.astype(np.int64), 0.0, 1)
    ends = tail.cumsum(1) / tail.sum(1, keepdims=True)
    points = (uniforms.double().numpy()[:, None] + np.arange(8)) / 8
    expected = np.stack([np.searchsorted(row, wanted, side="right") for row, wanted in zip(ends, points)])
    is_safe = np.stack([np.abs(row[:, None] - wanted).min(0) > 1e-6 for row, wanted in zip(ends, points)])
    assert is_safe.mean() > 0.9
    assert (targets.draws == expected)[is_safe].all()


def test_row_without_tail_draws_nothing():
    reduction = Reduction(20, (1.0,), 3, 1.0)
    packed = reduce_packed(torch.randn(4, 20), torch.zeros(4, dtype=torch.long), reduction, ranks=2)
    assert (unpack(packed.numpy(), reduction).draws == -1).all()


def test_draws_depend_on_their_row_alone():
    logits, labels, uniforms = torch.randn(40, 500), torch.zeros(40, dtype=torch.long), torch.rand(40)
    reduction = Reduction(4, (1.0, 2.0), 8, 1.0)
    whole = reduce_packed(logits, labels, reduction, uniforms=uniforms)
    some = reduce_packed(logits[7:9], labels[7:9], reduction, uniforms=uniforms[7:9])
    assert torch.equal(whole[7:9, -8:], some[:, -8:])


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("top_k", [0, 5, 300])
def test_targets_agree_with_their_own_logits_and_with_no_others(ranks, top_k):
    """The engine's look at its own head, before anything is scored."""
    logits, labels = 4 * torch.randn(7, 300), torch.arange(7)
    if top_k < 300:
        logits[:, 250] = -torch.inf  # as of an id that a model rules out; where it is kept, its target is refused
    targets = reduce(logits, labels, Reduction(top_k, (2.0, 0.5)), ranks)
    assert disagreement(targets, logits.numpy(), labels.numpy()) == ""
    scaled, shifted, capped = logits * 1.001, logits.roll(1, 1), 30 * (logits / 30).tanh()
    for other in (scaled, shifted, capped):
        assert " is " in disagreement(targets, other.numpy(), labels.numpy())
    assert disagreement(targets, torch.full_like(logits, torch.nan).numpy(), labels.numpy())
