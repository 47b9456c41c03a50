"""The numbers in the adapter store: the same bits as before, or a clear error."""

from __future__ import annotations

import sqlite3
import zlib
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from adapter_store_parts import MODEL, applied, change, running, same, solution

from edge_runtime.engine.adapters import LowRank
from edge_runtime.errors import ConfigError, RequestError
from edge_runtime.personalize.store import AdapterStore, Solution


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "home" / "adapters.db")


def test_an_imported_adapter_is_applied_at_once(store: AdapterStore) -> None:
    changes = [change(1.5, "blk.0.attn_q.weight", rank=3), change(-2.0), change(0.1, "output.weight", rank=6)]
    record = store.import_adapter("style", "demo", MODEL, changes, {"file": "style.gguf"})
    assert (record.kind, record.state, record.request) == ("lora", "applied", {"file": "style.gguf"})
    assert store.revision() == 1
    found = store.applied(MODEL).changes["style"]
    assert all(same(left, right) for left, right in zip(found, changes, strict=True))
    with pytest.raises(RequestError, match="at least one low-rank change"):
        store.import_adapter("empty", "demo", MODEL, [], {})
    assert len(store.records()) == 1


def test_numbers_are_the_same_bits_afterwards(store: AdapterStore) -> None:
    bits = np.random.default_rng(1).integers(0, 2**32, 4096, np.uint32).view(np.float32)
    edge = np.array([0.0, -0.0, 1e-45, np.finfo(np.float32).max, np.finfo(np.float32).tiny], np.float32)
    values = np.concatenate([bits[np.isfinite(bits)], edge])
    wanted = LowRank("blk.1.ffn_down.weight", values[None, :], values[:, None][::-1], 1 / 3)
    number = running(store)
    store.finish(number, "applied", {}, solution(7), {number: [wanted]})
    (found,) = store.changes(number)
    assert found.a.tobytes() == wanted.a.tobytes()
    assert found.b.tobytes() == np.ascontiguousarray(wanted.b).tobytes()
    assert found.scale == 1 / 3
    kept, given = store.solution(number), solution(7)
    assert kept is not None
    assert kept.layer == 1
    assert kept.parts.dtype == np.int32
    for left, right in ((kept.keys, given.keys), (kept.parts, given.parts), (kept.deltas, given.deltas)):
        assert np.array_equal(left, right)
    assert list(store.applied(MODEL).solutions) == []
    assert list(store.applied(MODEL, solutions=True).solutions) == [number]


_GOOD = change(rank=2)


@pytest.mark.parametrize(
    "wrong",
    [
        replace(_GOOD, a=_GOOD.a[0]),
        replace(_GOOD, a=_GOOD.a[:1]),
        replace(_GOOD, a=_GOOD.a[:0], b=_GOOD.b[:, :0]),
        replace(_GOOD, b=_GOOD.b.T[:1]),
        replace(_GOOD, b=_GOOD.b * np.float32(np.inf)),
        replace(_GOOD, a=_GOOD.a.astype(np.float64) * 1e300),
        replace(_GOOD, a=np.full((2, 6), "x")),
        replace(_GOOD, scale=float("nan")),
        replace(_GOOD, matrix=""),
        replace(_GOOD, matrix="m" * 64),
        replace(_GOOD, matrix="a\0b"),
    ],
)
def test_what_is_no_low_rank_change_is_refused(store: AdapterStore, wrong: LowRank) -> None:
    with pytest.raises(RequestError):
        store.import_adapter("wrong", "demo", MODEL, [_GOOD, wrong], {})
    assert store.records() == []


@pytest.mark.parametrize(
    "wrong",
    [
        replace(solution(), keys=solution().keys[0]),
        replace(solution(), keys=solution().keys * np.float32(np.nan)),
        replace(solution(), parts=solution().parts[:2]),
        replace(solution(), parts=solution().parts + 1),
        replace(solution(), parts=solution().parts - 1),
        replace(solution(), parts=solution().parts.astype(np.float32)),
        replace(solution(), deltas=solution().deltas[:1]),
        replace(solution(), layer=-1),
    ],
)
def test_what_is_no_solution_is_refused(store: AdapterStore, wrong: Solution) -> None:
    number = running(store)
    with pytest.raises(RequestError):
        store.finish(number, "applied", {}, wrong, {number: [change()]})
    assert store.get(str(number)).state == "running"


_DAMAGE = {
    "a number cut off": "UPDATE changes SET a = substr(a, 1, length(a) - 4)",
    "a number too many": "UPDATE changes SET b = CAST(b || x'00000000' AS BLOB)",
    "another number": "UPDATE changes SET a = CAST(x'00004040' || substr(a, 5) AS BLOB)",
    "another rank": "UPDATE changes SET rank = 2, n_in = 3, n_out = 2",
    "a negative rank": "UPDATE changes SET rank = -1, n_in = -6",
    "another scale": "UPDATE changes SET scale = scale * 2",
    "another matrix": "UPDATE changes SET matrix = 'blk.0.ffn_down.weight'",
    "another part": "UPDATE solutions SET parts = zeroblob(length(parts))",
    "other keys": "UPDATE solutions SET keys = zeroblob(length(keys))",
    "another layer": "UPDATE solutions SET layer = 0",
    "no JSON": "UPDATE records SET report = '{'",
    "no object": "UPDATE records SET request = '[]'",
    "no state": "UPDATE records SET state = 'lost'",
}


@pytest.mark.parametrize("damage", _DAMAGE)
def test_damage_is_said_and_never_a_wrong_number(store: AdapterStore, damage: str) -> None:
    applied(store)
    store.check()
    with closing(sqlite3.connect(store.path)) as database, database:
        database.execute(_DAMAGE[damage])
    for read in (store.check, lambda: store.applied(MODEL, solutions=True)):
        with pytest.raises(ConfigError, match=r"the adapter database .* is damaged .*move it away"):
            read()


def test_lengths_are_checked_beside_the_checksum(store: AdapterStore) -> None:
    """A row that is not what it says, with a checksum to it, as only a program can write one."""
    number = applied(store)
    (found,) = store.changes(number)
    a, b = found.a.tobytes(), found.b.tobytes()
    for head in ((found.matrix, 1, 7, 4, found.scale), (found.matrix, 0, 6, 4, found.scale)):
        checksum = zlib.crc32(b, zlib.crc32(a, zlib.crc32(repr(head).encode())))
        with closing(sqlite3.connect(store.path)) as database, database:
            database.execute(
                "UPDATE changes SET rank = ?, n_in = ?, checksum = ?", (head[1], head[2], checksum)
            )
        with pytest.raises(ConfigError, match=r"A of blk.1.ffn_down.weight has 24 bytes; .* needs"):
            store.changes(number)


def test_a_database_of_the_state_is_not_taken_for_one_of_adapters(tmp_path: Path) -> None:
    from edge_runtime.daemon.auth import Scope
    from edge_runtime.daemon.tokens import TokenStore

    TokenStore(tmp_path / "state.db").create("a", [Scope.INFER])
    with pytest.raises(ConfigError, match="another program"):
        AdapterStore(tmp_path / "state.db").records()
