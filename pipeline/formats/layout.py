"""The logical schema of a shard, the same in every container.

A shard holds whole sequences. Its columns are flat arrays over the shard's sequences,
tokens, documents or targets; the targets of a sequence are the rows of its
`target_positions`, in order. Every sequence carries a checksum of its stored values, so that
whatever a container does to them, what comes out is what went in.

Targets with as many entries as reach a mass have rows of different lengths: `ids` and `logits` are then flat arrays
over the shard's entries, of which `counts` says how many each target has.

Shape suffixes: S sequences, D documents, M tokens, N targets, K entries of a target, E entries of all, T temperatures.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from pipeline.corpus import TokenSequence, target_positions
from pipeline.errors import CacheCorruptError
from pipeline.formats.codec import is_lossless, round_targets
from pipeline.formats.ragged import is_entry, padded, starts_of
from pipeline.targets import COLUMNS, SparseTargets, TargetSpec, concatenate, logsumexps_of, logsumexps_of_rows

ALIGNMENT = "targets[j] is the teacher's distribution of token target_positions[j] + 1"

RAGGED = {
    "token_ids": "num_tokens",
    "loss_mask": "num_tokens",
    "document_lengths": "num_documents",
    "counts": "num_targets",
    "ids": "num_targets",
    "logits": "num_targets",
    "levels": "num_targets",
    "logsumexps": "num_targets",
    "tail_logprobs": "num_targets",
    "entropies": "num_targets",
    "label_logits": "num_targets",
    "draws": "num_targets",
    "coefficients": "num_targets",
}
"""The columns of which a sequence has several rows, and the column that counts them, if all targets have K entries."""
OF_ENTRIES = {"ids": "num_entries", "logits": "num_entries"}
"""The same of columns that have a row an entry, if the targets have different numbers of them."""
OF_TARGETS = ("counts", *COLUMNS)
"""Columns that targets are made of."""


@dataclass(frozen=True, kw_only=True)
class CachedSequence:
    """A sequence and the teacher's targets for it."""

    key: bytes
    """16 bytes that name the token ids, mask and document boundaries."""
    token_ids: np.ndarray
    """int32 [S]"""
    loss_mask: np.ndarray
    """bool [S], True where the token is a label."""
    document_lengths: np.ndarray
    """int32 [D]: attention stays inside a document; adds up to S."""
    target_positions: np.ndarray
    """int32 [N]: `targets[j]` is the teacher's distribution of token `target_positions[j] + 1`."""
    targets: SparseTargets


@dataclass(frozen=True, kw_only=True)
class ShardCounts:
    """Sizes of a shard, known before the teacher runs."""

    num_sequences: int
    num_tokens: int
    num_documents: int
    num_targets: int

    @classmethod
    def of(cls, sequences: Sequence[TokenSequence]) -> "ShardCounts":
        """Of a shard that holds these sequences."""
        return cls(
            num_sequences=len(sequences),
            num_tokens=sum(len(sequence.token_ids) for sequence in sequences),
            num_documents=sum(len(sequence.document_lengths) for sequence in sequences),
            num_targets=sum(len(sequence.target_positions) for sequence in sequences),
        )


