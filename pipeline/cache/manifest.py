"""The manifest of a cache: what it is a cache of, and how its work is divided.

Written once, before the teacher runs, and never changed. It is the only interface between the
two stages. `identity` is what must be equal for two runs to write into one folder.

    CACHE/
      manifest.json           this document
      manifest.copy.json      the same again, for `pipeline verify --repair`
      shards/                 one file a partition, named by its partition and writer
      commits/00000.json      names the shard of partition 0 and its checksum
      index.arrow             all commit records of a complete cache; made from them when it is opened
      tokenizer/              the tokenizer that made the ids
"""

from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import xxhash
from msgspec import Meta

from pipeline.documents import Count, FileName, Hash, Temperature, Text, Width, document_of, short
from pipeline.errors import CacheCorruptError, CacheIncompleteError, CacheMismatchError
from pipeline.files import canonical_json
from pipeline.formats.containers import CONTAINERS
from pipeline.formats.grid import WARMEST
from pipeline.formats.layout import ALIGNMENT, ShardCounts, ShardLayout
from pipeline.ownership import Differences, entries_that_differ, told
from pipeline.stores.places import store_of
from pipeline.stores.sealed import read_json, write_json
from pipeline.stores.store import Store
from pipeline.targets import TargetSpec
from pipeline.tokenizer import TokenizerIdentity

FORMAT = "sparse-target-cache"
FORMAT_VERSIONS = (2, 3)
"""That are read; a cache is written in the first that can hold it."""
MANIFEST = "manifest.json"
COPY = "manifest.copy.json"
TOKENIZER = "tokenizer"
PROVENANCE = ("settings", "software", "chat_template", "tokenizer_files", "largest_token_id", "end_token_ids")
"""Entries that tell where a cache comes from and do not decide what is in it."""
SINCE_3 = {"top_p": None, "top_p_temperature": None, "min_k": None, "tail_rank": 0, "sketch": None}
"""Entries that a cache of format version 2 does not have, and what they are of one that could be one."""
COLLECTION = ("container", "corpus", "packing", "sequence_length", "num_tokens", "num_targets", "partitions")
"""Entries that say which sequences a cache has and how they are kept; a sequence's targets do not depend on them."""


