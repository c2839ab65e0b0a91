"""The settings of `pipeline prepare` and `pipeline preview`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.settings import Settings, required, setting
from pipeline.stores.store import Store
from pipeline.tables import Table
from stages.prepare.quality import rules_of

PACKINGS: Table[Any] = Table(
    {
        "isolated": "stages.prepare.packing:IsolatedPacker",
        "crossing": "stages.prepare.packing:CrossingPacker",
        "none": "stages.prepare.packing:SinglePacker",
    }
)
"""Each a kind of `packing.Packer`."""
OVERLONG = DROP, TRUNCATE, CUT = "drop", "truncate", "cut"


@dataclass(frozen=True, kw_only=True)
class TextConfig(Settings):
    """How text becomes sequences."""

    inputs: tuple[Store, ...] = required(
        "Files, folders or URLs: .txt, .md, .json, .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .arrow.",
        argument=True,
    )
    tokenizer: Path = required("Folder of the teacher's tokenizer, or the teacher's name on a model hub.")
    sequence_length: int = setting(2048, "Longest sequence, in tokens.")
    text_field: str = setting("text", "Field or column that holds a document's text.")
    source_field: str | None = setting(
        None, "Field or column that names what a record came from; none takes the name of its file."
    )
    packing: str = setting(
        "isolated",
        "How short documents share a sequence: 'isolated' keeps attention inside each document, "
        "'crossing' lets it cross, 'none' writes one piece of a document a sequence.",
        choices=PACKINGS.names,
    )
    overlong: str = setting(
        DROP,
        "What becomes of a conversation, or a prompt with its completion, that is longer than a sequence: 'drop', "
        "'truncate' (its oldest messages, or the beginning of the prompt, go; system messages and answers stay whole), "
        "'cut' into pieces as plain text always is.",
        choices=OVERLONG,
    )
    last_turn_only: bool = setting(False, "Only the last turn of the assistant carries loss.")
    quality: tuple[str, ...] = setting(
        (),
        "Drop plain texts that break rules of quality: 'gopher', 'c4', 'code', or single rules such as "
        "gopher-repeated-lines (docs/data.md lists them). Repeatable.",
    )
    trust_remote_code: bool = setting(
        False, "Run the code that the tokenizer's folder brings along; for those whose maker you trust."
    )

    def check(self) -> None:
        if not self.inputs:
            raise ConfigError("no input was given; name at least one file or folder.")
        self.at_least("sequence_length", 2)
        rules_of(self.quality)


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(TextConfig):
    """Settings of `pipeline prepare`."""

    out: Store = required("Folder or URL to write the tokenised corpus to.")
    partition_tokens: int = setting(16_777_216, "Tokens in one file of the corpus.")
    skip_bad_lines: bool = setting(False, "Count and skip records that cannot be read, instead of stopping.")
    source_weights: tuple[str, ...] = setting(
        (), "NAME=SHARE: of a source only that share of its documents, chosen by their content; repeatable."
    )
    near_duplicates: float | None = setting(
        None, "Drop plain texts of which so large a share, such as 0.8, is in one before them (MinHash; datasketch)."
    )
    rejected: Path | None = setting(None, "List what --quality and --near-duplicates drop in this file, as JSON lines.")
    workers: int | None = setting(
        None, "Processes that share the work; none takes all cores, and one where a launcher starts the workers."
    )
    worker_from_env: bool = setting(
        False, "Be one worker of many, as PIPELINE_WORKER, a Slurm array, a Kubernetes Indexed Job or srun says."
    )
    lease_s: float = setting(
        180.0, "Seconds without a heartbeat after which others take a worker's tasks.", flag="--lease-seconds"
    )
    max_failures: int = setting(3, "Failures of a task after which it is set aside and the rest goes on.")
    retry_failed: bool = setting(False, "Try again what was set aside.")

    def check(self) -> None:
        super().check()
        for name in ("partition_tokens", "workers", "max_failures"):
            self.at_least(name, 1)
        self.shares()
        self.positive("lease_s", (self.lease_s,))
        if self.near_duplicates is not None and not 0.5 <= self.near_duplicates <= 1:
            raise ConfigError(f"near_duplicates is {self.near_duplicates}; it must lie in [0.5, 1].")
        if self.rejected is not None and not self.quality and self.near_duplicates is None:
            raise ConfigError("rejected is set, but nothing is: give --quality or --near-duplicates too.")

    def shares(self) -> dict[str, float]:
        """The share of each source that is not taken whole; raises ConfigError."""
        shares = {}
        for given in self.source_weights:
            name, _, share = given.rpartition("=")
            try:
                shares[name] = float(share)
            except ValueError:
                shares[name] = -1.0
            if not name or not 0 <= shares[name] <= 1:
                raise ConfigError(
                    f"source_weights has {given!r}; expected NAME=SHARE with a share from 0 to 1: a document is in a "
                    "corpus once, and repeated by training for more epochs."
                )
        return shares


@dataclass(frozen=True, kw_only=True)
class PreviewConfig(TextConfig):
    """Settings of `pipeline preview`."""

    tokenizer: Path | None = setting(  # type: ignore[assignment]
        None, "Folder or name of the teacher's tokenizer; a corpus has its own."
    )
    rows: int = setting(3, "Rows to show.")
    longest: int = setting(2000, "Tokens of a row to show.")
    borders: bool = setting(True, "Show where tokens begin: by shades, or by dots where there is no colour.")
    color: bool | None = setting(None, "Colour the labels instead of putting them in «»; none does so on a terminal.")

    def check(self) -> None:
        super().check()
        self.at_least("rows", 1)
        self.at_least("longest", 1)
