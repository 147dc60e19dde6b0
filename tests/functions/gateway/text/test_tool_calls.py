"""Tool calls are found in an answer's text, however it is cut into pieces; everything else stays text."""

import json
import random

import pytest

from functions.gateway.text.reasoning import TextDelta
from functions.gateway.text.tool_calls import ToolCallDelta, ToolCallParser
from functions.gateway.text.tool_formats import HERMES, LLAMA3, MISTRAL, MISTRAL_DIRECT, ToolFormat, format_of

NAMES = frozenset({"add", "look_up"})
ONE = [("add", {"a": 1, "b": 'x"}{'})]
TWO = [*ONE, ("look_up", {"deep": {"er": [1, {}]}, "q": "</tool_call>\\"})]


def hermes(*calls: tuple[str, object]) -> str:
    return "\n".join(f'<tool_call>\n{{"name": "{n}", "arguments": {json.dumps(a)}}}\n</tool_call>' for n, a in calls)


HALF = '<tool_call>{"arguments": {"a": "\\ud800"}, "name": "add"}'  # of a pair of surrogates: no text
CASES: list[tuple[ToolFormat, str, str, list[tuple[str, object]]]] = [
    (HERMES, "Just text.", "Just text.", []),
    (HERMES, "a < b <tool", "a < b <tool", []),
    (HERMES, hermes(*ONE), "", ONE),
    (HERMES, "I add. \n" + hermes(*TWO), "I add.", TWO),
    (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>', "", [("add", {"a": 1})]),
    (HERMES, '<tool_call>{"name": "add"}</tool_call>', "", [("add", {})]),
    (HERMES, '<tool_call>{"name": "new", "arguments": {}}</tool_call> bye', "bye", [("new", {})]),
    (HERMES, "<tool_call>no call</tool_call>", "<tool_call>no call</tool_call>", []),
    (HERMES, '<tool_call>{"nam', '<tool_call>{"nam', []),
    (HERMES, '<tool_call>{"a": 1}</tool_call>', '<tool_call>{"a": 1}</tool_call>', []),
    (HERMES, "<tool_call>no call</tool_call>\n" + hermes(*ONE), "<tool_call>no call</tool_call>", ONE),
    (HERMES, '<tool_call>{"a": 1}</tool_call>\n' + hermes(*ONE), '<tool_call>{"a": 1}</tool_call>', ONE),
    (HERMES, '<tool_call>{"name": "add", "arguments": {}, "x": {"y": "}"}}</tool_call> bye', "bye", [("add", {})]),
    (HERMES, HALF, HALF, []),
    (MISTRAL_DIRECT, "[TOOL_CALLS] no[TOOL_CALLS]add{}", "[TOOL_CALLS] no", [("add", {})]),
    (LLAMA3, '{"name": "add", "parameters": {"a": 1}}', "", [("add", {"a": 1})]),
    (LLAMA3, ' <|python_tag|>{"name": "add", "parameters": {"a": 1}}', "", [("add", {"a": 1})]),
    (LLAMA3, '{"type": "function", "name": "add", "parameters": {"a": 1}}', "", [("add", {"a": 1})]),
    (LLAMA3, '{"name": "add", "parameters": {}}; {"name": "look_up", "parameters": {}}', "", [("add", {}), ("look_up", {})]),
    (LLAMA3, '{"name": "Ada", "parameters": {"a": 1}}', '{"name": "Ada", "parameters": {"a": 1}}', []),
    (LLAMA3, '{"city": "Ulm"} it is', '{"city": "Ulm"} it is', []),
    (LLAMA3, "<|py is odd", "<|py is odd", []),
    (LLAMA3, 'Text, {"name": "add", "parameters": {}}', 'Text, {"name": "add", "parameters": {}}', []),
    (MISTRAL, '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}, {"name": "look_up", "arguments": {"a": "]"}}]', "",
     [("add", {"a": 1}), ("look_up", {"a": "]"})]),
    (MISTRAL, '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}, "id": "123456789"}]', "", [("add", {"a": 1})]),
    (MISTRAL, "[1, 2] is a list", "[1, 2] is a list", []),
    (MISTRAL_DIRECT, '[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]look_up{"b": {}}', "",
     [("add", {"a": 1}), ("look_up", {"b": {}})]),
]  # fmt: skip


def read(format: ToolFormat, pieces: list[str]) -> tuple[str, list[tuple[str, object]]]:
    parser = ToolCallParser(format, NAMES)
    parts = [part for piece in pieces for part in parser.push(piece)] + parser.finish()
    calls: list[list[str]] = []
    content = ""
    for part in parts:
        if isinstance(part, TextDelta):
            content += part.text
            continue
        if part.name is not None:
            assert part.call == len(calls), "calls begin in their order"
            calls.append([part.name, ""])
        if part.arguments:
            assert part.call == len(calls) - 1
            calls[-1][1] += part.arguments
    return content, [(name, json.loads(said)) for name, said in calls]


@pytest.mark.parametrize(("format", "text", "content", "calls"), CASES, ids=[text[:40] for _, text, _, _ in CASES])
def test_calls_are_found_however_the_text_is_cut(
    format: ToolFormat, text: str, content: str, calls: list[tuple[str, object]]
) -> None:
    dice = random.Random(text)
    cuts = [[text], list(text)]
    for _ in range(10):
        places = sorted(dice.sample(range(len(text)), 3))
        cuts.append([text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)])
    for pieces in cuts:
        found, said = read(format, pieces)
        assert (found.strip(), said) == (content, calls), pieces


def test_arguments_are_returned_as_they_come() -> None:
    parser = ToolCallParser(HERMES, NAMES)
    assert parser.push('<tool_call>\n{"name": "add", "arg') == []
    assert parser.push('uments": {"a"') == [ToolCallDelta(0, "add"), ToolCallDelta(0, arguments='{"a"')]
    assert parser.push(": 1}}") == [ToolCallDelta(0, arguments=": 1}")]
    assert parser.push("\n</tool_call>") == []


def test_text_is_held_back_only_while_it_may_be_a_call() -> None:
    parser = ToolCallParser(HERMES, NAMES)
    assert parser.push("One <tool") == [TextDelta("content", "One")]
    assert parser.push("box> two") == [TextDelta("content", " <toolbox> two")]


@pytest.mark.parametrize(
    ("template", "format"),
    [
        ("… <tool_call> …", HERMES),
        ("… [TOOL_CALLS] [ …", MISTRAL),
        ("… [TOOL_CALLS] + name + [ARGS] …", MISTRAL_DIRECT),
        ("… <|python_tag|> …", LLAMA3),
        ("{{ messages }}", HERMES),
    ],
)
def test_a_format_is_found_in_the_template(template: str, format: ToolFormat) -> None:
    assert format_of(template) is format
    assert format_of(template, "llama3_json") is LLAMA3
