"""The table of members and invitations: who may take part, where they are, and who was invited.

Names are never given twice: a certificate carries its device's name, and one that was revoked, or left,
must not come to mean a later device. So those rows stay, marked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from sqlite3 import Connection

from edge_runtime.addresses import split_address
from edge_runtime.cluster.identity import MAX_NAME, check_name
from edge_runtime.database import Schema, opened
from edge_runtime.errors import OverloadedError, RequestError, UnauthenticatedError

MAX_MEMBERS = 1024
MAX_ROWS = 16_384  # with those that left
MAX_OPEN_INVITATIONS = 64
MAX_ADDRESS = 262  # a host name of 253 characters, brackets, colon, port
SEEN_SECONDS = 60.0  # last_seen is not written more often than this: each write waits for the disk
_FORGET_INVITATIONS_SECONDS = 7 * 86_400.0

_COLUMNS = "name, address, joined, last_seen, revoked, is_founder"
_SCHEMA = Schema(
    name="cluster",
    application_id=0x45444743,  # "EDGC"
    migrations=(
        (
            "members",
            (
                """
                CREATE TABLE members (
                    name TEXT PRIMARY KEY,
                    address TEXT NOT NULL,
                    joined REAL NOT NULL,
                    last_seen REAL,
                    revoked REAL,
                    is_founder INTEGER NOT NULL DEFAULT 0,
                    public_key BLOB
                ) STRICT
                """,
                """
                CREATE TABLE invitations (
                    id TEXT PRIMARY KEY,
                    created REAL NOT NULL,
                    expires REAL NOT NULL,
                    used_by TEXT
                ) STRICT
                """,
            ),
        ),
    ),
    remedy="join the cluster again",
)


class Standing(Enum):
    """What the table says of a name."""

    MEMBER = "member"
    REVOKED = "revoked"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Member:
    """A device of the cluster.

    Attributes:
        address: HOST:PORT of its Cluster service.
        joined, last_seen, revoked: Unix time in seconds by this device's clock; None for never.
        is_founder: whether it holds the authority's key.
    """

    name: str
    address: str
    joined: float
    last_seen: float | None = None
    revoked: float | None = None
    is_founder: bool = False


class Members:
    """The table in a database, for the daemon and the command line at the same time; from any thread.

    Args:
        path: the database; made where it is missing.
        clock: Unix time in seconds.

    Raises:
        ConfigError: (from every method) the database is damaged, another program's or cannot be used.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._clock = clock

    def everyone(self) -> list[Member]:
        """Every row by name, revoked ones too; none, and nothing is made, where there is no database."""
        if not self.path.exists():
            return []
        with opened(self.path, _SCHEMA) as table:
            rows = table.execute(f"SELECT {_COLUMNS} FROM members ORDER BY name").fetchall()
        return [
            Member(name, address, joined, last_seen, revoked, bool(is_founder))
            for name, address, joined, last_seen, revoked, is_founder in rows
        ]

    def active(self) -> list[Member]:
        """Those that take part, by name."""
        return [member for member in self.everyone() if member.revoked is None]

    def find(self, name: str) -> Member | None:
        """One row."""
        return next((member for member in self.everyone() if member.name == name), None)

    def founder(self) -> Member | None:
        """The member that holds the authority's key."""
        return next((member for member in self.active() if member.is_founder), None)

    def standing(self, name: str) -> Standing:
        """Whether a name takes part."""
        with opened(self.path, _SCHEMA) as table:
            row = table.execute("SELECT revoked FROM members WHERE name = ?", (name,)).fetchone()
        if row is None:
            return Standing.UNKNOWN
        return Standing.MEMBER if row[0] is None else Standing.REVOKED

    def revoked_among(self, names: Iterable[str]) -> set[str]:
        """Those of a few names that do not take part (any more)."""
        wanted = set(names)
        active = {member.name for member in self.active()} if wanted else set()
        return wanted - active

    def add_founder(self, name: str, address: str) -> None:
        """Enter the device that founds the cluster, or its new address.

        Raises:
            RequestError: the name or the address cannot be one.
        """
        check_name(name)
        check_address(address)
        with opened(self.path, _SCHEMA) as table:
            table.execute(
                "INSERT INTO members (name, address, joined, is_founder) VALUES (?, ?, ?, 1) "
                "ON CONFLICT (name) DO UPDATE SET address = excluded.address",
                (name, address, self._clock()),
            )

    def invite(self, identifier: str, expires: float) -> None:
        """Enter an invitation; those that ended long ago are forgotten.

        Raises:
            OverloadedError: too many are open.
        """
        now = self._clock()
        with opened(self.path, _SCHEMA) as table:
            table.execute("BEGIN IMMEDIATE")
            table.execute("DELETE FROM invitations WHERE expires < ?", (now - _FORGET_INVITATIONS_SECONDS,))
            (waiting,) = table.execute(
                "SELECT count(*) FROM invitations WHERE used_by IS NULL AND expires >= ?", (now,)
            ).fetchone()
            if waiting >= MAX_OPEN_INVITATIONS:
                raise OverloadedError(
                    f"{waiting} invitations are open; let one be used or expire before making another", 60.0
                )
            table.execute(
                "INSERT INTO invitations (id, created, expires) VALUES (?, ?, ?)", (identifier, now, expires)
            )

    def accept(self, identifier: str, wish: str, address: str, public_key: bytes) -> str:
        """Use an invitation: the device becomes a member. The name that it got is on the disk on return.

        A device that did not get the answer may ask again with the same key, and gets the same name.

        Args:
            identifier: the invitation's.
            wish: name that the device would like.
            address: HOST:PORT of its Cluster service.
            public_key: its key, as bytes that stand for it alone.

        Raises:
            UnauthenticatedError: the invitation is unknown, expired, or another device's by now.
            RequestError: the name or the address cannot be one, or the cluster is full.
        """
        check_name(wish)
        check_address(address)
        now = self._clock()
        with opened(self.path, _SCHEMA) as table:
            table.execute("BEGIN IMMEDIATE")  # two devices may hold the same invitation
            row = table.execute(
                "SELECT expires, used_by FROM invitations WHERE id = ?", (identifier,)
            ).fetchone()
            if row is None:
                raise UnauthenticatedError(
                    "this invitation is unknown here; make a new one with `edgert cluster invite`"
                )
            expires, used_by = row
            if used_by is not None:
                return _same_device(table, used_by, address, public_key)
            if now >= expires:
                raise UnauthenticatedError(
                    f"this invitation expired {_span_text(now - expires)} ago; make a new one with "
                    "`edgert cluster invite`"
                )
            name = _free_name(table, wish)
            table.execute(
                "INSERT INTO members (name, address, joined, last_seen, public_key) VALUES (?, ?, ?, ?, ?)",
                (name, address, now, now, public_key),
            )
            table.execute("UPDATE invitations SET used_by = ? WHERE id = ?", (name, identifier))
        return name

    def seen(self, name: str, address: str | None = None) -> None:
        """A member gave a sign of life, from its address. Writes seldom.

        Raises:
            RequestError: the address cannot be one.
        """
        if address is not None:
            check_address(address)
        now = self._clock()
        known = self.find(name)
        if known is None or known.revoked is not None:
            return
        is_recent = known.last_seen is not None and abs(now - known.last_seen) < SEEN_SECONDS
        if is_recent and address in (None, known.address):
            return
        with opened(self.path, _SCHEMA) as table:
            table.execute(
                "UPDATE members SET last_seen = ?, address = coalesce(?, address) "
                "WHERE name = ? AND revoked IS NULL",
                (now, address, name),
            )

    def learn(self, founder: str, found: Iterable[tuple[str, str]]) -> None:
        """Take over the founder's list: who is new, who moved, and who does not take part any more.

        Args:
            founder: name of the member that the list is from.
            found: names and addresses of all members, the founder among them.

        Raises:
            RequestError: a name or an address cannot be one, or there are too many.
        """
        listed = dict(found)
        if len(listed) > MAX_MEMBERS:
            raise RequestError(f"{founder} lists {len(listed)} members; possible are {MAX_MEMBERS}")
        for name, address in listed.items():
            check_name(name)
            check_address(address)
        now = self._clock()
        known = {member.name: member for member in self.everyone()}
        if (
            all(name in known and known[name].address == address for name, address in listed.items())
            and all(member.revoked is not None or name in listed for name, member in known.items())
            and founder in known
            and known[founder].is_founder
        ):
            return
        with opened(self.path, _SCHEMA) as table:
            table.executemany(
                "INSERT INTO members (name, address, joined, is_founder) VALUES (?, ?, ?, ?) "
                "ON CONFLICT (name) DO UPDATE SET address = excluded.address, "
                "is_founder = excluded.is_founder",
                [(name, address, now, name == founder) for name, address in listed.items()],
            )
            gone = [(now, name) for name in known if name not in listed]
            table.executemany("UPDATE members SET revoked = ? WHERE name = ? AND revoked IS NULL", gone)

    def revoke(self, name: str) -> None:
        """Take a member out; from now on its calls are refused here.

        Raises:
            RequestError: there is none of that name.
        """
        with opened(self.path, _SCHEMA) as table:
            gone = table.execute(
                "UPDATE members SET revoked = ? WHERE name = ? AND revoked IS NULL", (self._clock(), name)
            ).rowcount
        if not gone:
            raise RequestError(
                f"there is no member named {name!r}; `edgert cluster status` shows those there are"
            )


