"""An engine without a model, for tests of what lies around one: of this package's own, and of those who build on it."""

from collections.abc import Hashable, Iterable, Iterator

import numpy as np

from pipeline.cache.manifest import CacheManifest
from pipeline.targets import SparseTargets, unsketched
from stages.cache_logits.engine import Request


def fake_targets(
    token_ids: np.ndarray,
    labels: np.ndarray,
    top_k: int,
    temperatures: tuple[float, ...],
    vocab_size: int,
    num_draws: int = 0,
) -> SparseTargets:
    """Valid targets that depend on the token of their position alone: it is the most probable id, geometric decay."""
    ids = (token_ids[:, None] + np.arange(top_k)) % vocab_size
    decay = 0.5 + 0.001 * token_ids
    all_logits = -decay[:, None] * np.arange(vocab_size)
    weights = [np.exp(all_logits / temperature) for temperature in temperatures]
    probs = [weight / weight.sum(1, keepdims=True) for weight in weights]
    columns = {
        "logits": all_logits[:, :top_k],
        "logsumexps": np.stack([np.log(weight.sum(1)) for weight in weights], axis=1),
        "tail_logprobs": np.stack([np.log(prob[:, top_k:].sum(1)) for prob in probs], axis=1),
        "entropies": np.stack([-(prob * np.log(prob)).sum(1) for prob in probs], axis=1),
        "label_logits": -decay * ((labels - token_ids) % vocab_size),
    }
    floats = {name: values.astype(np.float32) for name, values in columns.items()}
    draws = (token_ids[:, None] + top_k + np.arange(num_draws) // 2) % vocab_size
    return SparseTargets(
        temperatures=temperatures,
        ids=ids.astype(np.int32),
        draws=draws.astype(np.int32),
        **floats,
        **unsketched(len(ids)),
    )


class FakeEngine:
    """An engine that loads nothing and answers at once, with targets that depend on the token alone; out of order."""

    def __init__(self, manifest: CacheManifest) -> None:
        self._manifest = manifest

    def score(self, requests: Iterable[Request]) -> Iterator[tuple[Hashable, SparseTargets]]:
        """Requests in groups of three, each group backwards."""
        group: list[Request] = []
        for request in requests:
            group.append(request)
            if len(group) == 3:
                yield from map(self._answer, reversed(group))
                group = []
        yield from map(self._answer, reversed(group))

    def close(self) -> None:
        """Nothing was started."""

    def _answer(self, request: Request) -> tuple[Hashable, SparseTargets]:
        tokens, labels = request.token_ids[request.positions], request.token_ids[request.positions + 1]
        manifest = self._manifest
        settings = (manifest.top_k, manifest.temperatures, manifest.vocab_size, manifest.tail_samples)
        return request.key, fake_targets(tokens, labels, *settings)
