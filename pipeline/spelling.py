"""What tokens are as text, one by one: those that make one character together are known as such."""

from collections.abc import Iterator, Sequence
from typing import Any

LONGEST_UNIT = 16
"""Tokens after which text that is no text is shown as it is."""
BROKEN = "\ufffd"
"""What a decoder makes of bytes that are no character."""


def units(tokenizer: Any, ids: Sequence[int]) -> Iterator[tuple[str, int]]:
    """The text of the tokens since the last `stop`, and this `stop`: one token, or those that make one character."""
    before, start, pending = 0, 0, ""
    for stop in range(1, len(ids) + 1):
        text = _behind(tokenizer, ids[before:start], ids[start:stop])
        if text.endswith(BROKEN) and stop - start < LONGEST_UNIT and stop < len(ids):
            pending = text
            continue
        if pending and text.startswith(pending):  # bytes that no later token has made a character of
            yield pending, stop - 1
            text = text.removeprefix(pending)
        yield text, stop
        before, start, pending = start, stop, ""


class Speller:
    """The text of single tokens; without a tokenizer, their ids."""

    def __init__(self, tokenizer: Any | None) -> None:
        self._tokenizer = tokenizer
        self._letter = [] if tokenizer is None else tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._known: dict[int, str] = {}

    def token(self, index: int) -> str:
        """What one token is inside a text; its id where it is no text by itself."""
        if index not in self._known:
            text = "" if self._tokenizer is None else _behind(self._tokenizer, self._letter, [index])
            self._known[index] = f"#{index}" if not text or BROKEN in text else text
        return self._known[index]

    def row(self, ids: Sequence[int]) -> list[str]:
        """The text of every token of a row; of those that make one character together the last one has it."""
        if self._tokenizer is None:
            return [self.token(int(index)) for index in ids]
        texts = [""] * len(ids)
        for text, stop in units(self._tokenizer, ids):
            texts[stop - 1] = text
        return texts


def _behind(tokenizer: Any, before: Sequence[int], ids: Sequence[int]) -> str:
    """What `ids` add to the text of the tokens before: many decoders drop a space at the beginning of a text."""
    known = _decoded(tokenizer, before) if len(before) else ""
    whole = _decoded(tokenizer, [*before, *ids])
    return whole.removeprefix(known) if whole.startswith(known) else _decoded(tokenizer, ids)


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
