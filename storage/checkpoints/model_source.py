"""Where a checkpoint comes from: a folder, a GGUF file, or the Hugging Face hub; and what tells one from its successor."""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec
from blake3 import blake3

from storage.checkpoints.checkpoint import Checkpoint
from storage.checkpoints.hugging_face_folder import open_folder
from storage.errors import CheckpointInvalid

_HUB_ID: Final = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_HUB_FILES: Final = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
_GGUF_MAGIC: Final = b"GGUF"
_CHECKPOINT_SUFFIXES: Final = (".safetensors", ".gguf", ".json", ".jinja", ".txt", ".model")


def locate(source: str | Path) -> Path:
    """A folder or file on this machine; a hub id (`owner/name` or `owner/name@revision`) is fetched first.

    Raises CheckpointInvalid.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path.resolve()
    found = _HUB_ID.fullmatch(str(source))
    if not found:
        raise CheckpointInvalid(f"{str(source)!r} is neither a folder, nor a file, nor a hub id such as owner/name")
    return _fetched(found["id"], found["revision"])


def open_checkpoint(path: Path) -> Checkpoint:
    """Raises CheckpointInvalid, also for a format that is not published."""
    if path.is_dir():
        return open_folder(path)
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == _GGUF_MAGIC:
        from storage.checkpoints.gguf_checkpoint import open_gguf  # gguf and tokenizers, which only this format needs

        return open_gguf(path)
    if path.suffix == ".safetensors":
        raise CheckpointInvalid(f"{path} is one file of a checkpoint; give its folder, which has config.json too")
    raise CheckpointInvalid(f"{path} begins with {magic!r}; known are folders with safetensors, and GGUF files")


def checkpoint_fingerprint(path: Path) -> str:
    """BLAKE3 (hex) of names and contents, every byte of them: size and time of change are alike where a copy kept them."""
    return blake3(msgspec.json.encode([(file.name, _digest(file)) for file in _checkpoint_files(path)])).hexdigest()


def checkpoint_state(path: Path) -> tuple[tuple[str, int, int, int, int], ...]:
    """What the file system says of the files: another as soon as one is written to, replaced or removed.

    That holds whatever mtime says, which anybody can set; ctime nobody can. Equal contents may well differ in it.
    """
    return tuple(
        (file.name, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        for file, status in ((file, file.stat()) for file in _checkpoint_files(path))
    )


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, blake3).hexdigest()  # type: ignore[arg-type]  # it is a hash, and not OpenSSL's


def _checkpoint_files(path: Path) -> Iterable[Path]:
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.iterdir() if file.suffix in _CHECKPOINT_SUFFIXES and file.is_file())


def _fetched(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(hub_id, revision=revision, allow_patterns=list(_HUB_FILES), ignore_patterns=["*/*"])
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointInvalid(
            f"{hub_id!r} is no file or folder here, and the hub does not give it: {error}. Check the id, the network, and "
            "whether its licence must be accepted first"
        ) from error
    return Path(folder)
