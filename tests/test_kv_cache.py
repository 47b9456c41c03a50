"""Which cells hold what, and who may look at them."""

import numpy as np
import pytest

from edge_runtime.engine.kv_cache import KVCells
from edge_runtime.errors import ContextOverflowError, RequestError


def place(cells: KVCells, sequence: int, *positions: int) -> list[int]:
    rows = np.array(positions, np.int32)
    return cells.place(np.full(len(rows), sequence, np.int32), rows).tolist()


def visible(cells: KVCells, sequence: int, position: int) -> list[int]:
    mask = np.full((1, cells.n_cells), np.nan, np.float16)
    cells.write_mask(mask, np.array([sequence], np.int32), np.array([position], np.int32))
    assert set(np.unique(mask[~np.isinf(mask)])) <= {0}
    return np.flatnonzero(mask[0] == 0).tolist()


def test_a_token_sees_its_own_sequence_up_to_its_position() -> None:
    cells = KVCells(8, 2)
    first = place(cells, 0, 0, 1, 2)
    place(cells, 1, 0, 1)
    assert visible(cells, 0, 1) == first[:2]
    assert cells.length(0) == 3 and cells.length(1) == 2 and cells.end == 5


def test_a_full_pool_refuses_and_changes_nothing() -> None:
    cells = KVCells(4, 1)
    place(cells, 0, 0, 1, 2)
    with pytest.raises(ContextOverflowError, match=r"2 cells.*1 of 4"):
        place(cells, 0, 3, 4)
    assert cells.length(0) == 3 and cells.n_free == 1


def test_removing_a_tail_frees_its_cells_for_others() -> None:
    cells = KVCells(4, 2)
    held = place(cells, 0, 0, 1, 2, 3)
    cells.remove(0, 2)
    assert cells.length(0) == 2 and cells.n_free == 2
    assert place(cells, 1, 0, 1) == held[2:]
    assert visible(cells, 1, 1) == held[2:]


def test_a_copy_shares_cells_until_both_owners_let_go() -> None:
    cells = KVCells(8, 2)
    held = place(cells, 0, 0, 1, 2)
    cells.copy(0, 1, 2)
    assert cells.length(1) == 2 and visible(cells, 1, 5) == held[:2] and cells.n_free == 5
    cells.remove(0)
    assert cells.n_free == 6 and visible(cells, 1, 5) == held[:2]
    cells.remove(1)
    assert cells.n_free == 8 and cells.end == 0


def test_running_the_same_positions_again_writes_the_same_cells() -> None:
    cells = KVCells(8, 1)
    held = place(cells, 0, 0, 1, 2)
    assert place(cells, 0, 1, 2) == held[1:]
    assert cells.n_free == 5


def test_rewriting_a_shared_position_leaves_the_other_sequence_alone() -> None:
    cells = KVCells(8, 2)
    held = place(cells, 0, 0, 1)
    cells.copy(0, 1)
    (rewritten,) = place(cells, 1, 1)
    assert rewritten not in held
    assert visible(cells, 0, 1) == held
    assert visible(cells, 1, 1) == [held[0], rewritten]


@pytest.mark.parametrize(("sequence", "positions"), [(2, [0]), (-1, [0]), (0, [3, 3])])
def test_impossible_rows_are_refused(sequence: int, positions: list[int]) -> None:
    with pytest.raises(RequestError):
        place(KVCells(8, 2), sequence, *positions)
