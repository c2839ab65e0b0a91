"""How far apart two computations of a model's last hidden states are, and how far rounding may put them.

A few units in the last place of the embeddings put the last hidden states apart, by as much as size, depth, weights and
the near ties of a router make of it. So what rounding may do is measured on the model itself. Of 136 kinds of small
models in float32, two orders of computation differ by at most a thirteenth of what is allowed, and what is wrong by ten
thousand times as much.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import PipelineError

EPSILON = torch.finfo(torch.float32).eps
"""float32's last place, for a float64 model too: kinds with biases by distance compute those in float32."""
PERTURBATION = 2
"""Units of epsilon by which embeddings are changed, up or down."""
ALLOWED = 8
"""How many times the effect of that a difference may be."""


@contextlib.contextmanager
def first_forward(kind: str) -> Iterator[None]:
    """Inside, whatever ends a forward of a model that nobody tried before is a PipelineError of one line."""
    try:
        yield
    except (PipelineError, torch.OutOfMemoryError):
        raise
    except Exception as exc:
        reason = " ".join(f"{type(exc).__name__}: {exc}".split())
        raise PipelineError(f"{kind}: its forward ends in {reason[:300]}; this model is not supported.") from exc


def mean_difference(found_NH: Tensor, expected_NH: Tensor) -> float:
    """Mean over the tokens of |found - expected| / |expected|, each at most 1; 1 where one is not finite."""
    expected = expected_NH.double()
    distance_N = (found_NH.double() - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-30)
    return distance_N.nan_to_num(nan=1.0).clamp(max=1).mean().item()


@contextlib.contextmanager
def perturbed_embeddings(model: Any) -> Iterator[None]:
    """Inside, every embedding of a transformers model is off by PERTURBATION units in its last place."""
    generator = torch.Generator().manual_seed(0)

    def perturb(module: Any, inputs: Any, output: Tensor) -> Tensor:
        signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
        return output * (1 + PERTURBATION * max(EPSILON, torch.finfo(output.dtype).eps) * signs)

    hook = model.get_input_embeddings().register_forward_hook(perturb)
    try:
        yield
    finally:
        hook.remove()
