"""Reducing full logits to sparse targets, where the logits are.

Shape suffixes: N rows, V columns of the vocabulary (or of one rank's share), K entries,
T temperatures, W packed columns, R ranks.

Two steps, so that tensor-parallel ranks never exchange full logits. `reduce_shard` turns a
rank's columns into K candidates and, for every temperature, two sums over all its other
columns, each relative to the rank's own maximum m:

    rest_T = sum exp((z - m) / T)        moment_T = sum (z - m) exp((z - m) / T)

`merge` rescales the sums of all ranks to the common maximum, keeps the best K candidates, adds
the others to the sums, and has all of L_T, the tail mass and the entropy of `pipeline.targets`:

    S_T = rest_T + sum over kept exp(d / T)     L_T = log S_T     log tail_T = log rest_T - L_T
    entropy_T = L_T - (moment_T + sum over kept d exp(d / T)) / (T S_T)
"""

import functools
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

CPU_BLOCK_ROWS = 8
"""Rows reduced together on a CPU: a float32 block of a 100k vocabulary and its scratch stay in cache."""
LANE = 64
"""Columns of a lane in the two-level top-k and in the draws."""
_ABSENT = -1e30
"""Stands for the logit of what does not exist: its exponential is 0, and 0 times it is 0, not nan."""
_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Reduction:
    """What is kept of a row: the settings that every rank and the reader of the result share."""

    top_k: int
    temperatures: tuple[float, ...]
    tail_samples: int = 0
    """Draws from what is left of p_T when the top k are taken out, at `draw_temperature`."""
    draw_temperature: float | None = None
    tail_rank: int = 0
    """Coefficients of the tail sketch."""

    @property
    def num_candidates(self) -> int:
        """Candidates of a rank: its largest is needed even where none is kept."""
        return max(1, self.top_k)

    @property
    def shard_width(self) -> int:
        """Columns of a rank's packed partial result."""
        return 2 * self.num_candidates + 2 * len(self.temperatures) + 1

    @property
    def width(self) -> int:
        """Columns of the packed final result."""
        sketched = self.tail_rank + len(self.temperatures) if self.tail_rank else 0
        return 2 * self.top_k + 3 * len(self.temperatures) + 1 + self.tail_samples + sketched

    def reduce_shard(self, logits_NV: Tensor, labels_N: Tensor, first_id: int = 0) -> Tensor:
        """float32 [N, shard_width]: values | ids | rest | moment | label's logit, of columns from `first_id` on.

        `labels_N` are ids of the whole vocabulary; a label in another rank's columns gives -inf. Ids below
        2^24 travel exactly as float32. float32 logits are made relative to their row's maximum in place.
        """
        logits_NV = logits_NV.float()
        if logits_NV.device.type != "cpu" or len(logits_NV) <= CPU_BLOCK_ROWS:
            return self._reduce_block(logits_NV, labels_N, first_id)
        workers = torch.get_num_threads()
        parts = zip(logits_NV.tensor_split(workers), labels_N.tensor_split(workers))
        inference = torch.is_inference_mode_enabled()  # a property of the thread
        reduced = _cpu_threads(workers).map(
            lambda part: self._reduce_blocks(part[0], part[1], first_id, inference), parts
        )
        return torch.cat(list(reduced))

    def _reduce_blocks(self, logits_NV: Tensor, labels_N: Tensor, first_id: int, inference: bool) -> Tensor:
        with torch.inference_mode(inference), torch.no_grad():
            scratch_NV = torch.empty_like(logits_NV[:CPU_BLOCK_ROWS])  # fresh memory for every block costs page faults
            blocks = zip(logits_NV.split(CPU_BLOCK_ROWS), labels_N.split(CPU_BLOCK_ROWS))
            return torch.cat([self._reduce_block(z, labels, first_id, scratch_NV[: len(z)]) for z, labels in blocks])

    def _reduce_block(self, z_NV: Tensor, labels_N: Tensor, first_id: int, scratch_NV: Tensor | None = None) -> Tensor:
        num_rows, num_columns = z_NV.shape
        packed = self.empty_shard(num_rows, z_NV.device)
        values, ids, rest, moment, label = self.split_shard(packed)
        if num_columns == 0:
            return packed
        local = labels_N.to(z_NV.device) - first_id
        here = (local >= 0) & (local < num_columns)
        found = z_NV.gather(1, local.clamp(0, num_columns - 1)[:, None])
        label.copy_(torch.where(here[:, None], found, label))
        count = min(self.num_candidates, num_columns)
        top, columns = _topk(z_NV, count)
        values[:, :count] = top
        ids[:, :count] = columns + first_id
        z_NV -= top[:, :1]
        weights = scratch_NV
        for index, previous in self._by_falling_temperature():
            temperature = self.temperatures[index]
            if weights is not None and previous == 2 * temperature:
                weights *= weights  # exp(d / T) is exp(d / 2T) squared
            else:
                # Through exp2: torch.exp takes almost three times as long on some CPUs.
                weights = torch.mul(z_NV, _LOG2_E / temperature, out=weights).exp2_()
                weights.scatter_(1, columns, 0.0)
            rest[:, index] = weights.sum(1)
            moment[:, index] = _row_dots(weights, z_NV)
        return packed

    def _by_falling_temperature(self) -> list[tuple[int, float | None]]:
        order = sorted(range(len(self.temperatures)), key=lambda index: -self.temperatures[index])
        return [(index, self.temperatures[order[i - 1]] if i else None) for i, index in enumerate(order)]

    def merge(self, shards_NRW: Tensor) -> Tensor:
        """int32 [N, 2 K + 3 T + 1]: bits of ids | logits | logsumexps | log tails | entropies | label's logit.

        `shards_NRW` is float32 [N, ranks, shard_width]: what `reduce_shard` gave on every rank.
        """
        _, ids, rest, moment, label = self.split_shard(shards_NRW)
        maximum, kept, d_NK, shift, others = self.common_scale(shards_NRW)
        statistics = []
        for index, temperature in enumerate(self.temperatures):
            scale = (shift / temperature).exp()[:, :, 0]
            dropped, kept_weights = (others / temperature).exp(), (d_NK / temperature).exp()
            rest_N = (scale * rest[:, :, index]).sum(1) + dropped.sum(1)
            moment_N = (scale * (moment[:, :, index] + shift[:, :, 0] * rest[:, :, index])).sum(1)
            moment_N = moment_N + (others * dropped).sum(1) + (d_NK * kept_weights).sum(1)
            total_N = rest_N + kept_weights.sum(1)
            logsumexp_N = total_N.log()
            entropy_N = logsumexp_N - moment_N / (temperature * total_N)
            statistics.append((logsumexp_N, rest_N.log() - logsumexp_N, entropy_N.clamp(min=0)))
        parts = [ids.flatten(1).gather(1, kept).to(torch.int32), _bits(d_NK)]
        parts += [_bits(torch.stack(column, dim=1)) for column in zip(*statistics)]
        parts.append(_bits(label.amax(1) - maximum))
        return torch.cat(parts, dim=1)

    def common_scale(self, shards_NRW: Tensor) -> tuple[Tensor, ...]:
        """What puts all ranks on one scale.

        The maximum [N, 1]; the flat places [N, K] of the kept candidates, and their logits relative to
        the maximum; every rank's maximum relative to the common one, [N, R, 1]; and the candidates
        [N, R * C] relative to it, about -inf where they are kept or do not exist.
        """
        values = self.split_shard(shards_NRW)[0]
        top, places = values.flatten(1).topk(self.num_candidates, dim=1, sorted=True)
        maximum, kept = top[:, :1], places[:, : self.top_k]
        shift = (values.amax(-1, keepdim=True) - maximum[:, :, None]).clamp(min=_ABSENT)
        others = (values.flatten(1) - maximum).scatter(1, kept, -torch.inf).clamp(min=_ABSENT)
        return maximum, kept, top[:, : self.top_k] - maximum, shift, others

    def empty_shard(self, num_rows: int, device: torch.device) -> Tensor:
        """The packed partial result of a rank that has no columns."""
        packed = torch.zeros((num_rows, self.shard_width), dtype=torch.float32, device=device)
        values, _, _, _, label = self.split_shard(packed)
        values.fill_(-torch.inf)
        label.fill_(-torch.inf)
        return packed

    def split_shard(self, packed: Tensor) -> tuple[Tensor, ...]:
        """Views of a packed partial result: values, ids, rest, moment, label's logit."""
        count = len(self.temperatures)
        return packed.split([self.num_candidates, self.num_candidates, count, count, 1], dim=-1)

    def split_merged(self, merged_NW: Tensor) -> tuple[Tensor, ...]:
        """Views of what `merge` gives: ids, and the bits of logits, logsumexps, log tails, entropies, label's logit."""
        count = len(self.temperatures)
        return merged_NW.split([self.top_k, self.top_k, count, count, count, 1], dim=1)


