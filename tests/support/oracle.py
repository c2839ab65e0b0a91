"""Float64 definitions of everything that the project computes, written from the formulas alone."""

import numpy as np


def softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    """float64 [N, V]: softmax(z / T)."""
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def entropy(probs: np.ndarray) -> np.ndarray:
    """float64 [N], nats."""
    logs = np.log(probs, where=probs > 0, out=np.zeros_like(probs))
    return -(probs * logs).sum(axis=1)


def assert_true_top_k(
    ids: np.ndarray, logits: np.ndarray, tolerance: float | np.ndarray, in_order: bool = True
) -> None:
    """`ids` [N, K] are the K largest of `logits` [N, V], in falling order, to ties within `tolerance`, [N, 1] or one.

    Not `in_order`: where rounding has made equals of them, their order is that of the ids.
    """
    k = ids.shape[1]
    assert (np.sort(ids, axis=1)[:, 1:] != np.sort(ids, axis=1)[:, :-1]).all()
    chosen = np.take_along_axis(logits, ids, axis=1)
    if not in_order:
        chosen = -np.sort(-chosen, axis=1)
    best = -np.sort(-logits, axis=1)[:, :k]
    assert (np.abs(chosen - best) <= tolerance).all()


def assert_within(found: np.ndarray, expected: np.ndarray | float, allowed: np.ndarray | float) -> None:
    """Every `found` lies within what is allowed of its `expected`."""
    expected = np.broadcast_to(expected, found.shape)
    excess = np.abs(found.astype(np.float64) - expected) - allowed
    worst = np.unravel_index(np.argmax(excess), excess.shape)
    assert excess[worst] <= 0, (
        f"{found[worst]} at {worst}, expected {expected[worst]}, off by {excess[worst]:.3g} too much"
    )
