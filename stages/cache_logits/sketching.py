"""The tail sketch where hidden states and logits are: coefficients of every row, and what they miss of some.

Shapes: N rows, M of them whose error is measured, V columns of the vocabulary (or of one rank's share), R coefficients,
H hidden size, K stored entries, T temperatures.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:  # a machine with a GPU may have no more than torch
    from pipeline.sketch import FittedSketch

LARGEST_LEVEL = 32_767
"""Coefficients are stored as int16."""
MEASURED = 16
"""Of so many rows the error of one is measured, which costs a second pass over its logits."""


@dataclass(frozen=True, kw_only=True)
class RowSketch:
    """A sketch on a device, of all ids or of those that a rank holds."""

    mean_H: Tensor
    encoder_RH: Tensor
    offset_V: Tensor
    basis_VR: Tensor
    softcap: float | None

    @classmethod
    def of(cls, fitted: "FittedSketch", device: torch.device, ids: slice = slice(None)) -> "RowSketch":
        """The part of a sketch that stands for some of the ids."""
        parts = {
            "mean_H": fitted.encoder.mean,
            "encoder_RH": fitted.encoder.encoder,
            "offset_V": fitted.decoder.offset[ids],
            "basis_VR": fitted.decoder.basis[ids],
        }
        tensors = {name: torch.from_numpy(np.ascontiguousarray(values)).to(device) for name, values in parts.items()}
        return cls(**tensors, softcap=fitted.decoder.softcap)

    def coefficients(self, hidden_NH: Tensor) -> Tensor:
        """float32 [N, R], not rounded."""
        return (hidden_NH.float() - self.mean_H) @ self.encoder_RH.T

    def levels(self, hidden_NH: Tensor) -> Tensor:
        """float32 [N, R] integers: what is stored."""
        return self.coefficients(hidden_NH).round().clamp(-LARGEST_LEVEL, LARGEST_LEVEL)

    def logits(self, coefficients_NR: Tensor) -> Tensor:
        """float32 [N, V]"""
        return capped(torch.addmm(self.offset_V, coefficients_NR, self.basis_VR.T), self.softcap)


def tail_errors(logits_NV: Tensor, sketched_NV: Tensor, ids_NK: Tensor, temperatures: tuple[float, ...]) -> Tensor:
    """[N, T]: KL(p_T || what is rebuilt) in nats, of which only the tail's shape has any.

    tail mass * (sum of p (z - s) / T - log sum exp(z / T) + log sum exp(s / T)), p normalised outside the ids.
    """
    errors = []
    for temperature in temperatures:
        whole_N = torch.logsumexp(logits_NV / temperature, 1)
        tails = [(values / temperature).scatter(1, ids_NK, -torch.inf) for values in (logits_NV, sketched_NV)]
        tail_N, sketched_N = (torch.logsumexp(tail, 1) for tail in tails)
        probs_NV = (tails[0] - tail_N[:, None]).exp()
        apart_N = (probs_NV * (logits_NV - sketched_NV)).sum(1) / temperature
        errors.append((tail_N - whole_N).exp() * (apart_N - tail_N + sketched_N).nan_to_num(0.0))
    return torch.stack(errors, 1)


def capped(logits_NV: Tensor, softcap: float | None) -> Tensor:
    """The logits c tanh(logits / c) of a soft cap c."""
    return logits_NV if softcap is None else softcap * torch.tanh(logits_NV / softcap)


def measured_rows(uniforms_N: Tensor) -> Tensor:
    """int64 [M]: one row in MEASURED, by chance: those with the smallest uniforms, so that no device is waited for."""
    return uniforms_N.topk(-(-len(uniforms_N) // MEASURED), largest=False, sorted=False).indices


def shared_errors(
    logits_MV: Tensor,
    sketched_MV: Tensor,
    ids_MK: Tensor,
    logsumexps_MT: Tensor,
    tail_logprobs_MT: Tensor,
    temperatures: tuple[float, ...],
    first_id: int = 0,
    gather: Callable[[Tensor], Tensor] = lambda columns: columns,
) -> Tensor:
    """`tail_errors` of rows whose columns, from `first_id` on, are this rank's; every rank returns the same.

    `ids_MK`, and what the reduction says of the whole rows, are known; `gather` puts the columns of all ranks side by
    side. A rank gives its maximum, and for every temperature its part of sum p (z - s) / T and log sum exp(s / T).
    """
    num_rows, num_columns = logits_MV.shape
    absent = torch.full((num_rows, 1), -torch.inf, device=logits_MV.device)
    maximum_M1 = gather(logits_MV.amax(1, keepdim=True) if num_columns else absent).amax(1, keepdim=True)
    local_MK = ids_MK.long() - first_id
    local_MK = torch.where((local_MK >= 0) & (local_MK < num_columns), local_MK, num_columns)
    is_stored_MV = torch.zeros(num_rows, num_columns + 1, dtype=torch.bool, device=logits_MV.device)
    is_stored_MV = is_stored_MV.scatter_(1, local_MK, True)[:, :num_columns]
    relative_MV = logits_MV - maximum_M1
    parts = []
    for index, temperature in enumerate(temperatures):
        probs_MV = (relative_MV / temperature - logsumexps_MT[:, index, None]).exp().masked_fill(is_stored_MV, 0.0)
        apart_M = (probs_MV * (relative_MV - sketched_MV)).sum(1) / temperature
        tail_MV = (sketched_MV / temperature).masked_fill(is_stored_MV, -torch.inf)
        parts += [apart_M, torch.logsumexp(tail_MV, 1) if num_columns else absent[:, 0]]
    shared_MRTP = gather(torch.stack(parts, 1)).unflatten(1, (-1, len(temperatures), 2))
    apart_MT, sketched_MT = shared_MRTP[..., 0].sum(1), torch.logsumexp(shared_MRTP[..., 1], 1)
    tails_MT = tail_logprobs_MT + logsumexps_MT
    errors_MT = apart_MT + tail_logprobs_MT.exp() * (sketched_MT - tails_MT)
    return errors_MT.masked_fill(torch.isneginf(tail_logprobs_MT), 0.0).clamp(min=0.0)
