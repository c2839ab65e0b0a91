"""Whether a student computes every document of a batch as if it were alone, tried before the first step.

Position ids that restart with each document are what tells a model of the documents of a row. A recurrent state, a
short convolution, a bias by distance or a mask of its own may not listen, and says nothing. So a row of the cache is
run whole, beside a shorter one that is padded, and every document alone; a model that differs gets each document as a
row of its own, and one that then still differs is refused: what follows a token changes it. pipeline/hidden.py says
what counts as a difference.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.hidden import ALLOWED, mean_difference, perturbed_embeddings
from stages.train_student.dataset import stack_rows

SEARCHED = 64
"""Sequences among which a row of several documents is looked for."""
FEW_TOKENS = 128
"""Of each of two documents, for a model that is to be sharded: it is tried on the CPU, by every rank."""
RANDOM_SETTINGS = ("drop", "jitter", "noise")
Documents = list[Tensor]
"""Token ids, int64 [length] each."""


def isolate_documents(model: Any, base: Any, documents: Documents) -> str | None:
    """Have `base`, the hooked model inside `model`, compute each document as if alone; a note if that costs time.

    Raises PipelineError if it cannot, as it looks ahead. The model runs as in training, on the device where it lies.
    """
    with _as_in_training(model, base.config.get_text_config()), torch.no_grad():
        alone = [_alone(model, document) for document in documents]
        with perturbed_embeddings(model):
            again = [_alone(model, document) for document in documents]
        allowed = ALLOWED * max(map(mean_difference, again, alone))
        packed = _together(model, documents, alone)
        if packed <= allowed:
            return None
        base.one_by_one = True
        single = _together(model, documents, alone)
    if not single <= allowed:
        raise PipelineError(
            f"{type(base).__name__}: the hidden states of {len(documents)} documents of a padded batch differ by "
            f"{single:.2g} from those of each alone, and arithmetic explains {allowed:.2g}: what follows a token or "
            "pads its row changes it, as in a model that is not causal; this student is not supported."
        )
    return (
        f"{type(base).__name__}: does not keep the documents of a row apart (they differ by {packed:.2g} from each "
        f"alone; arithmetic explains {allowed:.2g}), so every document is computed as a row of its own, which takes "
        "longer; `pipeline prepare --packing none` makes rows of one document."
    )


def probe(sequences: Iterable[Any], packing: str, *, few_tokens: bool = False) -> Documents:
    """The documents of the first row that has several, or the beginnings of two; without such a row those of the first,
    halved if documents share rows at all."""
    documents = _first_row(sequences, packing)
    return [document[:FEW_TOKENS] for document in documents[:2]] if few_tokens else documents


def _first_row(sequences: Iterable[Any], packing: str) -> Documents:
    first = None
    for _, sequence in zip(range(SEARCHED), sequences):
        documents = _documents(sequence)
        if len(documents) > 1:
            return documents
        first = documents if first is None else first
    assert first is not None
    return list(first[0].tensor_split(2)) if packing == "isolated" and len(first[0]) > 1 else first


def _documents(sequence: Any) -> Documents:
    tokens = torch.from_numpy(sequence.token_ids.astype("int64"))
    return list(tokens.split(sequence.document_lengths.tolist()))


def _together(model: Any, documents: Documents, alone: list[Tensor]) -> float:
    """The largest difference of a document of a batch: the row of all of them, and a padded one of the longest's
    beginning."""
    longest = max(range(len(documents)), key=lambda place: len(documents[place]))
    beginning = documents[longest][: (2 * len(documents[longest]) + 2) // 3]
    row = torch.cat(documents)
    lengths = [len(document) for document in documents]
    input_ids, position_ids = stack_rows([(row.numpy(), lengths), (beginning.numpy(), [len(beginning)])])
    rows = torch.cat([torch.arange(len(row)), len(row) + torch.arange(len(beginning))])
    *found, cut = _hidden(model, input_ids, position_ids, rows).split([*lengths, len(beginning)])
    return max(map(mean_difference, [*found, cut], [*alone, alone[longest][: len(beginning)]]))


def _alone(model: Any, document: Tensor) -> Tensor:
    positions = torch.arange(len(document))
    return _hidden(model, document[None], positions[None], positions)


def _hidden(model: Any, input_ids: Tensor, position_ids: Tensor, rows: Tensor) -> Tensor:
    """[rows, H]: what the head of the training's own forward is given."""
    device = next(model.parameters()).device
    batch = {"input_ids": input_ids, "position_ids": position_ids, "target_rows": rows}
    batch = {name: value.to(device) for name, value in batch.items()}
    return model(**batch, measure=lambda hidden_MH, weight_VH, adapter: hidden_MH)


@contextlib.contextmanager
def _as_in_training(model: Any, config: Any) -> Iterator[None]:
    """Train mode, where some kinds take other kernels; evaluation mode for what draws random numbers in training."""
    was_training = model.training
    values = config.to_dict()
    is_random = any(
        isinstance(value, float) and value > 0 and any(word in name for word in RANDOM_SETTINGS)
        for name, value in values.items()
    )
    model.train(not is_random)
    try:
        yield
    finally:
        model.train(was_training)
