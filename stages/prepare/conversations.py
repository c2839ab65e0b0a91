"""A conversation as its record has it, in the one form that chat templates take: roles, content, tool calls.

Knows nothing of any template. What cannot be understood raises Refused; nothing is left out in silence.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

ROLES = {
    **dict.fromkeys(("human", "prompter", "customer"), "user"),
    **dict.fromkeys(("gpt", "model", "bot", "chatbot", "chatgpt", "bing", "bard", "claude", "ai"), "assistant"),
    **dict.fromkeys(("function", "observation", "tool_response", "ipython", "tool_result"), "tool"),
}
"""Names by which data sets call a role, and the one that templates know."""
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")
CALL_ROLES = ("function_call", "tool_call")
"""Roles of ShareGPT whose text is a call by the assistant, as JSON."""
FLAGS = ("weight", "loss_weight", "loss", "train")
"""Fields of a message that say whether it carries loss."""
REASONING = ("reasoning_content", "reasoning", "thinking")
NO_CONTENT: tuple[Any, ...] = (None, "", [])


class Refused(Exception):
    """A record cannot be used; the text says why, without saying where."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages as templates take them."""

    messages: list[dict[str, Any]]
    trained: list[bool]
    """Whether each message carries loss."""
    tools: list[dict[str, Any]] | None = None

    @property
    def turns(self) -> list[int]:
        """The messages that the assistant wrote."""
        return [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]

    def last_turn_only(self) -> "Conversation":
        """The same with loss on the assistant's last turn alone, if it had any."""
        last = max(self.turns, default=-1)
        return replace(self, trained=[flag and index == last for index, flag in enumerate(self.trained)])

    @property
    def num_groups(self) -> int:
        """How many times the user begins to speak."""
        return len(self._starts)

    def without(self, groups: int) -> "Conversation":
        """The same without the first `groups` times that the user speaks and what is answered.

        System messages at the beginning are kept.
        """
        starts = self._starts
        head = [index for index in range(starts[0]) if self.messages[index]["role"] in ("system", "developer")]
        kept = [*head, *range(starts[groups], len(self.messages))]
        return replace(
            self, messages=[self.messages[index] for index in kept], trained=[self.trained[index] for index in kept]
        )

    @property
    def _starts(self) -> list[int]:
        roles = [message["role"] for message in self.messages]
        return [index for index, role in enumerate(roles) if role == "user" and roles[index - 1 : index] != ["user"]]


def conversation_of(messages: Any, tools: Any = None, name: str = "messages") -> Conversation:
    """The conversation in a record's fields; raises Refused."""
    messages = _from_json(messages, name)
    if not isinstance(messages, list) or not messages or not all(isinstance(item, dict) for item in messages):
        raise Refused(f"field {name!r} holds {kind_of(messages)}; expected a list of objects with `role` and `content`")
    read = [_message(message, number) for number, message in enumerate(messages, start=1)]
    return Conversation([message for message, _ in read], [trained for _, trained in read], _tools(tools))


def text_of(value: Any, where: str) -> str:
    """A string that is text; raises Refused."""
    if not isinstance(value, str):
        raise Refused(f"{where} holds {kind_of(value)}; expected a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise Refused(f"{where} holds half of a surrogate pair at character {exc.start}; expected text") from exc
    return value


def kind_of(value: Any) -> str:
    """What a value is, for a message."""
    return "null" if value is None else f"a value of type {type(value).__name__}"


def without_nulls(value: Any) -> Any:
    """The value without the entries of objects that are null, at any depth: Arrow invents them where objects differ."""
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _message(message: dict[str, Any], number: int) -> tuple[dict[str, Any], bool]:
    where = f"message {number}"
    message = without_nulls(message)
    role = text_of(message.pop("role", message.pop("from", None)), f"`role` of {where}")
    content = message.pop("content", message.pop("value", None))
    role = role.lower() if role.lower() in (*KNOWN_ROLES, *ROLES, *CALL_ROLES) else role
    flags = [message.pop(name) for name in FLAGS if name in message]
    if role in CALL_ROLES:
        message["tool_calls"], content, role = _calls(_from_json(content, where), where), None, "assistant"
    role = ROLES.get(role, role)
    calls = message.pop("tool_calls", None) or ([message["function_call"]] if "function_call" in message else None)
    message.pop("function_call", None)
    if calls:
        message["tool_calls"] = _calls(_from_json(calls, where), where)
    if content in NO_CONTENT and (calls or any(name in message for name in REASONING)):
        content = None if calls else ""
    if content is not None or "tool_calls" not in message:
        content = _content(content, f"`content` of {where}")
    for name in REASONING:
        if name in message:
            text_of(message[name], f"`{name}` of {where}")
    return {"role": role, "content": content, **message}, _is_trained(flags, where) and role == "assistant"


def _content(content: Any, where: str) -> str:
    """Text, from text or from a list of its parts."""
    if isinstance(content, list) and content:
        return "".join(_part(part, where) for part in content)
    return text_of(content, where)


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return text_of(part, where)
    if isinstance(part, dict) and isinstance(part.get("text"), str) and part.get("type", "text").endswith("text"):
        return text_of(part["text"], where)
    kind = part.get("type", "an object without `text`") if isinstance(part, dict) else kind_of(part)
    raise Refused(f"{where} has a part that is {kind}; only parts of text can be read")


def _is_trained(flags: Sequence[Any], where: str) -> bool:
    for flag in flags:
        if flag not in (0, 1):
            raise Refused(f"{where} has the weight {flag!r}; a message carries loss (1, true) or none (0, false)")
    return all(flags)


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls as {"type": "function", "function": {"name", "arguments"}, ...}."""
    calls = calls if isinstance(calls, list) else [calls]
    found = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Refused(f"{where} has a tool call without a function's `name`; expected {{name, arguments}}")
        rest = {name: value for name, value in call.items() if "function" in call and name != "function"}
        found.append({"type": "function", **rest, "function": {**function, "arguments": function.get("arguments", {})}})
    return found


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    tools = without_nulls(_from_json(tools, "tools"))
    if tools in (None, [], ""):
        return None
    tools = tools if isinstance(tools, list) else [tools]
    tools = [_from_json(tool, "tools") for tool in tools]
    if not all(isinstance(tool, dict) for tool in tools):
        raise Refused("field 'tools' holds something else than objects; expected a list of functions with their schema")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def _from_json(value: Any, where: str) -> Any:
    """What a string of JSON holds; other values as they are."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as exc:
        raise Refused(f"{where} holds a string that is not JSON ({exc})") from exc
