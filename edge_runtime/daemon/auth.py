"""Who may do what: tokens are compared in constant time, and whoever fails too often has to wait."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from edge_runtime.errors import ForbiddenError, OverloadedError, UnauthenticatedError

if TYPE_CHECKING:
    from edge_runtime.daemon.tokens import TokenStore

TOKEN_PREFIX = "edgert_"  # so that people, and programs that look for leaked secrets, recognize one
LOCAL = "local"  # the name of callers without a token, where none is needed
MAX_TOKEN_CHARACTERS = 256  # ours have 50; a longer text is wrong without being hashed

_log = logging.getLogger(__name__)


class Scope(StrEnum):
    """What a token allows. ``admin`` includes the others."""

    INFER = "infer"
    PERSONALIZE = "personalize"
    ADMIN = "admin"


ALL_SCOPES = frozenset(Scope)


def granted(scopes: Iterable[Scope]) -> frozenset[Scope]:
    """All that these scopes allow."""
    given = frozenset(scopes)
    return ALL_SCOPES if Scope.ADMIN in given else given


@dataclass(frozen=True, slots=True)
class Identity:
    """A caller: the name of its token, or ``local``, and everything it may do."""

    name: str
    scopes: frozenset[Scope]


def digest_of(token: str) -> bytes:
    """What is kept of a token: 32 bytes.

    One round of SHA-256 is enough: a token is 256 random bits, so nobody can try them all, and the slow
    hashes that protect chosen passwords would only let strangers burn this device's time.
    """
    return hashlib.sha256(token.encode("utf-8", "replace")).digest()


def bearer_token(header: str | None) -> str | None:
    """The token in the value of an ``authorization`` header; None without a header.

    A header of another kind gives an empty token, which is always wrong.
    """
    if header is None:
        return None
    kind, _, token = header.strip().partition(" ")
    return token.strip() if kind.lower() == "bearer" else ""


class FailureLimit:
    """A bucket of permitted failures for each address, which refills evenly.

    Args:
        most: failures in a row until an address has to wait.
        seconds: after which an empty bucket is full again.
        addresses: kept at most; the one that failed longest ago is forgotten.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        most: int = 10,
        seconds: float = 60.0,
        addresses: int = 4096,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most = most
        self._rate = most / seconds  # permitted failures a second
        self._addresses = addresses
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # failures left, at this time

    def __len__(self) -> int:
        return len(self._buckets)

    def failed(self, address: str) -> float:
        """Count a failure; returns 0, or how many seconds the address has to wait."""
        source = source_of(address)
        now = self._clock()
        left, at = self._buckets.pop(source, (float(self._most), now))
        left = min(float(self._most), left + (now - at) * self._rate)
        wait = 0.0 if left >= 1 else (1 - left) / self._rate
        self._buckets[source] = (left if wait else left - 1, now)
        while len(self._buckets) > self._addresses:
            self._buckets.popitem(last=False)
        return wait


def source_of(address: str) -> str:
    """Whom an address belongs to, for counting: an IPv4 host, or an IPv6 network of 64 bits.

    One device has a whole such network to itself and could use a new address for each try. The ports that
    gRPC writes (``ipv4:10.0.0.7:4711``, ``ipv6:%5B::1%5D:4711``) do not count either.
    """
    host = address.strip()
    if host.startswith(("ipv4:", "ipv6:")):
        host = host[5:].rpartition(":")[0].replace("%5B", "").replace("%5D", "").strip("[]")
    try:
        parsed = ipaddress.ip_address(host)
    except ValueError:
        return host[:64]
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.IPv6Network((int(parsed), 64), strict=False))
    return host


class Gate:
    """Lets callers in. Every method may be called from any thread; none waits for the disk but
    :meth:`reload` and :meth:`flush`.

    Args:
        tokens: where the tokens are kept; read now and with each :meth:`reload`.
        require_token: whether callers without a token are refused. Otherwise they may do everything.
        limit: of failures.
        clock: Unix time in seconds, for expiry.
    """

    def __init__(
        self,
        tokens: TokenStore,
        *,
        require_token: bool,
        limit: FailureLimit | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._tokens = tokens
        self._require_token = require_token
        self._limit = FailureLimit() if limit is None else limit
        self._clock = clock
        self._lock = threading.Lock()
        self._used: dict[int, float] = {}  # token's number -> Unix time, not yet written
        self._rows = tuple(tokens)

    def reload(self) -> None:
        """Read the tokens again. If that fails, those known before stay valid.

        Raises:
            ConfigError: the database is damaged or belongs to another program.
        """
        self._rows = tuple(self._tokens)

    def admit(self, token: str | None, address: str, scope: Scope) -> Identity:
        """Who calls, if they may.

        A right token is let in however many wrong ones came from its address: otherwise anybody behind the
        same router could lock out its owner. Beyond the limit, wrong ones get another answer and are not
        logged any more; guessing needs no further limit, as there are 2**256 tokens.

        Args:
            token: what the caller sent; None if nothing, which is never counted as a failure.
            address: of the caller, as an IP address or as gRPC writes peers.
            scope: what the call needs.

        Raises:
            UnauthenticatedError: no token where one is needed, or one that is wrong, revoked or expired.
            ForbiddenError: the token lacks the scope.
            OverloadedError: too many wrong tokens came from this address.
        """
        # Where none is needed, clients that insist on sending some key are let in, too. One of ours is
        # checked all the same: who sends it wants to know whether it works.
        if token is None or (not self._require_token and not token.startswith(TOKEN_PREFIX)):
            if self._require_token:
                raise UnauthenticatedError(
                    "this daemon needs a token (authorization: Bearer ...); `edgert token create` on the "
                    "daemon's device makes one"
                )
            return Identity(LOCAL, ALL_SCOPES)
        identity = self._identify(token, address)
        if scope not in identity.scopes:
            has = ", ".join(sorted(identity.scopes)) or "none"
            raise ForbiddenError(
                f"the token {identity.name!r} lacks the scope {scope.value!r} (it has: {has}); "
                f"`edgert token create NAME --scope {scope.value}` makes one that has it"
            )
        return identity

    def flush(self) -> None:
        """Write when each token was used last; call it every few minutes, off the event loop, and at the end.

        Raises:
            ConfigError: the database is damaged or belongs to another program.
        """
        with self._lock:
            used, self._used = self._used, {}
        if used:
            self._tokens.mark_used(used)

    def _identify(self, token: str, address: str) -> Identity:
        found = None
        if 0 < len(token) <= MAX_TOKEN_CHARACTERS:
            digest = digest_of(token)
            for row in self._rows:  # all of them, so that the time tells nothing
                if hmac.compare_digest(row.digest, digest):
                    found = row
        now = self._clock()
        if found is not None and (found.expires is None or now < found.expires):
            with self._lock:
                self._used[found.id] = now
            return Identity(found.name, granted(found.scopes))
        with self._lock:
            wait = self._limit.failed(address)
        if wait:
            raise OverloadedError(
                f"too many wrong tokens from this address; try again in {wait:.0f} s", max(1.0, wait)
            )
        fault = "is unknown or was revoked" if found is None else "has expired"
        _log.warning("refused a token from %s: it %s", source_of(address), fault)
        raise UnauthenticatedError(
            f"the token {fault}; `edgert token create` on the daemon's device makes one"
        )
