"""Secrets as files, for pods that mount them: those that lie in files already stay there, others are written for this run."""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from knative.local.kubelet.containers import NamedData


class SecretFolders:
    def __init__(self, secrets: NamedData, there: Mapping[str, Path]) -> None:
        self._written = Path(tempfile.mkdtemp(prefix="lamina-secrets-"))  # for its owner alone
        self.folders: dict[str, Path] = {name: folder.resolve() for name, folder in there.items()}
        """Secret → a folder with a file for each key."""
        for name, data in secrets.items():
            if name not in self.folders:
                self.folders[name] = self._write(name, data)

    def _write(self, name: str, data: Mapping[str, str]) -> Path:
        folder = self._written / name
        folder.mkdir()
        for key, value in data.items():
            (folder / key).write_text(value, encoding="utf-8")
        return folder

    def remove(self) -> None:
        """What was written."""
        shutil.rmtree(self._written, ignore_errors=True)
