"""The page at `/`: one HTML file that makes requests to this gateway only."""

import base64
import hashlib
import re
from importlib.resources import files
from typing import Final

from flask import Flask, Response

_FILE: Final = "page.html"


def register_page(app: Flask, *, of_fleet: bool = False) -> None:
    """Serves the page. Its Content-Security-Policy allows only the file's own script and style, by their hashes.

    If `of_fleet`, the page also shows the fleet's models, from `GET /v1/fleet/events`.
    """
    html = files(__package__).joinpath(_FILE).read_text("utf-8")
    if of_fleet:
        html = html.replace("<html ", "<html data-fleet ", 1)
    policy = (
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
    headers = {"Content-Security-Policy": "; ".join(policy)}
    app.get("/", endpoint="page")(lambda: Response(html, content_type="text/html; charset=utf-8", headers=headers))


def _hash_of(element: str, html: str) -> str:
    """Returns the hash of an element's content, SHA-256 as CSP level 3 writes it. The element must occur once in the file."""
    (text,) = re.findall(rf"<{element}>(.*?)</{element}>", html, re.DOTALL)
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
