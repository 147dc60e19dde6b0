"""Turns structures that clients specify (JSON schema, regex, choice, grammar) into a grammar's source for llguidance.

llguidance is imported only when a source needs it.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from eventing.wire.structured_outputs import StructuredOutputs

JSON_OPTIONS: Final = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": False,
    "lenient": False,
}
"""llguidance's options for JSON. White space is fixed, because given the choice a small model writes nothing else until
max_tokens. Keywords of a schema that could not be enforced are refused and not ignored."""
_ANY_OBJECT: Final = {"type": "object"}


class UnusableGrammar(Exception):
    """The grammar does not compile, is too large, or allows no token. The message never contains generated text."""


def source_of(asked: StructuredOutputs) -> str:
    """Returns a grammar's source for the structure that a client specifies: JSON of `grammars`, or Lark for llguidance.

    Raises UnusableGrammar if the structure cannot be read as a grammar. Most errors are found only when the source is compiled.
    """
    if asked.regex is not None:
        from llguidance import LLMatcher

        return LLMatcher.grammar_from_regex(asked.regex)
    if asked.choice is not None:
        return "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in asked.choice)
    if asked.grammar is not None:
        from llguidance import grammar_from

        try:
            return grammar_from("grammar", asked.grammar)  # Lark as llguidance has it, or llama.cpp's GBNF
        except ValueError as error:
            raise UnusableGrammar(str(error)) from error
    schema = _ANY_OBJECT if asked.json_object else schema_of(asked)
    return json.dumps({"grammars": [{"json_schema": with_options(schema)}]}, ensure_ascii=False)


def schema_of(asked: StructuredOutputs) -> dict[str, Any]:
    """Returns the client's JSON schema, parsed if it is text. Raises UnusableGrammar if it is no JSON object."""
    if not isinstance(asked.json, str):
        return asked.json or {}
    try:
        schema = json.loads(asked.json)
    except (ValueError, RecursionError) as error:
        raise UnusableGrammar(f"the schema is no JSON: {error}") from error
    if not isinstance(schema, dict):
        raise UnusableGrammar("the schema is no JSON object")
    return schema


def with_options(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of the schema with JSON_OPTIONS, which llguidance reads from the schema."""
    return {**schema, "x-guidance": JSON_OPTIONS}


def place_of(schema: Any, words: Sequence[str], path: str = "#") -> str | None:
    """Returns the JSON pointer to the first key or text value in the schema that is one of `words`; None if there is none.

    `path` is the JSON pointer to `schema` itself.
    """
    items = schema.items() if isinstance(schema, dict) else enumerate(schema) if isinstance(schema, list) else ()
    for key, value in items:
        here = f"{path}/{key}"
        if key in words or (isinstance(value, str) and value in words):
            return here
        if (inside := place_of(value, words, here)) is not None:
            return inside
    return None
