"""Drives headless Chromium over its DevTools pipe: JSON messages that end in NUL, on descriptors 3 and 4."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import queue
import re
import shutil
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
OPTIONS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",  # a sandbox needs rights that a container's root does not have
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # a foreign host cannot even be looked up
)
ANSWER_SECONDS = 60.0  # a step of the browser on two busy cores


def find_chromium() -> str | None:
    """Path of an installed browser that speaks the protocol."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


# By the formula of WCAG 2.1; a node's own background, or the nearest one behind it.
CONTRASTS = """
(() => {
  const parse = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    for (let n = node; n; n = n.parentElement) {
      const color = parse(getComputedStyle(n).backgroundColor);
      if (color.length < 4 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    const box = node.getBoundingClientRect();
    if (!own && !node.matches("input, textarea")) continue;
    if (node.disabled || !box.width || node.closest("script")) continue;
    const style = getComputedStyle(node), drawn = node.closest("svg") ? style.fill : style.color;
    const [a, b] = [light(parse(drawn)), light(behind(node))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), `${node.tagName} ${node.id} ${node.className}`]);
  }
  return found.sort((x, y) => x[0] - y[0]);
})()
"""


class BrowserError(Exception):
    """The browser refused a step, or the page threw."""


@dataclass(frozen=True, slots=True)
class Substitute:
    """What a request gets instead of the server's answer.

    Attributes:
        path: regular expression that the URL has to contain.
        status: of HTTP; 0: the connection fails.
    """

    path: str
    status: int = 200
    body: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)


