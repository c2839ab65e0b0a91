"""The settings of `pipeline inspect`."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.settings import Settings, required, setting
from pipeline.stores.store import Store


@dataclass(frozen=True, kw_only=True)
class InspectConfig(Settings):
    """Settings of `pipeline inspect`."""

    cache: Store = required("Folder or URL of a cache, finished or not, or a view of one.", argument=True)
    sequence: str | None = setting(
        None, "Show one sequence: its number, from 0, or its key (32 hexadecimal digits), which is looked for."
    )
    worst: int = setting(0, "The so many positions and documents where the teacher was worst, of the sample.")
    html: Path | None = setting(None, "Write a page with figures of the sample and some of its sequences.")
    sample: int = setting(
        256, "Sequences that --worst and --html read, of as few shards as hold them; 'all' reads all.", words={"all": 0}
    )
    shards: int = setting(8, "Shards among which the sample is drawn; more only if these hold too few sequences.")
    seed: int = setting(0, "Of the sample.")
    temperature: float | None = setting(
        None, "Temperature T of what is said of positions; none takes 1, or the lowest that the cache has."
    )
    entries: int = setting(5, "Alternatives of the teacher to show at a position.")
    longest: int = setting(512, "Tokens of a sequence to show.")
    maps: int = setting(6, "Sequences that the page shows token by token.")
    tokenizer: Path | None = setting(None, "Folder or name of the tokenizer of the ids; none takes the cache's own.")
    trust_remote_code: bool = setting(False, "Run the tokenizer's own code.")

    def check(self) -> None:
        for name in ("worst", "sample", "maps"):
            self.at_least(name, 0)
        for name in ("shards", "entries", "longest"):
            self.at_least(name, 1)
        self.seed_fits()