@dataclass(frozen=True, kw_only=True)
class CacheManifest:
    """What the targets of a cache are targets of."""

    teacher: dict[str, Any]
    """Architecture, hashes of config and weights, dtypes of body and head, quantisation, engine."""
    tokenizer: TokenizerIdentity
    vocab_size: Width
    """Real vocabulary: columns of the teacher's head from here on are padding and take no part."""
    padded_vocab_size: Width
    """Rows of the teacher's head."""
    top_k: Width
    temperatures: Annotated[tuple[Temperature, ...], Meta(min_length=1, max_length=1024)]
    tail_samples: Width
    """Draws from the tail of each position."""
    draw_temperature: Temperature | None
    """Temperature of the draws; None without draws."""
    max_kl_error: Annotated[float, Meta(ge=0, le=1)]
    """Bound on the mean KL error of every shard's rounding, nats, at every temperature; 0 is lossless."""
    container: Text
    """Name of the kind of file that a shard is."""
    corpus: Hash
    """Fingerprint of the tokenised corpus."""
    packing: Text
    sequence_length: Width
    """Longest sequence, tokens."""
    num_tokens: Count
    num_targets: Count
    partitions: Annotated[tuple[Count, ...], Meta(min_length=1)]
    """Row boundaries: partition i holds the sequences partitions[i] to partitions[i + 1]."""
    settings: dict[str, Any]
    """The resolved settings of the run that made the folder; not part of the identity."""
    software: dict[Text, Text]
    """Versions of the libraries; not part of the identity."""
    chat_template: Text | None = None
    """Hash of the tokenizer's template, which wrote the corpus's conversations, if it has any; not part of the
    identity, since the tokens are."""
    tokenizer_files: dict[FileName, Hash] = field(default_factory=dict)
    """xxh3-128 of every file in tokenizer/; not part of the identity, which is `tokenizer`."""
    tail_rank: Width = 0
    """Coefficients of the tail sketch of each position; 0 without a sketch."""
    sketch: Hash | None = None
    """xxh3-128 of the file of the tail sketch (pipeline.sketch), whose name it is part of; None without one."""
    largest_token_id: Count | None = None
    """In any sequence; None if the cache was written before it was recorded."""
    end_token_ids: tuple[Count, ...] = ()
    """Tokens that end the corpus's documents, such as an end of turn: where a student stops to write; not part of the
    identity. Empty if the corpus was written before they were recorded."""
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    """Mass that the entries of a position reach, with as few of the top k as that takes; None keeps all of them."""
    top_p_temperature: Temperature | None = None
    """Captured temperature at which the mass counts; None without `top_p`."""
    min_k: Width | None = None
    """Entries that a position has at least; None without `top_p`."""

    def __post_init__(self) -> None:
        """Raise ValueError if the entries contradict each other."""
        starts = self.partitions
        on_grid = self.top_k > 0 and self.max_kl_error > 0
        rules = {
            "partitions must rise from 0": starts[0] == 0 and all(one < other for one, other in pairwise(starts)),
            "vocab_size is above padded_vocab_size": self.vocab_size <= self.padded_vocab_size,
            "tail_rank and sketch are there together": (self.tail_rank > 0) == (self.sketch is not None),
            "a sketch stands beside stored entries": self.tail_rank == 0 or self.top_k > 0,
            "num_targets is above num_tokens": self.num_targets <= self.num_tokens,
            f"container is {short(self.container)}; this version knows {', '.join(CONTAINERS)}": self.container
            in CONTAINERS,
            f"no grid has a lowest temperature above {WARMEST:g}": not on_grid or min(self.temperatures) <= WARMEST,
            **self._rules_of_top_p(),
        }
        if broken := [rule for rule, holds in rules.items() if not holds]:
            raise ValueError("; ".join(broken))

    def _rules_of_top_p(self) -> dict[str, bool]:
        if self.top_p is None:
            none = (self.min_k, self.top_p_temperature) == (None, None)
            return {"without top_p there is no min_k and top_p_temperature": none}
        return {
            "top_p_temperature is none of the temperatures": self.top_p_temperature in self.temperatures,
            "min_k must lie between 1 and top_k": self.min_k is not None and 1 <= self.min_k <= self.top_k,
            "top_p leaves no draws": self.tail_samples == 0,
        }

    @property
    def num_sequences(self) -> int:
        return self.partitions[-1]

    @property
    def num_partitions(self) -> int:
        return len(self.partitions) - 1

    @property
    def spec(self) -> TargetSpec:
        """What the cache keeps of every position."""
        return TargetSpec(**{field.name: getattr(self, field.name) for field in fields(TargetSpec)})

    @property
    def format_version(self) -> int:
        """Of the format in which the cache is written."""
        return CONTAINERS[self.container].format_version(self.layout(ShardCounts.of(())))

    def layout(self, counts: ShardCounts) -> ShardLayout:
        """The layout of a shard of this cache."""
        return ShardLayout(counts=counts, spec=self.spec)

    def identity(self) -> dict[str, Any]:
        """The entries that decide what is in the cache, flat."""
        document = asdict(self)
        nested = {name: document.pop(name) for name in ("teacher", "tokenizer")}
        for name in PROVENANCE:
            del document[name]
        document |= {f"{name}.{key}": value for name, entries in nested.items() for key, value in entries.items()}
        return document

    def identity_hash(self) -> str:
        """xxh3-128 of `identity`, as hex; of a cache that format version 2 holds as it was then."""
        entries = self.identity()
        return xxhash.xxh3_128_hexdigest(canonical_json(_without_new(entries)))

    def target_identity(self) -> dict[str, Any]:
        """The entries that decide the targets of a sequence, whatever else is in the cache and how it is kept."""
        return {name: value for name, value in self.identity().items() if name not in COLLECTION}

    def target_differences(self, wanted: "CacheManifest") -> Differences:
        """The entries of `target_identity` that differ, with both values: this manifest's first."""
        entries = self.target_identity()
        return entries_that_differ(entries, wanted.target_identity(), entries)

    def require_equal(self, requested: "CacheManifest", folder: Store) -> None:
        """Raise CacheMismatchError, naming every difference, unless both describe the same targets."""
        entries = self.identity()
        different = entries_that_differ(entries, requested.identity(), entries)
        if different:
            found = told(different, "is")
            raise CacheMismatchError(f"{folder}: holds a cache made by other settings: {found}; choose another --out.")

    def write(self, folder: Store) -> bool:
        """Publish the manifest and then its copy; False if another process was first."""
        entries = asdict(self)
        document = {
            "format": FORMAT,
            "format_version": self.format_version,
            "alignment": ALIGNMENT,
            **_without_new(entries),
        }
        won = write_json(folder / MANIFEST, document, first_wins=True)
        return won and write_json(folder / COPY, document)

    @classmethod
    def read(cls, folder: str | Path | Store) -> "CacheManifest":
        """The manifest of the cache in `folder`; raises CacheError."""
        path = store_of(folder) / MANIFEST
        if not path.is_file():
            raise CacheIncompleteError(
                f"{folder}: no cache there ({MANIFEST} is missing); run `pipeline cache-logits`."
            )
        document = read_json(path, CacheCorruptError)
        found = (document.pop("format", None), document.pop("format_version", None), document.pop("alignment", None))
        if found not in [(FORMAT, version, ALIGNMENT) for version in FORMAT_VERSIONS]:
            known = " or ".join(map(str, FORMAT_VERSIONS))
            raise CacheMismatchError(
                f"{path}: format {short(found[:2])}, alignment {short(found[2])}; "
                f"this version reads {FORMAT!r} of version {known}, {ALIGNMENT!r}."
            )
        manifest = document_of(cls, document, path, CacheCorruptError)
        needed = manifest.layout(ShardCounts.of(())).format_version
        if needed > found[1]:
            raise CacheCorruptError(
                f"{path}: format_version is {found[1]}, but what it declares is of {needed}; the file is forged."
            )
        return manifest


def _without_new(entries: dict[str, Any]) -> dict[str, Any]:
    """Those that a version that knows none of SINCE_3 would have written, if the cache has nothing of it."""
    return {name: value for name, value in entries.items() if name not in SINCE_3 or value != SINCE_3[name]}
