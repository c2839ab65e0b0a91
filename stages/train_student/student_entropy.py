"""Where the student is least sure: its entropies at a batch's target rows, without gradient, and the rows to keep.

Shapes: M target rows, H hidden size, V vocabulary, C rows of a chunk.
"""

import torch
from torch import Tensor

from stages.train_student.evaluation import logits_of_products
from stages.train_student.fused_head import loss_dtype, product_dtype
from stages.train_student.loss_settings import LossSettings

CHUNK_BYTES = 256 * 2**20
"""Of the logits that exist at the same time."""


@torch.no_grad()
def least_sure_rows(
    hidden_MH: Tensor,
    weight_VH: Tensor,
    adapter: tuple[Tensor, Tensor] | None,
    settings: LossSettings,
    kept: list[tuple[int, int]],
) -> Tensor:
    """int64: of every sequence the rows of its largest entropies, rising; of equal ones those that come first.

    `kept` has, for one sequence after the other, how many rows it has and how many of them are kept. Waits for no
    device.
    """
    entropies_M = student_entropies(hidden_MH, weight_VH, adapter, settings)
    chosen, start = [], 0
    for size, count in kept:
        order = torch.sort(entropies_M[start : start + size], descending=True, stable=True).indices
        chosen.append(start + order[:count].sort().values)
        start += size
    return torch.cat(chosen)


@torch.no_grad()
def student_entropies(
    hidden_MH: Tensor, weight_VH: Tensor, adapter: tuple[Tensor, Tensor] | None, settings: LossSettings
) -> Tensor:
    """[M]: entropy in nats of q_T = softmax(logits / T) over the real vocabulary, T that of the settings."""
    dtype, out_dtype = product_dtype(hidden_MH), loss_dtype(hidden_MH)
    rows = max(1, CHUNK_BYTES // (out_dtype.itemsize * settings.vocab_size))
    entropies_M = hidden_MH.new_empty(len(hidden_MH), dtype=out_dtype)
    with torch.autocast(hidden_MH.device.type, enabled=False):
        pairs = [
            (hidden, weight[: settings.vocab_size].to(dtype).T)
            for hidden, weight in [(hidden_MH, weight_VH), *([] if adapter is None else [adapter])]
        ]
        for start in range(0, len(hidden_MH), rows):
            chunk = slice(start, start + rows)
            products_CV = sum(_product(hidden[chunk].to(dtype), weight, out_dtype) for hidden, weight in pairs)
            entropies_M[chunk] = _entropies_(logits_of_products(products_CV, settings) / settings.temperature)
    return entropies_M


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right in another dtype; CUDA can write float32 from bfloat16 factors."""
    return torch.mm(left, right) if left.dtype == dtype else torch.mm(left, right, out_dtype=dtype)


def _entropies_(logits_CV: Tensor) -> Tensor:
    """log sum exp(z) - sum q z, z relative to the largest of a row: no term overflows. The logits are lost."""
    logits_CV -= logits_CV.amax(1, keepdim=True)
    exp_CV = logits_CV.exp()
    sums_C = exp_CV.sum(1)
    return sums_C.log() - (exp_CV.mul_(logits_CV)).sum(1) / sums_C