@functools.cache
def _cpu_threads(workers: int) -> ThreadPoolExecutor:
    """Threads with a core each. The operations of a block are so short that torch's own threads, which share
    every one of them, spend more time on waiting for each other, and on a busy machine nearly all of it.
    """
    return ThreadPoolExecutor(workers, "reduction", initializer=torch.set_num_threads, initargs=(1,))


def _bits(values: Tensor) -> Tensor:
    return values.float().contiguous().view(torch.int32)


def _topk(z_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of every row and their columns, largest first."""
    num_lanes = z_NV.shape[1] // LANE
    if num_lanes <= k:
        return z_NV.topk(k, dim=1, sorted=True)
    # The k lanes with the largest maxima hold the k largest entries: one pass instead of several.
    in_lanes = num_lanes * LANE
    lanes = z_NV[:, :in_lanes].unflatten(1, (num_lanes, LANE))
    best = lanes.amax(-1).topk(k, dim=1, sorted=False).indices
    candidates = lanes[torch.arange(len(best), device=z_NV.device)[:, None], best].flatten(
        1
    )  # copies whole lanes, as gather does not
    if in_lanes < z_NV.shape[1]:
        candidates = torch.cat([candidates, z_NV[:, in_lanes:]], dim=1)
    top, chosen = candidates.topk(k, dim=1, sorted=True)
    columns = best.gather(1, (chosen // LANE).clamp(max=k - 1)) * LANE + chosen % LANE
    return top, torch.where(chosen < k * LANE, columns, chosen - k * LANE + in_lanes)


def _row_dots(a_NV: Tensor, b_NV: Tensor) -> Tensor:
    """[N]: the dot product of each row of one with the same row of the other."""
    if a_NV.device.type != "cpu":
        return torch.linalg.vecdot(a_NV, b_NV)
    if len(a_NV) == 0:
        return a_NV.new_empty(0)
    # vecdot is a batched product of threads that wait for each other: hundreds of times slower on a busy machine.
    return torch.stack([torch.dot(a, b) for a, b in zip(a_NV.unbind(0), b_NV.unbind(0))])
