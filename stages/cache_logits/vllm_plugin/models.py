"""Capturing twins of vLLM's model classes, made when they are asked for by name."""

from typing import Any

from vllm import ModelRegistry
from vllm.model_executor.models.interfaces_base import default_pooling_type

from stages.cache_logits.vllm_plugin import OPTIONS, PREFIX
from stages.cache_logits.vllm_plugin.pooler import SparseTargetPooler


def _twin(base: type, name: str) -> type:
    @default_pooling_type(tok_pooling_type="ALL")
    class Twin(base):  # type: ignore[misc, valid-type]
        is_pooling_model = True

        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            self.pooler = SparseTargetPooler(self, **vllm_config.additional_config[OPTIONS])

    Twin.__name__ = Twin.__qualname__ = name
    Twin.__module__ = __name__
    return Twin


def __getattr__(name: str) -> type:
    architecture = name.removeprefix(PREFIX)
    if architecture == name or architecture not in ModelRegistry.models:
        raise AttributeError(name)
    globals()[name] = _twin(ModelRegistry.models[architecture].load_model_cls(), name)
    return globals()[name]
