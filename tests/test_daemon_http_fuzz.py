"""Whatever arrives over HTTP, the answer is a sound one or a typed error, and the daemon goes on."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from daemon_fixture import RunningDaemon, small_config
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
REFUSALS = {400, 404, 413, 415, 429, 503, 504}
JSON_TYPE = {"content-type": "application/json"}
FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


class Records(logging.Handler):
    """Errors that were logged: each would have been a traceback."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record)


class Target:
    """A daemon to shoot at."""

    def __init__(self, daemon: RunningDaemon, errors: Records) -> None:
        self.daemon = daemon
        self.errors = errors
        self.client = httpx.Client(base_url=daemon.url, timeout=60)

    def ask(self, path: str, content: bytes, headers: dict[str, str] | None = None) -> httpx.Response:
        """Send a body and check that the answer is one of those that are allowed."""
        answer = self.client.post(path, content=content, headers=headers or JSON_TYPE)
        if answer.status_code != 200:
            check_error(answer.status_code, answer.content)
        elif answer.headers["content-type"].startswith("text/event-stream"):
            assert answer.content.endswith(b"\n\n")
        else:
            json.loads(answer.content, parse_constant=pytest.fail)
        self.check_alive()
        return answer

    def check_alive(self) -> None:
        assert self.client.get("/readyz").status_code == 200
        assert not self.errors.found, self.errors.found[0].getMessage()


def check_error(status: int, body: bytes) -> None:
    assert status in REFUSALS, (status, body)
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and 0 < len(error["message"]) < 1000
    assert error["code"] and error["type"]
    for part in ("Traceback", "File ", ".py"):
        assert part not in error["message"]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    errors = Records()
    logging.getLogger().addHandler(errors)
    config = small_config(context=64, max_body_bytes=300_000)
    with RunningDaemon(tmp_path_factory.mktemp("fuzz"), config) as daemon:
        made = Target(daemon, errors)
        yield made
        made.client.close()
    logging.getLogger().removeHandler(errors)
    assert not errors.found


NUMBERS = st.one_of(
    st.integers(-3, 70),
    st.integers(),
    st.sampled_from([2**31, 2**63, 2**64, -(2**63), 10**40, 10**400]),
    st.floats(allow_nan=True, allow_infinity=True),
)
# Half surrogates included, which JSON can write and UTF-8 cannot.
TEXTS = st.text(st.characters(exclude_categories=()), max_size=20)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
PARAMETERS = """
    model prompt messages input temperature top_p top_k min_p seed stop n best_of echo suffix logprobs
    top_logprobs max_tokens max_completion_tokens stream stream_options tools tool_choice functions
    response_format logit_bias presence_penalty frequency_penalty repetition_penalty repeat_penalty
    penalty_window repeat_last_n timeout user metadata store encoding_format dimensions modalities audio
    reasoning_effort role content mode quality
"""
NAMES = st.sampled_from(PARAMETERS.split())
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "system", "assistant", "developer", "tool"]) | VALUES},
        optional={
            "content": TEXTS
            | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": TEXTS}))
            | VALUES,
            "name": VALUES,
            "tool_calls": VALUES,
        },
    ),
    max_size=4,
)
TOKENS = st.lists(st.integers(-1, 2**32), max_size=10)
SOUND = st.fixed_dictionaries(
    {},
    optional={
        "prompt": TEXTS | st.lists(TEXTS, max_size=3) | TOKENS | st.lists(TOKENS, max_size=3),
        "input": TEXTS | st.lists(TEXTS, max_size=3) | TOKENS | st.lists(TOKENS, max_size=3),
        "messages": MESSAGES,
        "max_tokens": st.integers(0, 8),
        "temperature": st.floats(0, 100),
        "top_p": st.floats(0, 1),
        "seed": st.integers(-(2**63), 2**64),
        "mode": st.sampled_from(["exact", "relaxed"]),
        "quality": st.floats(0, 1),
        "stop": TEXTS | st.lists(TEXTS, max_size=3),
        "stream": st.booleans(),
        "logprobs": st.booleans() | st.integers(0, 20),
        "top_logprobs": st.integers(0, 20),
    },
)


