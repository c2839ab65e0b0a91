"""The pure parts of the fidelity study: figures against float64 definitions, choices, intervals, tables."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from benchmarks.fidelity.cells import HARD, LIVE, RECIPES, SCALES, Cell, Recipe, grid, read_results, write_result
from benchmarks.fidelity.measures import (
    BINS,
    calibration_sums,
    direction,
    finished,
    measure_rows,
)
from benchmarks.fidelity.report import group_table, groups_of, write_report
from benchmarks.fidelity.statistics import interval, paired, pareto
from benchmarks.fidelity.training import cosine, live_loss
from benchmarks.real.students import block_distances, choose_block
from pipeline.errors import PipelineError
from pipeline.stores.sealed import write_json
from stages.train_student.loss import fused_distillation_loss
from stages.train_student.tails import TAILS
from tests.support.oracle import softmax


@pytest.fixture
def rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Teacher's and student's logits, and labels."""
    random = torch.Generator().manual_seed(0)
    teacher, student = (3 * torch.randn(50, 97, generator=random) for _ in range(2))
    return teacher, (teacher + student) / 2, torch.randint(97, (50,), generator=random)


def test_figures_are_those_of_the_float64_formulas(rows):
    teacher, student, labels = rows
    found = finished(measure_rows(teacher, student, labels))
    p, q = ({T: softmax(logits.numpy(), T) for T in (1.0, 2.0)} for logits in (teacher, student))
    expected = {
        "cross_entropy": -np.log(q[1.0][np.arange(50), labels]).mean(),
        "top1_agreement": (p[1.0].argmax(1) == q[1.0].argmax(1)).mean(),
        "acceptance": np.minimum(p[1.0], q[1.0]).sum(1).mean(),
        "kl_1": (p[1.0] * np.log(p[1.0] / q[1.0])).sum(1).mean(),
        "kl_2": (p[2.0] * np.log(p[2.0] / q[2.0])).sum(1).mean(),
        "calibration_error": plain_calibration_error(q[1.0], labels.numpy()),
    }
    assert found == pytest.approx(expected, rel=1e-5)


def plain_calibration_error(probs: np.ndarray, labels: np.ndarray) -> float:
    confidence, correct = probs.max(1), probs.argmax(1) == labels
    total = 0.0
    for low in np.arange(BINS) / BINS:
        inside = (confidence >= low) & (confidence < low + 1 / BINS)
        if inside.any():
            total += inside.mean() * abs(confidence[inside].mean() - correct[inside].mean())
    return total


def test_sums_over_pieces_are_those_of_the_whole(rows):
    whole = measure_rows(*rows)
    pieces = [measure_rows(*(tensor[part] for tensor in rows)) for part in (slice(0, 17), slice(17, 50))]
    summed = {name: pieces[0][name] + pieces[1][name] for name in whole}
    assert finished(summed) == pytest.approx(finished(whole), rel=1e-6)


def test_the_teacher_agrees_with_itself(rows):
    teacher, _, labels = rows
    found = finished(measure_rows(teacher, teacher, labels))
    assert (found["kl_1"], found["kl_2"], found["top1_agreement"]) == (0, 0, 1)
    assert found["acceptance"] == pytest.approx(1, abs=1e-6)


def test_a_student_that_is_sure_counts_in_the_last_bin():
    logits = torch.tensor([[200.0, 0.0], [200.0, 0.0]])
    sums = calibration_sums(logits, torch.tensor([0, 1]))
    assert sums[:, -1].tolist() == [2, 1]
    assert sums[:, :-1].sum() == 0


@pytest.mark.parametrize("degrees", [0.0, 1e-3, 30.0, 90.0, 180.0])
def test_direction_has_angle_and_ratio(degrees):
    reference = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    angle = math.radians(degrees)
    turned = 3 * torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    error = math.sqrt(9 + 4 - 12 * math.cos(angle))
    assert direction(turned, reference) == pytest.approx((degrees, 1.5, 2.0, error), abs=1e-9)


def test_block_with_the_smallest_turn_is_chosen_and_the_last_layer_stays():
    turns = torch.tensor([0.5, 0.3, 0.02, 0.03, 0.4, 0.0])
    angles = torch.cumsum(torch.cat([torch.zeros(1), turns]), 0)
    streams = torch.stack([angles.cos(), angles.sin()], dim=1)[:, None].expand(-1, 4, -1)
    distances = block_distances(streams, 2)
    torch.testing.assert_close(distances * math.pi, turns[:-1] + turns[1:], atol=1e-3, rtol=0)
    assert choose_block(distances.tolist()) == 2
    assert choose_block([0.3, 0.2, 0.1]) == 1


def test_live_loss_and_the_projects_loss_agree_where_everything_is_stored():
    random = torch.Generator().manual_seed(1)
    hidden, teacher = (torch.randn(6, size, generator=random, dtype=torch.float64) for size in (5, 13))
    weight, labels = torch.randn(13, 5, generator=random, dtype=torch.float64), torch.arange(6)
    gradients = []
    for loss in (live_loss_of, fused_loss_of):
        factors = [tensor.clone().requires_grad_(True) for tensor in (hidden, weight)]
        value = loss(*factors, labels, teacher)
        value.backward()
        gradients.append([value.detach(), *(factor.grad for factor in factors)])
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def live_loss_of(hidden, weight, labels, teacher):
    return live_loss(hidden, weight, labels, teacher, alpha=0.3, temperature=2.0)


