"""The command `pipeline merge`: several caches of one teacher become one, every sequence once.

The sequences keep the order of the caches and their places in the shards; of those that come up again,
the first stays. A shard that loses none is copied byte for byte if the container stays the same.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from pipeline.cache.folder import CacheFolder
from pipeline.cache.manifest import TOKENIZER, CacheManifest
from pipeline.cache.pieces import Piece
from pipeline.cache.reader import Cache, open_cache
from pipeline.corpus import comparable_keys
from pipeline.cpu import available_cores
from pipeline.documents import short
from pipeline.errors import CacheMismatchError
from pipeline.files import canonical_json
from pipeline.lifecycle.copying import copy_piece
from pipeline.lifecycle.settings import MergeConfig
from pipeline.parallel import in_processes, map_in_threads
from pipeline.progress import Reporter
from pipeline.settings import resolved
from pipeline.stores.store import Store


@dataclass(frozen=True)
class _Part:
    """What becomes one partition of the new cache."""

    piece: Piece
    num_sequences: int
    num_tokens: int
    num_targets: int


def merge_caches(config: MergeConfig, reporter: Reporter | None = None) -> CacheManifest:
    """Merge the finished caches of `config` and return the new manifest.

    Raises CacheMismatchError, with what differs, unless all of them hold the same teacher's targets. Killed and
    run again, it continues.
    """
    reporter = reporter or Reporter()
    caches = [open_cache(folder) for folder in config.caches]
    for cache in caches[1:]:
        _require_same_targets(caches[0], cache)
    parts = _plan(caches)
    manifest = _manifest(config, caches, parts)
    new = CacheFolder.begin(config.out, manifest, caches[0].folder / TOKENIZER, caches[0].sketch_contents())
    new.remove_leftovers()
    todo = new.todo()
    twice = sum(len(cache) for cache in caches) - manifest.num_sequences
    reporter.log(
        f"{config.out}: {manifest.num_sequences:,} sequences; {twice:,} are in more than one cache and stored once; "
        f"{len(todo)} of {len(parts)} shards to copy."
    )
    tasks = [(parts[number], config.out, number) for number in todo]
    with reporter.progress("merge", sum(parts[number].num_tokens for number in todo)) as progress:
        for num_tokens in in_processes(_copy, tasks, config.workers or available_cores()):
            progress.advance(num_tokens)
    reporter.log(f"{config.out}: complete, {manifest.num_sequences:,} sequences, {manifest.num_targets:,} targets.")
    return manifest


def _copy(task: tuple[_Part, Store, int]) -> int:
    part, out, partition = task
    copy_piece(part.piece, CacheFolder(out), partition)
    return part.num_tokens


def _require_same_targets(first: Cache, other: Cache) -> None:
    different = first.manifest.target_differences(other.manifest)
    if different:
        found = "; ".join(
            f"{name} is {short(theirs, quoted=False)}, there {short(ours, quoted=False)}"
            for name, (ours, theirs) in different.items()
        )
        raise CacheMismatchError(f"{other.folder}: cannot be merged with {first.folder}: {found}.")


def _plan(caches: Sequence[Cache]) -> list[_Part]:
    """The partitions of the new cache; the same caches give the same."""
    pieces = [piece for cache in caches for piece in cache.pieces()]
    heads = map_in_threads(Piece.heads, pieces, available_cores())
    keys = np.concatenate([head["key"] for head in heads])
    _, firsts = np.unique(comparable_keys(keys), return_index=True)
    is_first = np.zeros(len(keys), bool)
    is_first[firsts] = True
    parts, start = [], 0
    for piece, head in zip(pieces, heads):
        kept = is_first[start : start + len(head["key"])]
        start += len(head["key"])
        if kept.any():
            sums = [int(head[name][kept].sum()) for name in ("num_tokens", "num_targets")]
            parts.append(_Part(piece.some(kept, head["num_documents"]), int(kept.sum()), *sums))
    return parts


def _manifest(config: MergeConfig, caches: Sequence[Cache], parts: Sequence[_Part]) -> CacheManifest:
    manifests = [cache.manifest for cache in caches]
    first = manifests[0]
    largest = [manifest.largest_token_id for manifest in manifests]  # of an older version's cache it is not known
    packings = sorted({manifest.packing for manifest in manifests})
    return dataclasses.replace(
        first,
        container=config.format or first.container,
        corpus=xxhash.xxh3_128_hexdigest(canonical_json([manifest.corpus for manifest in manifests])),
        packing="+".join(packings),
        sequence_length=max(manifest.sequence_length for manifest in manifests),
        num_tokens=sum(part.num_tokens for part in parts),
        num_targets=sum(part.num_targets for part in parts),
        partitions=tuple(np.cumsum([0, *(part.num_sequences for part in parts)]).tolist()),
        largest_token_id=None if None in largest else max(each for each in largest if each is not None),
        end_token_ids=tuple(sorted({token for manifest in manifests for token in manifest.end_token_ids})),
        settings=resolved(config) | {"merged": [manifest.settings for manifest in manifests]},
    )
