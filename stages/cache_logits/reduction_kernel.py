"""The partial results of reduction.py in two Triton kernels, which read the logits once and leave them as they are.

`_lanes` reads all columns: of every lane of 64 or 128 columns the maximum m and, for every temperature, both sums
relative to it. The k lanes with the largest maxima hold the k largest logits, so `_select` reads those alone again: it
takes the k largest, sums what else these lanes hold entry by entry and the others lane by lane, so that a tail is never
a difference. Logits may be float32, bfloat16 or float16. Loaded only where triton is.

Traffic of a row of V logits of b bytes at T temperatures: V b read, 4 (1 + 2T) V / lane written and read, and k lanes
read again: for V = 102,400, k = 64 and two temperatures 1.16 times the row in float32, 1.24 times in bfloat16.

Shape suffixes: as in reduction.py; L lanes.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from stages.cache_logits.reduction import Reduction

BLOCK = 2048
"""Columns of a program of the first kernel."""
TILE = 8192
"""Columns at most that a program of the second holds."""
LANE_WARPS = 4
_LOG2_E = math.log2(math.e)
_LOWEST = tl.constexpr(-(2**31))
"""The key of what does not exist, below that of -inf."""


@triton.jit
def _keys(values):
    """int32 in the order of the float32 values: not-a-numbers with a sign come first, those without last."""
    bits = values.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _places(flags):
    """Of every flag of a matrix how many are set before it, row by row."""
    counts = flags.to(tl.int32)
    in_rows = tl.sum(counts, 1)
    return (tl.cumsum(in_rows, 0) - in_rows)[:, None] + tl.cumsum(counts, 1) - counts


@triton.jit
def _count(flags):
    return tl.sum(tl.sum(flags.to(tl.int32), 1), 0)


@triton.jit
def _largest(keys, count, lowest):
    """Which are the `count` largest of a matrix of int32 keys, the first of equals; and a key that none is below.

    `lowest` is such a key as well, above that of what does not exist. Where there are fewer, all are taken.
    """
    low, high = lowest.to(tl.int64), tl.max(tl.max(keys, 1), 0).to(tl.int64) + 1
    found = _count(keys >= low)
    while (found > count) & (high - low > 1):
        middle = (low + high) // 2
        reach = _count(keys >= middle)
        enough = reach >= count
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
        found = tl.where(enough, reach, found)
    bound = low.to(tl.int32)
    above, equal = keys > bound, keys == bound
    return above | (equal & (_places(equal) < count - _count(above))), bound


@triton.jit
def _lanes(
    logits_ptr, stride, lanes_ptr, V, L,
    TEMPERATURES: tl.constexpr, LANE: tl.constexpr, BLOCK: tl.constexpr, LOG2_E: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    block = tl.program_id(1)
    lanes = block * (BLOCK // LANE) + tl.arange(0, BLOCK // LANE)
    columns = lanes[:, None] * LANE + tl.arange(0, LANE)[None, :]
    if (block + 1) * BLOCK <= V:  # without a mask, which would keep loads from being vectors where V is odd
        z = tl.load(logits_ptr + columns).to(tl.float32)
    else:
        z = tl.load(logits_ptr + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
    largest = tl.max(z, 1)
    lanes_ptr += row * L * (1 + 2 * len(TEMPERATURES)) + lanes
    tl.store(lanes_ptr, largest, mask=lanes < L)
    exists = z != float("-inf")
    d = tl.where(exists, z - largest[:, None], 0.0)
    weights = d
    for index in tl.static_range(len(TEMPERATURES)):
        if index > 0 and TEMPERATURES[index - 1] == 2 * TEMPERATURES[index]:
            weights *= weights  # exp(d / T) is exp(d / 2T) squared
        else:
            weights = tl.where(exists, tl.exp2(d * (LOG2_E / TEMPERATURES[index])), 0.0)
        tl.store(lanes_ptr + (1 + 2 * index) * L, tl.sum(weights, 1), mask=lanes < L)
        tl.store(lanes_ptr + (2 + 2 * index) * L, tl.sum(weights * d, 1), mask=lanes < L)


@triton.jit
def _select(
    logits_ptr, stride, lanes_ptr, labels_ptr, first_id, packed_ptr, chosen_ptr, sums_ptr, V, L, K,
    TEMPERATURES: tl.constexpr, PLACES: tl.constexpr, DRAWN: tl.constexpr, WIDTH: tl.constexpr, LANE: tl.constexpr,
    ALL_LANES: tl.constexpr, SLOTS: tl.constexpr, LOG2_E: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    lanes_ptr += row * L * (1 + 2 * len(TEMPERATURES))
    packed_ptr += row * WIDTH
    rest_ptr = packed_ptr + 2 * K
    label = tl.load(labels_ptr + row) - first_id
    has_label = (label >= 0) & (label < V)
    label_logit = tl.load(logits_ptr + tl.where(has_label, label, 0)).to(tl.float32)
    tl.store(rest_ptr + 2 * len(TEMPERATURES), tl.where(has_label, label_logit, float("-inf")))

    lanes = tl.arange(0, ALL_LANES // 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    maxima = tl.load(lanes_ptr + lanes, mask=lanes < L, other=float("-inf"))
    largest = tl.max(tl.max(maxima, 1), 0)
    lane_keys = tl.where(lanes < L, _keys(maxima), _LOWEST)
    is_chosen, bound = _largest(lane_keys, K, tl.full([], _LOWEST + 1, tl.int32))
    num_chosen = _count(is_chosen)
    chosen_ptr += row * SLOTS
    tl.store(chosen_ptr + _places(is_chosen), lanes, mask=is_chosen)
    tl.debug_barrier()
    slots = tl.arange(0, SLOTS)
    chosen = tl.load(chosen_ptr + slots, mask=slots < num_chosen, other=0)

    columns = chosen[:, None] * LANE + tl.arange(0, LANE)[None, :]
    is_column = (slots < num_chosen)[:, None] & (columns < V)
    z = tl.load(logits_ptr + columns, mask=is_column, other=float("-inf")).to(tl.float32)
    is_kept, _ = _largest(tl.where(is_column, _keys(z), _LOWEST), K, bound)  # each of k lanes has one not below it
    places = _places(is_kept)
    tl.store(packed_ptr + places, z, mask=is_kept)
    tl.store(packed_ptr + K + places, (columns + first_id).to(tl.float32), mask=is_kept)

    others = (lanes < L) & (is_chosen == 0) & (maxima != float("-inf"))
    lane_d = tl.where(others, maxima - largest, 0.0)
    exists = (is_kept == 0) & (z != float("-inf"))
    d = tl.where(exists, z - largest, 0.0)
    for index in tl.static_range(len(TEMPERATURES)):
        scale = LOG2_E / TEMPERATURES[index]
        lane_scales = tl.where(others, tl.exp2(lane_d * scale), 0.0)
        rests = tl.load(lanes_ptr + (1 + 2 * index) * L + lanes, mask=others, other=0.0)
        moments = tl.load(lanes_ptr + (2 + 2 * index) * L + lanes, mask=others, other=0.0)
        weights = tl.where(exists, tl.exp2(d * scale), 0.0)
        in_chosen = tl.sum(weights, 1)
        rest = tl.sum(tl.sum(lane_scales * rests, 1), 0) + tl.sum(in_chosen, 0)
        moment = tl.sum(tl.sum(lane_scales * (moments + lane_d * rests), 1), 0) + tl.sum(tl.sum(weights * d, 1), 0)
        tl.store(rest_ptr + PLACES[index], rest)
        tl.store(rest_ptr + len(TEMPERATURES) + PLACES[index], moment)
        if index == DRAWN:
            tl.store(sums_ptr + row * L + lanes, lane_scales * rests, mask=(lanes < L) & (is_chosen == 0))
            tl.store(sums_ptr + row * L + chosen, in_chosen, mask=slots < num_chosen)


def lane_width(num_candidates: int) -> int:
    """Columns of a lane: longer ones cost more of the second reading, shorter ones more sums."""
    return min(128, TILE // triton.next_power_of_2(num_candidates))


def select_warps(slots: int, lane: int) -> int:
    """Warps of a program of the second kernel that holds so many lanes: 8 columns a thread, for its registers' sake."""
    return min(max(slots * lane // 256, 8), 32)


def reduce_shard(
    reduction: Reduction, logits_NV: Tensor, labels_N: Tensor, first_id: int
) -> tuple[Tensor, Tensor | None]:
    """What `Reduction.reduce_shard` gives, candidates in no order, and what each lane holds of the tail.

    The second is float32 [N, L], sums of exp((z - m) / draw_temperature) over what is no candidate, m the row's
    maximum; None without draws. At most 128 candidates.
    """
    (num_rows, num_columns), num_candidates = logits_NV.shape, reduction.num_candidates
    assert logits_NV.stride(1) == 1 or num_columns == 1, "the columns of a row lie side by side"
    labels_N = labels_N.to(logits_NV.device, torch.int64).contiguous()
    temperatures, draw_temperature = reduction.temperatures, reduction.draw_temperature
    falling = sorted(range(len(temperatures)), key=lambda place: -temperatures[place])
    lane = lane_width(num_candidates)
    num_lanes = triton.cdiv(num_columns, lane)
    packed_NW = reduction.empty_shard(num_rows, logits_NV.device)
    has_draws = reduction.tail_samples > 0 and draw_temperature is not None
    drawn = falling.index(temperatures.index(draw_temperature)) if has_draws else None
    sums_NL = None if drawn is None else packed_NW.new_empty((num_rows, num_lanes))
    if logits_NV.numel() == 0:
        return packed_NW, sums_NL
    slots = triton.next_power_of_2(min(num_candidates, num_lanes))
    lanes = packed_NW.new_empty((num_rows, 1 + 2 * len(temperatures), num_lanes))
    chosen = torch.empty((num_rows, slots), dtype=torch.int32, device=logits_NV.device)
    constants = {"TEMPERATURES": tuple(temperatures[place] for place in falling), "LANE": lane, "LOG2_E": _LOG2_E}
    with torch.cuda.device_of(logits_NV):  # triton launches on the current device, wherever the tensors lie
        _lanes[(num_rows, triton.cdiv(num_columns, BLOCK))](
            logits_NV,
            logits_NV.stride(0),
            lanes,
            num_columns,
            num_lanes,
            BLOCK=BLOCK,
            num_warps=LANE_WARPS,
            **constants,
        )
        _select[(num_rows,)](
            logits_NV,
            logits_NV.stride(0),
            lanes,
            labels_N,
            first_id,
            packed_NW,
            chosen,
            lanes if sums_NL is None else sums_NL,
            num_columns,
            num_lanes,
            num_candidates,
            PLACES=tuple(falling),
            DRAWN=-1 if drawn is None else drawn,
            WIDTH=reduction.shard_width,
            ALL_LANES=max(32, triton.next_power_of_2(num_lanes)),
            SLOTS=slots,
            num_warps=select_warps(slots, lane),
            **constants,
        )
    return packed_NW, sums_NL
