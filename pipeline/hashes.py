"""Numbers that look random and are the same on every machine and with every version of numpy."""

import numpy as np

_STEP = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def mixed(values: np.ndarray) -> np.ndarray:
    """uint64 of the shape of the uint64 `values`: a bijection of which every bit depends on every bit of a value.

    splitmix64's (Steele et al., 2014).
    """
    values = values + _STEP
    values = (values ^ (values >> np.uint64(30))) * _FIRST
    values = (values ^ (values >> np.uint64(27))) * _SECOND
    return values ^ (values >> np.uint64(31))


def seeded(values: np.ndarray, *seeds: int) -> np.ndarray:
    """`mixed` values that other seeds, from 0 to 2^63, mix otherwise."""
    for seed in seeds:
        values = mixed(mixed(np.array([seed], np.uint64)) ^ values)
    return values
