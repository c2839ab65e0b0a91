"""A conversation as the tokenizer's chat template writes it, and which of its characters the assistant wrote."""

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from pipeline.errors import ConfigError

RENDER_S = 10.0
"""Seconds that a template may take for one conversation; milliseconds are usual."""
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
Spans = list[tuple[int, int]]


class ChatTemplate:
    """Renders conversations; finds the assistant's turns by the template's own marks, else by its prefixes.

    Works on text and characters: transformers' `assistant_masks` loses every turn after one that starts
    with a character that no token's offsets cover, such as a space.
    """

    def __init__(self, tokenizer: Any, folder: Path, where: str) -> None:
        try:
            self.template = tokenizer.get_chat_template()
        except ValueError as exc:
            raise ConfigError(
                f"{where}: holds `messages`, but the tokenizer in {folder} has no chat template; "
                "put the model's chat_template.jinja into that folder."
            ) from exc
        self._folder = folder
        self._special_tokens = tokenizer.special_tokens_map
        self._is_marked = MARKED.search(self.template) is not None

    @property
    def depends_on_date(self) -> bool:
        """Whether the rendered text may change from day to day."""
        return "strftime_now" in self.template

    def render(self, messages: list[dict[str, Any]], where: str) -> tuple[str, Spans]:
        """The text, and the half-open character ranges of the assistant's turns.

        Raises jinja2.TemplateError if the template refuses the conversation, and ConfigError if it takes
        it but does not tell the turns apart.
        """
        if self._is_marked:
            return self._render(messages, mark=True)
        text, _ = self._render(messages)
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        return text, [self._span(messages, index, text, where) for index in turns]

    def _span(self, messages: list[dict[str, Any]], turn: int, text: str, where: str) -> tuple[int, int]:
        try:
            before, _ = self._render(messages[:turn], add_generation_prompt=True)
            after, _ = self._render(messages[: turn + 1])
        except TemplateError as exc:
            raise self._unclear(where, turn, str(exc)) from exc
        if not (after.startswith(before) and text.startswith(after)):
            raise self._unclear(where, turn, "it writes earlier turns in another way once later ones follow")
        return len(before), len(after)

    def _unclear(self, where: str, turn: int, reason: str) -> ConfigError:
        return ConfigError(
            f"{where}: the chat template in {self._folder} does not show where assistant message {turn + 1} starts "
            f"and ends ({reason}); put {{% generation %}} and {{% endgeneration %}} around the assistant's text in it."
        )

    def _render(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = False, mark: bool = False
    ) -> tuple[str, Spans]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            with _time_limit(RENDER_S):
                texts, spans = render_jinja_template(
                    conversations=[messages],
                    chat_template=self.template,
                    add_generation_prompt=add_generation_prompt,
                    return_assistant_tokens_mask=mark,
                    **self._special_tokens,
                )
        except TimeoutError as exc:
            raise ConfigError(
                f"{self._folder}: its chat template was not done after {RENDER_S:g} s with one conversation; it loops."
            ) from exc
        except TemplateError:
            raise
        except Exception as exc:  # a template is somebody's program: it may divide by zero, or exceed the sandbox
            raise TemplateError(f"{type(exc).__name__}: {exc}") from exc
        return texts[0], spans[0] if mark else []


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
