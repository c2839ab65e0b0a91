"""The hidden states of a batch's target rows, every document of it computed as if it were alone.

Several documents share a row, and position ids restart with each. Attention that knows this from the position ids takes
the rows as they are; everything else (recurrent states, convolutions, attention by other rules) gets each document as a
row of its own (`one_by_one`).

Shapes: B rows of a batch, S their length, M target rows, N tokens of documents that hold target rows, H hidden size.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from pipeline.models import text_body

LENGTH_CLASSES = 6
"""Documents are computed one by one in batches of a length class each: above 1/2 of S, above 1/4, and so on."""


class BodyOutput(NamedTuple):
    """What a student's body makes of a batch."""

    hidden_MH: Tensor
    router_logits: tuple[Tensor, ...]
    """[N, experts] of every layer with experts, if asked for."""


def target_hidden(
    model: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor,
    target_rows: Tensor,
    *,
    one_by_one: bool = False,
    routers: bool = False,
) -> BodyOutput:
    """The last hidden states at `target_rows` of the flattened [B, S] tokens; padding and such documents as hold no
    target row are left out of the router logits."""
    settings = {"use_cache": False} | ({"output_router_logits": True} if routers else {})
    if one_by_one:
        return _one_by_one(text_body(model), input_ids, position_ids, target_rows, settings)
    out = text_body(model)(input_ids=input_ids, position_ids=position_ids, **settings)
    hidden_MH = out.last_hidden_state.flatten(0, 1)[target_rows]
    if not routers:
        return BodyOutput(hidden_MH, ())
    starts, lengths = _documents(position_ids, target_rows)
    rows_N = torch.cat([torch.arange(a, a + n, device=input_ids.device) for a, n in zip(starts, lengths)])
    return BodyOutput(hidden_MH, tuple(logits.reshape(-1, logits.shape[-1])[rows_N] for logits in out.router_logits))


def _one_by_one(
    body: Any, input_ids: Tensor, position_ids: Tensor, target_rows: Tensor, settings: dict[str, Any]
) -> BodyOutput:
    """Every document a row, padded on the right to the longest of its length class.

    Sharded ranks run the body equally often, as its collectives ask: a class without documents is one token.
    """
    tokens = input_ids.flatten()
    starts, lengths = _documents(position_ids, target_rows)
    rows, hidden, unused = [], [], []
    routers: list[tuple[Tensor, ...]] = []
    is_sharded = any(isinstance(module, FSDPModule) for module in body.modules())
    for chosen in _length_classes(lengths, input_ids.shape[1]):
        if not chosen and not is_sharded:
            continue
        firsts = torch.tensor([starts[i] for i in chosen] or [0], device=tokens.device)
        sizes = torch.tensor([lengths[i] for i in chosen] or [1], device=tokens.device)
        offsets = torch.arange(int(sizes.max()), device=tokens.device)
        rows_BS, is_real_BS = firsts[:, None] + offsets, offsets < sizes[:, None]
        rows_BS = rows_BS.where(is_real_BS, 0)
        ids_BS = tokens[rows_BS].where(is_real_BS, 0)
        out = body(input_ids=ids_BS, position_ids=offsets.expand_as(ids_BS), **settings)
        if not chosen:
            unused.append(out.last_hidden_state.sum())
            continue
        rows.append(rows_BS[is_real_BS])
        hidden.append(out.last_hidden_state[is_real_BS])
        is_real = is_real_BS.flatten()
        routers.append(tuple(logits.reshape(-1, logits.shape[-1])[is_real] for logits in _routers(out, settings)))
    hidden_NH = torch.cat(hidden)
    places = torch.zeros_like(tokens).index_put_((torch.cat(rows),), torch.arange(len(hidden_NH), device=tokens.device))
    hidden_MH = hidden_NH[places[target_rows]]
    for value in unused:
        hidden_MH = hidden_MH + 0 * value
    return BodyOutput(hidden_MH, tuple(torch.cat(layer) for layer in zip(*routers)))


def _routers(out: Any, settings: dict[str, Any]) -> tuple[Tensor, ...]:
    return out.router_logits if "output_router_logits" in settings else ()


def _documents(position_ids: Tensor, target_rows: Tensor) -> tuple[list[int], list[int]]:
    """First tokens, in the flattened batch, and lengths of the documents with target rows; of the first if none do."""
    is_first = position_ids.flatten() == 0
    document_of = is_first.cumsum(0) - 1
    starts = is_first.nonzero().squeeze(1)
    ends = torch.cat([starts[1:], starts.new_tensor([is_first.numel()])])
    used = document_of[target_rows].unique() if len(target_rows) else document_of[:1]
    return starts[used].tolist(), (ends - starts)[used].tolist()


def _length_classes(lengths: list[int], longest: int) -> Iterator[list[int]]:
    """LENGTH_CLASSES lists of places in `lengths`: what is above a half of `longest`, a quarter, ..., and the rest."""
    classes: list[list[int]] = [[] for _ in range(LENGTH_CLASSES)]
    for place, length in enumerate(lengths):
        classes[min((longest // length).bit_length() - 1, LENGTH_CLASSES - 1)].append(place)
    return iter(classes)
