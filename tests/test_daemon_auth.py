"""Who is let in, and how often one may be wrong."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import pytest

from edge_runtime.daemon.auth import (
    ALL_SCOPES,
    FailureLimit,
    Gate,
    Identity,
    Scope,
    bearer_token,
    source_of,
)
from edge_runtime.daemon.tokens import TokenStore
from edge_runtime.errors import ConfigError, ForbiddenError, OverloadedError, UnauthenticatedError

HERE = "10.0.0.7"


class Clock:
    """Time that tests set."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def tokens(tmp_path: Path) -> TokenStore:
    return TokenStore(tmp_path / "state.db")


def gate_of(tokens: TokenStore, clock: Clock | None = None) -> Gate:
    limit = FailureLimit(clock=clock) if clock else FailureLimit()
    return Gate(tokens, require_token=True, limit=limit)


def fail(gate: Gate, times: int, address: str = HERE) -> None:
    for _ in range(times):
        with pytest.raises(UnauthenticatedError):
            gate.admit("edgert_wrong", address, Scope.INFER)


# --- tokens and scopes --------------------------------------------------------------------------


def test_a_right_token_has_its_name_and_scopes(tokens: TokenStore) -> None:
    token = tokens.create("phone", [Scope.INFER])
    assert gate_of(tokens).admit(token, HERE, Scope.INFER) == Identity("phone", frozenset({Scope.INFER}))


@pytest.mark.parametrize("wanted", list(Scope))
@pytest.mark.parametrize("has", list(Scope))
def test_scopes_allow_themselves_and_admin_everything(tokens: TokenStore, has: Scope, wanted: Scope) -> None:
    token = tokens.create("phone", [has])
    gate = gate_of(tokens)
    if has in (wanted, Scope.ADMIN):
        assert gate.admit(token, HERE, wanted).name == "phone"
    else:
        with pytest.raises(ForbiddenError, match=f"'phone' lacks the scope '{wanted}' \\(it has: {has}\\)"):
            gate.admit(token, HERE, wanted)


def test_without_a_token_only_where_none_is_required(tokens: TokenStore) -> None:
    with pytest.raises(UnauthenticatedError, match="needs a token"):
        gate_of(tokens).admit(None, HERE, Scope.INFER)
    free = Gate(tokens, require_token=False)
    assert free.admit(None, HERE, Scope.ADMIN) == Identity("local", ALL_SCOPES)


@pytest.mark.parametrize("require_token", [True, False])
@pytest.mark.parametrize(
    "token", ["", " ", "edgert_", "x" * 10**6, "\udcff", "a\x00b", "Bearer x", "edgert_" + "A" * 43]
)
def test_a_token_of_ours_is_always_checked(tokens: TokenStore, token: str, require_token: bool) -> None:
    tokens.create("phone", [Scope.ADMIN])
    gate = Gate(tokens, require_token=require_token)
    if not require_token and not token.startswith("edgert_"):
        # OpenAI's clients insist on sending some key.
        assert gate.admit(token, HERE, Scope.INFER) == Identity("local", ALL_SCOPES)
        return
    with pytest.raises(UnauthenticatedError, match="unknown or was revoked"):
        gate.admit(token, HERE, Scope.INFER)


def test_every_part_of_a_token_counts(tokens: TokenStore) -> None:
    token = tokens.create("phone", [Scope.INFER])
    gate = Gate(tokens, require_token=True, limit=FailureLimit(most=1000))
    for place in range(len(token)):
        changed = token[:place] + ("a" if token[place] != "a" else "b") + token[place + 1 :]
        with pytest.raises(UnauthenticatedError):
            gate.admit(changed, HERE, Scope.INFER)
    for changed in (token + " ", token[:-1], token.upper()):
        with pytest.raises(UnauthenticatedError):
            gate.admit(changed, HERE, Scope.INFER)


def test_each_of_many_tokens_is_found(tokens: TokenStore) -> None:
    made = {f"t{number}": tokens.create(f"t{number}", [Scope.INFER]) for number in range(30)}
    gate = gate_of(tokens)
    for name, token in made.items():
        assert gate.admit(token, HERE, Scope.INFER).name == name


