"""The logical schema of a shard, the same in every container.

A shard holds whole sequences. Its columns are flat arrays over the shard's sequences,
tokens, documents or targets; the targets of a sequence are the rows of its
`target_positions`, in order.

Shape suffixes: S sequences, D documents, M tokens, N targets, K entries, T temperatures.
"""

from dataclasses import dataclass

import numpy as np

from pipeline.corpus import TokenSequence, target_positions
from pipeline.errors import CacheCorruptError
from pipeline.shards.codec import CODECS, Codec
from pipeline.targets import COLUMNS, SparseTargets

ALIGNMENT = "targets[j] is the teacher's distribution of token target_positions[j] + 1"

RAGGED = {
    "token_ids": "num_tokens",
    "loss_mask": "num_tokens",
    "document_lengths": "num_documents",
    "ids": "num_targets",
    "logits": "num_targets",
    "logsumexps": "num_targets",
    "tail_logprobs": "num_targets",
    "entropies": "num_targets",
    "label_logits": "num_targets",
    "draws": "num_targets",
}
"""The columns of which a sequence has several rows, and the column that counts them."""


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
class ShardLayout:
    """Sizes of a shard, known before the teacher runs, and how its values are rounded."""

    num_sequences: int
    num_tokens: int
    num_documents: int
    num_targets: int
    top_k: int
    num_draws: int
    temperatures: tuple[float, ...]
    codec: str

    @property
    def values(self) -> Codec:
        """The codec of the floating-point columns."""
        return CODECS[self.codec]

    def columns(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Every column's stored dtype and shape; a column without width is not stored."""
        temperatures = len(self.temperatures)
        shapes = {
            "key": (self.num_sequences, 16),
            "num_tokens": (self.num_sequences,),
            "num_documents": (self.num_sequences,),
            "num_targets": (self.num_sequences,),
            "document_lengths": (self.num_documents,),
            "token_ids": (self.num_tokens,),
            "loss_mask": (self.num_tokens,),
            "ids": (self.num_targets, self.top_k),
            "logits": (self.num_targets, self.top_k),
            "logsumexps": (self.num_targets, temperatures),
            "tail_logprobs": (self.num_targets, temperatures),
            "entropies": (self.num_targets, temperatures),
            "label_logits": (self.num_targets,),
            "draws": (self.num_targets, self.num_draws),
        }
        stored = {name: shape for name, shape in shapes.items() if 0 not in shape[1:]}
        dtypes = {"key": np.uint8, "loss_mask": np.bool_} | self.values.dtypes
        return {name: (np.dtype(dtypes.get(name, np.int32)), shape) for name, shape in stored.items()}

    def ragged(self) -> dict[str, str]:
        """The stored columns of which a sequence has several rows, and the column that counts them."""
        return {name: counted for name, counted in RAGGED.items() if name in self.columns()}


def encode(layout: ShardLayout, sequence: TokenSequence, targets: SparseTargets) -> dict[str, np.ndarray]:
    """The stored columns of one sequence."""
    expected = (len(sequence.target_positions), layout.top_k, layout.num_draws, layout.temperatures)
    found = (len(targets), targets.top_k, targets.draws.shape[1], targets.temperatures)
    assert found == expected, f"targets of (N, K, D, temperatures) {found} for a sequence of {expected}"
    columns = {
        "key": np.frombuffer(sequence.key, np.uint8)[None],
        "num_tokens": np.array([len(sequence.token_ids)], np.int32),
        "num_documents": np.array([len(sequence.document_lengths)], np.int32),
        "num_targets": np.array([len(targets)], np.int32),
        "document_lengths": sequence.document_lengths,
        "token_ids": sequence.token_ids,
        "loss_mask": sequence.loss_mask,
        **layout.values.encode({name: getattr(targets, name) for name in COLUMNS}),
    }
    return {name: columns[name] for name in layout.columns()}


def decode(columns: dict[str, np.ndarray], temperatures: tuple[float, ...], where: str) -> CachedSequence:
    """The sequence whose stored columns are given; raises CacheCorruptError if they contradict each other."""
    token_ids, loss_mask, lengths = (columns[name] for name in ("token_ids", "loss_mask", "document_lengths"))
    positions = target_positions(loss_mask)
    num_targets = len(columns["logsumexps"])
    if len(loss_mask) != len(token_ids) or lengths.sum() != len(token_ids) or len(positions) != num_targets:
        raise CacheCorruptError(
            f"{where}: tokens, mask, documents and targets do not fit each other; the shard is damaged."
        )
    values = {name: columns.get(name, np.zeros((num_targets, 0), np.float32)) for name in COLUMNS}
    values = {name: column.astype(_DECODED.get(name, np.float32), copy=False) for name, column in values.items()}
    return CachedSequence(
        key=columns["key"].tobytes(),
        token_ids=token_ids,
        loss_mask=loss_mask,
        document_lengths=lengths,
        target_positions=positions,
        targets=SparseTargets(temperatures=temperatures, **values),
    )


_DECODED = {"ids": np.int32, "draws": np.int32}
