"""What the teacher said of every sequence, or of every document: sums over its targets, shard by shard.

Only the columns are read that the asked measures are made of. Sums are float64.

Shape suffixes: S sequences, D documents, M tokens, N targets, U units (sequences or documents).
"""

from collections.abc import Collection, Iterable
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from pipeline.cache.masking import Columns
from pipeline.cache.pieces import COUNTS, Piece
from pipeline.formats.layout import ShardLayout
from pipeline.formats.ragged import is_entry, padded
from pipeline.targets import column_of, logsumexps_of

SUMMED = {
    "perplexity": ("label",),
    "label-logprob": ("label",),
    "entropy": ("entropy",),
    "tail-mass": ("tail",),
    "sure": ("sure",),
    "learnability": ("label_at_1", "student"),
    "targets": (),
}
"""Sums that a measure is made of; that of the student comes from elsewhere."""
STUDENT = "student"


@dataclass(frozen=True)
class Units:
    """Sequences, and what is summed over each of their units."""

    keys: np.ndarray
    """uint8 [S, 16]"""
    num_tokens: np.ndarray
    """int64 [S]"""
    num_documents: np.ndarray
    """int64 [S]"""
    num_targets: np.ndarray
    """int64 [U]"""
    sums: dict[str, np.ndarray]
    """float64 [U]"""

    def measure(self, name: str) -> np.ndarray:
        """float64 [U]: the measure of every unit; nan of one without targets."""
        if name == "targets":
            return np.where(self.num_targets > 0, self.num_targets, np.nan)
        with np.errstate(invalid="ignore", divide="ignore"):
            means = {key: values / self.num_targets for key, values in self.sums.items()}
        if name == "perplexity":
            with np.errstate(over="ignore"):
                return np.exp(-means["label"])
        if name == "learnability":
            return means[STUDENT] + means["label_at_1"]
        return means[SUMMED[name][0]]


def together(parts: Iterable[Units]) -> Units:
    """The units of several pieces, one after the other."""
    parts = list(parts)
    names = ("keys", "num_tokens", "num_documents", "num_targets")
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    sums = {name: np.concatenate([part.sums[name] for part in parts]) for name in parts[0].sums}
    return Units(sums=sums, **columns)


def units_of(piece: Piece, by: str, sums: Collection[str], temperature: float, sure: float) -> Units:
    """The units of a piece: sequences or documents."""
    layout = piece.shard.layout
    names = {"key", *COUNTS} | (PLACES if by == "document" or piece.documents is not None else set())
    names |= {column for name in sums for column in _columns_of(name, layout)}
    names |= {"counts", "num_entries"} if "logits" in names else set()
    parts = []
    with closing(piece.shard.open()) as shard:
        for columns in piece.blocks(shard, sorted(names & layout.columns().keys())):
            groups_N = groups(columns, by)
            size = len(columns["num_targets"]) if by == "sequence" else len(columns["document_lengths"])
            found = {
                name: np.bincount(groups_N, weights=_values(name, columns, layout, temperature, sure), minlength=size)
                for name in sums
            }
            counts = np.bincount(groups_N, minlength=size)
            parts.append(Units(columns["key"], columns["num_tokens"], columns["num_documents"], counts, found))
    return together(parts)


PLACES = {"loss_mask", "document_lengths"}
"""Columns that say in which document a target is."""


def groups(columns: Columns, by: str) -> np.ndarray:
    """int64 [N]: the sequence, or the document, of every target, counted through all sequences."""
    if by == "sequence":
        return np.repeat(np.arange(len(columns["num_targets"])), columns["num_targets"])
    is_target_M = columns["loss_mask"].copy()
    is_target_M[np.cumsum(columns["num_tokens"]) - columns["num_tokens"]] = False
    lengths = columns["document_lengths"]
    return np.repeat(np.arange(len(lengths)), lengths)[is_target_M]


def _columns_of(name: str, layout: ShardLayout) -> set[str]:
    logsumexps = {"logits", "tail_logprobs"} if layout.on_grid else {"logsumexps"}
    return {
        "entropy": {"entropies"},
        "tail": {"tail_logprobs"},
        "sure": logsumexps,
        "label": {"label_logits", *logsumexps},
        "label_at_1": {"label_logits", *logsumexps},
    }[name]


def _values(name: str, columns: Columns, layout: ShardLayout, temperature: float, sure: float) -> np.ndarray:
    """[N]: what is summed; the numbers that `SparseTargets` gives."""
    T = 1.0 if name == "label_at_1" else temperature
    at = column_of(layout.spec.temperatures, T)
    if name == "entropy":
        return columns["entropies"][:, at]
    if name == "tail":
        return np.exp(columns["tail_logprobs"][:, at])
    if layout.on_grid:
        logits = columns["logits"]
        if layout.spec.is_ragged:
            logits = padded(logits, is_entry(columns["counts"], layout.spec.top_k), -np.inf)
        logsumexps_N = logsumexps_of(logits, columns["tail_logprobs"][:, [at]], (T,))[:, 0]
    else:
        logsumexps_N = columns["logsumexps"][:, at]
    if name == "sure":
        return np.exp(-logsumexps_N) >= np.float32(sure)  # the largest logit is 0
    return columns["label_logits"] / np.float32(T) - logsumexps_N
