"""The page of a fleet in a real browser, over a real fleet of the packaged model and tiny ones.

The tests are one scenario, in order.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.functions.browser import Browser, needs_browser
from tests.support.functions.real_pipeline import RealFleet, real_fleet

pytestmark = [needs_browser, pytest.mark.timeout(600)]

NAMES = ("tiny-code", "tiny-draft", "tiny-search")
PERCENT = 90  # of the requests for the first one, that its canary gets
WIDE = (1440, 900)
MIDDLE = (1100, 900)
NARROW = (412, 840)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealFleet]:
    with real_fleet(tmp_path_factory.mktemp("fleet"), NAMES, PERCENT) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def pipeline(fleet: RealFleet) -> RealFleet:
    """What `page` shows."""
    return fleet


def state_of(page: Browser, model: str) -> str:
    found: str = page.run(
        """
        const name = [...document.querySelectorAll("#members .name")].find(each => each.textContent === arguments[0]);
        return name?.parentElement.dataset.state || "";
        """,
        model,
    )
    return found


def test_all_models_are_listed_at_zero_and_the_first_is_shown(page: Browser, fleet: RealFleet) -> None:
    page.until(lambda: page.text("#link") == "live", "the stream")
    page.until(lambda: page.text("#members .name").split() == [fleet.model, *NAMES], "all members")
    page.until(lambda: all(state_of(page, name) == "zero" for name in (fleet.model, *NAMES)), "all at zero")
    assert "4 models, 0 with pods · 0 of 2 pods" in page.text("#fleet-facts")
    page.until(lambda: page.text("#model") == fleet.model, "the first one")
    page.until(lambda: page.text(".stage").count("At zero: no replica runs.") == 1, "its pipeline")
    assert not page.violations()


def test_the_chosen_model_answers_while_another_waits_for_a_device(page: Browser, fleet: RealFleet, pictures: Path) -> None:
    with fleet.paused_store():
        page.ask("Write a very long story about a lighthouse keeper, with many chapters.")  # 1,024 tokens
        page.until(lambda: state_of(page, fleet.model) == "starting", "its start")
    page.until(lambda: len(page.text(".turn.assistant .said")) > 200, "a part of the answer")
    page.until(lambda: state_of(page, fleet.model) == "serving", "its state")
    assert page.text(".turn.assistant .who") == fleet.model
    page.until(lambda: "tokens/s" in page.text("#members .facts"), "its speed")
    assert "pod-seconds" in page.text("#members .facts")
    with fleet.asking("tiny-code"):
        page.until(lambda: state_of(page, "tiny-code") == "waiting", "two devices more are not there")
        page.until(lambda: " s for a device" in page.text("#members .facts"), "since when")
        assert "tiny-code: waits for a device" in page.text("#happened")
        page.picture(pictures / "page-fleet.png")
        page.prefer("dark")
        assert not page.violations()
        page.prefer("light")
        page.find("#stop").click()
        page.until(lambda: state_of(page, "tiny-code") == "serving", "the other gave way")
    page.until(lambda: page.text(".turn.assistant .note") == "Stopped.", "the end")


def test_another_model_is_chosen_by_keyboard_and_asked(page: Browser) -> None:
    page.run("document.querySelectorAll('#members button')[2].focus()")
    page.driver.switch_to.active_element.send_keys("\n")
    page.until(lambda: page.text("#model") == "tiny-draft", "the next model")
    page.until(lambda: page.text(".stage h3").count("layers") == 2, "its stages")
    assert page.run("return location.hash") == "#tiny-draft"
    assert page.run("return [...document.querySelectorAll('#members [aria-pressed=true] .name')].map(e => e.textContent)") == [
        "tiny-draft"
    ]
    page.find("#new").click()
    page.ask("hello")
    page.until(lambda: page.text(".turn.assistant .note").count("tokens, first after") == 1, "an answer")
    assert page.text(".turn.assistant .who") == "tiny-draft"
    page.driver.refresh()
    page.until(lambda: page.text("#model") == "tiny-draft", "the model of the address")


def test_a_canary_of_one_member_is_shown_beside_it(page: Browser, fleet: RealFleet) -> None:
    row = f"tiny-code, canary {PERCENT} %"
    with fleet.applied(fleet.canary):
        page.until(lambda: state_of(page, row) == "zero", "the canary")

        def asked(shown: Callable[[], Any]) -> Any:
            """Asks first: some requests go to the other version, and the canary goes back to zero."""
            with fleet.asking("tiny-code"):
                pass
            return shown()

        page.until(lambda: asked(lambda: state_of(page, row) == "serving"), "the canary serves")
        in_status = re.compile(rf"^tiny-code-canary, {PERCENT} % +tiny-code +1 +1 ", re.MULTILINE)
        page.until(lambda: asked(lambda: in_status.search(fleet.status())), "the canary in `status`")
    page.until(lambda: not state_of(page, row), "its end")
    assert state_of(page, "tiny-code")


def test_narrow_pages_show_one_of_three_views(page: Browser, pictures: Path) -> None:
    page.resize(*MIDDLE)
    assert all(page.find(part).is_displayed() for part in ("#fleet", "#chat", "#pipeline"))
    assert not page.violations()
    page.resize(*NARROW)
    try:
        for view in ("chat", "pipeline", "fleet"):
            page.find(f"[data-view={view}]:not(html)").click()
            assert [part for part in ("chat", "pipeline", "fleet") if page.find(f"#{part}").is_displayed()] == [view]
            box = page.run("return document.getElementById(arguments[0]).getBoundingClientRect().toJSON()", view)
            assert (box["left"], box["right"], box["bottom"]) == (0, *NARROW), "it fills what the header leaves"
            assert page.run("return document.documentElement.scrollWidth <= innerWidth"), "nothing is wider than the window"
        assert not page.violations()
        page.picture(pictures / "page-fleet-narrow.png")
    finally:
        page.resize(*WIDE)


def test_the_page_sent_requests_to_the_gateway_only(page: Browser, fleet: RealFleet) -> None:
    urls = page.requested()
    assert any("/v1/pipeline/events?model=tiny-draft" in url for url in urls)
    assert not [url for url in urls if not url.startswith((f"{fleet.url}/", "data:"))]
    assert not page.console()
