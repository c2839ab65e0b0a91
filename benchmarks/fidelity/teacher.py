"""The teacher of the study, run once: hidden states of every target position, from which all its logits follow.

Both the live reference and every cache are made of them, so that a difference between two recipes is the recipe's.
Caches are written by the project's own capture (plan, reduction, codec, shards, commits); only the engine is another.

Shapes: N target positions of a corpus, H hidden size, V vocabulary.
"""

from collections.abc import Hashable, Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline import open_cache
from pipeline.cache.reader import Cache
from pipeline.corpus import Corpus
from pipeline.files import replacing
from pipeline.progress import Reporter
from pipeline.sketch import FittedSketch
from pipeline.targets import SparseTargets
from stages.cache_logits.capture import capture
from stages.cache_logits.draws import reduce_rows
from stages.cache_logits.engine import Request, reduction_of, unpack
from stages.cache_logits.planning import plan_cache
from stages.cache_logits.scoring import documents_of
from stages.cache_logits.settings import CacheConfig
from stages.cache_logits.sketch_fitting import STEPS, Head, Wanted, fit_sketch
from stages.cache_logits.sketch_making import told
from stages.cache_logits.sketching import RowSketch

ROWS = 256
"""Positions whose logits exist at the same time."""


class StoredTeacher:
    """float32 last hidden states of a corpus's target positions, in its order, and the teacher's head."""

    def __init__(self, folder: Path, corpus: Corpus, hidden_file: Path, reporter: Reporter) -> None:
        self.folder, self.corpus, self._file, self._reporter = folder, corpus, hidden_file, reporter
        counts = [len(sequence.target_positions) for sequence in corpus.rows()]
        self._starts = np.concatenate([[0], np.cumsum(counts)])

    @cached_property
    def head_VH(self) -> Tensor:
        """float32, of the real vocabulary."""
        return self._model.get_output_embeddings().weight.detach()

    @cached_property
    def hidden_NH(self) -> Tensor:
        """All of them; computed document by document unless the file is there."""
        if not self._file.is_file():
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._file) as partial, partial.open("wb") as file:
                np.save(file, self._compute().numpy())
        return torch.from_numpy(np.load(self._file))

    @cached_property
    def _model(self):
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    def hidden_of(self, sequence: int) -> Tensor:
        """[N, H] of one sequence's target positions."""
        return self.hidden_NH[self._starts[sequence] : self._starts[sequence + 1]]

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """float32 [N, V]."""
        return hidden_NH @ self.head_VH.T

    def sketch(self, config: CacheConfig) -> FittedSketch:
        """A tail sketch for a cache with these settings, fitted to as many of the positions as they say."""
        order = torch.randperm(len(self.hidden_NH), generator=torch.Generator().manual_seed(0))[: config.sketch_tokens]
        head = Head(weight_VH=self.head_VH, bias_V=torch.zeros(len(self.head_VH)), softcap=None)
        wanted = Wanted(
            rank=config.tail_rank,
            top_k=config.top_k,
            temperatures=config.temperatures,
            max_error=config.max_sketch_error,
        )
        with self._reporter.progress("sketch: fit", STEPS, "steps") as progress:
            fitted = fit_sketch(self.hidden_NH[order], head, wanted, progress)
        self._reporter.log(told(fitted))
        return fitted

    @torch.inference_mode()
    def _compute(self) -> Tensor:
        body, found = self._model.model, []
        with self._reporter.progress("teacher", self.corpus.manifest.num_tokens) as progress:
            for sequence in self.corpus.rows():
                for token_ids, positions, _ in documents_of(sequence):
                    ids = torch.from_numpy(token_ids.astype(np.int64))
                    hidden_SH = body(ids[None], use_cache=False).last_hidden_state[0]
                    found.append(hidden_SH[torch.from_numpy(positions.astype(np.int64))])
                progress.advance(len(sequence.token_ids))
        return torch.cat(found)


class StoredEngine:
    """An engine of capture that answers from a StoredTeacher; requests come in the order of its corpus."""

    def __init__(self, teacher: StoredTeacher, config: CacheConfig, sketch: FittedSketch | None = None) -> None:
        self._teacher, self._reduction = teacher, reduction_of(config)
        self._sketch = None if sketch is None else RowSketch.of(sketch, torch.device("cpu"))

    @torch.inference_mode()
    def score(self, requests: Iterable[Request]) -> Iterator[tuple[Hashable, SparseTargets]]:
        """The targets of every request, in order."""
        start = 0
        for request in requests:
            hidden_NH = self._teacher.hidden_NH[start : start + len(request.positions)]
            start += len(request.positions)
            yield request.key, self._reduce(hidden_NH, request)
        assert start == len(self._teacher.hidden_NH), "the cache has not the teacher's corpus"

    def close(self) -> None:
        """Nothing was started."""

    def _reduce(self, hidden_NH: Tensor, request: Request) -> SparseTargets:
        parts = (hidden_NH, torch.from_numpy(request.labels.astype(np.int64)), torch.from_numpy(request.uniforms))
        rows = [
            reduce_rows(
                self._reduction,
                self._teacher.logits(hidden),
                labels,
                uniforms,
                sketch=self._sketch,
                hidden_NH=hidden,
            )
            for hidden, labels, uniforms in zip(*(part.split(ROWS) for part in parts))
        ]
        return unpack(torch.cat(rows).numpy(), self._reduction)


def ensure_cache(
    teacher: StoredTeacher, out: Path, *, top_k: int, tail_samples: int, draw_temperature: float | None, tail_rank: int
) -> Cache:
    """The cache of the teacher's corpus with these targets, T = 1 and 2, in Zarr with the default bound on rounding.

    One shard, so that nothing is counted twice in its bytes. A sketch is fitted to the positions of the corpus itself.
    """
    config = CacheConfig(
        teacher=teacher.folder,
        corpus=teacher.corpus.folder,
        out=out,
        engine="transformers",
        format="zarr",
        top_k=top_k,
        tail_samples=tail_samples,
        draw_temperature=draw_temperature,
        tail_rank=tail_rank,
    )
    plan = plan_cache(config, make_sketch=lambda *_: teacher.sketch(config).to_bytes())
    if todo := plan.cache.todo():
        capture(StoredEngine(teacher, config, plan.cache.fitted_sketch()), plan.corpus, plan.cache, todo)
    return open_cache(out)


def bytes_per_token(cache: Cache) -> float:
    """Everything in the shards' files, over the targets; a sketch's own file, of which a cache has one, is left out."""
    return sum(commit.bytes for commit in cache.commits) / cache.manifest.num_targets