@dataclass(frozen=True, kw_only=True)
class ShardLayout:
    """How much a shard holds, and what of every position."""

    counts: ShardCounts
    spec: TargetSpec

    def columns(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Every column's stored dtype and shape; a column without width is not stored.

        Of columns with a row an entry, which nobody can count beforehand, the shape is the largest that it can be.
        """
        counts, spec = self.counts, self.spec
        temperatures = len(spec.temperatures)
        entries = (counts.num_targets * spec.top_k,) if spec.is_ragged else (counts.num_targets, spec.top_k)
        shapes = {
            "key": (counts.num_sequences, 16),
            "checksum": (counts.num_sequences,),
            "num_tokens": (counts.num_sequences,),
            "num_documents": (counts.num_sequences,),
            "num_targets": (counts.num_sequences,),
            "num_entries": (counts.num_sequences,),
            "document_lengths": (counts.num_documents,),
            "token_ids": (counts.num_tokens,),
            "loss_mask": (counts.num_tokens,),
            "counts": (counts.num_targets,),
            "ids": entries,
            "logits": entries,
            "levels": (counts.num_targets,),
            "logsumexps": (counts.num_targets, temperatures),
            "tail_logprobs": (counts.num_targets, temperatures),
            "entropies": (counts.num_targets, temperatures),
            "label_logits": (counts.num_targets,),
            "draws": (counts.num_targets, spec.tail_samples),
            "coefficients": (counts.num_targets, spec.tail_rank),
        }
        absent = {"logsumexps" if self.on_grid else "levels"}
        absent |= set() if spec.is_ragged else {"num_entries", "counts"}
        stored = {name: shape for name, shape in shapes.items() if 0 not in shape[1:] and name not in absent}
        return {name: (np.dtype(_DTYPES.get(name, np.int32)), shape) for name, shape in stored.items()}

    @property
    def num_bytes(self) -> int:
        """Of all columns as plain arrays: what an Arrow shard takes, but for its padding and schema.

        At most, where the targets have different numbers of entries.
        """
        return sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in self.columns().values())

    @property
    def on_grid(self) -> bool:
        """Whether logits lie on the grid of `pipeline.formats.grid`; logsumexps then follow from logits and tails."""
        return self.spec.top_k > 0 and not is_lossless(self.spec.max_kl_error)

    def ragged(self) -> dict[str, str]:
        """The stored columns of which a sequence has several rows, and the column that counts them."""
        counted = RAGGED | OF_ENTRIES if self.spec.is_ragged else RAGGED
        return {name: counted[name] for name in counted if name in self.columns()}

    @property
    def format_version(self) -> int:
        """Version of the format that a shard needs: 3 where targets have different numbers of entries, or a sketch."""
        return 3 if self.spec.is_ragged or self.spec.tail_rank else 2


_DTYPES = {
    "key": np.uint8,
    "checksum": np.uint64,
    "loss_mask": np.bool_,
    "levels": np.uint8,
    "coefficients": np.int16,
} | dict.fromkeys(("logits", "logsumexps", "tail_logprobs", "entropies", "label_logits"), np.float32)
"""Of the columns that are not int32."""


def encode(layout: ShardLayout, sequence: TokenSequence, targets: SparseTargets) -> dict[str, np.ndarray]:
    """The stored columns of one sequence, rounded as far as the layout's bound allows."""
    return encode_all(layout, [(sequence, targets)])[0]


def encode_all(
    layout: ShardLayout, captured: Sequence[tuple[TokenSequence, SparseTargets]]
) -> list[dict[str, np.ndarray]]:
    """The stored columns of every sequence: what `encode` makes of each, with fewer and longer calls of numpy.

    Between two calls a thread holds the interpreter, and has to get it back after each: those of one sequence are too
    short for several threads to gain anything.
    """
    spec = layout.spec
    for sequence, targets in captured:
        expected = (len(sequence.target_positions), spec.top_k, spec.tail_samples, spec.tail_rank, spec.temperatures)
        widths = (targets.top_k, targets.draws.shape[1], targets.coefficients.shape[1])
        found = (len(targets), *widths, targets.temperatures)
        assert found == expected, f"targets of (N, K, D, R, temperatures) {found} for a sequence of {expected}"
        assert spec.is_ragged or not targets.is_ragged, "rows of different lengths; the cache keeps K entries of all"
    rows = slices_of([len(targets) for _, targets in captured])
    labels = np.concatenate([sequence.token_ids[sequence.target_positions + 1] for sequence, _ in captured])
    together = concatenate([targets for _, targets in captured])
    rounded, levels = round_targets(together, labels, spec.max_kl_error, rows)
    return [_columns(layout, sequence, rounded[own], levels[own]) for (sequence, _), own in zip(captured, rows)]


def slices_of(lengths: Sequence[int]) -> list[slice]:
    """Where pieces of these lengths lie when one follows the other."""
    return [slice(end - length, end) for length, end in zip(lengths, itertools.accumulate(lengths))]


def _columns(
    layout: ShardLayout, sequence: TokenSequence, targets: SparseTargets, levels: np.ndarray
) -> dict[str, np.ndarray]:
    columns = {
        "key": np.frombuffer(sequence.key, np.uint8)[None],
        "num_tokens": np.array([len(sequence.token_ids)]),
        "num_documents": np.array([len(sequence.document_lengths)]),
        "num_targets": np.array([len(targets)]),
        "document_lengths": sequence.document_lengths,
        "token_ids": sequence.token_ids,
        "loss_mask": sequence.loss_mask,
        "levels": levels,
        **{name: getattr(targets, name) for name in COLUMNS},
    }
    if layout.spec.is_ragged:
        entries = targets.logits > -np.inf
        columns |= {"counts": entries.sum(axis=1), "num_entries": np.array([entries.sum()])}
        columns |= {name: columns[name][entries] for name in OF_ENTRIES}
    stored = {name: np.ascontiguousarray(columns[name], dtype) for name, (dtype, _) in _without_checksum(layout)}
    return stored | {"checksum": np.array([checksum_of(stored)], np.uint64)}


def checksum_of(columns: dict[str, np.ndarray]) -> int:
    """xxh3-64 of the bytes of one sequence's columns, in the order of their names, its checksum left out."""
    digest = xxhash.xxh3_64()
    for name in sorted(columns.keys() - {"checksum"}):
        digest.update(np.ascontiguousarray(columns[name]).reshape(-1).view(np.uint8).data)
    return digest.intdigest()


def decode(columns: dict[str, np.ndarray], layout: ShardLayout, where: str) -> CachedSequence:
    """The sequence whose stored columns are given; raises CacheCorruptError unless they are as they were written."""
    if checksum_of(columns) != columns["checksum"][0]:
        raise CacheCorruptError(f"{where}: the sequence does not match its checksum; the shard is damaged.")
    token_ids, loss_mask, lengths = (columns[name] for name in ("token_ids", "loss_mask", "document_lengths"))
    positions = target_positions(loss_mask)
    num_targets = len(columns["entropies"])
    fits = len(loss_mask) == len(token_ids) == lengths.sum() and len(positions) == num_targets
    if not fits or (lengths < 1).any():
        raise CacheCorruptError(
            f"{where}: tokens, mask, documents and targets do not fit each other; the shard is damaged."
        )
    return CachedSequence(
        key=columns["key"].tobytes(),
        token_ids=token_ids,
        loss_mask=loss_mask,
        document_lengths=lengths,
        target_positions=positions,
        targets=targets_of(columns, layout),
    )


def targets_of(columns: dict[str, np.ndarray], layout: ShardLayout) -> SparseTargets:
    """The targets in stored columns of one or more sequences."""
    num_targets, spec, tails = len(columns["entropies"]), layout.spec, columns["tail_logprobs"]
    empty = {
        "ids": np.int32,
        "draws": np.int32,
        "logits": np.float32,
        "coefficients": np.int16,
        "sketch_errors": np.float32,
    }
    values = {name: columns[name] for name in COLUMNS if name in columns}
    values |= {name: np.zeros((num_targets, 0), dtype) for name, dtype in empty.items() if name not in columns}
    if spec.is_ragged:
        ids, logits, starts = columns["ids"], columns["logits"], starts_of(columns["counts"])
        if layout.on_grid:
            values["logsumexps"] = logsumexps_of_rows(logits, starts, tails, spec.temperatures)
        entries = is_entry(columns["counts"], spec.top_k)
        values |= {"ids": padded(ids, entries, ids[starts][:, None]), "logits": padded(logits, entries, -np.inf)}
    elif layout.on_grid:
        values["logsumexps"] = logsumexps_of(values["logits"], tails, spec.temperatures)
    return SparseTargets(temperatures=spec.temperatures, **values)


def rows_of(columns: dict[str, np.ndarray], rows: slice, layout: ShardLayout) -> dict[str, np.ndarray]:
    """The columns of which some consecutive targets are made, out of those of more."""
    own = dict.fromkeys(OF_TARGETS, rows)
    if layout.spec.is_ragged:
        ends = np.concatenate([[0], np.cumsum(columns["counts"])])[rows.start :][: rows.stop - rows.start + 1]
        own |= dict.fromkeys(OF_ENTRIES, slice(ends[0], ends[-1]))
    return {name: columns[name][own[name]] for name in own if name in columns}


def _without_checksum(layout: ShardLayout) -> list[tuple[str, tuple[np.dtype, tuple[int, ...]]]]:
    return [(name, spec) for name, spec in layout.columns().items() if name != "checksum"]
