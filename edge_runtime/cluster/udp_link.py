"""The coordinator's end of the data plane over UDP: one socket for all workers of a model."""

from __future__ import annotations

import math
import os
from collections import deque
from time import perf_counter

from edge_runtime.cluster.datagram import (
    DATAGRAM_BYTES,
    LEAST_DATAGRAM_BYTES,
    MOST_DATAGRAM_BYTES,
    PING_BYTES,
    REFUSED,
    VALUE_UNIT,
    BadDatagramError,
    Kind,
    answer_values,
    fragment_size,
    input_room,
    mask_of,
    read_answer,
    request_bodies,
)
from edge_runtime.cluster.exchange import (
    ANSWER_FORMS,
    MAX_COPIES,
    Answer,
    Refusal,
    RefusalReason,
    TrafficCounts,
)
from edge_runtime.cluster.sealing import (
    HEADER,
    HEADER_BYTES,
    VERSION,
    Cipher,
    Direction,
    Opener,
    Sealer,
    UnauthenticError,
    preferred_cipher,
)
from edge_runtime.cluster.udp_socket import Address, UdpSocket
from edge_runtime.engine.activations import ActivationForm
from edge_runtime.errors import RequestError

_MOST_REFUSALS = 256
_HINT_SECONDS = 1.0  # between two of a worker that says, with no seal, that it knows no such session
_ANSWER, _NO_SESSION = int(Kind.ANSWER), int(Kind.NO_SESSION)  # comparing members is slower


class _Asked:
    """A request of the current step, and which fragments of its answer have come."""

    __slots__ = ("copies", "form", "inputs", "n_fragments", "n_rows", "n_values", "plan", "received", "size")

    def __init__(
        self, n_rows: int, inputs: bytes, plan: int, copies: int, form: ActivationForm, n_values: int
    ) -> None:
        self.n_rows = n_rows
        self.inputs = inputs
        self.plan = plan
        self.copies = copies
        self.form = form
        self.n_values = n_values  # 0: any number
        self.n_fragments = self.size = 0  # until the first has come
        self.received = 0


class _Worker:
    """What the link knows of a worker."""

    __slots__ = (
        "address",
        "asked",
        "counts",
        "hinted",
        "last_seen",
        "number",
        "opener",
        "ping",
        "pinged",
        "round_trip",
        "sealer",
        "session",
    )

    def __init__(self, number: int, address: Address, session: int, secret: bytes, cipher: Cipher) -> None:
        self.number = number
        self.address = address
        self.session = session
        self.sealer = Sealer(secret, session, Direction.TO_WORKER, cipher)
        self.opener = Opener(secret, session, Direction.TO_COORDINATOR, cipher)
        self.asked: dict[int, _Asked] = {}  # by layer; of the current step
        self.counts = TrafficCounts()
        self.round_trip = math.nan
        self.last_seen = -math.inf
        self.hinted = -math.inf
        self.ping = b""
        self.pinged = 0.0


