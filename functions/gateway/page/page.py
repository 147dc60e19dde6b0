"""The page at `/`: one file that a browser runs, which asks this gateway and nobody else."""

import base64
import hashlib
import re
from importlib.resources import files
from typing import Final

from flask import Flask, Response

_FILE: Final = "page.html"


class Page:
    """The file, and what a browser may do with it: run its own script and style, by their hashes, and speak to this gateway."""

    def __init__(self) -> None:
        self._html = files(__package__).joinpath(_FILE).read_text("utf-8")
        self._headers = {"Content-Security-Policy": _policy(self._html)}

    def register(self, app: Flask) -> None:
        app.get("/")(self._page)

    def _page(self) -> Response:
        return Response(self._html, content_type="text/html; charset=utf-8", headers=self._headers)


def _policy(html: str) -> str:
    """CSP level 3: nothing but what stands here."""
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src '{_hash_of('script', html)}'",
            f"style-src '{_hash_of('style', html)}'",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )


def _hash_of(element: str, html: str) -> str:
    """Of the one element's text, as browsers take it: every byte between its tags."""
    (text,) = re.findall(rf"<{element}>(.*?)</{element}>", html, re.DOTALL)
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
