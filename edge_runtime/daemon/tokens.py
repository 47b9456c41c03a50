"""Tokens at rest: names, scopes and hashes in the state database."""

from __future__ import annotations

import re
import secrets
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.daemon.auth import LOCAL, TOKEN_PREFIX, Scope, digest_of
from edge_runtime.daemon.state import opened_state
from edge_runtime.errors import RequestError

_RANDOM_BYTES = 32
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class StoredToken:
    """What is known of a token; the token itself is not.

    Attributes:
        id: never used twice, unlike the name.
        digest: SHA-256 of the token, 32 bytes.
        created, expires, last_used: Unix time in seconds; None for never.
    """

    id: int
    name: str
    scopes: frozenset[Scope]
    digest: bytes
    created: float
    expires: float | None
    last_used: float | None


class TokenStore:
    """The tokens in a state database, for the daemon and the command line at the same time.

    Each call opens the database for itself: calls are rare, may come from any thread, and no transaction
    outlives one.

    Args:
        path: the database, ``<home>/state.db``; made where it is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[StoredToken]:
        """Every token, by name; none, and nothing is made, where there is no database.

        Raises:
            ConfigError: the database is damaged or belongs to another program.
        """
        if not self.path.exists():
            return
        columns = "id, name, scopes, digest, created, expires, last_used"
        with opened_state(self.path) as state:
            rows = state.execute(f"SELECT {columns} FROM tokens ORDER BY name").fetchall()
        for number, name, scopes, *rest in rows:
            yield StoredToken(number, name, _read_scopes(scopes), *rest)

    def create(self, name: str, scopes: Iterable[Scope], expires: float | None = None) -> str:
        """Make a token. It is on the disk, hashed, when this returns, and cannot be shown again.

        Args:
            name: unique; letters, digits, ``.``, ``_`` and ``-``.
            expires: Unix time in seconds; None for never.

        Raises:
            RequestError: no valid name or one in use, no scope, or a time that is over.
            ConfigError: the database is damaged or belongs to another program.
        """
        check_name(name)
        wanted = sorted(frozenset(scopes))
        if not wanted:
            raise RequestError(f"a token needs at least one scope of {', '.join(Scope)}")
        now = time.time()
        if expires is not None and not now < expires:
            raise RequestError("the token would have expired before its first use; choose a later time")
        token = TOKEN_PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)
        values = (name, " ".join(wanted), digest_of(token), now, expires)
        try:
            with opened_state(self.path) as state:
                state.execute(
                    "INSERT INTO tokens (name, scopes, digest, created, expires) VALUES (?, ?, ?, ?, ?)",
                    values,
                )
        except sqlite3.IntegrityError as error:
            raise RequestError(
                f"there is a token named {name!r} already; choose another name, or "
                f"`edgert token revoke {name}` first"
            ) from error
        return token

    def revoke(self, name: str) -> None:
        """Delete a token. A running daemon knows of it with its next reload.

        Raises:
            RequestError: there is none of that name.
            ConfigError: the database is damaged or belongs to another program.
        """
        with opened_state(self.path) as state:
            gone = state.execute("DELETE FROM tokens WHERE name = ?", (name,)).rowcount
        if not gone:
            raise RequestError(f"there is no token named {name!r}; `edgert token list` shows those there are")

    def mark_used(self, used: Mapping[int, float]) -> None:
        """Keep when tokens (by id) were used last (Unix time); those revoked meanwhile are passed over.

        Raises:
            ConfigError: the database is damaged or belongs to another program.
        """
        with opened_state(self.path) as state:
            state.executemany(
                "UPDATE tokens SET last_used = max(?, coalesce(last_used, 0)) WHERE id = ?",
                [(when, number) for number, when in used.items()],
            )


def check_name(name: str) -> None:
    """Refuse what cannot name a token.

    Raises:
        RequestError: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise RequestError(
            f"{name!r} is no token name; use letters, digits, '.', '_' and '-', at most 64, "
            "a letter or a digit first"
        )
    if name == LOCAL:
        raise RequestError(f"{LOCAL!r} stands for callers without a token; choose another name")


def _read_scopes(text: str) -> frozenset[Scope]:
    known = {scope.value: scope for scope in Scope}
    return frozenset(known[word] for word in text.split() if word in known)  # an unknown one allows nothing
