"""The balancing loss of a mixture of experts: transformers' own function of the kind, over a step's tokens.

It is E sum over experts of f P (Switch Transformer, arXiv 2101.03961, eqs. 4 to 6): f is the share of the tokens that
an expert gets, P its mean probability, over all layers. It is not additive; the step's is the mean of its
micro-batches' and ranks', each weighed with its target tokens.
"""

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

from torch import Tensor, nn

FUNCTION = "load_balancing_loss_func"
ARGUMENTS = ["gate_logits", "num_experts", "top_k"]
COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


@dataclass(frozen=True)
class RouterLoss:
    """How a model's routers are kept balanced."""

    function: Callable[..., Any]
    num_experts: int
    top_k: int
    weight: float
    """Of the balancing loss beside the loss of the tokens."""

    def __call__(self, router_logits: tuple[Tensor, ...]) -> Tensor | None:
        """A scalar, not yet weighted; None without a layer that has experts."""
        return self.function(router_logits, self.num_experts, self.top_k) if router_logits else None


def router_loss(model: Any, weight: float | None) -> tuple[RouterLoss | None, str | None]:
    """What balances the routers of a model, and a note if it has any; the weight None is that of its config."""
    if not any(_is_experts(name, module) for name, module in model.named_modules()):
        return None, None
    kind = type(model).__name__
    function = getattr(sys.modules[type(model).__module__], FUNCTION, None)
    own = next((float(value) for name in COEFFICIENTS if (value := getattr(model, name, None)) is not None), None)
    weight = own if weight is None else weight
    num_experts, top_k = getattr(model, "num_experts", None), getattr(model, "num_experts_per_tok", None)
    if not _is_known(function) or num_experts is None or top_k is None or weight is None:
        return None, (
            f"{kind}: transformers has no balancing loss for its experts; their routers train without one, and what "
            "corrects their choice (a bias, if they have one) stays as it is."
        )
    if weight == 0:
        return None, f"{kind}: the balancing loss of its routers is left out (--router-aux-loss)."
    note = f"{kind}: the balancing loss of its routers is added with weight {weight:g} (--router-aux-loss)."
    return RouterLoss(function, num_experts, top_k, weight), note


def _is_known(function: Any) -> TypeGuard[Callable[..., Any]]:
    return function is not None and list(inspect.signature(function).parameters)[:3] == ARGUMENTS


def _is_experts(name: str, module: nn.Module) -> bool:
    return name.rpartition(".")[2] == "experts" and any(True for _ in module.parameters())
