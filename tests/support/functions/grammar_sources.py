"""Sources of grammars, as the gateway makes them of what clients ask for."""

from collections.abc import Mapping, Sequence
from typing import Any

from eventing.wire.structured_outputs import StructuredOutputs
from functions.grammars.sources import source_of


def of_schema(schema: Mapping[str, Any]) -> str:
    return source_of(StructuredOutputs(json=dict(schema)))


def of_choices(choices: Sequence[str]) -> str:
    return source_of(StructuredOutputs(choice=tuple(choices)))
