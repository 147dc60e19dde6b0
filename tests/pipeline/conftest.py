"""The page in a browser, for test_page.py and test_fleet_page.py. `SCREENSHOTS=docs` writes the pictures of docs/openai.md."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.paths import ROOT

if TYPE_CHECKING:
    from tests.support.functions.browser import Browser
    from tests.support.functions.real_pipeline import RealPipeline


@pytest.fixture(scope="module")
def page(pipeline: "RealPipeline", request: pytest.FixtureRequest) -> "Iterator[Browser]":
    """The page of the module's pipeline, as large as the module's WIDE."""
    from tests.support.functions.browser import browser

    with browser() as page:
        page.prefer("light")
        page.resize(*request.module.WIDE)
        page.open(f"{pipeline.url}/")
        yield page


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return ROOT / os.environ["SCREENSHOTS"] if "SCREENSHOTS" in os.environ else tmp_path