def fused_loss_of(hidden, weight, labels, teacher):
    probs, ids = torch.softmax(teacher / 2.0, 1).sort(1, descending=True)
    return fused_distillation_loss(hidden, weight, labels, ids, probs, torch.zeros(6), alpha=0.3, temperature=2.0).loss


def test_learning_rate_rises_and_falls_to_nothing():
    factors = [cosine(100)(step) for step in range(101)]
    assert factors[0] < factors[1] < factors[2] == 1
    assert all(later < earlier for earlier, later in itertools.pairwise(factors[3:]))
    assert factors[-1] == pytest.approx(0)


def test_interval_is_students_t():
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.303 / math.sqrt(3), 3))
    alone = interval([4.0])
    assert (alone.mean, alone.num_seeds, math.isnan(alone.half_width)) == (4.0, 1, True)


def test_paired_difference_knows_only_common_seeds():
    found = paired({0: 1.1, 1: 2.1, 5: 9.0}, {0: 1.0, 1: 2.0, 2: 7.0})
    assert (found.mean, found.num_seeds) == (pytest.approx(0.1), 2)
    assert found.half_width < 1e-12
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_pareto_front_has_what_no_other_beats():
    points = [(10, 3.0), (20, 2.0), (20, 2.5), (30, 2.0), (5, 4.0), (40, 1.0)]
    assert pareto(points) == [4, 0, 1, 5]


def test_grid_trains_labels_alone_once_a_seed_and_names_every_cell_apart():
    cells = list(grid(("pruned", "random"), (0, 1), (1.0, 0.5)))
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names)
    assert sum(cell.recipe.name == HARD for cell in cells) == 4
    assert len(cells) == 2 * 2 * 2 * 2 * (len(RECIPES) - 1) + 4
    assert {cell.recipe.name for cell in cells} == {LIVE, HARD, *TAILS}


def result(recipe: Recipe, seed: int, cross_entropy: float, size: float | None) -> tuple[Cell, dict]:
    names = ("top1_agreement", "acceptance", "calibration_error", "kl_1", "kl_2")
    measured = {"cross_entropy": cross_entropy} | dict.fromkeys(names, cross_entropy / 10)
    cell = Cell(student="pruned", recipe=recipe, temperature=1.0, alpha=1.0, seed=seed)
    return cell, {"held_out": measured, "bytes_per_token": size, "corpus": ["text", "held out"]}


@pytest.fixture
def results(tmp_path):
    ghost = Recipe(name="ghost", top_k=8)
    for seed in (0, 1):
        for recipe, value, size in (
            (Recipe(name=LIVE), 2.0, None),
            (ghost, 2.02, 25.0),
            (Recipe(name=HARD), 3.0, None),
        ):
            write_result(tmp_path, SCALES["small"], *result(recipe, seed, value + seed / 100, size))
    return tmp_path


def test_table_pairs_seeds_with_live_training(results):
    found = read_results(results, SCALES["small"])
    assert len(found) == 6
    lines = {line.split("|")[1].strip(): line for line in group_table(groups_of(found)[0]).splitlines() if "|" in line}
    assert "| 25.0 | 2.0250 ± 0.0635 |" in lines["ghost-k8 *"]
    assert "| +1.00% ± 0.00 |" in lines["ghost-k8 *"]
    assert "| all logits |" in lines["live"]
    assert "| 0.0 |" in lines["hard *"]


def test_gradients_and_ends_are_tables_of_the_report(results):
    folder, names = results / "small", ("cross_entropy", "kl_1", "kl_2", "top1_agreement", "acceptance")
    ends = {"teacher": dict.fromkeys((*names, "calibration_error"), 0.25)}
    write_json(folder / "ends-pruned.json", {"ends": ends})
    gradients = {"T2": {"ghost-k8": {"64": {"degrees": 12.34, "norm_ratio": 0.987, "norm": 1.234, "error": 0.321}}}}
    write_json(folder / "gradients-pruned.json", {"gradients": gradients})
    lines = write_report(read_results(results, SCALES["small"]), folder).splitlines()
    assert "| teacher | 0.2500 | 0.2500 | 0.2500 | 0.2500 | 0.2500 | 0.2500 |" in lines
    assert "| gradient of the head, T=2 | 64 tokens |" in lines
    assert "| live, length | 1.23 |" in lines
    assert "| ghost-k8 | 12.3°, 0.32 |" in lines


def test_report_writes_table_and_plot_and_refuses_an_empty_folder(results, tmp_path):
    folder = results / "small"
    text = write_report(read_results(results, SCALES["small"]), folder)
    assert (folder / "table.md").read_text() == text
    assert "</svg>" in (folder / "plot.svg").read_text()
    with pytest.raises(PipelineError, match="no result"):
        write_report([], tmp_path)


def test_results_of_another_scale_or_text_are_not_mixed_in(results):
    with pytest.raises(PipelineError, match="corpus is"):
        read_results(results, SCALES["small"], ["other text", "held out"])
    (results / "small").rename(results / "full")
    with pytest.raises(PipelineError, match="scale is"):
        read_results(results, SCALES["full"])


def test_report_needs_no_torch():
    code = "import sys; import benchmarks.fidelity.__main__, benchmarks.fidelity.report; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
