"""From records to token ids and loss masks, tokenised in batches by the tokenizer's own threads.

Plain text is a label everywhere; of a conversation or a prompt with its completion only what the
model is to write. Special tokens that a text spells out, such as <|endoftext|>, become those tokens.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import numpy as np

from pipeline.progress import Reporter
from stages.prepare.chat import ChatTemplate, Rendered
from stages.prepare.conversations import Conversation, Refused
from stages.prepare.forms import Completion, Undesirable, content_of, forms_in
from stages.prepare.near_duplicates import text_key
from stages.prepare.quality import Reading, broken_rule, rules_of
from stages.prepare.readers import BadLines, Record
from stages.prepare.settings import CUT, TRUNCATE, TextConfig
from stages.prepare.tokens import Document, Text, TextEncoder

BATCH_DOCUMENTS = 1024
BATCH_CHARACTERS = 1 << 19
LONGEST_SOURCE = 1000
"""Characters of a source's name."""
NEAR_DUPLICATE = "near-duplicate"
SHOWN_OF_REJECTED = 200
"""Characters."""
COUNTS = (
    "records",
    "empty_documents",
    "other_forms_ignored",
    "undesirable_completions",
    "messages_not_written",
    "thoughts_not_written",
    "tools_not_written",
    "inserted_thoughts",
    "truncated_chats",
    "truncated_messages",
    "truncated_completions",
)


