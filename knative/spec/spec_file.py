"""A PipelineSpec out of a file or a document; an error names the path in it and the value that was seen."""

import re
from pathlib import Path
from typing import Any

import msgspec
import yaml

from knative.spec.errors import SpecError
from knative.spec.pipeline_spec import PipelineSpec


def spec_from_dict(document: Any) -> PipelineSpec:
    """Raises SpecError, its message led by the path of what is wrong."""
    try:
        return msgspec.convert(document, PipelineSpec)
    except SpecError:
        raise
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, SpecError):  # msgspec wraps what __post_init__ raises
            raise error.__cause__ from None
        raise SpecError(_with_value(str(error), document)) from error


def load_spec(path: Path) -> PipelineSpec:
    """Reads one YAML document. Raises SpecError, with the file's name in front."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SpecError(f"{path}: cannot be read as YAML: {error}") from error
    try:
        return spec_from_dict(document)
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from error


def _with_value(message: str, document: Any) -> str:
    """msgspec says what it expected and where; the value that was seen is looked up and added."""
    text, _, rest = message.partition(" - at `")
    path = rest.rstrip("`") or "$"
    value = document
    for key, index in re.findall(r"\.([^.\[\]]+)|\[(\d+)\]", path):
        try:
            value = value[key] if key else value[int(index)]
        except (KeyError, IndexError, TypeError):
            return f"{path}: {text}"
    return f"{path}: {text}, seen {_shortened(value)}"


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
