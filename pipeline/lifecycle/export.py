"""The command `pipeline export`: cached targets as the plain lists that other trainers read.

One Parquet file a shard. A file that has its final name is whole, so that a killed export continues.
"""

import functools
from collections.abc import Iterator
from contextlib import closing

import pyarrow.parquet as pq

from pipeline.cache.manifest import CacheManifest
from pipeline.cache.pieces import Piece
from pipeline.cache.reader import open_cache
from pipeline.cpu import available_cores
from pipeline.errors import CacheMismatchError, ConfigError
from pipeline.files import remove_partials, replacing
from pipeline.formats.layout import ALIGNMENT
from pipeline.lifecycle.export_layouts import ExportLayout, Row
from pipeline.lifecycle.settings import EXPORT_LAYOUTS, ExportConfig
from pipeline.ownership import claim, entries_that_differ, told
from pipeline.parallel import in_processes
from pipeline.progress import Reporter
from pipeline.targets import column_of

RECORD = ".export.json"
"""What the folder is an export of; hidden, so that readers of whole folders pass it over."""
ROW_GROUP_TOKENS = 65_536


def export_cache(config: ExportConfig, reporter: Reporter | None = None) -> None:
    """Write the finished cache as Parquet files of `config.layout` at `config.temperature` into `config.out`."""
    reporter = reporter or Reporter()
    cache = open_cache(config.cache)
    column_of(cache.manifest.temperatures, config.temperature)
    if cache.manifest.top_k == 0:
        raise ConfigError(f"{config.cache}: holds draws alone (top_k is 0); an export needs a top k.")
    _open_folder(config, cache.manifest)
    pieces = cache.pieces()
    todo = [piece for piece in pieces if not (config.out / file_name(piece.shard.commit.partition)).is_file()]
    reporter.log(f"{config.out}: {len(todo)} of {len(pieces)} files to write, columns of {config.layout!r}.")
    write = functools.partial(_write_file, config)
    with reporter.progress("export", sum(piece.shard.commit.num_tokens for piece in todo)) as progress:
        for num_tokens in in_processes(write, todo, config.workers or available_cores()):
            progress.advance(num_tokens)
    reporter.log(f"{config.out}: complete, {cache.manifest.num_targets:,} targets at T={config.temperature:g}.")


def file_name(partition: int) -> str:
    """Name of the file that holds the sequences of a partition."""
    return f"part-{partition:05d}.parquet"


def _open_folder(config: ExportConfig, manifest: CacheManifest) -> None:
    record = {"cache": manifest.identity_hash(), "layout": config.layout, "temperature": config.temperature}
    different = entries_that_differ(claim(config.out, RECORD, record, "export"), record, record)
    if different:
        raise CacheMismatchError(f"{config.out}: holds another export: {told(different)}; choose another --out.")
    remove_partials(config.out)


def _write_file(config: ExportConfig, piece: Piece) -> int:
    """Write one file; returns the tokens of its shard."""
    layout: ExportLayout = EXPORT_LAYOUTS[config.layout]
    metadata = {"temperature": repr(config.temperature), "alignment": ALIGNMENT, "columns": config.layout}
    schema = layout.schema.with_metadata(metadata)
    final = config.out / file_name(piece.shard.commit.partition)
    with replacing(final) as partial, pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        for rows in _row_groups(_rows(config, piece)):
            writer.write_table(layout.table(rows, schema))
    return piece.shard.commit.num_tokens


def _row_groups(rows: Iterator[Row]) -> Iterator[list[Row]]:
    group: list[Row] = []
    num_tokens = 0
    for row in rows:
        group.append(row)
        num_tokens += len(row["input_ids"])
        if num_tokens >= ROW_GROUP_TOKENS:
            yield group
            group, num_tokens = [], 0
    if group:
        yield group


def _rows(config: ExportConfig, piece: Piece) -> Iterator[Row]:
    with closing(piece.shard.open()) as shard:
        for row, columns in enumerate(piece.sequences(shard)):
            yield from EXPORT_LAYOUTS[config.layout].rows(piece.shard.decode(columns, row), config.temperature)
