"""stages.prepare.packing: no token is lost unsaid, no label lacks a past, rows are full and in order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.corpus import TokenSequence
from stages.prepare.documents import Document
from stages.prepare.packing import IsolatedPacker, Packer, best_fit, piece_lengths
from stages.prepare.settings import PACKINGS

document_lengths = st.lists(st.integers(1, 40), max_size=30)


def documents(lengths: list[int], label_share: float = 1.0) -> list[Document]:
    """Documents whose ids tell the document (hundreds) and the place in it, apart from one another."""
    generator = np.random.default_rng(len(lengths))
    return [
        Document(np.arange(length, dtype=np.int32) + 100 * index, generator.random(length) < label_share)
        for index, length in enumerate(lengths)
    ]


def pack(packing: str, items: list[Document], sequence_length: int) -> tuple[list[TokenSequence], Packer]:
    packer = PACKINGS[packing](sequence_length)
    rows = [row for item in items for row in packer.add(item)]
    return [*rows, *packer.flush()], packer


@settings(deadline=None)
@given(document_lengths, st.integers(2, 16), st.sampled_from(PACKINGS.names), st.sampled_from([0.1, 0.6, 1.0]))
def test_every_token_is_in_one_row_or_counted(
    lengths: list[int], sequence_length: int, packing: str, label_share: float
) -> None:
    items = documents(lengths, label_share)
    rows, packer = pack(packing, items, sequence_length)
    found = np.concatenate([np.zeros(0, np.int32), *(row.token_ids for row in rows)])
    assert len(np.unique(found)) == len(found)
    assert len(found) + packer.counts["dropped_tokens"] == sum(lengths)
    for row in rows:
        assert 0 < len(row.token_ids) <= sequence_length
        assert row.document_lengths.sum() == len(row.token_ids) == len(row.loss_mask)
        assert row.loss_mask.any()
        assert row.token_ids.dtype == np.int32
        assert row.document_lengths.dtype == np.int32


@settings(deadline=None)
@given(document_lengths, st.integers(2, 16), st.sampled_from(PACKINGS.names))
def test_labels_are_those_of_the_document_less_the_first_of_each_piece(
    lengths: list[int], sequence_length: int, packing: str
) -> None:
    items = documents(lengths, 0.6)
    labels = {int(token): bool(label) for item in items for token, label in zip(item.token_ids, item.loss_mask)}
    for row in pack(packing, items, sequence_length)[0]:
        firsts = np.cumsum([0, *row.document_lengths[:-1]])
        expected = np.array([labels[int(token)] for token in row.token_ids])
        expected[firsts] = False
        assert np.array_equal(row.loss_mask, expected)
        assert packing == "isolated" or len(firsts) == 1


@pytest.mark.parametrize("packing", PACKINGS.names)
def test_packing_changes_no_document(packing: str) -> None:
    items = documents([5, 17, 9], 0.5)
    copies = [item.loss_mask.copy() for item in items]
    pack(packing, items, 8)
    assert all(np.array_equal(item.loss_mask, copy) for item, copy in zip(items, copies, strict=True))


@pytest.mark.parametrize("packing", ["isolated", "none"])
def test_isolated_pieces_hold_consecutive_tokens_of_one_document(packing: str) -> None:
    for row in pack(packing, documents([23, 4, 9, 31, 2]), 8)[0]:
        for piece in np.split(row.token_ids, np.cumsum(row.document_lengths)[:-1]):
            assert np.array_equal(piece, np.arange(piece[0], piece[0] + len(piece)))
            assert len(set(piece // 100)) == 1


def test_crossing_rows_are_the_documents_end_to_end() -> None:
    items = documents([5, 30, 2, 8])
    rows, _ = pack("crossing", items, 8)
    assert [len(row.token_ids) for row in rows] == [8, 8, 8, 8, 8, 5]
    assert np.array_equal(
        np.concatenate([row.token_ids for row in rows]), np.concatenate([item.token_ids for item in items])
    )


def test_crossing_keeps_the_label_of_a_document_inside_a_row() -> None:
    (row,) = pack("crossing", documents([3, 4]), 8)[0]
    assert row.loss_mask.tolist() == [False, True, True, True, True, True, True]


@pytest.mark.parametrize(
    ("num_tokens", "longest", "expected"),
    [(5, 8, [5]), (8, 8, [8]), (9, 8, [7, 2]), (17, 8, [8, 7, 2]), (18, 8, [8, 8, 2]), (3, 2, [2, 1]), (1, 8, [1])],
)
def test_last_piece_of_a_document_is_not_one_token(num_tokens: int, longest: int, expected: list[int]) -> None:
    assert piece_lengths(num_tokens, longest) == expected


def test_piece_without_a_label_is_dropped_and_counted() -> None:
    item = Document(np.arange(20, dtype=np.int32), np.arange(20) >= 18)
    rows, packer = pack("isolated", [item], 8)
    assert [row.token_ids.tolist() for row in rows] == [[16, 17, 18, 19]]
    assert packer.counts == {"cut_documents": 1, "dropped_pieces": 2, "dropped_tokens": 16}


def test_best_fit_puts_a_piece_where_it_leaves_the_least_room() -> None:
    assert best_fit(np.array([2, 6, 3, 5]), 8) == [[0, 1], [2, 3]]


def test_rows_of_many_short_documents_are_nearly_full() -> None:
    lengths = np.random.default_rng(0).integers(2, 200, 4000).tolist()
    rows, _ = pack("isolated", [Document(np.zeros(n, np.int32), np.ones(n, np.bool_)) for n in lengths], 256)
    assert sum(lengths) / (256 * len(rows)) > 0.98


def test_window_bounds_what_is_held_back() -> None:
    packer = IsolatedPacker(8)
    rows = [row for item in documents([3] * 4000) for row in packer.add(item)]
    assert sum(len(row.token_ids) for row in rows) >= 4000 * 3 - 8 * 256 - 3
