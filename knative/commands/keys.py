"""`python -m knative keys`: makes, lists and revokes API keys of a gateway, in the manifest of their Secret or in a list."""

import dataclasses
import secrets
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console

from functions.configuration.api_keys import LIMITS, ApiKey, Quota, limit, sha256_of
from knative.commands.sources.key_file import KeyFile
from knative.commands.terminal.console import show_table
from knative.spec.errors import SpecError


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--make", "name", metavar="NAME", help="Make a key for NAME and print it, the only time that it is seen.")
@click.option("--limit", "limits", metavar="NAME=NUMBER", multiple=True, help=f"Of the key that is made: {', '.join(LIMITS)}.")
@click.option("--revoke", metavar="ID|NAME", help="Take a key out of the file.")
def keys(file: Path, name: str | None, limits: tuple[str, ...], revoke: str | None) -> None:
    """List the API keys in FILE, make another one or revoke one.

    FILE is the manifest of a Secret (.yaml; a new one is named as the file is), or a list of keys as a gateway reads it. It has
    hashes, names and limits, and no key: it may lie beside the pipeline's other manifests. A running gateway follows half a
    second after its file has changed; on a cluster the kubelet first writes the applied Secret there, within a minute or so.

    \b
    python -m knative keys smollm2-api-keys.yaml --make alice --limit requests_per_minute=60 --limit concurrent=4
    kubectl apply -n chat -f smollm2-api-keys.yaml
    python -m knative keys smollm2-api-keys.yaml
    python -m knative keys smollm2-api-keys.yaml --revoke alice
    """
    if name is not None and revoke is not None:
        raise click.UsageError("--make and --revoke: one of them at a time")
    if limits and name is None:
        raise click.UsageError("--limit belongs to --make; limits of a key that is there are changed in the file")
    found = KeyFile.read(file)
    if name is not None:
        _make(found, name, _quota(limits))
    elif revoke is not None:
        _revoke(found, revoke)
    else:
        _show(found)


def _make(file: KeyFile, name: str, quota: Quota) -> None:
    if any(key.name == name for key in file.keys):
        raise SpecError(f"{file.path}: {name} has a key; revoke that, or take another name")
    secret = f"lamina-{secrets.token_urlsafe(32)}"
    made = ApiKey(sha256_of(secret), name, quota)
    file.write((*file.keys, made))
    click.echo(f"{name} is {made.id} in logs; the key itself is kept nowhere:", err=True)
    click.echo(secret)


def _revoke(file: KeyFile, revoke: str) -> None:
    left = tuple(key for key in file.keys if revoke not in (key.id, key.name))
    if len(left) == len(file.keys):
        raise SpecError(f"{file.path}: no key has the id or the name {revoke!r}; without options this command lists them")
    file.write(left)
    click.echo(f"{revoke} is out of {file.path}" + ("" if left else ", which was the last: nobody may ask"), err=True)


def _show(file: KeyFile) -> None:
    rows = [
        (key.id, key.name or "-", _limits(key), "clear text: make another one" if key.in_clear_text else "hash")
        for key in file.keys
    ]
    show_table(Console(), f"{len(rows)} keys in {file.path}", ("id", "name", "limits of its own", "kept as"), rows)


def _limits(key: ApiKey) -> str:
    said = dataclasses.asdict(key.quota)
    return ", ".join(f"{name} {value}" for name, value in said.items() if value is not None) or "-"


def _quota(said: Sequence[str]) -> Quota:
    """Raises click.BadParameter."""
    found: dict[str, int] = {}
    for each in said:
        name, _, value = each.partition("=")
        try:
            found[name] = limit(name, value)
        except ValueError as error:
            raise click.BadParameter(f"{each!r}: {error}", param_hint="--limit") from error
    return Quota(**found)
