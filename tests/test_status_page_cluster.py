"""What the status page shows of a cluster, in a real browser."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from browser import Browser, Page
from page_daemon import RunningDaemon, busy_status, cluster, launched, opened, partition, told


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all tests of this file."""
    with launched(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    """A daemon that belongs to no cluster, without a model in memory."""
    with RunningDaemon(tmp_path_factory.mktemp("home"), preload=False) as running:
        yield running


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """An empty page as wide as a desk's screen."""
    opened = browser.page()
    yield opened
    opened.close()


def test_without_a_cluster_it_says_how_to_begin_one(page: Page, daemon: RunningDaemon) -> None:
    with opened(page, daemon):
        assert page.text("#cluster-none code") == "edgert cluster invite"
        assert page.evaluate("document.querySelector('#cluster-none').offsetHeight") > 0
        assert page.evaluate("document.querySelector('#members').hidden")
        page.substitute(told(busy_status(cluster=cluster())))
        page.wait("document.querySelector('#cluster-none').hidden")
        page.substitute(told(busy_status()))  # the device has left it
        page.wait("document.querySelector('#members').hidden")
        assert page.evaluate("document.querySelectorAll('#spread > *').length") == 0


def test_it_shows_the_members_of_a_cluster(page: Page, daemon: RunningDaemon) -> None:
    with opened(page, daemon, told(busy_status(cluster=cluster()))):
        assert page.text("#cluster-sum") == "desk, founder; members: 3"
        rows = page.evaluate(
            "[...document.querySelectorAll('#members tbody tr')]"
            ".map((row) => [...row.cells].map((cell) => cell.textContent))"
        )
        assert rows == [
            ["desk", "this device", "1.1 GB", "4", "\u2013", "\u2013", "\u2013"],
            ["shelf", "works", "537 MB", "4", "61 °C", "\u2013", "2.1 ms"],
            ["phone", "gone: nothing listens at 192.0.2.3:8422", *["\u2013"] * 5],
        ]


def test_it_shows_who_computes_what_and_where_the_time_goes(page: Page, daemon: RunningDaemon) -> None:
    with opened(page, daemon, told(busy_status(cluster=cluster()))):
        assert page.text("#spread h3") == "demo, plan 3, relaxed, quality 0.99, over datagrams"
        assert "costs more than its share saves" in page.text("#spread p")
        assert page.text("#spread .legend").startswith("desk 63 %, 90 groups, 4.2 MBshelf 38 %, 54 groups")
        widths = page.evaluate("[...document.querySelectorAll('.bar span')].map((part) => part.offsetWidth)")
        assert widths[0] / sum(widths) == pytest.approx(0.625, abs=0.02)  # whole pixels, a line between
        assert widths[2] == 0
        facts = page.text("#spread .pairs")
        for fact in (
            "A token takes11.4 ms",
            "Predicted10.2 ms",
            "aloneno room for it",
            "Round trips a token2",
            "Contributions on time813",
            "Late, and added then36",
            "Lost2",
            "Recomputed here1",
            "Asked for again31 of 900 sent",
        ):
            assert fact in facts
        heights = page.evaluate(
            "[...document.querySelectorAll('.layers rect:not(.owner)')]"
            ".map((r) => Number(r.getAttribute('height')))"
        )
        assert len(heights) == 6 * 3
        last = heights[-3:]  # of one layer: 1.1 ms computing, 1.0 waiting, 2.0 on the way
        assert [part / sum(last) for part in last] == pytest.approx([1.1 / 4.1, 1.0 / 4.1, 2.0 / 4.1])
        groups = page.evaluate(
            "[...document.querySelectorAll('.layers .owner')]"
            ".map((r) => [r.classList[1], r.height.baseVal.value])"
        )
        assert [owner for owner, _ in groups] == ["n0", "n1"] * 6
        assert groups[0][1] / groups[1][1] == pytest.approx(15 / 9)  # of a layer; phone has none
        page.substitute(told(busy_status(cluster=cluster(partition(), partition(model="other")))))
        page.wait("document.querySelectorAll('#spread > *').length === 2")


def test_on_a_phone_what_is_not_known_takes_no_line(page: Page, daemon: RunningDaemon) -> None:
    page.resize(390, 800)
    with opened(page, daemon, told(busy_status(cluster=cluster()))):
        shown = page.evaluate(
            "[...document.querySelectorAll('#members tbody tr')]"
            ".map((row) => [...row.cells].filter((cell) => cell.offsetHeight)"
            ".map((cell) => cell.dataset.label))"
        )
        assert shown[0] == ["Member", "State", "Lends", "Threads"]
        assert shown[2] == ["Member", "State"]
