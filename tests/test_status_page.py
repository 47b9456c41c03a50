"""The status page in a real browser, before a real daemon."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, Page, Substitute
from page_daemon import (
    JSON,
    SHOWN,
    RunningDaemon,
    busy_status,
    cluster,
    hostile_cluster,
    launched,
    opened,
    piece,
    refusal,
    streamed,
    told,
)

from edge_runtime import __version__
from edge_runtime.daemon.auth import Scope
from edge_runtime.daemon.status import LoadedModel, RequestStatus
from models.synthetic import SyntheticModel, write_synthetic_gguf

PAGE = Path(__file__).resolve().parent.parent / "edge_runtime" / "daemon" / "page" / "index.html"
HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"
LONG = "a_name_without_any_place_to_break_" * 4
ENDED = (
    "document.querySelector('#answer').ariaBusy === 'false' && document.querySelector('#outcome').textContent"
)
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all tests of this file."""
    with launched(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Iterator[RunningDaemon]:
    """A daemon with the demo model that needs no token."""
    with RunningDaemon(tmp_path_factory.mktemp("home")) as running:
        yield running


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    """A daemon whose model has no chat template and talks nonsense for some seconds."""
    folder = tmp_path_factory.mktemp("endless")
    shape = SyntheticModel(n_layers=8, n_embd=256, n_ff=768, n_ctx=4096)
    write_synthetic_gguf(folder / "endless.gguf", shape)
    with RunningDaemon(folder, default=str(folder / "endless.gguf")) as running:
        yield running


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """An empty page as wide as a desk's screen."""
    opened = browser.page()
    yield opened
    opened.close()


def ask(page: Page, prompt: str, **settings: str) -> str:
    """Type a prompt, send it, and wait for its end; returns what the page says about it."""
    for field, value in settings.items():
        page.type(f"#{field.replace('_', '-')}", value)
    page.type("#prompt", prompt)
    page.click("#send")
    return str(page.wait(ENDED))


# --- what it shows ----------------------------------------------------------------------------


def test_it_shows_the_model_and_that_the_daemon_is_ready(page: Page, daemon: RunningDaemon) -> None:
    with opened(page, daemon):
        assert page.text("#state") == "Ready"
        assert page.text("#model") == "demo"
        assert page.text("#version") == __version__
        assert re.fullmatch(r"\d+ s|\d+ min \d+ s", page.text("#uptime"))
        assert "demo" in page.text("#models tbody")
        assert re.fullmatch(r"[\d.]+ [MG]B", page.text("#memory"))
        assert page.text("#requests-sum") == "0 running, 0 of at most 32 waiting"
        assert "Ready" in page.evaluate("document.title")


def test_it_shows_every_part_of_the_status(page: Page, daemon: RunningDaemon) -> None:
    with opened(page, daemon, told(busy_status())):
        rows = page.evaluate(
            "[...document.querySelectorAll('#requests tbody tr')]"
            ".map((row) => [...row.cells].map((cell) => cell.textContent))"
        )
        assert rows == [
            ["request-0", "kitchen", "demo", "answering", "12", "0", "0.5"],
            ["request-1", "kitchen", "demo", "reading the prompt", "12", "7", "0.5"],
            ["request-2", "kitchen", "demo", "waiting", "12", "14", "0.5"],
        ]
        assert page.text("#requests-sum") == "2 running, 1 of at most 32 waiting"
        assert page.text("#models tbody") == "demo2.7 MQ8_0512416.1 MB16.8 MB"
        assert page.text("#finished") == "complete41cancelled2too long for the context1"
        assert page.text("#tokens-sum") == "1,000 prompt tokens read, 2,000 generated"
        assert page.text("#speed-now") == "119"
        assert page.text("#chart") == "050100150120 s ago60 s agonow"
        shown = [page.text(f"#{name}") for name in ("memory", "memory-free", "temperature-now", "cpu")]
        assert shown == ["94.3 MB", "2.9 GB", "51.3 °C", "38 %"]
        assert page.text("#adapters")[:9] == "None yet."


def test_adapters_are_rows_whatever_they_hold(page: Page, daemon: RunningDaemon) -> None:
    found = ({"name": "pi", "memory_bytes": 3_100_000_000}, {"name": "phone", "layers": [0, 7], "lost": None})
    with opened(page, daemon, told(busy_status(adapters=found, temperature=None))):
        assert page.text("#adapters thead") == "NameMemoryLayersLost"
        assert page.text("#adapters tbody") == "pi3.1 GB\u2013\u2013phone\u2013[0,7]\u2013"
        assert page.text("#temperature-now") == "not reported"


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        (
            {"ready": False, "reason": "no token was produced for 61 s"},
            "Not ready: no token was produced for 61 s",
        ),
        ({"stopping": True, "ready": False}, "Stopping: what runs is finished, nothing new is taken"),
    ],
)
def test_it_says_why_the_daemon_takes_nothing(
    page: Page, daemon: RunningDaemon, changes: dict[str, Any], shown: str
) -> None:
    with opened(page, daemon, told(busy_status(**changes))):
        assert page.text("#state") == shown


