"""A conversation as the tokenizer's chat template writes it, and which of its characters the assistant wrote.

A turn's label is what the template writes between the prompt that asks for it and its end. It is the same whatever
follows, or the conversation is refused: many templates drop the thinking of a turn once another one comes.
"""

import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from pipeline.errors import ConfigError
from stages.prepare.conversations import Conversation, Refused
from stages.prepare.needs import MARK, Needs
from stages.prepare.thoughts import behind_thought, opened_thought, without_empty_thought

RENDER_S = 10.0
"""Seconds that a template may take for one conversation; milliseconds are usual."""
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
HEADER = 6
"""Characters before a turn that are the template's own in any style."""
REWRITTEN = (
    "the chat template writes assistant message {} in another way once later ones follow; "
    "train the last turn alone with --last-turn-only, or split the conversation"
)
Spans = list[tuple[int, int]]
Messages = Sequence[dict[str, Any]]


class Fault(Refused):
    """The template failed, instead of refusing the messages by its own raise_exception."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text."""

    text: str
    labels: Spans
    """Half-open character ranges that carry loss: of the trained turns, in order."""
    inserted_thoughts: int
    """Empty blocks of thinking that only the template wrote; they are no labels."""
    unwritten: int
    """Messages whose content the template left out."""
    unwritten_thoughts: int
    ends_with_label: bool
    """Whether the last message is a trained one."""


