"""What a record holds, by its fields: plain text, a prompt with its completion, or a conversation.

A record that has the fields of several forms is read by the first of FORMS; docs/data.md has an example of each.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from stages.prepare.conversations import Conversation, Refused, conversation_of, kind_of, text_of

Fields = dict[str, Any]
ALPACA = "### Instruction:\n{}\n\n### {}Response:\n"
"""How an instruction is written where the tokenizer has no chat template."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt as text and what is to follow it."""

    prompt: str
    completion: str


class Undesirable(Exception):
    """The record is an example of what not to write."""


Content = str | Completion | Conversation


def forms_in(names: Any, text_field: str) -> list[str]:
    """Names of the forms whose fields are all there; the first is the one that is read."""
    wanted: list[tuple[str, list[tuple[str, ...]]]]
    wanted = [("text", [(text_field,)]), *((name, fields) for name, (fields, _) in FORMS.items())]
    return [name for name, choices in wanted if any(all(field in names for field in fields) for fields in choices)]


def field_names(text_field: str) -> set[str]:
    """Every field that is looked at."""
    return {text_field, *OPTIONAL, *(name for choices, _ in FORMS.values() for fields in choices for name in fields)}


def content_of(fields: Fields, text_field: str, has_template: bool) -> Content | None:
    """What a record holds; None if it has the fields of no form.

    Raises Refused, and Undesirable.
    """
    present = {name: value for name, value in fields.items() if value is not None}
    forms = forms_in(present, text_field) or forms_in(fields, text_field)
    if not forms:
        return None
    if forms[0] == "text":
        return text_of(fields[text_field], f"field {text_field!r}")
    return FORMS[forms[0]][1](present, has_template)


def _messages(fields: Fields, _: bool) -> Conversation:
    return _led(fields, conversation_of(fields.get("messages"), _tools(fields)))


def _conversations(fields: Fields, _: bool) -> Conversation:
    name = "conversations" if "conversations" in fields else "conversation"
    return _led(fields, conversation_of(fields.get(name), _tools(fields), name))


def _completion(fields: Fields, _: bool) -> Content:
    if fields.get("label") is False:
        raise Undesirable
    return _answered(fields, fields.get("prompt"), "completion")


def _answered(fields: Fields, prompt: Any, name: str) -> Content:
    """A prompt and its answer in field `name`, each text or messages; only the answer carries loss."""
    answer = fields.get(name)
    if isinstance(answer, dict):
        answer = [answer]
    if not isinstance(prompt, list) and not isinstance(answer, list):
        return Completion(text_of(prompt, "field 'prompt'"), text_of(answer, f"field {name!r}"))
    asked = conversation_of(_as_messages(prompt, "user"), _tools(fields), "prompt")
    told = conversation_of(_as_messages(answer, "assistant"), None, name)
    if told.messages[: len(asked.messages)] == asked.messages:  # the answer repeats the prompt
        told = replace(told, messages=told.messages[len(asked.messages) :], trained=told.trained[len(asked.messages) :])
    return _led(
        fields,
        Conversation(asked.messages + told.messages, [False] * len(asked.messages) + told.trained, asked.tools),
    )


def _preference(fields: Fields, _: bool) -> Content:
    """The chosen answer; of whole conversations what follows the part that the rejected one has too."""
    chosen, rejected, prompt = (fields.get(name) for name in ("chosen", "rejected", "prompt"))
    if prompt is not None:
        return _answered(fields, prompt, "chosen")
    if isinstance(chosen, str) and not isinstance(rejected, list):
        chosen = text_of(chosen, "field 'chosen'")
        if rejected is None:
            raise Refused("field 'chosen' is text without a `prompt` or a `rejected` to tell where the answer starts")
        same = _common(chosen, text_of(rejected, "field 'rejected'"))
        start = len(same.rstrip()) if same != same.rstrip() else same.rfind(" ") if " " in same else 0
        return Completion(chosen[:start], chosen[start:])
    told = conversation_of(chosen, _tools(fields), "chosen")
    border = max(told.turns, default=0)
    if rejected is not None:
        other = conversation_of(rejected, None, "rejected").messages
        pairs = zip(told.messages, other)
        border = min(next((index for index, (one, two) in enumerate(pairs) if one != two), border), border)
    return _led(fields, replace(told, trained=[flag and index >= border for index, flag in enumerate(told.trained)]))


def _common(one: str, other: str) -> str:
    """The characters that both begin with."""
    return one[: next((index for index, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))]


def _instruction(fields: Fields, has_template: bool) -> Content:
    """Alpaca's, or Dolly's with `context` and `response`."""
    asked = text_of(fields.get("instruction"), "field 'instruction'")
    name = "output" if "output" in fields else "response"
    answer = text_of(fields.get(name), f"field {name!r}")
    given = next((fields[name] for name in ("input", "context") if fields.get(name)), "")
    given = text_of(given, "field 'input'")
    if not has_template:
        return Completion(ALPACA.format(asked, f"Input:\n{given}\n\n### " if given.strip() else ""), answer)
    messages = []
    history = fields.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise Refused(f"field 'history' holds {kind_of(pair)}; expected pairs of question and answer")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = f"{asked}\n\n{given}" if asked and given.strip() else asked or given
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return _led(fields, conversation_of(messages, _tools(fields), "instruction"))


def _led(fields: Fields, conversation: Conversation) -> Conversation:
    """The conversation behind the system message of a field `system`, if there is one."""
    system = fields.get("system")
    if not system or conversation.messages[0]["role"] == "system":
        return conversation
    message = {"role": "system", "content": text_of(system, "field 'system'")}
    return replace(conversation, messages=[message, *conversation.messages], trained=[False, *conversation.trained])


def _tools(fields: Fields) -> Any:
    return fields.get("tools") or fields.get("functions")


def _as_messages(value: Any, role: str) -> Any:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


FORMS: dict[str, tuple[list[tuple[str, ...]], Callable[[Fields, bool], Content]]] = {
    "messages": ([("messages",)], _messages),
    "completion": ([("prompt", "completion")], _completion),
    "preference": ([("chosen",)], _preference),
    "conversations": ([("conversations",), ("conversation",)], _conversations),
    "instruction": ([("instruction", "output"), ("instruction", "response")], _instruction),
}
OPTIONAL = ("tools", "functions", "system", "label", "rejected", "prompt", "input", "context", "history")
