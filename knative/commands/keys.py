"""`python -m knative keys`: makes, lists and revokes API keys of a gateway, in the manifest of their Secret."""

import secrets
from pathlib import Path

import click
from rich.console import Console

from functions.gateway.doors.api_keys import HASHED, sha256_of
from knative.commands.sources.key_secret import Key, KeySecret
from knative.commands.terminal.console import show_table
from knative.spec.errors import SpecError


@click.command()
@click.argument("secret", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--make", "name", metavar="NAME", help="Make a key for NAME and print it, the only time that it is seen.")
@click.option("--revoke", metavar="ID|NAME", help="Take a key out of the file.")
def keys(secret: Path, name: str | None, revoke: str | None) -> None:
    """List the API keys in SECRET, the file of a Secret's manifest, make another one or revoke one.

    The file has hashes and names, and no key: it may lie beside the pipeline's other manifests. A new file is a new Secret,
    named as the file is. Apply it, and start the gateway's pods anew, which read it when they start.

    \b
    python -m knative keys smollm2-api-keys.yaml --make alice
    kubectl apply -n chat -f smollm2-api-keys.yaml
    python -m knative keys smollm2-api-keys.yaml
    python -m knative keys smollm2-api-keys.yaml --revoke alice
    """
    if name is not None and revoke is not None:
        raise click.UsageError("--make and --revoke: one of them at a time")
    found = KeySecret.read(secret)
    if name is not None:
        _make(secret, found, name)
    elif revoke is not None:
        _revoke(secret, found, revoke)
    else:
        rows = [(key.id, key.name or "-", "hash" if key.is_hashed else "clear text: make another one") for key in found.keys]
        show_table(Console(), f"{len(rows)} keys in {secret}", ("id", "name", "kept as"), rows)


def _make(secret: Path, found: KeySecret, name: str) -> None:
    if any(key.name == name for key in found.keys):
        raise SpecError(f"{secret}: {name} has a key; revoke that, or take another name")
    key = f"lamina-{secrets.token_urlsafe(32)}"
    made = Key(HASHED + sha256_of(key), name)
    found.with_keys((*found.keys, made)).write(secret)
    click.echo(f"{name} is {made.id} in logs; the key itself is kept nowhere:", err=True)
    click.echo(key)


def _revoke(secret: Path, found: KeySecret, revoke: str) -> None:
    left = tuple(key for key in found.keys if revoke not in (key.id, key.name))
    if len(left) == len(found.keys):
        raise SpecError(f"{secret}: no key has the id or the name {revoke!r}; without options this command lists them")
    found.with_keys(left).write(secret)
    click.echo(f"{revoke} is out of {secret}; apply it, and start the gateway's pods anew", err=True)
