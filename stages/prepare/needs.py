"""What a chat template wants of messages, read off its source and off what it makes of a probe."""

import json
import re
from collections.abc import Callable
from typing import Any

from stages.prepare.conversations import KNOWN_ROLES, REASONING, Conversation, Refused

NAMELESS = re.compile(r"content['\"\]\)]*\s*(?:is\s+none|==\s*none)", re.IGNORECASE)
"""A template that tells tool calls by content that is none."""
OBJECT_ARGUMENTS = re.compile(r"arguments['\"\]\)]*\s*(?:\|\s*(?:tojson|items)|\.items\(\))")
STRING_TEST = re.compile(r"arguments['\"\]\)]*\s+is\s+(?:string|mapping)")
MARK = "\ue000content\ue001"
"""A content that no template and no text holds; private-use characters."""


class Needs:
    """Fits messages to a template; raises Refused where it would leave out a part of one."""

    def __init__(self, source: str, parts: bool) -> None:
        self._source = source
        self._parts = parts
        self._none_content = NAMELESS.search(source) is not None
        takes_objects = OBJECT_ARGUMENTS.search(source) is not None or "arguments" not in source
        self._arguments: Callable[[Any], Any] = (
            (lambda value: value) if STRING_TEST.search(source) else _as_object if takes_objects else _as_string
        )

    @property
    def writes_tools(self) -> bool:
        """Whether the template looks at the functions that a conversation offers."""
        return re.search(r"\btools\b", self._source) is not None

    def fit(self, conversation: Conversation) -> list[dict[str, Any]]:
        """The messages as the template takes them."""
        return [self.message(message, number) for number, message in enumerate(conversation.messages, start=1)]

    def message(self, message: dict[str, Any], number: int = 1) -> dict[str, Any]:
        """One message as the template takes it."""
        fitted = dict(message)
        if calls := message.get("tool_calls"):
            if "tool_calls" not in self._source:
                raise Refused(f"the chat template does not write the `tool_calls` of message {number}")
            fitted["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": self._arguments(call["function"]["arguments"])}}
                for call in calls
            ]
        for name in REASONING:
            if name in fitted:
                fitted[self._reasoning(name, number)] = fitted.pop(name)
        if message["role"] == "developer" and not self._knows("developer"):
            fitted["role"] = "system"
        if message["content"] is None:
            fitted["content"] = None if self._none_content else ""
        elif self._parts:
            fitted["content"] = [{"type": "text", "text": message["content"]}]
        return fitted

    def unwritten(self, conversation: Conversation, text: str) -> tuple[int, int]:
        """How many messages' content, and how many thoughts, are not in the text that the template made of them.

        Raises Refused if such a message has a foreign role.
        """
        messages = thoughts = 0
        for number, message in enumerate(conversation.messages, start=1):
            thought, _, content = (message["content"] or "").rpartition("</think>")
            thought = thought or next((message[name] for name in REASONING if name in message), "")
            thoughts += not _is_in(text, thought.removeprefix("<think>"))
            if _is_in(text, content):
                continue
            if message["role"] not in KNOWN_ROLES:
                raise Refused(
                    f"message {number} has the role {message['role']!r}, which the chat template does not write; "
                    f"known are {', '.join(KNOWN_ROLES)}"
                )
            messages += 1
        return messages, thoughts

    def _reasoning(self, name: str, number: int) -> str:
        for known in (name, *REASONING):
            if re.search(rf"[.'\"]{known}\b", self._source):
                return known
        raise Refused(f"the chat template does not write the `{name}` of message {number}; put it into the content")

    def _knows(self, role: str) -> bool:
        return re.search(rf"['\"]{role}['\"]", self._source) is not None


def _is_in(text: str, content: str) -> bool:
    """Whether the text has the content, but for white space at its ends, as it is or as JSON."""
    content = content.strip()
    return content in text or any(json.dumps(content, ensure_ascii=flag)[1:-1] in text for flag in (False, True))


def _as_object(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        found = json.loads(arguments)
    except ValueError:
        return arguments
    return found if isinstance(found, dict) else arguments


def _as_string(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
