"""The tail sketch of a cache: a few integers a position, from which the teacher's unstored logits nearly follow.

A language model's logits are a matrix of rank H times its last hidden state, z = W h + b, so that a few directions of h
say most of what the tail looks like. With R integers c of a position,

    c = round(encoder (h - mean))            s = offset + basis c

s stands for z, up to a constant, outside the stored ids; where the teacher caps its logits, so is s: cap tanh(s / cap).
The tail's mass stays exact: p_T(v) = tail mass * exp(s_v / T) / sum of exp(s / T) over the ids that are not stored.

A cache has one sketch, in a file that its manifest names by its hash: `sketch-HASH.safetensors`
(https://github.com/huggingface/safetensors) with offset and mean in float32, encoder in float32, basis in float16, and
under `__metadata__` the document of `SketchRecord`, as JSON text, by the name "tail-sketch".

Shapes: V vocabulary, R coefficients, H hidden size, N positions.
"""

from dataclasses import asdict, dataclass
from typing import Annotated, Any

import msgspec
import numpy as np
import xxhash
from msgspec import Meta

from pipeline.documents import Finite, Temperature, Width, document_of
from pipeline.errors import CacheCorruptError
from pipeline.stores.sealed import read_small
from pipeline.stores.store import Store

FORMAT = "tail-sketch"
SKETCH = "sketch-"
"""What the name of its file begins with."""
LARGEST_FILE = 1 << 30
"""Bytes: a vocabulary of 500,000 by 1,000 coefficients."""
_DTYPES = {"offset": np.float32, "basis": np.float16, "mean": np.float32, "encoder": np.float32}


@dataclass(frozen=True, eq=False)
class TailSketch:
    """What makes logits of coefficients."""

    offset: np.ndarray
    """float32 [V]"""
    basis: np.ndarray
    """float32 [V, R]: nats for a step of each coefficient."""
    softcap: float | None = None
    """c makes the logits c tanh(s / c)."""

    @property
    def rank(self) -> int:
        """Coefficients of a position."""
        return self.basis.shape[1]

    def logits(self, coefficients_NR: np.ndarray) -> np.ndarray:
        """float32 [N, V]: what stands for the teacher's logits outside the stored ids, up to a constant a row."""
        logits_NV = self.offset + coefficients_NR.astype(np.float32) @ self.basis.T
        return logits_NV if self.softcap is None else self.softcap * np.tanh(logits_NV / np.float32(self.softcap))


@dataclass(frozen=True, kw_only=True)
class SketchEncoder:
    """What makes coefficients of a last hidden state."""

    mean: np.ndarray
    """float32 [H]"""
    encoder: np.ndarray
    """float32 [R, H]"""


@dataclass(frozen=True, kw_only=True)
class SketchRecord:
    """What a sketch was fitted to, and how near it came."""

    top_k: Width
    """Its errors are those beside so many exact entries."""
    temperatures: Annotated[tuple[Temperature, ...], Meta(min_length=1, max_length=1024)]
    num_fitted: int
    """Positions of the corpus that it was fitted to."""
    num_checked: int
    """Further ones, on which the errors below were measured."""
    mean_kl: tuple[Finite, ...]
    """KL(p_T || what is rebuilt) a temperature, nats: over the whole vocabulary."""
    mean_kl_of_rounding: tuple[Finite, ...]
    """What of it the rounding of the coefficients has added."""
    softcap: float | None = None


@dataclass(frozen=True, kw_only=True)
class FittedSketch:
    """All of a sketch's file."""

    decoder: TailSketch
    encoder: SketchEncoder
    record: SketchRecord

    def to_bytes(self) -> bytes:
        """The file's contents; the same sketch gives the same bytes."""
        from safetensors.numpy import save

        tensors = {
            "offset": self.decoder.offset,
            "basis": self.decoder.basis,
            "mean": self.encoder.mean,
            "encoder": self.encoder.encoder,
        }
        document = msgspec.json.encode(asdict(self.record)).decode()
        stored = {name: np.ascontiguousarray(values, _DTYPES[name]) for name, values in tensors.items()}
        return save(stored, {FORMAT: document})  # several entries come in no order

    @classmethod
    def from_bytes(cls, contents: bytes, where: Any, vocab_size: int, rank: int) -> "FittedSketch":
        """What a file holds; raises CacheCorruptError unless it is a sketch of this vocabulary and rank."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            tensors = load(contents)
            length = int.from_bytes(contents[:8], "little")
            metadata = msgspec.json.decode(contents[8 : 8 + length])["__metadata__"]
            record = msgspec.json.decode(metadata[FORMAT])
        except (SafetensorError, msgspec.MsgspecError, KeyError, TypeError, ValueError) as exc:
            raise CacheCorruptError(f"{where}: no tail sketch: {exc}") from exc
        width = tensors["mean"].shape[0] if tensors.get("mean", np.zeros(())).ndim == 1 else 0
        shapes = {"offset": (vocab_size,), "basis": (vocab_size, rank), "mean": (width,), "encoder": (rank, width)}
        found = {name: (values.dtype, values.shape) for name, values in tensors.items()}
        if found != {name: (np.dtype(_DTYPES[name]), shape) for name, shape in shapes.items()}:
            raise CacheCorruptError(f"{where}: not the sketch of {vocab_size} ids by {rank} coefficients.")
        if not all(np.isfinite(values).all() for values in tensors.values()):
            raise CacheCorruptError(f"{where}: holds values that are no numbers.")
        read = document_of(SketchRecord, record, where, CacheCorruptError)
        return cls(
            decoder=TailSketch(
                offset=tensors["offset"], basis=tensors["basis"].astype(np.float32), softcap=read.softcap
            ),
            encoder=SketchEncoder(mean=tensors["mean"], encoder=tensors["encoder"]),
            record=read,
        )


def sketch_name(checksum: str) -> str:
    """The file of the sketch with this hash."""
    return f"{SKETCH}{checksum}.safetensors"


def checksum_of(contents: bytes) -> str:
    """The hash by which a manifest names a sketch: xxh3-128 of its file."""
    return xxhash.xxh3_128(contents).hexdigest()


def read_contents(folder: Store, checksum: str) -> bytes:
    """A cache's file, checked against its hash; raises CacheCorruptError."""
    path = folder / sketch_name(checksum)
    try:
        contents = read_small(path, CacheCorruptError, LARGEST_FILE)
    except FileNotFoundError:
        raise CacheCorruptError(f"{path}: missing; the manifest names it as the cache's tail sketch.") from None
    if checksum_of(contents) != checksum:
        raise CacheCorruptError(f"{path}: does not match its checksum; the file is damaged.")
    return contents