class Browser:
    """A browser process; ``page`` opens pages that share nothing with each other."""

    def __init__(self, executable: str, folder: Path) -> None:
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        # high numbers, so that none of them is in the way of 3 and 4
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 64) for end in (to_browser, from_browser)]
        log = os.open(folder / "chromium.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o600)
        actions = [(os.POSIX_SPAWN_DUP2, log, 1), (os.POSIX_SPAWN_DUP2, log, 2)]
        actions += [(os.POSIX_SPAWN_DUP2, end, 3 + i) for i, end in enumerate(ends)]
        command = [executable, *OPTIONS, f"--user-data-dir={folder / 'profile'}", "about:blank"]
        environment = {**os.environ, "HOME": str(folder)}
        self._pid = os.posix_spawn(executable, command, environment, file_actions=actions, setpgroup=0)
        for end in (to_browser, from_browser, *ends, log):
            os.close(end)
        self._lock = threading.Lock()
        self._last = 0
        self._waiting: dict[int, queue.Queue[dict[str, Any]]] = {}
        self._pages: dict[str, Page] = {}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def send(
        self,
        method: str,
        parameters: Mapping[str, Any],
        session: str = "",
        answer: queue.Queue[dict[str, Any]] | None = None,
    ) -> int:
        """Send a command without waiting; its answer goes into the queue. Returns its number."""
        with self._lock:
            self._last += 1
            message: dict[str, Any] = {"id": self._last, "method": method, "params": dict(parameters)}
            if session:
                message["sessionId"] = session
            if answer is not None:
                self._waiting[self._last] = answer
            encoded = json.dumps(message).encode() + b"\0"
            while encoded:
                encoded = encoded[os.write(self._out, encoded) :]
            return self._last

    def call(self, method: str, parameters: Mapping[str, Any], session: str = "") -> dict[str, Any]:
        """Send a command and return its result.

        Raises:
            BrowserError: the browser answers with an error, or not at all.
        """
        answers: queue.Queue[dict[str, Any]] = queue.Queue()
        number = self.send(method, parameters, session, answers)
        try:
            answer = answers.get(timeout=ANSWER_SECONDS)
        except queue.Empty:
            raise BrowserError(f"no answer to {method} within {ANSWER_SECONDS:.0f} s") from None
        finally:
            self._waiting.pop(number, None)
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error'].get('message')}")
        result: dict[str, Any] = answer["result"]
        return result

    def _read(self) -> None:
        rest = b""
        while piece := os.read(self._in, 1 << 16):
            *messages, rest = (rest + piece).split(b"\0")
            for message in map(json.loads, messages):
                if "id" in message:
                    if waiting := self._waiting.get(message["id"]):
                        waiting.put(message)
                elif page := self._pages.get(message.get("sessionId", "")):
                    page.happened(message["method"], message["params"])
        for waiting in list(self._waiting.values()):
            waiting.put({"error": {"message": "the browser has ended; its log is chromium.log"}})

    def page(self, *, width: int = 1280, height: int = 800, dark: bool = False) -> Page:
        """An empty page with storage of its own."""
        context = self.call("Target.createBrowserContext", {})["browserContextId"]
        target = self.call("Target.createTarget", {"url": "about:blank", "browserContextId": context})
        attached = self.call("Target.attachToTarget", {"targetId": target["targetId"], "flatten": True})
        page = self._pages[attached["sessionId"]] = Page(self, attached["sessionId"], context)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        return page

    def close(self) -> None:
        """End the browser and its helpers."""
        os.close(self._out)
        deadline = time.monotonic() + 5
        while os.waitpid(self._pid, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                os.killpg(self._pid, signal.SIGKILL)
                os.waitpid(self._pid, 0)
                break
            time.sleep(0.02)
        self._reader.join(5)
        os.close(self._in)


class Page:
    """A page and what happened on it.

    Attributes:
        requests: URLs asked for, in order.
        problems: console errors, uncaught exceptions, violations of the content policy.
    """

    def __init__(self, browser: Browser, session: str, context: str) -> None:
        self._browser, self._session, self._context = browser, session, context
        self._substitutes: list[Substitute] = []
        self.requests: list[str] = []
        self.sent: list[dict[str, Any]] = []
        self.problems: list[str] = []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol to this page."""
        return self._browser.call(method, parameters, self._session)

    def happened(self, method: str, event: Mapping[str, Any]) -> None:
        """Takes an event; called by the thread that reads."""
        match method:
            case "Network.requestWillBeSent":
                self.requests.append(event["request"]["url"])
                self.sent.append(event["request"])
            case "Runtime.exceptionThrown":
                details = event["exceptionDetails"]
                self.problems.append(details.get("exception", {}).get("description") or details["text"])
            case "Runtime.consoleAPICalled" if event["type"] in ("error", "warning", "assert"):
                self.problems.append(
                    " ".join(str(a.get("value", a.get("description"))) for a in event["args"])
                )
            case "Log.entryAdded" if event["entry"]["level"] in ("error", "warning"):
                self.problems.append(f"{event['entry']['text']} {event['entry'].get('url', '')}")
            case "Fetch.requestPaused":
                self._paused(event["requestId"], event["request"]["url"])

    def _paused(self, number: str, url: str) -> None:
        chosen = next((s for s in self._substitutes if re.search(s.path, url)), None)
        answer: dict[str, Any] = {"requestId": number}
        if chosen is None:
            method = "Fetch.continueRequest"
        elif not chosen.status:
            method = "Fetch.failRequest"
            answer["errorReason"] = "ConnectionRefused"
        else:
            method = "Fetch.fulfillRequest"
            headers = [{"name": k, "value": v} for k, v in chosen.headers.items()]
            body = base64.b64encode(chosen.body.encode()).decode()
            answer |= {"responseCode": chosen.status, "responseHeaders": headers, "body": body}
        self._browser.send(method, answer, self._session)

    def substitute(self, *substitutes: Substitute) -> None:
        """From now on these answer what they match; everything else goes to the server."""
        self._substitutes = list(substitutes)
        self.call("Fetch.enable", patterns=[{"urlPattern": "*"}])

    def open(self, url: str) -> None:
        """Go to a page and wait until its script has run."""
        result = self.call("Page.navigate", url=url)
        if "errorText" in result:
            raise BrowserError(f"{url}: {result['errorText']}")
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, waited for where it is a promise."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise BrowserError(answer["exceptionDetails"].get("exception", {}).get("description", "it threw"))
        return answer["result"].get("value")

    def wait(self, expression: str, seconds: float = 30) -> Any:
        """The value of an expression once it is true.

        Raises:
            BrowserError: it did not become true in time; says what the page shows.
        """
        deadline = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            if time.monotonic() > deadline:
                shown = self.evaluate("document.body.innerText")
                raise BrowserError(f"not within {seconds} s: {expression}\n{shown}\n{self.problems}")
            time.sleep(0.03)
        return value

    def text(self, selector: str) -> str:
        """The text of an element."""
        return str(self.evaluate(f"document.querySelector({json.dumps(selector)}).textContent"))

    def type(self, selector: str, text: str) -> None:
        """Put the focus on a field and replace what is in it, as typing does."""
        self.evaluate(
            f"void (document.querySelector({json.dumps(selector)}).focus(), document.activeElement.select())"
        )
        self.call("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """Press and release the mouse in the middle of an element."""
        place = self.evaluate(
            f"(() => {{ const node = document.querySelector({json.dumps(selector)});"
            "node.scrollIntoView({block: 'center'}); const box = node.getBoundingClientRect();"
            "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call(
                "Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1
            )

    def press(self, key: str, *, control: bool = False) -> None:
        """Press and release a key that has a name."""
        codes = {"Enter": 13, "Escape": 27, "Tab": 9}
        text = {"text": "\r"} if key == "Enter" and not control else {}  # which sends a form
        for kind in ("keyDown" if text else "rawKeyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=codes[key],
                modifiers=2 if control else 0,
                **text,
            )

    def resize(self, width: int, height: int) -> None:
        """Show the page at this size in CSS pixels; narrow ones as a phone does."""
        phone = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )

    def contrasts(self) -> list[tuple[float, str]]:
        """Contrast of each visible text with what is behind it, the least one first, and where it is."""
        return [(ratio, place) for ratio, place in self.evaluate(CONTRASTS)]

    def screenshot(self, path: Path) -> None:
        """A picture (PNG) of the whole page."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        """Close it and forget its storage."""
        self._browser.call("Target.disposeBrowserContext", {"browserContextId": self._context})
