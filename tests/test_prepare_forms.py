"""stages.prepare: conversations, tools and nulls as data sets have them; what is longer than a sequence."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.corpus import Corpus
from pipeline.errors import CorpusError
from pipeline.progress import KeptLines
from pipeline.tokenizer import load_tokenizer
from stages.prepare.conversations import Conversation, Refused, conversation_of
from stages.prepare.forms import Completion, Undesirable, content_of, field_names
from stages.prepare.needs import Needs
from stages.prepare.run import prepare
from stages.prepare.settings import PrepareConfig
from tests.support.chat_templates import STYLES, chat_tokenizer
from tests.support.helpers import tiny_tokenizer


def corpus_of(
    folder: Path, style: str, records: list[dict[str, Any]], suffix: str = "jsonl", **settings: Any
) -> Corpus:
    path = folder / f"input.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    chat_tokenizer(folder / "tokenizer", STYLES[style])
    settings = {"packing": "none", "sequence_length": 4096, **settings}
    reporter = settings.pop("reporter", None)
    prepare(PrepareConfig(inputs=(path,), tokenizer=folder / "tokenizer", out=folder / "corpus", **settings), reporter)
    return Corpus(folder / "corpus")


def rows_of(corpus: Corpus) -> list[tuple[str, str]]:
    tokenizer = load_tokenizer(corpus.folder / "tokenizer")
    return [(tokenizer.decode(row.token_ids), tokenizer.decode(row.token_ids[row.loss_mask])) for row in corpus.rows()]


def counted(corpus: Corpus) -> dict[str, int]:
    return {name: count for name, count in corpus.manifest.statistics.items() if count}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}}},
    {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {"type": "integer"}}}}},
]
AGENT = {
    "tools": TOOLS,
    "messages": [
        {"role": "user", "content": "Rain in Bern?"},
        {"role": "assistant", "content": None, "tool_calls": [call("weather", city="Bern")]},
        {"role": "tool", "content": "dry"},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": None, "tool_calls": [call("add", a=2)]},
    ],
}


@pytest.mark.parametrize("style", [name for name, style in STYLES.items() if style.has_tools])
def test_tools_are_rendered_and_parquet_s_nulls_are_not(tmp_path, style):
    rows = {}
    for suffix in ("jsonl", "parquet"):
        (tmp_path / suffix).mkdir()
        rows[suffix] = rows_of(corpus_of(tmp_path / suffix, style, [AGENT, {**AGENT, "tools": TOOLS[:1]}], suffix))
    assert rows["jsonl"] == rows["parquet"]
    (text, labels), (other, _) = rows["jsonl"]
    assert '"weather"' in text
    assert '"add"' in text
    assert '"integer"' not in other
    assert '{"city": "Bern"}' in labels
    assert '{"a": 2}' in labels
    assert "No." in labels
    assert "dry" not in labels
    assert not any(word in text for word in ("null", "None"))


@pytest.mark.parametrize("style", ["qwen3", "llama3", "mistral", "deepseek"])
@pytest.mark.parametrize("arguments", [{"city": "Bern"}, '{"city": "Bern"}'])
@pytest.mark.parametrize("content", [None, "", "absent", []])
def test_call_without_content_is_a_label_whatever_its_arguments_are_written_as(tmp_path, style, arguments, content):
    message = {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"function": {"name": "w", "arguments": arguments}}],
    }
    if content == "absent":
        del message["content"]
    ((_, labels),) = rows_of(corpus_of(tmp_path, style, [{"messages": [{"role": "user", "content": "?"}, message]}]))
    assert "w" in labels
    assert '{"city": "Bern"}' in labels
    assert labels.rstrip().endswith(STYLES[style].end)


def test_functions_are_tools():
    assert conversation_of(MESSAGES, [{"name": "f"}]) == content_of(
        {"messages": MESSAGES, "functions": [{"name": "f"}]}, "text", True
    )


def test_tools_that_the_template_does_not_write_are_said_and_counted(tmp_path):
    reporter = KeptLines()
    record = {
        "tools": json.dumps(TOOLS),
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    }
    corpus = corpus_of(tmp_path, "chatml", [record], reporter=reporter)
    assert counted(corpus)["tools_not_written"] == 1
    assert any("`tools`, which the chat template does not write" in line for line in reporter.lines)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_roles_by_other_names_give_the_same_rows_in_a_mixture(tmp_path, suffix):
    names = [("user", "assistant"), ("human", "gpt"), ("Human", "Model"), ("USER", "bot"), ("prompter", "chatgpt")]
    records = [
        {"messages": [{"role": one, "content": f"q{index}"}, {"role": two, "content": f"a{index}"}]}
        for index, (one, two) in enumerate(names)
    ]
    rows = rows_of(corpus_of(tmp_path, "gemma", records, suffix))
    for index, (text, labels) in enumerate(rows):
        assert text == f"<bos><start_of_turn>user\nq{index}<end_of_turn>\n<start_of_turn>model\na{index}<end_of_turn>\n"
        assert labels == f"a{index}<end_of_turn>\n"


def test_foreign_role_is_written_or_the_record_rejected(tmp_path):
    records = [
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "critic", "content": "hm"},
                {"role": "assistant", "content": "b"},
            ]
        }
    ]
    (tmp_path / "one").mkdir()
    ((text, labels),) = rows_of(corpus_of(tmp_path / "one", "chatml", records))
    assert "<|im_start|>critic\nhm<|im_end|>" in text
    assert labels == "b<|im_end|>\n"
    with pytest.raises(
        CorpusError, match="line 1: message 2 has the role 'critic', which the chat template does not write"
    ):
        corpus_of(tmp_path, "command-r", records)


def test_content_that_the_template_leaves_out_is_counted(tmp_path):
    template = "{% for m in messages %}{% if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"
    tiny_tokenizer(tmp_path / "tokenizer", chat_template=template)
    path = tmp_path / "a.jsonl"
    path.write_text(
        json.dumps({"messages": [{"role": r, "content": f"the {r}"} for r in ("system", "user", "assistant")]})
    )
    manifest = prepare(PrepareConfig(inputs=(path,), tokenizer=tmp_path / "tokenizer", out=tmp_path / "corpus"))
    assert manifest.statistics["messages_not_written"] == 1


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_first_form_is_read_and_the_others_are_counted(tmp_path, suffix):
    both = {"text": "the text", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    corpus = corpus_of(tmp_path, "chatml", [both, {**both, "text": None}], suffix)
    assert [text.partition("<|endoftext|>")[0] for text, _ in rows_of(corpus)] == [
        "the text",
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n",
    ]
    assert counted(corpus)["other_forms_ignored"] == 1


def test_reasoning_goes_to_the_template_or_the_record_is_rejected(tmp_path):
    for field in ("reasoning_content", "reasoning", "thinking"):
        record = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", field: "hm"}]}
        (tmp_path / field).mkdir()
        ((_, labels),) = rows_of(corpus_of(tmp_path / field, "qwen3", [record]))
        assert labels == "<think>\nhm\n</think>\n\nb<|im_end|>\n"
        with pytest.raises(CorpusError, match=f"does not write the `{field}` of message 2"):
            corpus_of(tmp_path / field / "..", "llama3", [record])


MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("fields", "trained"),
    [
        ({"messages": MESSAGES}, [False, True]),
        ({"messages": json.dumps(MESSAGES)}, [False, True]),
        (
            {
                "messages": [
                    *MESSAGES,
                    {"role": "user", "content": "r"},
                    {"role": "assistant", "content": "b", "train": False},
                ]
            },
            [False, True, False, False],
        ),
        (
            {
                "messages": [
                    *MESSAGES,
                    {"role": "user", "content": "r", "weight": 1},
                    {"role": "assistant", "content": "b", "weight": 0.0},
                ]
            },
            [False, True, False, False],
        ),
        (
            {
                "prompt": MESSAGES,
                "completion": [{"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}],
            },
            [False, False, False, True],
        ),
        ({"prompt": "q", "completion": [{"role": "assistant", "content": "a"}]}, [False, True]),
        ({"prompt": [{"role": "user", "content": "q"}], "completion": "a"}, [False, True]),
        (
            {"prompt": "q", "chosen": MESSAGES, "rejected": [MESSAGES[0], {"role": "assistant", "content": "x"}]},
            [False, True],
        ),
        ({"prompt": "q", "chosen": [MESSAGES[1]], "rejected": None}, [False, True]),
        ({"prompt": "q", "chosen": MESSAGES[1], "rejected": MESSAGES[1]}, [False, True]),
        (
            {
                "chosen": [*MESSAGES, {"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}],
                "rejected": [*MESSAGES, {"role": "user", "content": "r"}, {"role": "assistant", "content": "x"}],
            },
            [False, False, False, True],
        ),
        ({"conversation": MESSAGES, "system": "s"}, [False, False, True]),
        (
            {
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "gpt", "value": "a", "weight": 0},
                    {"from": "gpt", "value": "b"},
                ]
            },
            [False, False, True],
        ),
        ({"instruction": "q", "input": "", "output": "a", "history": [["o", "p"]]}, [False, True, False, True]),
        ({"instruction": "q", "context": "c", "response": "a"}, [False, True]),
    ],
)
def test_forms_of_conversations(fields, trained):
    conversation = content_of(fields, "text", True)
    assert conversation.trained == trained
    assert conversation.messages[-1]["role"] == "assistant"
    assert all(set(message) == {"role", "content"} for message in conversation.messages)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"text": "t", "messages": MESSAGES}, "t"),
        ({"prompt": "p", "completion": "c", "label": True}, Completion("p", "c")),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, Completion("p", "c")),
        (
            {"chosen": "Human: hi\n\nAssistant: Yes, so", "rejected": "Human: hi\n\nAssistant: You"},
            Completion("Human: hi\n\nAssistant:", " Yes, so"),
        ),
        ({"chosen": "abc", "rejected": "abd"}, Completion("", "abc")),
        ({"instruction": "i", "output": "o"}, Completion("### Instruction:\ni\n\n### Response:\n", "o")),
        (
            {"instruction": "i", "input": "x", "output": "o"},
            Completion("### Instruction:\ni\n\n### Input:\nx\n\n### Response:\n", "o"),
        ),
        ({"title": "t"}, None),
    ],
)
def test_forms_of_text(fields, expected):
    assert content_of(fields, "text", False) == expected


def test_calls_of_sharegpt_are_calls():
    talk = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "1"},
        {"from": "gpt", "value": "a"},
    ]
    conversation = content_of({"conversations": talk, "tools": '[{"name": "f"}]'}, "text", True)
    assert [message["role"] for message in conversation.messages] == ["user", "assistant", "tool", "assistant"]
    assert conversation.messages[1]["tool_calls"] == [call("f", x=1)]
    assert conversation.trained == [False, True, False, True]
    assert conversation.tools == [{"type": "function", "function": {"name": "f"}}]


def test_undesirable_completion_is_left_out():
    with pytest.raises(Undesirable):
        content_of({"prompt": "p", "completion": "c", "label": False}, "text", True)


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        (
            [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
            "`content` of message 1 has a part that is image",
        ),
        ([{"role": "user", "content": {"a": 1}}], "`content` of message 1 holds a value of type dict"),
        ([{"role": None, "content": "a"}], "`role` of message 1 holds null"),
        ([{"role": "assistant", "content": "a", "weight": 0.5}], "message 1 has the weight 0.5"),
        ([{"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}], "message 1 has a tool call without"),
        ([{"from": "function_call", "value": "f(x)"}], "message 1 holds a string that is not JSON"),
        ("[{]", "messages holds a string that is not JSON"),
        ([["user", "a"]], "field 'messages' holds a value of type list"),
    ],
)
def test_what_cannot_be_understood_is_refused(messages, problem):
    with pytest.raises(Refused, match=problem.replace("(", r"\(")):
        conversation_of(messages)


def long_chat(turns: int) -> dict[str, Any]:
    middle = [
        {"role": role, "content": f"{role} {turn} says so"} for turn in range(turns) for role in ("user", "assistant")
    ]
    return {"messages": [{"role": "system", "content": "Be brief."}, *middle]}


@pytest.mark.parametrize("packing", ["isolated", "none"])
@pytest.mark.parametrize("overlong", ["drop", "truncate", "cut"])
def test_overlong_conversations_are_dropped_truncated_or_cut(tmp_path, overlong, packing):
    records = [
        long_chat(1),
        long_chat(9),
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "word " * 99}]},
    ]
    corpus = corpus_of(tmp_path, "chatml", records, sequence_length=128, packing=packing, overlong=overlong)
    texts = [text for text, _ in rows_of(corpus)]
    statistics = counted(corpus)
    if overlong == "cut":
        assert statistics["cut_documents"] == 2
        return
    whole = "".join(texts)
    assert whole.count("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n") == (
        1 if overlong == "drop" else 2
    )
    assert statistics["overlong_chats_dropped"] == (2 if overlong == "drop" else 1)
    assert "cut_documents" not in statistics
    if overlong == "truncate":
        assert statistics["truncated_chats"] == 1
        assert statistics["ended_by_<|im_end|>"] == statistics["documents"] == 3  # what was tried does not count
        kept = whole.count("<|im_start|>assistant") - 1
        assert statistics["truncated_messages"] == 18 - 2 * kept
        assert all(f"assistant {turn} says so" in whole for turn in range(9 - kept, 9))
        assert f"user {8 - kept} says so" not in whole
    for row in corpus.rows():
        assert len(row.token_ids) <= 128


def test_truncation_keeps_as_many_turns_as_fit(tmp_path):
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", STYLES["chatml"])
    corpus = corpus_of(tmp_path, "chatml", [long_chat(9)], sequence_length=128, overlong="truncate")
    ((text, _),) = rows_of(corpus)
    one_more = 9 - text.count("<|im_start|>assistant") - 1
    system, *rest = long_chat(9)["messages"]
    longer = tokenizer.apply_chat_template([system, *rest[2 * one_more :]], tokenize=False)
    assert longer.endswith(text.partition("<|im_start|>user")[2])
    assert len(tokenizer(longer)["input_ids"]) > 128


def test_overlong_prompts_lose_their_beginning_and_keep_the_answer(tmp_path):
    records = [
        {"prompt": f"{name} " * 99, "completion": answer}
        for name, answer in (("what", " seen"), ("was", " missing" * 70))
    ]
    for overlong in ("drop", "truncate"):
        (tmp_path / overlong).mkdir()
    corpus = corpus_of(tmp_path / "truncate", "llama3", records, sequence_length=64, overlong="truncate")
    ((text, labels),) = rows_of(corpus)
    assert labels == " seen<|end_of_text|>"
    assert text.endswith("what what  seen<|end_of_text|>")
    assert len(next(iter(corpus.rows())).token_ids) == 64
    assert counted(corpus)["truncated_completions"] == counted(corpus)["overlong_completions_dropped"] == 1
    with pytest.raises(CorpusError, match=r"nothing to train on is left .*2 overlong completions dropped"):
        corpus_of(tmp_path / "drop", "llama3", records, sequence_length=64)


def test_plain_text_is_cut_whatever_the_policy(tmp_path):
    corpus = corpus_of(tmp_path, "chatml", [{"text": "word " * 99}], sequence_length=64, overlong="drop")
    assert counted(corpus)["cut_documents"] == 1


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-1, 2)
    | st.sampled_from(["", "a", "user", "gpt", "[]", '{"name": "f"}', "{"])
)
KEYS = st.sampled_from(
    [
        "role",
        "from",
        "content",
        "value",
        "tool_calls",
        "function",
        "function_call",
        "name",
        "arguments",
        "weight",
        "type",
        "text",
    ]
)
ANY = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)
MESSAGE = st.fixed_dictionaries(
    {"role": ANY, "content": ANY}, optional={"tool_calls": ANY, "weight": ANY, "reasoning": ANY}
)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(sorted(field_names("text"))), ANY | st.lists(MESSAGE | ANY, min_size=1, max_size=3), max_size=6
    ),
    st.booleans(),
)
def test_any_record_is_read_or_refused(fields, has_template):
    try:
        content = content_of(fields, "text", has_template)
    except (Refused, Undesirable):
        return
    if isinstance(content, Conversation):
        assert len(content.trained) == len(content.messages) > 0
        assert all(isinstance(message["role"], str) for message in content.messages)
        assert all(isinstance(message["content"], str) or message["tool_calls"] for message in content.messages)
        with contextlib.suppress(Refused):
            Needs(STYLES["llama3"].template, parts=False).fit(content)
