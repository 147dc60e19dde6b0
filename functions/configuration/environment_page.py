"""Describes the keys of a function's environment as text, for `--help` and for docs/reference.md."""

from typing import Final

from functions.configuration.config import environment

_HELP: Final = """\
python -m functions

Runs one function: a stage of a pipeline, its gateway, or the gateway of a fleet. It is configured by its environment only,
which `python -m knative render` writes into the manifests and `python -m knative run` sets on this machine.

  --help          this page
  --environment   the same as Markdown (docs/reference.md)

"""
_PAGE: Final = """\
## Environment

What `python -m functions` reads. A key that begins with `LAMINA_` and is not listed here is an error, as is a key of another
role; an empty value is the same as none. Written by `make generate`; `python -m functions --environment` prints it.

| key | role | default | meaning |
|---|---|---|---|
"""


def help_text() -> str:
    text, heading = _HELP, None
    for key, role, default, meaning in environment():
        if role != heading:
            text += f"{'All roles' if role == 'all' else role.capitalize()}\n"
            heading = role
        note = f" ({default})" if default == "required" else f" [{default}]" if default else ""
        text += f"  {key}{note}\n      {meaning}\n"
    return text


def markdown_page() -> str:
    page = _PAGE
    for key, role, default, meaning in environment():
        shown = f"`{default}`" if default and default != "required" else default
        page += f"| `{key}` | {role} | {shown} | {meaning} |\n"
    return page
