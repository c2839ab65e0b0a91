"""Sequences of which some documents carry no loss: their labels are off, and their targets are left out.

The tokens stay, so that positions and what the teacher had read are as they were. Nothing is rounded again.

Shape suffixes: S sequences, D documents, M tokens, N targets.
"""

from dataclasses import replace

import numpy as np

from pipeline.corpus import TokenSequence, target_positions
from pipeline.formats.layout import CachedSequence, ShardLayout, checksum_of

Columns = dict[str, np.ndarray]


def mask_documents(columns: Columns, kept_D: np.ndarray, layout: ShardLayout) -> Columns:
    """The stored columns of one or more sequences without the targets of the other documents.

    `key` and `checksum` are those of the whole sequences still: `renamed` makes the others. Of columns that do not
    hold all, tokens and masks must be there.
    """
    counted_by = layout.ragged()
    known = {"num_tokens", "num_documents", "num_targets", "num_entries"}
    assert set(counted_by.values()) <= known, "rows of nothing that is known"
    kept_M = np.repeat(kept_D, columns["document_lengths"])
    firsts_S = np.cumsum(columns["num_tokens"]) - columns["num_tokens"]
    is_target_M = columns["loss_mask"].copy()
    is_target_M[firsts_S] = False  # nothing predicts the first token of a sequence
    sequence_of_M = np.repeat(np.arange(len(firsts_S)), columns["num_tokens"])
    still_N = kept_M[is_target_M]
    still = {"num_targets": still_N}
    still_of_S = sequence_of_M[is_target_M & kept_M]
    counts = {"num_targets": np.bincount(still_of_S, minlength=len(firsts_S))}
    if "counts" in columns:
        still["num_entries"] = np.repeat(still_N, columns["counts"])
        counts["num_entries"] = np.bincount(still_of_S, columns["counts"][still_N], minlength=len(firsts_S))
    masked = {
        name: values[still[counted_by[name]]] if counted_by.get(name) in still else values
        for name, values in columns.items()
    }
    masked |= {name: values.astype(columns[name].dtype) for name, values in counts.items()}
    return masked | {"loss_mask": columns["loss_mask"] & kept_M}


def renamed(columns: Columns) -> Columns:
    """The columns of one sequence with the key and the checksum of what they hold."""
    key = TokenSequence(**{name: columns[name] for name in ("token_ids", "loss_mask", "document_lengths")}).key
    named = columns | {"key": np.frombuffer(key, np.uint8)[None]}
    return named | {"checksum": np.array([checksum_of(named)], np.uint64)} if "checksum" in columns else named


def without_documents(sequence: CachedSequence, kept_D: np.ndarray) -> CachedSequence:
    """The sequence without the targets of the other documents."""
    kept_M = np.repeat(kept_D, sequence.document_lengths)
    loss_mask = sequence.loss_mask & kept_M
    tokens = TokenSequence(
        token_ids=sequence.token_ids, loss_mask=loss_mask, document_lengths=sequence.document_lengths
    )
    return replace(
        sequence,
        key=tokens.key,
        loss_mask=loss_mask,
        target_positions=target_positions(loss_mask),
        targets=sequence.targets.take(np.flatnonzero(kept_M[sequence.target_positions + 1])),
    )
