"""The settings of `pipeline convert`, `merge` and `export`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cache.settings import VIEW_SUFFIX
from pipeline.errors import ConfigError
from pipeline.formats.containers import CONTAINERS
from pipeline.settings import Settings, required, setting
from pipeline.stores.store import Store
from pipeline.tables import Table

EXPORT_LAYOUTS: Table[Any] = Table(
    {"plain": "pipeline.lifecycle.export_layouts:PLAIN", "axolotl": "pipeline.lifecycle.export_layouts:AXOLOTL"}
)
"""Each an `exported.ExportLayout`."""


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(Settings):
    """Settings of `pipeline convert`."""

    cache: Store = required("Folder or URL of a finished cache.", argument=True)
    format: str = required("Container of the new shards.", choices=CONTAINERS.names)
    out: Store = required("Folder or URL to write the new cache to.")
    workers: int | None = setting(None, "Shards that are converted at the same time; none takes one a core.")

    def check(self) -> None:
        self.at_least("workers", 1)


@dataclass(frozen=True, kw_only=True)
class MergeConfig(Settings):
    """Settings of `pipeline merge`."""

    caches: tuple[Store, ...] = required(
        "Folders or URLs of two or more finished caches of one teacher, or views.", argument=True
    )
    out: Store = required("Folder or URL to write the new cache to.")
    format: str | None = setting(
        None, "Container of the new shards; none takes the first cache's.", choices=CONTAINERS.names
    )
    workers: int | None = setting(None, "Shards that are copied at the same time; none takes one a core.")

    def check(self) -> None:
        self.at_least("workers", 1)
        if len(self.caches) < 2 and not any(str(cache).endswith(VIEW_SUFFIX) for cache in self.caches):
            raise ConfigError(f"caches names {len(self.caches)} folder; a merge needs two or more, or a view.")


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Settings):
    """Settings of `pipeline export`."""

    cache: Store = required("Folder or URL of a finished cache, or a view.", argument=True)
    out: Path = required("Folder to write the files to.")
    to: str = setting("parquet", "Kind of file.", choices=("parquet",))
    layout: str = setting(
        "plain",
        "Columns: 'plain' has one entry a target, 'axolotl' one a token, as axolotl's KD plugin takes them.",
        choices=EXPORT_LAYOUTS.names,
    )
    temperature: float = setting(1.0, "Temperature T of the log-probabilities; the cache must hold it.")
    workers: int | None = setting(None, "Files that are written at the same time; none takes one a core.")

    def check(self) -> None:
        self.positive("temperature", (self.temperature,))
        self.at_least("workers", 1)
