"""Products of bfloat16 or float16 matrices on a CPU that has none: made in float32, rounded to the type once.

That is what hardware does, up to the order of its sums. Left to itself torch takes loops a hundred times slower.
"""

from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

HALF = (torch.bfloat16, torch.float16)
PRODUCTS = {
    getattr(torch.ops.aten, name)
    for name in (
        *("linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "einsum", "bilinear"),
        *("_grouped_mm", "conv1d", "convolution", "scaled_dot_product_attention"),
        "_scaled_dot_product_flash_attention_for_cpu",
    )
}


class WideProducts(TorchDispatchMode):
    """A context in which such products are widened; everything else stays in its type."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket not in PRODUCTS:
            return func(*args, **kwargs)
        halves = {tensor.dtype for tensor in pytree.tree_leaves((args, kwargs)) if _is_half(tensor)}
        if len(halves) != 1:
            return func(*args, **kwargs)
        wide_args, wide_kwargs = pytree.tree_map_only(_is_half, lambda tensor: tensor.float(), (args, kwargs))
        (dtype,) = halves
        return pytree.tree_map_only(_is_float32, lambda tensor: tensor.to(dtype), func(*wide_args, **wide_kwargs))


def _is_half(value: Any) -> bool:
    return torch.is_tensor(value) and value.dtype in HALF


def _is_float32(value: Any) -> bool:
    return torch.is_tensor(value) and value.dtype == torch.float32
