"""Tokens at rest, by several threads and processes at once."""

from __future__ import annotations

import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from edge_runtime.daemon.auth import TOKEN_PREFIX, Scope
from edge_runtime.daemon.tokens import TokenStore
from edge_runtime.errors import RequestError


@pytest.fixture
def tokens(tmp_path: Path) -> TokenStore:
    return TokenStore(tmp_path / "home" / "state.db")


def test_tokens_are_long_random_and_recognizable(tokens: TokenStore) -> None:
    made = [tokens.create(f"t{number}", [Scope.INFER]) for number in range(20)]
    assert len(set(made)) == 20
    for token in made:
        assert token.startswith(TOKEN_PREFIX)
        assert len(token) == len(TOKEN_PREFIX) + 43  # 32 bytes in base64


def test_only_the_hash_is_stored(tokens: TokenStore) -> None:
    token = tokens.create("phone", [Scope.INFER])
    (found,) = tokens
    assert found.digest == hashlib.sha256(token.encode()).digest()
    secret = token.removeprefix(TOKEN_PREFIX).encode()
    for path in tokens.path.parent.iterdir():
        assert secret not in path.read_bytes(), path
    assert token not in repr(found)


def test_rows_say_what_is_known(tokens: TokenStore) -> None:
    before = time.time()
    tokens.create("b", [Scope.ADMIN, Scope.INFER], expires=before + 3600)
    tokens.create("a", {Scope.PERSONALIZE})
    first, second = tokens
    assert (first.name, first.scopes, first.expires) == ("a", {Scope.PERSONALIZE}, None)
    assert (second.name, second.scopes, second.expires) == ("b", {Scope.ADMIN, Scope.INFER}, before + 3600)
    assert before <= second.created <= first.created <= time.time()
    assert first.last_used is None


def test_reading_makes_no_database(tokens: TokenStore) -> None:
    assert list(tokens) == []
    assert not tokens.path.parent.exists()


def test_a_name_is_used_once_until_it_is_revoked(tokens: TokenStore) -> None:
    first = tokens.create("phone", [Scope.INFER])
    with pytest.raises(RequestError, match=r"a token named 'phone' already.*edgert token revoke phone"):
        tokens.create("phone", [Scope.ADMIN])
    (old,) = tokens
    assert old.scopes == {Scope.INFER}
    tokens.revoke("phone")
    assert list(tokens) == []
    assert tokens.create("phone", [Scope.INFER]) != first
    (new,) = tokens
    assert new.id != old.id
    assert new.digest != old.digest


def test_revoking_what_is_not_there_is_said(tokens: TokenStore) -> None:
    with pytest.raises(RequestError, match="no token named 'phone'"):
        tokens.revoke("phone")


@pytest.mark.parametrize("name", ["", "-a", "a b", "a/b", "ü", "a\n", "a" * 65, "local", "a\x00b", "'; DROP"])
def test_names_are_checked(tokens: TokenStore, name: str) -> None:
    with pytest.raises(RequestError):
        tokens.create(name, [Scope.INFER])
    assert not tokens.path.exists()


def test_a_token_needs_a_scope_and_a_future(tokens: TokenStore) -> None:
    with pytest.raises(RequestError, match="at least one scope of infer, personalize, admin"):
        tokens.create("phone", [])
    for expires in (time.time() - 1, float("nan"), float("-inf")):
        with pytest.raises(RequestError, match="expired before its first use"):
            tokens.create("phone", [Scope.INFER], expires=expires)
    assert list(tokens) == []


def test_last_use_never_goes_back_and_skips_the_revoked(tokens: TokenStore) -> None:
    tokens.create("a", [Scope.INFER])
    tokens.create("b", [Scope.INFER])
    a, b = tokens
    tokens.revoke("b")
    tokens.create("b", [Scope.INFER])  # of the same name, but another token
    tokens.mark_used({a.id: 200.0, b.id: 200.0})
    tokens.mark_used({a.id: 100.0})
    assert [(token.name, token.last_used) for token in tokens] == [("a", 200.0), ("b", None)]


def test_a_scope_of_the_future_allows_nothing(tokens: TokenStore) -> None:
    from edge_runtime.daemon.state import opened_state

    tokens.create("a", [Scope.INFER])
    with opened_state(tokens.path) as state:
        state.execute("UPDATE tokens SET scopes = 'infer teleport'")
    (found,) = tokens
    assert found.scopes == {Scope.INFER}


def test_threads_share_it_and_one_of_them_gets_a_name(tokens: TokenStore) -> None:
    def create(number: int) -> bool:
        try:
            tokens.create(f"t{number % 10}", [Scope.INFER])
        except RequestError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(create, range(40)))
    assert sum(made) == 10
    assert [token.name for token in tokens] == [f"t{number}" for number in range(10)]
