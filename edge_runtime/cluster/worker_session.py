"""What a worker keeps of one coordinator's session: the step in progress, its requests and its answers."""

from __future__ import annotations

import heapq

from edge_runtime.cluster.datagram import INPUT_UNIT, BadDatagramError, RequestFields, fragment_size
from edge_runtime.cluster.exchange import TrafficCounts
from edge_runtime.cluster.sealing import Cipher, Direction, Opener, Sealer
from edge_runtime.cluster.udp_socket import Address
from edge_runtime.engine.activations import ActivationForm

MOST_WAITING_BYTES = 8 << 20  # inputs of a session that wait or are not complete
MOST_KEPT_BYTES = 32 << 20  # answers of a step that are kept for repeats


class Request:
    """A layer's request, as far as its fragments have come."""

    __slots__ = ("content", "copies", "form", "layer", "missing", "n_fragments", "n_rows", "plan", "step")

    def __init__(self, fields: RequestFields) -> None:
        self.step, self.layer, self.plan, total, _, n_fragments, self.n_rows, self.form, self.copies = fields[
            :9
        ]
        self.n_fragments = n_fragments
        self.content: bytearray | memoryview = bytearray(total if n_fragments > 1 else 0)
        self.missing = (1 << n_fragments) - 1

    def add(self, fields: RequestFields) -> bool:
        """Take in a fragment; whether the request is complete by it.

        Raises:
            BadDatagramError: a fragment of another request with the same step and layer.
        """
        _, _, plan, total, fragment, n_fragments, n_rows, form, _, _, part = fields
        if n_fragments == 1 == self.n_fragments and self.missing:
            self.content = part
            self.missing = 0
            return True
        same = (plan, n_fragments, n_rows, form) == (self.plan, self.n_fragments, self.n_rows, self.form)
        if not same or total != len(self.content):
            raise BadDatagramError
        bit = 1 << fragment
        if not self.missing & bit:
            return False
        start = fragment * fragment_size(total, n_fragments, INPUT_UNIT)
        self.content[start : start + len(part)] = part
        self.missing &= ~bit
        return not self.missing


class Kept:
    """An answer as it was given, without its seal; `bodies` is empty once it was forgotten."""

    __slots__ = ("bodies", "copies", "form", "n_bytes")

    def __init__(self, bodies: list[bytes], form: ActivationForm, copies: int) -> None:
        self.bodies = bodies
        self.form = form
        self.copies = copies
        self.n_bytes = sum(map(len, bodies))


class WorkerSession:
    """One session; used by the worker's thread alone.

    Args:
        number: of the session.
        peer: name of the coordinator, for people.

    Attributes:
        address: where its last new datagram came from.
        step: the newest seen; what came before it is over.
        counts: traffic.
    """

    def __init__(self, number: int, secret: bytes, peer: str) -> None:
        self.number = number
        self.peer = peer
        self.address: Address | None = None
        self.step = -1
        self.counts = TrafficCounts()
        self.is_open = True
        self._secret = secret
        self._keys: dict[int, tuple[Opener, Sealer]] = {}
        self._cipher = 0
        self._requests: dict[int, Request] = {}  # by layer, until computed
        self._complete: list[int] = []  # heap of their layers
        self._waiting_bytes = 0
        self._kept: dict[int, Kept] = {}  # by layer, the oldest first
        self._kept_bytes = 0
        self.keys(Cipher.AES_GCM)  # refuses a wrong secret here rather than in the worker's thread

    def has_secret(self, secret: bytes) -> bool:
        """Whether this is the session's secret."""
        return secret == self._secret

    # --- keys ---------------------------------------------------------------------------------

    def keys(self, cipher: int) -> tuple[Opener, Sealer]:
        """For the cipher that the coordinator chose.

        Raises:
            BadDatagramError: there is no such cipher.
        """
        found = self._keys.get(cipher)
        if found is None:
            try:
                known = Cipher(cipher)
            except ValueError:
                raise BadDatagramError from None
            found = (
                Opener(self._secret, self.number, Direction.TO_WORKER, known),
                Sealer(self._secret, self.number, Direction.TO_COORDINATOR, known),
            )
            self._keys[cipher] = found
        return found

    def heard(self, cipher: int, address: Address) -> None:
        """An authentic datagram came, newer than all before: answer this way."""
        self._cipher = cipher
        self.address = address

    def seal(self, kind: int, bodies: list[bytes]) -> list[bytes]:
        """Datagrams for the coordinator."""
        seal = self.keys(self._cipher)[1].seal
        return [seal(kind, body) for body in bodies]

    # --- requests -----------------------------------------------------------------------------

    def begin_step(self, step: int) -> None:
        """A newer step: everything of the last one is over."""
        self.step = step
        self._requests.clear()
        self._complete.clear()
        self._kept.clear()
        self._waiting_bytes = self._kept_bytes = 0

    def kept(self, layer: int) -> Kept | None:
        """The answer given to this step's request for a layer."""
        return self._kept.get(layer)

    def take_in(self, fields: RequestFields) -> bool | None:
        """Add a request's fragment; whether it completes the request, None if there is no room for it.

        Raises:
            BadDatagramError: it belongs to another request than those before it.
        """
        layer, total = fields[1], fields[3]
        request = self._requests.get(layer)
        if request is None:
            if self._waiting_bytes + total > MOST_WAITING_BYTES:
                return None
            request = self._requests[layer] = Request(fields)
            self._waiting_bytes += total
        elif not request.missing:
            self.counts.duplicates += 1
            return False
        if request.add(fields):
            heapq.heappush(self._complete, layer)
            return True
        return False

    @property
    def has_work(self) -> bool:
        """Whether a request waits to be computed."""
        return bool(self._complete)

    def next_request(self) -> Request:
        """The request of the lowest layer; it is no longer waiting."""
        request = self._requests.pop(heapq.heappop(self._complete))
        self._waiting_bytes -= len(request.content)
        return request

    def keep(self, layer: int, kept: Kept) -> None:
        """Keep an answer for repeats; the oldest are forgotten when they are too many."""
        self._kept[layer] = kept
        self._kept_bytes += kept.n_bytes
        if self._kept_bytes > MOST_KEPT_BYTES:
            for old in self._kept.values():
                if old is not kept and old.bodies:
                    self._kept_bytes -= old.n_bytes
                    old.bodies = []
                    if self._kept_bytes <= MOST_KEPT_BYTES:
                        break
