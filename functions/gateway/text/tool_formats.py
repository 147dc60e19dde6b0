"""Formats of tool calls: Hermes and Qwen, Llama 3, Mistral.

A model's format is set, or found in its chat template. A grammar writes forced calls in the model's own format, so that they
are parsed like any others.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from eventing.wire.tools import Tool
from functions.grammars.sources import with_options

_OBJECT: Final = (
    r'\{\s*(?:"(?:type|id)"\s*:\s*"[^"\\]*"\s*,\s*)*"name"\s*:\s*"(?P<name>[^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*'
    r"(?=\{)"
)
_DIRECT: Final = r"(?P<name>[\w.-]+)(?:\[CALL_ID\][\w-]*)?(?:\[ARGS\])?(?=\{)"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    name: Literal["hermes", "llama3_json", "mistral"]
    marker: str  # text before calls; empty: a call is the begin of the answer
    head: str = _OBJECT  # pattern from a call's begin to that of its arguments
    opening: str = r"\s*"  # pattern between the marker and the first call
    between: str = r"\s*"  # pattern between two calls, if no marker separates them
    closing: str = ""  # text after the last call, or after each
    arguments: str = "arguments"  # key of a call's arguments
    many: bool = True  # several calls may follow each other
    direct: bool = False  # a call is a name and an object of arguments, instead of one object with both

    def call_id(self, request_id: str, answer: int, call: int) -> str:
        """Returns a call's id, which is the same whenever the request is computed again.

        `answer` and `call` are the numbers of the answer and of the call in it. Mistral's templates accept only nine letters
        and digits.
        """
        digest = hashlib.sha256(f"{request_id} {answer} {call}".encode()).hexdigest()
        return digest[:9] if self.name == "mistral" else f"call_{digest[:24]}"

    def grammar(self, tools: Sequence[Tool], parallel: bool, special: Mapping[str, int]) -> str:
        """Returns the source of a grammar, in llguidance's Lark, for an answer that calls a tool.

        The answer calls one tool, or at least one if `parallel`. `special` maps the texts of the tokenizer's special tokens to
        their ids.
        """

        def literal(text: str) -> str:
            return f"<[{special[text]}]>" if text in special else json.dumps(text)

        rules = [f"call{index}: {self._call(tool)}" for index, tool in enumerate(tools)]
        calls = " | ".join(f"call{index}" for index in range(len(tools)))
        begin = literal(self.marker)
        if self.name == "hermes":
            one = f'{begin} "\\n" call "\\n" {literal(self.closing)}'
            start = f'one ("\\n" one)*\none: {one}' if parallel else one
        elif self.direct:
            start = f"one+\none: {begin} call" if parallel else f"{begin} call"
        elif self.many:
            start = f'{begin} "[" call {"(" + json.dumps(", ") + " call)*" if parallel else ""} "]"'
        else:
            start = "call"
        return "\n".join([f"start: {start}", f"call: {calls}", *rules])

    def _call(self, tool: Tool) -> str:
        parameters = tool.function.parameters or {"type": "object"}
        # A function takes no other arguments than those that its schema names, unless the schema says so.
        others = parameters.get("additionalProperties", "properties" not in parameters)
        parameters = {**parameters, "additionalProperties": others}
        if self.direct:
            return f'{json.dumps(tool.function.name)} "[ARGS]" %json {json.dumps(with_options(parameters))}'
        schema: dict[str, Any] = {
            "type": "object",
            "properties": {"name": {"const": tool.function.name}, self.arguments: parameters},
            "required": ["name", self.arguments],
            "additionalProperties": False,
        }
        # References in `parameters` begin at the root, which is `schema` now, so their targets move there.
        schema |= {name: parameters[name] for name in ("$defs", "definitions") if name in parameters}
        return f"%json {json.dumps(with_options(schema))}"


HERMES: Final = ToolFormat(name="hermes", marker="<tool_call>", closing="</tool_call>")
LLAMA3: Final = ToolFormat(name="llama3_json", marker="", between=r"\s*[;,]?\s*", arguments="parameters", many=False)
MISTRAL: Final = ToolFormat(name="mistral", marker="[TOOL_CALLS]", opening=r"\s*\[\s*", between=r"\s*,\s*", closing="]")
MISTRAL_DIRECT: Final = ToolFormat(name="mistral", marker="[TOOL_CALLS]", head=_DIRECT, direct=True)


def format_of(template: str, name: str = "auto") -> ToolFormat:
    """Returns the format with this name. `template` is the chat template's source.

    If the name is `auto`, returns the format that the template shows, or Hermes if it shows none.
    """
    if name == "mistral" or (name == "auto" and "[TOOL_CALLS]" in template):
        return MISTRAL_DIRECT if "[ARGS]" in template else MISTRAL
    if name != "auto":
        return {"hermes": HERMES, "llama3_json": LLAMA3}[name]
    if "<tool_call>" in template:
        return HERMES
    return LLAMA3 if "<|python_tag|>" in template or '"parameters": ' in template else HERMES