def test_uptime_is_by_the_daemons_own_clock(page: Page, daemon: RunningDaemon) -> None:
    date = {**JSON, "Date": "Thu, 01 Jan 1970 02:05:00 GMT"}  # a small computer without a battery
    answer = Substitute("/api/status$", 200, json.dumps(busy_status().as_json()), date)
    with opened(page, daemon, answer):
        assert page.text("#uptime") == "2 h 5 min"


def test_a_daemon_that_is_gone_is_noticed_and_found_again(page: Page, daemon: RunningDaemon) -> None:
    with opened(page, daemon):
        page.substitute(Substitute("/api/status$", 0))
        page.wait("document.querySelector('#state').textContent === 'Daemon not reachable'")
        before = len(page.requests)
        assert "is old" in page.wait("document.querySelector('#retry').textContent")
        time.sleep(2.5)
        assert len(page.requests) - before <= 2, "it asks less often while nobody answers"
        page.substitute()
        page.wait("document.querySelector('#state').textContent === 'Ready'")
        assert page.evaluate("document.querySelector('#retry').hidden")
        assert page.problems
        assert all("ERR_CONNECTION_REFUSED" in problem for problem in page.problems)
        page.problems.clear()


def test_a_hidden_page_asks_for_nothing(page: Page, daemon: RunningDaemon) -> None:
    hide = "Object.defineProperty(document, 'hidden', {{configurable: true, value: {}}})"
    change = "document.dispatchEvent(new Event('visibilitychange'))"
    with opened(page, daemon):
        page.evaluate(f"void ({hide.format('true')}, {change})")
        time.sleep(0.2)  # one may be under way
        asked = "performance.getEntriesByType('resource').length"
        before = page.evaluate(asked)
        time.sleep(2.2)
        assert page.evaluate(asked) == before
        page.evaluate(f"void ({hide.format('false')}, {change})")
        page.wait(f"{asked} > {before}", 5)


# --- trying a prompt --------------------------------------------------------------------------


def test_a_prompt_is_answered_piece_by_piece(page: Page, daemon: RunningDaemon) -> None:
    with opened(page, daemon):
        page.evaluate(
            "window.seen = [];"
            "new MutationObserver(() => seen.push(document.querySelector('#answer').innerText)).observe("
            "document.querySelector('#answer'), {childList: true, characterData: true, subtree: true})"
        )
        outcome = ask(page, "Where does Paul Colton live?", temperature="0")
        assert "Lindwell" in page.text("#answer")
        assert len(page.evaluate("seen")) > 2
        counts = re.match(r"(\d+) tokens in [\d.]+ s, [\d.,]+ tokens/s; first text after", outcome)
        assert counts
        assert int(counts[1]) > 3
        assert re.search(r"prompt \d+ tokens\.", outcome)


