"""`python -m knative keys`: makes, lists and revokes API keys in the manifest of their Secret, or in a list of keys."""

import base64
import binascii
import dataclasses
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import click
import yaml
from rich.console import Console

from functions.configuration.api_keys import LIMITS, ApiKey, Quota, limit, parse_keys, sha256_of
from functions.gateway.answers.budgets import PERIODS, Budgets
from knative.commands.console import show_table
from knative.commands.state_folder import replace_file
from knative.spec.errors import SpecError
from knative.spec.kubernetes_object import to_yaml
from knative.spec.pipeline_spec import KEYS_ENTRY


@click.command(short_help="List, make and revoke API keys.")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--make", "name", metavar="NAME", help="Make a key for NAME and print it; it is shown only this once.")
@click.option("--limit", "limits", metavar="NAME=NUMBER", multiple=True, help=f"Limit of the new key: {', '.join(LIMITS)}.")
@click.option("--revoke", metavar="ID|NAME", help="Remove a key from the file.")
@click.option(
    "--store",
    envvar="LAMINA_LIMITS_STORE",
    metavar="URL",
    help="Redis of gateway.limits_secret (or LAMINA_LIMITS_STORE): list what keys with a budget have used.",
)
def keys(file: Path, name: str | None, limits: tuple[str, ...], revoke: str | None, store: str | None) -> None:
    """List the API keys in FILE, make another one or revoke one.

    FILE is the manifest of a Secret (.yaml; a new Secret gets the file's name), or a list of keys as a gateway reads it. It
    holds hashes, names and limits, but no key, so it may be stored with the pipeline's other manifests. A running gateway
    follows within half a second after its file has changed; on a cluster the kubelet first updates the file from the applied
    Secret, within about a minute.

    \b
    python -m knative keys smollm2-api-keys.yaml --make alice --limit requests_per_minute=60 --limit concurrent=4
    kubectl apply -n chat -f smollm2-api-keys.yaml
    python -m knative keys smollm2-api-keys.yaml
    python -m knative keys smollm2-api-keys.yaml --revoke alice
    """
    if name is not None and revoke is not None:
        raise click.UsageError("--make and --revoke cannot be combined")
    if limits and name is None:
        raise click.UsageError("--limit needs --make; change the limits of an existing key in the file")
    found = KeyFile.read(file)
    if name is not None:
        _make(found, name, _quota(limits))
    elif revoke is not None:
        _revoke(found, revoke)
    else:
        _list(found, None if store is None else Budgets(store))


def _list(file: "KeyFile", budgets: Budgets | None) -> None:
    """Shows the keys and, if there are counts of budgets, the tokens that each has used. Raises SpecError."""
    rows = []
    for key in file.keys:
        own = {limit: value for limit, value in dataclasses.asdict(key.quota).items() if value is not None}
        shown = ", ".join(f"{limit} {value}" for limit, value in own.items()) or "-"
        try:
            used = [] if budgets is None else [f"{budgets.read(key.id, period)}" for period in PERIODS]
        except ConnectionError as error:
            raise SpecError(f"--store: {error}; check its URL, and that this machine reaches it") from error
        rows.append((key.id, key.name or "-", shown, *used, "clear text: make another one" if key.in_clear_text else "hash"))
    counted = () if budgets is None else ("tokens this day", "this month (UTC)")
    show_table(Console(), f"{len(rows)} keys in {file.path}", ("id", "name", "own limits", *counted, "stored as"), rows)


def _make(file: "KeyFile", name: str, quota: Quota) -> None:
    if any(key.name == name for key in file.keys):
        raise SpecError(f"{file.path}: {name} has a key; revoke that, or choose another name")
    secret = f"lamina-{secrets.token_urlsafe(32)}"
    made = ApiKey(sha256_of(secret), name, quota)
    file.write((*file.keys, made))
    if quota.has_budget:
        click.echo("gateways with this key do not start unless gateway.limits_secret names a store for its budget", err=True)
    click.echo(f"logs call {name} {made.id}; this is the key, which is stored nowhere:", err=True)
    click.echo(secret)


def _revoke(file: "KeyFile", revoke: str) -> None:
    left = tuple(key for key in file.keys if revoke not in (key.id, key.name))
    if len(left) == len(file.keys):
        raise SpecError(f"{file.path}: no key has the id or the name {revoke!r}; without options this command lists them")
    file.write(left)
    click.echo(f"{revoke} is removed from {file.path}" + ("" if left else "; no key is left, so no client may ask"), err=True)


def _quota(limits: Sequence[str]) -> Quota:
    """The quota that options such as `requests_per_minute=60` set. Raises click.BadParameter."""
    found: dict[str, int] = {}
    for each in limits:
        name, _, value = each.partition("=")
        try:
            found[name] = limit(name, value)
        except ValueError as error:
            raise click.BadParameter(f"{each!r}: {error}", param_hint="--limit") from error
    return Quota(**found)


@dataclasses.dataclass(frozen=True, slots=True)
class KeyFile:
    """API keys in a file: the manifest of a Secret if its name ends in .yaml or .yml, else a list as a gateway reads it."""

    path: Path
    keys: tuple[ApiKey, ...]
    manifest: dict[str, Any] | None  # None: the file is a list

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads the keys of a file. If it does not exist, it has no keys, and a new Secret gets the file's name.

        Raises SpecError.
        """
        manifest = None
        if path.suffix in (".yaml", ".yml"):
            manifest = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": path.stem}, "type": "Opaque"}
            if path.exists():
                manifest = _read_secret(path)
            text = _entry(path, manifest)
        else:
            text = path.read_text(encoding="utf-8") if path.exists() else ""
        try:
            return cls(path, parse_keys(text), manifest)
        except ValueError as error:
            raise SpecError(f"{path}: {error}") from error

    def write(self, keys: tuple[ApiKey, ...]) -> None:
        """Replaces the file by one with these keys, atomically, because a gateway may be reading it.

        Keys in clear text are written as hashes.
        """
        text = "".join(f"{key.written()}\n" for key in keys)
        if self.manifest is not None:
            manifest = {name: value for name, value in self.manifest.items() if name != "data"}
            data = {name: value for name, value in (self.manifest.get("data") or {}).items() if name != KEYS_ENTRY}
            if data:
                manifest["data"] = data
            manifest["stringData"] = {**(self.manifest.get("stringData") or {}), KEYS_ENTRY: text}
            text = to_yaml([manifest])
        replace_file(self.path, text.encode())


def _read_secret(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read as one YAML document ({error})") from error
    if not isinstance(found, dict) or found.get("kind") != "Secret" or not isinstance(found.get("metadata"), dict):
        raise SpecError(f"{path}: holds no Secret; name another file, or one that does not exist yet")
    return found


def _entry(path: Path, secret: dict[str, Any]) -> str:
    text = (secret.get("stringData") or {}).get(KEYS_ENTRY)
    if text is not None:
        return str(text)
    try:
        return base64.b64decode((secret.get("data") or {}).get(KEYS_ENTRY, ""), validate=True).decode()
    except (binascii.Error, ValueError, TypeError) as error:
        raise SpecError(f"{path}: data.{KEYS_ENTRY} is not base64 of a text ({error})") from error
