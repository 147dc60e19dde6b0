"""Finds a checkpoint (a folder, a GGUF file, or a hub id), opens it by its format, and tells whether its files changed."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Final

import msgspec
from blake3 import blake3

from storage.checkpoints.checkpoint import Checkpoint
from storage.checkpoints.gguf_format import gguf_parts
from storage.checkpoints.hugging_face_folder import open_folder, tokenizer_folder
from storage.errors import CheckpointInvalid

_HUB_ID: Final = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_HUB_FILES: Final = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
_MODULE_FOLDERS: Final = ("*_Pooling", "*_Dense")  # of sentence-transformers
_GGUF_MAGIC: Final = b"GGUF"
_CHECKPOINT_SUFFIXES: Final = (".safetensors", ".gguf", ".json", ".jinja", ".txt", ".model")


def locate(source: str | Path) -> Path:
    """Returns the path of a checkpoint on this machine. A hub id (`owner/name` or `owner/name@revision`) is downloaded first.

    Raises CheckpointInvalid if `source` is neither a path nor a hub id, or cannot be downloaded.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path.resolve()
    found = _HUB_ID.fullmatch(str(source))
    if not found:
        raise CheckpointInvalid(f"{str(source)!r} is neither a folder, nor a file, nor a hub id such as owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    hub_id, patterns = found["id"], list(_HUB_FILES)
    try:
        folder = snapshot_download(hub_id, revision=found["revision"], allow_patterns=patterns, ignore_patterns=["*/*"])
        modules = [f"{pattern}/*.{suffix}" for pattern in _MODULE_FOLDERS for suffix in ("json", "safetensors")]
        snapshot_download(hub_id, revision=found["revision"], allow_patterns=modules)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointInvalid(
            f"{hub_id!r} is no file or folder here, and the hub does not give it: {error}. Check the id, the network, and "
            "whether its licence must be accepted first"
        ) from error
    return Path(folder)


def open_checkpoint(path: Path, tokenizer: Path | None = None, text_only: bool = False) -> Checkpoint:
    """Opens the checkpoint in a folder or a GGUF file.

    tokenizer: a folder whose tokenizer, chat template and end tokens are used instead of the checkpoint's own. text_only: as in
    `open_folder`; it does not affect GGUF files, which contain text models only. Raises CheckpointInvalid, also for any other
    format.
    """
    files = tokenizer_folder(tokenizer) if tokenizer else None
    if path.is_dir():
        checkpoint = open_folder(path, text_only)
        own = {"config.json": checkpoint.files["config.json"]}
        return replace(checkpoint, files=files | own) if files else checkpoint
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == _GGUF_MAGIC:
        from storage.checkpoints.gguf_checkpoint import open_gguf  # gguf and tokenizers, which only this format needs

        return open_gguf(path, files)
    if path.suffix == ".safetensors":
        raise CheckpointInvalid(f"{path} is one file of a checkpoint; give its folder, which has config.json too")
    raise CheckpointInvalid(f"{path} begins with {magic!r}; known are folders with safetensors, and GGUF files")


def checkpoint_fingerprint(path: Path) -> str:
    """BLAKE3 (hex) over the names and contents of the checkpoint's files.

    Every byte is read, because a changed file may keep its size and its time of change.
    """
    digests = []
    for file in _checkpoint_files(path):
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, blake3)  # type: ignore[arg-type]  # it is a hash, and not OpenSSL's
            digests.append((_name_in(path, file), digest.hexdigest()))
    return blake3(msgspec.json.encode(digests)).hexdigest()


def checkpoint_state(path: Path) -> tuple[tuple[str, int, int, int, int], ...]:
    """The state of each file of the checkpoint: (name, inode, bytes, mtime, ctime).

    It changes when a file is written, replaced or removed: programs can set mtime, but not ctime. Equal contents may have
    different states.
    """
    return tuple(
        (_name_in(path, file), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        for file, status in ((file, file.stat()) for file in _checkpoint_files(path))
    )


def _name_in(path: Path, file: Path) -> str:
    return file.relative_to(path).as_posix() if path.is_dir() else file.name


def _checkpoint_files(path: Path) -> Iterable[Path]:
    if not path.is_dir():
        return gguf_parts(path)
    folders = [path, *(folder for pattern in _MODULE_FOLDERS for folder in path.glob(pattern) if folder.is_dir())]
    files = (file for folder in folders for file in folder.iterdir())
    return sorted(file for file in files if file.suffix in _CHECKPOINT_SUFFIXES and file.is_file())
