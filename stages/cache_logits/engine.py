"""The contract of an engine: token ids in, sparse targets out."""

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pipeline.targets import SparseTargets
from stages.cache_logits.reduction import Reduction
from stages.cache_logits.settings import TeacherConfig


@dataclass(frozen=True)
class Request:
    """A document to score."""

    key: Hashable
    token_ids: np.ndarray
    """int32 [S]"""
    positions: np.ndarray
    """int32 [N], rising, each below S - 1: where targets are wanted, and each next token is the label."""
    uniforms: np.ndarray
    """float32 [N] in [0, 1): what the draws from the tail of each position start from."""

    @property
    def labels(self) -> np.ndarray:
        """int32 [N]: the tokens after `positions`."""
        return self.token_ids[self.positions + 1]


class Engine(Protocol):
    """Runs a teacher. Attention covers the request and nothing else."""

    def score(self, requests: Iterable[Request]) -> Iterator[tuple[Hashable, SparseTargets]]:
        """The targets of every request, in any order; draws requests as it has room for them."""

    def close(self) -> None:
        """Stop whatever the engine started."""


class OpenEngine(Engine, Protocol):
    """An engine that shows what its logits are made of: what a tail sketch is fitted to."""

    def hidden_states(self, requests: Iterable[Request]) -> Iterator[tuple[Hashable, np.ndarray]]:
        """float32 [N, H] of every request: what the head is given at its positions."""

    def head(self) -> tuple[np.ndarray, np.ndarray]:
        """float32 [V, H] and [V]: the logits are the first times hidden states plus the second, before a soft cap."""


class NoEngine:
    """For a run in which nothing is left to score: takes what engines take, and loads nothing."""

    def __init__(self, *settings: object) -> None:
        pass

    def score(self, requests: Iterable[Request]) -> Iterator[tuple[Hashable, SparseTargets]]:
        """Nothing; draws the requests, of which there are none."""
        assert not list(requests), "a sequence has to be scored after all"
        yield from ()

    def close(self) -> None:
        """Nothing was started."""


def reduction_of(config: TeacherConfig) -> Reduction:
    """What a run's settings keep of a row."""
    spec = config.spec
    return Reduction(spec.top_k, spec.temperatures, spec.tail_samples, spec.draw_temperature, spec.tail_rank)


def unpack(rows_NW: np.ndarray, reduction: Reduction) -> SparseTargets:
    """The targets in int32 [N, width] rows that `Reduction.merge` packed; equal logits by ascending id."""
    k, count = reduction.top_k, len(reduction.temperatures)
    ends = np.cumsum([k, k, count, count, count, 1, reduction.tail_samples, reduction.tail_rank])
    ids, *floats, draws, coefficients, errors = np.split(rows_NW, ends, axis=1)
    logits, logsumexps, tails, entropies, labels = (np.ascontiguousarray(part).view(np.float32) for part in floats)
    ids = np.ascontiguousarray(ids)
    tied = np.flatnonzero((logits[:, 1:] == logits[:, :-1]).any(axis=1))
    if len(tied):
        order = np.lexsort((ids[tied], -logits[tied]), axis=1)
        ids[tied] = np.take_along_axis(ids[tied], order, axis=1)
    return SparseTargets(
        temperatures=reduction.temperatures,
        ids=ids,
        logits=logits,
        logsumexps=logsumexps,
        tail_logprobs=tails,
        entropies=entropies,
        label_logits=labels[:, 0],
        draws=np.ascontiguousarray(draws),
        coefficients=coefficients.astype(np.int16),
        sketch_errors=np.ascontiguousarray(errors).view(np.float32),
    )
