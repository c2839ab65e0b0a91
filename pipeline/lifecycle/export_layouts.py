"""The columns of an export, one `ExportLayout` a reader.

`plain` is one row a sequence and one list entry a target. `axolotl` is what axolotl's KD plugin takes as a
tokenised dataset: one row a document and one list entry a token, aligned with the hidden states: entry i is the
teacher's distribution of token i + 1, and the trainer shifts the labels itself.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.formats.layout import CachedSequence
from pipeline.formats.ragged import is_entry

Row = dict[str, np.ndarray]

COUNTS = "counts"
"""Of a row, and no column of a file: how many entries each of its targets has."""
IGNORED = -100
"""Label of a token that carries no loss."""
NO_LOGPROB = np.float32(-1e9)
"""Log-probability where there is no entry: exp of it is 0, and it is finite."""


@dataclass(frozen=True)
class ExportLayout:
    """How the rows of a file are made and which columns they have."""

    schema: pa.Schema
    rows: Callable[[CachedSequence, float], Iterator[Row]]
    """The rows of a sequence at a temperature."""

    def table(self, rows: Sequence[Row], schema: pa.Schema) -> pa.Table:
        """Rows as a table; a column of [n, K] arrays becomes lists of lists, as long as COUNTS says if a row has it."""
        counts = [row[COUNTS] for row in rows if COUNTS in row]
        columns = [_lists([row[field.name] for row in rows], field.type, counts) for field in schema]
        return pa.table(columns, schema=schema)


def _lists(parts: list[np.ndarray], kind: pa.DataType, counts: list[np.ndarray]) -> pa.Array:
    offsets = pa.array(np.cumsum([0, *map(len, parts)]), pa.int32())
    flat = np.concatenate(parts)
    values = pa.array(flat.reshape(-1))
    if flat.ndim == 2:
        lengths = np.concatenate(counts) if counts else np.full(len(flat), flat.shape[1])
        ends = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
        values = pa.ListArray.from_arrays(ends, pa.array(flat[is_entry(lengths, flat.shape[1])]))
    return pa.ListArray.from_arrays(offsets, values).cast(kind)


def _plain_rows(sequence: CachedSequence, temperature: float) -> Iterator[Row]:
    targets = sequence.targets
    yield {
        "input_ids": sequence.token_ids,
        "loss_mask": sequence.loss_mask,
        "document_lengths": sequence.document_lengths,
        "target_positions": sequence.target_positions,
        "target_ids": targets.ids,
        "target_logprobs": targets.logprobs(temperature),
        "tail_mass": targets.tail_mass(temperature),
        COUNTS: targets.counts,
    }


def _axolotl_rows(sequence: CachedSequence, temperature: float) -> Iterator[Row]:
    targets, length, top_k = sequence.targets, len(sequence.token_ids), sequence.targets.top_k
    is_kept = targets.logits > -np.inf
    ids = np.tile(np.arange(top_k, dtype=np.int32), (length, 1))
    logprobs = np.full((length, top_k), NO_LOGPROB, np.float32)
    mask = np.zeros((length, top_k), np.int8)
    ids[sequence.target_positions] = targets.ids
    logprobs[sequence.target_positions] = np.where(is_kept, targets.logprobs(temperature), NO_LOGPROB)
    mask[sequence.target_positions] = is_kept
    labels = np.where(sequence.loss_mask, sequence.token_ids, np.int32(IGNORED))
    ends = np.cumsum(sequence.document_lengths)
    for start, end in zip(ends - sequence.document_lengths, ends):
        if mask[start:end].any():
            yield {
                "input_ids": sequence.token_ids[start:end],
                "attention_mask": np.ones(end - start, np.int8),
                "labels": labels[start:end],
                "target_token_ids": ids[start:end],
                "target_logprobs": logprobs[start:end],
                "target_mask": mask[start:end],
            }


def _schema(**kinds: pa.DataType) -> pa.Schema:
    return pa.schema([(name, pa.list_(kind)) for name, kind in kinds.items()])


PLAIN = ExportLayout(
    _schema(
        input_ids=pa.int32(),
        loss_mask=pa.bool_(),
        document_lengths=pa.int32(),
        target_positions=pa.int32(),
        target_ids=pa.list_(pa.int32()),
        target_logprobs=pa.list_(pa.float32()),
        tail_mass=pa.float32(),
    ),
    _plain_rows,
)
AXOLOTL = ExportLayout(
    _schema(
        input_ids=pa.int32(),
        attention_mask=pa.int8(),
        labels=pa.int32(),
        target_token_ids=pa.list_(pa.int32()),
        target_logprobs=pa.list_(pa.float32()),
        target_mask=pa.list_(pa.int8()),
    ),
    _axolotl_rows,
)
