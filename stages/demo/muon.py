"""Muon in float32 (Jordan 2024, kellerjordan.github.io/posts/muon): torch's own always multiplies in bfloat16.

Without products of bfloat16 in hardware a CPU takes a hundred times longer for them. Matrices of one shape are
orthogonalised together: few large products, whose threads seldom wait for each other.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of the odd polynomial a x + b x^3 + c x^5 that drives singular values towards 1, quickly and not exactly."""
ITERATIONS = 5
MOMENTUM = 0.95


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose steps have all their singular values near 1; for matrices."""

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step of every matrix, in float32 whatever autocast says; a closure is not called."""
        for group in self.param_groups:
            for weights in _by_shape(group["params"]):
                steps = orthogonal(torch.stack([self._momentum(weight) for weight in weights]))
                height, width = weights[0].shape
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                scale = group["lr"] * math.sqrt(max(1.0, height / width))
                torch._foreach_add_(weights, list(steps), alpha=-scale)

    def _momentum(self, weight: Tensor) -> Tensor:
        assert weight.grad is not None
        average = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
        average.lerp_(weight.grad, 1 - MOMENTUM)
        return torch.lerp(weight.grad, average, MOMENTUM)


def orthogonal(matrices_BMN: Tensor) -> Tensor:
    """The matrices with their singular vectors kept and their singular values put near 1 (0.7 to 1.2), float32."""
    a, b, c = COEFFICIENTS
    is_tall = matrices_BMN.shape[1] > matrices_BMN.shape[2]
    x_BMN = matrices_BMN.float().mT if is_tall else matrices_BMN.float()
    x_BMN = x_BMN / torch.linalg.matrix_norm(x_BMN, keepdim=True).clamp(min=1e-7)
    with torch.autocast(x_BMN.device.type, enabled=False):
        for _ in range(ITERATIONS):
            gram_BMM = torch.bmm(x_BMN, x_BMN.mT)
            x_BMN = torch.baddbmm(x_BMN, torch.baddbmm(gram_BMM, gram_BMM, gram_BMM, beta=b, alpha=c), x_BMN, beta=a)
    return x_BMN.mT if is_tall else x_BMN


def _by_shape(weights: Iterable[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.Size, list[Tensor]] = {}
    for weight in weights:
        groups.setdefault(weight.shape, []).append(weight)
    return list(groups.values())
