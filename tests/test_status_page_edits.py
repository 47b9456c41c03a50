"""The status page's edits in a real browser, before a real daemon and the real editor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, Page, Substitute
from edit_requests import BEFORE, LONG, OTHER, PROMPT, QUICK, Asked
from page_daemon import JSON, RunningDaemon, busy_status, launched, opened, refusal

from edge_runtime.daemon.auth import Scope

HOSTILE = "<img src=x onerror=\"document.title='taken'\">"
LONG_WORD = "a_name_without_any_place_to_break_" * 4
ROWS = (
    "[...document.querySelectorAll('#edits tbody tr')]"
    ".map((row) => [...row.cells].map((cell) => cell.textContent))"
)
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all tests of this file."""
    with launched(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture
def daemon(tmp_path: Path, demo_model: Path) -> Iterator[RunningDaemon]:
    """A daemon with the demo model that needs no token."""
    with RunningDaemon(tmp_path) as running:
        yield running


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """An empty page as wide as a desk's screen."""
    opened_page = browser.page()
    yield opened_page
    opened_page.close()


def teach(page: Page, asked: Asked) -> str:
    """Fill the form and send it; returns what the page says about it."""
    page.wait("!document.querySelector('#teach').hidden")
    page.evaluate("void (document.querySelector('#teach-note').textContent = '')")
    for name in ("prompt", "subject", "target"):
        page.type(f"#fact-{name}", getattr(asked, name))
    page.click("#teach-send")
    page.wait("!['', 'Working'].includes(document.querySelector('#teach-note').textContent)")
    return page.text("#teach-note")


def told(**changes: Any) -> dict[str, Any]:
    """An edit as the daemon tells of it."""
    check = {"before": 0.0, "after": 1.0, "needed": 1.0, "passed": True, "asked": 4}
    report = {"checks": [{**check, "name": name} for name in ("success", "unrelated")], "reasons": []}
    fact = {"prompt": "Ann Lee lives in", "subject": "Ann Lee", "target": "Oslo", "paraphrases": []}
    edit = {"id": 1, "name": "edit-1", "model": "demo", "kind": "edit", "state": "applied", "error": ""}
    return {**edit, "fact": fact, "queries": [], "report": report, "behind": [], "progress": None, **changes}


def listed(*edits: dict[str, Any]) -> tuple[Substitute, Substitute]:
    """The daemon says that there are these edits."""
    status = {**busy_status().as_json(), "scopes": ["infer", "personalize"]}
    return (
        Substitute("/api/status$", 200, json.dumps(status), JSON),
        Substitute("/v1/edits$", 200, json.dumps({"data": edits}), JSON),
    )


def test_a_fact_is_taught_shown_and_undone(page: Page, daemon: RunningDaemon) -> None:
    with opened(page, daemon):
        assert teach(page, QUICK) == "edit-1 is on its way. It is tested before it counts."
        page.wait("document.querySelector('#edits tbody')?.textContent.includes('applied')")
        ((name, state, taught, success, *_, button),) = page.evaluate(ROWS)
        assert (name, state, button) == ("edit-1", "applied", "Undo")
        assert taught == f"{PROMPT} → {QUICK.target}"
        assert success == "0 % → 100 %"
        page.wait("document.querySelector('#adapters tbody')?.textContent === 'demoedit-1edit'")
        page.type("#prompt", PROMPT)
        page.click("#edits tbody button")
        page.wait("document.querySelector('#edits tbody').textContent.includes('reverted')")
        page.wait("document.querySelector('#adapters p').hidden === false")
        assert page.text("#edits tbody button") == "Apply"
        page.click("#edits tbody button")
        page.wait("document.querySelector('#edits tbody').textContent.includes('applied')")
        page.wait("document.querySelector('#adapters tbody')?.textContent === 'demoedit-1edit'")


def test_edits_wait_for_each_other_and_can_be_cancelled(page: Page, daemon: RunningDaemon) -> None:
    with opened(page, daemon):
        teach(page, LONG)
        teach(page, OTHER)
        page.wait("document.querySelector('#edits tbody tr:nth-child(2)')?.textContent.includes('running')")
        page.wait("document.querySelector('#edits tbody').textContent.includes('step ')")
        assert page.text("#edits-sum") == "0 applied, 2 on their way"
        second, first = page.evaluate(ROWS)
        assert (first[1], second[1]) == ("running", "queued")
        assert second[6] == "waits for edit-1"
        page.click("#edits tbody tr:nth-child(2) button")
        page.wait("document.querySelector('#edits tbody tr:nth-child(2)').textContent.includes('cancelled')")
        page.wait(
            "document.querySelector('#edits tbody tr:nth-child(1)').textContent.includes('applied')", 60
        )


def test_a_refused_edit_says_why(page: Page, daemon: RunningDaemon) -> None:
    with opened(page, daemon):
        said = teach(page, Asked(PROMPT, "Ann Lee", "Oslo"))
        assert said.startswith("The daemon refused: the subject 'Ann Lee' is not in")
        assert page.evaluate("document.querySelector('#teach-note').className").endswith("wrong")
        teach(page, Asked(PROMPT, QUICK.subject, BEFORE))
        page.wait("document.querySelector('#edits tbody')?.textContent.includes('already goes on with')")
        page.problems.clear()


def test_every_state_is_told(page: Page, daemon: RunningDaemon) -> None:
    progress = {"stage": "searching", "step": 7, "steps": 40, "probability": 0.34}
    rejected = {"checks": [], "reasons": ["success: 0% of 1, 100% are needed", "unrelated: 3% of 9"]}
    edits = (
        told(),
        told(name="b", state="rejected", report=rejected),
        told(name="c", state="failed", error="cancelled", report=None),
        told(name="d", kind="forget", fact=None, queries=[{"prompt": "Where is Ann?", "subject": "Ann"}]),
        told(name="e", kind="lora", fact=None, report=None, state="reverted"),
        told(name="f", state="running", progress=progress, report=None),
        told(name="g", state="queued", behind=["f", "x", "y"], report=None),
    )
    with opened(page, daemon, *listed(*edits)):
        page.wait("document.querySelectorAll('#edits tbody tr').length === 7")
        rows = {row[0]: row[1:] for row in page.evaluate(ROWS)}
        none = "\u2013"
        assert rows == {
            "edit-1": ["applied", "Ann Lee lives in → Oslo", *["0 % → 100 %", none] * 2, "Undo"],
            "b": [
                "rejected",
                "Ann Lee lives in → Oslo",
                none,
                none,
                none,
                "; ".join(rejected["reasons"]),
                "Apply",
            ],
            "c": ["failed", "Ann Lee lives in → Oslo", none, none, none, "cancelled", ""],
            "d": ["applied", "forgets: Where is Ann?", *["0 % → 100 %", none] * 2, "Undo"],
            "e": ["reverted", "an adapter", none, none, none, none, "Apply"],
            "f": ["running", "Ann Lee lives in → Oslo", none, none, none, "step 7: Oslo has 34 %", "Cancel"],
            "g": ["queued", "Ann Lee lives in → Oslo", none, none, none, "waits for f and 2 more", "Cancel"],
        }
        assert page.text("#edits-sum") == "2 applied, 2 on their way"


def test_without_the_scope_nothing_of_edits_is_asked_for(
    page: Page, tmp_path: Path, demo_model: Path
) -> None:
    with RunningDaemon(tmp_path, require_token=True) as daemon:
        page.open(daemon.url)
        page.wait("!document.querySelector('#ask-token').hidden")
        page.type("#token", daemon.create_token("asks", Scope.INFER))
        page.press("Enter")
        page.wait("document.querySelector('#state').textContent === 'Ready'")
        assert not page.evaluate("document.querySelector('#edits-closed').hidden")
        assert page.evaluate("document.querySelector('#teach').hidden")
        assert not [url for url in page.requests if "/v1/edits" in url]


def test_a_change_that_is_refused_says_why(page: Page, daemon: RunningDaemon) -> None:
    refused = refusal("/revert$", 400, "invalid_request", "edit-1 is reverted")
    with opened(page, daemon, *listed(told()), refused):
        page.wait("document.querySelectorAll('#edits tbody button').length === 1")
        page.click("#edits tbody button")
        page.wait("!document.querySelector('#edits-note').hidden")
        assert page.text("#edits-note") == "The daemon refused: edit-1 is reverted."
        assert page.evaluate("document.querySelector('#edits tbody button').ariaLabel") == "Undo edit-1"
        page.problems.clear()


def test_markup_in_an_edit_stays_text(page: Page, daemon: RunningDaemon) -> None:
    fact = dict.fromkeys(("prompt", "subject", "target"), HOSTILE)
    edit = told(name=HOSTILE, state=HOSTILE, fact=fact, error=HOSTILE, behind=[HOSTILE], report=None)
    with opened(page, daemon, *listed(edit, {**edit, "state": "failed"})):
        page.wait("document.querySelectorAll('#edits tbody tr').length === 2")
        assert page.text("#edits tbody").count("onerror") >= 6
        assert page.evaluate("document.querySelectorAll('img').length") == 0
        assert "taken" not in page.evaluate("document.title")


@pytest.mark.parametrize("width", [320, 700, 800, 900, 1024, 1280])
def test_it_never_scrolls_sideways(browser: Browser, daemon: RunningDaemon, width: int) -> None:
    page = browser.page(width=width, height=740)
    fact = dict.fromkeys(("prompt", "subject", "target"), LONG_WORD)
    edits = [told(id=i, name=LONG_WORD, fact=fact, error=LONG_WORD) for i in range(3)]
    with opened(page, daemon, *listed(*edits, told(state="failed", error=LONG_WORD))):
        page.wait("document.querySelectorAll('#edits tbody tr').length === 4")
        assert page.evaluate(OVERFLOW) <= 0
        edge = "document.querySelector('#edits').getBoundingClientRect().right"
        assert page.evaluate(
            f"document.querySelector('#edits td:last-child').getBoundingClientRect().right <= {edge} + 1"
        )
    page.close()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_stands_out(browser: Browser, daemon: RunningDaemon, dark: bool) -> None:
    page = browser.page(dark=dark)
    with opened(page, daemon, *listed(told(), told(state="running"))):
        page.wait("document.querySelectorAll('#edits tbody button').length === 2")
        least, where = page.contrasts()[0]
        assert least >= 4.5, where  # WCAG 2.1, level AA
    page.close()
