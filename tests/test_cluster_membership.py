"""Founding a cluster, the table of members and invitations, on real files."""

from __future__ import annotations

import base64
import hashlib
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from functools import cache
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st
from program import REPOSITORY

from edge_runtime.cluster import members as tables
from edge_runtime.cluster.authority import found_cluster, open_authority, public_key_of
from edge_runtime.cluster.identity import (
    check_name,
    database_of,
    forget_identity,
    keep_identity,
    name_from,
    read_identity,
)
from edge_runtime.cluster.invitation import PREFIX, Invitation, make_invitation, parse_invitation
from edge_runtime.cluster.members import Members, Standing, check_address
from edge_runtime.errors import (
    ConfigError,
    ForbiddenError,
    OverloadedError,
    RequestError,
    UnauthenticatedError,
)


class Clock:
    """Time that a test sets."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def table(tmp_path: Path, clock: Clock) -> Members:
    found = Members(tmp_path / "cluster" / "cluster.db", clock=clock)
    found.add_founder("first", "10.0.0.1:8422")
    return found


# --- identity ---------------------------------------------------------------------------------


def test_a_founded_cluster_is_read_again_and_its_secrets_are_private(tmp_path: Path) -> None:
    made = found_cluster(tmp_path, "first", "10.0.0.1:8422")
    assert made.is_founder
    assert found_cluster(tmp_path, "another", "10.0.0.2:8422") == made == read_identity(tmp_path)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "cluster").iterdir()}
    assert {modes[name] for name in ("authority.key", "member.key", "cluster.db")} == {0o600}
    assert stat.S_IMODE((tmp_path / "cluster").stat().st_mode) == 0o700
    (member,) = Members(database_of(tmp_path)).active()
    assert (member.name, member.address, member.is_founder) == ("first", "10.0.0.2:8422", True)
    assert "PRIVATE KEY" not in repr(made)


def test_a_founding_cut_short_goes_on_with_the_same_authority(tmp_path: Path) -> None:
    first = found_cluster(tmp_path, "first", "10.0.0.1:8422")
    (tmp_path / "cluster" / "member.pem").unlink()  # it is written last
    assert read_identity(tmp_path) is None
    assert found_cluster(tmp_path, "first", "10.0.0.1:8422").fingerprint == first.fingerprint


def test_devices_may_found_at_the_same_moment_once(tmp_path: Path) -> None:
    program = (
        "from pathlib import Path; from edge_runtime.cluster.authority import found_cluster; "
        f"print(found_cluster(Path({str(tmp_path)!r}), 'first', '10.0.0.1:1').fingerprint)"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    said = {process.communicate(timeout=60)[0] for process in running}
    assert len(said) == 1
    assert said.pop().strip()


@pytest.mark.parametrize("file", ["member.pem", "member.key", "authority.pem"])
def test_damaged_files_are_said(tmp_path: Path, file: str) -> None:
    found_cluster(tmp_path, "first", "10.0.0.1:8422")
    (tmp_path / "cluster" / file).write_text("nonsense")
    with pytest.raises(ConfigError, match=file):
        read_identity(tmp_path)


def test_files_of_two_clusters_are_not_mixed(tmp_path: Path) -> None:
    for name in ("one", "two"):
        found_cluster(tmp_path / name, "first", "10.0.0.1:8422")
    ours, theirs = (tmp_path / name / "cluster" for name in ("one", "two"))
    ours_key = (ours / "member.key").read_bytes()
    (ours / "member.key").write_bytes((theirs / "member.key").read_bytes())
    with pytest.raises(ConfigError, match="is not the key of"):
        read_identity(tmp_path / "one")
    (ours / "member.key").write_bytes(ours_key)
    (ours / "authority.pem").write_bytes((theirs / "authority.pem").read_bytes())
    with pytest.raises(ConfigError, match="none of its cluster's authority"):
        read_identity(tmp_path / "one")
    with pytest.raises(ConfigError, match="is not the key of"):
        open_authority(tmp_path / "one")


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    found_cluster(tmp_path, "first", "10.0.0.1:8422")
    (tmp_path / "cluster" / "member.key").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_identity(tmp_path)


def test_forgetting_leaves_nothing_of_the_cluster(tmp_path: Path) -> None:
    identity = found_cluster(tmp_path, "first", "10.0.0.1:8422")
    forget_identity(tmp_path)
    assert read_identity(tmp_path) is None
    assert [path.name for path in (tmp_path / "cluster").iterdir()] == ["cluster.lock"]
    forget_identity(tmp_path)
    keep_identity(tmp_path, identity)
    assert read_identity(tmp_path) == identity


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("raspberrypi", "raspberrypi"),
        ("Küche_Pi.local", "k-che-pi"),
        ("", "device"),
        ("---", "device"),
        ("a" * 39 + "-b", "a" * 39),
    ],
)
def test_a_name_is_made_of_any_host_name(host: str, name: str) -> None:
    assert name_from(host) == name


@given(st.text(max_size=80))
def test_every_made_name_is_a_name(host: str) -> None:
    assert check_name(name_from(host))


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a.b", "invitation:7", "a" * 41, "a\n", "ä"])
def test_what_cannot_be_a_host_name_is_no_name(name: str) -> None:
    with pytest.raises(RequestError, match="no name for a device"):
        check_name(name)


# --- signing ----------------------------------------------------------------------------------


def test_a_certificate_holds_what_the_authority_says_and_not_what_was_asked_for(tmp_path: Path) -> None:
    found_cluster(tmp_path, "first", "10.0.0.1:8422")
    key = ec.generate_private_key(ec.SECP256R1())
    greedy = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "first")]))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
        .public_bytes(Encoding.DER)
    )
    certificate = open_authority(tmp_path).sign_member(public_key_of(greedy), "second")
    assert certificate.subject.rfc4514_string() == "CN=second"
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [
        "second.member.edgert.internal",
        "member.edgert.internal",
    ]


def test_signing_requests_that_are_none_are_refused() -> None:
    def request(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
        algorithm = hashes.SHA256() if isinstance(key, ec.EllipticCurvePrivateKey) else None
        builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
        return builder.sign(key, algorithm).public_bytes(Encoding.DER)

    sound = request(ec.generate_private_key(ec.SECP256R1()))
    forged = sound[:-4] + bytes(4)
    others = [request(ec.generate_private_key(ec.SECP384R1())), request(ed25519.Ed25519PrivateKey.generate())]
    for content in (b"", b"nonsense", sound[:-1], sound * 20, forged, *others):
        with pytest.raises(RequestError, match="signing request"):
            public_key_of(content)


def test_only_the_founder_can_invite(tmp_path: Path) -> None:
    found_cluster(tmp_path, "first", "10.0.0.1:8422")
    (tmp_path / "cluster" / "authority.key").unlink()
    with pytest.raises(ForbiddenError, match="only the device that founded"):
        make_invitation(tmp_path, ["10.0.0.1:8422"])


# --- the table --------------------------------------------------------------------------------


def test_an_invitation_serves_one_device_once(table: Members, clock: Clock) -> None:
    table.invite("ab", clock.now + 900)
    assert table.accept("ab", "pi", "10.0.0.2:8422", b"key") == "pi"
    assert table.standing("pi") is Standing.MEMBER
    with pytest.raises(UnauthenticatedError, match="was used already, by pi"):
        table.accept("ab", "pi", "10.0.0.3:8422", b"another key")
    assert table.accept("ab", "other", "10.0.0.4:8422", b"key") == "pi", "the answer may have been lost"
    assert [member.address for member in table.active()] == ["10.0.0.1:8422", "10.0.0.4:8422"]
    table.revoke("pi")
    with pytest.raises(UnauthenticatedError, match="was used already"):
        table.accept("ab", "pi", "10.0.0.4:8422", b"key")


def test_unknown_and_expired_invitations_are_told_apart(table: Members, clock: Clock) -> None:
    table.invite("ab", clock.now + 900)
    with pytest.raises(UnauthenticatedError, match="unknown"):
        table.accept("cd", "pi", "10.0.0.2:8422", b"key")
    clock.now += 900
    with pytest.raises(UnauthenticatedError, match=r"expired \d+ s ago"):
        table.accept("ab", "pi", "10.0.0.2:8422", b"key")
    clock.now += 8 * 86_400
    table.invite("ef", clock.now + 900)
    with pytest.raises(UnauthenticatedError, match="unknown"):
        table.accept("ab", "pi", "10.0.0.2:8422", b"key")


def test_two_devices_with_one_invitation_cannot_both_join(table: Members, clock: Clock) -> None:
    rounds, threads = 12, 4
    together = threading.Barrier(threads, timeout=30)

    def accept(number: int) -> list[str]:
        names = []
        for turn in range(rounds):
            together.wait()
            with suppress(UnauthenticatedError):
                names.append(table.accept(str(turn), f"pi-{turn}-{number}", "10.0.0.2:8422", bytes([number])))
        return names

    for turn in range(rounds):
        table.invite(str(turn), clock.now + 900)
    with ThreadPoolExecutor(threads) as pool:
        names = [name for found in pool.map(accept, range(threads)) for name in found]
    assert len(names) == rounds
    assert {member.name for member in table.active()} == {"first", *names}


def test_names_that_are_taken_get_a_number_and_no_name_is_given_twice(table: Members, clock: Clock) -> None:
    longest = "a" * 38 + "-b"
    names = []
    for number, wish in enumerate(["first", "first", longest, longest]):
        table.invite(str(number), clock.now + 900)
        names.append(table.accept(str(number), wish, "10.0.0.2:8422", bytes([number])))
    assert names == ["first-2", "first-3", longest, "a" * 38 + "-2"]
    table.revoke("first-3")
    table.invite("again", clock.now + 900)
    assert table.accept("again", "first", "10.0.0.2:8422", b"again") == "first-4"


def test_open_invitations_are_limited(table: Members, clock: Clock) -> None:
    for number in range(tables.MAX_OPEN_INVITATIONS):
        table.invite(str(number), clock.now + 900)
    with pytest.raises(OverloadedError, match="64 invitations are open"):
        table.invite("more", clock.now + 900)
    table.accept("0", "pi", "10.0.0.2:8422", b"key")
    table.invite("more", clock.now + 900)


def test_members_are_limited(table: Members, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_MEMBERS", 1)
    table.invite("ab", clock.now + 900)
    with pytest.raises(RequestError, match="the cluster is full: 1 members of 1"):
        table.accept("ab", "pi", "10.0.0.2:8422", b"key")
    with pytest.raises(RequestError, match="lists 2 members"):
        table.learn("first", [("first", "10.0.0.1:1"), ("pi", "10.0.0.2:1")])


def test_the_founders_list_adds_moves_and_takes_out(table: Members, clock: Clock) -> None:
    table.learn("first", [("first", "10.0.0.1:1"), ("a", "10.0.0.2:1"), ("b", "10.0.0.3:1")])
    table.revoke("b")
    clock.now += 60
    table.learn("first", [("first", "10.0.0.9:1"), ("b", "10.0.0.3:1"), ("c", "[fd00::4]:1")])
    assert [(member.name, member.address) for member in table.active()] == [
        ("c", "[fd00::4]:1"),
        ("first", "10.0.0.9:1"),
    ]
    assert table.standing("a") is Standing.REVOKED
    assert table.standing("b") is Standing.REVOKED, "who was taken out here stays out"
    assert table.standing("nobody") is Standing.UNKNOWN
    left = table.find("a")
    clock.now += 60
    table.learn("first", [("first", "10.0.0.9:1"), ("c", "[fd00::4]:2")])
    assert table.find("a") == left, "when it left does not change"
    found = table.founder()
    assert found is not None
    assert found.name == "first"
    assert table.revoked_among(["a", "c", "nobody"]) == {"a", "nobody"}


@pytest.mark.parametrize(
    "bad", [("ü", "10.0.0.1:1"), ("a", "10.0.0.1:0"), ("a", "nowhere"), ("a", "h" * 300)]
)
def test_a_list_with_a_mistake_changes_nothing(table: Members, bad: tuple[str, str]) -> None:
    before = table.everyone()
    with pytest.raises(RequestError):
        table.learn("first", [("first", "10.0.0.9:1"), bad])
    assert table.everyone() == before


def test_signs_of_life_are_written_seldom(table: Members, clock: Clock) -> None:
    def seen() -> float | None:
        found = table.find("first")
        assert found is not None
        return found.last_seen

    table.seen("first")
    begun = clock.now
    clock.now += 30
    table.seen("first")
    assert seen() == begun
    table.seen("first", "10.0.0.7:8422")
    assert seen() == clock.now
    clock.now += 61
    table.seen("first")
    assert seen() == clock.now
    table.seen("nobody", "10.0.0.7:8422")
    assert table.find("nobody") is None


def test_no_table_is_made_by_looking(tmp_path: Path) -> None:
    assert Members(tmp_path / "cluster.db").everyone() == []
    assert not (tmp_path / "cluster.db").exists()


def test_a_table_of_another_program_is_refused(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "cluster.db")) as other, other:
        other.execute("CREATE TABLE theirs (a)")
    with pytest.raises(ConfigError, match="another program"):
        Members(tmp_path / "cluster.db").active()


def test_revoking_nobody_is_said(table: Members) -> None:
    with pytest.raises(RequestError, match="no member named 'nobody'"):
        table.revoke("nobody")


@pytest.mark.parametrize(
    "address", ["", "host", "host:0", "host:99999", "ho st:1", "a\n:1", "é:1", "x" * 270 + ":1"]
)
def test_what_cannot_be_reached_is_no_address(address: str) -> None:
    with pytest.raises(RequestError, match="no address of a device"):
        check_address(address)


# --- invitations as text ----------------------------------------------------------------------


@cache
def sample() -> Invitation:
    with tempfile.TemporaryDirectory() as folder:
        found_cluster(Path(folder), "first", "10.0.0.1:8422")
        return make_invitation(Path(folder), ["10.0.0.1:8422", "[fd00::1]:8422", "first.local:8422"])


def test_an_invitation_survives_its_way_through_a_terminal() -> None:
    text = sample().text()
    wrapped = "  " + "\r\n".join(text[at : at + 80] for at in range(0, len(text), 80)) + " \n"
    found = parse_invitation(wrapped)
    assert found.addresses == sample().addresses
    assert found.expires == sample().expires
    assert found.certificate == sample().certificate
    assert found.key.public_key() == sample().key.public_key()
    assert found.text() == text
    assert len(text) < 2000
    assert str(found.key.private_numbers().private_value) not in repr(found)


@given(st.integers(min_value=len(PREFIX)))
@settings(max_examples=60, deadline=None)
def test_a_paste_that_lost_its_end_is_told_so(length: int) -> None:
    text = sample().text()
    with pytest.raises(RequestError, match="cut off"):
        parse_invitation(text[: len(PREFIX) + length % (len(text) - len(PREFIX))])


@given(at=st.integers(0), character=st.sampled_from("ABCxyz019-_=+/.*\u20ac"))
@settings(max_examples=150, deadline=None)
def test_one_changed_character_is_noticed(at: int, character: str) -> None:
    text = sample().text()
    at %= len(text)
    changed = text[:at] + character + text[at + 1 :]
    if changed == text:
        return
    try:
        found = parse_invitation(changed)
    except RequestError:
        return
    # The last characters of base64 may hold bits that stand for nothing.
    assert found.text() == text
    assert at >= len(text) - 2


@given(st.one_of(st.text(max_size=300), st.binary(max_size=300).map(lambda raw: PREFIX + raw.hex())))
@settings(max_examples=150, deadline=None)
def test_nothing_but_a_typed_error_comes_of_nonsense(text: str) -> None:
    with pytest.raises(RequestError):
        parse_invitation(text)


@given(st.lists(st.binary(max_size=60), max_size=7))
@settings(max_examples=150, deadline=None)
def test_hostile_fields_with_a_right_checksum_are_refused(fields: list[bytes]) -> None:
    content = b"".join(len(each).to_bytes(2) + each for each in fields)
    content += hashlib.sha256(content).digest()[:4]
    raw = len(content).to_bytes(2) + content
    with pytest.raises(RequestError):
        parse_invitation(PREFIX + base64.urlsafe_b64encode(raw).decode())


def test_what_was_pasted_wrongly_is_said() -> None:
    text = sample().text()
    for wrong, said in (
        ("https://example.org", "does not begin with edgert1."),
        ("edgert7." + text[len(PREFIX) :], "another version"),
        (text + text, "characters that none has|something was added"),
        (text + "AAAA", "something was added"),
        (text[:300] + "A" * 9000, "possible are 8192"),
    ):
        with pytest.raises(RequestError, match=said):
            parse_invitation(wrong)


@pytest.mark.parametrize(
    ("addresses", "seconds", "said"),
    [
        ([], 900, "1 to 8 addresses"),
        (["10.0.0.1:8422"] * 9, 900, "1 to 8 addresses"),
        (["10.0.0.1"], 900, "no address of a device"),
        (["10.0.0.1:8422"], 0, "up to 7 days"),
        (["10.0.0.1:8422"], 8 * 86_400, "up to 7 days"),
    ],
)
def test_invitations_that_could_not_serve_are_not_made(
    tmp_path: Path, addresses: list[str], seconds: float, said: str
) -> None:
    found_cluster(tmp_path, "first", "10.0.0.1:8422")
    with pytest.raises(RequestError, match=said):
        make_invitation(tmp_path, addresses, valid_seconds=seconds)


def test_kill_while_members_join_loses_nobody_who_was_told(tmp_path: Path) -> None:
    """kill -9 a process that accepts members in a loop; it writes each name when accept() has returned."""
    path = tmp_path / "cluster.db"
    program = f"""
import os, time
from pathlib import Path
from edge_runtime.cluster.members import Members
table = Members(Path({str(path)!r}))
number = 0
while True:
    table.invite(str(number), time.time() + 900)
    name = table.accept(str(number), "pi", "10.0.0.2:8422", str(number).encode())
    os.write(1, f"{{name}}\\n".encode())
    number += 1
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.PIPE)
    assert process.stdout is not None
    promised = [process.stdout.readline() for _ in range(10)]
    process.kill()
    promised += process.stdout.readlines()
    process.stdout.close()
    process.wait()
    names = {line.decode().strip() for line in promised if line.endswith(b"\n")}
    found = {member.name for member in Members(path).active()}
    assert names <= found
    assert len(found) <= len(names) + 1