def test_an_expired_token_is_refused_from_that_moment(tokens: TokenStore) -> None:
    end = time.time() + 3600
    token = tokens.create("phone", [Scope.INFER], expires=end)
    clock = Clock(end - 0.001)
    gate = Gate(tokens, require_token=True, clock=clock)
    gate.admit(token, HERE, Scope.INFER)
    clock.now = end
    with pytest.raises(UnauthenticatedError, match="has expired"):
        gate.admit(token, HERE, Scope.INFER)


def test_reload_takes_up_new_and_revoked_tokens(tokens: TokenStore) -> None:
    old = tokens.create("old", [Scope.INFER])
    gate = gate_of(tokens)
    new = tokens.create("new", [Scope.INFER])
    tokens.revoke("old")
    gate.admit(old, HERE, Scope.INFER)
    gate.reload()
    gate.admit(new, HERE, Scope.INFER)
    with pytest.raises(UnauthenticatedError):
        gate.admit(old, HERE, Scope.INFER)


def test_a_failed_reload_keeps_the_tokens(tokens: TokenStore) -> None:
    token = tokens.create("phone", [Scope.INFER])
    gate = gate_of(tokens)
    tokens.path.write_bytes(b"nonsense" * 1000)
    with pytest.raises(ConfigError, match="damaged"):
        gate.reload()
    assert gate.admit(token, HERE, Scope.INFER).name == "phone"


def test_last_use_is_written_with_flush_alone(tokens: TokenStore) -> None:
    token = tokens.create("phone", [Scope.INFER])
    tokens.create("unused", [Scope.INFER])
    gate = Gate(tokens, require_token=True, clock=Clock(5000.0))
    gate.admit(token, HERE, Scope.INFER)
    assert [each.last_used for each in tokens] == [None, None]
    gate.flush()
    assert [each.last_used for each in tokens] == [5000.0, None]
    tokens.path.unlink()
    gate.flush()  # nothing new: the disk is left alone
    assert not tokens.path.exists()


def test_neither_errors_nor_the_log_quote_a_token(
    tokens: TokenStore, caplog: pytest.LogCaptureFixture
) -> None:
    token = tokens.create("phone", [Scope.INFER])
    gate = gate_of(tokens)
    said = []
    with caplog.at_level(logging.DEBUG):
        for given, scope in ((token, Scope.ADMIN), (token + "x", Scope.INFER), ("edgert_guess", Scope.INFER)):
            with pytest.raises((ForbiddenError, UnauthenticatedError)) as caught:
                gate.admit(given, HERE, scope)
            said.append(str(caught.value))
    text = " ".join(said) + caplog.text
    assert HERE in caplog.text
    assert token not in text
    assert "edgert_guess" not in text


# --- the limit of failures ----------------------------------------------------------------------


def test_too_many_failures_have_to_wait(tokens: TokenStore) -> None:
    clock = Clock()
    gate = gate_of(tokens, clock)
    fail(gate, 10)
    for _ in range(50):
        with pytest.raises(OverloadedError, match="too many wrong tokens") as caught:
            gate.admit("edgert_wrong", HERE, Scope.INFER)
        assert caught.value.retry_after == pytest.approx(6.0)
    clock.now += 5.9
    with pytest.raises(OverloadedError):
        gate.admit("edgert_wrong", HERE, Scope.INFER)
    clock.now += 0.2  # waiting is enough; what came meanwhile does not make it longer
    fail(gate, 1)
    with pytest.raises(OverloadedError):
        gate.admit("edgert_wrong", HERE, Scope.INFER)
    clock.now += 3600
    fail(gate, 10)
    with pytest.raises(OverloadedError):
        gate.admit("edgert_wrong", HERE, Scope.INFER)


def test_a_right_token_from_the_same_address_still_works(tokens: TokenStore) -> None:
    token = tokens.create("phone", [Scope.INFER])
    gate = gate_of(tokens, Clock())
    fail(gate, 10)
    for _ in range(20):
        with pytest.raises(OverloadedError):
            gate.admit("edgert_wrong", HERE, Scope.INFER)
        assert gate.admit(token, HERE, Scope.INFER).name == "phone"


