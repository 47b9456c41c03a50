"""Certificates in real handshakes: over Python's ssl as the HTTP server does, and over gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import stat
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from program import REPOSITORY, Terminal

from edge_runtime.daemon.certificate_authority import (
    ensure_authority,
    issue_server,
    read_server,
    renewal_reason,
)
from edge_runtime.daemon.certificates import (
    ServerTLS,
    TLSFiles,
    check_exposure,
    check_key_permissions,
    is_loopback,
    normal_host,
    tls_files,
    token_required,
)
from edge_runtime.daemon.config import Config, ServerConfig
from edge_runtime.errors import ConfigError


def files_in(home: Path) -> TLSFiles:
    tls = home / "tls"
    return TLSFiles(tls / "server.pem", tls / "server.key", tls / "ca.pem")


def make(home: Path, *hosts: str) -> TLSFiles:
    authority, _ = ensure_authority(home)
    issue_server(home, authority, hosts)
    return files_in(home)


@contextlib.contextmanager
def serving(context: ssl.SSLContext) -> Iterator[int]:
    """A TLS server that says hello to whoever completes the handshake; gives its port."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with contextlib.suppress(OSError), context.wrap_socket(connection, server_side=True) as tls:
                    tls.sendall(b"hello")
                connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


def served_certificate(
    port: int, ca: Path, name: str = "localhost", version: ssl.TLSVersion | None = None
) -> x509.Certificate:
    """What a strict client was shown, after it checked it."""
    context = ssl.create_default_context(cafile=str(ca))
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    if version is not None:
        context.minimum_version = context.maximum_version = version
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=name) as tls,
    ):
        assert tls.recv(5) == b"hello"
        raw = tls.getpeercert(binary_form=True)
        assert raw is not None
        return x509.load_der_x509_certificate(raw)


# --- handshakes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "::1", "pi.home.arpa", "192.168.7.20"])
def test_a_client_with_the_authority_trusts_every_name(tmp_path: Path, name: str) -> None:
    files = make(tmp_path, "pi.home.arpa", "192.168.7.20")
    assert files.ca
    with serving(ServerTLS(files).context) as port:
        served_certificate(port, files.ca, name)


def test_a_name_that_was_not_asked_for_is_refused(tmp_path: Path) -> None:
    files = make(tmp_path, "pi.home.arpa")
    assert files.ca
    with (
        serving(ServerTLS(files).context) as port,
        pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"),
    ):
        served_certificate(port, files.ca, "other.home.arpa")


def test_another_authority_is_not_trusted(tmp_path: Path) -> None:
    ours, theirs = make(tmp_path / "ours"), make(tmp_path / "theirs")
    assert theirs.ca
    with serving(ServerTLS(ours).context) as port, pytest.raises(ssl.SSLCertVerificationError):
        served_certificate(port, theirs.ca)


def test_versions_before_1_2_are_refused(tmp_path: Path) -> None:
    files = make(tmp_path)
    assert files.ca
    tls = ServerTLS(files)
    assert tls.context.minimum_version is ssl.TLSVersion.TLSv1_2
    with serving(tls.context) as port:
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            served_certificate(port, files.ca, version=version)
        old = ssl.create_default_context(cafile=str(files.ca))
        old.set_ciphers("DEFAULT:@SECLEVEL=0")
        with pytest.warns(DeprecationWarning):
            old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
        with socket.create_connection(("127.0.0.1", port), timeout=10) as plain, pytest.raises(OSError):
            old.wrap_socket(plain, server_hostname="localhost").recv(5)


def test_a_renewed_certificate_is_served_after_reload(tmp_path: Path) -> None:
    files = make(tmp_path)
    assert files.ca
    tls = ServerTLS(files)
    with serving(tls.context) as port:
        before = served_certificate(port, files.ca)
        make(tmp_path)
        assert served_certificate(port, files.ca) == before
        assert tls.reload()
        after = served_certificate(port, files.ca)
        assert after.serial_number != before.serial_number
        assert after.public_key() != before.public_key()
        assert not tls.reload()


@pytest.mark.parametrize(
    "damage", ["certificate", "key", "other key", "other certificate", "missing", "mode"]
)
def test_a_failed_reload_leaves_the_old_certificate_in_service(tmp_path: Path, damage: str) -> None:
    files = make(tmp_path / "ours")
    assert files.ca
    tls = ServerTLS(files)
    with serving(tls.context) as port:
        before = served_certificate(port, files.ca)
        if damage == "certificate":
            files.certificate.write_bytes(files.certificate.read_bytes()[:300])
        elif damage == "key":
            files.key.write_bytes(b"")
        elif damage == "other key":
            files.key.write_bytes(make(tmp_path / "theirs").key.read_bytes())
        elif damage == "other certificate":
            files.certificate.write_bytes(make(tmp_path / "theirs").certificate.read_bytes())
        elif damage == "missing":
            files.certificate.unlink()
        else:
            files.key.chmod(0o644)
        with pytest.raises(ConfigError):
            tls.reload()
        assert served_certificate(port, files.ca) == before


def test_a_key_with_a_password_is_refused_without_asking_for_it(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    files = make(tmp_path)
    key = serialization.load_pem_private_key(files.key.read_bytes(), None)
    files.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    program = f"""
from pathlib import Path
from edge_runtime.daemon.certificates import ServerTLS, TLSFiles
try:
    ServerTLS(TLSFiles(Path({str(files.certificate)!r}), Path({str(files.key)!r}), None))
except Exception as error:
    print(type(error).__name__, "without a password" in str(error))
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with Terminal([sys.executable, "-c", program], environment) as terminal:
        assert "phrase" not in terminal.until("ConfigError True", 30)


# --- gRPC ---------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def grpc_server(tls: ServerTLS) -> AsyncIterator[int]:
    """An echoing gRPC server with the event loop's API, as the daemon has it."""

    async def echo(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        return request

    server = grpc.aio.server()
    handlers = {"Echo": grpc.unary_unary_rpc_method_handler(echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", handlers),))
    port = server.add_secure_port("127.0.0.1:0", tls.grpc_credentials())
    await server.start()
    try:
        yield port
    finally:
        await server.stop(None)


async def echoed(port: int, ca: bytes) -> bytes:
    # Without this, gRPC would go on using a connection that it has to the same port.
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.secure_channel(
        f"localhost:{port}", grpc.ssl_channel_credentials(ca), options=options
    ) as channel:
        answer: bytes = await channel.unary_unary("/test.Echo/Echo")(b"hello", timeout=10)
        return answer


def test_grpc_serves_it_and_takes_up_a_renewed_one(tmp_path: Path) -> None:
    files = make(tmp_path / "first")
    assert files.ca
    first = files.ca.read_bytes()
    second = (make(tmp_path / "second").ca or files.ca).read_bytes()

    async def check() -> None:
        tls = ServerTLS(files)
        async with grpc_server(tls) as port:
            assert await echoed(port, first) == b"hello"
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await echoed(port, second)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            # Of the other authority, so that it shows in who trusts the server.
            for name in ("server.pem", "server.key"):
                (tmp_path / "second" / "tls" / name).replace(tmp_path / "first" / "tls" / name)
            assert await echoed(port, first) == b"hello"
            assert tls.reload()
            assert await echoed(port, second) == b"hello"
            with pytest.raises(grpc.aio.AioRpcError):
                await echoed(port, first)

    asyncio.run(check())


# --- what is in them ----------------------------------------------------------------------------


def test_permissions_are_narrow_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o000)
    try:
        make(tmp_path / "wide")
        os.umask(0o077)
        make(tmp_path / "narrow")
    finally:
        os.umask(before)
    for home in ("wide", "narrow"):
        tls = tmp_path / home / "tls"
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tls.iterdir()}
        assert modes == {"ca.pem": 0o644, "ca.key": 0o600, "server.pem": 0o644, "server.key": 0o600}
        assert stat.S_IMODE(tls.stat().st_mode) & 0o077 == 0


def test_extensions_and_lifetimes(tmp_path: Path) -> None:
    files = make(tmp_path, "pi.local")
    assert files.ca
    ca = x509.load_pem_x509_certificate(files.ca.read_bytes())
    server = x509.load_pem_x509_certificate(files.certificate.read_bytes())
    assert ca.not_valid_after_utc - datetime.now(UTC) > timedelta(days=3649)
    assert timedelta(days=824) < server.not_valid_after_utc - datetime.now(UTC) <= timedelta(days=825)
    constraints = ca.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert (constraints.value.ca, constraints.value.path_length) == (True, 0)
    usage = ca.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.key_cert_sign
    assert not usage.digital_signature
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    purposes = set(server.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    assert purposes == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    identifier = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    of_issuer = server.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    assert of_issuer.key_identifier == identifier


def test_the_authority_stays_and_never_outlives_its_servers(tmp_path: Path) -> None:
    long_ago = datetime.now(UTC) - timedelta(days=3650 - 100)
    first, is_new = ensure_authority(tmp_path, now=long_ago)
    assert is_new
    second, is_new = ensure_authority(tmp_path)
    assert not is_new
    assert second.certificate == first.certificate
    assert issue_server(tmp_path, second, []).expires == first.certificate.not_valid_after_utc
    with pytest.raises(ConfigError, match="ended on"):
        ensure_authority(tmp_path, now=datetime.now(UTC) + timedelta(days=101))


def test_another_authoritys_key_is_found_out(tmp_path: Path) -> None:
    make(tmp_path / "a")
    make(tmp_path / "b")
    (tmp_path / "b" / "tls" / "ca.key").replace(tmp_path / "a" / "tls" / "ca.key")
    with pytest.raises(ConfigError, match="is not the key of"):
        ensure_authority(tmp_path / "a")


def test_reasons_to_renew(tmp_path: Path) -> None:
    authority, _ = ensure_authority(tmp_path)
    assert renewal_reason(read_server(tmp_path, authority), []) == "there was none"
    issue_server(tmp_path, authority, ["Pi.Local", "10.0.0.7"])
    found = read_server(tmp_path, authority)
    assert found
    assert found.hosts == ("pi.local", "10.0.0.7", "localhost", "127.0.0.1", "::1")
    assert renewal_reason(found, ["pi.local", "10.0.0.7", "LOCALHOST"]) == ""
    assert "lacks pi2.local" in renewal_reason(found, ["pi2.local"])
    assert "ends on" in renewal_reason(found, [], now=found.expires - timedelta(days=29))
    assert renewal_reason(found, [], now=found.expires - timedelta(days=31)) == ""
    # What a crash between the writing of key and certificate leaves.
    make(tmp_path / "other")
    (tmp_path / "other" / "tls" / "server.key").replace(tmp_path / "tls" / "server.key")
    assert "not of this authority, or its key" in renewal_reason(read_server(tmp_path, authority), [])
    # A whole pair, but of another authority: clients would not trust it.
    (tmp_path / "other" / "tls" / "server.pem").replace(tmp_path / "tls" / "server.pem")
    assert "not of this authority, or its key" in renewal_reason(read_server(tmp_path, authority), [])
    (tmp_path / "tls" / "server.pem").write_text("nonsense")
    assert renewal_reason(read_server(tmp_path, authority), []) == "there was none"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("Pi.Local", "pi.local"),
        ("[FE80:0::1%eth0]", "fe80::1"),
        ("10.0.0.7", "10.0.0.7"),
        ("küche.home.arpa", "xn--kche-0ra.home.arpa"),
        ("pi.local.", "pi.local"),
    ],
)
def test_hosts_are_written_in_one_way(given: str, wanted: str) -> None:
    assert normal_host(given) == wanted


@pytest.mark.parametrize("host", ["", "a b", "*.local", "pi:8420", "http://pi", "10.0.0.256", "-a", "a" * 64])
def test_what_is_no_host_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match="neither a host name nor an IP address"):
        normal_host(host)


# --- exposure -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "wanted"),
    [
        ("127.0.0.1:8420", True),
        ("127.9.9.9:0", True),
        ("[::1]:8420", True),
        ("[::ffff:127.0.0.1]:1", True),
        ("localhost:1", True),
        ("0.0.0.0:8420", False),
        ("[::]:8420", False),
        ("192.168.1.7:8420", False),
        ("pi.local:8420", False),
        ("localhost.evil.example:1", False),
        ("[::ffff:10.0.0.1]:1", False),
    ],
)
def test_what_counts_as_loopback(address: str, wanted: bool) -> None:
    assert is_loopback(address) == wanted


def config(**settings: str | bool) -> Config:
    return Config(server=replace(ServerConfig(), **settings))  # type: ignore[arg-type]


def test_loopback_needs_neither_tls_nor_token(tmp_path: Path) -> None:
    check_exposure(Config(), tmp_path)
    assert tls_files(Config(), tmp_path) is None
    assert not token_required(Config())
    assert token_required(config(require_token=True))


@pytest.mark.parametrize("key", ["http", "grpc"])
def test_beyond_loopback_tls_and_tokens_are_needed(tmp_path: Path, key: str) -> None:
    exposed = config(**{key: "0.0.0.0:8420"})
    assert token_required(exposed)
    with pytest.raises(ConfigError, match=f"server.{key} = '0.0.0.0:8420'.*edgert init"):
        check_exposure(exposed, tmp_path)
    made = make(tmp_path)
    check_exposure(exposed, tmp_path)
    assert tls_files(exposed, tmp_path) == made
    assert tls_files(Config(), tmp_path) is None


def test_files_that_the_settings_name_come_first(tmp_path: Path) -> None:
    make(tmp_path)
    theirs = make(tmp_path / "theirs")
    named = config(tls_certificate=str(theirs.certificate), tls_key=str(theirs.key))
    assert tls_files(named, tmp_path) == TLSFiles(theirs.certificate, theirs.key, None)
    with pytest.raises(ConfigError, match=r"server\.tls_key is empty"):
        tls_files(config(tls_certificate=str(theirs.certificate)), tmp_path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_keys_that_others_can_use_are_refused(tmp_path: Path, mode: int) -> None:
    files = make(tmp_path)
    files.key.chmod(mode)
    with pytest.raises(ConfigError, match=f"mode {mode:04o}.*chmod 600"):
        check_exposure(config(http="0.0.0.0:8420"), tmp_path)


def test_a_missing_key_says_what_makes_one(tmp_path: Path) -> None:

    with pytest.raises(ConfigError, match="edgert init"):
        check_key_permissions(tmp_path / "server.key")
