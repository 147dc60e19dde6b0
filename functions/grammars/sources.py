"""What clients ask for → a grammar's source, in llguidance's notation: JSON of `grammars`, or Lark."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from eventing.wire.structured_outputs import StructuredOutputs
from functions.grammars.compiler import from_ebnf, from_regex
from functions.grammars.unusable import UnusableGrammar

JSON_OPTIONS: Final = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": False,
    "lenient": False,
}
"""One way to write a value: where any amount of white space may come, a small model writes nothing else until max_tokens.
Keywords that could not be kept are refused rather than passed over."""
_ANY_OBJECT: Final = {"type": "object"}


def source_of(asked: StructuredOutputs) -> str:
    """Raises UnusableGrammar where it is no grammar at all; most of what can be wrong is seen when it is compiled."""
    if asked.regex is not None:
        return from_regex(asked.regex)
    if asked.choice is not None:
        return of_choices(asked.choice)
    if asked.grammar is not None:
        return from_ebnf(asked.grammar)
    return of_schema(_ANY_OBJECT if asked.json_object else schema_of(asked))


def schema_of(asked: StructuredOutputs) -> dict[str, Any]:
    """The JSON schema, also where it came as text. Raises UnusableGrammar."""
    if not isinstance(asked.json, str):
        return asked.json or {}
    try:
        schema = json.loads(asked.json)
    except (ValueError, RecursionError) as error:
        raise UnusableGrammar(f"the schema is no JSON: {error}") from error
    if not isinstance(schema, dict):
        raise UnusableGrammar("the schema is no JSON object")
    return schema


def of_schema(schema: Mapping[str, Any]) -> str:
    return json.dumps({"grammars": [{"json_schema": with_options(schema)}]}, ensure_ascii=False)


def with_options(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema, to be written in the one way."""
    return {**schema, "x-guidance": JSON_OPTIONS}


def of_choices(choices: Sequence[str]) -> str:
    return "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)


def place_of(schema: Any, words: Sequence[str], path: str = "#") -> str | None:
    """Where one of `words` is a key or a value of the schema, as a JSON pointer; None: nowhere."""
    return next(_places(schema, frozenset(words), path), None)


def _places(node: Any, words: frozenset[str], path: str) -> Iterator[str]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        here = f"{path}/{key}"
        if key in words or (isinstance(value, str) and value in words):
            yield here
        yield from _places(value, words, here)
