"""The worker's end of the data plane over UDP: one thread that receives, computes and answers.

Between datagrams the same thread runs what others post to it, so that all computing is one thread's.
"""

from __future__ import annotations

import hashlib
import logging
import math
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from time import perf_counter
from typing import Any, TypeVar

import numpy as np

from edge_runtime.cluster.datagram import (
    DATAGRAM_BYTES,
    LEAST_DATAGRAM_BYTES,
    MOST_DATAGRAM_BYTES,
    PING_BYTES,
    REFUSED,
    BadDatagramError,
    Kind,
    answer_bodies,
    chosen,
    read_request,
)
from edge_runtime.cluster.exchange import Compute, Floats, RefusalReason, RefusedError, TrafficCounts
from edge_runtime.cluster.sealing import HEADER, HEADER_BYTES, VERSION, UnauthenticError
from edge_runtime.cluster.udp_socket import Address, UdpSocket
from edge_runtime.cluster.worker_session import Kept, Request, WorkerSession
from edge_runtime.errors import OverloadedError, RequestError, UnavailableError

Result = TypeVar("Result")

_log = logging.getLogger("edgert.cluster")

MOST_SESSIONS = 64
MOST_POSTED = 64
_MOST_RETIRED = 4096  # secrets that are remembered, so that none serves twice
_DRAINED = 256  # reads between two computations: a flood must not keep the thread from computing
_WAIT_SECONDS = 0.5  # in case a wake-up is lost
_HINT_SECONDS = 0.1  # between two answers to sessions that nobody knows
_LOG_SECONDS = 1.0
_STOP_SECONDS = 10.0


