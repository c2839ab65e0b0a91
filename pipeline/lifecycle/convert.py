"""The command `pipeline convert`: the same cache in the other container."""

import dataclasses
import functools

from pipeline.cache.folder import CacheFolder
from pipeline.cache.manifest import TOKENIZER, CacheManifest
from pipeline.cache.pieces import Piece
from pipeline.cache.reader import whole_cache
from pipeline.cache.shard import StoredShard
from pipeline.cpu import available_cores
from pipeline.errors import ConfigError
from pipeline.lifecycle.copying import copy_piece
from pipeline.lifecycle.settings import ConvertConfig
from pipeline.parallel import in_processes
from pipeline.progress import Reporter
from pipeline.stores.store import Store


def convert_cache(config: ConvertConfig, reporter: Reporter | None = None) -> CacheManifest:
    """Copy every shard of a finished cache into the other container; returns the new manifest.

    Each copy is read back and compared before it is committed. Killed and run again, it continues; several
    may run at once. The new cache is what `pipeline cache-logits --format` would have made.
    """
    reporter = reporter or Reporter()
    source = whole_cache(config.cache)
    if source.manifest.container == config.format:
        raise ConfigError(f"{config.cache}: is a cache of {config.format} shards already; there is nothing to convert.")
    manifest = dataclasses.replace(source.manifest, container=config.format)
    new = CacheFolder.begin(config.out, manifest, config.cache / TOKENIZER, source.sketch_contents())
    new.remove_leftovers()
    todo = new.todo()
    reporter.log(f"{config.out}: {len(todo)} of {manifest.num_partitions} shards to convert to {config.format}.")
    convert = functools.partial(_convert, config.out)
    shards = [source.shard(part) for part in todo]
    with reporter.progress("convert", sum(shard.commit.num_tokens for shard in shards)) as progress:
        for num_tokens in in_processes(convert, shards, config.workers or available_cores()):
            progress.advance(num_tokens)
    reporter.log(
        f"{config.out}: complete, {manifest.num_sequences:,} sequences; every shard was read back and is equal."
    )
    return manifest


def _convert(out: Store, shard: StoredShard) -> int:
    copy_piece(Piece(shard), CacheFolder(out), shard.commit.partition)
    return shard.commit.num_tokens
