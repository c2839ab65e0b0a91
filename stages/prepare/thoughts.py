"""Blocks of thinking that a chat template writes around an answer, such as <think></think>."""

import re
from typing import Any

from stages.prepare.conversations import REASONING

_EMPTY = (
    r"(?:<(\|?[\w:]{0,40}(?:think|thought|reason)[\w:]{0,40}\|?)>\s*</\1>|\[(\w{0,40}THINK\w{0,40})\]\s*\[/\2\]"
    r"|<\|channel>thought\s*<channel\|>)\n*"
)
EMPTY_THOUGHT = re.compile(r"\s*" + _EMPTY, re.IGNORECASE)
LAST_EMPTY_THOUGHT = re.compile(_EMPTY + r"\Z", re.IGNORECASE)
OPEN_THOUGHT = re.compile(
    r"(?:<\|?[\w:]{0,40}(?:think|thought|reason)[\w:]{0,40}\|?>|\[\w{0,40}THINK\w{0,40}\])\s*\Z", re.IGNORECASE
)
LONGEST_TAG = 128
"""Characters of a prompt's end that are searched for a block."""


def opened_thought(text: str, stop: int) -> int:
    """Where a block begins that the prompt before `stop` opens and leaves open; `stop` if there is none."""
    opening = OPEN_THOUGHT.search(text, max(stop - LONGEST_TAG, 0), stop)
    return opening.start() if opening else stop


def without_empty_thought(prompt: str) -> str:
    """The prompt less an empty block at its end."""
    thought = LAST_EMPTY_THOUGHT.search(prompt, max(len(prompt) - 2 * LONGEST_TAG, 0))
    return prompt[: thought.start()] if thought else prompt


def behind_thought(text: str, head: int, start: int, message: dict[str, Any]) -> int:
    """Where the turn at `start` begins behind an empty block of thinking that the message itself does not have.

    The block begins at `head`, which lies before `start` if the prompt opens it.
    """
    found = EMPTY_THOUGHT.match(text, head)
    if found is None or found.end() < start or any(str(message.get(name, "")).strip() for name in REASONING):
        return start
    content = message["content"]
    own = "".join(part["text"] for part in content) if isinstance(content, list) else content or ""
    return start if EMPTY_THOUGHT.match(own) else found.end()
