"""docs/data.md: every example gives what the page says."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.corpus import Corpus
from pipeline.tokenizer import load_tokenizer
from stages.prepare.forms import FORMS
from stages.prepare.preview import marked
from stages.prepare.run import prepare
from stages.prepare.settings import PrepareConfig
from tests.support.chat_templates import STYLES, chat_tokenizer

PAGE = (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)


def test_every_form_has_an_example():
    fields = {
        field for example in EXAMPLES for line in example.splitlines() if line[0] == "{" for field in json.loads(line)
    }
    for choices, _ in FORMS.values():
        assert any(set(names) <= fields for names in choices)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "json"])
@pytest.mark.parametrize("example", EXAMPLES)
def test_example_gives_what_the_page_says(tmp_path, example, suffix):
    lines = example.splitlines()
    records = [json.loads(line) for line in lines if line.startswith("{")]
    path = tmp_path / f"data.{suffix}"
    if suffix == "parquet":
        try:
            pq.write_table(pa.Table.from_pylist(records), path)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            pytest.skip("records of this example have no common schema")
    else:
        path.write_text(json.dumps(records) if suffix == "json" else "\n".join(map(json.dumps, records)))
    chat_tokenizer(tmp_path / "tokenizer", STYLES["chatml"])
    config = PrepareConfig(inputs=(path,), tokenizer=tmp_path / "tokenizer", out=tmp_path / "corpus", packing="none")
    prepare(config)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    found = [marked(tokenizer, row).replace("\n", "\\n") for row in Corpus(tmp_path / "corpus").rows()]
    expected = [line.removeprefix("=> ") for line in lines if line.startswith("=>")]
    assert [text.replace("«", "").replace("»", "") for text in found] == [
        text.replace("«", "").replace("»", "") for text in expected
    ]
    for text, wanted in zip(found, expected, strict=True):  # the first token of a row is no label
        assert text == wanted or (wanted.startswith("«") and text.partition("«")[2] in wanted)
