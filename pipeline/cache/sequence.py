"""A sequence in the form in which a shard keeps it: encoded from what an engine said, or copied from another shard."""

from dataclasses import dataclass

import numpy as np

from pipeline.cache.commits import ShardCommit
from pipeline.corpus import TokenSequence
from pipeline.formats.layout import ShardLayout, encode
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
    def encoded(cls, sequence: TokenSequence, targets: SparseTargets, layout: ShardLayout) -> "StoredSequence":
        """What was captured, rounded as far as the layout's bound allows."""
        return cls(columns=encode(layout, sequence, targets), targets=targets)
