"""Trained parameters that get no gradient: parts of a model that its forward does not use, or uses behind our back."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stages.train_student.coverage import SHOWN, kind_of

WATCHED_STEPS = 5
"""The first optimizer steps: more than one, as experts wait for their first token."""


class GradientWatch:
    """Looks at the gradients of the first steps of a run."""

    def __init__(self) -> None:
        self._silent: set[str] | None = None
        self._steps = 0

    def look(self, model: Any, max_steps: int, total: Callable[[Tensor], Tensor]) -> str | None:
        """A line that names the parameters without a gradient in all steps so far, once; `total` sums over the ranks.

        The first factor of an adapter is left out: its gradient is zero as long as the second factor is.
        """
        if self._steps == WATCHED_STEPS:
            return None
        self._steps += 1
        trained = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and "lora_A" not in name
        }
        flags = [_has_gradient(parameter) for parameter in trained.values()]
        got = total(torch.stack(flags)).tolist() if flags else []
        silent = {name for name, flag in zip(trained, got) if not flag}
        self._silent = silent if self._silent is None else self._silent & silent
        if self._steps < min(WATCHED_STEPS, max_steps) or not self._silent:
            return None
        kinds = Counter(kind_of(name) for name in self._silent)
        named = ", ".join(f"{kind} ({count})" if count > 1 else kind for kind, count in kinds.most_common(SHOWN))
        more = f" and {len(kinds) - SHOWN} kinds more" if len(kinds) > SHOWN else ""
        size = sum(trained[name].numel() for name in self._silent) / sum(p.numel() for p in trained.values())
        return (
            f"{len(self._silent)} of {len(trained)} trained parameters, {size:.2%} of their weights, got no gradient "
            f"in {self._steps} steps: {named}{more}; nothing trains them."
        )


def reaches_all(model: Any, loss: Tensor) -> bool:
    """Whether every trained parameter is in the graph of the loss; DDP has to be told if not."""
    reached, seen, waiting = set(), set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        reached.add(id(getattr(node, "variable", None)))
        waiting += [following for following, _ in node.next_functions]
    return all(id(parameter) in reached for parameter in model.parameters() if parameter.requires_grad)


def _has_gradient(parameter: Tensor) -> Tensor:
    """A float32 0 or 1; of a sharded parameter, for this rank's shard."""
    gradient = parameter.grad
    if gradient is None:
        return torch.zeros((), device=parameter.device)
    local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return local.any().float()
