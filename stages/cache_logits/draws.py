"""Draws from a teacher's tail: systematic sampling of p_T outside the top k, where the logits are.

Shape suffixes: N rows, V columns of this rank, D draws, R ranks, W packed columns.

With one uniform u a row, draw j is the id at which the running sum of the tail's weights passes
(u + j) / D of their total. An id with the share s of the tail comes up D s times on average, and
floor(D s) or that plus one times always: unbiased, with less variance than independent draws.
Under tensor parallelism the running sum goes over the ranks' columns, rank by rank, and then over
the candidates that the merge dropped; every rank looks up the draws that fall into its own stretch.
The order of the running sum, and so the draws, depend on the number of ranks; what they are worth does not.
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from stages.cache_logits.reduction import LANE, Reduction
from stages.cache_logits.sketching import RowSketch, measured_rows, shared_errors

NONE = -1
"""Stands for a draw that falls into another rank's columns, and for one from a row that has no tail."""
_BELOW_ONE = 1 - 1e-12
"""Keeps a rounded point inside the stretch that it belongs to."""
MOST_CANDIDATES = 128
"""With more the Triton kernels' programs do not fit into registers."""
PROBE_SHAPE, PROBE_TOP_K = (16, 5003), 7
"""Rows and columns on which the kernels are tried."""
_LOGGER = logging.getLogger("pipeline")


@dataclass(frozen=True)
class Tail:
    """The weights exp((z - m) / T) of this rank's columns that are no candidates, in lanes of consecutive columns."""

    lane_sums_NL: Tensor
    weights_of: Callable[[Tensor], Tensor]
    """[N, D, W], the weights of the lanes [N, D]; W columns a lane, 0 behind the last column."""


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
    sketch: RowSketch | None = None,
    hidden_NH: Tensor | None = None,
) -> Tensor:
    """int32 [N, Reduction.width]: the packed targets of rows of logits, which are overwritten.

    `logits_NV` are the columns from `first_id` on that this rank holds; `gather` puts the columns of all
    ranks side by side. Every rank returns the same. `sketch`, of these columns, encodes the rows' hidden states.
    """
    measured_M = None if sketch is None else measured_rows(uniforms_N.to(logits_NV.device))
    measured_MV = None if measured_M is None else logits_NV[measured_M].float()
    kernel = kernel_of(logits_NV.device) if reduction.num_candidates <= MOST_CANDIDATES else None
    reduce = _by_torch if kernel is None else functools.partial(_by_kernel, kernel)
    shard_NW, tail_of = reduce(reduction, logits_NV, labels_N, first_id)
    shards_NRW = gather(shard_NW).unflatten(1, (ranks, reduction.shard_width))
    parts = [reduction.merge(shards_NRW)]
    if reduction.tail_samples:
        tail = tail_of() if logits_NV.shape[1] else None
        draws_ND = draw(reduction, tail, shards_NRW, uniforms_N, rank, first_id)
        parts.append(gather(draws_ND.contiguous()).unflatten(1, (ranks, reduction.tail_samples)).amax(1))
    if sketch is not None and hidden_NH is not None and measured_M is not None and measured_MV is not None:
        parts += _sketched(reduction, sketch, hidden_NH, measured_M, measured_MV, parts[0], first_id, gather)
    return torch.cat(parts, dim=1)


