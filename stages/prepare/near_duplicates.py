"""Texts that are nearly one that came before, found by MinHash (Broder, 1997) before anything is tokenised.

Two texts are compared by the sets of their runs of SHINGLE words: the share that both have of all that one of them has
(Jaccard). MinHash estimates it; of NUM_HASHES hashes the estimate's standard deviation is at most 0.045. One pass over
all inputs in their order, about 1.5 KB of memory a text that is kept; needs datasketch.
"""

import importlib.util
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import xxhash

from pipeline.errors import ConfigError
from stages.prepare.quality import Reading, broken_rule

SHINGLE = 5
"""Words of a run; of Chinese twice as many characters."""
NUM_HASHES = 128
KEY_BYTES = 16
"""Of a text's key."""


def require_datasketch() -> None:
    """Raise ConfigError where the library is missing."""
    if any(importlib.util.find_spec(name) is None for name in ("datasketch", "scipy")):
        raise ConfigError(
            "near_duplicates is set, but datasketch is not installed; `pip install "
            "'logit-cache-pipeline[near-duplicates]'`."
        )


def text_key(text: str) -> bytes:
    """16 bytes that name a text."""
    return xxhash.xxh3_128_digest(text.encode("utf-8", "surrogatepass"))


def near_duplicates(texts: Iterable[str], threshold: float, rules: Sequence[str] = ()) -> set[bytes]:
    """Keys of the texts that are at least so alike to one before them that is kept; the same texts give the same.

    What breaks one of the quality `rules` is dropped for that, and stands for nothing. An equal text has the key of the
    one that it equals: it is no near duplicate but a duplicate.
    """
    from datasketch import MinHashLSH

    index = MinHashLSH(threshold=threshold, num_perm=NUM_HASHES)
    signatures: dict[bytes, Any] = {}
    dropped: set[bytes] = set()
    for text in texts:
        key, reading = text_key(text), Reading(text)
        if key in signatures or key in dropped or broken_rule(reading, rules) is not None:
            continue
        signature = _signature(reading)
        if any(signature.jaccard(signatures[other]) >= threshold for other in index.query(signature)):
            dropped.add(key)
        else:
            signatures[key] = signature
            index.insert(key, signature)
    return dropped


def shingles(text: Reading) -> set[bytes]:
    """The runs of SHINGLE words of a text, in lower case; of a shorter one all of it."""
    words, size = [word.lower() for word in text.words], SHINGLE * text.scale
    runs = [words[at : at + size] for at in range(max(1, len(words) - size + 1))]
    return {" ".join(run).encode("utf-8", "surrogatepass") for run in runs}


def _signature(text: Reading) -> Any:
    from datasketch import MinHash

    signature = MinHash(num_perm=NUM_HASHES, seed=1, hashfunc=_hash)
    signature.update_batch(sorted(shingles(text)))
    return signature


def _hash(value: bytes) -> int:
    """32 bits, which is what MinHash permutes."""
    return int(np.uint32(xxhash.xxh3_64_intdigest(value) & 0xFFFFFFFF))
