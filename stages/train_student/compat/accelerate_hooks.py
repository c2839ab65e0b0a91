"""What stage two relies on inside accelerate, and what would go wrong in silence without it.

| hook                                      | without it                                                       |
|-------------------------------------------|------------------------------------------------------------------|
| AcceleratorState.distributed_type, .fsdp_plugin | set by hand: `prepare` would keep the model whole on a CPU |
| AcceleratorState.mixed_precision          | its words name the type of gathered weights                      |
| FullyShardedDataParallelPlugin.mixed_precision_policy | batch, loss and reduced gradients are rounded        |
| AcceleratorState._reset_state             | a second training of the process finds the state of the first    |
"""

import functools
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from stages.train_student.compat.changed import changed

_changed = functools.partial(changed, "accelerate", "1.15")
COMPUTED_IN = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What accelerate calls the types of a computation."""


def require() -> None:
    """Raises PipelineError where something is gone."""
    if not hasattr(AcceleratorState, "_reset_state"):
        raise _changed("AcceleratorState._reset_state", "is gone")
    if "mixed_precision_policy" not in FullyShardedDataParallelPlugin.__dataclass_fields__:
        raise _changed("FullyShardedDataParallelPlugin.mixed_precision_policy", "is gone")


def insist_on_fsdp(state: Any, plugin_arguments: dict[str, Any]) -> None:
    """accelerate honours FSDP for accelerators alone and silently takes DDP on a CPU: insist.

    In mixed precision it would also round the batch, with the teacher's probabilities, the loss, and the sums of
    gradients over the ranks; only the gathered weights are to be rounded.
    """
    plugin = FullyShardedDataParallelPlugin(**plugin_arguments)
    if state.mixed_precision not in COMPUTED_IN:
        raise _changed(
            "AcceleratorState.mixed_precision",
            f"is {state.mixed_precision!r}, expected one of {', '.join(COMPUTED_IN)}",
        )
    dtype = COMPUTED_IN[state.mixed_precision]
    if dtype is not None:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin


def require_sharded(model: torch.nn.Module) -> None:
    """Raises PipelineError if `prepare` has left a model whole that was to be sharded."""
    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        raise _changed("AcceleratorState.fsdp_plugin", "has no effect; the model is not sharded")


def forget() -> None:
    """Reset what accelerate keeps of a training for the process's next one."""
    AcceleratorState._reset_state(reset_partial_state=True)
