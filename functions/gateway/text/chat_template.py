"""A model's chat template: renders messages as text in the format that the model was trained on.

It runs in jinja2's sandbox, with the filters, functions and tags that transformers adds.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import Any, Final, NoReturn

from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.nodes import Const, Node, TemplateData
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from eventing.problems import InvalidRequest
from functions.gateway.text import reasoning

GUARD: Final = "\ufdd0"  # a Unicode noncharacter, which `control_tokens` puts into texts of clients
_SWITCHES: Final = ("enable_thinking", "thinking")  # variables that switch thoughts on and off, in Qwen's templates and others
_ESCAPED_GUARD: Final = re.compile(r"(?<!\\)((?:\\\\)*)\\ufdd0")
_RESERVED: Final = frozenset({"messages", "add_generation_prompt", "tools"})  # variables that the gateway sets
_REFUSALS: Final = (TemplateError, TypeError, ValueError, LookupError)  # raised for messages that a template does not expect


class ChatTemplate:
    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Compiles a template. Raises jinja2.TemplateSyntaxError.

        `special_tokens` maps names to texts, such as bos_token → <s>. Templates use the names as variables.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda format: datetime.now().astimezone().strftime(format)
        self.source = source
        self._template = environment.from_string(source)
        parsed = environment.parse(source)
        self.used = find_undeclared_variables(parsed)  # variables that the template reads
        written = [node.data for node in parsed.find_all(TemplateData)] + [node.value for node in parsed.find_all(Const)]
        self.texts = [text for text in written if isinstance(text, str)]  # those in the template itself, which it may write
        self._special_tokens = dict(special_tokens)
        self.reasons = reasoning.END in source  # the model thinks before it answers

    def variables(self, given: Mapping[str, Any], effort: str | None) -> dict[str, Any]:
        """Returns the template's variables from `given`, the client's own values, and `effort`, how much the model shall think.

        The effort becomes `reasoning_effort`. If the template can only switch thoughts on and off, they are off for the effort
        `none`. A template without these variables gets none of them, so its model thinks as usual. The client's own values come
        before those from the effort.
        """
        hints = {} if effort is None else {"reasoning_effort": effort, **dict.fromkeys(_SWITCHES, effort != "none")}
        own = {name: value for name, value in given.items() if name not in _SWITCHES or name in self.used}
        return {name: value for name, value in hints.items() if name in self.used} | own

    def render(
        self,
        turns: Sequence[Mapping[str, Any]],
        check: Callable[[int], object],
        values: Mapping[str, Any] = MappingProxyType({}),
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """Returns the conversation as text, up to the beginning of the assistant's next answer.

        `turns` and `tools` are messages and functions as dicts, which templates read. `check` is called with the number of
        characters so far, and raises an error if they are too many. `values` are further variables of the template. Raises
        InvalidRequest if the template does not use one of these variables, or if it refuses the messages.
        """
        if unknown := values.keys() - (self.used - _RESERVED):
            raise InvalidRequest(f"the model's chat template knows no `{min(unknown)}`; leave it out")
        own = {"messages": turns, "add_generation_prompt": True, **({"tools": tools} if tools else {})}
        pieces: list[str] = []
        characters = 0
        try:
            for piece in self._template.generate({**self._special_tokens, **values, **own}):
                pieces.append(piece)
                characters += len(piece)
                check(characters)
        except _REFUSALS as error:
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}") from error
        return "".join(pieces)


class _Generation(Extension):
    """A jinja2 extension for `{% generation %}`, which marks assistant messages for training.

    Renders the text inside the tag.
    """

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
    """The template filter `tojson`. It does not escape HTML, unlike jinja2's own filter of this name."""
    written = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return with_guards(written) if ensure_ascii else written


def with_guards(written: str) -> str:
    """Puts GUARD, a noncharacter, back where `json.dumps` or `repr` has written its escape."""
    return _ESCAPED_GUARD.sub(rf"\1{GUARD}", written)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)