def test_the_keyboard_suffices(page: Page, daemon: RunningDaemon) -> None:
    with opened(page, daemon):
        page.press("Tab")
        assert page.evaluate("document.activeElement.id") == "prompt"
        page.call("Input.insertText", text="Where does Paul Colton live?")
        page.press("Enter", control=True)
        page.wait(ENDED)
        assert page.text("#answer")
        assert page.evaluate("document.activeElement.id") == "prompt"
        order = []
        for _ in range(4):
            page.press("Tab")
            order.append(page.evaluate("document.activeElement.id"))
        assert order == ["max-tokens", "temperature", "send", "answer"]


@pytest.mark.parametrize("way", ["document.querySelector('#stop').click()", "escape"])
def test_stop_stops(page: Page, endless: RunningDaemon, way: str) -> None:
    escape = (
        "document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape', bubbles: true}))"
    )
    stop = escape if way == "escape" else way
    with opened(page, endless):
        cancelled = endless.finished("cancelled")
        page.evaluate(
            f"void (new MutationObserver(() => {stop})"
            ".observe(document.querySelector('#answer'), {childList: true}))"
        )
        outcome = ask(page, "once", max_tokens="3000")
        assert re.fullmatch(r"Stopped after about \d+ tokens\.", outcome)
        assert page.text("#answer")
        deadline = time.monotonic() + 5
        while endless.finished("cancelled") == cancelled and time.monotonic() < deadline:
            time.sleep(0.05)
        assert endless.finished("cancelled") == cancelled + 1
        page.wait("document.querySelector('#requests-sum').textContent.startsWith('0 running, 0 ')")
        assert page.evaluate("!document.querySelector('#send').disabled")
        page.problems.clear()  # the browser reports that the model has no chat template


def test_a_model_without_a_chat_template_goes_on_with_the_text(page: Page, endless: RunningDaemon) -> None:
    with opened(page, endless):
        outcome = ask(page, "once", max_tokens="12")
        assert outcome.startswith("12 tokens in")
        assert "Cut at the limit of tokens." in outcome
        assert "no chat template" in outcome
        assert page.text("#answer")
        # the browser itself reports the first refusal
        assert all("400 (Bad Request)" in problem for problem in page.problems)
        page.problems.clear()


def test_a_prompt_that_is_too_long_is_refused_in_plain_words(page: Page, daemon: RunningDaemon) -> None:
    with opened(page, daemon):
        outcome = ask(page, "Paul Colton lives in Lindwell. " * 400)
        assert outcome.startswith("That is too long for this model: ")
        page.problems.clear()


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        (
            refusal("/v1/chat", 429, "overloaded", "32 requests wait", **{"Retry-After": "7"}),
            "The daemon has too much to do: 32 requests wait. Try again in 7 s.",
        ),
        (
            refusal("/v1/chat", 503, "unavailable", "the daemon is stopping"),
            "The daemon takes no requests now: the daemon is stopping.",
        ),
        (Substitute("/v1/chat", 502, "<html>", {}), "The daemon refused: it answered 502."),
        (Substitute("/v1/chat", 0), "The daemon is not reachable, or the connection broke."),
    ],
)
def test_a_refusal_is_told_in_plain_words(
    page: Page, daemon: RunningDaemon, answer: Substitute, shown: str
) -> None:
    with opened(page, daemon, answer):
        assert ask(page, "Hello") == shown
        page.problems.clear()


def test_an_error_in_the_midst_of_an_answer_leaves_what_came(page: Page, daemon: RunningDaemon) -> None:
    error = {"error": {"message": "the request took 600 s", "code": "deadline_exceeded"}}
    with opened(page, daemon, streamed("/v1/chat", piece("Paul "), error)):
        assert ask(page, "Hello") == "It took too long: the request took 600 s."
        assert page.text("#answer") == "Paul "


