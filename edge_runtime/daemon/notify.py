"""Telling systemd how the service does: sd_notify's protocol, which is one datagram a message.

Where ``NOTIFY_SOCKET`` is not set every message is dropped, so that the daemon need not ask.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping


class Notifier:
    """Messages to the service manager.

    Args:
        environment: where systemd says its socket and the watchdog's time.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        environment = os.environ if environment is None else environment
        self._address = _address(environment.get("NOTIFY_SOCKET", ""))
        self.watchdog_seconds = _watchdog_interval(environment) if self._address else None
        """How often to call :meth:`watchdog`: half of what systemd waits for; None for never."""

    @property
    def active(self) -> bool:
        """Whether a service manager listens."""
        return self._address is not None

    def ready(self, status: str = "") -> bool:
        """The start, or a reload, is complete."""
        return self._send("READY=1", status)

    def stopping(self, status: str = "") -> bool:
        """The daemon takes nothing new."""
        return self._send("STOPPING=1", status)

    def reloading(self, status: str = "") -> bool:
        """A reload began; :meth:`ready` ends it."""
        # The time lets systemd (253 and newer, Type=notify-reload) tell this reload from the last.
        clock = getattr(time, "CLOCK_MONOTONIC", None)
        now = time.monotonic_ns() if clock is None else time.clock_gettime_ns(clock)
        return self._send(f"RELOADING=1\nMONOTONIC_USEC={now // 1000}", status)

    def status(self, text: str) -> bool:
        """One line for ``systemctl status``."""
        return self._send("", text)

    def extend(self, seconds: float) -> bool:
        """Ask for so much more time to start or to stop."""
        return self._send(f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}", "")

    def watchdog(self) -> bool:
        """A sign of life; without one in time systemd ends the service and starts it anew."""
        return self._send("WATCHDOG=1", "")

    def _send(self, message: str, status: str) -> bool:
        """Send one datagram.

        Returns:
            whether it went out. A service manager that does not listen is no reason to stop serving.
        """
        if self._address is None:
            return False
        lines = [line for line in (message, f"STATUS={' '.join(status.split())}" if status else "") if line]
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.setblocking(False)
                sender.connect(self._address)
                sender.sendall("\n".join(lines).encode(errors="replace"))
        except OSError:
            return False
        return True


def _address(text: str) -> str | None:
    """A path, or a name in Linux's abstract space, which starts with @ when written."""
    if text.startswith("@") and len(text) > 1:
        return "\0" + text[1:]
    return text if text.startswith("/") and hasattr(socket, "SOCK_CLOEXEC") else None


def _watchdog_interval(environment: Mapping[str, str]) -> float | None:
    # The variables are inherited; WATCHDOG_PID says whether this process is the one that is watched.
    if environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    try:
        microseconds = int(environment.get("WATCHDOG_USEC", ""))
    except ValueError:
        return None
    return microseconds / 2e6 if microseconds > 0 else None
