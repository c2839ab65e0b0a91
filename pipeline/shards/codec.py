"""How the floating-point columns are rounded before they are stored.

A codec is a plain rounding: what it writes are ordinary float16 or float32 values, which every
reader of the container understands.
"""

from dataclasses import dataclass

import numpy as np

FLOAT16_MAX = np.float32(65280.0)
"""Largest magnitude with 8 mantissa bits that float16 holds."""


@dataclass(frozen=True)
class Codec:
    """Stored dtypes of the columns, and the mantissa bits that `logits` and `label_logits` keep."""

    dtypes: dict[str, type]
    logit_bits: int | None
    """None keeps float32 as it is."""

    def encode(self, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The columns of SparseTargets, rounded and in their stored dtypes."""
        stored = {}
        for name, values in columns.items():
            if self.logit_bits is not None and name in ("logits", "label_logits"):
                values = round_mantissa(np.maximum(values, -FLOAT16_MAX), self.logit_bits)
            stored[name] = np.ascontiguousarray(values, dtype=self.dtypes.get(name, np.int32))
        return stored


def round_mantissa(values: np.ndarray, bits: int) -> np.ndarray:
    """float32 values rounded to nearest, ties to even, with `bits` mantissa bits: relative error 2^-(bits+1)."""
    drop = 23 - bits
    raw = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = raw + np.uint32((1 << (drop - 1)) - 1) + ((raw >> np.uint32(drop)) & np.uint32(1))
    return (rounded & np.uint32(0xFFFFFFFF << drop & 0xFFFFFFFF)).view(np.float32)


_FLOATS = ("logits", "logsumexps", "tail_logprobs", "entropies", "label_logits")

CODECS = {
    "lossless": Codec(dtypes=dict.fromkeys(_FLOATS, np.float32), logit_bits=None),
    "compact": Codec(dtypes=dict.fromkeys(_FLOATS, np.float16) | {"logsumexps": np.float32}, logit_bits=8),
}
"""By the name that `--codec` takes."""
