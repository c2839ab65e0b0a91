"""report.html: the curves of a run, in one page without anything to download."""

from typing import Any

from pipeline.config import TrainConfig
from pipeline.progress import Reporter


def write_report(config: TrainConfig, log: list[dict[str, Any]], metrics: dict[str, Any], reporter: Reporter) -> None:
    """Nothing yet."""
