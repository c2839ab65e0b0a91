"""From text with its labels to token ids and loss masks.

A token carries loss if it *ends* inside a label. One that begins in the prompt, such as " Yes" in "Answer: Yes" with
the prompt "Answer: ", is thus the completion's; one that would end behind a label is not made: the text is then
tokenised up to the label's end and from there on, so that what follows a turn changes no label of it.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from tokenizers.models import BPE

from pipeline.errors import ConfigError
from stages.prepare.chat import Spans, special_texts
from stages.prepare.conversations import Conversation, Refused

LONG_TEXT = 1 << 18
"""Characters that are tokenised at a time of a text that is longer."""
OVERLAP = 2048
"""Characters over which two parts of a long text must agree."""
END_TOKENS = 3
"""A chat template may write white space after the token that ends the last turn."""
NO_TURN_ENDS = ("bos_token", "mask_token", "cls_token")
NO_TEXT_ENDS = ("unk_token", "pad_token")
"""Special tokens that end nothing. A chat template's end of turn may be named the tokenizer's padding."""
ENDED_BY = "ended_by_"
COUNTS = (
    "spanning_tokens",
    "split_borders",
    "doubled_starts",
    "doubled_ends",
    "appended_chat_ends",
    "documents_without_end",
)


@dataclass(frozen=True, slots=True)
class Document:
    """The tokens of one record, or a piece of them."""

    token_ids: np.ndarray
    """int32 [S]"""
    loss_mask: np.ndarray
    """bool [S], True where the token is a label."""
    kind: str = "text"
    """'text', 'completion' or 'chat'."""
    source: str = ""
    """Name of what it came from."""

    @property
    def key(self) -> bytes:
        """16 bytes that are equal for equal documents."""
        digest = xxhash.xxh3_128(self.token_ids.tobytes())
        digest.update(self.loss_mask.tobytes())
        return digest.digest()


@dataclass(frozen=True, slots=True)
class Text:
    """A record as text that is ready to be tokenised."""

    text: str
    labels: Spans | None = None
    """Character ranges that are labels; None for all."""
    kind: str = "text"
    end_is_label: bool = True
    """Whether an end-of-sequence token after the text is a label."""
    conversation: Conversation | None = None
    """What the text is the rendering of."""
    where: object = ""
    """File, and line or row, as a string."""
    source: str = ""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids and, for each, the half-open range of characters that it covers."""

    token_ids: np.ndarray
    """int32 [S]"""
    places: np.ndarray
    """int32 [S, 2]; (0, 0) for tokens that the tokenizer added. [0, 2] if nobody asked."""