class ChatTemplate:
    """Renders conversations; finds the assistant's turns by the template's own marks, else by its prefixes.

    Works on text and characters: transformers' `assistant_masks` loses every turn after one that starts
    with a character that no token's offsets cover, such as a space. Raises ConfigError if there is no
    template, or if it fails with whatever conversation.
    """

    def __init__(self, tokenizer: Any, folder: Path, where: object, *, with_tools: bool = False) -> None:
        try:
            self.template = tokenizer.get_chat_template(tools=[] if with_tools else None)
        except ValueError as exc:
            raise ConfigError(
                f"{where}: holds `messages`, but the tokenizer in {folder} has no chat template; "
                "put the model's chat_template.jinja into that folder."
            ) from exc
        self._folder = folder
        self._special_tokens = tokenizer.special_tokens_map
        self._specials = tuple(filter(None, special_texts(tokenizer)))
        self._is_marked = MARKED.search(self.template) is not None
        self._asks = "add_generation_prompt" in self.template
        self.needs = Needs(self.template, self._takes_parts())

    @property
    def depends_on_date(self) -> bool:
        """Whether the rendered text may change from day to day."""
        return "strftime_now" in self.template

    def render(self, conversation: Conversation) -> Rendered:
        """The text and its labels; raises Refused."""
        messages, tools = self.needs.fit(conversation), conversation.tools
        text, marks = self._render(messages, tools, mark=self._is_marked)
        unwritten = self.needs.unwritten(conversation, text)
        if self._is_marked:
            spans = self._marked_spans(conversation, messages, text, marks)
        else:
            turns = [turn for turn in conversation.turns if conversation.trained[turn]]
            spans = [self._span(messages, turn, text, tools) for turn in turns]
            for turn, (one, other) in zip(turns, pairwise(spans)):
                if one[1] > other[0]:
                    raise Refused(REWRITTEN.format(turn + 1))
        return Rendered(
            text,
            [(first, stop) for first, stop, _ in spans],
            sum(inserted for _, _, inserted in spans),
            *unwritten,
            conversation.trained[-1],
        )

    def _span(self, messages: Messages, turn: int, text: str, tools: Any) -> tuple[int, int, bool]:
        """Where the label of assistant message `turn` stands in `text`, and whether an inserted thought precedes it."""
        last = turn + 1 == len(messages)
        after = text if last else self._render(messages[: turn + 1], tools)[0]
        start = self._start(messages, turn, after, tools)
        head = opened_thought(after, start)
        first = behind_thought(after, head, start, messages[turn])
        label = after[first : len(after) - self._second_end(messages[: turn + 1], after, first, tools)]
        if text.startswith(after[: first + len(label)]):
            return first, first + len(label), first > start
        if not text.startswith(label, head) or not text.startswith(after[:head]):
            head = _only_place(text, label, after[:head], messages, turn)
        return head, head + len(label), False

    def _start(self, messages: Messages, turn: int, after: str, tools: Any) -> int:
        """Where the prompt for a turn ends in `after`, the rendering up to that turn."""
        if turn == 0 and (place := self._content_place(messages, turn, after, tools)) is not None:
            return place  # some templates ask for no answer to nothing
        try:
            before = self._render(messages[:turn], tools, add_generation_prompt=True)[0]
        except Refused:
            before = None
        if before is not None and after.startswith(before) and self._asks:
            return len(before)
        place = self._content_place(messages, turn, after, tools)
        if before is not None and after.startswith(before):
            header = after[len(before) : place]
            return len(before) if place is None or not header.strip() else place
        if place is None:
            raise Refused(
                f"the chat template does not show where assistant message {turn + 1} starts; put {{% generation %}} "
                "and {% endgeneration %} around the assistant's text in it"
            )
        return place

    def _content_place(self, messages: Messages, turn: int, after: str, tools: Any) -> int | None:
        """Where a mark in the place of the turn's text, or a thought before it, would stand; None if it is unclear."""
        bare: dict[str, Any] = {"role": "assistant", "content": MARK}
        if isinstance(messages[turn]["content"], list):
            bare["content"] = [{"type": "text", "text": MARK}]
        try:
            marked, _ = self._render([*messages[:turn], bare], tools)
        except Refused:
            return None
        header = without_empty_thought(marked.partition(MARK)[0])
        return len(header) if marked.count(MARK) == 1 and after.startswith(header) else None

    def _second_end(self, messages: Messages, after: str, first: int, tools: Any) -> int:
        """Characters of an end of text that a template writes behind the end of a last turn, as Phi's do.

        It is no part of the turn: it is gone as soon as another message is asked for.
        """
        end = self._special_tokens.get("eos_token")
        if not end or not after.endswith(end) or not after[first : -len(end)].rstrip().endswith(self._specials):
            return 0
        try:
            asked, _ = self._render(messages, tools, add_generation_prompt=True)
        except Refused:
            return 0
        return 0 if asked.startswith(after) or not asked.startswith(after[: -len(end)]) else len(end)

    def _marked_spans(
        self, conversation: Conversation, messages: Messages, text: str, marks: Spans
    ) -> list[tuple[int, int, bool]]:
        """The template's marks of trained turns, as `_span` gives them; raises Refused if later turns change one."""
        found, used = [], 0
        turns = conversation.turns
        for turn in turns:
            own = marks[used:] if turn == turns[-1] else marks[used : used + 1]
            if turn != turns[-1] and (conversation.trained[turn] or len(marks) != len(turns)):
                part, upto = self._render(messages[: turn + 1], conversation.tools, mark=True)
                own = marks[used : len(upto)]
                labels = [_marked_label(text, span, messages[turn])[0] for span in own]
                if labels != [_marked_label(part, span, messages[turn])[0] for span in upto[used:]]:
                    raise Refused(REWRITTEN.format(turn + 1))
            used += len(own)
            if conversation.trained[turn]:
                found += [
                    (first, stop, first > span[0])
                    for span in own
                    for first, stop in [_marked_label(text, span, messages[turn])[1]]
                ]
        return found

    def _takes_parts(self) -> bool:
        """Whether the template reads lists of parts alone; raises ConfigError if it fails with any conversation."""
        faults: list[str] = []
        for part in (MARK, [{"type": "text", "text": MARK}]):
            probe = [{"role": "user", "content": part}]
            for probes in (probe, [{"role": "system", "content": part}, *probe]):
                try:
                    text, _ = self._render(probes, None)
                except Fault as exc:
                    faults.append(str(exc))
                except Refused:
                    pass
                else:
                    if MARK in text:
                        self._require_answers(probe)
                        return isinstance(part, list)
        if len(faults) == 4:
            raise ConfigError(
                f"{self._folder}: its chat template fails with whatever messages ({faults[0]}); mend the template."
            )
        return False

    def _require_answers(self, probe: Messages) -> None:
        try:
            self._render([*probe, {**probe[0], "role": "assistant"}], None)
        except Fault as exc:
            raise ConfigError(
                f"{self._folder}: its chat template fails at an answer ({exc}); mend the template."
            ) from exc
        except Refused:
            pass

    def _render(
        self, messages: Messages, tools: Any, *, add_generation_prompt: bool = False, mark: bool = False
    ) -> tuple[str, Spans]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            with _time_limit(RENDER_S):
                texts, spans = render_jinja_template(
                    conversations=[list(messages)],
                    tools=tools,
                    chat_template=self.template,
                    add_generation_prompt=add_generation_prompt,
                    return_assistant_tokens_mask=mark,
                    **self._special_tokens,
                )
        except TimeoutError as exc:
            raise ConfigError(
                f"{self._folder}: its chat template was not done after {RENDER_S:g} s with one conversation; it loops."
            ) from exc
        except Exception as exc:  # a template is somebody's program: it may divide by zero, or exceed the sandbox
            reason = " ".join(str(exc).split())
            if type(exc) is TemplateError:
                raise Refused(f"the chat template refuses these messages: {reason}") from exc
            raise Fault(f"the chat template cannot write these messages: {type(exc).__name__}: {reason}") from exc
        return texts[0], spans[0] if mark else []


def special_texts(tokenizer: Any) -> list[str]:
    """The texts of a tokenizer's special tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return sorted({*tokenizer.all_special_tokens, *(token.content for token in added.values() if token.special)})


def _marked_label(text: str, span: tuple[int, int], message: dict[str, Any]) -> tuple[str, tuple[int, int]]:
    """What is marked, less an inserted thought, and where it stands."""
    first = min(behind_thought(text, span[0], span[0], message), span[1])
    return text[first : span[1]], (first, span[1])


def _only_place(text: str, label: str, before: str, messages: Messages, turn: int) -> int:
    """Where the label of a turn stands in a text whose beginning is another, if nothing else can be meant.

    Raises Refused.
    """
    alike = [index for index, message in enumerate(messages) if message == messages[turn]]
    places = [found.start() for found in re.finditer(re.escape(label), text)]
    if label.strip() and len(places) == len(alike):
        place = places[alike.index(turn)]
        if text[:place].endswith(before[-HEADER:]):
            return place
    raise Refused(REWRITTEN.format(turn + 1))


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in what runs longer; of this process's main thread alone, which a signal reaches."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again, if the first was swallowed
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
