"""What is judged of a step, and how alpha goes over a run."""

import json
import math

import pytest

from stages.train_student.guards import MIN_HISTORY, StepGuard, record_bad_step
from stages.train_student.schedules import ALPHA_SCHEDULES, AlphaSchedule


def judged(losses):
    guard = StepGuard()
    return [guard.judge(loss, 1.0) for loss in losses]


def test_falling_and_noisy_losses_are_good():
    assert judged([10 * 0.99**step + 0.2 * math.sin(step) for step in range(400)]) == [None] * 400
    assert judged([3.0] * 50 + [5.9]) == [None] * 51
    assert (
        judged([-0.5 + 0.01 * math.sin(step) for step in range(50)]) == [None] * 50
    )  # the zero tail's may be negative


def test_spike_is_bad_once_enough_is_known_and_does_not_move_the_rule():
    assert judged([3.0] * (MIN_HISTORY - 1) + [300.0])[-1] is None
    problems = judged([3.0] * MIN_HISTORY + [6.1] * 40 + [3.0])
    assert all("a loss of 6.1, above 6; the median of 20 steps is 3" in problem for problem in problems[20:60])
    assert problems[60] is None


def test_what_is_not_finite_is_bad_at_once():
    assert judged([math.nan]) == ["a loss of nan"]
    assert judged([math.inf]) == ["a loss of inf"]
    assert StepGuard().judge(1.0, math.inf) == "a gradient of norm inf at a loss of 1"


def test_bad_step_is_written_with_its_sequences(tmp_path):
    line = record_bad_step(tmp_path, 7, "a loss of nan", "skipped", ["aa", "bb", "cc", "dd"])
    assert "step 7: a loss of nan; skipped; its 4 sequences: aa, bb, cc, ..." in line
    (entry,) = map(json.loads, (tmp_path / "bad_steps.jsonl").read_text().splitlines())
    assert entry == {"step": 7, "problem": "a loss of nan", "action": "skipped", "keys": ["aa", "bb", "cc", "dd"]}


def course(shape, num_steps=11, **changes):
    settings = {"peak": 0.8, "end": 0.2, "warmup_ratio": 0.2, "decay_ratio": 0.4} | changes
    return [AlphaSchedule(shape=shape, **settings).at(step, num_steps) for step in range(num_steps)]


def test_alpha_schedules():
    assert course("constant") == [0.8] * 11
    assert course("linear") == pytest.approx([0.8 - 0.06 * step for step in range(11)])
    assert course("wsd") == pytest.approx([0, 0.4, 0.8, 0.8, 0.8, 0.8, 0.8, 0.65, 0.5, 0.35, 0.2])
    assert course("wsd", warmup_ratio=0.0, decay_ratio=0.0) == [0.8] * 11
    for shape in ALPHA_SCHEDULES:
        assert course(shape, num_steps=1)[0] in (0.0, 0.8)
