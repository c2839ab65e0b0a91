"""From records to token ids and loss masks, tokenised in batches by the tokenizer's own threads.

Plain text is a label everywhere; of a conversation or a prompt with its completion only what the
model is to write. Special tokens that a text spells out, such as <|endoftext|>, become those tokens.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from jinja2 import TemplateError

from pipeline.errors import ConfigError
from pipeline.progress import Reporter
from stages.prepare.chat import ChatTemplate, Spans
from stages.prepare.readers import BadLines, Record

BATCH_DOCUMENTS = 1024
BATCH_CHARACTERS = 2 << 20
CHAT_END_TOKENS = 3
"""A chat template may write white space after the token that ends the last turn."""


@dataclass(frozen=True, slots=True)
class Document:
    """The tokens of one record, or a piece of them."""

    token_ids: np.ndarray
    """int32 [S]"""
    loss_mask: np.ndarray
    """bool [S], True where the token is a label."""

    @property
    def key(self) -> bytes:
        """16 bytes that are equal for equal documents."""
        digest = xxhash.xxh3_128(self.token_ids.tobytes())
        digest.update(self.loss_mask.tobytes())
        return digest.digest()


@dataclass(frozen=True, slots=True)
class _Text:
    """A record as text that is ready to be tokenised."""

    text: str
    labels: Spans | None
    """Character ranges that are labels; None for all."""
    is_chat: bool
    end_is_label: bool
    """Whether an end-of-sequence token after the text is a label."""


class DocumentEncoder:
    """Turns records into documents, in order; counts what it meets in `records` and `empty_documents`."""

    def __init__(self, tokenizer: Any, folder: Path, text_field: str, bad_lines: BadLines, reporter: Reporter) -> None:
        self.records = 0
        self.empty_documents = 0
        self._tokenizer = tokenizer
        self._folder = folder
        self._text_field = text_field
        self._bad_lines = bad_lines
        self._reporter = reporter
        self._end = tokenizer.eos_token_id
        self._chat: ChatTemplate | None = None

    def encode(self, records: Iterable[Record]) -> Iterator[Document]:
        """The documents of all records that hold text; others are rejected or counted."""
        batch: list[_Text] = []
        characters = 0
        for record in records:
            self.records += 1
            text = self._text_of(record)
            if text is None:
                continue
            batch.append(text)
            characters += len(text.text)
            if len(batch) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
                yield from self._tokenize(batch)
                batch, characters = [], 0
        yield from self._tokenize(batch)

    def _text_of(self, record: Record) -> _Text | None:
        fields = record.fields
        if self._text_field in fields:
            text = self._string(record, self._text_field)
            prepared = None if text is None else _Text(text, None, False, True)
        elif "messages" in fields:
            prepared = self._conversation(record)
        elif "prompt" in fields and "completion" in fields:
            prompt, completion = self._string(record, "prompt"), self._string(record, "completion")
            text = None if prompt is None or completion is None else prompt + completion
            prepared = None if text is None else _Text(text, [(len(prompt), len(text))], False, True)
        else:
            self._bad_lines.reject(
                f"{record.where}: no field {self._text_field!r}, `messages`, or `prompt` with `completion`; "
                f"it has: {', '.join(map(str, fields)) or 'no fields'}",
                "name the field that holds the text with --text-field",
            )
            return None
        if prepared is not None and not prepared.text:
            self.empty_documents += 1
            return None
        return prepared

    def _string(self, record: Record, name: str) -> str | None:
        return self._checked(f"{record.where}: field {name!r}", record.fields[name])

    def _checked(self, where: str, value: Any) -> str | None:
        if not isinstance(value, str):
            self._bad_lines.reject(f"{where} holds {_kind(value)}; expected a string")
            return None
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as exc:
            self._bad_lines.reject(f"{where} holds half of a surrogate pair at character {exc.start}; expected text")
            return None
        return value

    def _conversation(self, record: Record) -> _Text | None:
        messages = self._messages(record)
        if messages is None:
            return None
        if self._chat is None:
            self._chat = ChatTemplate(self._tokenizer, self._folder, record.where)
            if self._chat.depends_on_date:
                self._reporter.log(
                    f"{self._folder}: the chat template writes the date; another day the same input gives other tokens."
                )
        try:
            text, labels = self._chat.render(messages, record.where)
        except TemplateError as exc:
            self._bad_lines.reject(f"{record.where}: the chat template refuses these messages: {exc}")
            return None
        return _Text(text, labels, True, messages[-1]["role"] == "assistant")

    def _messages(self, record: Record) -> list[dict[str, Any]] | None:
        messages = record.fields["messages"]
        if not isinstance(messages, list) or not messages or not all(isinstance(item, dict) for item in messages):
            self._bad_lines.reject(
                f"{record.where}: field 'messages' holds {_kind(messages)}; "
                "expected a list of objects with `role` and `content`"
            )
            return None
        for number, message in enumerate(messages, start=1):
            for name in ("role", "content"):
                if self._checked(f"{record.where}: `{name}` of message {number}", message.get(name)) is None:
                    return None
        return [{name: value for name, value in message.items() if value is not None} for message in messages]

    def _tokenize(self, texts: list[_Text]) -> Iterator[Document]:
        documents: dict[int, Document] = {}
        kinds = {(text.labels is None, text.is_chat) for text in texts}
        for everything, is_chat in sorted(kinds):
            chosen = [i for i, text in enumerate(texts) if (text.labels is None, text.is_chat) == (everything, is_chat)]
            if not everything and not self._tokenizer.is_fast:
                raise ConfigError(
                    f"{self._folder}: this tokenizer does not tell which characters a token covers, as masks of "
                    "completions and chats need; convert it to a tokenizer.json."
                )
            encoded = self._tokenizer(
                [texts[index].text for index in chosen],
                add_special_tokens=not is_chat,  # a chat template writes its own
                return_offsets_mapping=not everything,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,  # a document may be longer than the model's context: it is cut later
            )
            offsets = encoded.get("offset_mapping") or [None] * len(chosen)
            for index, ids, places in zip(chosen, encoded["input_ids"], offsets, strict=True):
                documents[index] = self._document(texts[index], ids, places)
        return (documents[index] for index in range(len(texts)))

    def _document(self, text: _Text, ids: list[int], offsets: list[tuple[int, int]] | None) -> Document:
        has_end = self._end is None or self._end in ids[-CHAT_END_TOKENS if text.is_chat else -1 :]
        token_ids = np.array(ids if has_end else [*ids, self._end], np.int32)
        if text.labels is None:
            return Document(token_ids, np.ones(len(token_ids), np.bool_))
        loss_mask = np.zeros(len(token_ids), np.bool_)
        starts = np.array(offsets, np.int64).reshape(-1, 2)[:, 0]
        for first, stop in text.labels:
            loss_mask[: len(starts)] |= (starts >= first) & (starts < stop)
        if not text.is_chat or not has_end:
            loss_mask[-1] |= text.end_is_label and token_ids[-1] == self._end
        return Document(token_ids, loss_mask)


def _kind(value: Any) -> str:
    return "null" if value is None else f"a value of type {type(value).__name__}"
