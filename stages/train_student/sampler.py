"""The order of the data: a function of the seed and a position, so that nothing is shuffled, stored or skipped.

The samples of a run form one endless stream; position p is sample p % n of epoch p // n, under that epoch's
permutation. An optimizer step takes the next `global_batch` positions, micro-batch by micro-batch, and every rank its
slice of each: the sequences of a step do not depend on how many ranks, micro-batches or worker processes share them.
Several sources make one stream (`Mixture`), in which each has a stream of its own.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from torch.utils.data import Sampler

ROUNDS = 6
_MASK = 2**64 - 1


class Permutation:
    """A pseudo-random bijection of range(size) in constant memory: a Feistel network, walked until inside the range.

    `permutation[i]` costs a few microseconds for any i. Every key gives another order.
    """

    def __init__(self, size: int, key: tuple[int, ...]) -> None:
        self._size = size
        self._half_bits = max(4, ((size - 1).bit_length() + 1) // 2)
        seed = 0
        for part in key:
            seed = _mix(seed ^ (part & _MASK))
        self._keys = [_mix(seed + number) for number in range(ROUNDS)]

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self._size:
            raise IndexError(f"position {index} of a permutation of {self._size}")
        index = self._encrypt(index)
        while index >= self._size:  # the network permutes the next power of four: a few walks, 128 for a single sample
            index = self._encrypt(index)
        return index

    def _encrypt(self, index: int) -> int:
        mask = (1 << self._half_bits) - 1
        left, right = index >> self._half_bits, index & mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return left << self._half_bits | right


def _mix(value: int) -> int:
    """splitmix64's finaliser (Steele et al., 2014): every bit of the result depends on every bit of the value."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """How the sequences of an optimizer step are shared out."""

    batch_size: int
    """Sequences of a micro-batch on one rank."""
    accumulation: int
    """Micro-batches of a step."""
    rank: int = 0
    world_size: int = 1

    @property
    def global_batch(self) -> int:
        """Sequences of a step, on all ranks."""
        return self.batch_size * self.accumulation * self.world_size


class StreamSampler(Sampler[list[int]]):
    """Micro-batches of one rank, as lists of sequence numbers, from step `first_step` to the last of `num_steps`."""

    def __init__(self, num_sequences: int, seed: int, shape: StepShape, num_steps: int) -> None:
        self._num_sequences, self._seed, self._shape, self._num_steps = num_sequences, seed, shape, num_steps
        self.first_step = 0

    def __len__(self) -> int:
        """Micro-batches of a whole run, wherever this one begins."""
        return self._num_steps * self._shape.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        shape = self._shape
        rows = shape.batch_size * shape.world_size
        for micro_batch in range(self.first_step * shape.accumulation, len(self)):
            start = micro_batch * rows + shape.rank * shape.batch_size
            yield [self.sequence_at(position) for position in range(start, start + shape.batch_size)]

    def sequence_at(self, position: int) -> int:
        """The sequence at a position of the stream."""
        epoch, index = divmod(position, self._num_sequences)
        return Permutation(self._num_sequences, (self._seed, epoch))[index]


class Mixture:
    """Which source every position of a stream takes from: each at its share, evenly, from the first position on.

    The item k of a source with share w is due at (k + 1/2) / w; positions go to the items as they are due, of equals to
    the first source: Webster's apportionment. Of n sources none is ever further than 1/2 + w (n - 2) / 2 items from its
    share of the positions before: of two, any window has the exact number to within 1. A position costs microseconds.
    """

    def __init__(self, shares: Sequence[Fraction]) -> None:
        """Shares above 0 that add up to 1."""
        assert sum(shares) == 1
        assert min(shares) > 0
        self._total = math.lcm(*(share.denominator for share in shares))
        self._weights = [int(share * self._total) for share in shares]

    def counts(self, position: int) -> list[int]:
        """How many items of each source the positions before this one have."""
        return self._from(position)

    def item(self, position: int) -> tuple[int, int]:
        """The source at a position, and how many of its items come before."""
        counts = self._from(position)
        source = self._next(counts)
        return source, counts[source]

    def _from(self, position: int) -> list[int]:
        """What is due by a time before which fewer than `position` items are, and the next ones one by one."""
        time = max(0, position - len(self._weights))
        counts = [(2 * weight * time + self._total) // (2 * self._total) for weight in self._weights]
        for _ in range(position - sum(counts)):
            counts[self._next(counts)] += 1
        return counts

    def _next(self, counts: list[int]) -> int:
        best = 0
        for source in range(1, len(counts)):  # (2 k + 1) / weight, compared without division
            if (2 * counts[source] + 1) * self._weights[best] < (2 * counts[best] + 1) * self._weights[source]:
                best = source
        return best


class MixedSampler(StreamSampler):
    """Micro-batches of a mixture: numbers of sequences, those of the second source behind those of the first."""

    def __init__(
        self, sizes: Sequence[int], shares: Sequence[Fraction], seed: int, shape: StepShape, num_steps: int
    ) -> None:
        super().__init__(sum(sizes), seed, shape, num_steps)
        self._sizes, self._mixture = sizes, Mixture(shares)

    def sequence_at(self, position: int) -> int:
        """The sequence at a position of the stream: that of its source's own stream, which has its own permutations."""
        source, index = self._mixture.item(position)
        epoch, place = divmod(index, self._sizes[source])
        return sum(self._sizes[:source]) + Permutation(self._sizes[source], (self._seed, epoch, source))[place]
