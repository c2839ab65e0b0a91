"""The settings of `pipeline demo`."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.formats.containers import CONTAINERS
from pipeline.settings import Settings, setting
from stages.cache_logits.engines import ENGINES


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Settings):
    """Settings of `pipeline demo`."""

    work: Path = setting(Path("data/demo"), "Folder for everything that the demo makes; finished commands are reused.")
    engine: str = setting("vllm", "What runs the teacher.", choices=ENGINES.names)
    format: str = setting("arrow", "Container of the shards.", choices=CONTAINERS.names)
