"""One sequence, token by token: what the teacher said of each, and what it would rather have had."""

from dataclasses import dataclass

import numpy as np

from pipeline.cache.measures import documents_of, group_means, measured
from pipeline.formats.layout import CachedSequence
from pipeline.spelling import Speller


@dataclass(frozen=True, kw_only=True)
class Said:
    """What the teacher said of a token that is a label."""

    label_prob: float
    surprise: float
    entropy: float
    tail_mass: float
    rank: int | None
    """Of the label among the entries, from 1; None if it is none of them."""
    alternatives: list[tuple[int, str, float]]
    """Id, text and probability of the most probable entries, the largest first."""
    draws: list[tuple[int, str, int]]
    """Id, text and count of what was drawn most often from the tail."""


@dataclass(frozen=True, kw_only=True)
class Token:
    """A token of a sequence."""

    position: int
    index: int
    """Its id."""
    text: str
    """Empty if the character that it is a part of comes with a later token."""
    is_label: bool
    document: int
    begins: bool
    """Whether it is the first of its document."""
    said: Said | None
    """None where the token is no label, or is the first of the sequence, which nothing predicts."""


def tokens_of(sequence: CachedSequence, speller: Speller, temperature: float, entries: int, stop: int) -> list[Token]:
    """The tokens before `stop`, with so many alternatives each."""
    stop = min(stop, len(sequence.token_ids))
    starts = np.cumsum(sequence.document_lengths) - sequence.document_lengths
    documents = np.repeat(np.arange(len(starts)), sequence.document_lengths)
    texts = speller.row(sequence.token_ids[:stop].tolist())
    targets = np.searchsorted(sequence.target_positions + 1, np.arange(stop))
    said = _all_said(sequence, speller, temperature, entries, int(np.searchsorted(sequence.target_positions + 1, stop)))
    predicted = np.isin(np.arange(stop), sequence.target_positions + 1)
    begins = np.isin(np.arange(stop), starts)
    return [
        Token(
            position=position,
            index=int(sequence.token_ids[position]),
            text=texts[position],
            is_label=bool(sequence.loss_mask[position]),
            document=int(documents[position]),
            begins=bool(begins[position]),
            said=said[targets[position]] if predicted[position] else None,
        )
        for position in range(stop)
    ]


def _all_said(sequence: CachedSequence, speller: Speller, temperature: float, entries: int, count: int) -> list[Said]:
    """Of the first `count` targets."""
    targets = sequence.targets.take(slice(0, count))
    measures, probs, counts = measured(targets, temperature), targets.probs(temperature), targets.counts
    is_label = targets.ids == sequence.token_ids[sequence.target_positions[:count] + 1][:, None]
    return [
        Said(
            label_prob=float(np.exp(-measures.surprises[row])),
            surprise=float(measures.surprises[row]),
            entropy=float(measures.entropies[row]),
            tail_mass=float(measures.tail_masses[row]),
            rank=int(is_label[row].argmax()) + 1 if is_label[row].any() else None,
            alternatives=[
                (index, speller.token(index), prob)
                for index, prob in zip(targets.ids[row, : counts[row]].tolist(), probs[row, :entries].tolist())
            ],
            draws=_most_drawn(targets.draws[row], speller, entries),
        )
        for row in range(count)
    ]


def _most_drawn(draws: np.ndarray, speller: Speller, entries: int) -> list[tuple[int, str, int]]:
    ids, counts = np.unique(draws[draws >= 0], return_counts=True)
    order = np.argsort(-counts, kind="stable")[:entries]
    return [(int(ids[at]), speller.token(int(ids[at])), int(counts[at])) for at in order]


def document_means(sequence: CachedSequence, temperature: float) -> list[tuple[int, int, float]]:
    """Tokens, targets and mean surprise of every document; nan of one without targets."""
    surprises = measured(sequence.targets, temperature).surprises
    counts, means = group_means(surprises, documents_of(sequence), len(sequence.document_lengths))
    return list(zip(sequence.document_lengths.tolist(), counts.tolist(), means.tolist()))
