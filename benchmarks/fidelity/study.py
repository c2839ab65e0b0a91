"""What all cells of a scale share, made once: text, corpora, the stored teacher, students, caches.

WORK/
  teacher/                    the teacher as a transformers folder
  SCALE/
    text/, train/, heldout/   passages and corpora
    hidden-*.npy              last hidden states of the teacher
    student-*/                where students start from
    cache-*/                  one cache for every set of stored entries
"""

import dataclasses
import json
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.fidelity.cells import Cell, Recipe, Scale
from benchmarks.fidelity.teacher import StoredTeacher, ensure_cache
from benchmarks.real.students import CHOICE, ensure_pruned, ensure_random
from benchmarks.real.teacher import DEFAULT_SITE, ensure_teacher, install
from benchmarks.real.text import HELD_OUT, TRAIN, collect_passages
from pipeline.cache.reader import Cache
from pipeline.corpus import Corpus
from pipeline.errors import PipelineError
from pipeline.progress import Reporter
from pipeline.stores.places import store_of
from pipeline.stores.sealed import read_json, write_json
from pipeline.tokenizer import load_tokenizer
from stages.prepare.run import prepare
from stages.prepare.settings import PrepareConfig

INPUTS = Recipe(name="ghost", top_k=8)
"""The cache that feeds text to recipes which need none of its targets."""
TEXT = "text.json"


class Study:
    """The inputs of a scale's cells; each is made when it is first asked for and kept in `work`."""

    def __init__(self, work: Path, scale: Scale, reporter: Reporter) -> None:
        self.scale, self.reporter = scale, reporter
        self._work, self._folder = work, work / scale.name
        self._caches: dict[str, Cache] = {}

    @cached_property
    def teacher_folder(self) -> Path:
        """Of the teacher of the study."""
        return ensure_teacher(self._work / "teacher", reporter=self.reporter)

    @cached_property
    def token_counts(self) -> dict[str, dict[str, int]]:
        """Tokens of the training and the held-out text, by kind."""
        stamp = self._folder / TEXT
        made_for = dataclasses.asdict(self.scale)
        if stamp.is_file() and (known := read_json(stamp, PipelineError))["scale"] == made_for:
            return known["counts"]
        if stamp.is_file():
            raise PipelineError(f"{self._folder}: made for another scale of this name; delete it.")
        tokenizer = load_tokenizer(self.teacher_folder)
        sizes = (self.scale.train_tokens, self.scale.held_out_tokens)
        install(DEFAULT_SITE, self.reporter)
        counts = collect_passages(self._folder / "text", tokenizer, DEFAULT_SITE, *sizes, self.scale.passage_tokens)
        write_json(stamp, {"scale": made_for, "counts": counts})
        return counts

    @cached_property
    def train(self) -> StoredTeacher:
        """The teacher on the training corpus."""
        return self._stored("train", TRAIN)

    @cached_property
    def held_out(self) -> StoredTeacher:
        """The teacher on the held-out corpus."""
        return self._stored("heldout", HELD_OUT)

    @property
    def fingerprints(self) -> list[str]:
        """Of the training and the held-out corpus."""
        return [teacher.corpus.manifest.fingerprint for teacher in (self.train, self.held_out)]

    def student(self, name: str) -> Path:
        """Folder of a student's start, or its config.json if the seed makes it."""
        out = self._folder / f"student-{name}"
        if name == "random":
            return ensure_random(self.teacher_folder, out)
        return ensure_pruned(self.teacher_folder, self.train.corpus, out, self.scale.removed_layers)

    def removed_layers(self) -> dict[str, Any]:
        """Which layers the pruned student lacks, and what the choice was made by."""
        return read_json(self.student("pruned") / CHOICE, PipelineError)

    def cache(self, recipe: Recipe, temperature: float) -> Cache:
        """What a recipe is trained from."""
        drawn = f"-d{recipe.draws}-T{temperature:g}" if recipe.draws else ""
        sketched = f"-r{recipe.rank}" if recipe.rank else ""
        name = f"cache-k{recipe.top_k}{drawn}{sketched}"
        if name not in self._caches:
            self._caches[name] = ensure_cache(
                self.train,
                store_of(self._folder / name),
                top_k=recipe.top_k,
                tail_samples=recipe.draws,
                draw_temperature=temperature if recipe.draws else None,
                tail_rank=recipe.rank,
            )
        return self._caches[name]

    def cache_of(self, cell: Cell) -> Cache:
        """The cache whose batches a cell is fed with."""
        return self.cache(cell.recipe if cell.recipe.is_cached else INPUTS, cell.temperature)

    def learning_rate(self, cell: Cell) -> float:
        """Peak rate of AdamW."""
        return self.scale.random_learning_rate if cell.student == "random" else self.scale.pruned_learning_rate

    def _stored(self, split: str, text: str) -> StoredTeacher:
        assert self.token_counts, "the text is there"
        folder = self._folder / split
        config = PrepareConfig(
            inputs=(self._folder / "text" / text,),
            tokenizer=self.teacher_folder,
            out=folder,
            sequence_length=self.scale.sequence_length,
        )
        prepare(config, self.reporter)
        return StoredTeacher(self.teacher_folder, Corpus(folder), self._folder / f"hidden-{split}.npy", self.reporter)


def describe(study: Study) -> str:
    """What the study works with, on one line."""
    removed = study.removed_layers()
    last = removed["first"] + removed["number"] - 1
    return f"layers {removed['first']} to {last} are out; tokens: {json.dumps(study.token_counts)}"
