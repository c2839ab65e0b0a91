"""A sequence in the form in which a shard keeps it: encoded from what an engine said, or copied from another shard."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.cache.commits import ShardCommit
from pipeline.corpus import TokenSequence
from pipeline.formats.layout import ShardLayout, encode_all
from pipeline.targets import SparseTargets


@dataclass(frozen=True, kw_only=True)
class StoredSequence:
    """What a writer of shards takes."""

    columns: dict[str, np.ndarray]
    """The stored columns."""
    targets: SparseTargets
    """As they were captured; those of a copy as they are stored."""
    source: ShardCommit | None = None
    """The shard that it is copied from; None if it was captured just now."""

    @classmethod
    def encoded(
        cls, captured: Sequence[tuple[TokenSequence, SparseTargets]], layout: ShardLayout
    ) -> list["StoredSequence"]:
        """What was captured, rounded as far as the layout's bound allows."""
        columns = encode_all(layout, captured)
        return [cls(columns=own, targets=targets) for own, (_, targets) in zip(columns, captured)]
