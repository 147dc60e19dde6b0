"""How models write calls of tools: Hermes and Qwen, Llama 3, Mistral. A format is found in the chat template, or named.

Forced calls are written by a grammar in the model's own format, so that they are read as any others.
"""

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from eventing.wire.tools import Tool
from functions.grammars.sources import with_options

ToolFormatName = Literal["hermes", "llama3_json", "mistral"]

_OBJECT: Final = (
    r'\{\s*(?:"(?:type|id)"\s*:\s*"[^"\\]*"\s*,\s*)*"name"\s*:\s*"(?P<name>[^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*'
    r"(?=\{)"
)
_DIRECT: Final = r"(?P<name>[\w.-]+)(?:\[CALL_ID\][\w-]*)?(?:\[ARGS\])?(?=\{)"


@dataclass(frozen=True, slots=True)
class ToolFormat:
    name: ToolFormatName
    marker: str
    """Calls begin with it; where it is "", with the answer itself."""
    head: re.Pattern[str]
    """From a call's beginning to that of its arguments."""
    opening: re.Pattern[str]
    """Between the marker and the first call."""
    between: re.Pattern[str]
    """Between a call's end and the next call, where no marker comes between them."""
    closing: str
    """Behind the last call, or behind each; "": nothing."""
    arguments: str
    """The key of a call's arguments."""
    many: bool
    """Several calls may follow each other."""
    direct: bool = False
    """A call is a name and an object of arguments, not an object of both."""

    def new_id(self) -> str:
        """Mistral's templates take ids of nine letters and digits only."""
        return secrets.token_hex(5)[:9] if self.name == "mistral" else f"call_{secrets.token_hex(12)}"

    def grammar(self, tools: Sequence[Tool], parallel: bool, special: Mapping[str, int]) -> str:
        """Of an answer that calls a tool at least once, in llguidance's Lark. special: tokens that no text becomes."""
        rules = [f"call{index}: {self._call(tool)}" for index, tool in enumerate(tools)]
        calls = " | ".join(f"call{index}" for index in range(len(tools)))
        begin, end = _literal(self.marker, special), _literal(self.closing, special)
        if self.name == "hermes":
            one = f'{begin} "\\n" call "\\n" {end}'
            start = f'one ("\\n" one)*\none: {one}' if parallel else one
        elif self.direct:
            start = f"one+\none: {begin} call" if parallel else f"{begin} call"
        elif self.many:
            start = f'{begin} "[" call {"(" + json.dumps(", ") + " call)*" if parallel else ""} "]"'
        else:
            start = "call"
        return "\n".join([f"start: {start}", f"call: {calls}", *rules])

    def _call(self, tool: Tool) -> str:
        function = tool.function
        arguments = _named_alone(function.parameters or {"type": "object"})
        if self.direct:
            return f'{json.dumps(function.name)} "[ARGS]" %json {json.dumps(with_options(arguments))}'
        schema: dict[str, Any] = {
            "type": "object",
            "properties": {"name": {"const": function.name}, self.arguments: arguments},
            "required": ["name", self.arguments],
            "additionalProperties": False,
        }
        return f"%json {json.dumps(with_options(_with_definitions(schema, arguments)))}"


def _named_alone(parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """A function takes no arguments but those that it names, unless its schema speaks of others."""
    return {**parameters, "additionalProperties": parameters.get("additionalProperties", "properties" not in parameters)}


def _with_definitions(schema: dict[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """References of the arguments' schema begin at its root, which is another now: what they name moves along."""
    moved = {name: arguments[name] for name in ("$defs", "definitions") if name in arguments}
    return {**schema, **moved}


def _literal(text: str, special: Mapping[str, int]) -> str:
    return f"<[{special[text]}]>" if text in special else json.dumps(text)


HERMES: Final = ToolFormat(
    "hermes", "<tool_call>", re.compile(_OBJECT), re.compile(r"\s*"), re.compile(r"\s*"), "</tool_call>", "arguments", True
)
LLAMA3: Final = ToolFormat(
    "llama3_json", "", re.compile(_OBJECT), re.compile(r"\s*"), re.compile(r"\s*[;,]?\s*"), "", "parameters", False
)
MISTRAL: Final = ToolFormat(
    "mistral",
    "[TOOL_CALLS]",
    re.compile(f"(?:{_OBJECT})"),
    re.compile(r"\s*\[\s*"),
    re.compile(r"\s*,\s*"),
    "]",
    "arguments",
    True,
)
MISTRAL_DIRECT: Final = ToolFormat(
    "mistral", "[TOOL_CALLS]", re.compile(_DIRECT), re.compile(r"\s*"), re.compile(r"\s*"), "", "arguments", True, True
)
_NAMED: Final[Mapping[str, ToolFormat]] = {"hermes": HERMES, "llama3_json": LLAMA3, "mistral": MISTRAL}


def format_of(template: str, named: str = "auto") -> ToolFormat:
    """named: what the spec says. auto: what the template shows; Hermes where it shows nothing, as tools are told then."""
    found: Callable[[str], bool] = template.__contains__
    if named == "mistral" or (named == "auto" and found("[TOOL_CALLS]")):
        return MISTRAL_DIRECT if found("[ARGS]") else MISTRAL
    if named != "auto":
        return _NAMED[named]
    if found("<tool_call>"):
        return HERMES
    return LLAMA3 if found("<|python_tag|>") or found('"parameters": ') else HERMES
