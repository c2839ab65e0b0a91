"""What stage two relies on inside peft, and what would go wrong in silence without it.

| hook                                             | without it                                             |
|--------------------------------------------------|--------------------------------------------------------|
| BaseTunerLayer                                   | nothing tells an adapted layer from a plain one        |
| LoraLayer.lora_A, lora_B, scaling, active_adapters, get_base_layer | the head's adapter is not in the loss |
| "lora_A" in the names of parameters              | first factors, whose gradient is zero, are reported    |
| ParamWrapper.parameter_name                      | an adapted stack of experts counts as frozen           |
| LoraConfig.target_parameters                     | stacks of experts get no adapter                       |
| PeftModel.save_pretrained(save_embedding_layers) | a frozen head is put into every checkpoint             |
| PeftModel.merge_and_unload                       | the written student lacks its adapters                 |

peft may be missing: nothing here loads it before `require`.
"""

import functools
import inspect
import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from stages.train_student.compat.changed import changed

_changed = functools.partial(changed, "peft", "0.21")
_LAYER = ("lora_A", "lora_B", "scaling", "active_adapters", "get_base_layer")


def require() -> None:
    """Raises PipelineError where something is gone; ImportError without peft."""
    import peft

    if "target_parameters" not in inspect.signature(peft.LoraConfig).parameters:
        raise _changed("LoraConfig.target_parameters", "is gone; experts would stay frozen")
    if "save_embedding_layers" not in inspect.signature(peft.PeftModel.save_pretrained).parameters:
        raise _changed("PeftModel.save_pretrained(save_embedding_layers)", "is gone")
    if not hasattr(peft.LoraModel, "merge_and_unload"):
        raise _changed("LoraModel.merge_and_unload", "is gone; adapters would not be in the student")
    _layer_class()


def require_adapted(model: nn.Module, wanted: list[Tensor]) -> None:
    """Raises PipelineError unless every wanted weight, and no more than is trained, got an adapter that is known."""
    adapted = adapted_weights(model)
    missing = [
        name for name, weight in model.named_parameters() if _is_in(weight, wanted) and id(weight) not in adapted
    ]
    if missing:
        raise _changed("get_peft_model", f"{len(missing)} weights got no adapter, such as {missing[0]}")
    if odd := [name for name, weight in model.named_parameters() if weight.requires_grad and "lora_" not in name]:
        raise _changed("the names of adapters", f"{odd[0]} is trained, expected names with 'lora_'")


def adapted_weights(model: nn.Module) -> set[int]:
    """Identities of the weights that an adapter is added to."""
    return {id(getattr(layer.get_base_layer(), parameter)) for layer, parameter in _adapted_layers(model)}


def head_factors(head: nn.Module, hidden: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """The weight of an LM head, and the factors that its adapter adds to the logits; None for a plain head."""
    if not _is_adapted(head):
        return head.weight, None
    _require_layer(head)
    (name,) = head.active_adapters
    adapter = (head.lora_A[name](hidden) * head.scaling[name], head.lora_B[name].weight)
    return head.get_base_layer().weight, adapter


def merged(model: nn.Module) -> Any:
    """The plain model with its adapters added to the weights; the model itself if it has none."""
    return model.merge_and_unload() if any(_is_adapted(module) for module in model.modules()) else model


def _adapted_layers(model: nn.Module) -> Iterator[tuple[Any, str]]:
    """Every adapted layer, and the name of its weight."""
    for module in model.modules():
        if _is_adapted(module):
            _require_layer(module)
            yield module, getattr(module, "parameter_name", "weight")


def _is_adapted(module: nn.Module) -> bool:
    return "peft" in sys.modules and isinstance(module, _layer_class())


def _layer_class() -> type:
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as exc:
        raise _changed("peft.tuners.tuners_utils.BaseTunerLayer", "is gone") from exc
    return BaseTunerLayer


def _require_layer(layer: nn.Module) -> None:
    if gone := [name for name in _LAYER if not hasattr(layer, name)]:
        raise _changed(f"{type(layer).__name__}.{gone[0]}", "is gone; its adapter would not be in the loss")


def _is_in(weight: Tensor, weights: list[Tensor]) -> bool:
    return any(weight is known for known in weights)