def test_an_answer_that_breaks_off_is_not_taken_for_a_whole_one(page: Page, daemon: RunningDaemon) -> None:
    with opened(page, daemon, streamed("/v1/chat", piece("Paul "), end="")):
        assert ask(page, "Hello") == "The daemon refused: the connection ended before the answer did."


# --- trust ------------------------------------------------------------------------------------


def test_nothing_is_asked_of_another_host(page: Page, daemon: RunningDaemon) -> None:
    with opened(page, daemon):
        ask(page, "Where does Paul Colton live?")
        asked = {url for url in page.requests if not url.startswith("data:")}
        paths = ("api/status", "v1/chat/completions", "v1/edits")
        assert asked == {daemon.url, *(f"{daemon.url}{path}" for path in paths)}


def test_markup_in_a_prompt_or_in_an_answer_stays_text(page: Page, daemon: RunningDaemon) -> None:
    with opened(page, daemon, streamed("/v1/chat", piece(HOSTILE), piece("", "stop"))):
        ask(page, HOSTILE)
        assert page.evaluate("document.querySelector('#answer').innerText") == HOSTILE
        assert page.evaluate("document.querySelector('#prompt').value") == HOSTILE
        assert page.evaluate("document.querySelectorAll('img').length") == 0
        assert page.evaluate("document.title") != "taken"


def test_markup_in_the_status_or_in_an_error_stays_text(page: Page, daemon: RunningDaemon) -> None:
    model = LoadedModel(HOSTILE, 1, HOSTILE, 1, 1, 1, 1, 1)
    request = RequestStatus(HOSTILE, HOSTILE, HOSTILE, "decode", 1, 1, 1.0)
    thing = ({HOSTILE: HOSTILE, "nested": {HOSTILE: [HOSTILE]}},)
    status = busy_status(
        version=HOSTILE,
        ready=False,
        reason=HOSTILE,
        default_model=HOSTILE,
        models=(model, replace(model, name="other")),
        requests=(request,),
        finished={HOSTILE: 1},
        cluster=hostile_cluster(HOSTILE),
        adapters=thing,
    )
    refused = refusal("/v1/chat", 400, HOSTILE, HOSTILE)
    with opened(page, daemon, told(status), refused):
        assert HOSTILE in ask(page, "Hello")
        places = ("state", "version", "model", "models", "requests", "members", "spread", "adapters", "which")
        for place in (*places, "cluster-sum"):
            assert "onerror" in page.text(f"#{place}")
        assert page.evaluate("document.querySelectorAll('img').length") == 0
        assert page.evaluate("document.scripts.length") == 1
        assert "taken" not in page.evaluate("document.title").split("'")[0]
        page.problems.clear()


def test_a_token_is_asked_for_and_kept_in_the_tab_alone(page: Page, tmp_path: Path, demo_model: Path) -> None:
    with RunningDaemon(tmp_path, require_token=True, preload=False) as daemon:
        token = daemon.create_token("browser", Scope.INFER)
        page.open(daemon.url)
        page.wait("!document.querySelector('#ask-token').hidden")
        assert page.text("#state") == "A token is needed"
        page.type("#token", "edgert_wrong")
        page.press("Enter")
        page.wait("document.querySelector('#token-note').textContent.includes('refused the token')")
        before = len(page.requests)
        time.sleep(1.5)
        assert len(page.requests) == before, "a refused token is not tried again"
        page.type("#token", token)
        page.press("Enter")
        page.wait(SHOWN)
        assert page.evaluate("document.querySelector('#ask-token').hidden")
        assert page.evaluate("localStorage.length + document.cookie.length") == 0
        assert (
            "Lindwell"
            in (ask(page, "Where does Paul Colton live?", temperature="0"), page.text("#answer"))[1]
        )
        assert token not in page.evaluate("document.documentElement.outerHTML")
        assert token not in "".join(page.requests)
        page.open(daemon.url)
        page.wait(SHOWN)
        assert page.evaluate("document.querySelector('#ask-token').hidden"), "a reload keeps it"


