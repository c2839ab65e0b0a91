"""The settings of `pipeline status`."""

from dataclasses import dataclass

from pipeline.settings import Settings, required, setting
from pipeline.stores.store import Store


@dataclass(frozen=True, kw_only=True)
class StatusConfig(Settings):
    """Settings of `pipeline status`."""

    cache: Store = required("Folder or URL that `cache-logits` or `prepare` writes to.", argument=True)
    watch: bool = setting(False, "Show it again and again until nothing is left to do.")
    json: bool = setting(False, "One JSON document instead of text.")
    events: int = setting(0, "The last so many events of all workers too.")
    interval_s: float = setting(10.0, "Seconds between two looks with --watch.", flag="--interval")

    def check(self) -> None:
        self.at_least("events", 0)
        self.positive("interval_s", (self.interval_s,))
