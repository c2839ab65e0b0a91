"""How a model lies on the ranks of a run, by the names that settings take. Loads no torch."""

from typing import Any

SHARDINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "fsdp2": {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "reshard_after_forward": True,
        "state_dict_type": "SHARDED_STATE_DICT",
        "cpu_ram_efficient_loading": False,
    },
}
"""The `fsdp_config` of transformers; nothing where every rank keeps the whole model."""
