"""Sealed datagrams: only the other end of a session makes and reads them, and each counts once."""

from __future__ import annotations

import os
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.cluster.sealing import (
    HEADER,
    REPLAY_WINDOW,
    SECRET_BYTES,
    Cipher,
    Direction,
    Opener,
    Sealer,
    UnauthenticError,
    preferred_cipher,
)
from edge_runtime.errors import RequestError, UnavailableError

SECRET = bytes(range(SECRET_BYTES))
ciphers = st.sampled_from(Cipher)


def pair(cipher: Cipher = Cipher.AES_GCM, session: int = 7) -> tuple[Sealer, Opener]:
    return (
        Sealer(SECRET, session, Direction.TO_WORKER, cipher),
        Opener(SECRET, session, Direction.TO_WORKER, cipher),
    )


def opened(opener: Opener, datagram: bytes) -> bytes | None:
    return opener.open(memoryview(datagram), HEADER.unpack_from(datagram)[4])


@given(
    ciphers, st.integers(0, 2**32 - 1), st.integers(0, 255), st.lists(st.binary(max_size=1500), max_size=5)
)
def test_what_was_sealed_comes_out(cipher: Cipher, session: int, kind: int, contents: list[bytes]) -> None:
    sealer, opener = pair(cipher, session)
    for content in contents:
        datagram = sealer.seal(kind, content)
        assert HEADER.unpack_from(datagram)[1::2] == (kind, session)
        assert opened(opener, datagram) == content


def test_content_is_not_readable_and_no_two_datagrams_are_alike() -> None:
    sealer, _ = pair()
    datagrams = {sealer.seal(1, b"a secret of some length") for _ in range(100)}
    assert len(datagrams) == 100
    assert not any(b"secret" in datagram for datagram in datagrams)


@given(ciphers, st.data())
def test_a_changed_bit_is_noticed(cipher: Cipher, data: st.DataObject) -> None:
    sealer, opener = pair(cipher)
    datagram = bytearray(sealer.seal(2, b"content"))
    bit = data.draw(st.integers(0, 8 * len(datagram) - 1))
    datagram[bit // 8] ^= 1 << bit % 8
    with pytest.raises(UnauthenticError):
        opener.open(memoryview(datagram), 1)


@pytest.mark.parametrize(
    "other",
    [
        (bytes(SECRET_BYTES), 7, Direction.TO_WORKER, Cipher.AES_GCM),
        (SECRET, 8, Direction.TO_WORKER, Cipher.AES_GCM),
        (SECRET, 7, Direction.TO_COORDINATOR, Cipher.AES_GCM),
        (SECRET, 7, Direction.TO_WORKER, Cipher.CHACHA20_POLY1305),
    ],
    ids=["secret", "session", "direction", "cipher"],
)
def test_another_key_opens_nothing(other: tuple[bytes, int, Direction, Cipher]) -> None:
    sealer, _ = pair()
    with pytest.raises(UnauthenticError):
        opened(Opener(*other), sealer.seal(1, b"content"))


@given(st.integers(1, 3 * REPLAY_WINDOW), st.integers(0, 2**32))
def test_each_datagram_counts_once_in_whatever_order_it_comes(count: int, seed: int) -> None:
    sealer, opener = pair()
    datagrams = [sealer.seal(1, b"%d" % number) for number in range(count)]
    # Moved by less than the window: none of these may be lost.
    shuffled = random.Random(seed)
    order = sorted(range(count), key=lambda number: number + shuffled.random() * (REPLAY_WINDOW - 1))
    for number in order:
        assert opened(opener, datagrams[number]) == b"%d" % number
    assert all(opened(opener, datagram) is None for datagram in datagrams)


def test_a_long_session_needs_no_more_memory() -> None:
    sealer, opener = pair()
    for _ in range(3 * REPLAY_WINDOW):
        opened(opener, sealer.seal(1, b""))
    assert opener._seen.bit_length() == REPLAY_WINDOW


def test_what_comes_later_than_the_window_is_refused() -> None:
    sealer, opener = pair()
    datagrams = [sealer.seal(1, b"") for _ in range(REPLAY_WINDOW + 1)]
    assert opened(opener, datagrams[-1]) == b""
    assert opened(opener, datagrams[0]) is None
    assert opened(opener, datagrams[1]) == b""


def test_a_forged_counter_does_not_move_the_window() -> None:
    sealer, opener = pair()
    datagram = sealer.seal(1, b"content")
    forged = HEADER.pack(*HEADER.unpack_from(datagram)[:4], 2**63) + os.urandom(30)
    with pytest.raises(UnauthenticError):
        opened(opener, forged)
    assert opened(opener, datagram) == b"content"


def test_no_nonce_comes_twice() -> None:
    sealer, opener = pair()
    sealer._counter = 2**64 - 2
    assert opened(opener, sealer.seal(1, b"the last")) == b"the last"
    with pytest.raises(UnavailableError, match="new one"):
        sealer.seal(1, b"one more")


@pytest.mark.parametrize("length", [0, 16, 31, 33])
def test_a_secret_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(RequestError, match=f"{length} bytes; needed are 32"):
        Sealer(bytes(length), 1, Direction.TO_WORKER, Cipher.AES_GCM)


def test_a_session_beyond_32_bits_is_refused() -> None:
    with pytest.raises(RequestError, match="session 4294967296"):
        Opener(SECRET, 1 << 32, Direction.TO_WORKER, Cipher.AES_GCM)


def test_this_processor_has_a_cipher() -> None:
    assert preferred_cipher() in Cipher
