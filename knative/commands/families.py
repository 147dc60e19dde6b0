"""`families` lists the model families of the installed transformers, and how stages run each."""

from collections import Counter
from typing import TYPE_CHECKING, Final

import click

from storage.errors import LibraryMissing

if TYPE_CHECKING:
    from functions.stage.models.transformers.catalogue import KnownFamily

_MEANINGS: Final = {
    "native": "layers in C on CPUs, in every dtype",
    "generic": "transformers' modules, in float dtypes; `push` tries the cut first",
    "refused": "no stage runs it",
}


@click.command(short_help="List model families, and how each runs.")
def families() -> None:
    """List every decoder-only text family of the installed transformers: native, generic, or refused and why.

    \b
    native   layers in C on CPUs, in every dtype
    generic  transformers' modules, in float dtypes; push tries first whether the model can be cut
    """
    known = _known()
    for family in known:
        click.echo(f"{family.model_type:<24}{family.runs}{f': {family.why}' if family.why else ''}")
    counts = Counter[str](family.runs for family in known)
    click.echo(f"{len(known)} families: " + ", ".join(f"{counts[runs]} {runs}" for runs in _MEANINGS))


def markdown_table() -> str:
    """The same list for the documentation."""
    known = _known()
    rows = []
    for runs, meaning in _MEANINGS.items():
        names = [
            f"{each.model_type} ({each.why})" if runs == "refused" else each.model_type for each in known if each.runs == runs
        ]
        rows.append(f"| {runs} | {meaning} | {len(names)}: {', '.join(names)} |")
    return "\n".join(["| runs | meaning | families, by `model_type` |", "|---|---|---|", *rows])


def _known() -> "list[KnownFamily]":
    try:
        from functions.stage.models.transformers.catalogue import known_families
    except ImportError as error:
        raise LibraryMissing("the list of families takes transformers", error) from error
    return known_families()