class TextEncoder:
    """Tokenises texts; `counts` has what it met at borders and ends, and `ended_by_X` for each token X that is a
    document's last label and ends it."""

    def __init__(self, tokenizer: Any, folder: Path, progress: Callable[[float], None] = lambda share: None) -> None:
        self.counts: Counter[str] = Counter(dict.fromkeys(COUNTS, 0))
        self._tokenizer = tokenizer
        self._folder = folder
        self._end = tokenizer.eos_token_id
        self._front, self._back = _added(tokenizer)
        self._progress = progress
        self._blank: dict[int, bool] = {}
        self._is_local = tokenizer.is_fast and isinstance(tokenizer.backend_tokenizer.model, BPE)
        self._is_local &= self._encode_whole(["a"], True, False)[0].token_ids.tolist() == [
            *self._front,
            *self._encode_whole(["a"], False, False)[0].token_ids.tolist(),
            *self._back,
        ]
        """Whether tokens depend on the text near them alone, as merges do; unigram's best way through it does not."""
        turn_ends = set(special_texts(tokenizer)) - {getattr(tokenizer, name, None) for name in NO_TURN_ENDS}
        text_ends = turn_ends - {getattr(tokenizer, name, None) for name in NO_TEXT_ENDS}
        own = {self._end} - {None}
        self._turn_ends = set(tokenizer.convert_tokens_to_ids(sorted(turn_ends))) | own
        self._text_ends = set(tokenizer.convert_tokens_to_ids(sorted(text_ends))) | own

    def num_front(self, ids: np.ndarray) -> int:
        """How many tokens at the beginning of a document are those that the tokenizer puts there."""
        return len(self._front) if self._front and ids[: len(self._front)].tolist() == self._front else 0

    def documents(self, texts: list[Text]) -> list[Document | Refused]:
        """The document of every text, or why it has none."""
        found: dict[int, Document | Refused] = {}
        for everything, is_chat in sorted({(text.labels is None, text.kind == "chat") for text in texts}):
            chosen = [
                i for i, text in enumerate(texts) if (text.labels is None, text.kind == "chat") == (everything, is_chat)
            ]
            if not everything and not self._tokenizer.is_fast:
                raise ConfigError(
                    f"{self._folder}: this tokenizer does not tell which characters a token covers, as masks of "
                    "completions and chats need; convert it to a tokenizer.json."
                )
            encoded = self._encode([texts[index].text for index in chosen], special=not is_chat, places=not everything)
            for index, each in zip(chosen, encoded, strict=True):
                try:
                    found[index] = self._document(texts[index], each)
                except Refused as exc:
                    found[index] = exc
        return [found[index] for index in range(len(texts))]

    def _encode(self, texts: list[str], *, special: bool, places: bool) -> list[Encoded]:
        short = [index for index, text in enumerate(texts) if len(text) <= LONG_TEXT or not self._is_local]
        found = dict(zip(short, self._encode_whole([texts[index] for index in short], special, places), strict=True))
        for index, text in enumerate(texts):
            if index not in found:
                found[index] = self._encode_in_parts(text, special, places)
        return [found[index] for index in range(len(texts))]

    def _encode_whole(self, texts: list[str], special: bool, places: bool) -> list[Encoded]:
        if not texts:
            return []
        encoded = self._tokenizer(
            texts,
            add_special_tokens=special,  # a chat template writes its own
            return_offsets_mapping=places,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # a document may be longer than the model's context: it is cut later
        )
        offsets = encoded.get("offset_mapping") or [[]] * len(texts)
        return [
            Encoded(np.array(ids, np.int32), np.array(each, np.int32).reshape(-1, 2))
            for ids, each in zip(encoded["input_ids"], offsets, strict=True)
        ]

    def _encode_in_parts(self, text: str, special: bool, places: bool) -> Encoded:
        """What `_encode_whole` makes of a long text, in bounded memory: it takes 230 bytes a character.

        Parts overlap, and each continues the one before where both have the same tokens for a long while. Where they
        do not, the text is tokenised as a whole.
        """
        parts = [_bare(self._front if special else [])]
        begin, before = 0, None
        while begin < len(text):
            (part,) = self._encode_whole([text[begin : begin + LONG_TEXT]], special=False, places=True)
            part = Encoded(part.token_ids, part.places + np.int32(begin))
            start = 0 if before is None else _continuation(before, part)
            is_last = begin + LONG_TEXT >= len(text)
            stop, begin = (len(part.token_ids), len(text)) if is_last else _cut(part)
            if start is None or stop is None or (stop <= start and not is_last):
                return self._encode_whole([text], special, places)[0]
            parts.append(Encoded(part.token_ids[start:stop], part.places[start:stop]))
            before = Encoded(part.token_ids[stop:], part.places[stop:])
            self._progress(begin / len(text))
        parts.append(_bare(self._back if special else []))
        token_ids = np.concatenate([part.token_ids for part in parts])
        all_places = np.concatenate([part.places for part in parts])
        return Encoded(token_ids, all_places if places else all_places[:0])

    def _document(self, text: Text, encoded: Encoded) -> Document:
        if text.labels:
            encoded = self._split_at_ends(text, encoded)
        encoded = self._without_doubles(encoded) if text.kind != "chat" else encoded
        ids = encoded.token_ids
        loss_mask = np.ones(len(ids), np.bool_) if text.labels is None else self._mask(text.labels, encoded)
        place = self._end_place(ids, len(ids) - 1, self._turn_ends if text.kind == "chat" else self._text_ends)
        if place is None and self._end is not None:
            ids, loss_mask = np.append(ids, np.int32(self._end)), np.append(loss_mask, text.end_is_label)
            self.counts["appended_chat_ends"] += text.kind == "chat"
        elif place is not None and text.labels is not None and encoded.places[place, 1] == 0:
            loss_mask[place] = text.end_is_label  # the tokenizer's own
        self._count_end(ids, loss_mask)
        return Document(ids, loss_mask, text.kind, text.source)

    def _mask(self, labels: Spans, encoded: Encoded) -> np.ndarray:
        loss_mask = np.zeros(len(encoded.token_ids), np.bool_)
        starts, ends = encoded.places[:, 0], encoded.places[:, 1]
        for first, stop in labels:
            loss_mask |= (ends > first) & (ends <= stop)
            self.counts["spanning_tokens"] += int(((starts < first) & (ends > first)).sum())
        return loss_mask

    def _split_at_ends(self, text: Text, encoded: Encoded) -> Encoded:
        """The text tokenised in parts where a token would begin inside a label and end behind it."""
        starts, ends = encoded.places.T
        stops = [stop for _, stop in text.labels or () if ((starts < stop) & (ends > stop)).any()]
        if not stops:
            return encoded
        borders = [0, *stops, len(text.text)]
        pieces = self._encode([text.text[start:stop] for start, stop in pairwise(borders)], special=False, places=True)
        token_ids = np.concatenate([piece.token_ids for piece in pieces])
        if self._decoded(token_ids) != self._decoded(encoded.token_ids):
            raise Refused(
                "the end of an assistant message and what the chat template writes behind it are one token, and this "
                "tokenizer does not take them apart; let the template end a turn with a token of its own"
            )
        self.counts["split_borders"] += len(stops)
        places = [piece.places + start for piece, start in zip(pieces, borders)]
        return Encoded(token_ids, np.concatenate(places))

    def _without_doubles(self, encoded: Encoded) -> Encoded:
        """Without the tokens that the tokenizer added at an end where the text has them already."""
        ids, places = encoded.token_ids.tolist(), encoded.places
        front, back = self._front, self._back
        start, stop = 0, len(ids)
        if front and ids[: 2 * len(front)] == front * 2:
            start = len(front)
            self.counts["doubled_starts"] += 1
        if back and len(ids) - start > len(back) and ids[-2 * len(back) :] == back * 2:
            stop -= len(back)
            self.counts["doubled_ends"] += 1
        if (start, stop) == (0, len(ids)):
            return encoded
        return Encoded(encoded.token_ids[start:stop], places[start:stop])

    def _end_place(self, ids: np.ndarray, last: int, ends: set[int]) -> int | None:
        """The index of an end token behind which there is white space at most, up to token `last`."""
        for place in range(last, max(last - END_TOKENS, -1), -1):
            if int(ids[place]) in ends:
                return place
            if not self._is_blank(int(ids[place])):
                return None
        return None

    def _count_end(self, ids: np.ndarray, loss_mask: np.ndarray) -> None:
        if not loss_mask.any():
            return
        place = self._end_place(ids, int(np.flatnonzero(loss_mask)[-1]), self._turn_ends)
        token = None if place is None else self._tokenizer.convert_ids_to_tokens(int(ids[place]))
        self.counts["documents_without_end" if token is None else f"{ENDED_BY}{token}"] += 1

    def _is_blank(self, token_id: int) -> bool:
        if token_id not in self._blank:
            self._blank[token_id] = not self._decoded(np.array([token_id])).strip()
        return self._blank[token_id]

    def _decoded(self, ids: np.ndarray) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _bare(ids: list[int]) -> Encoded:
    """Tokens that the tokenizer adds."""
    return Encoded(np.array(ids, np.int32), np.zeros((len(ids), 2), np.int32))


