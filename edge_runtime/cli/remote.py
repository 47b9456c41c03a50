"""The running daemon, for the verbs that talk to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edge_runtime.errors import EdgeRuntimeError, UnauthenticatedError, UnavailableError

if TYPE_CHECKING:
    from edge_runtime.daemon.runtime_file import RunningDaemon

_SECONDS = 10.0  # a daemon on a busy small board answers within this


def running_daemon() -> RunningDaemon | None:
    """The daemon of this user's home folder, else the system's; None where none runs."""
    from edge_runtime.daemon.runtime_file import find
    from edge_runtime.model_store.paths import home

    return find(home())


def needed_daemon() -> RunningDaemon:
    """As :func:`running_daemon`.

    Raises:
        UnavailableError: none runs.
    """
    found = running_daemon()
    if found is None:
        from edge_runtime.model_store.paths import home

        raise UnavailableError(f"no daemon runs for {home()}; `edgert serve` starts one")
    return found


def fetch_status(running: RunningDaemon) -> dict[str, Any]:
    """How the daemon fares, as ``/api/status`` tells it.

    Raises:
        UnavailableError: it cannot be reached. UnauthenticatedError: it wants a token that this user lacks.
    """
    if not running.http:
        return _status_over_grpc()
    import json
    import urllib.error
    import urllib.request

    request = urllib.request.Request(f"{running.url}/api/status")
    token = _own_token()
    if token:
        request.add_header("authorization", f"Bearer {token}")
    # Without the proxies of the environment: the daemon is on this device.
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
    if running.tls:
        import ssl

        context = ssl.create_default_context(cafile=running.ca or None)
        handlers.append(urllib.request.HTTPSHandler(context=context))
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=_SECONDS) as answer:
            found: dict[str, Any] = json.load(answer)
            return found
    except urllib.error.HTTPError as error:
        with error:
            raise _refusal(error.code, running) from error
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", None) or error
        raise UnavailableError(f"the daemon at {running.url} does not answer: {why}") from error


def _own_token() -> str:
    from edge_runtime.model_store.paths import home

    try:
        return (home() / "token").read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _refusal(code: int, running: RunningDaemon) -> EdgeRuntimeError:
    if code in (401, 403):
        return UnauthenticatedError(
            f"the daemon (process {running.pid}) wants a token, and this user has none that it takes; run this "
            "as the daemon's user"
        )
    return UnavailableError(
        f"the daemon at {running.url} answers with HTTP {code}; `edgert logs` may say why"
    )


def _status_over_grpc() -> dict[str, Any]:
    raise NotImplementedError