class _Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_file_is_small_whole_and_safe() -> None:
    source = PAGE.read_text(encoding="utf-8")
    assert len(source.encode()) < 50_000
    elements = _Elements()
    elements.feed(source)
    names = [name for name, _ in elements.found]
    assert (names.count("script"), names.count("style")) == (1, 1)
    assert not [
        a for _, attributes in elements.found for a in attributes if a == "style" or a.startswith("on")
    ]
    for way in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "localStorage",
        "@import",
    ):
        assert way not in source
    foreign = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s'\"]*", source))
    assert foreign == {"http://www.w3.org/2000/svg"}, "a name of XML's, which nobody asks for"


# --- how it looks -----------------------------------------------------------------------------


@pytest.mark.parametrize("width", [320, 360, 700, 800, 1024, 1280])
def test_it_never_scrolls_sideways(browser: Browser, daemon: RunningDaemon, width: int) -> None:
    model = LoadedModel(LONG, 10**12, "Q4_K_M", 131072, 64, 128, 10**12, 10**12)
    request = RequestStatus(LONG, LONG, LONG, "prefill", 10**6, 10**6, 1e5)
    full = busy_status(
        version=LONG,
        ready=False,
        reason=LONG,
        default_model=LONG,
        models=(model,),
        requests=(request,) * 3,
        finished={LONG: 10**9},
        cluster=hostile_cluster(LONG),
        adapters=({LONG: LONG, "b": LONG, "c": 1, "d": {"e": LONG}},),
    )
    for substitutes in ([], [told(full), streamed("/v1/chat", piece(LONG * 9), piece("", "stop"))]):
        page = browser.page(width=width, height=740)
        with opened(page, daemon, *substitutes):
            ask(page, "Where does Paul Colton live?")
            assert page.evaluate(OVERFLOW) <= 0
        page.close()


def test_on_a_phone_tables_are_stacked(browser: Browser, daemon: RunningDaemon) -> None:
    page = browser.page(width=360, height=740)
    with opened(page, daemon, told(busy_status())):
        cell = "document.querySelector('#requests td:nth-child(4)')"
        assert page.evaluate(f"getComputedStyle({cell}, '::before').content") == '"State"'
        assert page.evaluate(f"getComputedStyle({cell}).display") == "flex"
        page.resize(1280, 800)
        assert page.evaluate(f"getComputedStyle({cell}).display") == "table-cell"
    page.close()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_stands_out(browser: Browser, daemon: RunningDaemon, dark: bool) -> None:
    page = browser.page(dark=dark)
    status = busy_status(cluster=cluster())
    with opened(page, daemon, told(status), refusal("/v1/chat", 400, "", "no")):
        ask(page, "Hello")
        for state in ("ready", "waiting", "lost"):
            page.evaluate(f"document.querySelector('#state').dataset.kind = '{state}'")
            least, where = page.contrasts()[0]
            assert least >= 4.5, where  # WCAG 2.1, level AA
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", ground))) < 200) == dark
        page.problems.clear()
    page.close()


def test_every_field_and_section_has_a_name(page: Page, daemon: RunningDaemon) -> None:
    with opened(page, daemon):
        fields = page.evaluate(
            "[...document.querySelectorAll('input, textarea, select')].map((f) => f.labels.length > 0)"
        )
        assert all(fields)
        assert len(fields) == 10
        sections = page.evaluate(
            "[...document.querySelectorAll('section')].map((s) =>"
            " document.getElementById(s.getAttribute('aria-labelledby'))?.textContent)"
        )
        assert all(sections)
        assert len(sections) == len(set(sections))
