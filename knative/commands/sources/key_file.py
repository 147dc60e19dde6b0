"""A gateway's API keys in a file: the manifest of their Secret, or, without .yaml, the bare list that a gateway reads."""

import base64
import binascii
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import yaml

from functions.configuration.api_keys import ApiKey, parse_keys
from knative.render.services import KEYS_ENTRY
from knative.spec.errors import SpecError
from knative.spec.kubernetes_object import to_yaml

_OF_MANIFESTS: Final = (".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class KeyFile:
    path: Path
    keys: tuple[ApiKey, ...]
    manifest: dict[str, Any] | None
    """None: the file is a list."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """An empty one where there is no file: a Secret is called as its file is. Raises SpecError."""
        if path.suffix not in _OF_MANIFESTS:
            return cls(path, _parsed(path, path.read_text(encoding="utf-8") if path.exists() else ""), None)
        manifest = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": path.stem}, "type": "Opaque"}
        if path.exists():
            manifest = _read_manifest(path)
        return cls(path, _parsed(path, _entry(path, manifest)), manifest)

    def write(self, keys: tuple[ApiKey, ...]) -> None:
        """In place of the file at once, because a gateway may be reading it. Keys in clear text become hashes."""
        text = "".join(f"{key.written()}\n" for key in keys)
        if self.manifest is not None:
            text = to_yaml([self._with_entry(self.manifest, text)])
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}-")
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        if self.path.exists():
            os.chmod(temporary, self.path.stat().st_mode)
        os.replace(temporary, self.path)

    @staticmethod
    def _with_entry(manifest: dict[str, Any], text: str) -> dict[str, Any]:
        data = {name: value for name, value in (manifest.get("data") or {}).items() if name != KEYS_ENTRY}
        without = {name: value for name, value in manifest.items() if name != "data"}
        strings = {**(manifest.get("stringData") or {}), KEYS_ENTRY: text}
        return {**without, **({"data": data} if data else {}), "stringData": strings}


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read as one YAML document ({error})") from error
    if not isinstance(found, dict) or found.get("kind") != "Secret" or not isinstance(found.get("metadata"), dict):
        raise SpecError(f"{path}: holds no Secret; name another file, or one that is not there yet")
    return found


def _entry(path: Path, secret: dict[str, Any]) -> str:
    text = (secret.get("stringData") or {}).get(KEYS_ENTRY)
    if text is not None:
        return str(text)
    try:
        return base64.b64decode((secret.get("data") or {}).get(KEYS_ENTRY, ""), validate=True).decode()
    except (binascii.Error, ValueError, TypeError) as error:
        raise SpecError(f"{path}: data.{KEYS_ENTRY} is no base64 of a text ({error})") from error


def _parsed(path: Path, text: str) -> tuple[ApiKey, ...]:
    try:
        return parse_keys(text)
    except ValueError as error:
        raise SpecError(f"{path}: {error}") from error
