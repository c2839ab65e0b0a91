"""Other ways to store the same targets, re-implemented as far as their size and error go; and floors of size.

Each takes exact targets and gives its bytes a token for ids and values, and what it would read back, if it reads
back probabilities at all. None stores the normalisers that T=2 needs: they get the exact ones.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from unittest import mock

import numpy as np
from numcodecs import blosc

from pipeline.formats import zarr
from pipeline.formats.archive import ArchivedArray
from pipeline.targets import SparseTargets, logsumexps_of

ID_BITS = 17
RANDOM = np.random.default_rng(0)


def _with_logits(targets: SparseTargets, logits: np.ndarray) -> SparseTargets:
    """The targets with other logits; their mass stays one less the tail's."""
    logits = logits.astype(np.float32)
    logsumexps = logsumexps_of(logits, targets.tail_logprobs, targets.temperatures)
    return replace(targets, logits=logits, logsumexps=logsumexps)


def _raw(targets: SparseTargets) -> tuple[float, SparseTargets]:
    """int32 ids and float16 log-probabilities."""
    logprobs = targets.logprobs(1.0).astype(np.float16)
    return targets.top_k * (4 + 2), _with_logits(targets, logprobs)


def _packed(targets: SparseTargets) -> tuple[float, SparseTargets]:
    """17-bit ids and logits in 256 equal steps of the row's range, of which a float16 is stored."""
    lowest = targets.logits.min(axis=1, keepdims=True).astype(np.float16).astype(np.float32)
    codes = np.clip(np.rint(targets.logits / lowest * 255), 0, 255)
    return targets.top_k * (ID_BITS + 8) / 8 + 2, _with_logits(targets, codes / 255 * lowest)


def _polynomial(
    num_exact: int, degree: int, residual_bits: int
) -> Callable[[SparseTargets], tuple[float, SparseTargets]]:
    """DistillKit's published layout: the first log-probabilities in bfloat16, a polynomial of the rank for the others.

    The polynomial's residuals, if kept, in equal steps of their row's range; coefficients and range in float32.
    """

    def store(targets: SparseTargets) -> tuple[float, SparseTargets]:
        logprobs = targets.logprobs(1.0)
        rest = logprobs[:, num_exact:]
        ranks = np.linspace(-1, 1, rest.shape[1])
        basis = np.polynomial.legendre.legvander(ranks, degree)
        fitted = rest @ np.linalg.pinv(basis).T @ basis.T
        size = (targets.top_k * ID_BITS + num_exact * 16 + (degree + 1) * 32) / 8
        if residual_bits:
            residuals = rest - fitted
            low, high = residuals.min(axis=1, keepdims=True), residuals.max(axis=1, keepdims=True)
            step = np.maximum(high - low, 1e-12) / (2**residual_bits - 1)
            fitted = fitted + low + np.rint((residuals - low) / step) * step
            size += (rest.shape[1] * residual_bits + 64) / 8
        kept = (np.ascontiguousarray(logprobs[:, :num_exact], np.float32).view(np.uint32) + 0x8000) & 0xFFFF0000
        return size, _with_logits(targets, np.hstack([kept.view(np.float32), fitted]))

    return store


def _sampled(targets: SparseTargets) -> tuple[float, None]:
    """Random-sampling KD, 12 draws from p_1: 17-bit ids and 4-bit counts of the distinct ones. Unbiased, not exact."""
    probs = targets.probs(1.0).astype(np.float64)
    rows = RANDOM.choice(len(probs), 2048, replace=False)
    drawn = []
    for row in probs[rows]:
        counts = RANDOM.multinomial(12, np.append(row, max(0.0, 1 - row.sum())) / max(1.0, row.sum()))
        drawn.append((counts[:-1] > 0).sum() + counts[-1])  # two draws from the tail are hardly ever the same id
    return float(np.mean(drawn)) * (ID_BITS + 4) / 8, None


@contextlib.contextmanager
def with_blosc(level: int) -> Iterator[None]:
    """Our Zarr shards, but of codecs that Zarr v3 itself specifies: zstd in blosc, chunks whole, the better shuffles.

    Of blosc's levels, 5 is zstd's 9 and 9 is zstd's 22.
    """
    blosc.set_nthreads(1)
    ours, read_ours = zarr._compress, ArchivedArray._chunk

    def compress(values: np.ndarray) -> bytes:
        if values.dtype.itemsize == 1:
            return ours(values)
        shuffle = blosc.Blosc.BITSHUFFLE if values.dtype.itemsize == 2 else blosc.Blosc.SHUFFLE
        return blosc.Blosc("zstd", level, shuffle, values.nbytes).encode(values)

    def read(array: ArchivedArray, start: int, stop: int, block: int) -> np.ndarray:
        if array._dtype.itemsize == 1:
            return read_ours(array, start, stop, block)
        contents = blosc.decompress(array._checked(start, stop, f"chunk {block}"))
        return np.frombuffer(contents, array._dtype).reshape(array._chunk_shape)

    with mock.patch.object(zarr, "_compress", compress), mock.patch.object(ArchivedArray, "_chunk", read):
        yield


Peer = Callable[[SparseTargets], tuple[float, SparseTargets | None]]
PEERS: dict[str, Peer] = {
    "int32 + float16": _raw,
    "17 bits + 8 bits": _packed,
    "DistillKit: 8 exact, deg 4, 4b": _polynomial(8, 4, 4),
    "DistillKit: 1 exact, deg 4": _polynomial(1, 4, 0),
    "12 random samples": _sampled,
}


def floors(targets: SparseTargets) -> dict[str, float]:
    """Bytes a token that no code of the ids gets below unless it knows their context."""
    counts = np.bincount(targets.ids.ravel())
    probs = counts[counts > 0] / counts.sum()
    in_order = -(probs * np.log2(probs)).sum() * targets.top_k / 8
    return {
        "floor: ids in rank order": in_order,
        "floor: ids as a set": in_order - math.lgamma(targets.top_k + 1) / math.log(2) / 8,
    }