def check_address(address: str) -> str:
    """``HOST:PORT`` of a service that can be reached, as a peer or a person wrote it.

    Raises:
        RequestError: it is none, or its port is 0.
    """
    try:
        if len(address) > MAX_ADDRESS or not address.isascii() or not address.isprintable():
            raise ValueError(f"needed is HOST:PORT in at most {MAX_ADDRESS} characters")
        _, port = split_address(address)
        if port == 0:
            raise ValueError("its port must not be 0")
    except ValueError as error:
        raise RequestError(f"{address[:80]!r} is no address of a device; {error}") from error
    return address


def _same_device(table: Connection, used_by: str, address: str, public_key: bytes) -> str:
    row = table.execute("SELECT public_key, revoked FROM members WHERE name = ?", (used_by,)).fetchone()
    if row is None or row[0] != public_key or row[1] is not None:
        raise UnauthenticatedError(
            f"this invitation was used already, by {used_by}; each serves once: make a new one with "
            "`edgert cluster invite`"
        )
    table.execute("UPDATE members SET address = ? WHERE name = ?", (address, used_by))
    return used_by


def _free_name(table: Connection, wish: str) -> str:
    rows = table.execute("SELECT name, revoked FROM members").fetchall()
    active = sum(1 for _, revoked in rows if revoked is None)
    if active >= MAX_MEMBERS or len(rows) >= MAX_ROWS:
        raise RequestError(
            f"the cluster is full: {active} members of {MAX_MEMBERS}, {len(rows)} names ever of {MAX_ROWS}"
        )
    taken = {name for name, _ in rows}
    name, number = wish, 1
    while name in taken:
        number += 1
        suffix = f"-{number}"
        name = wish[: MAX_NAME - len(suffix)].rstrip("-") + suffix
    return name


def _span_text(seconds: float) -> str:
    """20 s, 5 min, 3 h, 2 days."""
    for size, unit in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
