"""The settings of `pipeline verify`."""

from dataclasses import dataclass

from pipeline.settings import Settings, required, setting
from pipeline.stores.store import Store

VIEW_SUFFIX = ".json"
"""Of the names of views; a cache is a folder."""


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(Settings):
    """Settings of `pipeline verify`."""

    cache: Store = required("Folder or URL that `pipeline cache-logits` wrote to.", argument=True)
    repair: bool = setting(
        False, "Drop what is damaged: the next run of the same `pipeline cache-logits` computes that alone."
    )
    workers: int | None = setting(None, "Shards that are read at the same time; none takes one a core.")

    def check(self) -> None:
        self.at_least("workers", 1)
