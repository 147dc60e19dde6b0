"""A headless Chromium, driven by selenium."""

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
from selenium.common.exceptions import ElementNotInteractableException, NoSuchElementException, StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

CHROMIUM: Final = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER: Final = shutil.which("chromedriver")
DEADLINE_SECONDS: Final = 240.0

needs_browser = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="no chromium with its driver here: apt-get install chromium chromium-driver"
)


class Browser:
    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        self.driver.get(url)

    def resize(self, width: int, height: int) -> None:
        """Sets the size of the viewport."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def prefer(self, scheme: str) -> None:
        """Sets the system's scheme, dark or light, and turns off animations, which would blur pictures."""
        wanted = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
        features = [{"name": name, "value": value} for name, value in wanted.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """The text of all matching elements."""
        found: str = self.run("return [...document.querySelectorAll(arguments[0])].map(e => e.innerText).join('\\n')", selector)
        return found

    def ask(self, question: str) -> None:
        """Types a question. On a busy machine Chromium can refuse keys for a moment."""
        self.until(lambda: self.find("#question").send_keys(f"{question}\n") or True, "the field for a question takes keys")

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)  # type: ignore[no-untyped-call]

    def until(self, condition: Callable[[], Any], what: str, seconds: float = DEADLINE_SECONDS) -> Any:
        deadline = time.monotonic() + seconds
        while True:
            try:
                if found := condition():
                    return found
            except (ElementNotInteractableException, NoSuchElementException, StaleElementReferenceException):
                pass
            assert time.monotonic() < deadline, f"not within {seconds} s: {what}; the page says:\n{self.text('body')}"
            time.sleep(0.05)

    def console(self) -> list[str]:
        """Messages of the console since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]  # type: ignore[no-untyped-call]

    def requested(self) -> list[str]:
        """URLs that were requested since the last call."""
        entries = self.driver.get_log("performance")  # type: ignore[no-untyped-call]
        messages = [json.loads(entry["message"])["message"] for entry in entries]
        return [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]

    def violations(self) -> list[str]:
        """Accessibility violations that axe-core finds now, by WCAG 2.2 AA and best practices."""
        self.run(_axe())
        found = self.driver.execute_async_script("axe.run(document).then(arguments[arguments.length - 1])")  # type: ignore[no-untyped-call]
        return [f"{each['id']}: {node['html'][:200]}" for each in found["violations"] for node in each["nodes"]]

    def picture(self, file: Path) -> None:
        """Saves the viewport as a small PNG."""
        image = Image.open(BytesIO(self.driver.get_screenshot_as_png())).convert("RGB")
        image.quantize(96, dither=Image.Dither.NONE).save(file, optimize=True)


@contextmanager
def browser(*arguments: str) -> Iterator[Browser]:
    """arguments: more of Chromium's command line."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    # For root in a container with little shared memory, and without requests to the browser's maker.
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars",
        "--disable-background-networking", "--no-first-run", *arguments,
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(DEADLINE_SECONDS)
    try:
        yield Browser(driver)
    finally:
        driver.quit()


def _axe() -> str:
    """The script from a package that is not imported, because it would need another browser."""
    files = metadata.distribution("axe-playwright-python").files or ()
    file = next(file for file in files if file.name == "axe.min.js")
    return file.locate().read_text("utf-8")  # type: ignore[no-any-return, attr-defined]
