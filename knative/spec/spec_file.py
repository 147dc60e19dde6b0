"""Reads a PipelineSpec from YAML. Errors name the path in the document and the value found there."""

import re
from pathlib import Path
from typing import Any

import msgspec
import yaml

from knative.spec.errors import SpecError, split_path
from knative.spec.pipeline_spec import PipelineSpec


def spec_from_dict(document: Any) -> PipelineSpec:
    """Raises SpecError; its message begins with the path of the faulty field."""
    try:
        return msgspec.convert(document, PipelineSpec)
    except SpecError:
        raise
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, SpecError):  # msgspec wraps what __post_init__ raises
            raise error.__cause__ from None
        raise SpecError(_with_value(str(error), document)) from error


def load_spec(path: Path) -> PipelineSpec:
    """Reads one YAML document. Raises SpecError; its message begins with the file's name."""
    try:
        return spec_from_dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SpecError(f"{path}: cannot be read as YAML: {error}") from error
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from error


def _with_value(message: str, document: Any) -> str:
    """msgspec's message, led by its path and followed by the value at that path."""
    text, path = split_path(message)
    value = document
    for key, index in re.findall(r"\.([^.\[\]]+)|\[(\d+)\]", path):
        try:
            value = value[key] if key else value[int(index)]
        except (KeyError, IndexError, TypeError):
            return f"{path}: {text}"
    seen = repr(value)
    return f"{path}: {text}, seen {seen if len(seen) <= 80 else seen[:77] + '...'}"
