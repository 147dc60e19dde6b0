"""A real browser without a window: Debian's Chromium with its driver, by selenium."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import pytest
from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

CHROMIUM: Final = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER: Final = shutil.which("chromedriver")
DEADLINE_SECONDS: Final = 90.0

needs_browser = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="no chromium with its driver here: apt-get install chromium chromium-driver"
)


class Browser:
    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        self.driver.get(url)

    def resize(self, width: int, height: int) -> None:
        """Of what the page sees."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def prefer(self, scheme: str) -> None:
        """dark or light, as the system would say, and nothing that moves: a picture has no middle of a transition."""
        wanted = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
        features = [{"name": name, "value": value} for name, value in wanted.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """Of all that match; empty where none does."""
        found: str = self.run("return [...document.querySelectorAll(arguments[0])].map(e => e.innerText).join('\\n')", selector)
        return found

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)  # type: ignore[no-untyped-call]

    def until(self, condition: Callable[[], Any], what: str, seconds: float = DEADLINE_SECONDS) -> Any:
        deadline = time.monotonic() + seconds
        while True:
            try:
                if found := condition():
                    return found
            except (NoSuchElementException, StaleElementReferenceException):
                pass
            assert time.monotonic() < deadline, f"not within {seconds} s: {what}; the page says:\n{self.text('body')}"
            time.sleep(0.05)

    def said(self) -> list[str]:
        """What the console has, and forgets it."""
        return [entry["message"] for entry in self.driver.get_log("browser")]  # type: ignore[no-untyped-call]

    def requested(self) -> list[str]:
        """Every URL since the last call."""
        entries = self.driver.get_log("performance")  # type: ignore[no-untyped-call]
        messages = [json.loads(entry["message"])["message"] for entry in entries]
        return [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]

    def violations(self) -> list[str]:
        """What axe-core finds, WCAG 2.2 AA and good practice, in the page as it stands."""
        self.run(_axe())
        found = self.driver.execute_async_script("axe.run(document).then(arguments[arguments.length - 1])")  # type: ignore[no-untyped-call]
        return [f"{each['id']}: {node['html'][:200]}" for each in found["violations"] for node in each["nodes"]]

    def picture(self, file: Path) -> None:
        """A small PNG of what is seen."""
        image = Image.open(BytesIO(self.driver.get_screenshot_as_png())).convert("RGB")
        image.quantize(96, dither=Image.Dither.NONE).save(file, optimize=True)


@contextmanager
def browser() -> Iterator[Browser]:
    assert CHROMIUM is not None
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    # As root, in a container with little shared memory, and with nothing that the browser asks of its maker.
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--hide-scrollbars",
        "--disable-background-networking",
        "--no-first-run",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        yield Browser(driver)
    finally:
        driver.quit()


def _axe() -> str:
    """The file alone, of a package that is not imported: it would want a browser of its own."""
    files = metadata.distribution("axe-playwright-python").files or ()
    file = next(file for file in files if file.name == "axe.min.js")
    return file.locate().read_text("utf-8")  # type: ignore[no-any-return, attr-defined]
