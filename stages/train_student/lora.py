"""Low-rank adapters on a student, by the peft library."""

import functools
from typing import Any

import torch

from pipeline.errors import ConfigError


def add_adapters(model: Any, *, rank: int, alpha: float, on_head: bool) -> Any:
    """`model` with adapters on every linear layer of its body, and on its head if asked; all else is frozen.

    Raises ConfigError where peft is missing, or the head is tied to the embeddings and should get one.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as exc:
        raise ConfigError("lora_rank is set, but peft is not installed; `pip install --no-deps peft`.") from exc
    head = model.get_output_embeddings()
    if on_head and head.weight is model.get_input_embeddings().weight:
        raise ConfigError(f"{type(model).__name__}: its head is tied to the embeddings; train it without --lora-head.")
    chosen = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and (module is not head or on_head)
    ]
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=chosen, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    # peft would put a frozen head beside its adapter into every checkpoint
    adapted.save_pretrained = functools.partial(adapted.save_pretrained, save_embedding_layers=False)
    return adapted


def head_adapter(head: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The factors that an adapted head adds to its logits; None for a plain head."""
    if not hasattr(head, "lora_A"):
        return None
    (name,) = head.active_adapters
    return head.lora_A[name](hidden) * head.scaling[name], head.lora_B[name].weight


def merged(model: Any) -> Any:
    """The plain model with its adapters added to the weights; the model itself if it has none."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
