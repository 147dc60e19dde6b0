"""The environment of a function as text, from `config`: for `--help`, and for docs/reference.md."""

from collections.abc import Iterator
from typing import Final

from functions.configuration.config import environment

_HELP: Final = """\
python -m functions

Runs one function: a stage of a pipeline, or its gateway. Everything it needs to know comes from the environment;
`python -m knative render` writes it into the manifests, `python -m knative run` sets it on this machine.

  --help          this page
  --environment   the same as Markdown (docs/reference.md)

"""
_PAGE: Final = """\
## Environment

What `python -m functions` reads. A key that begins with `LAMINA_` and is not listed here is an error, as is a key of the other
role; an empty value is the same as none. Written by `make generate`; `python -m functions --environment` prints it.

| key | role | default | meaning |
|---|---|---|---|
"""


def help_text() -> str:
    return _HELP + "".join(_paragraphs())


def markdown_page() -> str:
    rows = (f"| `{key}` | {role} | {_shown(default)} | {meaning} |\n" for key, role, default, meaning in environment())
    return _PAGE + "".join(rows)


def _paragraphs() -> Iterator[str]:
    heading = None
    for key, role, default, meaning in environment():
        if role != heading:
            yield f"{'Both roles' if role == 'both' else role.capitalize()}\n"
            heading = role
        note = f" ({default})" if default == "required" else f" [{default}]" if default else ""
        yield f"  {key}{note}\n      {meaning}\n"


def _shown(default: str) -> str:
    return f"`{default}`" if default and default != "required" else default