class DocumentEncoder:
    """Turns records into documents, in order, and counts what it meets.

    `progress` is told what share of a long text is tokenised.
    """

    def __init__(
        self,
        config: TextConfig,
        tokenizer: Any,
        bad_lines: BadLines,
        reporter: Reporter,
        progress: Callable[[float], None] = lambda share: None,
        near_duplicates: Collection[bytes] = (),
    ) -> None:
        self._config = config
        self._rules, self._near_duplicates = rules_of(config.quality), near_duplicates
        self.rejected: list[dict[str, str]] = []
        """What quality or nearness to another text has dropped: where, the rule, and how it begins."""
        self._tokenizer = tokenizer
        self._bad_lines = bad_lines
        self._reporter = reporter
        self._counts: Counter[str] = Counter(dict.fromkeys(COUNTS, 0))
        self._texts = TextEncoder(tokenizer, config.tokenizer, progress)
        self._templates: dict[bool, ChatTemplate] = {}

    @property
    def counts(self) -> Counter[str]:
        """What was met, by name."""
        return Counter({**self._counts, **self._texts.counts})

    def encode(self, records: Iterable[Record]) -> Iterator[Document]:
        """The documents of all records that hold text; others are rejected or counted."""
        batch: list[Text] = []
        characters = 0
        for record in records:
            self._counts["records"] += 1
            text = self._text_of(record)
            if text is None:
                continue
            batch.append(text)
            characters += len(text.text)
            if len(batch) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
                yield from self._documents(batch)
                batch, characters = [], 0
        yield from self._documents(batch)

    def _documents(self, texts: list[Text]) -> Iterator[Document]:
        for text, document in zip(texts, self._texts.documents(texts), strict=True):
            if isinstance(document, Document) and len(document.token_ids) > self._config.sequence_length:
                document = self._shortened(text, document)
            if isinstance(document, Refused):
                self._bad_lines.reject(f"{text.where}: {document}")
            else:
                yield document

    def _text_of(self, record: Record) -> Text | None:
        try:
            text = self._read(record)
        except Refused as exc:
            self._bad_lines.reject(f"{record.where}: {exc}")
            return None
        except Undesirable:
            self._counts["undesirable_completions"] += 1
            return None
        if text is not None and not text.text:
            self._counts["empty_documents"] += 1
            return None
        return None if text is None or self._is_rejected(text) else text

    def _is_rejected(self, text: Text) -> bool:
        """Whether a plain text is dropped for its quality, or as nearly one before; counts it, and its kind."""
        if text.kind != "text" or not (self._rules or self._near_duplicates):
            return False
        reading = Reading(text.text)
        rule = broken_rule(reading, self._rules)
        if rule is None and text_key(text.text) in self._near_duplicates:
            rule = NEAR_DUPLICATE
        self._counts[f"{reading.kind}_texts"] += 1
        self._counts[f"{reading.kind}_characters"] += len(text.text)
        if rule is not None:
            self._counts[f"rejected_{rule.replace('-', '_')}"] += 1
            self.rejected.append({"where": str(text.where), "rule": rule, "begins": text.text[:SHOWN_OF_REJECTED]})
        return rule is not None

    def _source(self, record: Record) -> str:
        field = self._config.source_field
        if field is None:
            return record.source
        name = record.fields.get(field)
        if not isinstance(name, str) or not name or len(name) > LONGEST_SOURCE:
            raise Refused(
                f"field {field!r} names no source; expected up to {LONGEST_SOURCE} characters, found {name!r:.80}"
            )
        return name

    def _read(self, record: Record) -> Text | None:
        source = self._source(record)
        fields, text_field = record.fields, self._config.text_field
        content = content_of(fields, text_field, bool(self._tokenizer.chat_template))
        present = [name for name, value in fields.items() if value is not None]
        self._counts["other_forms_ignored"] += len(forms_in(present, text_field)) > 1
        if content is None:
            self._bad_lines.reject(
                f"{record.where}: no field {text_field!r}, `messages`, or `prompt` with `completion`; "
                f"it has: {', '.join(map(str, fields)) or 'no fields'}",
                "name the field that holds the text with --text-field",
            )
            return None
        if isinstance(content, str):
            return Text(content, where=record.where, source=source)
        if isinstance(content, Completion):
            whole = content.prompt + content.completion
            return Text(whole, [(len(content.prompt), len(whole))], "completion", where=record.where, source=source)
        if self._config.last_turn_only:
            content = content.last_turn_only()
        rendered = self._template(content, record.where).render(content)
        self._counts["inserted_thoughts"] += rendered.inserted_thoughts
        self._counts["messages_not_written"] += rendered.unwritten
        self._counts["thoughts_not_written"] += rendered.unwritten_thoughts
        return _chat(rendered, content, record.where, source)

    def _template(self, conversation: Conversation, where: object) -> ChatTemplate:
        has_tools = conversation.tools is not None
        if has_tools not in self._templates:
            template = ChatTemplate(self._tokenizer, self._config.tokenizer, where, with_tools=has_tools)
            self._templates[has_tools] = template
            if template.depends_on_date:
                self._reporter.note(
                    f"{self._config.tokenizer}: the chat template writes the date; another day the same input gives "
                    "other tokens."
                )
            if has_tools and not template.needs.writes_tools:
                self._reporter.note(f"{where}: holds `tools`, which the chat template does not write.")
        template = self._templates[has_tools]
        self._counts["tools_not_written"] += has_tools and not template.needs.writes_tools
        return template

    def _shortened(self, text: Text, document: Document) -> Document | Refused:
        """The document made to fit, if that is asked for and can be; else as it is."""
        if self._config.overlong != TRUNCATE or document.kind == "text":
            return document
        if text.conversation is None:
            return self._without_begin_of_prompt(document)
        try:
            return self._without_oldest(text.conversation, document, text)
        except Refused as exc:
            return exc

    def _without_oldest(self, conversation: Conversation, document: Document, text: Text) -> Document:
        """The longest rest of the conversation that fits; `document`, which is the whole, if none does."""
        fewest, most, dropped = 1, conversation.num_groups, 0
        counts = self._texts.counts.copy()
        while fewest < most:
            middle = (fewest + most) // 2
            rest = conversation.without(middle)
            rendered = self._template(rest, text.where).render(rest)
            (shorter,) = self._texts.documents([_chat(rendered, rest, text.where, text.source)])
            if isinstance(shorter, Refused):
                raise shorter
            if len(shorter.token_ids) <= self._config.sequence_length:
                most, document, dropped = middle, shorter, len(conversation.messages) - len(rest.messages)
            else:
                fewest = middle + 1
        self._texts.counts = counts  # what was tried does not count
        self._counts["truncated_chats"] += dropped > 0
        self._counts["truncated_messages"] += dropped
        return document

    def _without_begin_of_prompt(self, document: Document) -> Document:
        """What fits of the end of a prompt with its whole completion, if that does."""
        front = self._texts.num_front(document.token_ids)
        start = len(document.token_ids) - self._config.sequence_length + front
        if not document.loss_mask.any() or int(document.loss_mask.argmax()) <= start:
            return document
        self._counts["truncated_completions"] += 1
        kept = np.r_[:front, start : len(document.token_ids)]
        return Document(document.token_ids[kept], document.loss_mask[kept], document.kind, document.source)


def is_overlong(document: Document, config: TextConfig, counts: Counter[str]) -> bool:
    """Whether the document is to be dropped because it is not to be cut; counts it."""
    if document.kind == "text" or config.overlong == CUT or len(document.token_ids) <= config.sequence_length:
        return False
    counts[f"overlong_{document.kind}s_dropped"] += 1
    return True


def _chat(rendered: Rendered, conversation: Conversation, where: object, source: str) -> Text:
    return Text(rendered.text, rendered.labels, "chat", rendered.ends_with_label, conversation, where, source)