class UdpLink:
    """A `Link` over datagrams. Workers may be added and removed from other threads; all else is one thread's.

    Args:
        host: address to send from; one with a colon takes IPv6 and IPv4.
        datagram_bytes: of UDP payload at most.
        cipher: None chooses what this processor is fast at.
        relaxed_form: how sums come back that need not be exact.

    Raises:
        ConfigError: the address cannot be bound.
        RequestError: a size out of range, a form that sums do not travel in.
    """

    def __init__(
        self,
        host: str = "0.0.0.0",
        port: int = 0,
        *,
        datagram_bytes: int = DATAGRAM_BYTES,
        cipher: Cipher | None = None,
        relaxed_form: ActivationForm = ActivationForm.Q8_0,
    ) -> None:
        if not LEAST_DATAGRAM_BYTES <= datagram_bytes <= MOST_DATAGRAM_BYTES:
            raise RequestError(
                f"datagrams of {datagram_bytes} bytes; possible are {LEAST_DATAGRAM_BYTES} to "
                f"{MOST_DATAGRAM_BYTES}"
            )
        if relaxed_form not in ANSWER_FORMS:
            raise RequestError(f"sums in {relaxed_form.name}; possible are F32, F16 and Q8_0")
        self._socket = UdpSocket(host, port)
        self.port = self._socket.port
        self._room = input_room(datagram_bytes)
        self._cipher = preferred_cipher() if cipher is None else cipher
        self._relaxed_form = relaxed_form
        self._workers: dict[int, _Worker] = {}
        self._sessions: dict[int, _Worker] = {}
        self._step = 0
        self._arrived: deque[memoryview] = deque()  # of one call of the system, so bounded by it
        self._refusals: deque[Refusal] = deque(maxlen=_MOST_REFUSALS)
        self.strange = 0  # datagrams of nobody known

    # --- workers ------------------------------------------------------------------------------

    def add_worker(self, worker: int, host: str, port: int, session: int, secret: bytes) -> None:
        """Talk to a worker from now on, instead of one with the same number.

        Args:
            session: its number at the worker; each worker of a link has another.
            secret: of the session, 32 bytes that no other session had.

        Raises:
            RequestError: a secret of another length, a session that another worker has.
            UnavailableError: the host is not known.
        """
        other = self._sessions.get(session)
        if other is not None and other.number != worker:
            raise RequestError(
                f"session {session} is that of worker {other.number}; worker {worker} needs another"
            )
        peer = _Worker(worker, self._socket.resolve(host, port), session, secret, self._cipher)
        self.remove_worker(worker)
        # New dictionaries, as the link's thread may be reading the old ones.
        self._workers = {**self._workers, worker: peer}
        self._sessions = {**self._sessions, session: peer}

    def remove_worker(self, worker: int) -> None:
        """Forget a worker; nothing happens if there is none of this number."""
        peer = self._workers.get(worker)
        if peer is not None:
            self._workers = {number: other for number, other in self._workers.items() if other is not peer}
            self._sessions = {number: other for number, other in self._sessions.items() if other is not peer}

    def _worker(self, worker: int) -> _Worker:
        peer = self._workers.get(worker)
        if peer is None:
            raise RequestError(f"worker {worker} is not one of this link's: {sorted(self._workers)}")
        return peer

    # --- asking -------------------------------------------------------------------------------

    def begin_step(self, step: int) -> None:
        """Forget what earlier steps asked for; steps only grow. Answers to them count as stale."""
        self._step = step
        for peer in self._workers.values():
            peer.asked.clear()

    def send(
        self,
        worker: int,
        step: int,
        layer: int,
        n_rows: int,
        inputs: bytes,
        *,
        plan: int,
        copies: int = 1,
        exact: bool = True,
        n_values: int = 0,
    ) -> None:
        """See `Link.send`."""
        peer = self._worker(worker)
        if step != self._step:
            raise RequestError(f"a request of step {step} in step {self._step}; begin_step comes first")
        form = ActivationForm.F32 if exact else self._relaxed_form
        bodies = request_bodies(step, layer, plan, n_rows, form, copies, inputs, self._room)
        peer.asked[layer] = _Asked(n_rows, inputs, plan, copies, form, n_values)
        self._send(peer, Kind.REQUEST, bodies, copies)

    def repeat(self, worker: int, step: int, layer: int, missing: int) -> None:
        """See `Link.repeat`. The inputs are sent again as well, as they may never have arrived."""
        peer = self._worker(worker)
        asked = peer.asked.get(layer)
        if asked is None or step != self._step:
            return
        bodies = request_bodies(
            step,
            layer,
            asked.plan,
            asked.n_rows,
            asked.form,
            asked.copies,
            asked.inputs,
            self._room,
            mask_of(missing),
        )
        peer.counts.repeats += 1
        self._send(peer, Kind.REQUEST, bodies, asked.copies)

    def _send(self, peer: _Worker, kind: Kind, bodies: list[bytes], copies: int = 1) -> None:
        seal = peer.sealer.seal
        datagrams = [seal(kind, body) for body in bodies]
        counts = peer.counts
        # A copy follows the whole burst: losses next to each other take one of the two rather than both.
        for _ in range(min(copies, MAX_COPIES)):
            sent = self._socket.send(datagrams, peer.address)
            counts.sent += sent
            counts.unsent += len(datagrams) - sent
            counts.sent_bytes += sum(map(len, datagrams)) if sent else 0

    def ping(self, worker: int) -> None:
        """See `Link.ping`."""
        peer = self._worker(worker)
        peer.ping = os.urandom(PING_BYTES)
        peer.pinged = perf_counter()
        self._send(peer, Kind.PING, [peer.ping])

    # --- receiving ----------------------------------------------------------------------------

    def receive(self, timeout: float) -> Answer | None:
        """See `Link.receive`."""
        arrived = self._arrived
        end = 0.0
        while True:
            refused = len(self._refusals)
            while arrived:
                answer = self._open(arrived.popleft())
                if answer is not None:
                    return answer
            if timeout > 0 and len(self._refusals) > refused:
                return None
            together = self._socket.receive(wait=False)
            if together is not None:
                arrived.extend(together[0])
                continue
            if timeout <= 0:
                return None
            now = perf_counter()
            if not end:
                end = now + timeout
            if now >= end or not self._socket.wait(end - now):
                return None

    def _open(self, datagram: memoryview) -> Answer | None:
        """The answer that a datagram holds; everything else is noted, or dropped and counted."""
        if len(datagram) < HEADER_BYTES:
            self.strange += 1
            return None
        version, kind, _, session, counter = HEADER.unpack_from(datagram)
        peer = self._sessions.get(session)
        if peer is None or version != VERSION:
            self.strange += 1
            return None
        counts = peer.counts
        if kind == _NO_SESSION:
            self._hint(peer)
            return None
        try:
            body = peer.opener.open(datagram, counter)
        except UnauthenticError:
            counts.forged += 1
            return None
        counts.received += 1
        counts.received_bytes += len(datagram)
        counts.expected = max(counts.expected, counter)  # counters begin with 1
        if body is None:
            counts.duplicates += 1
            return None
        peer.last_seen = perf_counter()
        try:
            if kind == _ANSWER:
                return self._answer(peer, body)
            if kind == Kind.PONG:
                self._pong(peer, body)
            elif kind == Kind.REFUSED:
                self._refused(peer, body)
            else:
                counts.bad += 1
        except BadDatagramError:
            counts.bad += 1
        return None

    def _answer(self, peer: _Worker, body: bytes) -> Answer | None:
        step, layer, _, total, fragment, n_fragments, took, n_rows, form = read_answer(body)
        if step != self._step:
            peer.counts.stale += 1
            return None
        asked = peer.asked.get(layer)
        if asked is None or n_rows != asked.n_rows or form != asked.form:
            raise BadDatagramError
        size = asked.size
        if not size and total == (asked.n_values or total) and total % n_rows == 0:
            size = fragment_size(total, n_fragments, VALUE_UNIT)
        elif n_fragments != asked.n_fragments or total != asked.n_values:
            raise BadDatagramError  # of a wrong shape, or not of one answer
        bit = 1 << fragment
        if asked.received & bit:
            peer.counts.duplicates += 1
            return None
        first, values = answer_values(body, total, fragment, size, form)
        if not asked.size:
            asked.size, asked.n_values, asked.n_fragments = size, total, n_fragments
        asked.received |= bit
        return Answer(peer.number, step, layer, first, values, fragment, n_fragments, took * 1e-6, total)

    def _pong(self, peer: _Worker, body: bytes) -> None:
        if body != peer.ping:
            peer.counts.stale += 1
            return
        peer.round_trip = peer.last_seen - peer.pinged
        peer.ping = b""

    def _refused(self, peer: _Worker, body: bytes) -> None:
        if len(body) != REFUSED.size:
            raise BadDatagramError
        step, layer, _, reason = REFUSED.unpack(body)
        if step != self._step:
            peer.counts.stale += 1
            return
        if layer not in peer.asked or reason not in RefusalReason.__members__.values():
            raise BadDatagramError
        peer.counts.refusals += 1
        self._refusals.append(Refusal(peer.number, step, layer, RefusalReason(reason)))

    def _hint(self, peer: _Worker) -> None:
        # Anyone can send these, so they come seldom and prove nothing.
        now = perf_counter()
        if now - peer.hinted >= _HINT_SECONDS:
            peer.hinted = now
            self._refusals.append(Refusal(peer.number, self._step, -1, RefusalReason.SESSION))

    # --- what is known ------------------------------------------------------------------------

    def take_refusals(self) -> list[Refusal]:
        """See `Link.take_refusals`."""
        refusals = list(self._refusals)
        self._refusals.clear()
        return refusals

    def round_trips(self, worker: int) -> float:
        """See `Link.round_trips`."""
        return self._worker(worker).round_trip

    def last_seen(self, worker: int) -> float:
        """See `Link.last_seen`."""
        return self._worker(worker).last_seen

    def statistics(self, worker: int) -> TrafficCounts:
        """See `Link.statistics`."""
        return self._worker(worker).counts

    def close(self) -> None:
        """Free the socket; safe to call twice."""
        self._arrived.clear()
        self._socket.close()