def written(value: Any) -> bytes:
    return json.dumps(value).encode()


@FUZZ
@given(path=st.sampled_from(PATHS), content=st.binary(max_size=200))
@example(PATHS[0], b"")
@example(PATHS[0], b"null")
@example(PATHS[0], b'{"messages": NaN}')
@example(PATHS[0], b'{"temperature": -Infinity}')
@example(PATHS[0], b'\xef\xbb\xbf{"messages": []}')
@example(PATHS[0], '{"messages": []}'.encode("utf-16"))
@example(PATHS[1], b"[" * 100_000)
@example(PATHS[1], b'{"prompt":' * 20_000)
@example(PATHS[1], b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}")
@example(PATHS[1], b'{"prompt": "a", "max_tokens": ' + b"9" * 100_000 + b"}")
@example(PATHS[1], b'{"prompt": "a", "temperature": 1e999}')
@example(PATHS[1], b'{"prompt": "\\ud800", "max_tokens": 1}')
@example(PATHS[1], b'{"prompt": "a", "stop": "\\udfff", "max_tokens": 1}')
@example(PATHS[1], b'{"prompt": "a", "model": "\\udfff", "max_tokens": 1}')
@example(PATHS[1], b'{"prompt": "a", "\\ud800": 1}')
@example(PATHS[1], b'{"prompt": "\\u0000", "max_tokens": 2}')
@example(PATHS[1], b'{"prompt": [99999999], "max_tokens": 2}')
@example(PATHS[1], b'{"prompt": [[]], "max_tokens": 2}')
@example(PATHS[1], b'{"prompt": [[[1]]], "max_tokens": 2}')
@example(PATHS[1], b'{"prompt": [true], "max_tokens": 2}')
@example(PATHS[1], b'{"prompt": "", "max_tokens": 2}')
@example(PATHS[1], b'{"prompt": "a", "max_tokens": 1, "max_tokens": "b"}')
@example(PATHS[2], b'{"input": ""}')
@example(PATHS[2], b'{"input": []}')
@example(PATHS[2], b'{"input": [[]]}')
@example(PATHS[2], b'{"input": ["a", [1], 2]}')
@example(PATHS[2], b'{"input": [-1]}')
@example(PATHS[2], b'{"input": [4294967296]}')
def test_any_bytes(target: Target, path: str, content: bytes) -> None:
    target.ask(path, content)


@FUZZ
@given(path=st.sampled_from(PATHS), body=st.dictionaries(NAMES | TEXTS, VALUES, max_size=6))
def test_any_json(target: Target, path: str, body: dict[str, Any]) -> None:
    target.ask(path, written(body))


@FUZZ
@given(path=st.sampled_from(PATHS), body=SOUND, strange=st.dictionaries(NAMES, VALUES, max_size=1))
def test_nearly_sound_requests(
    target: Target, path: str, body: dict[str, Any], strange: dict[str, Any]
) -> None:
    target.ask(path, written(body | strange))


@FUZZ
@given(
    kind=st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40),
    encoding=st.sampled_from(["", "gzip", "identity", "br, gzip"]),
    token=st.none()
    | st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_categories=["Cc"]), max_size=40),
)
def test_any_headers(target: Target, kind: str, encoding: str, token: str | None) -> None:
    headers = {"content-type": kind.strip(), "content-encoding": encoding}
    if token is not None:
        headers["authorization"] = token.strip()
    answer = target.client.post(
        PATHS[0], content=b"{}", headers=[(k, v.encode("latin-1")) for k, v in headers.items()]
    )
    if answer.status_code not in (401, 429):
        check_error(answer.status_code, answer.content)
    target.check_alive()


