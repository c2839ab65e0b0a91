"""Draws from a teacher's tail: systematic sampling of p_T outside the top k, where the logits are.

Shape suffixes: N rows, V columns of this rank, D draws, R ranks, W packed columns.

With one uniform u a row, draw j is the id at which the running sum of the tail's weights passes
(u + j) / D of their total. An id with the share s of the tail comes up D s times on average, and
floor(D s) or that plus one times always: unbiased, with less variance than independent draws.
Under tensor parallelism the running sum goes over the ranks' columns, rank by rank, and then over
the candidates that the merge dropped; every rank looks up the draws that fall into its own stretch.
The order of the running sum, and so the draws, depend on the number of ranks; what they are worth does not.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from stages.cache_logits.reduction import LANE, Reduction

NONE = -1
"""Stands for a draw that falls into another rank's columns, and for one from a row that has no tail."""
_BELOW_ONE = 1 - 1e-12
"""Keeps a rounded point inside the stretch that it belongs to."""


def reduce_rows(
    reduction: Reduction,
    logits_NV: Tensor,
    labels_N: Tensor,
    uniforms_N: Tensor,
    *,
    ranks: int = 1,
    rank: int = 0,
    first_id: int = 0,
    gather: Callable[[Tensor], Tensor] = lambda columns: columns,
) -> Tensor:
    """int32 [N, Reduction.width]: the packed targets of rows of float32 logits, which are overwritten.

    `logits_NV` are the columns from `first_id` on that this rank holds; `gather` puts the columns of all
    ranks side by side. Every rank returns the same.
    """
    shard_NW = reduction.reduce_shard(logits_NV, labels_N, first_id)
    shards_NRW = gather(shard_NW).unflatten(1, (ranks, reduction.shard_width))
    packed_NW = reduction.merge(shards_NRW)
    if reduction.tail_samples == 0:
        return packed_NW
    draws_ND = draw(reduction, logits_NV, shards_NRW, uniforms_N, rank, first_id)
    draws_ND = gather(draws_ND.contiguous()).unflatten(1, (ranks, reduction.tail_samples)).amax(1)
    return torch.cat([packed_NW, draws_ND], dim=1)


def draw(
    reduction: Reduction, relative_NV: Tensor, shards_NRW: Tensor, uniforms_N: Tensor, rank: int, first_id: int
) -> Tensor:
    """int32 [N, D]: this rank's draws, NONE for the others'; the maximum over ranks has all.

    `relative_NV` is what `reduce_shard` left of this rank's logits, `shards_NRW` all ranks' partial results.
    """
    temperature = reduction.draw_temperature
    assert temperature is not None, "draws have a temperature"
    index = reduction.temperatures.index(temperature)
    _, ids, rest, _, _ = reduction.split_shard(shards_NRW)
    _, _, _, shift, others = reduction.common_scale(shards_NRW)
    stretches_NR = ((shift[:, :, 0] / temperature).exp() * rest[:, :, index]).double()
    dropped = (others / temperature).exp().double()
    ends = torch.cat([stretches_NR, dropped], dim=1).cumsum(1)
    steps = torch.arange(reduction.tail_samples, device=ends.device, dtype=torch.float64)
    points_ND = (uniforms_N.to(ends)[:, None] + steps) / reduction.tail_samples * ends[:, -1:] * _BELOW_ONE
    places_ND = torch.searchsorted(ends, points_ND, right=True).clamp(max=ends.shape[1] - 1)
    num_ranks = shards_NRW.shape[1]
    starts_ND = torch.nn.functional.pad(ends, (1, 0)).gather(1, places_ND)
    share_ND = (points_ND - starts_ND) / (ends.gather(1, places_ND) - starts_ND).clamp(min=1e-300)
    candidates_ND = ids.flatten(1).gather(1, (places_ND - num_ranks).clamp(min=0)).to(torch.int32)
    has_tail_N1 = ends[:, -1:] > 0
    drawn_ND = torch.where((places_ND >= num_ranks) & has_tail_N1, candidates_ND, NONE)
    if relative_NV.shape[1] == 0:
        return drawn_ND
    own_columns = (ids[:, rank, : min(reduction.num_candidates, relative_NV.shape[1])] - first_id).long()
    local_ND = _look_up(relative_NV, own_columns, share_ND, temperature) + first_id
    return torch.where((places_ND == rank) & has_tail_N1, local_ND.to(torch.int32), drawn_ND)


def _look_up(relative_NV: Tensor, taken: Tensor, share_ND: Tensor, temperature: float) -> Tensor:
    """int64 [N, D]: the columns at which the running sum of the weights passes the given shares of their total."""
    weights = (relative_NV / temperature).exp_().scatter_(1, taken, 0.0)
    weights = torch.nn.functional.pad(weights, (0, -weights.shape[1] % LANE))
    lanes = weights.unflatten(1, (-1, LANE))
    lane_ends = lanes.sum(-1, dtype=torch.float64).cumsum(1)
    points = share_ND * lane_ends[:, -1:] * _BELOW_ONE
    lane = torch.searchsorted(lane_ends, points, right=True).clamp(max=lane_ends.shape[1] - 1)
    inside = points - torch.nn.functional.pad(lane_ends, (1, 0)).gather(1, lane)
    chosen = lanes.gather(1, lane[:, :, None].expand(-1, -1, LANE))
    ends = chosen.double().cumsum(-1)
    column = torch.searchsorted(ends, inside[:, :, None], right=True).clamp(max=LANE - 1)
    # Rounding can point behind the last weight of a lane: then its largest is taken.
    column = torch.where(chosen.gather(2, column) > 0, column, chosen.argmax(-1, keepdim=True))
    return lane * LANE + column[:, :, 0]
