"""Reads a PipelineSpec from YAML. Errors name the path in the document and the value at that path."""

from pathlib import Path
from typing import Any

import msgspec
import yaml

from knative.spec.errors import SpecError, describe_fault
from knative.spec.objective import with_objective
from knative.spec.pipeline_spec import PipelineSpec


def spec_from_dict(document: Any) -> PipelineSpec:
    """The spec in a parsed YAML document. Raises SpecError; its message begins with the path of the faulty field."""
    try:
        return msgspec.convert(with_objective(document), PipelineSpec)
    except SpecError:
        raise
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, SpecError):  # msgspec wraps what __post_init__ raises
            raise error.__cause__ from None
        raise SpecError(describe_fault(document, PipelineSpec, "$")) from error


def load_spec(path: Path) -> PipelineSpec:
    """Reads the spec in a file of one YAML document. Raises SpecError; its message begins with the file's name."""
    document = read_yaml(path)
    try:
        return spec_from_dict(document)
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from error


def read_yaml(path: Path) -> Any:
    """The one document in a file. Raises SpecError."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SpecError(f"{path}: cannot be read as YAML: {error}") from error