def test_other_addresses_are_not_held_responsible(tokens: TokenStore) -> None:
    gate = gate_of(tokens, Clock())
    fail(gate, 10)
    fail(gate, 10, "10.0.0.8")


def test_neither_missing_tokens_nor_missing_scopes_count(tokens: TokenStore) -> None:
    token = tokens.create("phone", [Scope.INFER])
    gate = gate_of(tokens, Clock())
    for _ in range(30):
        with pytest.raises(UnauthenticatedError):
            gate.admit(None, HERE, Scope.INFER)
        with pytest.raises(ForbiddenError):
            gate.admit(token, HERE, Scope.ADMIN)
    fail(gate, 10)


def test_the_log_is_limited_too(tokens: TokenStore, caplog: pytest.LogCaptureFixture) -> None:
    gate = gate_of(tokens, Clock())
    for _ in range(200):
        with pytest.raises((UnauthenticatedError, OverloadedError)):
            gate.admit("edgert_wrong", HERE, Scope.INFER)
    assert len(caplog.records) == 10


def test_the_table_of_addresses_is_bounded() -> None:
    clock = Clock()
    limit = FailureLimit(most=1, addresses=100, clock=clock)
    for number in range(1000):
        clock.now += 0.001
        assert limit.failed(f"10.0.{number // 250}.{number % 250}") == 0
    assert len(limit) == 100
    assert limit.failed("10.0.3.249") > 0  # the latest
    assert limit.failed("10.0.0.0") == 0  # forgotten


def test_who_goes_on_failing_is_not_forgotten() -> None:
    limit = FailureLimit(most=1, addresses=100, clock=Clock())
    limit.failed(HERE)
    for number in range(250):
        limit.failed(f"10.0.1.{number}")
        assert limit.failed(HERE) > 0


def test_a_huge_token_costs_nothing(tokens: TokenStore) -> None:
    gate, token = gate_of(tokens), "x" * 100_000_000
    begin = time.perf_counter()
    fail(gate, 1)
    with pytest.raises(UnauthenticatedError):
        gate.admit(token, HERE, Scope.INFER)
    assert time.perf_counter() - begin < 0.05  # hashing it takes about 0.2 s


@pytest.mark.parametrize(
    ("address", "wanted"),
    [
        ("10.0.0.7", "10.0.0.7"),
        ("ipv4:10.0.0.7:4711", "10.0.0.7"),
        ("::ffff:10.0.0.7", "10.0.0.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("ipv6:%5B2001:db8:1:2::9%5D:4711", "2001:db8:1:2::/64"),
        ("ipv6:[2001:db8:1:2::9]:4711", "2001:db8:1:2::/64"),
        ("ipv6:%5B::1%5D:4711", "::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("unix:", "unix:"),
        ("", ""),
        ("x" * 1000, "x" * 64),
    ],
)
def test_whom_an_address_belongs_to(address: str, wanted: str) -> None:
    assert source_of(address) == wanted


def test_many_threads_at_once(tokens: TokenStore) -> None:
    token = tokens.create("phone", [Scope.INFER])
    gate = gate_of(tokens, Clock())
    outcomes: list[str] = []

    def call() -> None:
        for _ in range(50):
            gate.admit(token, HERE, Scope.INFER)
            gate.flush()
            try:
                gate.admit("edgert_wrong", HERE, Scope.INFER)
            except (UnauthenticatedError, OverloadedError) as error:
                outcomes.append(error.code)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("unauthenticated") == 10
    assert outcomes.count("overloaded") == 190


# --- headers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "wanted"),
    [
        (None, None),
        ("Bearer abc", "abc"),
        ("bearer  abc ", "abc"),
        ("BEARER abc", "abc"),
        ("Bearer", ""),
        ("", ""),
        ("Basic abc", ""),
        ("abc", ""),
        ("Bearer a b", "a b"),
    ],
)
def test_what_a_header_says(header: str | None, wanted: str | None) -> None:
    assert bearer_token(header) == wanted
