"""stages.prepare: long texts are tokenised in parts that change nothing, in bounded memory, with progress inside."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from pipeline.progress import Progress, Reporter
from stages.prepare.run import prepare
from stages.prepare.settings import PrepareConfig
from stages.prepare.tokens import TextEncoder
from tests.support.helpers import tiny_tokenizer
from tests.support.vocabularies import KINDS, make_file

ROOT = Path(__file__).parent.parent
SAMPLES = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "data" / "samples").glob("*.txt"))]
TEXTS = [
    *(text * 3 for text in SAMPLES),
    "a" * 9001,
    " " * 6000,
    "\n" * 7001,
    "🙂" * 5000,
    "ab " * 3000,
    "x" * 5000 + " y1" * 999,
]


@pytest.fixture(scope="module", params=[*KINDS])
def tokenizer(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    make_file(request.param, path)
    return PreTrainedTokenizerFast(tokenizer_file=str(path))


def parts_and_whole(monkeypatch, tokenizer, text, special):
    encoder = TextEncoder(tokenizer, Path("test"))
    monkeypatch.setattr("stages.prepare.tokens.LONG_TEXT", 10**9)
    (whole,) = encoder._encode([text], special=special, places=True)
    monkeypatch.setattr("stages.prepare.tokens.LONG_TEXT", 2000)
    monkeypatch.setattr("stages.prepare.tokens.OVERLAP", 128)
    (parts,) = encoder._encode([text], special=special, places=True)
    return parts, whole


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:8]))
def test_parts_of_a_text_have_the_tokens_of_the_whole(monkeypatch, tokenizer, text, special):
    parts, whole = parts_and_whole(monkeypatch, tokenizer, text, special)
    assert np.array_equal(parts.token_ids, whole.token_ids)
    assert np.array_equal(parts.places, whole.places)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("byte-level"))


PIECES = ["word ", "\n\n", "  ", "中文", "3.14", "a", "🙂", "\t", "''", "don't "]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(PIECES), min_size=50, max_size=200), st.integers(12, 30))
def test_parts_of_any_text_have_the_tokens_of_the_whole(byte_level, pieces, times):
    with pytest.MonkeyPatch.context() as patch:
        parts, whole = parts_and_whole(patch, byte_level, "".join(pieces) * times, False)
    assert np.array_equal(parts.token_ids, whole.token_ids)


class _Amounts(Progress, Reporter):
    def __init__(self):
        self.amounts = []

    def progress(self, *_):
        return self

    def advance(self, amount, note=""):
        self.amounts.append(amount)


@pytest.mark.parametrize("record", [{"text": SAMPLES[1] * 9}, {"prompt": "x", "completion": SAMPLES[1] * 9}])
def test_progress_inside_a_document_adds_up_to_the_file(monkeypatch, tmp_path, record):
    monkeypatch.setattr("stages.prepare.tokens.LONG_TEXT", 2000)
    monkeypatch.setattr("stages.prepare.tokens.OVERLAP", 128)
    monkeypatch.setattr("stages.prepare.documents.BATCH_CHARACTERS", 2000)
    monkeypatch.setattr("stages.prepare.readers.READ_BYTES", 64)
    monkeypatch.setattr("stages.prepare.tasks.PROGRESS_BYTES", 16)
    tiny_tokenizer(tmp_path / "tokenizer")
    path = tmp_path / "a.jsonl"
    path.write_text(
        json.dumps({"text": "before " * 20})
        + "\n"
        + json.dumps(record)
        + "\n"
        + json.dumps({"text": "after " * 20})
        + "\n"
    )
    config = PrepareConfig(inputs=(path,), tokenizer=tmp_path / "tokenizer", out=tmp_path / "out", overlong="cut")
    amounts = _Amounts()
    prepare(config, amounts)
    assert sum(amounts.amounts) == path.stat().st_size
    assert sum(amount > 0 for amount in amounts.amounts) > 5
    assert min(amounts.amounts) >= 0


LONG_LINE = """
import resource, sys
from pathlib import Path
from stages.prepare.settings import PrepareConfig
from stages.prepare.run import prepare
folder = Path(sys.argv[1])
def run(name):
    out = folder / f"corpus-{name}"
    prepare(PrepareConfig(inputs=(folder / f"{name}.jsonl",), tokenizer=folder / "tokenizer", out=out, overlong="cut"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
small = run("small")
print(run("long") - small)
"""


@pytest.mark.slow
@pytest.mark.parametrize("field", ["text", "completion"])
def test_long_line_takes_little_memory(tmp_path, field):
    """The whole would take 230 bytes of memory a byte of text."""
    tiny_tokenizer(tmp_path / "tokenizer")
    for name, times in (("small", 1), ("long", 4000)):
        record = {"prompt": "x"} if field == "completion" else {}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({**record, field: "The keeper wrote down.\n" * times * 50}))
    command = [sys.executable, "-c", LONG_LINE, str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    size = (tmp_path / "long.jsonl").stat().st_size
    assert int(done.stdout) * 1024 < 60 * size + (100 << 20)