def _sketched(
    reduction: Reduction,
    sketch: RowSketch,
    hidden_NH: Tensor,
    measured_M: Tensor,
    measured_MV: Tensor,
    merged_NW: Tensor,
    first_id: int,
    gather: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    """int32 [N, R] coefficients, and [N, T] the bits of what they miss: nan where it is not measured."""
    levels_NR, temperatures = sketch.levels(hidden_NH), reduction.temperatures
    ids_MK, _, *scalars, _ = reduction.split_merged(merged_NW[measured_M])
    logsumexps_MT, tails_MT, _ = (part.contiguous().view(torch.float32) for part in scalars)
    errors_NT = torch.full((len(levels_NR), len(temperatures)), torch.nan, device=levels_NR.device)
    sketched_MV = sketch.logits(levels_NR[measured_M])
    errors_NT[measured_M] = shared_errors(
        measured_MV, sketched_MV, ids_MK, logsumexps_MT, tails_MT, temperatures, first_id, gather
    )
    return [levels_NR.to(torch.int32), errors_NT.view(torch.int32)]


@functools.cache
def kernel_of(device: torch.device) -> ModuleType | None:
    """The Triton kernels, where triton is and they give on a few rows what torch gives; tried once a device."""
    if device.type != "cuda":
        return None
    try:
        from stages.cache_logits import reduction_kernel

        difference = _difference(reduction_kernel, device)
    except ImportError:
        return None
    except Exception as exc:  # a compiler's, a driver's: of many kinds
        difference = str(exc)
    if difference:
        _LOGGER.warning("the Triton kernels of the reduction are left out on %s: %s", device, difference)
    return None if difference else reduction_kernel


def _difference(kernel: ModuleType, device: torch.device) -> str:
    """What of the kernels' result is not torch's on rows of this function's making; empty if all is."""
    generator = torch.Generator().manual_seed(0)
    logits_NV = (3 * torch.randn(PROBE_SHAPE, generator=generator)).to(device)
    labels_N = torch.arange(PROBE_SHAPE[0], device=device)
    reduction = Reduction(PROBE_TOP_K, (1.0, 2.0), 1, 1.0)
    found, expected = (
        reduction.merge(reduce(reduction, logits_NV.clone(), labels_N, 0)[0][:, None])
        for reduce in (functools.partial(_by_kernel, kernel), _by_torch)
    )
    if not torch.equal(found[:, :PROBE_TOP_K], expected[:, :PROBE_TOP_K]):
        return "other ids are kept"
    apart = (found[:, PROBE_TOP_K:].view(torch.float32) - expected[:, PROBE_TOP_K:].view(torch.float32)).abs()
    return "" if (apart <= 1e-4).all() else f"a target is {apart.max():.2g} off"


def _by_kernel(
    kernel: ModuleType, reduction: Reduction, logits_NV: Tensor, labels_N: Tensor, first_id: int
) -> tuple[Tensor, Callable[[], Tail]]:
    """A partial result, and the tail to draw from; its candidates become -inf in the logits when it is asked for."""
    shard_NW, sums_NL = kernel.reduce_shard(reduction, logits_NV, labels_N, first_id)

    def tail_of() -> Tail:
        values_NK, ids_NK, *_ = reduction.split_shard(shard_NW)
        count, width = min(reduction.num_candidates, logits_NV.shape[1]), kernel.lane_width(reduction.num_candidates)
        logits_NV.scatter_(1, ids_NK[:, :count].long() - first_id, -torch.inf)
        maximum_N11, in_lane = values_NK.amax(1)[:, None, None], torch.arange(width, device=logits_NV.device)

        def weights_of(lane_ND: Tensor) -> Tensor:
            columns_NDW = lane_ND[:, :, None] * width + in_lane
            inside = columns_NDW.clamp(max=logits_NV.shape[1] - 1).flatten(1)
            z_NDW = logits_NV.gather(1, inside).float().view_as(columns_NDW)
            weights_NDW = ((z_NDW - maximum_N11) / reduction.draw_temperature).exp()
            return weights_NDW.masked_fill(columns_NDW >= logits_NV.shape[1], 0.0)

        return Tail(sums_NL.double(), weights_of)

    return shard_NW, tail_of


def _by_torch(
    reduction: Reduction, logits_NV: Tensor, labels_N: Tensor, first_id: int
) -> tuple[Tensor, Callable[[], Tail]]:
    """As `_by_kernel`; float32 logits become relative to their row's maximum."""
    logits_NV = logits_NV.float()
    shard_NW = reduction.reduce_shard(logits_NV, labels_N, first_id)

    def tail_of() -> Tail:
        ids_NK = reduction.split_shard(shard_NW)[1][:, : min(reduction.num_candidates, logits_NV.shape[1])]
        weights_NV = (logits_NV / reduction.draw_temperature).exp_().scatter_(1, ids_NK.long() - first_id, 0.0)
        padded_NV = torch.nn.functional.pad(weights_NV, (0, -weights_NV.shape[1] % LANE))
        lanes_NLW = padded_NV.unflatten(1, (-1, LANE))
        return Tail(
            lanes_NLW.sum(-1, dtype=torch.float64),
            lambda lane_ND: lanes_NLW.gather(1, lane_ND[:, :, None].expand(-1, -1, LANE)),
        )

    return shard_NW, tail_of


def draw(
    reduction: Reduction, tail: Tail | None, shards_NRW: Tensor, uniforms_N: Tensor, rank: int, first_id: int
) -> Tensor:
    """int32 [N, D]: this rank's draws, NONE for the others'; the maximum over ranks has all.

    `tail` is that of this rank's columns, None where it has none, and `shards_NRW` are all ranks' partial results.
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
    if tail is None:
        return drawn_ND
    local_ND = _look_up(tail, share_ND) + first_id
    return torch.where((places_ND == rank) & has_tail_N1, local_ND.to(torch.int32), drawn_ND)


def _look_up(tail: Tail, share_ND: Tensor) -> Tensor:
    """int64 [N, D]: the columns at which the running sum of the weights passes the given shares of their total."""
    lane_ends = tail.lane_sums_NL.cumsum(1)
    points = share_ND * lane_ends[:, -1:] * _BELOW_ONE
    lane = torch.searchsorted(lane_ends, points, right=True).clamp(max=lane_ends.shape[1] - 1)
    inside = points - torch.nn.functional.pad(lane_ends, (1, 0)).gather(1, lane)
    chosen = tail.weights_of(lane)
    width = chosen.shape[2]
    ends = chosen.double().cumsum(-1)
    column = torch.searchsorted(ends, inside[:, :, None], right=True).clamp(max=width - 1)
    # Rounding can point behind the last weight of a lane: then its largest is taken.
    column = torch.where(chosen.gather(2, column) > 0, column, chosen.argmax(-1, keepdim=True))
    return lane * width + column[:, :, 0]
