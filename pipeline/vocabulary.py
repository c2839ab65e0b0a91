"""Whether two vocabularies agree on what a corpus uses of them.

A tokenizer may have more ids than its model's head (CodeLlama-34B, Gemma 3), and two of one family may differ in
trailing special tokens (Qwen2.5 and Qwen3). Neither matters to a corpus without those ids.
"""

from typing import Any

from pipeline.tokenizer import identify


def difference_in_use(own: Any, other: Any, largest_id: int) -> str:
    """What tells two tokenizers apart on ids up to `largest_id` and on how they split text; empty if nothing does."""
    identities = identify(own), identify(other)
    ours, theirs = ({index: token for token, index in each.get_vocab().items()} for each in (own, other))
    used = sorted(index for index in ours.keys() | theirs.keys() if index <= largest_id)
    for index in used:
        if ours.get(index) != theirs.get(index):
            return (
                f"{identities[0].difference(identities[1])}: id {index} is {ours.get(index)!r} and "
                f"{theirs.get(index)!r}"
            )
    same_split = identities[0].probe == identities[1].probe
    return "" if same_split else "vocabularies that agree on the ids in use and split the same text into other ids"


def extra_tokens(own: Any, other: Any, largest_id: int) -> str:
    """The tokens above `largest_id` in which two tokenizers differ, for a note."""
    pairs = [
        {(index, token) for token, index in each.get_vocab().items() if index > largest_id} for each in (own, other)
    ]
    tokens = [token for _, token in sorted(pairs[0] ^ pairs[1])]
    return ", ".join(map(repr, tokens[:3])) + (f" and {len(tokens) - 3} more" if len(tokens) > 3 else "")
