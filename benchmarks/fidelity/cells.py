"""What the study trains: the grid of cells, most telling first, and the file in which each keeps its result.

A cell's name says all that decides its result but the size of the study (`Scale`), which is the folder's. A result
file holds both, so that one that was made otherwise is noticed and not mixed in. Loads no torch: the report does not
need it.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.stores.sealed import read_json, write_json

LIVE, HARD = "live", "hard"
"""Full-vocabulary KD with the teacher's own logits, and labels alone; every other recipe is a tail of train-student."""
STUDENTS = ("pruned", "random")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What stands for the teacher."""

    name: str
    """LIVE, HARD or a tail."""
    top_k: int = 0
    draws: int = 0
    rank: int = 0
    """Coefficients of the tail sketch."""

    @property
    def is_cached(self) -> bool:
        """Whether it is trained from a cache."""
        return self.name not in (LIVE, HARD)

    @property
    def label(self) -> str:
        """As tables and file names have it."""
        sizes = [f"k{self.top_k}"] if self.top_k else []
        sizes += [f"d{self.draws}"] if self.draws else []
        sizes += [f"r{self.rank}"] if self.rank else []
        return "-".join([self.name, *sizes])


RECIPES = (
    Recipe(name=LIVE),
    Recipe(name="ghost", top_k=64),
    Recipe(name="ghost", top_k=8),
    Recipe(name="hybrid", top_k=8, draws=8),
    Recipe(name=HARD),
    Recipe(name="sampled", draws=50),
    Recipe(name="renormalise", top_k=64),
    Recipe(name="hybrid", top_k=16, draws=8),
    Recipe(name="sketch", top_k=8, rank=16),
    Recipe(name="sketch", top_k=16, rank=16),
    Recipe(name="sketch", top_k=64, rank=32),
    Recipe(name="sketch", top_k=8, rank=8),
    Recipe(name="uniform", top_k=64),
    Recipe(name="uniform", top_k=8),
    Recipe(name="ghost", top_k=16),
    Recipe(name="zero", top_k=64),
    Recipe(name="sampled", draws=16),
    Recipe(name="hybrid", top_k=64, draws=8),
    Recipe(name="renormalise", top_k=8),
)
"""In the order in which cells are made."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large a study is; its values are part of every result."""

    name: str
    train_tokens: int
    held_out_tokens: int
    passage_tokens: int
    """Of a document, at most."""
    sequence_length: int
    steps: int
    batch_size: int
    pruned_learning_rate: float
    random_learning_rate: float
    dtype: str
    """Of the body's products in training; head, loss and evaluation are float32 in any case."""
    removed_layers: int = 6


SCALES = {
    "small": Scale(
        name="small",
        train_tokens=18_000,
        held_out_tokens=6_000,
        passage_tokens=128,
        sequence_length=64,
        steps=48,
        batch_size=4,
        pruned_learning_rate=1e-4,
        random_learning_rate=2e-3,
        dtype="bfloat16",
    ),
    "full": Scale(
        name="full",
        train_tokens=300_000,
        held_out_tokens=15_000,
        passage_tokens=1024,
        sequence_length=256,
        steps=400,
        batch_size=8,
        pruned_learning_rate=1e-4,
        random_learning_rate=2e-3,
        dtype="float32",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training."""

    student: str
    recipe: Recipe
    temperature: float
    alpha: float
    seed: int

    @property
    def name(self) -> str:
        """Its file's."""
        if self.recipe.name == HARD:
            return f"{self.student}-{HARD}-s{self.seed}"
        return f"{self.student}-{self.recipe.label}-T{self.temperature:g}-a{self.alpha:g}-s{self.seed}"

    def settings(self, scale: Scale) -> dict[str, Any]:
        """All that decides the result."""
        return {"cell": dataclasses.asdict(self), "scale": dataclasses.asdict(scale)}


def grid(students: tuple[str, ...], seeds: tuple[int, ...], alphas: tuple[float, ...]) -> Iterator[Cell]:
    """Cells in the order in which they are worth their time: by alpha, student, seed, temperature, recipe."""
    for alpha in alphas:
        for student in students:
            for seed in seeds:
                for temperature in (1.0, 2.0):
                    for recipe in RECIPES:
                        if recipe.name != HARD:
                            settings = {"temperature": temperature, "alpha": alpha}
                        elif temperature == 1.0 and alpha == alphas[0]:  # labels alone know neither
                            settings = {"temperature": 1.0, "alpha": 0.0}
                        else:
                            continue
                        yield Cell(student=student, recipe=recipe, seed=seed, **settings)


def result_path(results: Path, scale: Scale, cell: Cell) -> Path:
    """Where a cell's result lies, or will."""
    return results / scale.name / f"{cell.name}.json"


def write_result(results: Path, scale: Scale, cell: Cell, measured: dict[str, Any]) -> None:
    """Keep what a cell has measured, whole or not at all."""
    path = result_path(results, scale, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**cell.settings(scale), **measured})


def read_results(results: Path, scale: Scale, corpus: list[str] | None = None) -> list[dict[str, Any]]:
    """All results of a scale; raises PipelineError for one by another scale of this name, or from other text.

    What text a machine has depends on its packages, so `corpus`, the fingerprints of training and held-out text, is
    part of a result; None takes those of the first.
    """
    found: list[dict[str, Any]] = []
    for path in sorted((results / scale.name).glob("*-s*.json")):
        document = read_json(path, PipelineError)
        expected = {"scale": dataclasses.asdict(scale), "corpus": corpus or document["corpus"]}
        for name, value in expected.items():
            if document[name] != value:
                raise PipelineError(f"{path}: {name} is {document[name]}; expected {value}. Give another --results.")
        corpus = document["corpus"]
        found.append(document)
    return found
