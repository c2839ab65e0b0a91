"""Low-rank adapters on a student, by the peft library: on linear layers, and on the stacked weights of experts."""

import contextlib
import functools
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from pipeline.errors import ConfigError
from pipeline.models import text_body
from stages.train_student.compat import peft_hooks

PRODUCTS = (torch.nn.Linear.forward, Conv1D.forward)
"""A subclass with a forward of its own does something else, which an adapter would not."""


def add_adapters(model: Any, *, rank: int, alpha: float, on_head: bool) -> Any:
    """`model` with adapters on all linear layers and stacks of experts of its body, and its head if asked; else frozen.

    Raises ConfigError where peft is missing, or the head is tied to the embeddings and should get one.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as exc:
        raise ConfigError("lora_rank is set, but peft is not installed; `pip install --no-deps peft`.") from exc
    peft_hooks.require()
    head = model.get_output_embeddings()
    if on_head and head.weight is model.get_input_embeddings().weight:
        raise ConfigError(f"{type(model).__name__}: its head is tied to the embeddings; train it without --lora-head.")
    body = set(text_body(model).modules())
    products = [
        name
        for name, module in model.named_modules()
        if type(module).forward in PRODUCTS and (module in body or (module is head and on_head))
    ]
    places = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    # two adapters of one weight would both be merged into it
    alone = [name for name in products if places[id(model.get_submodule(name).weight)] == 1]
    stacks = _expert_stacks(model, body)
    wanted = [*(model.get_submodule(name).weight for name in alone), *map(model.get_parameter, stacks)]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=alone,
        target_parameters=stacks,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings(), _no_renaming(model.config):
        # of a setting that the weights of a Conv1D need, and that peft takes itself
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        adapted = get_peft_model(model, config)
    peft_hooks.require_adapted(adapted, wanted)
    # peft would put a frozen head beside its adapter into every checkpoint
    adapted.save_pretrained = functools.partial(adapted.save_pretrained, save_embedding_layers=False)
    return adapted


def _expert_stacks(model: Any, body: set[torch.nn.Module]) -> list[str]:
    """Names of the parameters [experts, out, in] that a module of experts in the body multiplies with."""
    return [
        f"{name}.{own}"
        for name, module in model.named_modules()
        if module in body and "expert" in f"{name.rpartition('.')[2]} {type(module).__name__}".lower()
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    ]


@contextlib.contextmanager
def _no_renaming(config: Any) -> Iterator[None]:
    """Inside, peft does not know the model's kind.

    It would take the names of shared experts and dense layers for those of experts that transformers 5 keeps in one
    parameter, and leave them frozen.
    """
    vars(config)["model_type"] = ""  # hides the attribute of the class
    try:
        yield
    finally:
        del vars(config)["model_type"]
