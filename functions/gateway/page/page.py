"""The page at `/`: one HTML file that speaks to this gateway only."""

import base64
import hashlib
import re
from importlib.resources import files
from typing import Final

from flask import Flask, Response

_FILE: Final = "page.html"


class Page:
    """Serves the file with a Content-Security-Policy that allows its own script and style, by their hashes, and no others."""

    def __init__(self) -> None:
        self._html = files(__package__).joinpath(_FILE).read_text("utf-8")
        policy = (
            "default-src 'none'",
            f"script-src '{_hash_of('script', self._html)}'",
            f"style-src '{_hash_of('style', self._html)}'",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
        self._headers = {"Content-Security-Policy": "; ".join(policy)}

    def register(self, app: Flask) -> None:
        app.get("/", endpoint="page")(
            lambda: Response(self._html, content_type="text/html; charset=utf-8", headers=self._headers)
        )


def _hash_of(element: str, html: str) -> str:
    """Hash of the text of the file's only such element, every byte between its tags (CSP level 3)."""
    (text,) = re.findall(rf"<{element}>(.*?)</{element}>", html, re.DOTALL)
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
