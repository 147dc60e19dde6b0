"""The Secret of a gateway's API keys as a manifest in a file: their hashes and what people call them, and no key."""

import base64
import binascii
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import yaml

from functions.gateway.doors.api_keys import HASHED, key_id, sha256_of
from knative.spec.errors import SpecError
from knative.spec.kubernetes_object import to_yaml

ENTRY: Final = "api-keys"
"""What `gateway.api_keys_secret` reads of a Secret."""
_NAME_OF: Final = "lamina.dev/key-"
"""Annotation, with the key's id behind it."""


@dataclass(frozen=True, slots=True)
class Key:
    hashed: str
    """With its prefix; or a key in clear text, as people write them by hand."""
    name: str = ""

    @property
    def id(self) -> str:
        return key_id(self.hashed if self.is_hashed else sha256_of(self.hashed))

    @property
    def is_hashed(self) -> bool:
        return self.hashed.startswith(HASHED)


@dataclass(frozen=True, slots=True)
class KeySecret:
    manifest: dict[str, Any]
    keys: tuple[Key, ...]

    @classmethod
    def read(cls, path: Path) -> Self:
        """A new one, called as the file is, where there is no file. Raises SpecError for anything but one Secret."""
        if not path.exists():
            return cls({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": path.stem}, "type": "Opaque"}, ())
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise SpecError(f"{path}: cannot be read as one YAML document ({error})") from error
        if not isinstance(found, dict) or found.get("kind") != "Secret" or not isinstance(found.get("metadata"), dict):
            raise SpecError(f"{path}: holds no Secret; name another file, or one that is not there yet")
        return cls(found, tuple(_keys(path, found)))

    def with_keys(self, keys: tuple[Key, ...]) -> Self:
        return type(self)(self.manifest, keys)

    def write(self, path: Path) -> None:
        """Raises SpecError where no key is left: a gateway would not start, rather than be open."""
        if not self.keys:
            raise SpecError(f"{path}: its last key; a gateway with an empty list does not start; make another one first")
        manifest = {**self.manifest, "metadata": self._metadata()}
        data = {name: value for name, value in (manifest.pop("data", None) or {}).items() if name != ENTRY}
        if data:
            manifest["data"] = data
        manifest["stringData"] = {**(manifest.get("stringData") or {}), ENTRY: ",".join(key.hashed for key in self.keys)}
        path.write_text(to_yaml([manifest]), encoding="utf-8")

    def _metadata(self) -> dict[str, Any]:
        metadata: dict[str, Any] = dict(self.manifest["metadata"])
        others = {
            name: value for name, value in (metadata.pop("annotations", None) or {}).items() if not name.startswith(_NAME_OF)
        }
        return {**metadata, "annotations": others | {_NAME_OF + key.id: key.name for key in self.keys if key.name}}


def _keys(path: Path, secret: dict[str, Any]) -> list[Key]:
    text = (secret.get("stringData") or {}).get(ENTRY)
    if text is None:
        try:
            text = base64.b64decode((secret.get("data") or {}).get(ENTRY, ""), validate=True).decode()
        except (binascii.Error, ValueError, TypeError) as error:
            raise SpecError(f"{path}: data.{ENTRY} is no base64 of a text ({error})") from error
    names = secret["metadata"].get("annotations") or {}
    found = [Key(part.strip()) for part in str(text).split(",") if part.strip()]
    return [Key(key.hashed, str(names.get(_NAME_OF + key.id, ""))) for key in found]