def _cut(part: Encoded) -> tuple[int | None, int]:
    """The token before which a part is cut, and the character at which the next part begins, well before it."""
    starts, ends = part.places.T
    fresh = np.flatnonzero((starts[1:] >= ends[:-1]) & (starts[1:] > starts[:-1])) + 1
    last = int(ends[-1]) if len(ends) else 0
    cuts = fresh[starts[fresh] >= last - 3 * OVERLAP]
    begins = fresh[starts[fresh] >= last - 4 * OVERLAP]
    if not len(cuts) or starts[cuts[0]] > last - 2 * OVERLAP:
        return None, 0
    return int(cuts[0]), int(starts[begins[0]])


def _continuation(before: Encoded, part: Encoded) -> int | None:
    """The token of `part` that is the first of `before`, if both have the same tokens for OVERLAP characters."""
    first = int(before.places[0, 0])
    start = int(np.searchsorted(part.places[:, 0], first))
    count = int(np.searchsorted(before.places[:, 0], first + OVERLAP))
    same = [
        np.array_equal(one[:count], two[start : start + count])
        for one, two in ((before.token_ids, part.token_ids), (before.places, part.places))
    ]
    return start if count and all(same) else None


def spoken(name: str) -> str:
    """The name of a count as a person reads it."""
    word, _, token = name.partition(ENDED_BY)
    return f"ended by {token}" if not word else name.replace("_", " ")


def _added(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer puts before and behind every text."""
    whole = tokenizer("a", verbose=False)["input_ids"]
    bare = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []
