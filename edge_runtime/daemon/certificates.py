"""TLS as the daemon serves it: where certificates lie, when they are needed, and changing them while it runs.

Making them is in :mod:`edge_runtime.daemon.certificate_authority`, which needs ``cryptography`` (14 MiB); a
daemon that only serves does without.
"""

from __future__ import annotations

import ipaddress
import re
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from edge_runtime.addresses import split_address
from edge_runtime.daemon.config import Config
from edge_runtime.errors import ConfigError
from edge_runtime.model_store.paths import home
from edge_runtime.private_files import check_key_permissions

if TYPE_CHECKING:
    import grpc

FOLDER = "tls"
CA_CERTIFICATE, CA_KEY = "ca.pem", "ca.key"
SERVER_CERTIFICATE, SERVER_KEY = "server.pem", "server.key"
_LARGEST_FILE = 1 << 20
_TRIES = 3
_HOST = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)(\.(?!-)[a-z0-9-]{1,63}(?<!-))*\.?")

__all__ = [
    "ServerTLS",
    "TLSFiles",
    "check_exposure",
    "check_key_permissions",
    "is_exposed",
    "is_loopback",
    "normal_host",
    "tls_files",
    "token_required",
]


class TLSFiles(NamedTuple):
    """PEM files that the daemon serves with.

    Attributes:
        ca: of the authority that ``edgert init`` made; None where the certificate is somebody else's.
    """

    certificate: Path
    key: Path
    ca: Path | None


def is_loopback(address: str) -> bool:
    """Whether only this device can reach ``HOST:PORT``. A name other than ``localhost`` counts as not so.

    Raises:
        ConfigError: it is no address.
    """
    try:
        host, _ = split_address(address)
    except ValueError as error:
        raise ConfigError(f"{address!r} is no address to listen at; {error}") from error
    if host.lower() == "localhost":
        return True
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return (mapped or found).is_loopback


def is_exposed(config: Config) -> bool:
    """Whether other devices can reach the daemon.

    Raises:
        ConfigError: an address is none.
    """
    return not all(is_loopback(each) for each in (config.server.http, config.server.grpc) if each)


def token_required(config: Config) -> bool:
    """Whether callers need a token: beyond loopback always."""
    return config.server.require_token or is_exposed(config)


def tls_files(config: Config, folder: Path | None = None) -> TLSFiles | None:
    """The files to serve TLS with; None: without TLS.

    Those that the settings name; beyond loopback also those that ``edgert init`` made, if they are there.

    Args:
        folder: the home folder, by default :func:`home`.

    Raises:
        ConfigError: a certificate without a key, or the reverse; an address that is none.
    """
    server = config.server
    own = (folder or home()) / FOLDER
    ca = own / CA_CERTIFICATE
    if bool(server.tls_certificate) != bool(server.tls_key):
        lacks = "tls_key" if server.tls_certificate else "tls_certificate"
        raise ConfigError(f"server.{lacks} is empty; a certificate and its key belong together")
    if server.tls_certificate:
        certificate = Path(server.tls_certificate).expanduser()
        is_own = certificate.absolute().parent == own.absolute() and ca.exists()
        return TLSFiles(certificate, Path(server.tls_key).expanduser(), ca if is_own else None)
    if is_exposed(config) and (own / SERVER_CERTIFICATE).exists() and (own / SERVER_KEY).exists():
        return TLSFiles(own / SERVER_CERTIFICATE, own / SERVER_KEY, ca if ca.exists() else None)
    return None


def check_exposure(config: Config, folder: Path | None = None) -> None:
    """Refuse to listen beyond loopback without TLS.

    Raises:
        ConfigError: it would, or a key's permissions are too wide.
    """
    files = tls_files(config, folder)
    if files is not None:
        check_key_permissions(files.key)
        return
    for key, address in (("http", config.server.http), ("grpc", config.server.grpc)):
        if address and not is_loopback(address):
            raise ConfigError(
                f"server.{key} = {address!r} can be reached from other devices, which needs TLS: run "
                "`edgert init` once to make a certificate and a token, or set server.tls_certificate and "
                "server.tls_key, or listen at 127.0.0.1"
            )


def normal_host(host: str) -> str:
    """A host as certificates have it: an address in its shortest form, or a lower-case ASCII name.

    Raises:
        ConfigError: it is neither.
    """
    text = host.strip().strip("[]")
    try:
        return str(ipaddress.ip_address(text.partition("%")[0]))
    except ValueError:
        pass
    try:
        name = text.encode("idna").decode().lower().rstrip(".")
    except UnicodeError:
        name = ""
    # Without a letter at the end it is an address with a mistake, such as 10.0.0.256.
    if not _HOST.fullmatch(name) or len(name) > 253 or name.rpartition(".")[2].isdigit():
        raise ConfigError(f"{host!r} is neither a host name nor an IP address; give one without port or path")
    return name


class ServerTLS:
    """What both servers show to clients; :meth:`reload` changes it for connections made from then on.

    Attributes:
        context: for the HTTP server (uvicorn: ``ssl_context_factory=lambda *_: tls.context``).

    Raises:
        ConfigError: a file is missing, damaged or too widely readable, or the key is another certificate's.
    """

    def __init__(self, files: TLSFiles) -> None:
        self.files = files
        self.context = _new_context()
        self._pair = _load(files, self.context)

    def reload(self) -> bool:
        """Read the files again; True if they changed. After an error the old ones go on being served.

        Raises:
            ConfigError: as for the class.
        """
        before, self._pair = self._pair, _load(self.files, self.context)
        return self._pair != before

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """Credentials for one gRPC server; it asks for the certificate with each connection."""
        import grpc

        served = self._pair

        def configuration() -> grpc.ServerCertificateConfiguration:
            return grpc.ssl_server_certificate_configuration([(served.key, served.certificate)])

        def newer() -> grpc.ServerCertificateConfiguration | None:
            nonlocal served
            if self._pair == served:
                return None
            served = self._pair
            return configuration()

        return grpc.dynamic_ssl_server_credentials(configuration(), newer)


class _Pair(NamedTuple):
    certificate: bytes
    key: bytes


def _new_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    return context


def _load(files: TLSFiles, context: ssl.SSLContext) -> _Pair:
    """Load the files into a context that may be serving; it is left alone if anything is wrong with them."""
    check_key_permissions(files.key)
    for _ in range(_TRIES):
        pair = _read(files)
        try:
            # First where it does no harm. Without an empty password OpenSSL would ask the terminal for one.
            for each in (_new_context(), context):
                each.load_cert_chain(files.certificate, files.key, password="")
        except (OSError, ssl.SSLError) as error:
            if _read(files) != pair:
                continue  # somebody is replacing them: two files cannot change at the same moment
            why = getattr(error, "reason", None) or error.strerror or error
            raise ConfigError(
                f"{files.certificate} and {files.key} cannot be served ({why}); they must be a certificate "
                "in PEM and its own key without a password; `edgert init` repairs those that it made"
            ) from error
        if _read(files) == pair:
            return pair
    raise ConfigError(f"{files.certificate} and {files.key} change all the time; reload again later")


def _read(files: TLSFiles) -> _Pair:
    found = []
    for path in (files.certificate, files.key):
        try:
            with path.open("rb") as file:
                found.append(file.read(_LARGEST_FILE))
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}; `edgert init` makes both files") from error
    return _Pair(*found)
