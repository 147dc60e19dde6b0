"""A model's chat template: messages → the text that it was trained on. Sandboxed; the same dialect as transformers'."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import Any, Final, NoReturn

from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from eventing.problems import InvalidRequest
from functions.gateway.text import reasoning

_NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})
_OWN: Final = frozenset({"messages", "add_generation_prompt", "tools"})
"""Variables that are the gateway's to say."""
_REFUSALS: Final = (TemplateError, TypeError, ValueError, LookupError)
"""What a template raises over messages that it was not written for."""


class ChatTemplate:
    """Raises jinja2.TemplateSyntaxError for a template that cannot be read."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """special_tokens: bos_token, eos_token and the like, which templates refer to by these names."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self.source = source
        self._template = environment.from_string(source)
        self._names = find_undeclared_variables(environment.parse(source))
        self._special_tokens = dict(special_tokens)
        self.reasons = reasoning.END in source
        """It is that of a model which thinks before it answers."""

    def knows(self, name: str) -> bool:
        """Whether it reads a variable."""
        return name in self._names

    def render(
        self,
        turns: Sequence[Mapping[str, Any]],
        most_characters: int,
        values: Mapping[str, Any] = _NOTHING,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """The conversation, up to where the assistant's next answer begins. Raises InvalidRequest.

        turns: messages, as templates take them. values: variables that the template must know. tools: functions, likewise.
        It is given up once it has more than `most_characters`.
        """
        if unknown := values.keys() - (self._names - _OWN):
            raise InvalidRequest(f"the model's chat template knows no `{min(unknown)}`; leave it out")
        own = {"messages": turns, "add_generation_prompt": True, **({"tools": tools} if tools else {})}
        pieces = self._template.generate({**self._special_tokens, **values, **own})
        try:
            return "".join(_bounded(pieces, most_characters))
        except _REFUSALS as error:
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}") from error


def _bounded(pieces: Iterable[str], most_characters: int) -> Iterator[str]:
    characters = 0
    for piece in pieces:
        characters += len(piece)
        if characters > most_characters:
            raise InvalidRequest(f"the messages become more than {most_characters} characters of text; the context holds fewer")
        yield piece


class _Generation(Extension):
    """`{% generation %}`, which marks assistant turns for training; the text in it stays."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own way

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().astimezone().strftime(format)
