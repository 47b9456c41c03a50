"""How many copies of a datagram to send, and what loss does to an exchange."""

from __future__ import annotations

from scheduler.profiles import LinkProfile, ModelProfile

# An exchange that misses a fragment waits for a resend, which doubles its time, and makes a relaxed layer
# later than planned: rarer than this it is cheaper to ask again than to send more.
INCOMPLETE_LIMIT = 0.005
MOST_COPIES = 3


def incomplete(loss: float, n_fragments: int, copies: int) -> float:
    """Chance that at least one of `n_fragments` datagrams, each sent `copies` times, never arrives.

    Losses are taken as independent; where they come in bursts, copies help less.
    """
    return float(1.0 - (1.0 - loss**copies) ** n_fragments)


def copies_for(loss: float, n_fragments: int) -> int:
    """Copies of each datagram, 1 to 3, that keep an exchange's `incomplete` below 0.5 % where that many can.

    Args:
        loss: share of datagrams lost, one way.
        n_fragments: datagrams of the request and of the answer together.
    """
    for copies in range(1, MOST_COPIES):
        if incomplete(loss, n_fragments, copies) <= INCOMPLETE_LIMIT:
            return copies
    return MOST_COPIES


def link_copies(model: ModelProfile, link: LinkProfile) -> int:
    """`copies_for` an exchange of this model over this link."""
    return copies_for(link.loss, model.input_fragments + model.output_fragments)


def missing_share(model: ModelProfile, link: LinkProfile, copies: int) -> float:
    """Mean share of a contribution that does not come at the first try.

    A request needs all its fragments, an answer's are each usable alone.
    """
    lost = link.loss**copies
    return float(1.0 - (1.0 - lost) ** (model.input_fragments + 1))
