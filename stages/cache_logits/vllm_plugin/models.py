"""Capturing twins of vLLM's model classes, made when they are asked for: attributes named "module.class"."""

import importlib
from collections.abc import Iterable, Iterator
from typing import Any

from vllm.model_executor.layers.activation import get_act_fn
from vllm.model_executor.models.interfaces_base import default_pooling_type

from stages.cache_logits.vllm_plugin import LANGUAGE_MODEL, OPTIONS
from stages.cache_logits.vllm_plugin.pooler import SparseTargetPooler


def _activation(config: Any) -> str:
    return getattr(config, "activation", "gelu")


ACTIVATIONS = {"BloomMLP": ("gelu_impl", lambda config: "gelu_pytorch_tanh"), "FalconMLP": ("act", _activation)}
"""Layers to which vLLM gives the exact GELU, whatever their model has: its place there, and what a config has."""


def _twin(base: type) -> type:
    if not hasattr(base, "compute_logits"):
        raise TypeError(f"vLLM's {base.__name__} has no language model's head")

    @default_pooling_type(tok_pooling_type="ALL")
    class Twin(base):
        is_pooling_model = True

        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            _set_activations(self, vllm_config.model_config.hf_config)
            options = dict(vllm_config.additional_config[OPTIONS])
            files = options.pop("files")
            self.allow_patterns_overrides = files and [files]  # read by vLLM's loader; None lets it find them
            self._left_out, self._is_part = set(options.pop("left_out")), options.pop("is_part")
            self._is_quantised = vllm_config.model_config.quantization is not None
            self.pooler = SparseTargetPooler(self, **options)

        def load_weights(self, weights: Iterable[tuple[str, Any]]) -> Any:
            weights = ((name, tensor) for name, tensor in weights if name not in self._left_out)
            loaded = super().load_weights(_of_language_model(weights) if self._is_part else weights)
            if loaded is not None and not self._is_quantised:
                _require_all(self, loaded)
            return loaded

    Twin.__name__ = Twin.__qualname__ = base.__name__  # vLLM compares the names of classes
    return Twin


def _set_activations(model: Any, config: Any) -> None:
    for layer in model.modules():
        if type(layer).__name__ in ACTIVATIONS:
            place, name_of = ACTIVATIONS[type(layer).__name__]
            if not hasattr(layer, place):
                raise TypeError(f"vLLM's {type(layer).__name__} has another name for its activation than {place}")
            setattr(layer, place, get_act_fn(name_of(config)))


def _of_language_model(weights: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The tensors of the language model, of those of a vision-language model, under the names that it has alone."""
    for name, tensor in weights:
        for start, own in LANGUAGE_MODEL.items():
            if name.startswith(start):
                yield own + name.removeprefix(start), tensor
                break


def _require_all(model: Any, loaded: set[str]) -> None:
    """vLLM's own check passes over every linear layer and embedding, and leaves in them what was in memory."""
    missing = sorted({name for name, _ in model.named_parameters()} - loaded)
    if missing:
        raise ValueError(f"vLLM found no weights for {len(missing)} of its parameters: {', '.join(missing[:3])}")


def __getattr__(name: str) -> type:
    module, _, class_name = name.rpartition(".")
    if not module:
        raise AttributeError(name)
    globals()[name] = _twin(getattr(importlib.import_module(module), class_name))
    return globals()[name]