WHOLE = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b'Content-Length: 32\r\n\r\n{"prompt": "a", "max_tokens": 1}'
)
CHUNKED = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b'Transfer-Encoding: chunked\r\n\r\n20\r\n{"prompt": "a", "max_tokens": 1}\r\n0\r\n\r\n'
)


def test_the_raw_requests_are_sound(target: Target) -> None:
    for request in (WHOLE, CHUNKED):
        assert exchange(target, request).startswith(b"HTTP/1.1 200")


def exchange(target: Target, content: bytes) -> bytes:
    """Send bytes, say that no more come, read what comes back."""
    address = (target.daemon.host, target.daemon.port)
    received = b""
    with socket.create_connection(address, timeout=20) as client, contextlib.suppress(ConnectionError):
        client.sendall(content)
        client.settimeout(0.15)  # a request that is not complete gets no answer
        with contextlib.suppress(TimeoutError):
            while part := client.recv(65536):
                received += part
                client.settimeout(0.02)
    return received


def check_raw(received: bytes) -> None:
    if not received:
        return
    head, _, body = received.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    if status != 200 and b"HEAD" not in head:
        length = next(
            int(line.split(b":")[1])
            for line in head.lower().split(b"\r\n")
            if line.startswith(b"content-length")
        )
        if length and len(body) >= length and status not in (401, 403, 405):
            check_error(status, body[:length])
    assert status != 500


@settings(FUZZ, max_examples=30)
@given(request=st.sampled_from([WHOLE, CHUNKED]), length=st.integers(0, len(CHUNKED)))
def test_requests_that_break_off(target: Target, request: bytes, length: int) -> None:
    check_raw(exchange(target, request[:length]))
    target.check_alive()


@settings(FUZZ, max_examples=60)
@given(
    request=st.sampled_from([WHOLE, CHUNKED]),
    place=st.integers(0, len(CHUNKED)),
    removed=st.integers(0, 10),
    inserted=st.binary(max_size=10),
)
def test_requests_with_a_damaged_place(
    target: Target, request: bytes, place: int, removed: int, inserted: bytes
) -> None:
    check_raw(exchange(target, request[:place] + inserted + request[place + removed :]))
    target.check_alive()


@pytest.mark.parametrize(
    "content",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 60,  # the begin of TLS
        b"PRI * HTTP/2.0\r\n\r\n",
        b"\0" * 1000,
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 10_000 + b"\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        WHOLE.replace(b"Content-Length: 32", b"Content-Length: 32\r\nContent-Length: 31"),
        CHUNKED.replace(b"20\r\n", b"zz\r\n"),
        CHUNKED.replace(b"20\r\n", b"f" * 300 + b"\r\n"),
        WHOLE.replace(b"Content-Length: 32", b"Content-Length: 32\r\nTransfer-Encoding: chunked"),
    ],
    ids=range(12),
)
def test_what_is_no_http_is_a_bad_request(target: Target, content: bytes) -> None:
    received = exchange(target, content)
    assert received.startswith((b"HTTP/1.1 400", b"HTTP/1.1 404")), received[:200]
    check_raw(received)
    assert json.loads(received.split(b"\r\n\r\n")[1])["error"]["code"]
    target.check_alive()


def test_garbage_after_a_request_does_not_harm_its_answer(target: Target) -> None:
    received = exchange(target, WHOLE + b"\0garbage\r\n\r\n")
    assert received.startswith(b"HTTP/1.1 200")
    target.check_alive()


@pytest.mark.parametrize("upgrade", ["websocket", "h2c"])
def test_upgrades_are_not_taken(target: Target, upgrade: str) -> None:
    request = f"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade\r\nUpgrade: {upgrade}\r\n\r\n"
    assert exchange(target, request.encode()).startswith(b"HTTP/1.1 200")
    target.check_alive()
