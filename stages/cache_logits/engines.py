"""The engines that run a teacher, by the name that `--engine` takes."""

from typing import Any

from pipeline.tables import Table

ENGINES: Table[Any] = Table(
    {
        "vllm": "stages.cache_logits.vllm_engine:VllmEngine",
        "transformers": "stages.cache_logits.transformers_engine:TransformersEngine",
    }
)
"""Each is called with a teacher, the settings and the longest sequence, and gives an `engine.Engine`."""