class UdpWorker:
    """Answers the requests of its sessions. Its thread runs from the start; `stop` ends it.

    Args:
        host, port: address to bind; port 0 takes a free one, a host with a colon takes IPv6 and IPv4.
        compute: called in the thread; see `exchange.Compute`.
        datagram_bytes: of UDP payload at most.

    Attributes:
        port: that it is bound to.
        compute: as given; for what is posted, not for other threads.
        strange: datagrams of no known session.

    Raises:
        ConfigError: the address cannot be bound.
        RequestError: a size out of range.
    """

    def __init__(
        self, host: str, port: int, compute: Compute, *, datagram_bytes: int = DATAGRAM_BYTES
    ) -> None:
        if not LEAST_DATAGRAM_BYTES <= datagram_bytes <= MOST_DATAGRAM_BYTES:
            raise RequestError(
                f"datagrams of {datagram_bytes} bytes; possible are {LEAST_DATAGRAM_BYTES} to "
                f"{MOST_DATAGRAM_BYTES}"
            )
        self._socket = UdpSocket(host, port, wait_seconds=_WAIT_SECONDS)
        self.port = self._socket.port
        self.strange = 0
        self.compute = compute
        self._datagram_bytes = datagram_bytes
        self._lock = threading.Lock()  # of those who add and remove; the thread reads whole dictionaries
        self._sessions: dict[int, WorkerSession] = {}
        self._retired: OrderedDict[bytes, None] = OrderedDict()
        self._turns: deque[WorkerSession] = deque()  # sessions with work, who waits longest first
        self._posted: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._hinted = -math.inf
        self._logged = -math.inf
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="edgert-worker", daemon=True)
        self._thread.start()

    # --- for other threads --------------------------------------------------------------------

    def add_session(self, session: int, secret: bytes, peer: str) -> None:
        """Answer a coordinator's datagrams; nothing changes if the session is known with this secret.

        Args:
            session: its number; one of another coordinator's is refused.
            secret: 32 bytes that no session had before.
            peer: the coordinator's name; it may replace its own session by one of the same number.

        Raises:
            RequestError: a number that is taken, a secret used before or of a wrong length.
            OverloadedError: too many sessions.
        """
        digest = hashlib.sha256(secret).digest()
        with self._lock:
            known = self._sessions.get(session)
            if known is not None and known.peer != peer:
                raise RequestError(f"session {session} is another coordinator's; choose another number")
            if known is not None and known.has_secret(secret):
                return
            if digest in self._retired:
                raise RequestError("the secret served a session before; each session needs a new one")
            if known is None and len(self._sessions) >= MOST_SESSIONS:
                raise OverloadedError(f"{MOST_SESSIONS} sessions are open, the most there may be", 5.0)
            added = WorkerSession(session, secret, peer)
            self._retired[digest] = None
            if len(self._retired) > _MOST_RETIRED:
                self._retired.popitem(last=False)
            if known is not None:
                known.is_open = False
            self._sessions = {**self._sessions, session: added}

    def remove_session(self, session: int) -> None:
        """Answer no more of its datagrams; nothing happens if there is no such session."""
        with self._lock:
            known = self._sessions.get(session)
            if known is not None:
                known.is_open = False
                self._sessions = {n: other for n, other in self._sessions.items() if n != session}

    def statistics(self, session: int) -> TrafficCounts:
        """Traffic of a session so far; live.

        Raises:
            RequestError: there is no such session.
        """
        known = self._sessions.get(session)
        if known is None:
            raise RequestError(f"no session {session}")
        return known.counts

    def post(self, call: Callable[[], Result]) -> Future[Result]:
        """Run something in the thread, between datagrams.

        Raises:
            OverloadedError: too much waits.
            UnavailableError: the worker was stopped.
        """
        future: Future[Result] = Future()
        with self._lock:
            if self._stopping:
                raise UnavailableError("the worker has stopped")
            if len(self._posted) >= MOST_POSTED:
                raise OverloadedError(f"{MOST_POSTED} computations wait, the most there may be", 0.5)
            self._posted.append((future, call))
        self._socket.wake()
        return future

    def log_failure(self, session: int, layer: int) -> None:
        """Log the exception that is being handled, seldom: who asks often must not fill the disk."""
        now = perf_counter()
        if now - self._logged >= _LOG_SECONDS:
            self._logged = now
            _log.exception("layer %d of session %d could not be computed", layer, session)

    def stop(self) -> None:
        """End the thread after what it computes; safe to call twice."""
        with self._lock:
            self._stopping = True
        self._socket.wake()
        if threading.current_thread() is not self._thread:
            self._thread.join(_STOP_SECONDS)

    # --- the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._read(wait=not self._turns and not self._posted)
                if self._turns:
                    self._work(self._turns.popleft())
                if self._posted:
                    self._run_posted()
        finally:
            with self._lock:
                self._stopping = True
                rest = [future for future, _ in self._posted]
                self._posted.clear()
            for future in rest:
                if future.set_running_or_notify_cancel():
                    future.set_exception(UnavailableError("the worker has stopped"))
            self._socket.close()

    def _read(self, *, wait: bool) -> None:
        """Take in what has come; with `wait` at least one read's worth."""
        for _ in range(_DRAINED):
            together = self._socket.receive(wait=wait)
            if together is None:
                return
            wait = False
            datagrams, address = together
            for datagram in datagrams:
                try:
                    self._take_in(datagram, address)
                except Exception:
                    # Whatever a peer finds to send, the others are served on.
                    self.log_failure(-1, -1)

    def _run_posted(self) -> None:
        future, call = self._posted.popleft()
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(call())
        except BaseException as error:  # it belongs to whoever waits for the result
            future.set_exception(error)

    # --- receiving ----------------------------------------------------------------------------

    def _take_in(self, datagram: memoryview, address: Address) -> None:
        if len(datagram) < HEADER_BYTES:
            self.strange += len(datagram) > 0  # an empty one is a wake-up
            return
        version, kind, cipher, number, counter = HEADER.unpack_from(datagram)
        session = self._sessions.get(number)
        if session is None or version != VERSION:
            self._refuse_stranger(version, kind, number, address)
            return
        counts = session.counts
        try:
            opener = session.keys(cipher)[0]
            body = opener.open(datagram, counter)
        except (UnauthenticError, BadDatagramError):
            counts.forged += 1
            return
        counts.received += 1
        counts.received_bytes += len(datagram)
        if body is None:
            counts.duplicates += 1
            return
        if counter == opener.newest:
            session.heard(cipher, address)
        try:
            if kind == Kind.REQUEST:
                self._request(session, body)
            elif kind == Kind.PING and len(body) == PING_BYTES:
                self._send(session, session.seal(Kind.PONG, [body]))
            else:
                counts.bad += 1
        except BadDatagramError:
            counts.bad += 1

    def _refuse_stranger(self, version: int, kind: int, number: int, address: Address) -> None:
        """Tell a coordinator that this worker has restarted; shorter than the request, and seldom."""
        self.strange += 1
        now = perf_counter()
        if version == VERSION and kind in (Kind.REQUEST, Kind.PING) and now - self._hinted > _HINT_SECONDS:
            self._hinted = now
            self._socket.send([HEADER.pack(VERSION, Kind.NO_SESSION, 0, number, 0)], address)

    def _request(self, session: WorkerSession, body: bytes) -> None:
        fields = read_request(body)
        step, layer, plan, missing = fields[0], fields[1], fields[2], fields[9]
        if step < session.step:
            session.counts.stale += 1
            return
        if step > session.step:
            session.begin_step(step)
        kept = session.kept(layer)
        if kept is not None:
            self._again(session, step, layer, plan, kept, missing, fields[4] == 0)
            return
        complete = session.take_in(fields)
        if complete is None:
            self._refuse(session, step, layer, plan, RefusalReason.BUSY)
        elif complete and session not in self._turns:
            self._turns.append(session)

    def _again(
        self, session: WorkerSession, step: int, layer: int, plan: int, kept: Kept, missing: int, first: bool
    ) -> None:
        """Give an answer again, if that was asked for: once for each request, whose fragments all ask."""
        if not missing or not first:
            session.counts.duplicates += not missing
            return
        if not kept.bodies:
            self._refuse(session, step, layer, plan, RefusalReason.FORGOTTEN)
            return
        bodies = list(chosen(kept.bodies, missing))
        if bodies:
            session.counts.repeats += 1
            self._send(session, session.seal(Kind.ANSWER, bodies), kept.copies)

    # --- computing and answering --------------------------------------------------------------

    def _work(self, session: WorkerSession) -> None:
        """Compute and answer the next request of a session; others that wait come before its next."""
        if not session.is_open or not session.has_work:
            return
        request = session.next_request()
        try:
            bodies = self._answer(session, request)
        except RefusedError as refusal:
            self._refuse(session, request.step, request.layer, request.plan, refusal.reason)
        except Exception:
            self.log_failure(session.number, request.layer)
            self._refuse(session, request.step, request.layer, request.plan, RefusalReason.FAILED)
        else:
            kept = Kept(bodies, request.form, request.copies)
            session.keep(request.layer, kept)
            self._send(session, session.seal(Kind.ANSWER, bodies), request.copies)
        if session.has_work:
            self._turns.append(session)

    def _answer(self, session: WorkerSession, request: Request) -> list[bytes]:
        started = perf_counter()
        sums = self.compute(
            session.number, request.plan, request.layer, request.n_rows, memoryview(request.content)
        )
        took = round((perf_counter() - started) * 1e6)
        check_sums(sums, request.n_rows)
        return answer_bodies(
            request.step, request.layer, request.plan, request.form, sums, took, self._datagram_bytes
        )

    def _refuse(
        self, session: WorkerSession, step: int, layer: int, plan: int, reason: RefusalReason
    ) -> None:
        session.counts.refusals += 1
        self._send(session, session.seal(Kind.REFUSED, [REFUSED.pack(step, layer, plan, reason)]))

    def _send(self, session: WorkerSession, datagrams: list[bytes], copies: int = 1) -> None:
        if session.address is None:
            return
        counts = session.counts
        for _ in range(copies):
            sent = self._socket.send(datagrams, session.address)
            counts.sent += sent
            counts.unsent += len(datagrams) - sent
            counts.sent_bytes += sum(map(len, datagrams)) if sent else 0


def check_sums(sums: Floats, n_rows: int) -> None:
    """Refuse what a `Compute` must not return.

    Raises:
        RefusedError: not (n_rows, n_out) float32.
    """
    if sums.dtype != np.float32 or sums.ndim != 2 or len(sums) != n_rows:
        raise RefusedError(
            RefusalReason.FAILED,
            f"computed were {sums.dtype} {sums.shape}; needed are {n_rows} rows of float32",
        )
