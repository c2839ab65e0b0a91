"""What float32 arithmetic may do to a result: derived from the formulas in float64, whatever machine runs the tests.

A model's logits come out of a network that amplifies what rounding does inside it, more at one position than at
another. So the network runs in float64 once more, every operation's result moved at random by what float32 would round
(Monte Carlo arithmetic, Parker 1997). How far that moves the logits is how far float32 may.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

UNIT = 2.0**-24
"""float32 rounds to nearest: no result moves by a larger share of itself."""
DEVIATIONS = 6.0
"""So many standard deviations no rounding error of ours exceeds: 1 in 500 million would."""
REPEATS = 2

_FACTORS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}
"""Places of the factors among the arguments of a product."""
_MOVES_NOTHING = ("clone", "_to_copy", "embedding", "index", "cat", "stack", "gather", "where", "masked_fill", "arange")


class Float32Noise(TorchDispatchMode):
    """A context in which float64 operations come out as inexact as float32 ones."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **kwargs or {}), func.overloadpacket.__name__
        exact = func.is_view or func._schema.is_mutable or name in _MOVES_NOTHING
        if exact or not torch.is_tensor(out) or out.dtype != torch.float64:
            return out
        noise = torch.randn(out.shape, dtype=torch.float64, generator=self._generator)
        if name not in _FACTORS:
            return out * (1 + UNIT * noise)
        left, right = (args[place] for place in _FACTORS[name])
        return out + UNIT * noise * _partial_sums(left, right)


def _partial_sums(left: Tensor, right: Tensor) -> Tensor:
    """What the K roundings of a product's sum are together relative to: sums of terms whose signs vary, K of them."""
    return math.sqrt(left.shape[-1]) * (left.square() @ right.square()).sqrt()


def logit_errors(model: Any, documents: list[np.ndarray], vocab_size: int) -> list[np.ndarray]:
    """float64 [S, 1] a document: how far float32 may put any logit of a position of the causal float64 `model`."""
    longest = max(map(len, documents))
    ids = torch.stack([torch.tensor(np.resize(document, longest).astype(np.int64)) for document in documents])

    def forward() -> Tensor:
        with torch.no_grad():  # a document's own positions never see what fills it up
            return model(ids, use_cache=False).logits[:, :, :vocab_size]

    exact, squares = forward(), 0.0
    for seed in range(REPEATS):
        with Float32Noise(seed):
            moved = forward()
        squares = squares + (moved - exact).square().mean(2, keepdim=True)
    errors = DEVIATIONS * (squares / REPEATS).sqrt().numpy()
    return [error[: len(document)] for error, document in zip(errors, documents)]


def ratio_errors(logits_NV: np.ndarray, temperature: float, logit_error_N1: np.ndarray | float = 0.0) -> np.ndarray:
    """float64 [N, V]: how far float32 may put log p_T, of logits that are themselves so far off.

    log p = (z - max) / T - L, where L is the log of a sum over the vocabulary of exponentials: an error of a logit
    enters in z, and again in L; each of the V terms of L is off by the error of its exponent; both parts are rounded
    when they are stored.
    """
    depth_NV = (logits_NV.max(1, keepdims=True) - logits_NV) / temperature
    probs_NV = np.exp(-depth_NV) / np.exp(-depth_NV).sum(1, keepdims=True)
    terms_N1 = (probs_NV * (3 * depth_NV + 4)).sum(1, keepdims=True)  # scaling, exponential, or a square of one
    sums_N1 = _sum_errors(probs_NV)[:, None] / UNIT
    log_sum_N1 = np.log(np.exp(-depth_NV).sum(1, keepdims=True))
    return 2 * logit_error_N1 / temperature + UNIT * (3 * depth_NV + terms_N1 + sums_N1 + 2 * log_sum_N1 + 4)


def _sum_errors(probs_NV: np.ndarray) -> np.ndarray:
    """[N]: the roundings of a sum of V positive terms, as a share of it."""
    return UNIT * DEVIATIONS * math.sqrt(probs_NV.shape[1]) * np.sqrt((probs_NV**2).sum(1))


def prob_errors(logits_NV: np.ndarray, temperature: float, logit_error_N1: np.ndarray | float = 0.0) -> np.ndarray:
    """float64 [N, V]: how far float32 may put p_T."""
    depth_NV = (logits_NV.max(1, keepdims=True) - logits_NV) / temperature
    probs_NV = np.exp(-depth_NV) / np.exp(-depth_NV).sum(1, keepdims=True)
    return probs_NV * np.expm1(ratio_errors(logits_NV, temperature, logit_error_N1))


def entropy_errors(logits_NV: np.ndarray, temperature: float, logit_error_N1: np.ndarray | float = 0.0) -> np.ndarray:
    """float64 [N]: how far float32 may put the entropy, log sum + (sum of p depth) / T: each p, the sum, both terms."""
    depth_NV = (logits_NV.max(1, keepdims=True) - logits_NV) / temperature
    weights_NV = np.exp(-depth_NV)
    probs_NV, log_sum_N = weights_NV / weights_NV.sum(1, keepdims=True), np.log(weights_NV.sum(1))
    moment_N = (probs_NV * depth_NV).sum(1)
    of_probs_N = (prob_errors(logits_NV, temperature, logit_error_N1) * (depth_NV + log_sum_N[:, None])).sum(1)
    return of_probs_N + _sum_errors(probs_NV) * (1 + moment_N) + 4 * UNIT * (moment_N + log_sum_N + 1)


def total_errors(probs_NK: np.ndarray, tail_N: np.ndarray) -> np.ndarray:
    """float64 [N]: how far from 1 float32 may put the sum of all that is stored of a row, in whatever order it adds."""
    parts_NK = np.column_stack([probs_NK, tail_N]).astype(np.float64)
    depths_NK = -np.log(parts_NK, where=parts_NK > 0, out=np.zeros_like(parts_NK))
    return UNIT * ((parts_NK * (3 * depths_NK + 4)).sum(1) + parts_NK.shape[1])
