"""pipeline.corpus: rows come back as they were written, and damage is found and named."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.corpus import (
    Corpus,
    CorpusManifest,
    TokenSequence,
    read_partition,
    write_partition,
)
from pipeline.errors import CorpusError
from pipeline.tokenizer import TokenizerIdentity


def sequence(*document_lengths: int, seed: int = 0) -> TokenSequence:
    generator = np.random.default_rng([seed, *document_lengths])
    num_tokens = sum(document_lengths)
    loss_mask = generator.random(num_tokens) < 0.7
    loss_mask[np.cumsum([0, *document_lengths[:-1]])] = False
    return TokenSequence(
        token_ids=generator.integers(0, 1000, num_tokens).astype(np.int32),
        loss_mask=loss_mask,
        document_lengths=np.array(document_lengths, np.int32),
    )


SEQUENCES = [sequence(5), sequence(3, 4), sequence(8), sequence(2, 2, 2), sequence(7, seed=1)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A corpus of SEQUENCES in partitions of 2, 0 and 3 rows."""
    parts = [SEQUENCES[:2], [], SEQUENCES[2:]]
    manifest = CorpusManifest(
        sequence_length=8,
        packing="isolated",
        tokenizer=TokenizerIdentity(vocab_size=1000, vocabulary="0" * 32, probe="1" * 32),
        partitions=tuple(write_partition(tmp_path, f"{index:05d}", rows) for index, rows in enumerate(parts)),
        settings={"text_field": "text"},
        statistics={"records": 5},
    )
    manifest.write(tmp_path)
    return tmp_path


def same(first: TokenSequence, second: TokenSequence) -> bool:
    return first.key == second.key and all(
        np.array_equal(getattr(first, name), getattr(second, name)) and getattr(first, name).dtype == dtype
        for name, dtype in (("token_ids", np.int32), ("loss_mask", np.bool_), ("document_lengths", np.int32))
    )


def test_manifest_comes_back_as_it_was_written(folder: Path) -> None:
    manifest = CorpusManifest.read(folder)
    assert (manifest.num_sequences, manifest.num_tokens) == (5, 33)
    assert manifest.num_targets == sum(int(row.loss_mask.sum()) for row in SEQUENCES)
    manifest.write(folder)
    assert CorpusManifest.read(folder) == manifest


@pytest.mark.parametrize(("start", "stop"), [(0, None), (0, 5), (1, 4), (2, 3), (4, 5), (3, 3), (5, None)])
def test_rows_are_those_from_start_to_stop(folder: Path, start: int, stop: int | None) -> None:
    rows = list(Corpus(folder).rows(start, stop))
    assert len(rows) == len(SEQUENCES[start:stop])
    assert all(same(found, written) for found, written in zip(rows, SEQUENCES[start:stop], strict=True))


def test_rows_are_still_valid_after_later_partitions_were_read(folder: Path) -> None:
    rows = list(Corpus(folder).rows())
    assert [row.token_ids.sum() for row in rows] == [row.token_ids.sum() for row in SEQUENCES]


def test_lengths_are_tokens_and_longest_document(folder: Path) -> None:
    tokens, longest = Corpus(folder).lengths()
    assert tokens.tolist() == [5, 7, 8, 6, 7]
    assert longest.tolist() == [5, 4, 8, 2, 7]


def test_target_positions_precede_the_labels() -> None:
    row = TokenSequence(
        token_ids=np.arange(5, dtype=np.int32),
        loss_mask=np.array([False, True, False, False, True]),
        document_lengths=np.array([5], np.int32),
    )
    assert row.target_positions.tolist() == [0, 3]


def test_key_depends_on_ids_mask_and_boundaries() -> None:
    row = sequence(3, 4)
    changed = {
        "token_ids": row.token_ids + 1,
        "loss_mask": ~row.loss_mask,
        "document_lengths": np.array([4, 3], np.int32),
    }
    parts = {name: getattr(row, name) for name in changed}
    keys = {TokenSequence(**{**parts, name: value}).key for name, value in changed.items()}
    assert len(keys | {row.key}) == 4


def test_equal_rows_make_equal_files(tmp_path: Path) -> None:
    first, second = (write_partition(tmp_path / name, "00000", SEQUENCES) for name in ("a", "b"))
    assert first == second


@pytest.mark.parametrize("place", [10, 0.5, -10])
def test_flipped_bit_in_a_partition_is_found(folder: Path, place: float) -> None:
    path = folder / "partitions" / "00002.arrow"
    content = bytearray(path.read_bytes())
    content[int(place * len(content)) if isinstance(place, float) else place] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=r"00002\.arrow"):
        list(Corpus(folder).rows(4, 5))
    assert len(list(Corpus(folder).rows(0, 2))) == 2


@pytest.mark.parametrize("kept", [0, 100])
def test_truncated_partition_is_found(folder: Path, kept: int) -> None:
    path = folder / "partitions" / "00000.arrow"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CorpusError, match=r"00000\.arrow"):
        read_partition(folder, CorpusManifest.read(folder).partitions[0])


def test_missing_partition_is_named(folder: Path) -> None:
    (folder / "partitions" / "00000.arrow").unlink()
    with pytest.raises(CorpusError, match=r"00000\.arrow: missing"):
        list(Corpus(folder).rows())


def test_missing_manifest_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="run `pipeline prepare`"):
        Corpus(tmp_path)


@pytest.mark.parametrize(
    ("old", "new"), [('"sequence_length": 8', '"sequence_length": 9'), ("{", ""), ("tokenised-corpus", "other")]
)
def test_damaged_manifest_is_named(folder: Path, old: str, new: str) -> None:
    path = folder / "corpus.json"
    path.write_text(path.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")
    with pytest.raises(CorpusError, match=r"corpus\.json"):
        Corpus(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", b"null", b'{"format": "tokenised-corpus"}'])
def test_foreign_manifest_is_named(folder: Path, content: bytes) -> None:
    (folder / "corpus.json").write_bytes(content)
    with pytest.raises(CorpusError, match=r"corpus\.json"):
        Corpus(folder)
