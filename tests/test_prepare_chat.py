"""stages.prepare: which tokens of a conversation are labels, as properties that hold whatever the chat template."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages.prepare.chat import ChatTemplate
from stages.prepare.conversations import Refused, conversation_of
from stages.prepare.tokens import Text, TextEncoder
from tests.support.chat_templates import STYLES, Style, chat_tokenizer

WORDS = [
    "Yes",
    "no",
    " two words",
    "\n",
    "\n\nline",
    "中文",
    "🙂",
    "a.",
    "x = {1}",
    '"q"',
    "'",
    "\t",
    "<b>",
    "[INST",
    "###",
    "  ",
]
contents = st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map("".join).filter(str.strip)
Labels = list[str]


@pytest.fixture(scope="module", params=STYLES)
def style(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Style, Any, ChatTemplate]:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = chat_tokenizer(folder, STYLES[request.param])
    return STYLES[request.param], tokenizer, ChatTemplate(tokenizer, folder, "test")


@st.composite
def conversations(draw: Any, style: Style) -> list[dict[str, str]]:
    """Messages in any order that the style allows, with a turn of the assistant's at least."""
    system = [{"role": "system", "content": draw(contents)}] if style.has_system and draw(st.booleans()) else []
    if style.must_alternate:
        roles = ["user", "assistant"] * draw(st.integers(1, 3)) + draw(st.sampled_from([[], ["user"]]))
    else:
        roles = draw(
            st.lists(st.sampled_from(["user", "assistant"]), min_size=1, max_size=5).filter(lambda r: "assistant" in r)
        )
    written = contents.map(str.lstrip) if style.drops_thinking else contents  # as these strip last turns only
    return system + [{"role": role, "content": draw(written)} for role in roles]


def labels_of(template: ChatTemplate, messages: list[dict[str, Any]]) -> tuple[str, Labels]:
    rendered = template.render(conversation_of(messages))
    return rendered.text, [rendered.text[first:stop] for first, stop in rendered.labels]


def some(function: Any) -> Any:
    return settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))(given(st.data())(function))


@some
def test_text_is_the_template_s_own_rendering(style: Any, data: Any) -> None:
    kind, tokenizer, template = style
    messages = data.draw(conversations(kind))
    text, labels = labels_of(template, messages)
    assert text == tokenizer.apply_chat_template(messages, tokenize=False)
    assert len(labels) == sum(message["role"] == "assistant" for message in messages)


@some
def test_labels_of_a_turn_are_the_same_whatever_follows(style: Any, data: Any) -> None:
    kind, _, template = style
    messages = data.draw(conversations(kind))
    _, labels = labels_of(template, messages)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    for number, turn in enumerate(turns):
        assert labels_of(template, messages[: turn + 1])[1][-1] == labels[number]


@some
def test_label_is_the_answer_with_what_ends_it_and_nothing_before(style: Any, data: Any) -> None:
    kind, _, template = style
    messages = data.draw(conversations(kind))
    _, labels = labels_of(template, messages)
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    for label, answer in zip(labels, answers, strict=True):
        assert label.strip().removesuffix(kind.end).strip() == answer.strip()
        assert label.rstrip().endswith(kind.end)


@some
def test_tokens_are_the_text_and_labels_are_the_labels(style: Any, data: Any) -> None:
    kind, tokenizer, template = style
    messages = data.draw(conversations(kind))
    rendered = template.render(conversation_of(messages))
    texts = TextEncoder(tokenizer, Path("test"))
    (document,) = texts.documents([Text(rendered.text, rendered.labels, "chat", rendered.ends_with_label)])
    appended = kind.eos if texts.counts["appended_chat_ends"] else ""
    assert tokenizer.decode(document.token_ids) == rendered.text + appended
    assert not (appended and kind.end and messages[-1]["role"] == "assistant")
    labels = "".join(rendered.text[first:stop] for first, stop in rendered.labels)
    found = tokenizer.decode(document.token_ids[document.loss_mask])
    expected = labels + (appended if rendered.ends_with_label else "")
    if texts.counts["spanning_tokens"]:  # white space of the prompt, in one token with the answer's beginning
        found, expected = "".join(found.split()), "".join(expected.split())
    assert found == expected


@some
def test_with_the_last_turn_only_one_turn_carries_loss(style: Any, data: Any) -> None:
    kind, _, template = style
    messages = data.draw(conversations(kind))
    text, labels = labels_of(template, messages)
    rendered = template.render(conversation_of(messages).last_turn_only())
    assert [rendered.text[first:stop] for first, stop in rendered.labels] == labels[-1:]
    assert rendered.text == text


THINKING = "<think>\nlet me see\n</think>\n\n"


def test_thinking_of_earlier_turns_is_the_same_or_refused(style: Any) -> None:
    kind, _, template = style
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": THINKING.replace("me", "us") + "first"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": f"{THINKING}second"},
    ]
    if not kind.drops_thinking:
        assert [label[:30] for label in labels_of(template, messages[:2])[1]] == [
            label[:30] for label in labels_of(template, messages)[1][:1]
        ]
        return
    with pytest.raises(Refused, match=r"assistant message 2 in another way once later ones follow.*--last-turn-only"):
        template.render(conversation_of(messages))
    rendered = template.render(conversation_of(messages).last_turn_only())
    ((first, stop),) = rendered.labels
    assert rendered.text[first:stop].removeprefix("<think>\n") == "let me see\n</think>\n\nsecond<|im_end|>\n"
    assert rendered.unwritten_thoughts == 1


def test_empty_thought_of_the_template_is_no_label(style: Any) -> None:
    kind, _, template = style
    asked = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "first"}]
    rendered = template.render(conversation_of(asked))
    assert rendered.inserted_thoughts == kind.drops_thinking
    assert rendered.text.count("</think>") == kind.drops_thinking
    assert all("think" not in rendered.text[first:stop] for first, stop in rendered.labels)


def test_empty_thought_of_the_text_is_a_label(style: Any) -> None:
    kind, _, template = style
    asked = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "<think>\n\n</think>\n\nfirst"}]
    if "split('</think>')[-1]" in kind.template and not kind.drops_thinking:
        pytest.skip("this style never writes thinking")
    rendered = template.render(conversation_of(asked))
    assert rendered.inserted_thoughts == 0
    ((first, stop),) = rendered.labels
    assert "</think>\n\nfirst" in rendered.text[first:stop]


def test_label_is_not_found_in_another_turn(style: Any) -> None:
    """A turn of nothing but a thought, which is dropped, would be the last turn's inserted one."""
    kind, _, template = style
    if kind.must_alternate or kind.eos == "<｜end▁of▁sentence｜>":
        pytest.skip("nothing to tell apart")
    empty = "<think>\n\n</think>\n\n"
    messages = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, ["a", empty, "b", ""])]
    try:
        rendered = template.render(conversation_of(messages))
    except Refused:
        return
    assert all(one[1] <= other[0] for one, other in zip(rendered.labels, rendered.labels[1:]))
